"""Candidates from Transformers models: log-probabilities, sampling, end of text, seeds."""

from __future__ import annotations

import contract
import numpy as np
import pytest
import tiny
import torch
from scipy import stats

from daemon_fast import Candidates, Energy, SIRDecoder, TransformersProposal, metrics
from daemon_fast.errors import InvalidInput
from daemon_fast.proposals import transformers as transformers_proposal

PREFIXES = [[5, 9, 30], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11]]


def proposal(family="llama", **settings):
    settings = {"num_candidates": 6, "max_new_tokens": 12, "min_new_tokens": 0, **settings}
    return TransformersProposal(tiny.model(family), tiny.tokenizer(), **settings)


def teacher_forced(model, prefix, continuation):
    """[L, V] float64 logits of one unpadded sequence, in one pass without a cache."""
    with torch.inference_mode():
        logits = model(torch.tensor([prefix + continuation]), use_cache=False).logits[0].double()
    return logits[len(prefix) - 1 : -1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("prefixes", [PREFIXES, [[5, 9, 30], [8, 8, 2]]], ids=["padded", "equal lengths"])
def test_log_probs_agree_with_a_teacher_forced_pass(family, prefixes):
    p = proposal(family, temperature=0.8)
    c = p.propose(prefixes, seed=0)
    ends = (c.token_log_p != 0).sum(1)  # the end-of-text token's own included
    assert c.shape == (len(prefixes), 6)
    for r in range(len(c.tokens)):
        drawn = c.tokens[r, : ends[r]].tolist()
        logits = teacher_forced(p.model, prefixes[r // 6], drawn)
        for got, scaled in ((c.token_log_p, logits), (c.token_log_q, logits / 0.8)):
            want = torch.log_softmax(scaled, -1)[range(len(drawn)), drawn]
            np.testing.assert_allclose(got[r, : len(drawn)].double(), want, atol=1e-4, rtol=0)
            assert (got[r, len(drawn) :] == 0).all()
    torch.testing.assert_close(c.log_p, c.token_log_p.double().sum(1).reshape(c.shape))


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.6}, {"min_p": 0.1}, {"min_new_tokens": 12}],
)
def test_log_q_is_normalised_over_what_can_be_drawn(settings):
    p = proposal(temperature=0.9, **settings)
    c = p.propose(PREFIXES, seed=1)
    for r in range(len(c.tokens)):
        drawn = c.tokens[r, : int((c.token_log_p[r] != 0).sum())].tolist()
        logits = teacher_forced(p.model, PREFIXES[r // 6], drawn) / 0.9
        if settings.get("min_new_tokens"):
            logits[:, 0] = -torch.inf
        if k := settings.get("top_k"):
            logits = logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)
        if top_p := settings.get("top_p"):
            ordered, order = logits.softmax(-1).sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p
            logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
        if min_p := settings.get("min_p"):
            probabilities = logits.softmax(-1)
            logits = logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
        want = torch.log_softmax(logits, -1)[range(len(drawn)), drawn]
        np.testing.assert_allclose(c.token_log_q[r, : len(drawn)].double(), want, atol=1e-4, rtol=0)


def test_tokens_follow_the_models_distribution():
    p = proposal(num_candidates=20_000, max_new_tokens=1, temperature=0.7)
    c = p.propose([[5, 9, 30]], seed=3)
    expected = torch.softmax(teacher_forced(p.model, [5, 9, 30], [0]) / 0.7, -1)[0].numpy() * 20_000
    counts = np.bincount(c.tokens[:, 0].numpy(), minlength=tiny.VOCABULARY)
    common = expected > 5
    observed, wanted = (np.append(values[common], values[~common].sum()) for values in (counts, expected))
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


def test_it_meets_the_contract():
    p, teacher = proposal(**contract.SETTINGS), lambda *rows: teacher_forced(p.model, *rows)
    many = proposal(**{**contract.SETTINGS, "num_candidates": 5000, "max_new_tokens": 1})
    contract.shapes_and_lengths_are_right(p)
    contract.log_probs_are_the_models(p, teacher)
    contract.a_seed_gives_the_same_candidates_again(p)
    contract.a_seed_each_gives_what_it_gives_alone(p)
    contract.score_gives_what_drawing_gave(p)
    contract.tokens_follow_the_distribution(many, teacher)
    contract.bad_prefixes_are_named(p, tiny.CONTEXT, tiny.VOCABULARY)


@pytest.mark.parametrize("count_eos", [False, True])
def test_it_meets_the_contract_of_answers(count_eos):
    def make(**settings):
        settings = {**contract.SETTINGS, "count_eos": count_eos, **settings}
        return TransformersProposal(tiny.model(), contract.chat_tokenizer(), **settings)

    p, teacher = make(), lambda *rows: teacher_forced(p.model, *rows)
    contract.chats_are_answered(p, teacher)
    contract.answers_end(make(num_candidates=300), teacher)
    contract.responses_are_scored_to_their_end(p, teacher)


def test_log_probs_unknown_are_an_error_where_they_are_needed():
    c = proposal().propose(PREFIXES, 0)
    unknown = Candidates.from_rows(
        c.tokens.tolist(), c.token_log_p.tolist(), None, c.lengths.tolist(), c.prefix_tokens, c.detokenize
    )
    assert torch.equal(unknown.tokens, c.tokens)
    assert torch.equal(unknown.log_p, c.log_p)
    with pytest.raises(InvalidInput, match="gives no log-probabilities under the proposal"):
        _ = unknown.log_q
    unknown = Candidates.from_rows(c.tokens.tolist(), None, None, c.lengths.tolist(), c.prefix_tokens, c.detokenize)
    with pytest.raises(InvalidInput, match="ent needs log-probabilities at temperature 1"):
        metrics.features(metrics.parse(["sr_2", "ent"]), unknown)


@pytest.mark.parametrize("count_eos", [False, True])
def test_end_of_text_ends_a_candidate(count_eos):
    p = proposal(num_candidates=200, count_eos=count_eos, min_new_tokens=3)
    c = p.propose([[5, 9]], seed=0)
    ended = 0
    for row, length in zip(c.tokens.tolist(), c.lengths.tolist(), strict=True):
        assert 0 not in row[:3]
        if 0 in row[:length] or length < 12:
            ended += 1
            end = length - 1 if count_eos else length
            assert row[end] == 0
            assert 0 not in row[:end]
            assert row[end:] == [0] * (12 - end)
    assert 0 < ended < 200
    drawn = c.lengths if count_eos else c.lengths + (c.lengths < 12)
    assert torch.equal((c.token_log_p != 0).sum(1), drawn)  # its log-probability is kept either way
    assert all("<eos>" not in text for text in c.texts)


def test_each_prompt_runs_once_and_none_is_padded():
    p, shapes = proposal(num_candidates=50, min_new_tokens=12), []
    hook = p.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    p.propose([[1]], seed=0)  # the trial
    shapes.clear()
    p.propose([*PREFIXES, [4]], seed=0)
    hook.remove()
    assert shapes == [(2, 1), (1, 3), (1, 9), *[(200, 1)] * 11]
    assert sorted(map(len, [*PREFIXES, [4]])) == [1, 1, 3, 9]


def test_a_forward_of_the_models_own_is_what_runs():
    """Which the twin can't be given, if it is a closure: the model's own attention and cache then."""
    p = proposal()
    before = p.propose(PREFIXES, seed=0)
    forward = p.model.model.forward
    p.model.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.warns(UserWarning, match="growing cache"):
        again = p.propose(PREFIXES, seed=0)
    assert (p.path, torch.equal(again.tokens, before.tokens)) == ("growing", True)
    torch.testing.assert_close(again.token_log_p, before.token_log_p, atol=1e-4, rtol=0)


def test_score_gives_what_drawing_gave():
    for settings in ({}, {"top_k": 10, "temperature": 0.9}, {"min_new_tokens": 12}):
        p = proposal(**settings)
        c = p.propose(PREFIXES, seed=2)
        rows = [(r, int(c.lengths[r])) for r in range(len(c.tokens)) if c.lengths[r] > 0]
        scored = p.score([PREFIXES[r // 6] for r, _ in rows], [c.tokens[r, :n].tolist() for r, n in rows])
        for i, (r, n) in enumerate(rows):
            torch.testing.assert_close(scored.token_log_p[i, :n], c.token_log_p[r, :n], atol=1e-4, rtol=0)
            torch.testing.assert_close(scored.token_log_q[i, :n], c.token_log_q[r, :n], atol=1e-4, rtol=0)
        assert scored.shape == (len(rows), 1)


def test_score_holds_as_many_logits_as_it_may(monkeypatch):
    """A GPU beside a large model has no room for the logits of all texts, where a vocabulary has 256,000 tokens."""
    p, seen = proposal(), []
    p.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: seen.append(ids[0].numel()))
    prefixes, continuations = [[5, 9, 30]] * 7, [[i + 1, 4, 5] for i in range(7)]
    whole = p.score(prefixes, continuations)
    assert seen[-1] == 42
    monkeypatch.setitem(transformers_proposal.SCORE_LOGITS, "cpu", 20 * tiny.VOCABULARY)
    parts = p.score(prefixes, continuations)
    assert seen[-3:] == [18, 18, 6]
    torch.testing.assert_close(parts.token_log_p, whole.token_log_p, atol=1e-5, rtol=0)


@pytest.fixture
def defaults():
    """Torch's default dtype and device, restored after the test."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
def test_torchs_defaults_have_no_part(default):
    """Scripts set them for what they make themselves; the model's weights are where and what they are."""
    p = proposal()
    energy = Energy(metrics.parse(["sr_2", "nats"]), torch.ones(2, dtype=torch.float64), torch.zeros(2), p.settings)
    decoder = SIRDecoder(energy, p)

    def everything():
        c = p.propose(PREFIXES, seed=2)
        scored = p.score(PREFIXES, [[5, 6], [7], [8]])
        return c, scored, decoder(PREFIXES, num_samples=2, seed=3)

    want = everything()
    if isinstance(default, torch.device):
        torch.set_default_device(default)
    else:
        torch.set_default_dtype(default)
    got = everything()
    for a, b in zip(got[:2], want[:2], strict=True):
        for name in ("tokens", "lengths", "token_log_p", "token_log_q", "ended"):
            assert getattr(a, name).dtype == getattr(b, name).dtype
            assert torch.equal(getattr(a, name), getattr(b, name))
    assert torch.equal(got[2].index, want[2].index)


def test_a_gradient_may_be_taken_behind_candidates():
    """They are drawn in inference mode, whose tensors could not be saved for a backward pass."""
    p = proposal()
    drawn = p.propose(PREFIXES, 0)
    x = torch.ones((), requires_grad=True)
    for c in (drawn, p.score(PREFIXES, [[5, 6], [7], [8]])):
        (gradient,) = torch.autograd.grad((x * c.token_log_p).sum(), x)
        torch.testing.assert_close(gradient, c.token_log_p.sum())
        loss = p.model(c.tokens, labels=c.tokens).loss
        loss.backward()
        c.lengths.add_(0)
    assert p.model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("seed", [np.int64(7), np.uint8(7), [np.int64(7)] * 3], ids=repr)
def test_seeds_of_numpy(seed):
    p = proposal()
    want = p.propose(PREFIXES, [7] * 3 if isinstance(seed, list) else 7)
    assert torch.equal(p.propose(PREFIXES, seed).tokens, want.tokens)


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.0, None, "1", torch.tensor(1), [1, 2, -3], [1, 2, None]], ids=repr)
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(InvalidInput, match=r"seed = .* must be an integer from 0 to 2\^63 - 1"):
        proposal().propose(PREFIXES, seed)


def test_nothing_to_draw_is_named():
    p = TransformersProposal(
        tiny.model(), eos_token_ids=list(range(tiny.VOCABULARY)), num_candidates=2, max_new_tokens=3
    )
    with pytest.raises(InvalidInput, match=r"prefix 0: .* its candidate 0 are all -inf.*min_new_tokens = 1 leaves out"):
        p.propose([[5]], 0)
    p = proposal(num_candidates=2)
    p.propose(PREFIXES, 0)

    def spoil(module, inputs, out):
        if len(out) == 6:
            out = out.clone()
            out[3] = torch.nan
        return out

    p.model.lm_head.register_forward_hook(spoil)
    with pytest.raises(InvalidInput, match=r"prefix 1: the logits behind its candidate 1 .* hold NaN or \+inf$"):
        p.propose(PREFIXES, 0)


def test_weights_of_eight_bits_are_drawn_from():
    """Layers of FP8 checkpoints hold weights that torch's norms don't know, and compute with what they stand for."""
    p = proposal()
    layer = p.model.model.layers[0].mlp.up_proj
    narrow = layer.weight.detach().to(torch.float8_e4m3fn)
    layer.weight = torch.nn.Parameter(narrow.float(), requires_grad=False)
    want = p.propose(PREFIXES, 0)
    layer.weight = torch.nn.Parameter(narrow, requires_grad=False)
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight.float())
    assert torch.equal(p.propose(PREFIXES, 0).tokens, want.tokens)


