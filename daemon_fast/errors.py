"""Exceptions and warnings: every error that the library raises on purpose is a `DaemonFastError`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from types import TracebackType
from typing import Any

__all__ = [
    "ArtefactError",
    "ConstantMetric",
    "DaemonFastError",
    "DataError",
    "DeviceUnavailable",
    "EngineError",
    "FitDidNotConverge",
    "FitError",
    "InfeasibleTargets",
    "InvalidInput",
    "LowEffectiveSampleSize",
    "MissingPackage",
    "ModelUnavailable",
    "Problems",
    "SeveralProblems",
    "TargetsNotMet",
    "UnboundedTilt",
    "Undefined",
    "UnknownMetric",
    "require",
    "some_of",
]


class DaemonFastError(Exception):
    """Base of the library's exceptions. The CLI prints its message and exits with code 2."""


class InvalidInput(DaemonFastError, ValueError):
    """An argument is out of range, of the wrong shape or inconsistent with another."""


class SeveralProblems(InvalidInput):
    """More than one thing is wrong: a line each.

    Attributes
    ----------
    problems : tuple of DaemonFastError
    """

    def __init__(self, *problems: DaemonFastError) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class UnknownMetric(InvalidInput):
    """A metric name is neither built in nor among the user's own."""


class DataError(DaemonFastError, ValueError):
    """A text file is unreadable, empty, malformed, or holds no usable prefix."""


class ModelUnavailable(DaemonFastError, OSError):
    """A language model, tokenizer or sentence encoder can't be loaded."""


class MissingPackage(DaemonFastError, ImportError):
    """An optional package is not installed. Says what it is for and how to install it."""


class DeviceUnavailable(DaemonFastError, RuntimeError):
    """A device was asked for that this machine, or this torch, doesn't have."""


class EngineError(DaemonFastError, RuntimeError):
    """An engine that draws candidates can't be reached, refuses the work, or answers what makes no sense."""


class ArtefactError(DaemonFastError, ValueError):
    """A fitted artefact is unreadable, malformed, or fitted for another model. Names the field."""


class FitError(DaemonFastError):
    """A fit has no answer: the targets are out of reach, or it did not converge."""


class InfeasibleTargets(FitError, ValueError):
    """No weighting of the candidates reaches the target means: the fit has no solution (see `fit`)."""


class ConstantMetric(InvalidInput, FitError):
    """A metric that all candidates of a prefix have alike: no weighting of them can change its mean."""


class FitDidNotConverge(FitError, RuntimeError):
    """The fit neither reached its tolerance nor proved the targets infeasible."""


class Undefined(DaemonFastError):
    """A figure that was asked for is not defined for what was drawn: a standard deviation of one text, a log of 0."""


class LowEffectiveSampleSize(UserWarning):
    """A few candidates carry nearly all the weight, so that the draw has little to choose from."""


class TargetsNotMet(UserWarning):
    """A fit ended where expected metrics are not those of human text, or without some of its metrics."""


class UnboundedTilt(UserWarning):
    """exp(-mu · f) grows without bound, so that the exact p_mu may not exist."""


def some_of(problems: Sequence[str]) -> str:
    """The first of many, on one line."""
    return "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")


class Problems:
    """Collects what is wrong with several arguments, so that a user learns all of it at once.

    Attributes
    ----------
    found : list of DaemonFastError

    Examples
    --------
    >>> problems = Problems()
    >>> with problems:
    ...     raise InvalidInput("seed = -1 is below 0")
    >>> with problems:
    ...     raise UnknownMetric("no metric is called 'rouge'")
    >>> problems.report()
    Traceback (most recent call last):
    daemon_fast.errors.SeveralProblems: seed = -1 is below 0
    no metric is called 'rouge'
    """

    def __init__(self, found: Iterable[DaemonFastError] = ()) -> None:
        self.found = list(found)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, DaemonFastError):
            return False
        told = set(map(str, self.found))
        problems = error.problems if isinstance(error, SeveralProblems) else [error]
        self.found += [problem for problem in problems if str(problem) not in told]
        return True

    def report(self) -> None:
        """Raise the problem, or `SeveralProblems`; nothing if there are none."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise SeveralProblems(*self.found)


def require(module: str, purpose: str, install: str) -> Any:
    """Import a module of an optional package.

    Parameters
    ----------
    module : such as "pyarrow.parquet"
    purpose : what needs it, with its verb: "Parquet files need"
    install : what to give to pip: "'daemon-fast[parquet]'"

    Raises
    ------
    MissingPackage
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        why = "" if isinstance(error, ModuleNotFoundError) else f" (which can't be imported: {error})"
        raise MissingPackage(f"{purpose} the package {package}{why}: pip install {install}") from error
