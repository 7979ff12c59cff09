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
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from daemon_fast import metrics as metrics_module
from daemon_fast.data.exchanges import as_exchange, pair
from daemon_fast.data.formats import python_values
from daemon_fast.data.records import RESULT, DecodeWork, Record, as_item
from daemon_fast.data.texts import Pairs, split
from daemon_fast.decode import SIRDecoder
from daemon_fast.energy import Base, Energy
from daemon_fast.errors import DataError, InvalidInput, MissingPackage
from daemon_fast.fit import fit as fit_samples
from daemon_fast.fit.from_texts import check_ends
from daemon_fast.fit.samples import Block
from daemon_fast.metrics import Function, Metric
from daemon_fast.models import DEFAULT_ENCODER, Encoder
from daemon_fast.ops import Draw, Normalization
from daemon_fast.proposals.base import Proposal, ProposalSettings
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
    """Continue the text in `field` of each row, or answer the chat.

    Parameters
    ----------
    dataset : rows with a column `field` of strings, which are users' messages where the artefact was fitted to chats;
        or of chats, lists of structs with a role and a content, of which a last message of the assistant's is left out.
        Rows keep their other columns; Ray may change their order.
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
        With a column "daemon" of texts, metrics, ess, log_z, and error: null, or what is wrong with the row's text or
        chat.
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
        items = [as_item({self._field: value}, self._field) for value in _values(table, self._field)]
        if not items:
            return table.drop_columns([ROW]).append_column(RESULT, pyarrow.nulls(0, self._work.result_type()))
        drawn = iter(self._work([item for item in items if item.problem is None], table[ROW][0].as_py()))
        results = [next(drawn) if item.problem is None else {"error": item.problem} for item in items]
        return table.drop_columns([ROW]).append_column(RESULT, pyarrow.array(results, self._work.result_type()))


def _values(table: pyarrow.Table, field: str) -> list[Any]:
    if field not in table.column_names:
        raise InvalidInput(f"field = {field!r}: the rows have {', '.join(sorted({*table.column_names} - {ROW}))}")
    return python_values(table[field].combine_chunks())


# ---- fitting --------------------------------------------------------------------------------------------------------


def measure(
    dataset: Dataset,
    metrics: Sequence[str | Metric | Function],
    engine: EngineSpec | None = None,
    *,
    encoder: Encoder | str = DEFAULT_ENCODER,
    field: str = "text",
    prompt_field: str | None = None,
    response_field: str | None = None,
    chat: bool | None = None,
    prefix_tokens: int = 32,
    new_tokens: int = 64,
    min_new_tokens: int | None = None,
    num_candidates: int = 25,
    temperature: float = 0.97,
    top_k: int = 0,
    top_p: float = 1.0,
    base: Base = "proposal",
    seed: int = 0,
    batch_size: int = 16,
    **options: Any,
) -> Dataset:
    """Metrics of human texts and of candidates that continue their first tokens; or of responses, and of candidates
    that answer the same prompts: what `fit` reads.

    Parameters
    ----------
    dataset : rows with a string column `field`; those of fewer than prefix_tokens + new_tokens tokens are left out. Or,
        with a `prompt_field`, rows of prompts and responses; those that hold none, that the chat template refuses, or
        that are too long for the model or shorter than min_new_tokens, are left out
    metrics, encoder : as `daemon_fast.metrics.parse` takes them
    engine : default: Transformers, with the embedded model
    prompt_field, response_field : of prompts and responses, see `daemon_fast.data.exchanges.as_exchange`
    chat : whether a prompt that is a text is a user's message, in the tokenizer's chat template; default: if it has one
    prefix_tokens : where texts are cut
    new_tokens, min_new_tokens : of a continuation at most, and at least; default of the latter: 0 for responses, and
        new_tokens for texts
    num_candidates, temperature, top_k, top_p : see `ProposalSettings`
    base : what is tilted: the proposal, or the model at temperature 1
    batch_size : rows drawn together
    **options : of `map_batches`

    Returns
    -------
    Dataset
        A row per text, or per prompt and response: features [M, K], human [K] and base_log_w [M], float64, the last or
        null, and in some rows `run`, which tells what they are.
    """
    if response_field is not None and prompt_field is None:
        raise InvalidInput(f"response_field = {response_field!r} needs a prompt_field")
    if min_new_tokens is None:
        min_new_tokens = new_tokens if prompt_field is None else 0
    settings = {
        "num_candidates": num_candidates, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "max_new_tokens": new_tokens, "min_new_tokens": min_new_tokens,
    }  # fmt: skip
    human = _Texts(field, prefix_tokens) if prompt_field is None else _Exchanges(prompt_field, response_field, chat)
    arguments = {
        "metrics": metrics_module.parse(metrics, encoder), "engine": engine or EngineSpec(), "settings": settings,
        "human": human, "base": base, "seed": seed,
    }  # fmt: skip
    return _map(dataset, _Measure, arguments, batch_size, options)


def _is_in(field: str, column: str) -> bool:
    """Whether a column has the field, or has it within."""
    return field == column or field.startswith(f"{column}.")


@dataclass(frozen=True)
class _Texts:
    """Where rows hold texts, and where these are cut."""

    field: str
    prefix_tokens: int

    def pairs(self, table: pyarrow.Table, proposal: Proposal) -> Pairs:
        items = [as_item({self.field: value}, self.field, chats=False) for value in _values(table, self.field)]
        texts = [item.text for item in items if item.problem is None]
        return split(texts, proposal.tokenizer, self.prefix_tokens, proposal.settings.max_new_tokens, at_least=0)


@dataclass(frozen=True)
class _Exchanges:
    """Where rows hold prompts and responses."""

    prompt_field: str
    response_field: str | None
    chat: bool | None

    def pairs(self, table: pyarrow.Table, proposal: Proposal) -> Pairs:
        found = [self._pair(row, proposal) for row in self._rows(table)]
        pairs = Pairs(
            [prefix for one in found for prefix in one.prefixes],
            [row for one in found for row in one.continuations],
            next((one.chat_template for one in found if one.chat_template), None),
        )
        check_ends(pairs, proposal.tokenizer, proposal)
        return pairs

    def _rows(self, table: pyarrow.Table) -> list[Record]:
        """With the columns that may hold either."""
        of_prompt = [name for name in table.column_names if _is_in(self.prompt_field, name)]
        if not of_prompt:
            _values(table, self.prompt_field)  # says which columns there are
        others = (self.response_field,) if self.response_field else ("response", "completion")
        names = {*of_prompt, *(name for name in table.column_names for field in others if _is_in(field, name))}
        columns = [_values(table, name) for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def _pair(self, row: Record, proposal: Proposal) -> Pairs:
        """Of one row; or none, where it can't be used."""
        s, tokenizer, nothing = proposal.settings, proposal.tokenizer, Pairs([], [])
        try:
            exchange = as_exchange(row, self.prompt_field, self.response_field)
        except InvalidInput:
            return nothing
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is left out
            return pair(
                [exchange], tokenizer, s.max_new_tokens, s.min_new_tokens, at_least=0, chat=self.chat,
                check=proposal.tokenize,
            )  # fmt: skip


