"""What each metric does: fits that leave one out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from daemon_fast.experiments.collected import Collected, NotDone
from daemon_fast.experiments.domain import DomainData
from daemon_fast.experiments.page import Cell, Row, Section, Table, number

HEADING = "Leaving a metric out"


@dataclass(frozen=True)
class LeftOut:
    metric: str | None  # None: nothing is left out
    shift: list[float]  # [K] mean minus human mean, in standard deviations of human text
    distance: float


@dataclass(frozen=True)
class Ablation:
    names: list[str]
    rows: list[LeftOut]


def compute(to_fit: Collected, held_out: Collected, ridge: float = 0.0) -> Ablation:
    """Leave each metric out of the fit; how far all of them then lie from human text on held-out prefixes.

    Parameters
    ----------
    ridge : of the fits; see `daemon_fast.fit`
    """
    k, rows = to_fit.fitted, []
    for left_out in (None, *range(k)):
        kept = [i for i in range(k) if i != left_out]
        mu = torch.zeros(k, dtype=torch.float64)
        mu[kept] = to_fit.columns(kept).fit_mu(ridge)
        values = held_out.expected(mu)
        shift = ((values.mean(0) - held_out.human.double().mean(0)) / held_out.spread)[:k]
        name = None if left_out is None else to_fit.names[left_out]
        rows.append(LeftOut(name, shift.tolist(), held_out.distance(values)))
    return Ablation(to_fit.fitted_names, rows)


def run(data: DomainData) -> Ablation | NotDone:
    if len(data.energy.names) == 1:
        return NotDone("the artefact has a single metric.")
    return compute(data.to_fit, data.held_out, data.ridge)


def section(result: Ablation) -> Section:
    rows: list[Row] = [
        [row.metric or "nothing",
         *(Cell(f"{shift:+.3f}", marked=name == row.metric)
           for name, shift in zip(result.names, row.shift, strict=True)),
         number(row.distance)]
        for row in result.rows
    ]  # fmt: skip
    caption = "Expected metrics of held-out prefixes minus human means, in standard deviations of human text."
    return Section(
        "What drifts when the fit does without one metric (marked).",
        [Table(["left out", *result.names, "distance"], rows, caption)],
    )
