"""Baselines against their definitions, without a cache and without a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from toy_studies import collected

from daemon_fast.errors import InvalidInput
from daemon_fast.experiments import baselines

PREFIXES = [[5, 9, 30], [8, 8, 2], [40, 3, 7]]


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


@pytest.mark.parametrize("method", baselines.BASELINES)
def test_each_gives_one_continuation_a_prefix_without_end_of_text(model, method):
    out = baselines.decode(method, model, PREFIXES, 9, seed=1)
    assert out.shape == (3, 9)
    assert (out != 0).all()
    assert torch.equal(out, baselines.decode(method, model, PREFIXES, 9, seed=1))


def last_logits(model, ids):
    logits = model(ids, use_cache=False).logits[0, -1].float()
    logits[0] = -torch.inf  # end of text
    return logits


@pytest.mark.parametrize("logits", [[3.0, 2.9, 1.0, -4.0], [0.0, 0.0, 0.0, 0.0], [5.0, -torch.inf, 4.5, -2.0]])
def test_truncations(logits):
    """By their definitions, token by token; end-of-text, whose logit is -inf, takes no part."""
    p = torch.tensor(logits).double().softmax(0).tolist()
    known = [logit for logit in logits if logit > -torch.inf]
    mean = sum(known) / len(known)
    sigma = (sum((logit - mean) ** 2 for logit in known) / len(known)) ** 0.5
    agree = sum(x * x for x in p)
    for threshold, want in (
        (baselines.top_n_sigma, [logit >= max(known) - sigma - 1e-6 for logit in logits]),
        (baselines.p_less, [x >= agree - 1e-7 for x in p]),
    ):
        rows = torch.tensor([logits, [0.0, 1.0, 2.0, 30.0]])
        kept = baselines.Truncation(threshold)(None, rows - torch.tensor([[0.0], [7.0]]))
        assert (kept > -torch.inf).tolist() == [want, [False, False, False, True]]


@pytest.mark.parametrize(("method", "threshold"), [("top-n-sigma 1", "top_n_sigma"), ("p-less", "p_less")])
@torch.inference_mode()
def test_only_kept_tokens_are_drawn(model, method, threshold):
    out = baselines.decode(method, model, PREFIXES * 5, 9, seed=1)
    below = 0
    for prefix, drawn in zip(PREFIXES * 5, out.tolist(), strict=True):
        for t, token in enumerate(drawn):
            logits = last_logits(model, torch.tensor([prefix + drawn[:t]]))[None]
            kept = logits >= getattr(baselines, threshold)(logits) - 1e-4
            assert kept[0, token]
            below += int((~kept).sum())
    assert below > 0


def test_choices_of_the_same_candidates():
    held_out = collected(n=7, m=9)
    held_out = replace(held_out, lengths=torch.arange(1, 64).reshape(7, 9))
    targets = torch.tensor([0.3, 0.6])
    found = baselines.choices(held_out, targets)
    assert list(found) == list(baselines.CHOICES)
    for i in range(7):
        gaps = [
            sum(((float(row[k]) - float(targets[k])) / float(held_out.spread[k])) ** 2 for k in range(2))
            for row in held_out.features[i]
        ]
        assert gaps[int(found["nearest candidate"][i])] == pytest.approx(min(gaps))
        per_token = [float(log_p) / int(n) for log_p, n in zip(held_out.log_p[i], held_out.lengths[i], strict=True)]
        assert per_token[int(found["likeliest candidate"][i])] == pytest.approx(max(per_token))


@torch.inference_mode()
def test_contrastive_decoding(model):
    long = list(range(3, 23))  # longer than the window: within it, both models would be the same
    for amateur, window in ((None, baselines.AMATEUR_WINDOW), (tiny.model("gpt2"), None)):
        got = baselines.decode("contrastive decoding", model, [long], 20, 0, amateur)[0].tolist()
        ids = list(long)
        for token in got:
            expert = last_logits(model, torch.tensor([ids])).log_softmax(-1)
            weak = (amateur or model)(torch.tensor([ids if window is None else ids[-window:]]), use_cache=False)
            score = expert - weak.logits[0, -1].float().log_softmax(-1)
            score[expert.exp() < 0.1 * expert.exp().max()] = -torch.inf
            assert token == int(score.argmax())
            ids.append(token)


@torch.inference_mode()
def test_contrastive_search(model):
    got = baselines.decode("contrastive search", model, PREFIXES, 8, 0).tolist()
    for prefix, drawn in zip(PREFIXES, got, strict=True):
        ids = list(prefix)
        for token in drawn:
            p, tokens = last_logits(model, torch.tensor([ids])).softmax(-1).topk(5)
            scores = []
            for probability, candidate in zip(p, tokens, strict=True):
                out = model(torch.tensor([[*ids, int(candidate)]]), use_cache=False, output_hidden_states=True)
                states = out.hidden_states[-1][0]
                cosine = torch.nn.functional.cosine_similarity(states[-1:], states[:-1]).max()
                scores.append(float(0.4 * probability - 0.6 * cosine))
            assert token == int(tokens[scores.index(max(scores))])
            ids.append(token)


def test_an_unknown_one_is_named(model):
    with pytest.raises(InvalidInput, match="unknown baseline 'lucky'; known: greedy, beam 5"):
        baselines.decode("lucky", model, PREFIXES, 3, 0)