class _Measure:
    """The actor that draws candidates and measures them."""

    def __init__(
        self, metrics: Sequence[Metric], engine: EngineSpec, settings: dict[str, Any], human: _Texts | _Exchanges,
        base: Base, seed: int,
    ) -> None:  # fmt: skip
        self._proposal, self._metrics, self._base, self._seed = engine.proposal(**settings), metrics, base, seed
        self._human = human

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        settings, pairs = self._proposal.settings, self._human.pairs(table, self._proposal)
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
            "features": _column(features.double()),
            "human": _column(human.double()),
            "base_log_w": weights,
            "run": pyarrow.array([self._run(pairs), *[None] * len(pairs)][: len(pairs)], pyarrow.string()),
        }
        return pyarrow.table(columns)

    def _run(self, pairs: Pairs) -> str:
        return json.dumps(
            {
                "proposal_settings": self._proposal.settings.to_json(),
                "metrics": [metric.spec for metric in self._metrics],
                "base": self._base,
                "seed": self._seed,
                "human": asdict(self._human),
                "chat_template": pairs.chat_template,
            }
        )


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
            raise DataError(
                "no row of the dataset could be used: no text has as many tokens as a prefix and a continuation need, "
                "or none holds a prompt and a response"
            )
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
    template = measured.run.get("chat_template")  # rows that an earlier version measured have none
    return result.energy(fitted, ProposalSettings(**settings), base, seed, chat_template=template)


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
