"""Gradients end at the operators that have none with an error, and pass by those that a loss doesn't reach."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import daemon_fast

MU = torch.zeros(2, dtype=torch.float64)
CALLS = {
    "importance_weights": daemon_fast.importance_weights,
    "sir_select": lambda log_w: daemon_fast.sir_select(log_w[..., None].expand(-1, -1, 2), MU, MU[:1].expand(3)),
    "race_select": lambda log_w: daemon_fast.race_select(
        log_w[..., None].expand(-1, -1, 2), MU, MU[:1].expand(log_w.shape)
    ),
    "tilted_moments": lambda log_w: daemon_fast.tilted_moments(torch.ones(3, 4, 2), MU, log_w),
}


@pytest.mark.parametrize("operator", CALLS)
def test_an_operator_without_a_gradient_says_so(operator):
    log_w = torch.randn(3, 4, requires_grad=True)
    plain = CALLS[operator](log_w.detach())
    for name, value in CALLS[operator](log_w)._asdict().items():
        assert torch.equal(value, getattr(plain, name))
        if value.is_floating_point():
            # Beside a part that has a gradient: without the error, the loss would lack the other part unseen.
            with pytest.raises(RuntimeError, match=f"{operator} has no gradient: detach"):
                (value.sum() + log_w.sum()).backward()
    assert not any(value.requires_grad for value in plain)
    with torch.no_grad():
        assert not any(value.requires_grad for value in CALLS[operator](log_w))


def test_sample_tokens_has_that_of_the_drawn_ids():
    logits, uniforms = torch.randn(5, 40, requires_grad=True), torch.rand(5, dtype=torch.float64)
    drawn = daemon_fast.sample_tokens(logits, uniforms, 0.8)
    chosen = daemon_fast.token_logprobs(logits, drawn.ids, 0.8)
    grads = (torch.randn(5), torch.randn(5))
    (got,) = torch.autograd.grad((drawn.log_p, drawn.log_q), logits, grads)
    (want,) = torch.autograd.grad(chosen, logits, grads)
    assert torch.equal(got, want)
    assert not drawn.ids.requires_grad
    # opcheck's own loss can't begin with an integer result: so its fourth test is made here
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.daemon_fast.sample_tokens.default
    torch.library.opcheck(operator, (logits, uniforms, 0.8), test_utils=utilities)
    compiled = torch.compile(lambda x: daemon_fast.sample_tokens(x, uniforms, 0.8), backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(logits)[1:], logits, grads)
    assert torch.equal(got, want)


IDS = torch.tensor([1, 6, 0])
UNIFORMS = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
LOGITS = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
TANGENT = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))


def parts_of(operator, logits):
    if operator == "token_logprobs":
        return torch.stack(daemon_fast.token_logprobs(logits, IDS, 0.7))
    return torch.stack(daemon_fast.sample_tokens(logits, UNIFORMS, 0.7)[1:])


def by_definition(operator, logits):
    """In float64, ids and all."""
    ids = IDS
    if operator == "sample_tokens":
        ids = ((logits.detach() / 0.7).softmax(1).cumsum(1) <= UNIFORMS[:, None]).sum(1)
    rows = [torch.stack([row[i] - row.logsumexp(0) for row, i in zip(x, ids, strict=True)])
            for x in (logits, logits / 0.7)]  # fmt: skip
    return torch.stack(rows)


@pytest.mark.parametrize("operator", ["token_logprobs", "sample_tokens"])
def test_forward_mode_and_transforms_give_the_derivatives_of_the_definition(operator):
    logits, tangent = LOGITS.double(), TANGENT.double()
    entries = torch.eye(21, dtype=torch.float64).view(21, 3, 7)
    step = 1e-6
    ahead, behind = ([by_definition(operator, logits + sign * step * e) for e in entries] for sign in (1, -1))
    jacobian = (torch.stack(ahead, -1) - torch.stack(behind, -1)).view(2, 3, 3, 7) / (2 * step)
    along = (jacobian * tangent).sum((-2, -1)).float()

    def f(x):
        return parts_of(operator, x)

    value, got = torch.func.jvp(f, (LOGITS,), (TANGENT,))
    torch.testing.assert_close(value, f(LOGITS))
    torch.testing.assert_close(got, along, rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(f(forward_ad.make_dual(LOGITS, TANGENT))).tangent
    torch.testing.assert_close(got, along, rtol=1e-5, atol=1e-6)
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(transform(f)(LOGITS), jacobian.float(), rtol=1e-5, atol=1e-6)
    slope = torch.func.grad(lambda x: f(x).sum())
    torch.testing.assert_close(slope(LOGITS), jacobian.sum((0, 1)).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.compile(slope, backend="aot_eager", fullgraph=True)(LOGITS), slope(LOGITS), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(torch.vmap(f)(LOGITS[None].expand(2, -1, -1))[1], f(LOGITS))


def test_transforms_mark_ids_outside_the_vocabulary_and_refuse_what_is_no_argument():
    def f(x, ids, temperature=1.0):
        return daemon_fast.token_logprobs(x, ids, temperature).log_p

    got = torch.func.jvp(lambda x: f(x, torch.tensor([1, -1, 7])), (LOGITS,), (TANGENT,))[0]
    assert got.isnan().tolist() == [False, True, True]
    for bad, message in (
        ((IDS[:2],), "must have"),
        ((IDS.double(),), "int32 or int64"),
        ((IDS, -1.0), "= -1.0 must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.func.jvp(lambda x, bad=bad: f(x, *bad), (LOGITS,), (TANGENT,))


@pytest.mark.parametrize("operator", CALLS)
def test_no_transform_takes_an_operator_without_a_gradient_for_a_constant(operator):
    def f(log_w):
        return CALLS[operator](log_w)[-1].sum()

    log_w, tangent = torch.randn(3, 4), torch.randn(3, 4)
    error = f"{operator} has no gradient"
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match=error):
            transform(f)(log_w)
    with pytest.raises(RuntimeError, match=error):
        torch.func.jvp(f, (log_w,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=error):
        f(forward_ad.make_dual(log_w, tangent))
    with pytest.raises(RuntimeError, match=error):
        torch.compile(lambda x: torch.func.jvp(f, (x,), (tangent,))[1], backend="aot_eager")(log_w)
    # What depends on no tangent is a constant.
    value, slope = torch.func.jvp(lambda y: f(log_w) * y, (torch.ones(()),), (torch.ones(()),))
    assert value == slope == f(log_w)
