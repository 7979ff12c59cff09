"""sample_tokens against the plain-Python definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from strategies import logit_rows

import daemon_fast
from daemon_fast import reference

ALMOST_ONE = 1 - 2**-53


def check(logits, uniforms, temperature, device="cpu"):
    out = daemon_fast.sample_tokens(logits.to(device), uniforms.to(device), temperature)
    ids = out.ids.cpu()
    want = torch.tensor(reference.sample_tokens(logits.double().tolist(), uniforms.tolist(), temperature)).reshape(-1)
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    # Sums in another order may move an edge by a rounding error; never to an id of no probability.
    edge = cumulative.gather(1, torch.minimum(ids, want)[:, None])[:, 0]
    assert ((ids == want) | ((edge - uniforms).abs() < (1e-9 if device == "cpu" else 1e-5))).all()
    assert (logits.gather(1, ids[:, None]) > -math.inf).all()
    for got, expected in zip(out[1:], daemon_fast.token_logprobs(logits, ids, temperature), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.cpu(), expected, rtol=2e-6, atol=2e-6)


@st.composite
def calls(draw):
    logits, _, rng = draw(logit_rows())
    edge = draw(st.sampled_from([None, 0.0, ALMOST_ONE]))
    uniforms = rng.random(len(logits)) if edge is None else np.full(len(logits), edge)
    return logits, torch.from_numpy(uniforms), draw(st.sampled_from([1.0, 0.97, 0.5, 2.0, 0.05]))


@given(calls())
@settings(max_examples=200)
def test_equals_the_definition(call):
    check(*call)


@pytest.mark.parametrize("temperature", [1.0, 0.97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 7, 8, 9, 2047, 2049, 50_257])
def test_every_size_on_every_device(device, V, dtype, temperature):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, V, generator=generator) * 4).to(dtype)
    uniforms = torch.rand(6, generator=generator, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, ALMOST_ONE
    check(logits, uniforms, temperature, device)


def test_draws_follow_the_distribution(real_device):
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(1)) * 2
    uniforms = torch.rand(200_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ids = daemon_fast.sample_tokens(logits.expand(200_000, -1).to(real_device), uniforms.to(real_device), 0.8).ids.cpu()
    expected = torch.softmax(logits[0].double() / 0.8, 0).numpy() * 200_000
    counts, common = np.bincount(ids.numpy(), minlength=700), expected > 5
    observed, wanted = (np.append(values[common], values[~common].sum()) for values in (counts, expected))
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


def test_same_result_for_any_number_of_threads(threads):
    logits, uniforms = torch.randn(40, 5000), torch.rand(40, dtype=torch.float64)
    threads(1)
    one = daemon_fast.sample_tokens(logits, uniforms, 0.97)
    threads(3)
    for a, b in zip(daemon_fast.sample_tokens(logits, uniforms, 0.97), one, strict=True):
        assert torch.equal(a, b)


def test_opcheck(device):
    logits, uniforms = torch.randn(3, 20, device=device), torch.rand(3, dtype=torch.float64, device=device)
    torch.library.opcheck(torch.ops.daemon_fast.sample_tokens.default, (logits, uniforms, 0.97))
    torch.library.opcheck(torch.ops.daemon_fast.sample_tokens.default, (logits.bfloat16(), uniforms, 1.0))


HALF = torch.full((3,), 0.5, dtype=torch.float64)


@pytest.mark.parametrize("place", ["cpu", "meta"])  # on meta it is the fake kernel that says so
@pytest.mark.parametrize(
    ("logits", "uniforms", "temperature", "message"),
    [
        (torch.zeros(3), HALF, 1.0, r"sample_tokens: logits must have shape \[R, V\], got \[3\]"),
        (torch.zeros(3, 4).double(), HALF, 1.0, "logits must be float16 or bfloat16 or float32, got float64"),
        (torch.zeros(3, 4), HALF.float(), 1.0, "uniforms must be float64, got float32"),
        (torch.zeros(3, 4), HALF[:2], 1.0, r"logits.shape\[0\] = 3"),
        (torch.zeros(3, 4), HALF[:, None], 1.0, r"uniforms must have shape \[R\]"),
    ],
)
def test_a_wrong_shape_or_dtype_is_named(logits, uniforms, temperature, message, place):
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.sample_tokens(logits.to(place), uniforms.to(place), temperature)


@pytest.mark.parametrize(
    ("logits", "uniforms", "temperature", "message"),
    [
        (torch.zeros(3, 0), HALF, 1.0, r"empty vocabulary: shape \[3, 0\]"),
        (torch.zeros(3, 4), HALF * 2, 1.0, r"uniforms\[0\] = 1 is outside \[0, 1\)"),
        (torch.zeros(3, 4), HALF * math.nan, 1.0, r"uniforms\[0\] = nan is outside"),
        (torch.zeros(3, 4), HALF, 0.0, "sample_tokens: temperature = 0 must be positive and finite"),
        (torch.tensor([[0.0], [-math.inf], [0.0]]), HALF, 1.0, r"logits\[1\] are all -inf, or hold NaN or \+inf"),
        (torch.tensor([[0.0, 1], [0, 0], [0, math.nan]]), HALF, 0.5, r"logits\[2\] are all -inf, or hold NaN"),
        (torch.tensor([[0.0, math.inf], [0, 0], [0, 0]]), HALF, 0.5, r"logits\[0\] are all -inf, or hold NaN"),
    ],
)
def test_bad_input_is_named(logits, uniforms, temperature, message):
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.sample_tokens(logits, uniforms, temperature)
