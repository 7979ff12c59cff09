"""Reverse against forward KL: the same expectations, reached by the other projection (Ji et al. 2024, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from daemon_fast.errors import InfeasibleTargets
from daemon_fast.experiments import page
from daemon_fast.experiments.collected import Collected, Ess, Means
from daemon_fast.experiments.domain import DomainData
from daemon_fast.experiments.measures import weighted_mean
from daemon_fast.experiments.page import Row, Section, Table, ess_cell, number
from daemon_fast.fit.newton import GOOD_ENOUGH, damped_newton

HEADING = "Reverse against forward KL"


@dataclass(frozen=True)
class Projection:
    on: str  # "fit" or "held out", prefixes
    direction: str  # "reverse" (DAEMON) or "forward"
    means: Means
    distance: float
    interval: tuple[float, float]
    ess: float  # mean over prefixes
    largest_weight: float  # mean over prefixes


@dataclass(frozen=True)
class ForwardKL:
    names: list[str]
    multiplier: list[float]  # [K] λ of the forward projection
    rows: list[Projection]


def compute(to_fit: Collected, held_out: Collected) -> ForwardKL:
    """The other projection onto human expectations F, beside DAEMON's, on the same candidates and without a ridge.

    DAEMON minimises the mean over prefixes of KL(q_i || p_i) under mean_i E_{q_i} f = F, which gives
    q_ij ∝ p_ij exp(-mu · f_ij). The forward counterpart minimises the mean of KL(p_i || q_i) under the same
    constraint, and Σ_j q_ij = 1 in each prefix. With multipliers λ and ν_i, stationarity in q_ij reads
    p_ij / q_ij = ν_i + λ·(f_ij - F):

        q_ij = p_ij / (ν_i + λ·(f_ij - F)),    ν_i such that Σ_j q_ij = 1,
        λ maximises the concave  mean_i [Σ_j p_ij log(ν_i + λ·(f_ij - F)) - ν_i]

    the empirical likelihood of Owen (1988), here of N samples that share a mean. This is the right counterpart: it
    moves the same distribution to the same expectations, and only the direction of the divergence differs. Maximum
    likelihood of an exponential tilt on human text would not do: its solution *is* p_mu, as its gradient is
    F - E_mu f. Weights are normalised within each prefix, as the decoder's are and as mu is fitted.

    Forward KL must keep mass wherever p has some, and its weights fall only like 1/f where exp(-mu·f) falls
    exponentially: bad candidates keep more weight, and single ones can get a lot, as a denominator nears zero.

    Raises
    ------
    InfeasibleTargets, FitDidNotConverge
        The candidates of the fit cannot reach the human means.
    """
    k, mu = to_fit.fitted, to_fit.fit_mu(0.0, draw="sir")  # projections are compared, not draws
    centre = to_fit.human[:, :k].double().mean(0)
    scale = to_fit.features[..., :k].double().flatten(0, 1).std(0).clamp_min(1e-12)

    def standardized(collected: Collected) -> tuple[Tensor, Tensor]:
        prior = torch.full(collected.log_p.shape, 1 / collected.log_p.shape[1], dtype=torch.float64)
        if collected.base_log_w is not None:
            prior = collected.base_log_w.double().softmax(1)
        return (collected.features[..., :k].double() - centre) / scale, prior

    multiplier = forward_multiplier(*standardized(to_fit))
    rows = []
    for name, collected in (("fit", to_fit), ("held out", held_out)):
        for direction, weights in (
            ("reverse", collected.weights(mu)),
            ("forward", forward_weights(*standardized(collected), multiplier)),
        ):
            values = weighted_mean(collected.features, weights)
            distance, interval, ess = collected.distance(values), collected.interval(values), Ess.of(weights).mean
            means, largest = Means.of(values[:, :k]), float(weights.amax(1).mean())
            rows.append(Projection(name, direction, means, distance, interval, ess, largest))
    return ForwardKL(to_fit.fitted_names, (multiplier / scale).tolist(), rows)


def forward_weights(g: Tensor, prior: Tensor, multiplier: Tensor) -> Tensor:
    """[N, M] prior / (ν + λ·g), each row's ν such that it sums to 1; g [N, M, K] is f - F, prior [N, M]."""
    slack = g @ multiplier
    slack = slack - slack.amin(1, keepdim=True)  # so that ν is above 0, and at most 1
    low, high = torch.zeros(len(g), 1, dtype=torch.float64), torch.ones(len(g), 1, dtype=torch.float64)
    for _ in range(64):  # the sum falls as ν grows
        middle = (low + high) / 2
        too_large = (prior / (middle + slack)).sum(1, keepdim=True) > 1
        low, high = torch.where(too_large, middle, low), torch.where(too_large, high, middle)
    weights = prior / (high + slack)
    return weights / weights.sum(1, keepdim=True)


def forward_multiplier(g: Tensor, prior: Tensor) -> Tensor:
    """[K] λ at which the rows' mean expectation of g is 0: the minimum of minus the concave dual.

    Raises
    ------
    InfeasibleTargets
        0 lies outside the mean of the rows' convex hulls: no weights have these expectations.
    """

    def dual(multiplier: Tensor) -> tuple[float, Tensor, Tensor]:
        weights = forward_weights(g, prior, multiplier)
        inside = prior / weights  # ν + λ·g
        nu = inside[:, 0] - g[:, 0] @ multiplier
        value = ((prior * inside.log()).sum(1) - nu).mean()
        gradient = (weights[..., None] * g).sum(1).mean(0)
        curve = weights.square() / prior  # prior / (ν + λ·g)²; profiling ν out subtracts the mean under it
        centred = g - (curve[..., None] * g).sum(1, keepdim=True) / curve.sum(1)[:, None, None]
        return -float(value), -gradient, torch.einsum("nm,nmk,nml->kl", curve, centred, centred) / len(g)

    multiplier, steps, error = damped_newton(dual, torch.zeros(g.shape[2], dtype=torch.float64))
    if error > GOOD_ENOUGH:
        raise InfeasibleTargets(
            f"no forward-KL solution: after {steps} steps expectations are {error:.2g} standard deviations off, as the "
            "human means are at the edge of what the candidates can reach, or outside"
        )
    return multiplier


def run(data: DomainData) -> ForwardKL:
    return compute(data.to_fit, data.held_out)


def section(result: ForwardKL) -> Section:
    rows: list[Row] = [
        [row.on, row.direction, *page.means(result.names, row.means),
         page.distance(row.distance, row.interval), ess_cell(row.ess), number(row.largest_weight)]
        for row in result.rows
    ]  # fmt: skip
    return Section(
        "The same expectations, reached by minimising KL(q || p) (reverse: DAEMON) or KL(p || q) (forward), both "
        "without a ridge.",
        [
            Table(
                ["prefixes", "KL", *result.names, "distance", "ESS", "largest weight"],
                rows,
                "Means x100 (not ent and nats) ± standard error. ESS and largest weight are means over prefixes; on "
                "those of the fit, distance is to the texts that gave its targets.",
            )
        ],
    )
