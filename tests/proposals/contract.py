"""What every proposal must hold, whatever engine it draws from: called by the tests of each one.

Each check takes a proposal with temperature 0.8, M = 6, and 12 new tokens at most. `teacher` gives the [L, V] logits
that its model has for a prefix and a continuation. Those of chats take one with `chat_tokenizer`.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from daemon_fast import ops
from daemon_fast.errors import InvalidInput

PREFIXES = [[5, 9, 30], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11]]
SETTINGS = {"num_candidates": 6, "max_new_tokens": 12, "min_new_tokens": 0, "temperature": 0.8}

# Chats, and the token ids that the template makes of them: w50 is the user, w51 the assistant.
END = tiny.VOCABULARY - 1  # ends each message; <eos>, token 0, ends texts
CHATS = [
    [{"role": "user", "content": "w1 w2"}],
    [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4 w5"}, {"role": "user", "content": "w6"}],
]
RENDERED = [[52, 3, 4, END, 53], [52, 5, END, 53, 6, 7, END, 52, 8, END, 53]]


def chat_tokenizer():
    """The tiny tokenizer with a template in which a token of its own, in the place of the last word, ends messages."""
    made = tiny.tokenizer(tiny.WORDS - 1)
    made.add_special_tokens({"additional_special_tokens": ["<end>"]})
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{{ {'user': 'w50 ', 'assistant': 'w51 '}[m.role] ~ m.content ~ ' <end> ' }}{% endfor %}"
        "{% if add_generation_prompt %}w51{% endif %}"
    )
    return made


def saved(path, family="llama"):
    """A folder with a tiny model and this tokenizer."""
    tiny.model(family).save_pretrained(path)
    chat_tokenizer().save_pretrained(path)
    return str(path)


def shapes_and_lengths_are_right(proposal):
    c = proposal.propose(PREFIXES, seed=0)
    assert c.shape == (3, 6)
    assert c.prefix_tokens == PREFIXES
    assert (c.tokens.dtype, c.lengths.dtype) == (torch.int64, torch.int64)
    assert (c.token_log_p.dtype, c.token_log_q.dtype) == (torch.float32, torch.float32)
    assert ((c.lengths >= 0) & (c.lengths <= 12)).all()
    assert c.tokens.shape[1] <= 12
    assert len(c.texts) == 18
    assert len(set(c.texts)) > 6  # candidates of a prefix differ


def log_probs_are_the_models(proposal, teacher, atol=1e-3, mean=None, prefixes=PREFIXES, known=1.0):
    """known : the share of candidates, at least, whose log-probabilities must be known; mean : of errors, at most"""
    c = proposal.propose(prefixes, seed=0)
    told, errors = ~c.token_log_p.isnan().any(1), []
    assert told.double().mean() >= known
    for r in told.nonzero()[:, 0].tolist():
        length = int(c.lengths[r])
        drawn = c.tokens[r, :length].tolist()
        logits = teacher(prefixes[r // 6], drawn)
        want = torch.log_softmax(logits.double(), -1)[range(length), drawn]
        np.testing.assert_allclose(c.token_log_p[r, :length].double(), want, atol=atol, rtol=0)
        errors += (c.token_log_p[r, :length] - want).abs().tolist()
    assert np.mean(errors) <= (mean or atol)


def a_seed_gives_the_same_candidates_again(proposal):
    first, again, other = (proposal.propose(PREFIXES, seed) for seed in (5, 5, 6))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.lengths, again.lengths)
    torch.testing.assert_close(first.token_log_p, again.token_log_p, atol=1e-4, rtol=0)
    assert first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)


def a_seed_each_gives_what_it_gives_alone(proposal):
    seeds = [5, 6, 5]
    together = proposal.propose(PREFIXES, seeds)
    for i, (prefix, seed) in enumerate(zip(PREFIXES, seeds, strict=True)):
        own, alone = together.of_prefix(i), proposal.propose([prefix], seed)
        assert own.prefix_tokens == [prefix]
        assert torch.equal(own.lengths, alone.lengths)
        for row, want, n in zip(own.tokens.tolist(), alone.tokens.tolist(), alone.lengths.tolist(), strict=True):
            assert row[:n] == want[:n]
    with pytest.raises(InvalidInput, match="seed has 2 seeds for 3 prefixes: give one, or one for each"):
        proposal.propose(PREFIXES, [5, 6])


def score_gives_what_drawing_gave(proposal, atol=1e-3):
    c = proposal.propose(PREFIXES, seed=2)
    rows = [(r, int(c.lengths[r])) for r in range(len(c.tokens)) if c.lengths[r] > 0]
    scored = proposal.score([PREFIXES[r // 6] for r, _ in rows], [c.tokens[r, :n].tolist() for r, n in rows])
    assert scored.shape == (len(rows), 1)
    for i, (r, n) in enumerate(rows):
        torch.testing.assert_close(scored.token_log_p[i, :n], c.token_log_p[r, :n], atol=atol, rtol=0)


def tokens_follow_the_distribution(many, teacher, prefix=PREFIXES[0]):
    """many : a proposal of the same model with some thousand candidates of one token"""
    m = many.settings.num_candidates
    c = many.propose([prefix], seed=3)
    p = torch.softmax(teacher(prefix, [0])[0].double() / many.settings.temperature, -1)
    counts = torch.bincount(c.tokens[:, 0], minlength=len(p)) / m
    assert float((counts - p).abs().max()) < 5 * float((p * (1 - p) / m).sqrt().max())


def expected_metrics_agree(many, reference, prefix=PREFIXES[0]):
    """Mean repetition of two proposals' candidates, within four standard errors."""
    means, errors = [], []
    for proposal in (many, reference):
        c = proposal.propose([prefix], seed=1)
        values = ops.repetition(c.tokens, c.lengths, [2], [8]).double()
        means.append(values.mean(0))
        errors.append(values.var(0) / len(values))
    assert ((means[0] - means[1]).abs() < 4 * (errors[0] + errors[1]).sqrt()).all()


