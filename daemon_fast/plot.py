"""Figures, by matplotlib."""

from __future__ import annotations

import os
from typing import Any

from daemon_fast.errors import DataError

__all__ = ["plot_alignment"]

LABELS = {"sampling": "plain sampling", "daemon": "DAEMON"}
COLOURS = {"sampling": "#c44e52", "daemon": "#2b6ca3"}


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("the figure needs matplotlib: pip install 'daemon-fast[plot]'") from error

    names, floor = report["metrics"], report["noise floor"]
    rows = range(len(names))
    figure = Figure(figsize=(8, 0.5 * len(names) + 2), dpi=130, layout="constrained")
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
