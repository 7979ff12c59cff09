"""token_logprobs against the plain-Python definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import logit_rows

import daemon_fast
from daemon_fast import reference

# Relative alone, also for probabilities next to 1; on CUDA, sums are float32.
TOLERANCE = {"cpu": {"rtol": 1e-6, "atol": 1e-30}, "cuda": {"rtol": 1e-6, "atol": 1e-6}}


def check(logits: torch.Tensor, ids: torch.Tensor, temperature: float, device: str = "cpu") -> None:
    out = daemon_fast.token_logprobs(logits.to(device), ids.to(device), temperature)
    expected = reference.token_logprobs(logits.double().tolist(), ids.tolist(), temperature)
    for got, want in zip(out, expected, strict=True):
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.double().cpu().numpy(), np.array(want).reshape(-1), **TOLERANCE[device])


@st.composite
def calls(draw):
    logits, ids, _ = draw(logit_rows())
    return logits, ids, draw(st.sampled_from([1.0, 0.97, 0.5, 2.0, 0.01]))


@given(calls())
@settings(max_examples=200)
def test_equals_the_definition(call):
    check(*call)


@pytest.mark.parametrize("temperature", [1.0, 0.97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 7, 8, 9, 4095, 4097, 50_257])
def test_every_size_on_every_device(device, V, dtype, temperature):
    logits = (torch.randn(3, V, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    check(logits, torch.tensor([0, V - 1, int(logits[2].argmax())]), temperature, device)


@pytest.mark.parametrize("gap", [1.0, 8.0, 12.0, 16.0])
def test_a_probability_next_to_one_keeps_its_digits(gap):
    logits = torch.zeros(1, 600)
    logits[0, 300] = gap + math.log(600)
    check(logits, torch.tensor([300]), 0.97)


@pytest.mark.parametrize("at", [0, 5, 511, 512, 700])
def test_a_late_maximum_rescales_what_came_before(device, at):
    logits = torch.linspace(-80, 0, 701)[None].clone()
    logits[0, at] = 30.0
    check(logits, torch.tensor([350]), 0.97, device)


def test_rows_may_be_strided(device):
    wide = torch.randn(6, 100, device=device)
    for rows in (wide[::2, 10:60], wide[1::2, 11:61], wide[:3, ::2]):
        check(rows, torch.tensor([0, 49, 7]), 0.9, device)


def test_ids_may_be_int32():
    logits = torch.randn(4, 30)
    ids = torch.tensor([0, 29, 3, 3])
    for a, b in zip(
        daemon_fast.token_logprobs(logits, ids, 0.9), daemon_fast.token_logprobs(logits, ids.int(), 0.9), strict=True
    ):
        assert torch.equal(a, b)


def test_excluded_and_undefined_ids(device):
    rows = [[0.0, -math.inf], [-math.inf, -math.inf], [0.0, math.nan], [math.inf, 0.0]]
    logits = torch.tensor(rows, device=device)
    log_p, log_q = daemon_fast.token_logprobs(logits, torch.tensor([1, 0, 0, 1], device=device), 0.5)
    for got in (log_p, log_q):
        assert got[0] == -math.inf
        assert got[1:].isnan().all()


def test_same_result_for_any_number_of_threads(threads):
    logits, ids = torch.randn(40, 5000), torch.randint(0, 5000, (40,))
    threads(1)
    one = daemon_fast.token_logprobs(logits, ids, 0.97)
    threads(3)
    for a, b in zip(daemon_fast.token_logprobs(logits, ids, 0.97), one, strict=True):
        assert torch.equal(a, b)


def test_opcheck(device):
    logits, ids = torch.randn(3, 20, device=device), torch.tensor([0, 19, 5], device=device)
    torch.library.opcheck(torch.ops.daemon_fast.token_logprobs.default, (logits, ids, 0.97))
    torch.library.opcheck(torch.ops.daemon_fast.token_logprobs.default, (logits.bfloat16(), ids.int(), 1.0))


@pytest.mark.parametrize("place", ["cpu", "meta"])  # on meta it is the fake kernel that says so
@pytest.mark.parametrize(
    ("logits", "ids", "temperature", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), 1.0, r"logits must have shape \[R, V\], got \[3\]"),
        (torch.zeros(3, 4).double(), torch.zeros(3).long(), 1.0, "logits must be float16 or bfloat16 or float32"),
        (torch.zeros(3, 4), torch.zeros(3, 1).long(), 1.0, r"ids must have shape \[R\], got \[3, 1\]"),
        (torch.zeros(3, 4), torch.zeros(3), 1.0, "ids must be int32 or int64, got float32"),
        (torch.zeros(3, 4), torch.zeros(2).long(), 1.0, r"logits.shape\[0\] = 3"),
    ],
)
def test_a_wrong_shape_or_dtype_is_named(logits, ids, temperature, message, place):
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.token_logprobs(logits.to(place), ids.to(place), temperature)


@pytest.mark.parametrize(
    ("logits", "ids", "temperature", "message"),
    [
        (torch.zeros(3, 0), torch.zeros(3).long(), 1.0, r"empty vocabulary: shape \[3, 0\]"),
        (torch.zeros(3, 4), torch.tensor([0, 4, 0]), 1.0, r"ids\[1\] = 4 is outside the vocabulary \[0, 4\)"),
        (torch.zeros(3, 4), torch.tensor([0, 0, -1]), 1.0, r"ids\[2\] = -1 is outside"),
        (torch.zeros(3, 4), torch.zeros(3).long(), 0.0, "temperature = 0 must be positive and finite"),
        (torch.zeros(3, 4), torch.zeros(3).long(), math.nan, "temperature = nan must be positive"),
        (torch.zeros(3, 4), torch.zeros(3).long(), math.inf, "temperature = inf must be positive"),
    ],
)
def test_bad_input_is_named(logits, ids, temperature, message):
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.token_logprobs(logits, ids, temperature)
