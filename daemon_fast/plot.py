"""Figures, by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from daemon_fast.errors import DataError

__all__ = ["plot_alignment", "plot_latency"]

LABELS = {"sampling": "plain sampling", "daemon": "DAEMON"}
COLOURS = {"sampling": "#c44e52", "daemon": "#2b6ca3"}


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("the figure needs matplotlib: pip install 'daemon-fast[plot]'") from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def plot_alignment(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """How far each method's expected metrics lie from human text, as a PNG.

    Parameters
    ----------
    report : what the demo computes and writes to results.json

    Raises
    ------
    DataError
        matplotlib is not installed.
    """
    names, floor = report["metrics"], report["noise floor"]
    rows = range(len(names))
    figure = new_figure(8, 0.5 * len(names) + 2)
    axes = figure.subplots()
    axes.axvspan(-floor, floor, color="0.9", label=f"noise floor: ±1/√{report['held-out prefixes']} = ±{floor:.2f}")
    axes.axvline(0, color="0.3", linewidth=1)
    for offset, method in ((-0.13, "sampling"), (0.13, "daemon")):
        spread = report["human standard deviation"]
        shift = [(report["mean"][method][k] - report["mean"]["human"][k]) / spread[k] for k in rows]
        bars = [report["standard error"][method][k] / spread[k] for k in rows]
        distance = report["distance to human"][method]
        axes.errorbar(
            shift, [k + offset for k in rows], xerr=bars, fmt="o", capsize=3, color=COLOURS[method],
            label=f"{LABELS[method]}: distance {distance:.2f}",
        )  # fmt: skip
    axes.set_yticks(list(rows), names)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.85")
    axes.set_axisbelow(True)
    axes.set_xlabel("expected metric minus human mean, in standard deviations of human text (bars: standard error)")
    axes.set_title(
        f"Alignment with human text on {report['held-out prefixes']} held-out prefixes, "
        f"M = {report['candidates per prefix']} candidates"
    )
    axes.legend(loc="best", frameon=True)
    figure.savefig(path)


METHODS = {
    "b": ("M sequences by generate", "#c44e52", "s-"),
    "d": ("DAEMON: M candidates, one chosen", "#2b6ca3", "o-"),
    "a": ("1 sequence by generate", "0.45", "--"),
}


def plot_latency(cells: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], device: str) -> None:
    """Seconds of a whole call against M, a panel per model and lengths, as a PNG.

    Parameters
    ----------
    cells : what benchmarks/latency.py measures
    device : named in the title

    Raises
    ------
    DataError
        matplotlib is not installed.
    """
    panels = sorted({(c["model"], c["prefix"], c["new"]) for c in cells})
    figure = new_figure(3.2 * len(panels), 3.6)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        own = sorted((c for c in cells if (c["model"], c["prefix"], c["new"]) == panel), key=lambda c: c["m"])
        for method, (label, colour, style) in METHODS.items():
            seconds = [c["seconds"][method] for c in own]
            axes.plot([c["m"] for c in own], seconds, style, color=colour, label=label)
        axes.set_title(f"prefix {panel[1]}, {panel[2]} new tokens", fontsize=10)
        axes.set_xlabel("M")
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
    figure.axes[0].set_ylabel("seconds a call")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(f"{', '.join(sorted({p[0] for p in panels}))} on {device}", fontsize=10)
    figure.savefig(path)
