"""What each metric does: fits that leave one out, and fits of one alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from daemon_fast.experiments import page
from daemon_fast.experiments.collected import Collected, NotDone, attempt
from daemon_fast.experiments.domain import DomainData
from daemon_fast.experiments.page import Cell, Row, Section, Table

HEADING = "Leaving a metric out, and one alone"


@dataclass(frozen=True)
class Fitted:
    """By a mu of some of the metrics."""

    metric: str | None  # which is left out, or which is alone; None: all are fitted
    shift: list[float]  # [K] mean minus human mean, in standard deviations of human text
    shift_error: list[float]  # [K] standard errors over prefixes
    distance: float
    interval: tuple[float, float]
    rise: float  # of the squared distance, over that of all metrics together
    rise_error: float  # standard error over prefixes, which are the same in both


@dataclass(frozen=True)
class Ablation:
    names: list[str]
    rows: list[Fitted]  # of all metrics, and without each
    alone: list[Fitted | NotDone]  # [K] of each metric


def compute(to_fit: Collected, held_out: Collected, ridge: float = 0.0) -> Ablation:
    """Fit all metrics, all but one, and one alone; how far all then lie from human text on held-out prefixes.

    Errors are those of held-out prefixes, for a given mu. That of the squared distance is by the delta method: a prefix
    adds 2 gap · (its own gap - gap) / K to it, so that noise which two fits share cancels in a rise.

    Parameters
    ----------
    ridge : of the fits; see `daemon_fast.fit`
    """
    k, n, names = to_fit.fitted, len(held_out.human), to_fit.fitted_names

    def expected(kept: Sequence[int]) -> Tensor:
        """[N, K'] by a fit of some of the metrics."""
        mu = torch.zeros(k, dtype=torch.float64)
        mu[list(kept)] = to_fit.columns(kept).fit_mu(ridge)
        return held_out.expected(mu)

    def added(values: Tensor) -> tuple[Tensor, Tensor]:
        """Gaps [N, K] to human text, in standard deviations, and what each prefix adds to their square [N]."""
        gaps = ((values - held_out.human.double()) / held_out.spread)[:, :k]
        return gaps, 2 * (gaps - gaps.mean(0)) @ gaps.mean(0) / k

    all_of_them = expected(range(k))

    def fitted(metric: str | None, values: Tensor) -> Fitted:
        gaps, adds = added(values)
        distance = held_out.distance(values)
        return Fitted(
            metric=metric,
            shift=gaps.mean(0).tolist(),
            shift_error=(gaps.std(0) / math.sqrt(n)).tolist(),
            distance=distance,
            interval=held_out.interval(values),
            rise=distance**2 - held_out.distance(all_of_them) ** 2,
            rise_error=float((adds - added(all_of_them)[1]).std()) / math.sqrt(n),
        )

    def alone(i: int) -> Fitted:
        return fitted(names[i], expected([i]))

    without = [fitted(names[i], expected([j for j in range(k) if j != i])) for i in range(k)]
    return Ablation(names, [fitted(None, all_of_them), *without], [attempt(partial(alone, i)) for i in range(k)])


def run(data: DomainData) -> Ablation | NotDone:
    if len(data.energy.names) == 1:
        return NotDone("the artefact has a single metric.")
    return compute(data.to_fit, data.held_out, data.ridge)


def section(result: Ablation) -> Section:
    rows, notes = [_row("nothing", result.rows[0], result.names)], []
    rows += [_row(str(row.metric), row, result.names) for row in result.rows[1:]]
    alone: list[Row] = []
    for name, one in zip(result.names, result.alone, strict=True):
        if isinstance(one, NotDone):
            notes.append(f"{name} alone: not done: {one.reason}")
        else:
            alone.append(_row(name, one, result.names))
    caption = (
        "Expected metrics of held-out prefixes minus human means, in standard deviations of human text, ± standard "
        "error; distances with 95% intervals. The last column is how much more the squared distance is than with all "
        "metrics; as both are of the same prefixes, most of their noise cancels. The noise of the fits is in no error."
    )
    head = [*result.names, "distance", "rise of its square"]
    return Section(
        "What drifts when the fit does without one metric (marked), and what a fit of one metric alone (marked) does.",
        [Table(["left out", *head], rows, caption), Table(["alone", *head], alone, "The same with one metric alone.")],
        notes=notes,
    )


def _row(label: str, found: Fitted, names: list[str]) -> Row:
    shifts = zip(names, found.shift, found.shift_error, strict=True)
    return [
        label,
        *(Cell(f"{shift:+.3f} ± {error:.3f}", marked=name == found.metric) for name, shift, error in shifts),
        page.distance(found.distance, found.interval),
        "-" if found.metric is None else f"{found.rise:+.4f} ± {found.rise_error:.4f}",
    ]
