"""The fit: Newton against Adam (method="rmse", the paper's) and plain gradient descent, on 10^6 samples x 9 metrics.

All three call the same tilted_moments in one process, in turn. A step is one such call: one pass over the features.
Run: python benchmarks/fit.py [--save]
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from common import finish, table, zipf_tokens
from torch import Tensor
from tqdm import tqdm

from daemon_fast import ops, repetition
from daemon_fast.fit.dual import Problem
from daemon_fast.fit.newton import adam, newton
from daemon_fast.fit.samples import Block, InMemory

NAMES = ("sr_2", "sr_3", "sr_4", "tr_8", "tr_16", "tr_32", "div", "coh", "ent")
N, M, T = 40_000, 25, 64
TOLERANCES = (1e-3, 1e-9)
LEARNING_RATE = 0.05  # of Adam and of gradient descent, the latter as other toolkits have it
ROUNDS = 3
BUDGET = 90.0  # seconds that a method may take in a round


class OutOfTime(Exception):
    pass


@dataclass(frozen=True)
class Watched(Problem):
    """A problem that notes, at each pass over the features, the seconds since it was made and the largest residual."""

    begin: float = field(default_factory=time.perf_counter)
    seen: list[tuple[float, float]] = field(default_factory=list)

    def tilted(self, nu: Tensor) -> ops.Moments:
        moments = super().tilted(nu)
        elapsed = time.perf_counter() - self.begin
        self.seen.append((elapsed, float(((moments.mean - self.targets) / self.scale).abs().max())))
        if elapsed > BUDGET:
            raise OutOfTime
        return moments

    def reached(self, tolerance: float) -> tuple[float, int]:
        """Seconds and steps until the residual was within the tolerance; infinite seconds if it never was."""
        steps = next((i + 1 for i, (_, residual) in enumerate(self.seen) if residual <= tolerance), None)
        return (math.inf, len(self.seen)) if steps is None else (self.seen[steps - 1][0], steps)


def features() -> Tensor:
    """[N, M, K] float32, with about the means and deviations that the demo's candidates have.

    Repetition is counted on Zipf tokens into which spans from earlier in the row are copied, in some rows more than in
    others; coh and ent are normal and log-normal. div is a function of sr_n, so that the Hessian is near-singular.
    """
    generator = torch.Generator().manual_seed(0)
    rows = N * M

    def uniform() -> Tensor:
        return torch.rand(rows, generator=generator)

    tokens = zipf_tokens(rows, T, seed=0)
    share = uniform().square()
    back, copying = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool)
    for t in range(1, T):
        starting = uniform() < 0.1 * share
        back = torch.where(starting, 1 + (uniform() * t).long(), back)
        copying = starting | (copying & (uniform() < 0.6))
        earlier = tokens.gather(1, (t - back).clamp_min(0)[:, None])[:, 0]
        tokens[:, t] = torch.where(copying, earlier, tokens[:, t])
    counted = repetition(tokens)
    div = (1 - counted[:, :3]).prod(1)
    coh = 0.45 + 0.15 * torch.randn(rows, generator=generator) - 0.1 * share
    ent = torch.exp(3.0 + 0.4 * torch.randn(rows, generator=generator) - 0.5 * share)
    return torch.column_stack([counted, div, coh, ent]).reshape(N, M, len(NAMES))


def problem() -> Problem:
    """Its targets are the means of a known tilt, so that a solution exists; coh moves by about 0.8 deviations."""
    values = features()
    truth = torch.tensor([-0.1, 0.1, -0.1, 0.2, -0.2, -0.1, 0.1, -0.8, 0.2], dtype=torch.float64)
    start = Problem.standardised(InMemory(Block(values)), torch.zeros_like(truth), "per_prefix", NAMES, 0.0)
    return replace(start, targets=start.tilted(truth).mean)


def gradient_descent(p: Problem) -> None:
    nu = torch.zeros_like(p.scale)
    while True:
        residual = (p.tilted(nu).mean - p.targets) / p.scale
        if residual.abs().max() <= TOLERANCES[-1]:
            return
        nu = nu + LEARNING_RATE * residual


METHODS: dict[str, Callable[[Problem], Any]] = {
    "newton": lambda p: newton(p, tolerance=TOLERANCES[-1]),
    "rmse (Adam)": lambda p: adam(p, LEARNING_RATE, TOLERANCES[-1]),
    "gradient descent": gradient_descent,
}


def main() -> None:
    base = problem()
    known = {f.name: getattr(base, f.name) for f in fields(Problem)}
    runs: dict[str, list[Watched]] = {name: [] for name in METHODS}
    for name in tqdm(list(METHODS) * ROUNDS, desc="fits", unit="fit"):
        watched = Watched(**known)
        with contextlib.suppress(OutOfTime):
            METHODS[name](watched)
        runs[name].append(watched)
    rows, figures = [], []
    fastest = dict.fromkeys(TOLERANCES, 0.0)
    for name, watched in runs.items():
        for tolerance in TOLERANCES:
            seconds = statistics.median(run.reached(tolerance)[0] for run in watched)
            steps = watched[0].reached(tolerance)[1]
            fastest[tolerance] = fastest[tolerance] or seconds  # Newton comes first
            best = min(residual for _, residual in watched[0].seen)
            if math.isfinite(seconds):
                rows.append(
                    [name, f"{tolerance:g}", f"{seconds:.3g}", f"{steps:,}", f"{seconds / fastest[tolerance]:,.0f}"]
                )
            else:
                ratio = f"> {BUDGET / fastest[tolerance]:,.0f}"
                rows.append([name, f"{tolerance:g}", f"not in {BUDGET:g} (at best {best:.1g})", f"> {steps:,}", ratio])
            reached = seconds if math.isfinite(seconds) else None
            figures.append(
                {"method": name, "tolerance": tolerance, "seconds": reached, "steps": steps, "smallest residual": best}
            )
    header = ["method", "residual, standard deviations", "seconds", "passes over the features", "time / Newton's"]
    title = f"# fit of {len(NAMES)} metrics on {N:,} prefixes x {M} candidates, {torch.get_num_threads()} threads"
    finish("fit", f"{title}\n\n{table(header, rows)}", figures)


if __name__ == "__main__":
    main()
