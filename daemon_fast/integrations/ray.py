"""Many machines, through Ray Data: models are actors in `map_batches`, the fit is reductions over blocks.

Ray places the actors, gives them GPUs, starts dead ones again and repeats what they had not finished:

    from daemon_fast.integrations import ray as cluster

    eight = ray.data.ActorPoolStrategy(size=8)
    texts = ray.data.read_json("s3://bucket/texts/")
    cluster.measure(texts, ["sr_2", "sr_4", "nats"], num_gpus=1, compute=eight).write_parquet("s3://bucket/measured/")
    energy = cluster.fit(ray.data.read_parquet("s3://bucket/measured/"))
    prompts = ray.data.read_json("s3://bucket/prompts/")
    cluster.decode(prompts, energy, num_gpus=1, compute=eight).write_parquet("s3://bucket/continued/")

Options such as num_gpus, num_cpus, compute and accelerator_type are those of `ray.data.Dataset.map_batches`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from daemon_fast import metrics as metrics_module
from daemon_fast.data.formats import SURROGATE, python_values
from daemon_fast.data.records import RESULT, DecodeWork, Item
from daemon_fast.data.texts import split
from daemon_fast.decode import SIRDecoder
from daemon_fast.energy import Base, Energy
from daemon_fast.errors import DataError, InvalidInput, MissingPackage
from daemon_fast.fit import fit as fit_samples
from daemon_fast.fit.samples import Block
from daemon_fast.metrics import Function, Metric
from daemon_fast.models import DEFAULT_ENCODER, Encoder
from daemon_fast.ops import Draw, Normalization
from daemon_fast.proposals.base import ProposalSettings
from daemon_fast.proposals.load import EngineSpec
from daemon_fast.seeds import batch_seed

try:
    import pyarrow
    import ray
    from ray.data import Dataset
    from ray.data.expressions import monotonically_increasing_id
except ImportError as error:
    raise MissingPackage(f"a cluster needs ray and pyarrow ({error}): pip install 'daemon-fast[ray]'") from error

__all__ = ["RaySamples", "decode", "fit", "measure"]

T = TypeVar("T")
ROW = "daemon_row"  # a column of numbers, each in one row only, while rows are drawn: the first gives a batch its seed


# ---- decoding -------------------------------------------------------------------------------------------------------


def decode(
    dataset: Dataset,
    energy: Energy,
    engine: EngineSpec | None = None,
    *,
    field: str = "text",
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    **options: Any,
) -> Dataset:
    """Continue the text in `field` of each row.

    Parameters
    ----------
    dataset : rows with a string column `field`. They keep their other columns; Ray may change their order.
    energy : fitted artefact
    engine : default: Transformers, with the artefact's model
    num_samples : continuations per row
    seed : of candidates and draws. Which rows are drawn together is Ray's choice, so that another run can give
        others, of the same distribution.
    batch_size : rows drawn together
    **options : of `map_batches`

    Returns
    -------
    Dataset
        With a column "daemon" of texts, metrics, ess, log_z, and error: null, or what is wrong with the row's text.
    """
    arguments = {
        "energy": energy, "engine": engine or EngineSpec(model_id=energy.proposal_settings.model_id), "field": field,
        "num_samples": num_samples, "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    return _map(dataset, _Decode, arguments, batch_size, options)


class _Decode:
    """The actor that decodes."""

    def __init__(
        self, energy: Energy, engine: EngineSpec, field: str, num_samples: int, seed: int, batch_size: int
    ) -> None:
        decoder = SIRDecoder(energy, engine.proposal(**energy.proposal_settings.sampling()), batch_size)
        self._field, self._work = field, DecodeWork(decoder, num_samples, seed)

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        if RESULT in table.column_names:
            raise InvalidInput(f"the rows have a column {RESULT!r} already")
        texts = _values(table, self._field)
        if not texts:
            return table.drop_columns([ROW]).append_column(RESULT, pyarrow.nulls(0, self._work.result_type()))
        drawn = iter(self._work([Item({}, text) for text in texts if _is_text(text)], table[ROW][0].as_py()))
        missing = {"error": f"has no string field {self._field!r}"}
        results = [next(drawn) if _is_text(text) else missing for text in texts]
        return table.drop_columns([ROW]).append_column(RESULT, pyarrow.array(results, self._work.result_type()))


def _values(table: pyarrow.Table, field: str) -> list[Any]:
    if field not in table.column_names:
        raise InvalidInput(f"field = {field!r}: the rows have {', '.join(sorted({*table.column_names} - {ROW}))}")
    return python_values(table[field].combine_chunks())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not SURROGATE.search(value)


# ---- fitting --------------------------------------------------------------------------------------------------------


def measure(
    dataset: Dataset,
    metrics: Sequence[str | Metric | Function],
    engine: EngineSpec | None = None,
    *,
    encoder: Encoder | str = DEFAULT_ENCODER,
    field: str = "text",
    prefix_tokens: int = 32,
    new_tokens: int = 64,
    num_candidates: int = 25,
    temperature: float = 0.97,
    top_k: int = 0,
    top_p: float = 1.0,
    base: Base = "proposal",
    seed: int = 0,
    batch_size: int = 16,
    **options: Any,
) -> Dataset:
    """Metrics of human texts and of candidates that continue their first tokens: what `fit` reads.

    Parameters
    ----------
    dataset : rows with a string column `field`; those of fewer than prefix_tokens + new_tokens tokens are left out
    metrics, encoder : as `daemon_fast.metrics.parse` takes them
    engine : default: Transformers, with the embedded model
    num_candidates, temperature, top_k, top_p : see `ProposalSettings`
    base : what is tilted: the proposal, or the model at temperature 1
    batch_size : rows drawn together
    **options : of `map_batches`

    Returns
    -------
    Dataset
        A row per text: features [M, K] float32, human [K] float32, base_log_w [M] float64 or null, and in some rows
        `run`, which tells what they are.
    """
    settings = {
        "num_candidates": num_candidates, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "max_new_tokens": new_tokens, "min_new_tokens": new_tokens,
    }  # fmt: skip
    arguments = {
        "metrics": metrics_module.parse(metrics, encoder), "engine": engine or EngineSpec(), "settings": settings,
        "field": field, "prefix_tokens": prefix_tokens, "base": base, "seed": seed,
    }  # fmt: skip
    return _map(dataset, _Measure, arguments, batch_size, options)


class _Measure:
    """The actor that draws candidates and measures them."""

    def __init__(
        self, metrics: Sequence[Metric], engine: EngineSpec, settings: dict[str, Any], field: str, prefix_tokens: int,
        base: Base, seed: int,
    ) -> None:  # fmt: skip
        self._proposal, self._metrics, self._base, self._seed = engine.proposal(**settings), metrics, base, seed
        self._field, self._prefix_tokens = field, prefix_tokens
        self._run = json.dumps(
            {
                "proposal_settings": self._proposal.settings.to_json(),
                "metrics": [metric.spec for metric in metrics],
                "base": base,
                "seed": seed,
                "prefix_tokens": prefix_tokens,
            }
        )

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        texts = list(filter(_is_text, _values(table, self._field)))
        settings = self._proposal.settings
        pairs = split(texts, self._proposal.tokenizer, self._prefix_tokens, settings.max_new_tokens, at_least=0)
        m, k = settings.num_candidates, len(metrics_module.column_names(self._metrics))
        features, human, base = torch.empty(0, m, k), torch.empty(0, k), None
        if len(pairs):
            drawn = self._proposal.propose(pairs.prefixes, batch_seed(self._seed, table[ROW][0].as_py()))
            features = metrics_module.features(self._metrics, drawn).cpu()
            scored = self._proposal.score(pairs.prefixes, pairs.continuations)
            human = metrics_module.features(self._metrics, scored)[:, 0].cpu()
            base = (drawn.log_p - drawn.log_q).cpu() if self._base == "model" else None
        weights = pyarrow.nulls(len(pairs), pyarrow.list_(pyarrow.float64(), m)) if base is None else _column(base)
        columns = {
            "features": _column(features),
            "human": _column(human),
            "base_log_w": weights,
            "run": pyarrow.array([self._run, *[None] * len(pairs)][: len(pairs)], pyarrow.string()),
        }
        return pyarrow.table(columns)


class RaySamples:
    """The rows that `measure` made, as the fit reads them (`daemon_fast.fit.samples.Samples`): each block where it is.

    Raises
    ------
    DataError
        No rows.
    InvalidInput
        Rows of several runs.
    """

    def __init__(self, dataset: Dataset) -> None:
        blocks = dataset.materialize().to_arrow_refs()
        self._apply = ray.remote(_apply)
        sizes = ray.get([self._apply.remote(len, block) for block in blocks])
        self._blocks = [block for block, size in zip(blocks, sizes, strict=True) if size]
        if not self._blocks:
            raise DataError("no text of the dataset has as many tokens as a prefix and a continuation need")
        runs = {run for found in self._map(_runs) for run in found}
        if len(runs) != 1:
            raise InvalidInput(f"the dataset holds rows of {len(runs)} runs of `measure`, which don't go together")
        self.run: dict[str, Any] = json.loads(runs.pop())
        m, k = self._map(_shape)[0]
        self.shape: tuple[int, int, int] = (sum(sizes), m, k)

    def map(self, function: Callable[[Block], T]) -> list[T]:
        return self._map(lambda table: function(_block(table)))

    def targets(self) -> Tensor:
        """[K] float64 means of the human texts."""
        totals: list[Tensor] = self._map(lambda table: _tensor(table["human"]).double().sum(0))
        total: Tensor = torch.stack(totals).sum(0)
        return total / self.shape[0]

    def _map(self, function: Callable[[pyarrow.Table], T]) -> list[T]:
        shared = ray.put(function)
        found: list[T] = ray.get([self._apply.remote(shared, block) for block in self._blocks])
        return found


def fit(
    dataset: Dataset,
    *,
    normalization: Normalization = "per_prefix",
    draw: Draw = "sir",
    ridge: float = 0.0,
    metrics: Iterable[Metric | Function] = (),
) -> Energy:
    """Fit mu to what `measure` made. Each step is a reduction over blocks: no machine holds them all.

    Parameters
    ----------
    dataset : of `measure`
    normalization, draw, ridge : see `daemon_fast.fit`; the ridge is a number here
    metrics : your own, if it was measured with some

    Raises
    ------
    DataError, InvalidInput
        See `RaySamples`.
    InfeasibleTargets, FitDidNotConverge
        See `daemon_fast.fit`.
    """
    measured = RaySamples(dataset)
    fitted = metrics_module.from_specs(measured.run["metrics"], metrics)
    names = metrics_module.column_names(fitted)
    result = fit_samples(measured, measured.targets(), normalization=normalization, draw=draw, ridge=ridge, names=names)
    settings, base, seed = (measured.run[name] for name in ("proposal_settings", "base", "seed"))
    return result.energy(fitted, ProposalSettings(**settings), base, seed)


# ---- Ray and Arrow --------------------------------------------------------------------------------------------------


def _map(dataset: Dataset, actor: type, arguments: dict[str, Any], batch_size: int, options: dict[str, Any]) -> Dataset:
    numbered = dataset.with_column(ROW, monotonically_increasing_id())
    return numbered.map_batches(
        actor, fn_constructor_kwargs=arguments, batch_format="pyarrow", batch_size=batch_size,
        **options,
    )  # fmt: skip


def _apply(function: Callable[[pyarrow.Table], T], table: pyarrow.Table) -> T:
    return function(table)


def _runs(table: pyarrow.Table) -> set[str]:
    return set(table["run"].drop_null().to_pylist())


def _shape(table: pyarrow.Table) -> tuple[int, int]:
    column = table["features"].type
    return column.list_size, column.value_type.list_size


def _block(table: pyarrow.Table) -> Block:
    weights = table["base_log_w"]
    return Block(_tensor(table["features"]), None if weights.null_count else _tensor(weights))


def _column(values: Tensor) -> pyarrow.Array:
    """[n, ...] as a column of lists of fixed size."""
    column = pyarrow.array(values.flatten().numpy())
    for size in reversed(values.shape[1:]):
        column = pyarrow.FixedSizeListArray.from_arrays(column, size)
    return column


def _tensor(column: pyarrow.ChunkedArray) -> Tensor:
    """[n, ...] of a column of lists of fixed size."""
    values, shape = column.combine_chunks(), [len(column)]
    while pyarrow.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    return torch.tensor(values.to_numpy()).reshape(shape)
