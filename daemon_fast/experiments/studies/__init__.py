"""The paper's experiments (Ji et al. 2024, section 4), one module each.

`compute` is a function of tensors, `run` gives it what is drawn for a domain, and `section` says what it found. A new
study is a module with these and a heading, and its place in `STUDIES`.
"""

from __future__ import annotations

from typing import Any, Protocol

from daemon_fast.experiments.domain import DomainData
from daemon_fast.experiments.page import Section
from daemon_fast.experiments.studies import (
    ablation,
    alignment,
    convergence,
    forward_kl,
    one_metric,
    perplexity,
    tail,
    temperatures,
    transfer,
)

__all__ = ["STUDIES", "Study"]


class Study(Protocol):
    """A module.

    `run` returns a frozen dataclass of plain numbers, what report.json holds of the study; or `NotDone`. Where it
    raises a `FitError`, that is the study's answer.
    """

    HEADING: str

    def run(self, data: DomainData) -> Any: ...

    def section(self, result: Any) -> Section: ...


# In the order of the report.
STUDIES: dict[str, Study] = {
    "alignment": alignment,
    "perplexity": perplexity,
    "convergence": convergence,
    "one_metric": one_metric,
    "temperatures": temperatures,
    "ablation": ablation,
    "forward_kl": forward_kl,
    "tail": tail,
    "transfer": transfer,
}
