"""Metrics of continuations: small objects with a name and a batch evaluation.

Built in: `sr_n`, `tr_w`, `div`, `ent`, `coh`, `nats`, `length` and `ended` (definitions in `daemon_fast.reference`).
Your own: a subclass of `Metric`, or `FunctionMetric` around any callable from `Candidates` to `[R]` or `[R, k]`.

Every built-in metric is defined for every length. Of an empty answer sr_n, tr_w, `coh` and `length` are 0, `div` is 1,
and `nats` and `ent` are those of its end-of-text token, the only one drawn.
"""

from __future__ import annotations

import math
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from daemon_fast import ops
from daemon_fast.arguments import integer, real_tensor, strings
from daemon_fast.errors import ArtefactError, InvalidInput, Problems, UnknownMetric
from daemon_fast.models import Encoder, load_encoder
from daemon_fast.proposals.candidates import Candidates

__all__ = [
    "DEFAULT",
    "OF_RESPONSES",
    "Coherence",
    "Diversity",
    "Ended",
    "FunctionMetric",
    "Information",
    "Length",
    "Metric",
    "Nats",
    "RepetitionMetric",
    "SequenceRepetition",
    "Spread",
    "TokenRepetition",
    "built_in",
    "column_names",
    "features",
    "from_specs",
    "parse",
    "unbounded_tilts",
]

Function = Callable[[Candidates], Tensor]
KNOWN = "sr_<n>, tr_<w>, div, ent, coh, nats, length, ended"
DEFAULT = ("sr_2", "sr_3", "sr_4", "tr_8", "tr_16", "tr_32", "coh", "nats")  # what a fit takes unless told
OF_RESPONSES = (*DEFAULT, "length", "ended")  # what it takes where texts end by themselves
MAX_CACHED_PREFIXES = 4096


class Metric(ABC):
    """A sequence-level metric.

    Attributes
    ----------
    name : str
        What it is called in tables, artefacts and on the command line.
    names : tuple of str
        One per column that it returns; `(name,)` unless it returns several.
    bounds : (float, float) or None
        The lowest and the highest value that there is, in any column; None: unknown. A fit warns where its tilt grows
        without bound: by a negative coefficient of what has no upper bound, or a positive one of what has no lower.
    power_of_p : bool
        exp(-mu · f) is a power of the model's probability: without bound itself, it leaves a distribution.
    """

    name: str
    bounds: tuple[float, float] | None = None
    power_of_p = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def spec(self) -> dict[str, Any]:
        """What an artefact stores of it."""
        return {"name": self.name}

    def prepare(self) -> None:  # noqa: B027  (most need nothing)
        """Load what `evaluate` needs, so that what is missing is known before candidates are drawn."""

    @abstractmethod
    def evaluate(self, candidates: Candidates) -> Tensor:
        """[R] or [R, k] values of R candidates, of any real dtype: float64 and integers keep all their digits."""


class RepetitionMetric(Metric):
    """A function of n-gram and token repetition. All of one evaluation share a single kernel call."""

    bounds = (0.0, 1.0)
    ngrams: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()

    @abstractmethod
    def combine(self, sr: Mapping[int, Tensor], tr: Mapping[int, Tensor]) -> Tensor:
        """[R] from the columns sr[n] and tr[w], each [R]."""

    def evaluate(self, candidates: Candidates) -> Tensor:
        return _repetition_columns([self], candidates)[0]


class SequenceRepetition(RepetitionMetric):
    """sr_n: the share of n-grams that repeat an earlier one."""

    def __init__(self, n: int) -> None:
        n = integer("n of sr_n", n, ">= 1", lambda n: n >= 1)
        self.name, self.ngrams = f"sr_{n}", (n,)

    def combine(self, sr: Mapping[int, Tensor], tr: Mapping[int, Tensor]) -> Tensor:
        return sr[self.ngrams[0]]


