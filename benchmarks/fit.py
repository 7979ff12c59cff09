"""The fit: Newton against L-BFGS, gradient descent and Adam (method="rmse", the paper's), 10^6 samples x 9 metrics.

All call the same tilted_moments in one process, in turn. A step is one such call: one pass over the features.
Run: python benchmarks/fit.py [--save]
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from common import finish, table, zipf_tokens
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from daemon_fast import ops, repetition
from daemon_fast.fit.dual import Problem
from daemon_fast.fit.newton import adam, newton
from daemon_fast.fit.samples import Block, InMemory

NAMES = ("sr_2", "sr_3", "sr_4", "tr_8", "tr_16", "tr_32", "div", "coh", "ent")
N, M, T = 40_000, 25, 64
COARSE, FINE = 1e-3, 1e-9  # residuals
LEARNING_RATE = 0.05  # of Adam and of gradient descent, the latter as other toolkits have it
ROUNDS = 3


@dataclass(frozen=True)
class Watched(Problem):
    """A problem that notes, at each pass over the features, the seconds since it was made and the largest residual."""

    begin: float = field(default_factory=time.perf_counter)
    seen: list[tuple[float, float]] = field(default_factory=list)

    def tilted(self, nu: Tensor) -> ops.Moments:
        moments = super().tilted(nu)
        residual = float(((moments.mean - self.targets) / self.scale).abs().max())
        self.seen.append((time.perf_counter() - self.begin, residual))
        return moments

    def reached(self, tolerance: float) -> tuple[float, int]:
        """Seconds and steps until the residual was within the tolerance."""
        steps = next(i + 1 for i, (_, residual) in enumerate(self.seen) if residual <= tolerance)
        return self.seen[steps - 1][0], steps


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


def lbfgs(p: Problem) -> None:
    """Of SciPy, which takes fewer passes than torch's; with a history of more steps than it needs, it is full BFGS."""

    def value_and_gradient(nu: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        value, gradient, _ = p.dual(torch.from_numpy(nu))
        return value, gradient.numpy()

    limits = {"maxcor": 50, "gtol": FINE, "ftol": 0.0, "maxiter": 1000}
    minimize(value_and_gradient, np.zeros(len(NAMES)), jac=True, method="L-BFGS-B", options=limits)


def gradient_descent(p: Problem) -> None:
    nu = torch.zeros_like(p.scale)
    while True:
        residual = (p.tilted(nu).mean - p.targets) / p.scale
        if residual.abs().max() <= COARSE:
            return
        nu = nu + LEARNING_RATE * residual


# Name -> the method, and what it is run to: to the fine tolerance the last two would take hours.
METHODS: dict[str, tuple[Callable[[Problem], Any], tuple[float, ...]]] = {
    "newton": (lambda p: newton(p, tolerance=FINE), (COARSE, FINE)),
    "L-BFGS": (lbfgs, (COARSE, FINE)),
    "gradient descent": (gradient_descent, (COARSE,)),
    "rmse (Adam)": (lambda p: adam(p, LEARNING_RATE, COARSE), (COARSE,)),
}


def main() -> None:
    base = problem()
    known = {f.name: getattr(base, f.name) for f in fields(Problem)}
    runs: dict[str, list[Watched]] = {name: [] for name in METHODS}
    for name in tqdm(list(METHODS) * ROUNDS, desc="fits", unit="fit"):
        watched = Watched(**known)
        METHODS[name][0](watched)
        runs[name].append(watched)
    load = os.getloadavg()[2]
    rows, figures = [], []
    newtons: dict[float, float] = {}
    for name, watched in runs.items():
        for tolerance in METHODS[name][1]:
            seconds = statistics.median(run.reached(tolerance)[0] for run in watched)
            steps = watched[0].reached(tolerance)[1]
            ratio = seconds / newtons.setdefault(tolerance, seconds)  # Newton comes first
            rows.append([name, f"{tolerance:g}", f"{seconds:.3g}", f"{steps:,}", f"{ratio:,.3g}"])
            figures.append({"method": name, "tolerance": tolerance, "seconds": seconds, "steps": steps})
    header = ["method", "residual, standard deviations", "seconds", "passes over the features", "time / Newton's"]
    title = f"# fit of {len(NAMES)} metrics on {N:,} prefixes x {M} candidates, {torch.get_num_threads()} threads"
    note = (
        "Every pass computes value, mean and covariance, of which only Newton's method needs the last. "
        f"Load average of the machine over these fits: {load:.1f}."
    )
    finish("fit", f"{title}\n\n{table(header, rows)}\n\n{note}", figures)


if __name__ == "__main__":
    main()
