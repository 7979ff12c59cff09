"""Baselines against their definitions, without a cache and without a batch."""

from __future__ import annotations

import pytest
import tiny
import torch

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
