"""Distance to human, its noise floor, and MAUVE."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch

from daemon_fast import TransformersProposal
from daemon_fast.errors import InvalidInput
from daemon_fast.experiments.measures import (
    distance_interval,
    distance_to_human,
    embed,
    mauve_scores,
    noise_floor,
    relative_rmse,
    weighted_mean,
)


def test_distance_by_hand():
    human = torch.tensor([[1.0, 10.0], [3.0, 30.0]])  # means 2 and 20, deviations sqrt(2) and sqrt(200)
    method = torch.tensor([[4.0, 20.0]])
    assert distance_to_human(method, human, human.std(0)) == pytest.approx(math.sqrt((2 / math.sqrt(2)) ** 2 / 2))
    assert distance_to_human(method, human, torch.tensor([1.0, 1.0])) == pytest.approx(math.sqrt(2))
    assert relative_rmse(method, human) == pytest.approx(math.sqrt(1.0 / 2))
    with pytest.raises(InvalidInput, match="metric 0 does not vary over the human texts"):
        distance_to_human(method, human, torch.tensor([0.0, 1.0]))


def test_noise_floor_is_the_distance_of_a_perfect_method():
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(400):
        human = torch.randn(50, 8, generator=generator)
        squares.append(distance_to_human(torch.zeros(1, 8), human, human.std(0)) ** 2)
    assert math.sqrt(sum(squares) / 400) == pytest.approx(noise_floor(50), rel=0.05)


@pytest.mark.parametrize("true", [0.0, 0.05, 0.4])
def test_the_interval_of_a_distance_holds_it(true):
    """A percentile bootstrap of the norm itself holds 0 never, and 0.05 of these hardly ever."""
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        shared = 0.5 * torch.randn(100, 1, generator=generator, dtype=torch.float64)
        differences = true + shared + torch.randn(100, 6, generator=generator, dtype=torch.float64)
        low, high = distance_interval(differences, torch.randint(100, (500, 100), generator=generator))
        inside += low <= true <= high
        assert 0 <= low <= float(differences.mean(0).square().mean().sqrt()) <= high
    assert inside >= 0.85 * 60


def test_weighted_mean():
    features, weights = torch.randn(3, 4, 2), torch.softmax(torch.randn(3, 4), 1)
    torch.testing.assert_close(weighted_mean(features, weights), torch.einsum("nmk,nm->nk", features, weights).double())


def test_mauve_tells_clouds_apart():
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    cloud, same = rng.normal(size=(2, 100, 8)).astype(np.float32)
    near, far, mixed = (mauve_scores(cloud, x, 2) for x in (same[None], same[None] + 5, np.stack([same, same + 5])))
    assert len(near) == 2
    assert min(near) > 0.8 > 0.1 > max(far)
    assert mixed == [near[0], far[1]]  # each seed takes the next draw


@torch.inference_mode()
def test_the_models_own_embedding_is_that_of_the_last_token():
    model = tiny.model("gpt2")
    proposal = TransformersProposal(model, tiny.tokenizer(), num_candidates=2, max_new_tokens=4)
    texts = [[5, 9, 30], [8, 2], [40, 3, 7, 9]]
    found = embed(texts, proposal, "model", None)
    for text, got in zip(texts, found, strict=True):
        want = model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0, -1]
        np.testing.assert_allclose(got, want, atol=1e-5)