class TokenRepetition(RepetitionMetric):
    """tr_w: the share of tokens that occur among the w tokens before them."""

    def __init__(self, w: int) -> None:
        w = integer("w of tr_w", w, ">= 1", lambda w: w >= 1)
        self.name, self.windows = f"tr_{w}", (w,)

    def combine(self, sr: Mapping[int, Tensor], tr: Mapping[int, Tensor]) -> Tensor:
        return tr[self.windows[0]]


class Diversity(RepetitionMetric):
    """div: the product of (1 - sr_n) over n = 2, 3, 4."""

    name, ngrams = "div", (2, 3, 4)

    def combine(self, sr: Mapping[int, Tensor], tr: Mapping[int, Tensor]) -> Tensor:
        return (1 - sr[2]) * (1 - sr[3]) * (1 - sr[4])


class Information(Metric):
    """ent: perplexity of the continuation under the language model at temperature 1.

    An exponential of nats: tilted by a negative coefficient, the exact p_mu puts its mass on gibberish that no M
    candidates hold, and expectations drift as M grows. To fit, use `nats`.
    """

    name = "ent"
    bounds = (1.0, math.inf)

    def evaluate(self, candidates: Candidates) -> Tensor:
        return _nats_per_token(self.name, candidates).exp().float()


class Nats(Metric):
    """nats: mean negative log-probability of a token, -(1/L) log p(x), under the language model at temperature 1.

    exp(-mu · nats) = p(x)^(mu/L): at one length L, tilting by it is p to the power 1 + mu/L, as a change of the
    temperature of whole texts is, and p_mu exists as long as mu > -L.
    """

    name = "nats"
    bounds = (0.0, math.inf)
    power_of_p = True

    def evaluate(self, candidates: Candidates) -> Tensor:
        return _nats_per_token(self.name, candidates).float()


class Length(Metric):
    """length: log(1 + L), L the number of tokens.

    Where texts end by themselves, a tilt against repetition would else buy it by brevity.
    """

    name = "length"
    bounds = None  # it has none by itself, but candidates have a maximum length

    def evaluate(self, candidates: Candidates) -> Tensor:
        return candidates.lengths.double().log1p().float()


class Ended(Metric):
    """ended: 1 if an end-of-text token ended it, 0 if it was cut at the maximum length."""

    name = "ended"
    bounds = (0.0, 1.0)

    def evaluate(self, candidates: Candidates) -> Tensor:
        if candidates.ended is None:
            raise InvalidInput("metric ended needs to know how candidates ended, which the engine does not tell")
        return candidates.ended.float()


