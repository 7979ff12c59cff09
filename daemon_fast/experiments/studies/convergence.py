"""How fast bias and variance of the draw fall with the number of candidates (Ji et al. 2024, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from daemon_fast import ops
from daemon_fast.errors import Undefined
from daemon_fast.experiments import page
from daemon_fast.experiments.collected import Collected, Ess, NotDone, attempt
from daemon_fast.experiments.domain import DomainData
from daemon_fast.experiments.measures import weighted_mean
from daemon_fast.experiments.page import Cell, Row, Section, Table, ess_cell
from daemon_fast.ops import Draw
from daemon_fast.race import probabilities
from daemon_fast.seeds import generator

HEADING = "Convergence of the draw"
SIZES = (5, 10, 25, 50, 100, 200, 1000)
ORDERS, JACKKNIFE = 8, 10
HEALTHY_ESS = 4.0  # below it, bias is far from its leading term in 1 / M
FEWEST, ENOUGH = 3, 4  # sizes: for a slope, and for one to believe


@dataclass(frozen=True)
class Size:
    """Of draws from M candidates; bias and variance are in standard deviations of the candidates."""

    m: int
    bias: list[float]  # [K]
    variance: list[float]  # [K]
    bias_norm: float  # root mean square of the bias over metrics
    noise: float  # its standard error
    ess: float  # mean over prefixes

    @property
    def mean_variance(self) -> float:
        return sum(self.variance) / len(self.variance)


@dataclass(frozen=True)
class Curve:
    """Of one mu and one rule of the draw."""

    sizes: list[Size]
    slope: float | None  # of log bias_norm on log M, over the sizes that were used; None with fewer than `FEWEST`
    slope_error: float | None
    used: list[int]  # sizes whose mean ESS is at least `HEALTHY_ESS` and whose bias exceeds twice its noise
    pool_ess: Ess  # where its share is far below that of the groups of M, neither the pool nor the slope says much


@dataclass(frozen=True)
class Convergence:
    prefixes: int
    artefact: Curve
    race: Curve
    global_fit: Curve | NotDone


def compute(pool: Collected, mu: Tensor, sizes: Sequence[int], draw: Draw = "sir", seed: int = 0) -> Curve:
    """Bias and variance of a draw's expected metrics against M, from one large pool of candidates a prefix.

    Groups of M are disjoint parts of the pool, in several random orders. The pool's own weighted mean stands for the
    truth, which SIR and the race have in common; its bias, of order 1 / pool, is removed by Richardson's extrapolation
    of pool and half pool. Errors are of the candidates, by a jackknife that leaves out a tenth of them at a time (up to
    twice too large, as biases are quadratic in the noise of weights); prefixes are given.

    Parameters
    ----------
    mu : [K]
    sizes : M, of which those are taken that divide the pool: all of its candidates then count
    draw : which rule's chances weigh a group
    seed : of the orders

    Raises
    ------
    Undefined
        A pool that does not divide into tenths, or into groups of any of the sizes.
    """
    features, log_w = pool.features[..., : pool.fitted].double(), pool.log_w(mu)
    n, m, k = features.shape
    sizes = [size for size in sizes if m % size == 0 and size <= m // 2]
    if m % JACKKNIFE or not sizes:
        raise Undefined(f"a pool of {m} candidates does not divide into {JACKKNIFE} parts and into groups of any size")
    spread = features.reshape(-1, k).std(0).clamp_min(1e-12)
    random = generator(seed, "orders")
    orders = [torch.randperm(m, generator=random) for _ in range(ORDERS)]

    def groups(size: int, order: Tensor, draw: Draw = draw) -> tuple[Tensor, float]:
        """[N, groups, K] weighted means, and the mean ESS of the importance weights."""
        count = len(order) // size
        some = order[: count * size]
        part_log_w = log_w[:, some].reshape(n * count, size)
        weighed = ops.importance_weights(part_log_w)
        chances = weighed.weights if draw == "sir" else probabilities(part_log_w)
        part = features[:, some].reshape(n * count, size, k)
        return weighted_mean(part, chances).reshape(n, count, k) / spread, float(weighed.ess.mean())

    def biases(orders: list[Tensor]) -> Tensor:
        """[sizes, K]"""
        half = torch.stack([groups(len(order) // 2, order, "sir")[0].mean(1) for order in orders]).mean(0)
        truth = 2 * groups(len(orders[0]), orders[0], "sir")[0][:, 0] - half
        return torch.stack(
            [torch.stack([(groups(s, order)[0].mean(1) - truth).mean(0) for order in orders]).mean(0) for s in sizes]
        )

    def norms(bias: Tensor) -> Tensor:
        return bias.square().mean(-1).sqrt()

    bias = biases(orders)
    tenth = torch.arange(m) % JACKKNIFE
    left_out = torch.stack([biases([order[tenth[order] != i] for order in orders]) for i in range(JACKKNIFE)])

    def error(replicates: Tensor) -> Tensor:
        return ((JACKKNIFE - 1) * replicates.var(0, correction=0)).sqrt()

    noise, rows = norms(error(left_out)), []
    for i, size in enumerate(sizes):
        means, ess = zip(*(groups(size, order) for order in orders), strict=True)
        variance = torch.stack([values.var(1).mean(0) for values in means]).mean(0).tolist()
        rows.append(Size(size, bias[i].tolist(), variance, float(norms(bias)[i]), float(noise[i]), sum(ess) / len(ess)))
    used = [i for i, row in enumerate(rows) if row.ess >= HEALTHY_ESS and row.bias_norm > 2 * row.noise]
    slope = slope_error = None
    if len(used) >= FEWEST:
        x = np.log([sizes[i] for i in used])
        slope, *replicates = (float(np.polyfit(x, norms(one)[used].log().numpy(), 1)[0]) for one in (bias, *left_out))
        slope_error = float(error(torch.tensor(replicates, dtype=torch.float64)))
    pool_ess = Ess.of(ops.importance_weights(log_w).weights)
    return Curve(rows, slope, slope_error, [sizes[i] for i in used], pool_ess)


def run(data: DomainData) -> Convergence:
    pairs = data.held_out_pairs[: data.options.sizes.pool_prefixes]
    proposal = data.proposal_with(num_candidates=data.options.sizes.pool_candidates)
    pool = data.collected("pool", proposal, pairs, pairs, batch_size=1)
    return Convergence(
        len(pairs),
        compute(pool, data.energy.mu, SIZES),
        compute(pool, data.energy.mu, SIZES, "race"),
        # Its mu only; a draw's weights are normalised within its prefix, whatever the fit did.
        attempt(lambda: compute(pool, data.to_fit.fit_mu(data.ridge, "global"), SIZES)),
    )


# ---- what the report says -------------------------------------------------------------------------------------------


def section(result: Convergence) -> Section:
    curves, notes = {"the artefact's mu": result.artefact, "the same by the race": result.race}, []
    if isinstance(result.global_fit, NotDone):
        notes.append(f"The mu of a global fit: not done: {result.global_fit.reason}")
    else:
        curves["the mu of a global fit"] = result.global_fit
    sizes: list[Row] = [
        [name, str(size.m), f"{size.bias_norm:.5f}", f"{size.noise:.5f}", f"{size.mean_variance:.4f}",
         ess_cell(size.ess), "yes" if size.m in curve.used else ""]
        for name, curve in curves.items() for size in curve.sizes
    ]  # fmt: skip
    slopes: list[Row] = [
        [name, _slope(curve), ", ".join(map(str, curve.used)) or "none", ess_cell(curve.pool_ess.mean),
         ess_cell(curve.pool_ess.min), str(curve.pool_ess.candidates)]
        for name, curve in curves.items()
    ]  # fmt: skip
    return Section(
        "Bias and variance of the expected metrics by SIR, and by the race, against the number of candidates, in "
        "standard deviations of the candidates; the claim is a slope of -1 for SIR.",
        [
            Table(
                ["", "slope of the bias", "sizes used", "ESS of the pool", "least", "of candidates"],
                slopes,
                f"From pools of {result.prefixes} prefixes. The slope is that of log bias on log M, fitted to the "
                f"sizes whose ESS is at least {HEALTHY_ESS:g} and whose bias exceeds twice its noise. Where the ESS of "
                "a pool is a small share of it, the truth that biases are held against is uncertain.",
            ),
            Table(
                ["", "M", "bias", "noise of it", "variance", "ESS", "used"],
                sizes,
                "Bias: root mean square over metrics; variance: mean over them.",
            ),
        ],
        [page.svg(5 * len(curves), 4, partial(_draw, curves), "Bias and variance against M")],
        notes,
    )


def _slope(curve: Curve) -> Cell:
    count = f"{len(curve.used)} of the sizes serve"
    if curve.slope is None:
        return Cell("not resolved", count)
    return Cell(f"{curve.slope:.2f} ± {curve.slope_error:.2f}", f"only {count}" if len(curve.used) < ENOUGH else "")


def _draw(curves: dict[str, Curve], figure: Any) -> None:
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        m = [size.m for size in curve.sizes]
        axes.loglog(m, [size.bias_norm for size in curve.sizes], "o-", color="#2b6ca3", label="bias")
        axes.loglog(m, [size.noise for size in curve.sizes], ":", color="0.5", label="its noise")
        axes.loglog(m, [size.mean_variance for size in curve.sizes], "s-", color="#c44e52", label="variance")
        axes.set_title(f"{name}: slope of the bias {_slope(curve).text}", fontsize=10)
        axes.set_xlabel("M")
        axes.legend()
