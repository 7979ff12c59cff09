"""Exceptions and warnings: every error that the library raises on purpose is a `DaemonFastError`."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "ArtefactError",
    "DaemonFastError",
    "DataError",
    "DeviceUnavailable",
    "EngineError",
    "FitDidNotConverge",
    "InfeasibleTargets",
    "InvalidInput",
    "LowEffectiveSampleSize",
    "ModelUnavailable",
    "UnknownMetric",
    "writing",
]


class DaemonFastError(Exception):
    """Base of the library's exceptions. The CLI prints its message as one line and exits with code 2."""


class InvalidInput(DaemonFastError, ValueError):
    """An argument is out of range, of the wrong shape or inconsistent with another."""


class UnknownMetric(InvalidInput):
    """A metric name is neither built in nor among the user's own."""


class DataError(DaemonFastError, ValueError):
    """A text file is unreadable, empty, malformed, or holds no usable prefix."""


class ModelUnavailable(DaemonFastError, OSError):
    """A language model, tokenizer or sentence encoder can't be loaded."""


class DeviceUnavailable(DaemonFastError, RuntimeError):
    """A device was asked for that this machine, or this torch, doesn't have."""


class EngineError(DaemonFastError, RuntimeError):
    """An engine that draws candidates can't be reached, refuses the work, or answers what makes no sense."""


class ArtefactError(DaemonFastError, ValueError):
    """A fitted artefact is unreadable, malformed, or fitted for another model. Names the field."""


class InfeasibleTargets(DaemonFastError, ValueError):
    """No weighting of the candidates reaches the target means: the fit has no solution (see `fit`)."""


class FitDidNotConverge(DaemonFastError, RuntimeError):
    """The fit neither reached its tolerance nor proved the targets infeasible."""


class LowEffectiveSampleSize(UserWarning):
    """A few candidates carry nearly all the weight, so that the draw has little to choose from."""


@contextmanager
def writing(path: str | os.PathLike[str], kept: str = "") -> Iterator[None]:
    """Turns what the system says of a file that can't be written into a DataError; `kept` tells what is not lost."""
    try:
        yield
    except OSError as error:
        full = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        after = f"; {kept}, and the same command goes on from there" if kept else ""
        raise DataError(f"{os.fspath(path)} can't be written: {full}{after}") from error
