"""The forward projection: its definition, and that nothing with the same expectations lies nearer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_studies import FITTED, P, collected, tilted

from daemon_fast import fit
from daemon_fast.errors import FitError
from daemon_fast.experiments.studies import forward_kl
from daemon_fast.experiments.studies.forward_kl import forward_multiplier, forward_weights


def test_it_is_the_other_projection():
    to_fit, held_out = collected(n=2000, m=100), collected(n=2000, m=100, seed=5)
    found = forward_kl.compute(to_fit, held_out)
    rows = {(row.on, row.direction): row for row in found.rows}
    target = to_fit.human[:, :2].double().mean(0)
    for direction in ("reverse", "forward"):
        assert rows["held out", direction].distance < 0.08
        np.testing.assert_allclose(rows["fit", direction].means.mean, target, atol=1e-8)
    # The exact solution on the listed model: the same expectations, and no q with them lies nearer in forward KL.
    g = (FITTED - target)[None]
    q = forward_weights(g, P[None], forward_multiplier(g, P[None]))[0]
    assert float(q.sum()) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(q @ FITTED, target, atol=1e-8)
    everything = FITTED.expand(2, -1, -1)  # each sequence once, weighted by its probability: the exact reverse solution
    reverse = fit(everything, target, P.log().expand(2, -1)).mu
    p_mu = tilted(reverse)[0]
    np.testing.assert_allclose(p_mu @ FITTED, target, atol=1e-8)
    assert float(P @ (P / q).log()) < float(P @ (P / p_mu).log())
    assert float(q @ (q / P).log()) > float(p_mu @ (p_mu / P).log())
    assert [row[:2] for row in forward_kl.section(found).tables[0].rows] == [list(key) for key in rows]


def test_out_of_reach_is_an_error_of_the_fit():
    g = torch.rand(3, 50, 2, dtype=torch.float64) + 0.1
    with pytest.raises(FitError, match="no forward-KL solution"):
        forward_multiplier(g, torch.full((3, 50), 0.02, dtype=torch.float64))


def test_weights_are_the_stationary_point():
    """ν_i + λ·g is prior over weight, and rows that differ each have their own ν."""
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(6, 30, 2, generator=generator, dtype=torch.float64)
    prior = torch.randn(6, 30, generator=generator, dtype=torch.float64).softmax(1)
    multiplier = torch.tensor([0.8, -5.0], dtype=torch.float64)
    weights = forward_weights(g, prior, multiplier)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
    nu = prior / weights - g @ multiplier
    np.testing.assert_allclose(nu, nu[:, :1].expand_as(nu), rtol=1e-6)
    solved = forward_multiplier(g, prior)
    mean = (forward_weights(g, prior, solved)[..., None] * g).sum(1).mean(0)
    np.testing.assert_allclose(mean, 0, atol=1e-9)
