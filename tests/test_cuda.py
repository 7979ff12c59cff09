"""What only a GPU can show: graphs, streams, synchronisation, devices, marked results. Parity is in each operator's
own tests, which run on the GPU too."""

from __future__ import annotations

import math

import pytest
import torch

import daemon_fast

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


def test_every_operator_in_a_graph(cuda):
    logits, ids = torch.randn(8, 5000, device=cuda), torch.randint(5000, (8,), device=cuda)
    features, mu = torch.randn(30, M, K, device=cuda), torch.randn(K, dtype=F64, device=cuda)
    uniforms = torch.rand(8, dtype=F64, device=cuda)

    def run():
        return [
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
    features = torch.randn(30, M, K, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        choose(*inputs)
        daemon_fast.token_logprobs(logits, ids, 0.97)
        torch.ops.daemon_fast.token_logprobs_backward(logits[:, 0], logits[:, 1], logits, ids, 0.97)
        daemon_fast.sample_tokens(logits, features[:8, 0, 0].abs().double() % 1, 0.97)
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


def test_empty_inputs(cuda):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=cuda)

    assert daemon_fast.repetition(empty(0, 5, dtype=torch.int64)).shape == (0, 6)
    assert daemon_fast.repetition(empty(3, 0, dtype=torch.int64)).tolist() == [[0.0] * 6] * 3
    assert daemon_fast.token_logprobs(empty(0, 9), empty(0, dtype=torch.int64)).log_p.shape == (0,)
    assert daemon_fast.importance_weights(empty(0, 9)).weights.shape == (0, 9)
    assert daemon_fast.sir_select(empty(0, 9, 2), empty(2, dtype=F64), empty(0, dtype=F64)).index.shape == (0,)


def test_what_the_host_cannot_see_is_marked_and_never_silent(cuda):
    tokens = torch.zeros(3, 4, dtype=torch.int64, device=cuda)
    out = daemon_fast.repetition(tokens, torch.tensor([4, 5, -1], device=cuda))
    assert out.isnan().all(dim=1).tolist() == [False, True, True]

    logits = torch.zeros(3, 4, device=cuda)
    out = torch.stack(daemon_fast.token_logprobs(logits, torch.tensor([3, 4, -1], device=cuda), 0.9))
    assert out.isnan().all(dim=0).tolist() == [False, True, True]

    uniforms = torch.tensor([0.5, 1.0, -1.0], dtype=F64, device=cuda)
    assert (daemon_fast.sample_tokens(logits, uniforms, 0.9).ids < 0).tolist() == [False, True, True]

    log_w = torch.tensor([[0.0, 1.0], [-math.inf, -math.inf], [math.nan, 0.0], [math.inf, 0.0]], device=cuda)
    for part in daemon_fast.importance_weights(log_w):
        assert part.reshape(4, -1).isnan().all(dim=1).tolist() == [False, True, True, True]

    features, mu = torch.zeros(4, 2, 1, device=cuda), torch.ones(1, dtype=F64, device=cuda)
    uniforms = torch.tensor([0.5, 0.5, 0.5, 1.0], dtype=F64, device=cuda)
    log_w[3] = 0
    out = daemon_fast.sir_select(features, mu, uniforms, log_w)
    assert out.index.tolist() == [1, -1, -1, -1]
    assert out.log_z.isnan().tolist() == [False, True, True, False]

    races = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 1.0]], dtype=F64, device=cuda)
    out = daemon_fast.race_select(features, mu, races, log_w)
    assert out.index.tolist() == [1, -1, -1, -1]
    assert out.log_z.isnan().tolist() == [False, True, True, False]

    for normalization in ("per_prefix", "global"):
        for part in daemon_fast.tilted_moments(features, mu, log_w, normalization):
            assert part.isnan().all()


def test_more_than_a_launch_can_hold_is_named(cuda):
    tokens = torch.zeros(1, 4, dtype=torch.int64, device=cuda)
    with pytest.raises(RuntimeError, match="ngrams has 33 entries, more than the 32"):
        daemon_fast.repetition(tokens, ngrams=list(range(1, 34)))
    features, mu = torch.zeros(2, 2, 400, device=cuda), torch.zeros(400, dtype=F64, device=cuda)
    with pytest.raises(RuntimeError, match="K = 400, whose moments need"):
        daemon_fast.tilted_moments(features, mu)


def test_fit_on_a_gpu_equals_that_on_the_cpu(cuda):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, M, 4, generator=generator)
    targets = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=F64)
    base = torch.randn(60, M, generator=generator)
    for normalization in ("per_prefix", "global"):
        here = daemon_fast.fit(features, targets, base, normalization, bootstrap=5)
        there = daemon_fast.fit(features.to(cuda), targets.to(cuda), base.to(cuda), normalization, bootstrap=5)
        torch.testing.assert_close(here.mu, there.mu, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(here.confidence_interval, there.confidence_interval, rtol=1e-8, atol=1e-10)
