"""Distance to human, its noise floor, and MAUVE."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch

from daemon_fast import TransformersProposal
from daemon_fast.errors import Undefined
from daemon_fast.experiments.measures import (
    distance_interval,
    distance_to_human,
    embed,
    mauve_scores,
    noise_floor,
    relative_rmse,
    wasserstein,
    weighted_mean,
)


def test_distance_by_hand():
    human = torch.tensor([[1.0, 10.0], [3.0, 30.0]])  # means 2 and 20, deviations sqrt(2) and sqrt(200)
    method = torch.tensor([[4.0, 30.0], [6.0, 50.0]])  # the same noise: the gap of every prefix is 3 and 20
    want = math.sqrt(((3 / math.sqrt(2)) ** 2 + (20 / math.sqrt(200)) ** 2) / 2)
    assert distance_to_human(method, human, human.std(0)) == pytest.approx(want)
    # The other way around gaps are 5 and 1, 40 and 0: variances 8 and 800, and half of them the noise of the means.
    swapped = (5 + 1) ** 2 / 4 - 8 / 2 + 20**2 - 800 / 2
    assert distance_to_human(method.flip(0), human, torch.ones(2)) == pytest.approx(math.sqrt(swapped / 2))
    assert relative_rmse(method, human) == pytest.approx(math.sqrt((1.5**2 + 1) / 2))
    assert relative_rmse(method, human - human.mean(0)) is None
    for measure in (distance_to_human, distance_interval):
        with pytest.raises(Undefined, match="metric 0 does not vary over the human texts"):
            measure(method, human, torch.tensor([0.0, 1.0]))
        with pytest.raises(Undefined, match="needs two prefixes at least"):
            measure(method[:1], human, torch.ones(2))


def test_the_squared_distance_has_no_bias():
    """Also where more human texts than prefixes were measured, and share noise with them."""
    generator = torch.Generator().manual_seed(0)
    squares = {50: [], 80: []}
    for _ in range(1000):
        human = torch.randn(80, 8, generator=generator)
        method = 0.4 + 0.5 * human[:50] + 0.5 * torch.randn(50, 8, generator=generator)
        for count, found in squares.items():
            found.append(distance_to_human(method, human[:count], torch.ones(8)) ** 2)
    for found in squares.values():  # their deviation is about 2 * 0.4 / sqrt(8 * 50)
        assert sum(found) / len(found) == pytest.approx(0.16, abs=0.005)


def test_noise_floor_is_what_the_human_means_add():
    """The distance that a method of exactly human expectations would show, were noise not taken off."""
    generator = torch.Generator().manual_seed(0)
    gaps = torch.stack([torch.randn(50, 8, generator=generator).mean(0) for _ in range(400)])
    assert float(gaps.square().mean().sqrt()) == pytest.approx(noise_floor(50), rel=0.05)


@pytest.mark.parametrize("true", [0.0, 0.05, 0.1, 0.4])
@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_the_interval_covers_the_distance(true, correlation):
    """Of 300 samples of 146 prefixes and 8 metrics; 95% is meant, and a true 95% falls below 92% once in 100."""
    generator, runs, covered = torch.Generator().manual_seed(2), 300, 0
    mix = torch.full((8, 8), correlation, dtype=torch.float64).fill_diagonal_(1)
    mix = torch.linalg.cholesky(mix).T
    # A gap in all metrics alike lies along the largest noise, one in a single metric does not.
    for run in range(runs):
        gap = torch.full((8,), true) if run % 2 else torch.tensor([true * math.sqrt(8)] + [0.0] * 7)
        human, own = torch.randn(2, 146, 8, generator=generator, dtype=torch.float64) @ mix
        low, high = distance_interval(0.45 * own + gap, human, torch.ones(8), run)
        covered += low <= true <= high
        assert 0 <= low <= high
    assert covered / runs >= 0.92


def test_the_interval_falls_with_the_number_of_prefixes():
    generator = torch.Generator().manual_seed(0)
    human, method = torch.randn(2, 10_000, 8, generator=generator)
    few, many = (distance_interval(method[:n] + 0.3, human[:n], torch.ones(8)) for n in (100, 10_000))
    assert many[1] - many[0] == pytest.approx((few[1] - few[0]) / 10, rel=0.4)
    assert many[0] < 0.3 < many[1]
    # Luck does not shorten an interval: a method whose texts are the human ones is as near as noise lets one see.
    low, high = distance_interval(method[:100] - method[:100].mean(0) + human[:100].mean(0), human[:100], torch.ones(8))
    assert low == 0
    assert high > 0.05


def test_wasserstein_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    human = torch.randn(37, generator=generator).round(decimals=1)  # with ties
    values, weights = torch.randn(50, generator=generator).round(decimals=1), torch.rand(50, generator=generator)
    want = stats.wasserstein_distance(values.double(), human.double(), weights.double())
    assert wasserstein(values, weights / weights.sum(), human) == pytest.approx(want, abs=1e-6)
    assert wasserstein(human + 2, torch.full((37,), 1 / 37), human) == pytest.approx(2, rel=1e-5)
    assert wasserstein(torch.zeros(1), torch.ones(1), torch.zeros(3)) == 0


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
