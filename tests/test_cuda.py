"""What only a GPU can show: graphs, streams, synchronisation, devices. Parity is in each operator's
own tests, which run on the GPU too."""

from __future__ import annotations

import pytest
import torch

import daemon_fast
from daemon_fast import ops

pytestmark = pytest.mark.gpu
F64 = torch.float64
M, T, K = 25, 256, 6


@pytest.fixture
def inputs(cuda):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 60, (4 * M, T), generator=generator)
    lengths = torch.randint(T // 2, T + 1, (4 * M,), generator=generator)
    mu = torch.randn(K, generator=generator, dtype=F64) * 10
    uniforms = torch.rand(4, generator=generator, dtype=F64)
    return [part.to(cuda) for part in (tokens, lengths, mu, uniforms)]


def choose(tokens, lengths, mu, uniforms):
    features = daemon_fast.repetition(tokens, lengths).reshape(-1, M, K)
    return daemon_fast.sir_select(features, mu, uniforms)


def test_the_same_choice_as_on_the_cpu(inputs):
    here, there = choose(*(part.cpu() for part in inputs)), choose(*inputs)
    assert torch.equal(here.index, there.index.cpu())
    for a, b in zip(here[1:], there[1:], strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-6, atol=1e-30)


def test_tokens_to_choice_in_one_graph(inputs):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        choose(*inputs)  # loads the module before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = choose(*inputs)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        inputs[0].copy_(torch.randint(0, 40, (4 * M, T), generator=generator))
        inputs[3].copy_(torch.rand(4, generator=generator, dtype=F64))
        graph.replay()
        for a, b in zip(captured, choose(*inputs), strict=True):
            assert torch.equal(a, b)


def appended(ids, log_p, log_q, slot):
    """The buffers of 3 steps after one."""
    device, rows = ids.device, len(ids)
    buffers = (
        torch.zeros(3, rows, dtype=torch.int64, device=device), torch.zeros(3, rows, device=device),
        torch.zeros(3, rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device),
        torch.ones(rows, dtype=torch.bool, device=device),
    )  # fmt: skip
    rows, eos = torch.arange(rows, device=device), torch.arange(9, device=device)
    ops.append_tokens(
        *buffers, ids=ids, ids_log_p=log_p, ids_log_q=log_q, slot=slot, rows=rows, eos=eos, count_eos=True
    )
    return buffers


def test_every_operator_in_a_graph(cuda):
    logits, ids = torch.randn(8, 5000, device=cuda), torch.randint(5000, (8,), device=cuda)
    features, mu = torch.randn(30, M, K, device=cuda), torch.randn(K, dtype=F64, device=cuda)
    uniforms, slot = torch.rand(8, dtype=F64, device=cuda), torch.ones(1, dtype=torch.int64, device=cuda)

    def run():
        return [
            *appended(*daemon_fast.sample_tokens(logits, uniforms, 0.97), slot),
            *daemon_fast.token_logprobs(logits, ids, 0.97),
            torch.ops.daemon_fast.token_logprobs_backward(logits[:, 0], logits[:, 1], logits, ids, 0.97),
            *daemon_fast.sample_tokens(logits, uniforms, 0.97),
            *daemon_fast.importance_weights(features[..., 0]),
            *daemon_fast.race_select(features, mu, features[..., 0].abs().double() % 1),
            *daemon_fast.tilted_moments(features, mu),
            *daemon_fast.tilted_moments(features, mu, normalization="global"),
        ]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_no_operator_waits_for_the_device(inputs, cuda):
    logits, ids = torch.randn(8, 5000, device=cuda), torch.randint(5000, (8,), device=cuda)
    features, slot = torch.randn(30, M, K, device=cuda), torch.ones(1, dtype=torch.int64, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        choose(*inputs)
        daemon_fast.token_logprobs(logits, ids, 0.97)
        torch.ops.daemon_fast.token_logprobs_backward(logits[:, 0], logits[:, 1], logits, ids, 0.97)
        drawn = daemon_fast.sample_tokens(logits, features[:8, 0, 0].abs().double() % 1, 0.97)
        appended(*drawn, slot)
        daemon_fast.importance_weights(features[..., 0])
        daemon_fast.race_select(features, inputs[2], features[..., 0].abs().double() % 1)
        daemon_fast.tilted_moments(features, inputs[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_operators_run_on_the_current_stream(inputs):
    expected = choose(*inputs)
    stream = torch.cuda.Stream()
    tokens = torch.zeros_like(inputs[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        tokens.copy_(inputs[0])
        result = choose(tokens, *inputs[1:])
    stream.synchronize()
    assert torch.equal(result.index, expected.index)


def test_on_another_device_than_the_current(inputs):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    expected = choose(*inputs)
    there = choose(*(part.to("cuda:1") for part in inputs))
    assert there.index.device.index == 1
    assert torch.equal(there.index.cpu(), expected.index.cpu())
    with pytest.raises(RuntimeError, match="lengths must be on the same device"):
        daemon_fast.repetition(inputs[0], inputs[1].to("cuda:1"))


def test_fit_on_a_gpu_equals_that_on_the_cpu(cuda):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, M, 4, generator=generator)
    targets = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=F64)
    base = torch.randn(60, M, generator=generator)
    for normalization in ("per_prefix", "global"):
        here = daemon_fast.fit(features, targets, base, normalization=normalization, bootstrap=5)
        there = daemon_fast.fit(
            features.to(cuda), targets.to(cuda), base.to(cuda), normalization=normalization, bootstrap=5
        )
        torch.testing.assert_close(here.mu, there.mu, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(here.confidence_interval, there.confidence_interval, rtol=1e-8, atol=1e-10)