@pytest.mark.parametrize("eos", [3, np.int64(3), torch.tensor(3), torch.tensor([3]), (3,)], ids=repr)
def test_end_of_text_tokens_of_any_kind(eos):
    assert TransformersProposal(tiny.model(), eos_token_ids=eos).eos_token_ids == [3]


@pytest.mark.parametrize("eos", [62, -1, 3.0, True, "3", [None]], ids=repr)
def test_what_is_no_end_of_text_token_is_refused(eos):
    with pytest.raises(InvalidInput, match="eos_token_ids"):
        TransformersProposal(tiny.model(), eos_token_ids=eos)


def test_strings_and_their_token_ids_are_the_same_prefix():
    p = proposal()
    by_text, by_ids = p.propose(["w3 w7 w28"], 0), p.propose([[5, 9, 30]], 0)
    assert torch.equal(by_text.tokens, by_ids.tokens)
    assert by_ids.prefix_texts == ["w3 w7 w28"]


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ([], "there are no prefixes"),
        ([[5], []], "prefix 1 is empty"),
        ([""], "prefix 0 is empty"),
        ([[5] * 53], r"prefix 0 has 53 tokens; with max_new_tokens = 12 it exceeds the model's context of 64"),
        ([[5, 62]], "prefix 0 has token 62, outside the vocabulary of 62"),
        ([[-1]], "prefix 0 has token -1, outside"),
    ],
)
def test_bad_prefixes_are_named(prefixes, message):
    with pytest.raises(InvalidInput, match=message):
        proposal().propose(prefixes, seed=0)


