"""The fitted artefact: metrics, mu, and what they hold for, as one human-readable JSON file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from daemon_fast import metrics as metrics_module
from daemon_fast.arguments import one_of, real_tensor
from daemon_fast.errors import ArtefactError, InvalidInput
from daemon_fast.files import write_text, writing
from daemon_fast.metrics import Function, Metric
from daemon_fast.ops import Draw, Normalization
from daemon_fast.proposals.base import ProposalSettings
from daemon_fast.proposals.candidates import Candidates

__all__ = ["Base", "Diagnostics", "Energy", "weightless"]

SCHEMA = 2
Base = Literal["proposal", "model"]


@dataclass(frozen=True)
class Diagnostics:
    """What the fit found out about itself; see `FitResult` for what each means."""

    ridge: float
    residual: list[float]  # [K]
    scale: list[float]  # [K]
    confidence_interval: list[list[float]] | None  # [2, K]
    ess_mean: float
    ess_min: float
    kl: float
    condition_number: float | None  # None: infinite
    iterations: int
    converged: bool
    num_prefixes: int
    num_targets: int
    seed: int
    unmet: list[str] | None = (
        None  # metrics, also those that were left out; None: an artefact from before this was kept
    )


@dataclass(frozen=True)
class Energy:
    """E(x) = mu · f(x), fitted: what a decoder needs.

    Attributes
    ----------
    metrics : list of Metric
    mu : [K] float64
    targets : [K] float64
        The human means that it was fitted to.
    proposal_settings : ProposalSettings
        How the candidates it was fitted on were drawn.
    normalization : "per_prefix" or "global"
    draw : "race" or "sir"
        The rule that chooses among candidates, under which mu was fitted: `race_select` or `sir_select`.
    base : "proposal" or "model"
        What is tilted: the proposal itself (base log-weights 0, as in the paper) or p_theta (log p - log q).
    chat_template : str or None
        Fingerprint of the template that made its prompts from chats; None: it was fitted to prompts that are texts.
    diagnostics : Diagnostics or None
        Of the fit.
    """

    metrics: Sequence[Metric]
    mu: Tensor
    targets: Tensor
    proposal_settings: ProposalSettings
    normalization: Normalization = "per_prefix"
    draw: Draw = "sir"
    base: Base = "proposal"
    chat_template: str | None = None
    diagnostics: Diagnostics | None = None

    def __post_init__(self) -> None:
        for name, options in (("normalization", Normalization), ("draw", Draw), ("base", Base)):
            one_of(name, getattr(self, name), get_args(options))
        k = len(self.names)
        for name in ("mu", "targets"):
            value = real_tensor(f"{name} is", getattr(self, name)).double()
            object.__setattr__(self, name, value)
            if value.shape != (k,) or not value.isfinite().all():
                raise InvalidInput(f"{name} must be {k} finite numbers, one per metric, got {value.tolist()}")

    @property
    def names(self) -> list[str]:
        """K metric names."""
        return metrics_module.column_names(self.metrics)

    def features(self, candidates: Candidates) -> Tensor:
        """[N, M, K] metrics of the candidates, float32 or float64: see `metrics.features`."""
        return metrics_module.features(self.metrics, candidates)

    def base_log_w(self, candidates: Candidates) -> Tensor | None:
        """[N, M] float64 base log-weights; None where all are 0.

        Raises
        ------
        InvalidInput
            A prefix that they leave without weights.
        """
        if self.base == "proposal":
            return None
        base = candidates.log_p - candidates.log_q
        if (problem := weightless(base, per_prefix=True)) is not None:
            raise InvalidInput(problem)
        return base

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artefact; the file appears whole or not at all.

        Raises
        ------
        DataError
            It can't be written.
        """
        document = {
            "schema": SCHEMA,
            "library": f"daemon-fast {importlib.metadata.version('daemon-fast')}",
            "metrics": [metric.spec for metric in self.metrics],
            "columns": self.names,
            "targets": self.targets.tolist(),
            "mu": self.mu.tolist(),
            "normalization": self.normalization,
            "draw": self.draw,
            "base": self.base,
            "chat_template": self.chat_template,
            "proposal_settings": self.proposal_settings.to_json(),
            "diagnostics": None if self.diagnostics is None else dataclasses.asdict(self.diagnostics),
        }
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        with writing(f"artefact {os.fspath(path)}"):
            write_text(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str], metrics: Iterable[Metric | Function] = ()) -> Energy:
        """Read an artefact.

        Parameters
        ----------
        path : file written by `save`
        metrics : your own, objects or plain functions, and `coh` with an encoder object, if the artefact uses them

        Raises
        ------
        ArtefactError
            Says which field is missing, unknown, of the wrong type or size, or not finite.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtefactError(f"artefact {os.fspath(path)} can't be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ArtefactError(f"artefact {os.fspath(path)} is not JSON: {error}") from error
        try:
            return cls._from_document(document, metrics)
        except ArtefactError as error:
            raise ArtefactError(f"artefact {os.fspath(path)}: {error}") from None

    @classmethod
    def _from_document(cls, document: Any, own: Iterable[Metric | Function]) -> Energy:
        if isinstance(document, dict) and "schema" in document and document["schema"] != SCHEMA:
            raise ArtefactError(f"schema is {document['schema']!r}; this version reads schema {SCHEMA}")
        if isinstance(document, dict):
            # What there was when artefacts didn't say: one rule, and no chats.
            document = {"draw": "sir", "chat_template": None, **document}
        _check_fields("", document, FIELDS)
        _check_fields("proposal_settings.", document["proposal_settings"], _fields_of(ProposalSettings))
        if document["diagnostics"] is not None:
            _check_fields("diagnostics.", {"unmet": None} | document["diagnostics"], _fields_of(Diagnostics))
        for i, spec in enumerate(document["metrics"]):
            if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
                raise ArtefactError(f"metrics[{i}] must be an object with a name, got {_short(spec)}")
            if unknown := sorted(set(spec) - {"name", "encoder", "columns", "custom", "of", "mean", "scale"}):
                raise ArtefactError(f"field {_short(f'metrics[{i}].{unknown[0]}')} is unknown")
            if not isinstance(spec.get("encoder"), str | None):
                raise ArtefactError(f"metrics[{i}].encoder must be a string or null, got {_short(spec['encoder'])}")
        metrics = metrics_module.from_specs(document["metrics"], own)
        names = metrics_module.column_names(metrics)
        if not names:
            raise ArtefactError("metrics is empty")
        if document["columns"] != names:
            raise ArtefactError(f"columns is {_short(document['columns'])}, but metrics give {names}")
        for name in ("targets", "mu"):
            if len(document[name]) != len(names):
                raise ArtefactError(f"{name} has {len(document[name])} numbers for {len(names)} metrics")
        try:
            settings = ProposalSettings(**document["proposal_settings"])
        except InvalidInput as error:
            raise ArtefactError(f"proposal_settings.{error}") from error
        diagnostics = document["diagnostics"]
        return cls(
            metrics=metrics,
            mu=torch.tensor([float(value) for value in document["mu"]], dtype=torch.float64, device="cpu"),
            targets=torch.tensor([float(value) for value in document["targets"]], dtype=torch.float64, device="cpu"),
            proposal_settings=settings,
            normalization=document["normalization"],
            draw=document["draw"],
            base=document["base"],
            chat_template=document["chat_template"],
            diagnostics=None if diagnostics is None else Diagnostics(**diagnostics),
        )


def weightless(base_log_w: Tensor | None, per_prefix: bool) -> str | None:
    """What is wrong with base log-weights [N, M]: a prefix whose candidates can't be weighed; None if nothing is.

    Parameters
    ----------
    per_prefix : whether each prefix needs weights of its own, or all together some
    """
    if base_log_w is None:
        return None
    if len(bad := (base_log_w.isnan() | (base_log_w == torch.inf)).any(1).nonzero()):
        return f"base log-weights of prefix {int(bad[0])} hold NaN or +infinity"
    none = (base_log_w == -torch.inf).all(1)
    if per_prefix and none.any():
        return f"all {base_log_w.shape[1]} base log-weights of prefix {int(none.nonzero()[0])} are -infinity"
    return "all base log-weights are -infinity" if none.all() else None


# ---- the schema -----------------------------------------------------------------------------------------------------


def _number(value: Any) -> bool:
    # Python's JSON reader accepts NaN and Infinity, and integers that no float can hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


Check = tuple[Callable[[Any], bool], str]
TEXT: Check = (lambda v: isinstance(v, str), "a string")
TRUTH: Check = (lambda v: isinstance(v, bool), "true or false")
NUMBER: Check = (_number, "a finite number")
INTEGER: Check = (_integer, "an integer")
NUMBERS: Check = (_numbers, "a list of finite numbers")
OBJECT: Check = (lambda v: isinstance(v, dict), "an object")


def _one_of(options: tuple[str, ...]) -> Check:
    return lambda v: isinstance(v, str) and v in options, f"one of {', '.join(options)}"


FIELDS: dict[str, Check] = {
    "schema": INTEGER,
    "library": TEXT,
    "metrics": (lambda v: isinstance(v, list), "a list"),
    "columns": (lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v), "a list of strings"),
    "targets": NUMBERS,
    "mu": NUMBERS,
    "normalization": _one_of(get_args(Normalization)),
    "draw": _one_of(get_args(Draw)),
    "base": _one_of(get_args(Base)),
    "chat_template": (lambda v: v is None or isinstance(v, str), "a string or null"),
    "proposal_settings": OBJECT,
    "diagnostics": (lambda v: v is None or isinstance(v, dict), "an object or null"),
}
_BY_ANNOTATION: dict[str, Check] = {
    "str": TEXT,
    "int": INTEGER,
    "float": NUMBER,
    "bool": TRUTH,
    "list[float]": NUMBERS,
    "list[str] | None": (
        lambda v: v is None or (isinstance(v, list) and all(isinstance(name, str) for name in v)),
        "a list of strings, or null",
    ),
    "float | None": (lambda v: v is None or _number(v), "a finite number or null"),
    "list[list[float]] | None": (
        lambda v: v is None or (isinstance(v, list) and len(v) == 2 and all(map(_numbers, v))),
        "two lists of finite numbers, or null",
    ),
}


def _fields_of(dataclass: type) -> dict[str, Check]:
    """The checks that a dataclass's annotations ask for."""
    return {field.name: _BY_ANNOTATION[str(field.type)] for field in dataclasses.fields(dataclass)}


def _check_fields(prefix: str, value: Any, fields: dict[str, Check]) -> None:
    if not isinstance(value, dict):
        raise ArtefactError(f"{prefix.rstrip('.') or 'the document'} must be an object, got {_short(value)}")
    for name in fields:
        if name not in value:
            raise ArtefactError(f"field {prefix}{name} is missing")
    for name, item in value.items():
        if name not in fields:
            raise ArtefactError(f"field {_short(prefix + name)} is unknown")
        valid, expected = fields[name]
        if not valid(item):
            raise ArtefactError(f"{prefix}{name} must be {expected}, got {_short(item)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
