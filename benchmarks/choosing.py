"""Choosing one of M candidates: each operator, and the whole way from tokens to choice, against plain torch on the CPU.

One process, all threads, medians of interleaved calls.
Run: python benchmarks/choosing.py [--save]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import finish, interleaved, table, zipf_tokens

import daemon_fast

M, T, K, VOCABULARY = 25, 256, 9, 50_257
ROUNDS = 21


def torch_select(
    features: torch.Tensor, mu: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    log_w = -(features.double() @ mu)
    log_z = log_w.logsumexp(1)
    weights = (log_w - log_z[:, None]).exp()
    index = torch.searchsorted(weights.cumsum(1), uniforms[:, None], right=True)[:, 0].clamp_max(features.shape[1] - 1)
    return index, weights, log_z, 1 / weights.square().sum(1)


def torch_race(
    features: torch.Tensor, mu: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    log_w = -(features.double() @ mu)
    log_z = log_w.logsumexp(1)
    weights = (log_w - log_z[:, None]).exp()
    return (log_w - uniforms.log()).argmax(1), weights, log_z, 1 / weights.square().sum(1)


def torch_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits, at = logits.float(), ids[:, None]
    return logits.log_softmax(1).gather(1, at), (logits / 0.97).log_softmax(1).gather(1, at)


def ours_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> Sequence[torch.Tensor]:
    return daemon_fast.token_logprobs(logits, ids, 0.97)


def gradient(operator: Callable[..., Sequence[torch.Tensor]], logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Forward and backward."""
    logits = logits.detach().requires_grad_()
    log_p, log_q = operator(logits, ids)
    (grad,) = torch.autograd.grad(log_p.sum() - 0.5 * log_q.sum(), logits)
    return grad


