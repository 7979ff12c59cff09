"""tilted_moments against the plain-Python definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import daemon_fast
from daemon_fast import reference

F64 = torch.float64
NORMALIZATIONS = ("per_prefix", "global")


def check(features, mu, base, normalization, rtol=1e-12, device="cpu"):
    there = [None if part is None else part.to(device) for part in (features, mu, base)]
    out = daemon_fast.ops.Moments(*(part.cpu() for part in daemon_fast.tilted_moments(*there, normalization)))
    log_z, mean, covariance = reference.tilted_moments(
        features.double().tolist(), mu.tolist(), None if base is None else base.double().tolist(), normalization
    )
    assert {part.dtype for part in out} == {F64}
    scale = features.double().flatten(0, 1).abs().amax(0).numpy() + 1e-300  # sums of either sign cancel
    np.testing.assert_allclose(out.log_z.item(), log_z, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(out.mean.numpy() / scale, np.array(mean) / scale, rtol=rtol, atol=rtol)
    square = np.outer(scale, scale)
    np.testing.assert_allclose(
        out.covariance.numpy() / square, np.array(covariance).reshape(square.shape) / square, rtol=rtol, atol=rtol
    )
    assert torch.equal(out.covariance, out.covariance.T)


@st.composite
def calls(draw):
    prefixes = draw(st.sampled_from([1, 2, 3, 63, 64, 65]))
    candidates = draw(st.sampled_from([1, 2, 3, 4, 5, 25, 33]))
    k = draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Features far from zero, as `ent` is, must not cancel in the covariance.
    features = torch.from_numpy(rng.normal(size=(prefixes, candidates, k)) + rng.normal(size=k) * 10)
    features = features.to(draw(st.sampled_from([torch.float32, F64])))
    if draw(st.booleans()):
        features = features.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    mu = torch.from_numpy(rng.normal(size=k) * draw(st.sampled_from([0.0, 0.3, 3.0])))
    base = None
    if draw(st.booleans()):
        base = torch.from_numpy(rng.normal(size=(prefixes, candidates)) * draw(st.sampled_from([1.0, 1e4])))
        if candidates > 1:
            base[:, rng.integers(candidates)] = -math.inf
        base = base.to(draw(st.sampled_from([torch.float32, F64])))
    return features, mu, base, draw(st.sampled_from(NORMALIZATIONS))


@given(calls())
@settings(max_examples=150)
def test_equals_the_definition(call):
    features, mu, base, normalization = call
    # exp amplifies the rounding of b - mu · f, up to 1e-16 of its largest term.
    size = float((mu.abs() * features.double().abs().amax((0, 1))).sum())
    finite = [] if base is None else base.double()[base.isfinite()].abs().tolist()
    check(features, mu, base, normalization, rtol=1e-12 + 4e-16 * (size + max(finite, default=0.0)))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
    ("prefixes", "candidates", "k"), [(3, 255, 4), (3, 256, 4), (3, 257, 4), (3, 1000, 4), (700, 25, 9), (5, 40, 60)]
)
def test_more_than_a_tile_on_every_device(device, prefixes, candidates, k, normalization):
    generator = torch.Generator().manual_seed(candidates)
    features = torch.randn(prefixes, candidates, k, dtype=F64, generator=generator)
    check(features, torch.linspace(-1, 1, k, dtype=F64), None, normalization, device=device)
    base = torch.randn(prefixes, candidates, generator=generator).masked_fill(features[..., 0] > 1, -math.inf)
    base[:, 0] = 0
    check(features.float(), torch.linspace(-1, 1, k, dtype=F64), base, normalization, device=device)


def test_global_weights_may_spare_a_whole_prefix(device):
    features, base = torch.randn(3, 4, 2, dtype=F64), torch.zeros(3, 4)
    base[1] = -math.inf
    check(features, torch.ones(2, dtype=F64), base, "global", device=device)


def test_covariance_is_the_derivative_of_the_mean():
    features, mu = torch.randn(5, 25, 3, dtype=F64), torch.randn(3, dtype=F64)
    h = 1e-6
    for normalization in NORMALIZATIONS:
        here = daemon_fast.tilted_moments(features, mu, None, normalization)
        for k in range(3):
            step = torch.zeros(3, dtype=F64)
            step[k] = h
            up = daemon_fast.tilted_moments(features, mu + step, None, normalization)
            down = daemon_fast.tilted_moments(features, mu - step, None, normalization)
            torch.testing.assert_close((up.mean - down.mean) / (2 * h), -here.covariance[k], rtol=0, atol=1e-8)
            torch.testing.assert_close((up.log_z - down.log_z) / (2 * h), -here.mean[k], rtol=0, atol=1e-8)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_same_result_for_any_number_of_threads(threads, normalization):
    features, mu = torch.randn(1000, 25, 9), torch.randn(9, dtype=F64)
    threads(1)
    one = daemon_fast.tilted_moments(features, mu, None, normalization)
    threads(3)
    for a, b in zip(daemon_fast.tilted_moments(features, mu, None, normalization), one, strict=True):
        assert torch.equal(a, b)


def test_opcheck(device):
    op = torch.ops.daemon_fast.tilted_moments.default
    features, mu = torch.randn(3, 5, 2, device=device), torch.randn(2, dtype=F64, device=device)
    torch.library.opcheck(op, (features, mu))
    torch.library.opcheck(op, (features.double(), mu, torch.randn(3, 5, device=device), "global"))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_bad_rows_are_named(normalization):
    mu = torch.ones(1, dtype=F64)
    features, base = torch.zeros(3, 2, 1), torch.zeros(3, 2)
    features[2, 1, 0] = math.nan
    with pytest.raises(RuntimeError, match="log-weight of row 2, candidate 1 is nan"):
        daemon_fast.tilted_moments(features, mu, base, normalization)
    base[:] = -math.inf
    where = {"per_prefix": "all 2 log-weights of row 0", "global": "all log-weights of all 3 rows"}[normalization]
    with pytest.raises(RuntimeError, match=f"{where} are -inf"):
        daemon_fast.tilted_moments(torch.zeros(3, 2, 1), mu, base, normalization)


FEATURES, MU = torch.zeros(3, 4, 2), torch.zeros(2, dtype=F64)


@pytest.mark.parametrize("place", ["cpu", "meta"])  # on meta it is the fake kernel that says so
@pytest.mark.parametrize(
    ("features", "mu", "base", "normalization", "message"),
    [
        (torch.zeros(3, 4), MU, None, "per_prefix", r"features must have shape \[G, M, K\], got \[3, 4\]"),
        (FEATURES, MU.float(), None, "per_prefix", "mu must be float64, got float32"),
        (FEATURES, MU[:1], None, "per_prefix", r"mu must have features.shape\[2\] = 2 at dimension 0, got shape \[1\]"),
        (FEATURES, MU, torch.zeros(2, 4), "per_prefix", r"base_log_w must have features.shape\[0\] = 3"),
        (FEATURES, MU, torch.zeros(3, 5), "per_prefix", r"base_log_w must have features.shape\[1\] = 4"),
        (FEATURES, MU, torch.zeros(3, 4).long(), "per_prefix", "base_log_w must be float32 or float64, got int64"),
        (FEATURES, MU, None, "prefix", "normalization = 'prefix' must be 'per_prefix' or 'global'"),
    ],
)
def test_a_wrong_shape_dtype_or_name_is_named(features, mu, base, normalization, message, place):
    base = None if base is None else base.to(place)
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.tilted_moments(features.to(place), mu.to(place), base, normalization)


@pytest.mark.parametrize(
    ("shape", "message"), [((0, 4, 2), r"no prefixes \(N = 0\)"), ((3, 0, 2), r"no candidates \(M = 0\)")]
)
def test_nothing_to_weigh_is_named(shape, message):
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.tilted_moments(torch.zeros(shape), MU)


def test_the_definition_names_another_normalization():
    with pytest.raises(ValueError, match="normalization = 'prefix' must be 'per_prefix' or 'global'"):
        reference.tilted_moments([[[0.0]]], [0.0], normalization="prefix")
