"""The fitted artefact: metrics, mu, and what they hold for, as one human-readable JSON file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from daemon_fast import metrics as metrics_module
from daemon_fast.candidates import Candidates
from daemon_fast.errors import ArtefactError, InvalidInput, writing
from daemon_fast.fit import FitResult, Normalization
from daemon_fast.metrics import Metric
from daemon_fast.proposals import ProposalSettings

__all__ = ["Base", "Energy"]

SCHEMA = 1
Base = Literal["proposal", "model"]


@dataclass(frozen=True)
class Energy:
    """E(x) = mu · f(x), fitted: what a decoder needs.

    Attributes
    ----------
    metrics : list of Metric
    mu : [K] float64
    targets : [K] float64
        The human means that it was fitted to.
    proposal : ProposalSettings
        How the candidates it was fitted on were drawn.
    normalization : "per_prefix" or "global"
    base : "proposal" or "model"
        What is tilted: the proposal itself (base log-weights 0, as in the paper) or p_theta (log p - log q).
    diagnostics : dict or None
        Of the fit: ridge, residual, scale, confidence_interval, ess_mean, ess_min, kl, condition_number, iterations,
        converged, num_prefixes, num_targets, seed.
    """

    metrics: Sequence[Metric]
    mu: Tensor
    targets: Tensor
    proposal: ProposalSettings
    normalization: Normalization = "per_prefix"
    base: Base = "proposal"
    diagnostics: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        k = len(self.names)
        for name in ("mu", "targets"):
            value: Tensor = getattr(self, name)
            if value.shape != (k,) or not value.isfinite().all():
                raise InvalidInput(f"{name} must be {k} finite numbers, one per metric, got {value.tolist()}")

    @property
    def names(self) -> list[str]:
        """K metric names."""
        return metrics_module.column_names(self.metrics)

    @classmethod
    def from_fit(
        cls,
        result: FitResult,
        metrics: Sequence[Metric],
        proposal: ProposalSettings,
        base: Base = "proposal",
        seed: int = 0,
        num_targets: int | None = None,
    ) -> Energy:
        """`seed` is the one that drew the candidates of the fit; `num_targets`, how many human texts gave the targets
        (default: as many as prefixes)."""
        interval = result.confidence_interval
        return cls(
            metrics=list(metrics),
            mu=result.mu,
            targets=result.targets,
            proposal=proposal,
            normalization=result.normalization,
            base=base,
            diagnostics={
                "ridge": result.ridge,
                "residual": result.residual.tolist(),
                "scale": result.scale.tolist(),
                "confidence_interval": None if interval is None else interval.tolist(),
                "ess_mean": result.ess_mean,
                "ess_min": result.ess_min,
                "kl": result.kl,
                "condition_number": result.condition_number if math.isfinite(result.condition_number) else None,
                "iterations": result.iterations,
                "converged": result.converged,
                "num_prefixes": result.num_prefixes,
                "num_targets": result.num_prefixes if num_targets is None else num_targets,
                "seed": seed,
            },
        )

    def features(self, candidates: Candidates) -> Tensor:
        """[N, M, K] float32 metrics of the candidates."""
        return metrics_module.features(self.metrics, candidates)

    def base_log_w(self, candidates: Candidates) -> Tensor | None:
        """[N, M] float64 base log-weights, -inf of excluded candidates; None where all are 0."""
        base = None if self.base == "proposal" else candidates.log_p - candidates.log_q
        if candidates.excluded is None:
            return base
        base = torch.zeros_like(candidates.log_p) if base is None else base
        return base.masked_fill(candidates.excluded.reshape(base.shape), -torch.inf)

    def bounds(self, candidates: Candidates, running: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """[N, M] least and greatest energy that candidates can end with, of which `running` [R] still grow.

        Raises
        ------
        InvalidInput
            A metric without bounds, or base log-weights, which have none.
        """
        if self.base != "proposal":
            raise InvalidInput(
                f"base = {self.base!r}: its log-weights have no bounds; candidates can't be given up early"
            )
        k = len(self.names)
        value = self.features(candidates).reshape(-1, k)
        ends = [metric.bounds(candidates, max_new_tokens) for metric in self.metrics]
        mu = self.mu.to(value.device)
        terms = []
        for end in zip(*ends, strict=True):
            bound = torch.cat([x.reshape(len(value), -1) for x in end], dim=1)
            terms.append(mu * bound.where(running[:, None], value).where(mu != 0, 0))
        low, high = (pick(*terms).sum(1).reshape(candidates.shape) for pick in (torch.minimum, torch.maximum))
        return low, high

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
            "base": self.base,
            "proposal": self.proposal.to_json(),
            "diagnostics": self.diagnostics,
        }
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
        with writing(f"artefact {os.fspath(path)}"):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], custom: Iterable[Metric] = ()) -> Energy:
        """Read an artefact.

        Parameters
        ----------
        path : file written by `save`
        custom : your own metrics, and `coh` with an encoder object, if the artefact uses them

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
            return cls._from_document(document, custom)
        except ArtefactError as error:
            raise ArtefactError(f"artefact {os.fspath(path)}: {error}") from None

    @classmethod
    def _from_document(cls, document: Any, custom: Iterable[Metric]) -> Energy:
        if isinstance(document, dict) and "schema" in document and document["schema"] != SCHEMA:
            raise ArtefactError(f"schema is {document['schema']!r}; this version reads schema {SCHEMA}")
        _check_fields("", document, FIELDS)
        _check_fields("proposal.", document["proposal"], PROPOSAL_FIELDS)
        if document["diagnostics"] is not None:
            _check_fields("diagnostics.", document["diagnostics"], DIAGNOSTIC_FIELDS)
        for i, spec in enumerate(document["metrics"]):
            if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
                raise ArtefactError(f"metrics[{i}] must be an object with a name, got {_short(spec)}")
            if unknown := sorted(set(spec) - {"name", "encoder", "columns", "custom"}):
                raise ArtefactError(f"field {_short(f'metrics[{i}].{unknown[0]}')} is unknown")
            if not isinstance(spec.get("encoder"), str | None):
                raise ArtefactError(f"metrics[{i}].encoder must be a string or null, got {_short(spec['encoder'])}")
        metrics = metrics_module.from_specs(document["metrics"], custom)
        names = metrics_module.column_names(metrics)
        if not names:
            raise ArtefactError("metrics is empty")
        if document["columns"] != names:
            raise ArtefactError(f"columns is {_short(document['columns'])}, but metrics give {names}")
        for name in ("targets", "mu"):
            if len(document[name]) != len(names):
                raise ArtefactError(f"{name} has {len(document[name])} numbers for {len(names)} metrics")
        try:
            proposal = ProposalSettings(**document["proposal"])
        except InvalidInput as error:
            raise ArtefactError(f"proposal.{error}") from error
        return cls(
            metrics=metrics,
            mu=torch.tensor([float(value) for value in document["mu"]], dtype=torch.float64),
            targets=torch.tensor([float(value) for value in document["targets"]], dtype=torch.float64),
            proposal=proposal,
            normalization=document["normalization"],
            base=document["base"],
            diagnostics=document["diagnostics"],
        )


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
    "base": _one_of(get_args(Base)),
    "proposal": OBJECT,
    "diagnostics": (lambda v: v is None or isinstance(v, dict), "an object or null"),
}
_BY_ANNOTATION = {"str": TEXT, "int": INTEGER, "float": NUMBER, "bool": TRUTH}
PROPOSAL_FIELDS = {f.name: _BY_ANNOTATION[str(f.type)] for f in dataclasses.fields(ProposalSettings)}
DIAGNOSTIC_FIELDS: dict[str, Check] = {
    "ridge": NUMBER,
    "residual": NUMBERS,
    "scale": NUMBERS,
    "confidence_interval": (
        lambda v: v is None or (isinstance(v, list) and len(v) == 2 and all(map(_numbers, v))),
        "two lists of finite numbers, or null",
    ),
    "ess_mean": NUMBER,
    "ess_min": NUMBER,
    "kl": NUMBER,
    "condition_number": (lambda v: v is None or _number(v), "a finite number or null"),
    "iterations": INTEGER,
    "converged": TRUTH,
    "num_prefixes": INTEGER,
    "num_targets": INTEGER,
    "seed": INTEGER,
}


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
