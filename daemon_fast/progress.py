"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

__all__ = ["progress"]

SECONDS_BETWEEN_LINES = 10.0


class _Log:
    """Standard error for tqdm, where it is no terminal: without its carriage returns, which make one endless line."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    disable: bool = False,
    delay: float = 0.0,
) -> Any:
    """A tqdm bar on standard error: count, total, rate and time left.

    Where standard error is no terminal, it is a line at the start, one every ten seconds, and one at the end. The
    environment variable TQDM_DISABLE=1 turns all of them off.

    Parameters
    ----------
    iterable : to go through; None: call `update(n)` on the bar
    total : how many there are; default: the length of `iterable`
    initial : how many an earlier run has done
    delay : seconds before anything is shown
    """
    # Read at each call: tqdm itself reads it once, when it is imported.
    disable = disable or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    in_log = (
        {}
        if sys.stderr.isatty()
        else {"file": _Log(), "ncols": 100, "ascii": True, "mininterval": SECONDS_BETWEEN_LINES}
    )
    return tqdm(iterable, desc=desc, unit=unit, total=total, initial=initial, disable=disable, delay=delay, **in_log)
