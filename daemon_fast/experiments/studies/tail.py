"""Is the region of low probability the poor one?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from daemon_fast.experiments import page
from daemon_fast.experiments.collected import Collected, Means
from daemon_fast.experiments.domain import DomainData
from daemon_fast.experiments.page import Row, Section, Table

HEADING = "The tail"


@dataclass(frozen=True)
class Bin:
    """Candidates whose log p_theta a token is from `low` to `high`."""

    low: float
    high: float
    count: int
    means: Means


@dataclass(frozen=True)
class Tail:
    names: list[str]
    bins: list[Bin]


def compute(held_out: Collected, bins: int = 8) -> Tail:
    """Candidates in bins of equal number by log p_theta a token, least probable first: metrics of each bin."""
    per_token = (held_out.log_p.double() / held_out.lengths.clamp_min(1)).flatten()
    features = held_out.features[..., : held_out.fitted].reshape(len(per_token), -1)
    parts = per_token.argsort().tensor_split(max(1, min(bins, len(per_token) // 2)))  # one has no standard error
    return Tail(
        held_out.fitted_names,
        [
            Bin(float(per_token[part].min()), float(per_token[part].max()), len(part), Means.of(features[part]))
            for part in parts
        ],
    )


def run(data: DomainData) -> Tail:
    return compute(data.held_out)


def section(result: Tail) -> Section:
    rows: list[Row] = [
        [f"{one.low:.2f} to {one.high:.2f}", str(one.count),
         *page.means(result.names, one.means)]
        for one in result.bins
    ]  # fmt: skip
    wide = min(len(result.names), 5)
    high = -(-len(result.names) // wide)
    return Section(
        "Candidates of held-out prefixes in bins of equal number, by log p_theta a token.",
        [Table(["log p a token", "candidates", *result.names], rows, "Means x100 (not ent, nats) ± standard error.")],
        [page.svg(2.2 * wide, 1.9 * high, partial(_draw, result, high, wide), "Metrics by probability")],
    )


def _draw(result: Tail, high: int, wide: int, figure: Any) -> None:
    x = [(one.low + one.high) / 2 for one in result.bins]
    for k, name in enumerate(result.names):
        axes, scale = figure.add_subplot(high, wide, k + 1), 1 if name in ("ent", "nats") else 100
        means = [scale * one.means.mean[k] for one in result.bins]
        errors = [scale * one.means.standard_error[k] for one in result.bins]
        axes.errorbar(x, means, yerr=errors, fmt="o-", color="#2b6ca3", markersize=3)
        axes.set_title(name.replace("$", r"\$"), fontsize=9)  # a name is not mathematics
        axes.tick_params(labelsize=7)
