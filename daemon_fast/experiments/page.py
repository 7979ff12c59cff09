"""Pieces of a report (tables, figures, sections), and the page of them: one HTML file that loads nothing."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from daemon_fast.decode import LOW_ESS
from daemon_fast.errors import require
from daemon_fast.experiments.collected import Means

__all__ = [
    "COLOURS", "LABELS", "Cell", "Chapter", "Figure", "Row", "Section", "Table", "distance", "ess_cell", "means",
    "new_figure", "number", "perplexity_cell", "render", "svg",
]  # fmt: skip

COLOURS = {"sampling": "#c44e52", "daemon": "#2b6ca3", "human": "0.2", "refitted": "#2b6ca3", "reused": "#8172b3"}
LABELS = {"sampling": "plain sampling", "daemon": "DAEMON"}


@dataclass(frozen=True)
class Cell:
    """Of a table.

    Attributes
    ----------
    text : the figure
    flag : why it means little; said beside it
    marked : it stands out
    """

    text: str
    flag: str = ""
    marked: bool = False

    def __str__(self) -> str:
        return self.text + "*" * self.marked + (f" ({self.flag})" if self.flag else "")


Row = list[str | Cell]


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of which names its row."""

    head: Sequence[str | Cell]
    rows: Sequence[Row]
    caption: str

    @property
    def lines(self) -> list[list[Cell]]:
        """The head, and the rows."""
        return [[x if isinstance(x, Cell) else Cell(x) for x in line] for line in (self.head, *self.rows)]

    def text(self, transposed: bool = False) -> str:
        """For a terminal: columns become rows where `transposed`."""
        lines = [list(map(str, line)) for line in self.lines]
        if transposed:
            lines = [list(column) for column in zip(*lines, strict=True)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


@dataclass(frozen=True)
class Figure:
    svg: str
    alt: str


@dataclass(frozen=True)
class Section:
    """What a study has to say.

    Attributes
    ----------
    intro : what is asked, and how it is measured
    notes : what stands below tables and figures
    verdict : sentences for the head of the report
    """

    intro: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    verdict: Sequence[str] = ()


@dataclass(frozen=True)
class Chapter:
    """A domain."""

    name: str
    summary: str
    verdict: Sequence[str]
    sections: Sequence[tuple[str, Section]]  # heading and section of each study


def render(title: str, facts: Mapping[str, Any], chapters: Sequence[Chapter]) -> str:
    """The page; the same pieces give the same text."""
    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html.j2")
    return page.render(title=title, facts=facts, chapters=chapters)


# ---- cells ----------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 3) -> str:
    if math.isfinite(value):
        return f"{value:.{digits}f}"
    return "unknown" if math.isnan(value) else "infinite"


def distance(value: float, interval: tuple[float, float]) -> str:
    """With its 95% interval."""
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def means(names: Sequence[str], found: Means) -> list[str]:
    """With standard errors, x100; but `ent` and `nats`, which are no fractions."""
    scales = [1 if name in ("ent", "nats") else 100 for name in names]
    parts = zip(scales, found.mean, found.standard_error, strict=True)
    return [f"{scale * mean:.2f} ± {number(scale * error, 2)}" for scale, mean, error in parts]


def ess_cell(ess: float) -> Cell:
    return Cell(f"{ess:.1f}", "next to no choice" if ess < LOW_ESS else "")


def perplexity_cell(perplexity: float | None, ess: float | None = None) -> Cell:
    """With the effective sample size that its log Z comes from, if it has one. None: undefined."""
    if perplexity is None:
        return Cell("undefined")
    flag = ""
    if perplexity < 1:
        flag = "means nothing: below 1"
    elif ess is not None and ess < LOW_ESS:
        flag = f"means nothing: log Z of an ESS of {ess:.1f}"
    return Cell(number(perplexity), flag)


# ---- figures --------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Any:
    """Of matplotlib, without its global state.

    Raises
    ------
    MissingPackage
        matplotlib is not installed.
    """
    figure = require("matplotlib.figure", "figures need", "'daemon-fast[plot]'").Figure
    return figure(figsize=(width, height), dpi=130, layout="constrained")


def svg(width: float, height: float, draw: Callable[[Any], None], alt: str) -> Figure:
    """What `draw` puts on a figure of matplotlib; the same drawing gives the same bytes."""
    figure = new_figure(width, height)
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": alt, "svg.fonttype": "path"}):
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn = buffer.getvalue()
    return Figure(drawn[drawn.index("<svg") :], alt)
