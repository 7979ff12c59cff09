"""Does a mu fitted on one domain serve on another?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from daemon_fast.experiments import page
from daemon_fast.experiments.collected import Collected, Ess, NotDone
from daemon_fast.experiments.domain import DomainData
from daemon_fast.experiments.measures import noise_floor
from daemon_fast.experiments.page import Row, Section, Table, ess_cell

HEADING = "Transfer"


@dataclass(frozen=True)
class Used:
    fitted_on: str
    distance: float
    interval: tuple[float, float]
    ess: float


@dataclass(frozen=True)
class Transfer:
    """Of this domain's held-out prefixes: by the mu of each domain, this one's among them, and by plain sampling."""

    noise_floor: float
    sampling: float
    sampling_interval: tuple[float, float]
    rows: list[Used]


def compute(held_out: Collected, mu: Mapping[str, Tensor]) -> Transfer:
    """Distance to human text in expectation, by each mu [K] of those given by the domain that they were fitted on."""
    plain, tilted = held_out.expected(), {name: held_out.expected(one) for name, one in mu.items()}
    return Transfer(
        noise_floor(len(held_out.human)),
        held_out.distance(plain),
        held_out.interval(plain),
        [
            Used(name, held_out.distance(values), held_out.interval(values), Ess.of(held_out.weights(mu[name])).mean)
            for name, values in tilted.items()
        ],
    )


def run(data: DomainData) -> Transfer | NotDone:
    same = {name: energy.mu for name, energy in data.energies.items() if energy.names == data.energy.names}
    if len(same) == 1:
        return NotDone("no other domain was given that has the same metrics.")
    return compute(data.held_out, same)


def section(result: Transfer) -> Section:
    rows: list[Row] = [
        [row.fitted_on, page.distance(row.distance, row.interval), ess_cell(row.ess)] for row in result.rows
    ]
    rows.append(["plain sampling", page.distance(result.sampling, result.sampling_interval), "-"])
    return Section(
        "The mu of each domain, used on the held-out prefixes of this one.",
        [
            Table(
                ["mu fitted on", "distance", "ESS"],
                rows,
                f"In expectation, with 95% intervals. Noise floor {result.noise_floor:.3f}.",
            )
        ],
    )