def test_without_a_tokenizer_prefixes_are_ids():
    p = TransformersProposal(tiny.model(), num_candidates=2, max_new_tokens=3)
    assert p.propose([[5]], 0).tokens.shape == (2, 3)
    with pytest.raises(InvalidInput, match="made without a tokenizer"):
        p.propose(["w1"], 0)


@pytest.mark.parametrize(
    ("prefixes", "continuations", "message"),
    [
        ([], [], "0 prefixes and 0 continuations"),
        ([[5]], [[6], [7]], "1 prefixes and 2 continuations"),
        ([[5]], [[]], "continuation 0 is empty"),
        ([[]], [[5]], "prefix 0 is empty"),
        ([[5], [6]], [[7], [999]], "continuation 1 has token 999, outside the vocabulary of 62"),
        ([[-1]], [[7]], "prefix 0 has token -1, outside"),
        (["w1"], [[7]], "prefix 0 = 'w1' must be a list of token ids"),
        ([5], [[7]], "prefix 0 = 5 must be a list of token ids"),
        ([[5]], [[7, 5.7]], "continuation 0 has 5.7 at position 1: a token id is an integer"),
    ],
)
def test_what_can_not_be_scored_is_named(prefixes, continuations, message):
    with pytest.raises(InvalidInput, match=message):
        proposal().score(prefixes, continuations)


def test_a_seed_out_of_range_and_a_module_that_is_no_model_are_named():
    with pytest.raises(InvalidInput, match=r"seed = 1180591620717411303424 must be an integer from 0 to 2\^63 - 1"):
        proposal().propose(PREFIXES, seed=2**70)
    with pytest.raises(InvalidInput, match="model is a Linear without a configuration"):
        TransformersProposal(torch.nn.Linear(2, 2))