def torch_sample(logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By inverse CDF too: `multinomial` takes no uniforms, and is no faster."""
    cold = (logits / 0.97).log_softmax(1)
    cumulative = cold.exp().cumsum(1)
    ids = torch.searchsorted(cumulative, (uniforms[:, None] * cumulative[:, -1:]).float(), right=True)
    ids = ids.clamp_max(logits.shape[1] - 1)
    return ids[:, 0], logits.log_softmax(1).gather(1, ids), cold.gather(1, ids)


def torch_multinomial(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cold = (logits / 0.97).log_softmax(1)
    ids = torch.multinomial(cold.exp(), 1)
    return ids[:, 0], logits.log_softmax(1).gather(1, ids), cold.gather(1, ids)


def torch_moments(features: torch.Tensor, mu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = features.double()
    log_w = -(values @ mu)
    weights = log_w.softmax(1)[..., None]
    means = (values * weights).sum(1)
    scaled = ((values - means[:, None]) * weights.sqrt()).flatten(0, 1)
    return log_w.logsumexp(1).mean(), means.mean(0), scaled.T @ scaled / len(values)


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    mu = normal(K).double()
    few, many = normal(1, M, K), normal(4096, M, K)
    uniform, uniforms = torch.rand(1, generator=generator).double(), torch.rand(4096, generator=generator).double()
    races = torch.rand(4096, M, generator=generator).double()
    logits, ids = normal(100, VOCABULARY), torch.randint(VOCABULARY, (100,), generator=generator)
    narrow = logits.bfloat16()
    draws = torch.rand(M, generator=generator).double()
    samples = normal(40_000, M, K)
    candidates = [zipf_tokens(M, T, seed) for seed in range(16)]
    last, one = candidates[0][:, :1], torch.ones(M, dtype=torch.int64)
    lengths, mu_repetition = torch.full((M,), T), mu[:6]

    def tokens_to_choice(i: int) -> Any:
        features = daemon_fast.repetition(candidates[i % 16], lengths)
        return daemon_fast.sir_select(features[None], mu_repetition, uniform)

    pairs: dict[str, tuple[Callable[[int], Any], Callable[[int], Any] | None]] = {
        f"sir_select [1, {M}, {K}]": (
            lambda _: daemon_fast.sir_select(few, mu, uniform),
            lambda _: torch_select(few, mu, uniform),
        ),
        f"sir_select [4096, {M}, {K}]": (
            lambda _: daemon_fast.sir_select(many, mu, uniforms),
            lambda _: torch_select(many, mu, uniforms),
        ),
        f"race_select [1, {M}, {K}]": (
            lambda _: daemon_fast.race_select(few, mu, races[:1]),
            lambda _: torch_race(few, mu, races[:1]),
        ),
        f"race_select [4096, {M}, {K}]": (
            lambda _: daemon_fast.race_select(many, mu, races),
            lambda _: torch_race(many, mu, races),
        ),
        f"token_logprobs [100, {VOCABULARY}] float32": (
            lambda _: daemon_fast.token_logprobs(logits, ids, 0.97),
            lambda _: torch_logprobs(logits, ids),
        ),
        f"token_logprobs [100, {VOCABULARY}] float32, and its gradient": (
            lambda _: gradient(ours_logprobs, logits, ids),
            lambda _: gradient(torch_logprobs, logits, ids),
        ),
        f"token_logprobs [100, {VOCABULARY}] bfloat16, and its gradient": (
            lambda _: gradient(ours_logprobs, narrow, ids),
            lambda _: gradient(torch_logprobs, narrow, ids),
        ),
        f"sample_tokens [{M}, {VOCABULARY}] float32, against inverse CDF": (
            lambda _: daemon_fast.sample_tokens(logits[:M], draws, 0.97),
            lambda _: torch_sample(logits[:M], draws),
        ),
        f"sample_tokens [{M}, {VOCABULARY}] float32, against multinomial": (
            lambda _: daemon_fast.sample_tokens(logits[:M], draws, 0.97),
            lambda _: torch_multinomial(logits[:M]),
        ),
        f"tilted_moments [40000, {M}, {K}]": (
            lambda _: daemon_fast.tilted_moments(samples, mu),
            lambda _: torch_moments(samples, mu),
        ),
        f"repetition [{M}, {T}], one call at the end": (
            lambda i: daemon_fast.repetition(candidates[i % 16], lengths),
            None,
        ),
        f"repetition [{M}, 1], {T} calls: the least that updating at every step costs": (
            lambda _: [daemon_fast.repetition(last, one) for _ in range(T)],
            None,
        ),
        f"tokens to choice, M = {M}, T = {T}: repetition, then sir_select": (tokens_to_choice, None),
    }
    check(few, mu, uniform, logits, ids, samples)
    rows, figures = [], []
    for name, (ours, plain) in pairs.items():
        seconds = interleaved({"ours": ours} if plain is None else {"ours": ours, "torch": plain}, ROUNDS)
        us = {side: 1e6 * value for side, value in seconds.items()}
        rows.append([name, us["ours"], us.get("torch", "-"), us["torch"] / us["ours"] if plain else "-"])
        figures.append({"work": name, "us": us})
    title = f"# Choosing, CPU, {torch.get_num_threads()} threads"
    finish("choosing", f"{title}\n\n{table(['work', 'ours, µs', 'torch, µs', 'torch / ours'], rows)}", figures)


def check(
    features: torch.Tensor,
    mu: torch.Tensor,
    uniform: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    samples: torch.Tensor,
) -> None:
    """Both sides compute the same."""
    ours, plain = daemon_fast.sir_select(features, mu, uniform), torch_select(features, mu, uniform)
    assert torch.equal(ours.index, plain[0])
    races = torch.rand(1, M, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(daemon_fast.race_select(features, mu, races).index, torch_race(features, mu, races)[0])
    torch.testing.assert_close(ours.weights.double(), plain[1], rtol=1e-5, atol=1e-7)
    for a, b in zip(daemon_fast.token_logprobs(logits, ids, 0.97), torch_logprobs(logits, ids), strict=True):
        torch.testing.assert_close(a, b[:, 0], rtol=1e-5, atol=1e-5)
    ours, plain = (gradient(f, logits, ids) for f in (ours_logprobs, torch_logprobs))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for a, b in zip(daemon_fast.tilted_moments(samples, mu)[1:], torch_moments(samples, mu)[1:], strict=True):
        torch.testing.assert_close(a, b)


if __name__ == "__main__":
    main()
