"""Gradients end at the operators that have none with an error, and pass by those that a loss doesn't reach."""

from __future__ import annotations

import pytest
import torch

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