def bad_prefixes_are_named(proposal, context, vocab_size):
    for prefixes, message in (
        ([], "there are no prefixes"),
        ([[5], []], "prefix 1 is empty"),
        ([[5] * (context - 11)], f"it exceeds the model's context of {context}"),
        ([[5, vocab_size]], f"token {vocab_size}, outside the vocabulary of {vocab_size}"),
        ([[-1]], "token -1, outside"),
    ):
        with pytest.raises(InvalidInput, match=message):
            proposal.propose(prefixes, 0)


def chats_are_answered(proposal, teacher):
    """Chats and their token ids are one prompt; several in one batch, beside a text."""
    c = proposal.propose([*CHATS, "w3 w7"], seed=0)
    assert c.prefix_tokens == [*RENDERED, [5, 9]]
    by_ids = proposal.propose([*RENDERED, [5, 9]], seed=0)
    assert torch.equal(c.tokens, by_ids.tokens)
    torch.testing.assert_close(c.token_log_p, by_ids.token_log_p, atol=1e-4, rtol=0)
    assert proposal.propose(CHATS[0], seed=0).prefix_tokens == RENDERED[:1]  # a list of messages is one chat
    log_probs_are_the_models(proposal, teacher, prefixes=c.prefix_tokens)
    for chat, message in (
        ([{"role": "system", "content": "w1"}, *CHATS[0]], "the chat template refuses .*: no system message"),
        ([*CHATS[0], {"role": "assistant", "content": "w1"}], "there is nothing to answer"),
        ([{"role": "user", "content": None}], "has a content of type NoneType"),
    ):
        with pytest.raises(InvalidInput, match=f"prefix 1.*{message}"):
            proposal.propose([CHATS[0], chat], 0)


def answers_end(many, teacher, prompts=RENDERED, atol=1e-3):
    """With hundreds of candidates: which ended, how long they are, and that the end is part of log p.

    What is drawn up to the end is compared with a plain pass; empty answers are among them.
    """
    m, longest = many.settings.num_candidates, many.settings.max_new_tokens
    c, counts = many.propose(prompts, seed=7), many.settings.count_eos
    empty = full = 0
    for r, row in enumerate(c.tokens.tolist()):
        drawn = int((c.token_log_p[r] != 0).sum())
        row = row[:drawn]
        ended = row[-1] in (0, END)
        assert not {0, END} & set(row[:-1])
        assert ended or drawn == longest
        assert bool(c.ended[r]) == ended
        assert int(c.lengths[r]) == drawn - (ended and not counts)
        empty += drawn == 1 and ended
        full += not ended
        prefix = RENDERED[r // m]
        want = torch.log_softmax(teacher(prefix, row).double(), -1)[range(drawn), row].sum()
        assert abs(float(c.log_p[r // m, r % m] - want)) < atol * longest
    assert empty > 0
    assert 0 < full < len(c.tokens)


def responses_are_scored_to_their_end(proposal, teacher, atol=1e-3):
    """Empty ones, ones that ended by either token, ones that were cut."""
    rows = [[5, 9, END], [END], [7, 8, 0], [0], [5, 9], [7] * 12]
    prefixes = [RENDERED[i % 2] for i in range(len(rows))]
    c, counts = proposal.score(prefixes, rows), proposal.settings.count_eos
    assert c.shape == (len(rows), 1)
    assert c.ended.tolist() == [True, True, True, True, False, False]
    assert c.lengths.tolist() == ([3, 1, 3, 1, 2, 12] if counts else [2, 0, 2, 0, 2, 12])
    for i, (prefix, row) in enumerate(zip(prefixes, rows, strict=True)):
        want = torch.log_softmax(teacher(prefix, row).double(), -1)[range(len(row)), row]
        torch.testing.assert_close(c.token_log_p[i, : len(row)].double(), want, atol=atol, rtol=0)
        assert (c.token_log_p[i, len(row) :] == 0).all()
    assert [c.texts[i] for i in (1, 3)] == ["", ""]
