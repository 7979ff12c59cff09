"""The CUDA code on the CPU: host code, launches and kernels, as they are (see emulated.py and emulation/cuda.h).

What it computes is compared with the definitions in each operator's own tests. Here: every kernel that is compiled, in
several orders of its threads, at each limit of a device, under sanitizers, and every line.
"""

from __future__ import annotations

import math

import emulated
import pytest
import torch

from daemon_fast.ops import _ops

F64 = torch.float64
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
RTOL = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7, F64: 1e-10}


def calls():
    """Operator and arguments: every kernel, at sizes on both sides of each choice that the launches make."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def uniforms(*shape):
        return torch.rand(*shape, generator=generator, dtype=F64)

    for token in (torch.int64, torch.int32):
        for T in (1, 33, 700, 7000, 20_000, 66_000):
            tokens = torch.randint(-20, 20, (3, T + 1), generator=generator).to(token)[:, :T]
            lengths = torch.tensor([T, T // 2, 0])
            for length in (lengths, lengths.int()):
                yield "repetition", tokens, length, [1, 2, 3, 5, T + 1], [1, 8, T]
        for T, alphabet in ((0, 1), (1, 1), (32, 9), (150, 1), (150, 10), (300, 10**9), (512, 300)):  # a warp a row
            tokens = torch.randint(-alphabet, alphabet, (5, T), generator=generator).to(token)
            lengths = torch.tensor([T, T // 2, 0, max(T - 1, 0), min(T, 1)])
            yield "repetition", tokens, lengths, [1, 2, 3, 4], [1, 8, 16, 32, max(T, 1)]
    for logit in FLOATS:
        for V in (1, 9, 2500):
            logits = (normal(3, V + 3) * 4).to(logit)[:, 3:]  # rows start anywhere between boundaries
            logits[1, : V // 2] = -math.inf
            for temperature in (1.0, 0.9):
                for id_type in (torch.int64, torch.int32):
                    ids = torch.tensor([0, V - 1, V // 2], dtype=id_type)
                    yield "token_logprobs", logits, ids, temperature
                    for grads in (normal(2, 3), torch.zeros(2, 3)):
                        yield "token_logprobs_backward", *grads, logits, ids, temperature
                yield "sample_tokens", logits, uniforms(3), temperature
    for M in (1, 25, 40, 65, 1024, 2789, 6125, 30_000):
        for feature in (torch.float32, F64):
            yield "importance_weights", normal(2, M).to(feature)
            features, mu = normal(2, M, 3).to(feature), torch.tensor([0.5, -1.0, 0.0], dtype=F64)
            for base in (None, normal(2, M), normal(2, M).double()):
                if base is not None and M > 1:
                    base[0, ::2] = -math.inf
                yield "sir_select", features, mu, uniforms(2, 3), base
                yield "race_select", features, mu, uniforms(2, 3, M), base
                for normalization in ("per_prefix", "global"):
                    yield (
                        "tilted_moments",
                        features[:, :2000],
                        mu,
                        None if base is None else base[:, :2000],
                        normalization,
                    )


def outputs(call):
    name, *arguments = call
    out = getattr(_ops, name)(*arguments)
    return (out,) if isinstance(out, torch.Tensor) else out


def compare(call, got, want):
    for a, b in zip(got, want, strict=True):
        if call[0] == "repetition" or a.dtype == torch.int64:
            assert torch.equal(a, b), call[0]
        else:
            tolerance = max(RTOL[a.dtype], RTOL[call[1].dtype] if "logprobs" not in call[0] else 0)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=2e-6 if a.dtype != F64 else 1e-12, msg=call[0])


# First warp ahead, last warp ahead, a shuffle of all threads.
@pytest.mark.parametrize("order", [0] if emulated.SANITIZED else [0, 1, 2])
@pytest.mark.parametrize("ptx", [False] if emulated.SANITIZED else [False, True])
def test_every_kernel_gives_what_the_cpu_gives(order, ptx):
    if ptx and not emulated.has_ptx():
        pytest.skip("built without CUDA, or no cuobjdump")
    for call in calls():
        want = outputs(call)
        with emulated.operators(order=order, ptx=ptx, multiprocessors=1):  # for which 4 rows are many
            compare(call, outputs(call), want)
    assert emulated.launched() == emulated.compiled()
