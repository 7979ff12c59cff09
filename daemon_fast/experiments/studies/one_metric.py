"""Does a single coefficient bring repetition to the human level, without cost in perplexity?"""

from __future__ import annotations

from dataclasses import dataclass

from daemon_fast.errors import InvalidInput
from daemon_fast.experiments import page
from daemon_fast.experiments.collected import Collected, Means, NotDone, attempt
from daemon_fast.experiments.domain import DomainData
from daemon_fast.experiments.page import Row, Section, Table
from daemon_fast.experiments.studies import perplexity

HEADING = "One metric alone"
METRIC = "sr_4"


@dataclass(frozen=True)
class OneMetric:
    """Means of one metric on held-out prefixes, and the perplexity of human text."""

    metric: str
    mu: float
    human: Means
    sampling: Means
    daemon: Means
    perplexity: perplexity.Perplexity | NotDone


def compute(to_fit: Collected, held_out: Collected, name: str = METRIC, ridge: float = 0.0) -> OneMetric:
    """Fit a single metric: what becomes of it on held-out prefixes, and of the perplexity of human text.

    Parameters
    ----------
    ridge : of this fit; see `daemon_fast.fit`

    Raises
    ------
    InvalidInput
        The metric was not collected.
    """
    if name not in to_fit.fitted_names:
        raise InvalidInput(f"metric {name!r} was not collected; there are {', '.join(to_fit.fitted_names)}")
    k = to_fit.names.index(name)
    mu, held = to_fit.columns([k]).fit_mu(ridge), held_out.columns([k])
    return OneMetric(
        metric=name,
        mu=float(mu),
        human=Means.of(held.human),
        sampling=Means.of(held.expected()),
        daemon=Means.of(held.expected(mu)),
        perplexity=attempt(lambda: perplexity.compute(held, mu)),
    )


def run(data: DomainData) -> OneMetric | NotDone:
    if METRIC not in data.energy.names:
        return NotDone(f"the artefact has no {METRIC}.")
    return compute(data.to_fit, data.held_out, ridge=data.ridge)


def section(result: OneMetric) -> Section:
    name = result.metric
    found = {"human": result.human, "plain sampling": result.sampling, "DAEMON": result.daemon}
    rows: list[Row] = [[who, *page.means([name], means)] for who, means in found.items()]
    caption, notes = f"Mean x100 ± standard error, held-out prefixes. mu = {result.mu:.4g}.", []
    tables = [Table(["", name], rows, caption)]
    if isinstance(result.perplexity, NotDone):
        notes.append(f"Perplexity: not done: {result.perplexity.reason}")
    else:
        tables.append(perplexity.table(result.perplexity))
    return Section(
        f"A fit of {name} only, as in the paper: does it reach the human level, and at what cost?", tables, notes=notes
    )
