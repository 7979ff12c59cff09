"""The fit under a race: its law, its dual, and that what is drawn then has the target means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from daemon_fast import fit, ops, race, reference
from daemon_fast.errors import InfeasibleTargets, InvalidInput
from daemon_fast.fit.samples import Block

F64 = torch.float64


def population(n=40, m=12, k=3, seed=0, base=False):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, m, k, generator=generator, dtype=F64) + torch.randn(n, 1, k, generator=generator)
    features[:, :, -1] += 0.5 * features[:, :, 0].square()
    base_log_w = 0.7 * torch.randn(n, m, generator=generator, dtype=F64) if base else None
    if base:
        base_log_w[::3, 0] = -math.inf
    return features, base_log_w


def expected(features, mu, base=None):
    """Of a race, by the exact rational arithmetic of the reference."""
    log_w = -(features @ mu) if base is None else base - features @ mu
    w = (log_w - log_w.amax(1, keepdim=True)).exp().tolist()
    chances = torch.tensor([reference.race_probabilities(row) for row in w], dtype=F64)
    return (chances[..., None] * features).sum(1).mean(0)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 12, 25])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_chances_equal_the_definition(m, spread):
    log_w = spread * torch.randn(4, m, dtype=F64, generator=torch.Generator().manual_seed(m))
    log_w[1, : m // 2] = -math.inf
    log_w[2, : (m + 1) // 2] = log_w[2].max()  # several of the largest weight
    log_w[3] += 1e4
    got = race.probabilities(log_w)
    for row, want in zip(got, log_w - log_w.amax(1, keepdim=True), strict=True):
        np.testing.assert_allclose(row, reference.race_probabilities(want.exp().tolist()), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("m", [150, 2_000, 8_000])
def test_few_nodes_are_enough_for_many_candidates(m, spread):
    """Against adaptive integration of P(t) / (1 - r t), to which no bound of ours applies."""
    log_w = spread * torch.randn(1, m, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert race.num_nodes(m) < (m + 1) // 2
    got = race.probabilities(log_w)[0].numpy()
    assert got.sum() == pytest.approx(1, abs=1e-9)
    r = (log_w - log_w.max()).exp()[0].numpy()
    for j in (0, int(r.argmax()), int(r.argmin())):
        later = lambda t, j=j: r[j] * math.exp(np.log1p(-np.delete(r, j) * t).sum()) if t < 1 else 0.0  # noqa: E731
        points = [k / r.sum() for k in (1, 3, 10, 30) if k < r.sum()]
        want, _ = integrate.quad(later, 0, 1, points=points, epsabs=1e-14, epsrel=1e-11, limit=500)
        assert got[j] == pytest.approx(want, rel=1e-8, abs=1e-13)


@pytest.mark.parametrize("base", [False, True])
def test_mean_and_curvature_are_derivatives_of_the_value(base):
    features, base_log_w = population(n=6, base=base)
    block, mu, h = Block(features, base_log_w), torch.tensor([0.8, -0.5, 0.3], dtype=F64), 1e-5

    def moments(at):
        return race.race_moments(block.features, block.log_w(at))

    value, mean, curvature = moments(mu)
    torch.testing.assert_close(mean, expected(features, mu, base_log_w), rtol=1e-12, atol=1e-12)
    for k, step in enumerate(h * torch.eye(3, dtype=F64)):
        above, below = moments(mu + step), moments(mu - step)
        assert float(above.log_z - below.log_z) / (2 * h) == pytest.approx(-float(mean[k]), abs=1e-8)
        torch.testing.assert_close((below.mean - above.mean) / (2 * h), curvature[k], rtol=1e-6, atol=1e-8)
    assert torch.equal(curvature, curvature.T)
    # and the value is E max_j (log w_j - log u_j)
    uniforms = torch.rand(200_000, 1, features.shape[1], dtype=F64, generator=torch.Generator().manual_seed(0))
    simulated = (block.log_w(mu) - uniforms.log()).amax(2).mean(1)
    assert float(value) == pytest.approx(float(simulated.mean()), abs=5 * float(simulated.std()) / 200_000**0.5)


def test_parts_of_memory_change_nothing(monkeypatch):
    features, _ = population(n=7)
    log_w = -features.sum(2)
    whole, law = race.race_moments(features, log_w), race.probabilities(log_w)
    monkeypatch.setattr(race, "ENTRIES", 2 * 12 * 6)
    for got, want in zip((*race.race_moments(features, log_w), race.probabilities(log_w)), (*whole, law), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


class Blocks:
    """Of several prefixes each, as other machines hold them."""

    def __init__(self, *blocks):
        self.blocks = blocks
        self.shape = (sum(len(block.features) for block in blocks), *blocks[0].features.shape[1:])

    def map(self, function):
        return [function(block) for block in self.blocks]


@pytest.mark.parametrize("base", [False, True])
def test_expected_metrics_of_the_race_are_the_targets(base):
    features, base_log_w = population(base=base)
    targets = features.mean((0, 1)) + torch.tensor([0.5, -0.4, 0.1], dtype=F64)
    result = fit(features, targets, base_log_w, draw="race")
    assert (result.converged, result.draw) == (True, "race")
    off = (expected(features, result.mu, base_log_w) - targets) / result.scale
    assert float(off.abs().max()) < 1e-9
    assert float((result.residual / result.scale).abs().max()) < 1e-9
    by_weights = fit(features, targets, base_log_w, draw="sir").mu
    assert float((by_weights - result.mu).abs().max()) > 0.05  # another rule, another mu

    parts = [slice(0, 3), slice(3, 30), slice(30, 40)]
    blocks = Blocks(*(Block(features[s], None if base_log_w is None else base_log_w[s]) for s in parts))
    torch.testing.assert_close(fit(blocks, targets, draw="race").mu, result.mu, rtol=1e-8, atol=1e-9)


def test_draws_have_the_target_means():
    """By the operator, on the prefixes of the fit: 50,000 draws of each."""
    features, _ = population(n=30)
    targets = features.mean((0, 1)) + torch.tensor([0.4, -0.3, 0.2], dtype=F64)
    mu = fit(features, targets, draw="race").mu
    uniforms = torch.rand(30, 50_000, 12, dtype=F64, generator=torch.Generator().manual_seed(2))
    index = ops.race_select(features, mu, uniforms).index
    drawn = features.gather(1, index[..., None].expand(-1, -1, 3))
    error = drawn.var(1).mean(0).sqrt() / math.sqrt(30 * 50_000)
    assert ((drawn.mean((0, 1)) - targets).abs() < 5 * error).all()


def test_a_ridge_is_that_of_the_races_own_dual():
    features, _ = population()
    targets = features.mean((0, 1)) + 0.3
    result = fit(features, targets, draw="race", ridge=0.1)
    pull = 0.1 * result.scale.square() * result.mu
    torch.testing.assert_close(expected(features, result.mu) - targets, pull, rtol=1e-6, atol=1e-9)
    cross_validated = fit(features, targets + 0.5 * torch.randn(40, 3, dtype=F64), draw="race", ridge="cv")
    assert cross_validated.converged


def test_out_of_reach_is_out_of_reach_of_any_rule():
    features, _ = population()
    for beyond in (features.amax((0, 1)), features.mean((0, 1)) + torch.tensor([1.2, -1.2, -0.9], dtype=F64)):
        for draw in ("race", "sir"):
            with pytest.raises(InfeasibleTargets, match="out of reach"):
                fit(features, beyond, draw=draw)


def test_bootstrap():
    features, _ = population()
    human = features.mean((0, 1)) + 0.2 + 0.1 * torch.randn(40, 3, dtype=F64)
    result = fit(features, human, draw="race", bootstrap=20)
    low, high = result.confidence_interval
    assert ((low < result.mu) & (result.mu < high)).all()


def test_what_is_not_defined_is_named():
    features, _ = population()
    targets = features.mean((0, 1))
    with pytest.raises(InvalidInput, match="draw = 'race' is not defined for normalization = 'global'"):
        fit(features, targets, normalization="global", draw="race")
    with pytest.raises(InvalidInput, match="draw = 'gumbel' must be one of race, sir"):
        fit(features, targets, draw="gumbel")
