"""sir_select against the plain-Python definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from strategies import Tilt, check_selection, tilts

import daemon_fast

F64 = torch.float64


@given(tilts(), st.integers(0, 2**32 - 1))
@settings(max_examples=300)
def test_equals_the_definition(tilt, seed):
    uniforms = torch.from_numpy(np.random.default_rng(seed).random(len(tilt.features)))
    check_selection("sir_select", tilt, uniforms)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("M", [1, 2, 31, 32, 33, 64, 65, 1024, 1025, 4097, 20_000])
def test_every_size_on_every_device(device, M, dtype):
    generator = torch.Generator().manual_seed(M)
    features = torch.randn(3, M, 4, generator=generator, dtype=F64).to(dtype)
    base = torch.randn(3, M, generator=generator).masked_fill(torch.rand(3, M, generator=generator) < 0.3, -math.inf)
    base[:, 0] = 0
    uniforms = torch.rand(3, generator=generator, dtype=F64)
    for given_base in (None, base, base.double()):
        tilt = Tilt(features, torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=F64), given_base)
        check_selection("sir_select", tilt, uniforms, device)


def test_uniforms_hit_the_edges_of_the_cumulative_weights(device):
    features = torch.zeros(6, 4, 1, dtype=F64, device=device)
    base = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0]], dtype=F64, device=device).expand(6, 4)
    uniforms = torch.tensor([0.0, 0.25, 0.5 - 2**-53, 0.5, 0.75, 1 - 2**-53], dtype=F64, device=device)
    out = daemon_fast.sir_select(features, torch.zeros(1, dtype=F64, device=device), uniforms, base)
    assert out.index.tolist() == [1, 1, 1, 3, 3, 3]


def test_several_draws_share_the_candidates(device):
    features, mu = torch.randn(4, 25, 3, dtype=F64, device=device), torch.randn(3, dtype=F64, device=device)
    uniforms = torch.rand(4, 7, dtype=F64, device=device)
    many = daemon_fast.sir_select(features, mu, uniforms)
    assert many.index.shape == (4, 7)
    for s in range(7):
        one = daemon_fast.sir_select(features, mu, uniforms[:, s].contiguous())
        assert torch.equal(one.index, many.index[:, s])
        assert torch.equal(one.weights, many.weights)


def test_draws_follow_the_weights():
    features, mu = torch.randn(1, 6, 2, dtype=F64), torch.tensor([1.0, -0.5], dtype=F64)
    uniforms = torch.rand(1, 20_000, dtype=F64, generator=torch.Generator().manual_seed(1))
    out = daemon_fast.sir_select(features, mu, uniforms)
    counts = np.bincount(out.index[0].numpy(), minlength=6)
    assert stats.chisquare(counts, out.weights[0].numpy() * 20_000).pvalue > 1e-3


def test_same_result_for_any_number_of_threads(threads):
    features, mu = torch.randn(2000, 25, 9), torch.randn(9, dtype=F64)
    uniforms = torch.rand(2000, dtype=F64)
    threads(1)
    one = daemon_fast.sir_select(features, mu, uniforms)
    threads(3)
    for a, b in zip(daemon_fast.sir_select(features, mu, uniforms), one, strict=True):
        assert torch.equal(a, b)


def test_opcheck(device):
    op = torch.ops.daemon_fast.sir_select.default
    features, mu = torch.randn(3, 5, 2, device=device), torch.randn(2, dtype=F64, device=device)
    base, uniforms = torch.randn(3, 5, device=device), torch.rand(3, 4, dtype=F64, device=device)
    torch.library.opcheck(op, (features, mu, uniforms[:, 0]))
    torch.library.opcheck(op, (features.double(), mu, uniforms, base))


def test_bad_rows_are_named():
    features, mu, uniforms = torch.zeros(3, 2, 1), torch.ones(1, dtype=F64), torch.rand(3, dtype=F64)
    base = torch.zeros(3, 2)
    base[2] = -math.inf
    with pytest.raises(RuntimeError, match="all 2 log-weights of row 2 are -inf"):
        daemon_fast.sir_select(features, mu, uniforms, base)
    features[1, 1, 0] = math.nan
    with pytest.raises(RuntimeError, match="log-weight of row 1, candidate 1 is nan"):
        daemon_fast.sir_select(features, mu, uniforms, base)


FEATURES, MU, UNIFORMS = torch.zeros(3, 4, 1), torch.zeros(1, dtype=F64), torch.zeros(3, dtype=F64)


@pytest.mark.parametrize("place", ["cpu", "meta"])  # on meta it is the fake kernel that says so
@pytest.mark.parametrize(
    ("features", "mu", "uniforms", "base", "message"),
    [
        (torch.zeros(3, 4), MU, UNIFORMS, None, r"features must have shape \[G, M, K\], got \[3, 4\]"),
        (FEATURES.long(), MU, UNIFORMS, None, "features must be float32 or float64, got int64"),
        (FEATURES, MU[None], UNIFORMS, None, r"mu must have shape \[K\], got \[1, 1\]"),
        (FEATURES, MU.float(), UNIFORMS, None, "mu must be float64, got float32"),
        (
            FEATURES,
            torch.zeros(2, dtype=F64),
            UNIFORMS,
            None,
            r"mu must have features.shape\[2\] = 1 .* got shape \[2\]",
        ),
        (FEATURES, MU, UNIFORMS[:, None, None], None, r"uniforms must have shape \[G\] or \[G, S\], got \[3, 1, 1\]"),
        (FEATURES, MU, UNIFORMS.float(), None, "uniforms must be float64, got float32"),
        (FEATURES, MU, UNIFORMS[:2], None, r"uniforms must have features.shape\[0\] = 3 .* got shape \[2\]"),
        (FEATURES, MU, UNIFORMS, torch.zeros(3), r"base_log_w must have shape \[G, M\], got \[3\]"),
        (FEATURES, MU, UNIFORMS, torch.zeros(3, 4).half(), "base_log_w must be float32 or float64, got float16"),
        (FEATURES, MU, UNIFORMS, torch.zeros(2, 4), r"base_log_w must have features.shape\[0\] = 3 at dimension 0"),
        (FEATURES, MU, UNIFORMS, torch.zeros(3, 5), r"base_log_w must have features.shape\[1\] = 4 at dimension 1"),
    ],
)
def test_a_wrong_shape_or_dtype_is_named(features, mu, uniforms, base, message, place):
    base = None if base is None else base.to(place)
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.sir_select(features.to(place), mu.to(place), uniforms.to(place), base)


@pytest.mark.parametrize(
    ("features", "uniforms", "message"),
    [
        (torch.zeros(3, 0, 1), UNIFORMS, r"no candidates \(M = 0\)"),
        (FEATURES, torch.tensor([0, 1, 0.5], dtype=F64), "row 1 hold 1,"),
        (FEATURES, torch.tensor([math.nan, 0, 0], dtype=F64), "row 0 hold nan"),
    ],
)
def test_bad_input_is_named(features, uniforms, message):
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.sir_select(features, MU, uniforms)
