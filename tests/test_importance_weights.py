"""importance_weights against the plain-Python definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import daemon_fast
from daemon_fast import reference

AWKWARD_M = [1, 2, 3, 4, 5, 7, 8, 9, 25, 32, 33, 255, 256, 257, 4097]
RTOL = {torch.float32: 1e-6, torch.float64: 1e-12}


def check(log_w: torch.Tensor, device: str = "cpu") -> None:
    out = [part.cpu() for part in daemon_fast.importance_weights(log_w.to(device))]
    weights, log_mean, ess = reference.importance_weights(log_w.double().tolist())
    # Weights below the smallest normal float32 lose digits, as every float32 does; a log-mean next to 0 is the log
    # of a float64 next to 1.
    for got, want, atol in zip(out, (weights, log_mean, ess), (1e-37, 1e-15, 0), strict=True):
        assert got.dtype == log_w.dtype
        want = np.array(want).reshape(got.shape)
        np.testing.assert_allclose(got.double().numpy(), want, rtol=RTOL[log_w.dtype], atol=atol)


@st.composite
def matrices(draw):
    groups, candidates = draw(st.integers(0, 5)), draw(st.sampled_from(AWKWARD_M))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]))
    log_w = rng.normal(size=(groups, candidates)) * scale + draw(st.sampled_from([0.0, 1e4, -1e4]))
    if draw(st.booleans()) and candidates > 1:
        log_w[:, rng.integers(candidates)] = -math.inf
    log_w = torch.from_numpy(log_w).to(draw(st.sampled_from([torch.float32, torch.float64])))
    return log_w.t().contiguous().t() if draw(st.booleans()) else log_w


@given(matrices())
@settings(max_examples=300)
def test_equals_the_definition(log_w):
    check(log_w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("M", [*AWKWARD_M, 65, 1024, 1025, 40_000])
def test_every_size_on_every_device(device, M, dtype):
    generator = torch.Generator().manual_seed(M)
    check(torch.randn(3, M, generator=generator, dtype=torch.float64).to(dtype) * 4, device)
    check(torch.randn(M, 3, generator=generator, dtype=torch.float64).to(dtype).t(), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_weights(device, dtype):
    check(torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -math.inf]], dtype=dtype), device)


def test_weights_sum_to_one_and_ess_is_within_bounds():
    out = daemon_fast.importance_weights(torch.randn(50, 25, dtype=torch.float64) * 3)
    torch.testing.assert_close(out.weights.sum(-1), torch.ones(50, dtype=torch.float64))
    assert (out.ess >= 1).all()
    assert (out.ess <= 25).all()


def test_same_result_for_any_number_of_threads(threads):
    log_w = torch.randn(3000, 25)
    threads(1)
    one = daemon_fast.importance_weights(log_w)
    threads(3)
    for a, b in zip(daemon_fast.importance_weights(log_w), one, strict=True):
        assert torch.equal(a, b)


def test_opcheck(device):
    for dtype in (torch.float32, torch.float64):
        log_w = torch.randn(3, 5, dtype=dtype, device=device)
        torch.library.opcheck(torch.ops.daemon_fast.importance_weights.default, (log_w,))
        torch.library.opcheck(torch.ops.daemon_fast.importance_weights.default, (log_w.t(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([-math.inf] * 3, "all 3 log-weights of row 1 are -inf"),
        ([0.0, math.nan, 0.0], "log-weight of row 1, candidate 1 is nan"),
        ([0.0, -math.inf, math.nan], "log-weight of row 1, candidate 2 is nan"),
        ([0.0, 0.0, math.inf], "log-weight of row 1, candidate 2 is inf"),
    ],
)
def test_bad_rows_are_named(row, message, dtype):
    log_w = torch.tensor([[0.0, 1.0, 2.0], row, row], dtype=dtype)  # the first of two bad rows
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.importance_weights(log_w)


@pytest.mark.parametrize("place", ["cpu", "meta"])  # on meta it is the fake kernel that says so
@pytest.mark.parametrize(
    ("log_w", "message"),
    [
        (torch.zeros(3), r"log_w must have shape \[G, M\], got \[3\]"),
        (torch.zeros(3, 4).half(), "log_w must be float32 or float64, got float16"),
    ],
)
def test_a_wrong_shape_or_dtype_is_named(log_w, message, place):
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.importance_weights(log_w.to(place))


def test_no_candidates_are_named():
    with pytest.raises(RuntimeError, match=r"no candidates \(M = 0\): shape \[3, 0\]"):
        daemon_fast.importance_weights(torch.zeros(3, 0))
