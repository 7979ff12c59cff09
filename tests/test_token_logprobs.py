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
        np.testing.assert_allclose(
            got.double().cpu().numpy(), np.array(want).reshape(-1), **TOLERANCE["cpu" if device == "cpu" else "cuda"]
        )


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


def test_every_number_of_half_precision_is_read_as_it_is(real_device):
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, device=real_device).to(torch.int16).view(dtype)
        logits, ids = torch.stack([every, torch.zeros_like(every)], dim=1), torch.ones(2**16, device=real_device).long()
        wide = daemon_fast.token_logprobs(logits.float(), ids, 0.5)
        for got, want in zip(daemon_fast.token_logprobs(logits, ids, 0.5), wide, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


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


# ---- the gradient ---------------------------------------------------------------------------------------------------

ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def torchs(logits, ids, temperature):
    """What users write without the operator."""
    wide = logits.float()
    return [
        scaled.log_softmax(1).gather(1, ids.long()[:, None])[:, 0] for scaled in (wide, wide / temperature)
    ]  # fmt: skip


@given(calls(), st.tuples(*[st.sampled_from([1.0, 0.0, -2.5])] * 2))
@settings(max_examples=100)
def test_the_gradient_equals_the_definition(call, weights):
    logits, ids, temperature = call
    logits = logits.detach().requires_grad_()
    grads = [weight * (1 + torch.arange(len(ids))).float() for weight in weights]
    (got,) = torch.autograd.grad(daemon_fast.token_logprobs(logits, ids, temperature), logits, grads)
    want = reference.token_logprobs_backward(
        *(grad.tolist() for grad in grads), logits.double().tolist(), ids.tolist(), temperature
    )
    assert got.dtype == logits.dtype
    assert got.shape == logits.shape
    scale = float(sum(grad.abs().max() for grad in grads)) / temperature if len(ids) else 0.0
    np.testing.assert_allclose(
        got.double().numpy(), np.array(want).reshape(got.shape), rtol=ROUNDING[logits.dtype], atol=1e-7 * scale
    )


@pytest.mark.parametrize("temperature", [1.0, 0.97])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("V", [1, 9, 4097, 50_257])
def test_the_gradient_is_torchs(device, V, dtype, temperature):
    generator = torch.Generator().manual_seed(0)
    wide = (torch.randn(6, V + 4, generator=generator) * 4).to(dtype)
    grad_log_p, grad_log_q = torch.randn(2, 3, generator=generator).to(device)
    ids = torch.tensor([0, V - 1, V // 2], device=device)
    for rows in (wide[:3, :V], wide[::2, 3 : V + 3], wide.t().contiguous().t()[1::2, :V]):
        logits = rows.to(device).requires_grad_()
        for grads in ((grad_log_p, grad_log_q), (grad_log_p, None), (None, grad_log_q)):

            def chosen(pair, grads=grads):
                return [x for x, grad in zip(pair, grads, strict=True) if grad is not None]

            weights = [grad for grad in grads if grad is not None]
            (want,) = torch.autograd.grad(chosen(torchs(logits, ids, temperature)), logits, weights)
            (got,) = torch.autograd.grad(chosen(daemon_fast.token_logprobs(logits, ids, temperature)), logits, weights)
            torch.testing.assert_close(got, want, rtol=2 * ROUNDING[dtype], atol=5e-6)


@pytest.mark.filterwarnings("ignore:.*double precision")
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_gradcheck(device, temperature):
    logits = torch.randn(3, 6, device=device, requires_grad=True)
    ids = torch.tensor([0, 5, 2], device=device)
    # at this step, the differences of float32 are good to about 1e-3
    assert torch.autograd.gradcheck(
        lambda x: daemon_fast.token_logprobs(x, ids, temperature), logits, eps=1e-2, atol=2e-3, rtol=1e-3
    )


def test_a_confident_token_keeps_the_digits_of_its_gradient(device):
    logits = torch.tensor([[16.0, 0.0, -1.0]], device=device, requires_grad=True)
    daemon_fast.token_logprobs(logits, torch.tensor([0], device=device)).log_p.sum().backward()
    want = torch.tensor([16.0, 0.0, -1.0], dtype=torch.float64).softmax(0)
    want = torch.stack([want[1] + want[2], -want[1], -want[2]])
    atol = 0 if device == "cpu" else 1e-7  # CUDA adds 1 and the other terms in float32
    torch.testing.assert_close(logits.grad[0].cpu().double(), want, rtol=1e-5, atol=atol)


def test_excluded_ids_and_rows_without_a_distribution(device):
    rows = [[0.0, -math.inf, 1.0], [0.0, -math.inf, 1.0], [-math.inf] * 3, [0.0, math.nan, 0.0], [-math.inf] * 3]
    logits = torch.tensor(rows, device=device, requires_grad=True)
    log_p, log_q = daemon_fast.token_logprobs(logits, torch.tensor([2, 1, 0, 0, 0], device=device), 0.5)
    weight = torch.tensor([1.0, 1, 1, 1, 0], device=device)
    torch.autograd.backward((log_p, log_q), (weight, weight))
    p, q = (torch.tensor([0.0, 1.0], dtype=torch.float64).div(t).softmax(0).tolist() for t in (1.0, 0.5))
    up = [[-p[0] - 2 * q[0], 0.0, -p[1] - 2 * q[1]]] * 2
    want = torch.tensor(up) + torch.tensor([[0, 0, 3.0], [0, 3.0, 0]])
    torch.testing.assert_close(logits.grad[:2].cpu(), want)
    assert logits.grad[2:4].isnan().all()
    assert (logits.grad[4] == 0).all()  # the loss leaves that row out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_of_half_precision_is_the_nearest(real_device, dtype):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    steps = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()  # every number, and halfway to the next
    grads = torch.cat([bits.view(torch.float32), steps, steps.nextafter(torch.tensor(1e9)), steps * (1 + 2**-11)])
    grads = grads.to(real_device)
    logits, ids = (
        torch.zeros(len(grads), 2, dtype=dtype, device=real_device),
        torch.zeros(len(grads), device=real_device).long(),
    )
    grad = torch.ops.daemon_fast.token_logprobs_backward(2 * grads, torch.zeros_like(grads), logits, ids, 1.0)
    want = torch.stack([(2 * grads).mul(0.5), (2 * grads).mul(-0.5)], dim=1).to(dtype)
    torch.testing.assert_close(grad, want, rtol=0, atol=0, equal_nan=True)


def test_the_gradient_is_the_same_for_any_number_of_threads(threads):
    logits, ids, grads = torch.randn(40, 5000), torch.randint(0, 5000, (40,)), torch.randn(2, 40)
    backward = torch.ops.daemon_fast.token_logprobs_backward
    threads(1)
    one = backward(*grads, logits, ids, 0.97)
    threads(3)
    assert torch.equal(backward(*grads, logits, ids, 0.97), one)


def test_a_compiled_loss_has_the_same_gradient(real_device):
    def loss(hidden, ids):
        log_p, log_q = daemon_fast.token_logprobs(hidden * 2, ids, 0.9)
        return (log_p - 0.5 * log_q.exp()).sum()

    hidden, ids = torch.randn(4, 30, device=real_device, requires_grad=True), torch.arange(4, device=real_device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(loss(hidden, ids), hidden)
    (got,) = torch.autograd.grad(compiled(hidden, ids), hidden)
    assert torch.equal(got, want)


def test_there_is_no_second_derivative():
    logits = torch.randn(2, 5, requires_grad=True)
    log_p = daemon_fast.token_logprobs(logits, torch.tensor([0, 4])).log_p
    (grad,) = torch.autograd.grad(log_p.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="token_logprobs_backward has no gradient"):
        grad.square().sum().backward()


def test_opcheck_with_gradients(device):
    logits = torch.randn(3, 20, device=device, requires_grad=True)
    ids, grads = torch.tensor([0, 19, 5], device=device), torch.randn(2, 3, device=device)
    torch.library.opcheck(torch.ops.daemon_fast.token_logprobs.default, (logits, ids, 0.97))
    backward = torch.ops.daemon_fast.token_logprobs_backward.default
    torch.library.opcheck(backward, (*grads, logits.detach(), ids, 0.97))
    torch.library.opcheck(backward, (*grads, logits.detach().half(), ids.int(), 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2)}, r"grad_log_p must have logits.shape\[0\] = 3 at dimension 0, got shape \[2\]"),
        ({1: torch.zeros(3).double()}, "grad_log_q must be float32, got float64"),
        ({3: torch.tensor([0, 4, 0])}, r"ids\[1\] = 4 is outside the vocabulary \[0, 4\)"),
    ],
)
def test_bad_input_of_the_backward_operator_is_named(change, message):
    arguments = [torch.zeros(3), torch.zeros(3), torch.zeros(3, 4), torch.zeros(3).long(), 1.0]
    for at, value in change.items():
        arguments[at] = value
    with pytest.raises(RuntimeError, match="token_logprobs_backward: " + message):
        torch.ops.daemon_fast.token_logprobs_backward(*arguments)


# ---- bad input ------------------------------------------------------------------------------------------------------


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
