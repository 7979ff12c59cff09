"""`torch.compile` of a function that calls the operators: one graph, the same results."""

from __future__ import annotations

import torch

import daemon_fast


def choose(logits, tokens, lengths, mu, uniforms):
    chosen = daemon_fast.token_logprobs(logits, tokens[:, 0] % logits.shape[1], 0.9)
    drawn = daemon_fast.sample_tokens(logits, uniforms.sum().expand(len(logits)) % 1, 0.9)
    features = daemon_fast.repetition(tokens * 1, lengths)[None] + 0.01 * chosen.log_q[None, :, None]
    selection = daemon_fast.sir_select(features, mu, uniforms)
    winner = daemon_fast.race_select(features, mu, uniforms[..., None].expand(-1, -1, len(tokens)))
    weights = daemon_fast.importance_weights(-(features.double() @ mu))
    moments = daemon_fast.tilted_moments(features, mu)
    return (
        drawn.ids - 1,
        selection.index + 1,
        selection.ess * 2,
        winner.index + 1,
        weights.log_mean,
        moments.mean.exp(),
        moments.covariance,
    )


def arguments(rows, width):
    generator = torch.Generator().manual_seed(rows)
    return (
        torch.randn(rows, 50, generator=generator),
        torch.randint(9, (rows, width), generator=generator),
        torch.full((rows,), width),
        torch.randn(6, generator=generator).double(),
        torch.rand(1, 3, generator=generator).double(),
    )


def test_there_is_no_graph_break():
    explained = torch._dynamo.explain(choose)(*arguments(5, 20))
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1
    assert explained.op_count >= 6


def test_compiled_results_are_the_same():
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    for shape in ((5, 20), (5, 20), (7, 33), (2, 4)):  # the later ones with dynamic shapes
        for got, want in zip(compiled(*arguments(*shape)), choose(*arguments(*shape)), strict=True):
            assert torch.equal(got, want)
