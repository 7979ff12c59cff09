"""From files to results: what the CLI commands and the demo do, as functions."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from daemon_fast import metrics as metrics_module
from daemon_fast import ops
from daemon_fast.collect import batch_seed, batches, human_folder, scores
from daemon_fast.data import Pairs, read_texts, split
from daemon_fast.decode import SIRDecoder
from daemon_fast.energy import Base, Energy
from daemon_fast.errors import InvalidInput, LowEffectiveSampleSize
from daemon_fast.fit import FitResult, Normalization, Ridge, fit
from daemon_fast.metrics import Metric
from daemon_fast.models import load_tokenizer
from daemon_fast.proposals import Proposal
from daemon_fast.proposals.engines import Engine
from daemon_fast.records import Item, Record

__all__ = ["Fitted", "decode_records", "fit_energy", "fit_to_pairs", "repetition_of_texts"]

BATCH_TOKENS = 1 << 22


class Fitted(NamedTuple):
    result: FitResult
    energy: Energy
    human: Tensor  # [N, K] metrics of the human continuations
    seconds: float  # spent on drawing candidates
    problems: Sequence[str] = ()  # of texts that were left out


def fit_energy(
    *,
    metrics: Sequence[Metric],
    engine: Engine,
    data: str,
    field: str,
    directory: str | os.PathLike[str],
    num_prefixes: int,
    num_targets: int | None,
    prefix_tokens: int,
    new_tokens: int,
    num_candidates: int,
    temperature: float,
    top_k: int,
    top_p: float,
    normalization: Normalization,
    base: Base,
    ridge: Ridge,
    bootstrap: int,
    seed: int,
    batch_size: int,
) -> Fitted:
    """`daemon-fast fit`: candidates for prefixes of human text (saved in `directory`), features, fit."""
    texts = read_texts(data, field)
    proposal = engine.proposal(
        num_candidates=num_candidates,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    num_targets = num_targets or num_prefixes
    pairs = split(texts, proposal.tokenizer, prefix_tokens, new_tokens, max(num_prefixes, num_targets), seed)
    fitted = fit_to_pairs(
        proposal, pairs[:num_prefixes], metrics, directory, seed, batch_size, base, targets=pairs[:num_targets],
        normalization=normalization, ridge=ridge, bootstrap=bootstrap, progress=True,
    )  # fmt: skip
    return fitted._replace(problems=getattr(texts, "problems", ()))


def fit_to_pairs(
    proposal: Proposal,
    pairs: Pairs,
    metrics: Sequence[Metric],
    directory: str | os.PathLike[str],
    seed: int,
    batch_size: int,
    base: Base = "proposal",
    targets: Pairs | None = None,
    **options: Any,
) -> Fitted:
    """Fit to human continuations: those of `pairs`, or `targets`, of which there can be more. `options` go to `fit`.

    Memory holds the metrics of all candidates, and the candidates themselves of one batch.
    """
    targets = pairs if targets is None else targets
    features, base_log_w, seconds = [], [], 0.0
    for candidates, spent in batches(proposal, pairs.prefixes, directory, seed, batch_size, "candidates to fit"):
        features.append(metrics_module.features(metrics, candidates))
        base_log_w += [] if base == "proposal" else [candidates.log_p - candidates.log_q]
        seconds += spent
    human = [
        metrics_module.features(metrics, scored)[:, 0] for scored in scores(proposal, targets, human_folder(directory))
    ]
    result = fit(
        torch.cat(features), torch.cat(human), torch.cat(base_log_w) if base_log_w else None,
        names=metrics_module.column_names(metrics), seed=seed, **options,
    )  # fmt: skip
    energy = Energy.from_fit(result, metrics, proposal.settings, base, seed, len(targets))
    return Fitted(result, energy, torch.cat(human), seconds)


def decode_records(
    decoder: SIRDecoder, field: str, num_samples: int, seed: int
) -> Callable[[Sequence[Item], int], list[Record]]:
    """The work of `records.process`: continuations of the text in `field`, each with its metrics."""

    def work(items: Sequence[Item], number: int) -> list[Record]:
        results: list[Record] = []
        prefixes, good = [], []
        for item in items:
            result: Record = {}
            try:
                prefixes += decoder.proposal.tokenize([item.record[field]])
                good.append(result)
            except InvalidInput as error:
                result["error"] = str(error).replace("prefix 0", "its text", 1)
            results.append(result)
        if not prefixes:
            return results
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LowEffectiveSampleSize)  # each result has its own ess
            decoded = decoder(prefixes, num_samples, batch_seed(seed, number))
        rows = zip(decoded.texts, decoded.ess.tolist(), decoded.log_z.tolist(), decoded.features.tolist(), strict=True)
        for result, (texts, ess, log_z, features) in zip(good, rows, strict=True):
            metrics = [dict(zip(decoder.energy.names, values, strict=True)) for values in features]
            result |= {"texts": texts, "metrics": metrics, "ess": ess, "log_z": log_z}
        return results

    return work


def repetition_of_texts(
    texts: Sequence[str], ngrams: Sequence[int], windows: Sequence[int], tokenizer: str | None
) -> tuple[list[str], Tensor]:
    """Column names, and [texts, columns] float32 repetition metrics. Without a tokenizer, tokens are words."""
    words: dict[str, int] = {}
    encode = None if tokenizer is None else load_tokenizer(tokenizer)
    rows: list[list[int]] = []
    tables: list[Tensor] = []
    widest = 0
    for text in tqdm(texts, desc="texts", disable=len(texts) < 10_000):
        row = [words.setdefault(w, len(words)) for w in text.split()] if encode is None else encode(text)["input_ids"]
        # Texts of any length go in batches of bounded size: one long text must not widen all of them.
        if rows and (len(rows) + 1) * max(widest, len(row)) > BATCH_TOKENS:
            tables.append(_repetition_of_rows(rows, ngrams, windows))
            rows, widest = [], 0
        rows.append(row)
        widest = max(widest, len(row))
    tables.append(_repetition_of_rows(rows, ngrams, windows))
    return [f"sr_{n}" for n in ngrams] + [f"tr_{w}" for w in windows], torch.cat(tables)


def _repetition_of_rows(rows: list[list[int]], ngrams: Sequence[int], windows: Sequence[int]) -> Tensor:
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    return ops.repetition(tokens, torch.tensor([len(row) for row in rows]), ngrams, windows)