class Coherence(Metric):
    """coh: cosine between the sentence embeddings of prefix text and continuation text; 0 if the latter is empty.

    The prefix of an answer is the whole chat as the model reads it, without special tokens.

    Parameters
    ----------
    encoder : Encoder or str
        A sentence-transformers model, or its id, path or embedded name (see `daemon_fast.models`), loaded on first use.
    """

    name = "coh"
    bounds = (-1.0, 1.0)

    def __init__(self, encoder: Encoder | str) -> None:
        self._reference = encoder if isinstance(encoder, str) else None
        self._encoder = None if isinstance(encoder, str) else encoder
        self._prefixes: dict[str, Tensor] = {}

    @property
    def spec(self) -> dict[str, Any]:
        return {"name": self.name, "encoder": self._reference}

    def evaluate(self, candidates: Candidates) -> Tensor:
        rows = candidates.lengths.nonzero()[:, 0].cpu()
        cosines = torch.zeros(len(candidates.lengths))
        if len(rows):
            prefixes = self._embed_prefixes(candidates.prefix_texts)[rows // candidates.shape[1]]
            continuations = self._embed(candidates.texts_of(rows.tolist()))
            cosines[rows] = torch.nn.functional.cosine_similarity(prefixes, continuations)
        return cosines.to(candidates.tokens.device)

    def _embed_prefixes(self, texts: list[str]) -> Tensor:
        """[N, d], each prefix embedded once, also across evaluations."""
        new = [text for text in dict.fromkeys(texts) if text not in self._prefixes]
        if len(self._prefixes) + len(new) > MAX_CACHED_PREFIXES:
            self._prefixes.clear()
            new = list(dict.fromkeys(texts))
        if new:
            self._prefixes.update(zip(new, self._embed(new), strict=True))
        return torch.stack([self._prefixes[text] for text in texts])

    def prepare(self) -> None:
        if self._encoder is None:
            assert self._reference is not None
            self._encoder = load_encoder(self._reference)

    def _embed(self, texts: list[str]) -> Tensor:
        self.prepare()
        assert self._encoder is not None
        return torch.as_tensor(self._encoder.encode(texts, show_progress_bar=False)).float()


class FunctionMetric(Metric):
    """A metric from any callable.

    Parameters
    ----------
    function : Candidates -> [R] or [R, k] tensor
    names : str or sequence of k str
        Default: the function's own name, or that of an object's class, for what returns [R].

    Raises
    ------
    InvalidInput
        What can't be called, a class, or names that are no strings.
    """

    def __init__(self, function: Function, names: str | Sequence[str] | None = None) -> None:
        if not callable(function) or isinstance(function, type):
            raise InvalidInput(f"metric {reprlib.repr(function)} must be a name, a Metric or a function of candidates")
        if names is None:
            names = _name_of(function)
        self._function = function
        self._names = (names,) if isinstance(names, str) else strings("names", names)
        self.name = self._names[0]

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @property
    def spec(self) -> dict[str, Any]:
        return {"name": self.name, "columns": list(self.names), "custom": True}

    def evaluate(self, candidates: Candidates) -> Tensor:
        return self._function(candidates)


def _name_of(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    name: str = getattr(function, "__name__", type(function).__name__)
    return name


class Spread(Metric):
    """Second moments of other metrics: squares and products of their deviations from human means, in human units.

    With z = (f - mean) / scale clipped at ±2.5, the columns are z_i² ("sr_4^2") and z_i z_j ("sr_4*nats"). Their human
    means as targets give what is drawn the spread of human text, and not only its mean. Clipping keeps a few texts from
    deciding them, and the tilt bounded.

    Parameters
    ----------
    of : k names of columns that are evaluated beside it
    mean, scale : [k] of human text; scale > 0
    """

    name = "spread"
    clip = 2.5
    bounds = (-(clip**2), clip**2)

    def __init__(self, of: Sequence[str], mean: Sequence[float], scale: Sequence[float]) -> None:
        if not of or len(set(of)) < len(of) or not len(of) == len(mean) == len(scale) or min(scale) <= 0:
            raise InvalidInput(
                f"spread of {list(of)} needs distinct names, and a mean and a scale > 0 of each: got "
                f"mean = {list(mean)}, scale = {list(scale)}"
            )
        self.of, self._mean, self._scale = tuple(of), list(map(float, mean)), list(map(float, scale))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{a}^2" if a == b else f"{a}*{b}" for a, b in combinations_with_replacement(self.of, 2))

    @property
    def spec(self) -> dict[str, Any]:
        return {"name": self.name, "of": list(self.of), "mean": self._mean, "scale": self._scale}

    def combine(self, columns: Mapping[str, Tensor]) -> Tensor:
        """[..., k (k + 1) / 2] from the columns of the others, each [...]."""
        z = [
            ((columns[name].double() - mean) / scale).clamp(-self.clip, self.clip)
            for name, mean, scale in zip(self.of, self._mean, self._scale, strict=True)
        ]
        return torch.stack([a * b for a, b in combinations_with_replacement(z, 2)], -1).float()

    def evaluate(self, candidates: Candidates) -> Tensor:
        raise InvalidInput(f"metric spread is of {', '.join(self.of)}: evaluate it beside them, by `metrics.features`")


def parse(names: Iterable[str | Metric | Function], encoder: Encoder | str | None = None) -> list[Metric]:
    """Metrics from names, metric objects and plain callables.

    Parameters
    ----------
    names : such as ["sr_2", "tr_16", "div", "ent", "coh", my_function]
    encoder : sentence encoder for `coh`

    Raises
    ------
    UnknownMetric
        A name that is none of sr_<n>, tr_<w>, div, ent, coh, nats, length, ended.
    InvalidInput
        No metrics, a metric twice, what is none, or `coh` without an encoder.
    SeveralProblems
        More than one of these.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InvalidInput(f"metrics = {reprlib.repr(names)} must be a list of names, Metrics and functions")
    problems, metrics = Problems(), list[Metric]()
    for name in names:
        with problems:
            metrics.append(_parse_one(name, encoder))
    columns = column_names(metrics)
    with problems:
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise InvalidInput(f"metric given twice: {', '.join(twice)}")
    problems.report()
    if not metrics:
        raise InvalidInput(f"no metrics given; known: {KNOWN}")
    return metrics


def _parse_one(name: str | Metric | Function, encoder: Encoder | str | None) -> Metric:
    if isinstance(name, Metric):
        return name
    if not isinstance(name, str):
        return FunctionMetric(name)
    if match := re.fullmatch(r"(sr|tr)_(\d{1,9})", name):
        size = int(match[2])
        return SequenceRepetition(size) if match[1] == "sr" else TokenRepetition(size)
    if name == "div":
        return Diversity()
    if name == "ent":
        return Information()
    if name == "nats":
        return Nats()
    if name == "length":
        return Length()
    if name == "ended":
        return Ended()
    if name == "coh":
        if encoder is None:
            raise InvalidInput("metric coh needs a sentence encoder: pass encoder=")
        return Coherence(encoder)
    raise UnknownMetric(f"unknown metric {name!r}; known: {KNOWN}")


def from_specs(specs: Sequence[Mapping[str, Any]], own: Iterable[Metric | Function] = ()) -> list[Metric]:
    """Metrics from what an artefact stores of them; users' own, and encoders that were objects, are found by name.

    Raises
    ------
    ArtefactError
        A metric that is neither built in nor in `own`.
    """
    given = [metric if isinstance(metric, Metric) else FunctionMetric(metric) for metric in own]
    by_name = {metric.name: metric for metric in given}
    metrics = []
    for i, spec in enumerate(specs):
        name = spec["name"]
        if name in by_name:
            metrics.append(by_name[name])
            continue
        if name == Spread.name:
            metrics.append(_spread(spec, i))
            continue
        try:
            if spec.get("custom"):  # also where it has the name of a built-in one
                raise UnknownMetric(f"unknown metric {name!r}; known: {KNOWN}")
            metrics.append(_parse_one(name, spec.get("encoder")))
        except InvalidInput as error:
            raise ArtefactError(f"metrics[{i}]: {error}; pass your own metrics as metrics=") from error
    return metrics


def _spread(spec: Mapping[str, Any], i: int) -> Spread:
    try:
        return Spread(spec["of"], spec["mean"], spec["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"metrics[{i}] is no spread with of, mean and scale: {error}") from error


def built_in(name: str) -> Metric | None:
    """The metric of this name that needs no encoder or function of yours; None if there is none."""
    try:
        return _parse_one(name, encoder=None)
    except InvalidInput:
        return None


def unbounded_tilts(metrics: Iterable[Metric], mu: Mapping[str, float]) -> list[str]:
    """Names of columns by which exp(-mu · f) grows without bound. Unknown bounds are taken to be finite."""
    found = []
    for metric in metrics:
        low, high = (0.0, 0.0) if metric.bounds is None or metric.power_of_p else metric.bounds
        for name in metric.names:
            if (mu[name] < 0 and high == math.inf) or (mu[name] > 0 and low == -math.inf):
                found.append(name)
    return found


def column_names(metrics: Iterable[Metric]) -> list[str]:
    """K names, one per feature."""
    return [name for metric in metrics for name in metric.names]


def features(metrics: Sequence[Metric], candidates: Candidates) -> Tensor:
    """Evaluate metrics on candidates.

    Returns
    -------
    [N, M, K] float32, or float64 where a metric returned float64 or integers
        In the order of `metrics`; on the device of the candidates' tokens.

    Raises
    ------
    InvalidInput
        A metric returned another shape than [R] or [R, k] for its k names, what is no real number, or a value that is
        not finite.
    """
    shared = [metric for metric in metrics if isinstance(metric, RepetitionMetric)]
    columns = dict(zip(map(id, shared), _repetition_columns(shared, candidates) if shared else [], strict=True))
    by_name: dict[str, Tensor] = {}
    for metric in sorted(metrics, key=lambda metric: isinstance(metric, Spread)):
        if isinstance(metric, Spread):
            if missing := [name for name in metric.of if name not in by_name]:
                raise InvalidInput(f"metric spread is of {missing[0]!r}, which is not among the metrics")
            value = metric.combine(by_name)
        else:
            value = (
                columns[id(metric)]
                if id(metric) in columns
                else real_tensor(f"metric {metric.name} returned", metric.evaluate(candidates))
            )
        by_name |= dict(zip(metric.names, _columns(metric, value, candidates), strict=True))
    values = torch.stack([by_name[name] for name in column_names(metrics)], dim=1)
    if not values.isfinite().all():
        _refuse(metrics, by_name)
    return values.reshape(*candidates.shape, -1)


def _repetition_columns(metrics: Sequence[RepetitionMetric], candidates: Candidates) -> list[Tensor]:
    ngrams = sorted({n for metric in metrics for n in metric.ngrams})
    windows = sorted({w for metric in metrics for w in metric.windows})
    table = ops.repetition(candidates.tokens, candidates.lengths, ngrams, windows).unbind(1)
    sr, tr = dict(zip(ngrams, table, strict=False)), dict(zip(windows, table[len(ngrams) :], strict=True))
    return [metric.combine(sr, tr) for metric in metrics]


def _columns(metric: Metric, value: Tensor, candidates: Candidates) -> tuple[Tensor, ...]:
    """A metric's values, [R] for each of its names."""
    rows, k = candidates.tokens.shape[0], len(metric.names)
    if value.ndim == 1 and k == 1:
        value = value[:, None]
    if value.shape != (rows, k):
        raise InvalidInput(
            f"metric {metric.name} returned shape {list(value.shape)} for {rows} candidates and {k} column(s)"
        )
    return value.to(candidates.tokens.device).unbind(1)


def _refuse(metrics: Sequence[Metric], by_name: Mapping[str, Tensor]) -> None:
    """Name the first metric that is not finite; `Spread` comes after those that it is of."""
    for metric in sorted(metrics, key=lambda metric: isinstance(metric, Spread)):
        value = torch.stack([by_name[name] for name in metric.names], dim=1)
        if len(bad := (~value.isfinite().all(dim=1)).nonzero()):
            row = int(bad[0])
            raise InvalidInput(f"metric {metric.name} is {value[row].tolist()} for candidate {row}: it must be finite")


def _nats_per_token(name: str, candidates: Candidates) -> Tensor:
    """[R] float64. Of an empty continuation, those of the end-of-text token, which is all that was drawn."""
    lengths = candidates.lengths.clamp_min(1)
    counted = torch.arange(candidates.tokens.shape[1], device=lengths.device) < lengths[:, None]
    nats = -torch.where(counted, candidates.token_log_p.double(), 0.0).sum(-1)
    # Engines that may not tell give CPU tensors; on CUDA a look would wait for the device.
    if not nats.is_cuda and nats.isnan().any():
        raise InvalidInput(f"metric {name} needs log-probabilities at temperature 1, which the engine does not give")
    return nats / lengths
