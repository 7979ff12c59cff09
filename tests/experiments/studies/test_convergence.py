"""Bias and variance of the draw on the listed model, and the slope that is claimed from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_studies import FITTED, MU, P, collected, draw, tilted

from daemon_fast.experiments.collected import NotDone
from daemon_fast.experiments.studies import convergence

pytest.importorskip("matplotlib")


def test_bias_falls_like_one_over_m():
    pool = collected(n=30, m=8000)
    found = convergence.compute(pool, MU, [2, 4, 8, 16, 32, 8000])
    assert [size.m for size in found.sizes] == [2, 4, 8, 16, 32]
    assert found.slope == pytest.approx(-1, abs=0.1)
    assert 0 < found.slope_error < 0.05
    assert found.used == [size.m for size in found.sizes if size.ess >= convergence.HEALTHY_ESS]
    assert len(found.used) >= 3
    weights = torch.exp(-(FITTED @ MU))
    share = float((P @ weights) ** 2 / (P @ weights**2))
    assert found.pool_ess.mean == pytest.approx(8000 * share, rel=0.02)
    assert found.pool_ess.min == pytest.approx(8000 * share, rel=0.1)
    # The bias itself, against that of a great many draws of 4 candidates.
    groups = FITTED[draw(P, 4 * 400_000, 77)].reshape(-1, 4, 2)
    weights = torch.softmax(-(groups @ MU), 1)
    exact = (groups * weights[..., None]).sum(1).mean(0) - tilted()[0] @ FITTED
    spread = pool.features[..., :2].reshape(-1, 2).std(0)
    np.testing.assert_allclose(found.sizes[1].bias, exact / spread, atol=0.01)
    variance = [size.mean_variance for size in found.sizes]
    assert np.polyfit(np.log([2, 4, 8, 16, 32]), np.log(variance), 1)[0] == pytest.approx(-1, abs=0.15)


def test_the_race_has_the_bias_of_its_winners():
    """Against the winners of a great many races, run here."""
    found = convergence.compute(collected(n=30, m=8000), MU, [2, 4, 8], "race")
    groups = FITTED[draw(P, 4 * 400_000, 78)].reshape(-1, 4, 2)
    uniforms = torch.rand(groups.shape[:2], generator=torch.Generator().manual_seed(79), dtype=torch.float64)
    winners = (uniforms * torch.exp(groups @ MU)).argmin(1)
    exact = groups[torch.arange(len(groups)), winners].mean(0) - tilted()[0] @ FITTED
    spread = FITTED[draw(P, 400_000, 80)].std(0)
    np.testing.assert_allclose(found.sizes[1].bias, exact / spread, atol=0.01)
    assert found.sizes[1].bias_norm < convergence.compute(collected(n=30, m=8000), MU, [2, 4, 8]).sizes[1].bias_norm


def test_the_noise_of_a_bias_covers_that_of_repeated_pools():
    """The jackknife is too large, by up to 2, for what is quadratic in the weights' noise."""
    found = [convergence.compute(collected(n=10, m=200, seed=10 * i), MU, [5, 20]).sizes for i in range(40)]
    for sizes in zip(*found, strict=True):
        spread = torch.tensor([size.bias for size in sizes]).std(0).square().mean().sqrt()
        assert float(spread) < np.median([size.noise for size in sizes]) < 2.2 * float(spread)


@pytest.fixture(scope="module")
def from_noise():
    return convergence.compute(collected(n=3, m=60), torch.zeros(2, dtype=torch.float64), [5, 10, 20])


def test_no_slope_is_claimed_from_noise(from_noise):
    assert from_noise.slope is None


def test_a_slope_from_few_sizes_is_flagged(from_noise):
    def slope(curve):
        return str(convergence.section(convergence.Convergence(3, curve, curve, NotDone("out"))).tables[0].rows[0][1])

    assert slope(from_noise).startswith("not resolved (")
    measured = replace(from_noise, slope=-0.9, slope_error=0.2)
    assert slope(replace(measured, used=[5, 10, 20])) == "-0.90 ± 0.20 (only 3 of the sizes serve)"
    assert slope(replace(measured, used=[5, 10, 20, 40])) == "-0.90 ± 0.20"


def test_a_global_fit_without_a_solution_says_so_in_its_place(from_noise):
    section = convergence.section(convergence.Convergence(3, from_noise, from_noise, NotDone("sr_2 is out of reach")))
    assert section.notes == ["The mu of a global fit: not done: sr_2 is out of reach"]
    assert {row[0] for row in section.tables[0].rows} == {"the artefact's mu", "the same by the race"}
