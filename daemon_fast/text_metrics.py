"""Metrics of texts, without a model: repetition of words, characters or tokens, Gopher's rules, distinct n-grams."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import numpy as np
import regex
import torch
from numpy.typing import NDArray
from torch import Tensor

from daemon_fast import ops
from daemon_fast.data.formats import SURROGATE, to_json, valid_json
from daemon_fast.data.records import Item, Record, lookup
from daemon_fast.errors import InvalidInput, Problems, UnknownMetric
from daemon_fast.filters import Filter
from daemon_fast.gopher import GOPHER_THRESHOLDS, gopher_repetition, gopher_violations
from daemon_fast.models import load_tokenizer

__all__ = ["Batch", "DistinctNGrams", "Measured", "Summary", "TextMetrics", "measure_records"]

Split = Callable[[Sequence[str]], list[list[Any]]]
GOPHER_COLUMNS = (*GOPHER_THRESHOLDS, "gopher_violations")
KNOWN = f"sr_<n>, tr_<w>, {', '.join(GOPHER_COLUMNS)}"
CHARACTER = regex.compile(r"\X")
BATCH_TOKENS = 1 << 22  # of texts whose repetition is counted in one call
BATCH_RECORDS, BATCH_CHARACTERS = 256, 1 << 20  # that are measured together
# Longer words on average than any language has that puts spaces between them, in texts of some length.
DENSE_LENGTH, DENSE_WORD = 20, 12


class TextMetrics:
    """Repetition metrics of texts.

    Parameters
    ----------
    ngrams, windows : n of each sr_n, and w of each tr_w (definitions in `daemon_fast.repetition`)
    unit : what they count
        "word": what stands between white space. "character": extended grapheme clusters (what a reader takes for one
        character, `\\X` of Unicode), white space left out; for text that is written without spaces.
    tokenizer : str, optional
        Hugging Face id, folder or GGUF file: tokens are counted instead. Special tokens never are, neither those that
        the tokenizer adds nor those that a text spells out; the token for what is unknown is counted.
    gopher : the thirteen fractions of `gopher_repetition` too, and gopher_violations: how many exceed their threshold

    Attributes
    ----------
    names : of the columns
    distinct : DistinctNGrams or None
        Set it, and n-grams of all texts measured are counted.
    """

    def __init__(
        self,
        ngrams: Sequence[int] = (2, 3, 4),
        windows: Sequence[int] = (8, 16, 32),
        unit: str = "word",
        tokenizer: str | None = None,
        gopher: bool = False,
    ) -> None:
        if unit not in ("word", "character"):
            raise InvalidInput(f"unit = {unit!r} must be 'word' or 'character'")
        self.ngrams, self.windows, self.gopher = tuple(ngrams), tuple(windows), gopher
        self._characters = unit == "character"
        self._tokens = None if tokenizer is None else _tokens(tokenizer)
        self._split: Split = self._tokens or (_characters if self._characters else _words)
        self.names = [f"sr_{n}" for n in ngrams] + [f"tr_{w}" for w in windows]
        self.names += GOPHER_COLUMNS if gopher else ()
        self.distinct: DistinctNGrams | None = None
        self._ids: defaultdict[Any, int] = defaultdict(count().__next__)

    @classmethod
    def named(cls, names: Iterable[str], unit: str = "word", tokenizer: str | None = None) -> TextMetrics:
        """Those that have the metrics of these names.

        Raises
        ------
        UnknownMetric
        SeveralProblems
            Several unknown names.
        """
        sizes: dict[str, list[int]] = {"sr": [], "tr": []}
        gopher, problems = False, Problems()
        for name in names:
            if match := re.fullmatch(r"(sr|tr)_([1-9]\d{0,8})", name):
                sizes[match[1]].append(int(match[2]))
            elif name in GOPHER_COLUMNS:
                gopher = True
            else:
                problems.found.append(UnknownMetric(f"unknown metric {name!r}; known: {KNOWN}"))
        problems.report()
        return cls(sizes["sr"], sizes["tr"], unit, tokenizer, gopher)

    def __call__(self, texts: Sequence[str]) -> Measured:
        """Measure texts; one without any word, character or token is empty."""
        units = self._split(texts)
        rows: list[list[int]] = units
        if self._tokens is None:
            rows = [list(map(self._ids.__getitem__, row)) for row in units]
        if self.distinct is not None:
            self.distinct.add(rows)
        else:
            self._ids.clear()  # they need to agree within a text only
        columns = dict(zip(self.names, _repetition(rows, self.ngrams, self.windows).unbind(1), strict=False))
        if self.gopher:
            values = gopher_repetition(texts, units if self._characters and self._tokens is None else None)
            violations = gopher_violations(values).sum(1).double()
            columns |= dict(zip(GOPHER_COLUMNS, [*values.unbind(1), violations], strict=True))
        empty = torch.tensor([not row for row in rows], dtype=torch.bool)
        for name, column in columns.items():
            columns[name] = column.masked_fill(empty, torch.nan)
        dense = 0
        if self._split is _words:
            dense = sum(
                len(text) >= DENSE_LENGTH and len(text) > DENSE_WORD * len(row)
                for text, row in zip(texts, rows, strict=True)
            )
        return Measured(columns, empty, dense)


@dataclass(frozen=True)
class Measured:
    """Metrics of N texts.

    Attributes
    ----------
    columns : a tensor [N] for each metric, float32 for sr_n and tr_w and float64 for Gopher's; NaN for an empty text
    empty : [N] bool
    dense : number of texts with more than twelve characters a word, as text that is written without spaces has
    """

    columns: dict[str, Tensor]
    empty: Tensor
    dense: int = 0


def _words(texts: Sequence[str]) -> list[list[str]]:
    return [text.split() for text in texts]


def _characters(texts: Sequence[str]) -> list[list[str]]:
    return [[character for character in CHARACTER.findall(text) if not character.isspace()] for text in texts]


def _tokens(tokenizer: str) -> Split:
    loaded = load_tokenizer(tokenizer)
    ends = {getattr(loaded, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep", "pad", "mask")}
    special = set(loaded.all_special_ids) - ({loaded.unk_token_id} - ends)

    def split(texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        rows = loaded(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [[token for token in row if token not in special] for row in rows]

    return split


def _repetition(rows: Sequence[list[int]], ngrams: Sequence[int], windows: Sequence[int]) -> Tensor:
    """[N, len(ngrams) + len(windows)] float32. One long text must not widen all others: batches are of bounded size."""
    tables, batch, widest = [torch.empty(0, len(ngrams) + len(windows))], list[Tensor](), 0
    for i, row in enumerate(rows):
        batch.append(torch.tensor(row, dtype=torch.int64))
        widest = max(widest, len(row))
        following = len(rows[i + 1]) if i + 1 < len(rows) else BATCH_TOKENS + 1
        if (len(batch) + 1) * max(widest, following) > BATCH_TOKENS:
            tokens = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            tables.append(ops.repetition(tokens, torch.tensor([len(row) for row in batch]), ngrams, windows))
            batch, widest = [], 0
    return torch.cat(tables)


class DistinctNGrams:
    """Distinct-n of a corpus, exactly: distinct n-grams over all n-grams of all its texts (Li et al. 2016).

    Holds 4 bytes a token, and about 70 while they are counted; `TextMetrics` holds each word of the corpus once.
    """

    def __init__(self) -> None:
        self._tokens: list[NDArray[np.uint32]] = []
        self._lengths: list[NDArray[np.int64]] = []

    def add(self, rows: Sequence[Sequence[int]]) -> None:
        """Texts as ids in [0, 2^32)."""
        self._lengths.append(np.array([len(row) for row in rows], np.int64))
        self._tokens.append(np.fromiter(chain.from_iterable(rows), np.uint32, int(self._lengths[-1].sum())))

    def counts(self, ngrams: Sequence[int]) -> list[tuple[int, int]]:
        """(distinct, all) n-grams for each n."""
        lengths = np.concatenate([np.zeros(0, np.int64), *self._lengths])
        ranks = np.concatenate([np.zeros(0, np.uint32), *self._tokens])
        left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(ranks))  # tokens to the end of the text

        def keys(n: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
            """Where n-grams begin, and what tells them apart: ranks of their first and last `size` tokens."""
            begins = np.flatnonzero(left >= n)
            return begins, ranks[begins].astype(np.uint64) << np.uint64(32) | ranks[begins + (n - size)]

        size, found = 1, {}
        for n in sorted(set(ngrams)):
            while 2 * size <= n:
                begins, pairs = keys(2 * size)
                order = np.argsort(pairs)
                ranks = np.zeros_like(ranks)
                ranks[begins[order]] = _changes(pairs[order])
                size *= 2
            pairs = keys(n)[1]
            pairs.sort()
            found[n] = int(_changes(pairs)[-1]) + 1 if len(pairs) else 0, len(pairs)
        return [found[n] for n in ngrams]


def _changes(ordered: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """How many different values come before each."""
    return np.cumsum(np.append(False, ordered[1:] != ordered[:-1])[: len(ordered)], dtype=np.uint32)


@dataclass(frozen=True)
class Batch:
    """Records of a file, and metrics of those that can be used.

    Attributes
    ----------
    problems : of each record, why it can't be used; None if it can
    measured : of the texts of those that can
    """

    items: list[Item]
    problems: list[str | None]
    measured: Measured

    def rows(self, id_field: str | None) -> Iterator[str]:
        """Of each record, as JSON, where it stands and its id, and its metrics or its error.

        An empty text has "empty": true and metrics of None. By default the id is what a record has in "id", if it has.
        """
        names, columns = list(self.measured.columns), [c.tolist() for c in self.measured.columns.values()]
        measured = zip(self.measured.empty.tolist(), zip(*columns, strict=True), strict=True)
        for item, problem in zip(self.items, self.problems, strict=True):
            row: Record = {"source": item.source, item.unit: item.number}
            identity = {"id": lookup(item.record, id_field or "id")}
            if (id_field is not None or "id" in item.record) and _unwritable(identity) is None:
                row |= identity
            if problem is not None:
                row["error"] = problem
            else:
                empty, values = next(measured)
                row |= {"empty": True, **dict.fromkeys(names)} if empty else dict(zip(names, values, strict=True))
            yield to_json(row)

    def passing(self, condition: Filter) -> Iterator[str]:
        """Records, as JSON, whose metrics meet the condition; those of an empty text meet none."""
        passes = iter((condition(self.measured.columns) & ~self.measured.empty).tolist())
        for item, problem in zip(self.items, self.problems, strict=True):
            if problem is None and next(passes):
                yield to_json(item.record) if item.line is None else valid_json(item.line)


def measure_records(items: Iterable[Item], metrics: TextMetrics) -> Iterator[Batch]:
    """Metrics of the records' texts, batch after batch of bounded size.

    A record with half a surrogate pair, which JSON can spell and UTF-8 can't hold, can't be used, in whichever field.
    """
    batch: list[Item] = []
    problems: list[str | None] = []
    texts: list[str] = []
    characters = 0
    for item in items:
        problem = item.problem or _unwritable(item.record)
        batch.append(item)
        problems.append(problem)
        if problem is None:
            texts.append(item.text)
            characters += len(texts[-1])
        if len(batch) == BATCH_RECORDS or characters > BATCH_CHARACTERS:
            yield Batch(batch, problems, metrics(texts))
            batch, problems, texts, characters = [], [], [], 0
    if batch:
        yield Batch(batch, problems, metrics(texts))


class Summary:
    """What was found in batch after batch.

    Attributes
    ----------
    records, texts, empty, unusable : their number; a text is neither empty nor unusable
    problems : the first ten
    dense : number of texts that seem to be written without spaces
    mean : [K] float64 over the texts
    """

    def __init__(self) -> None:
        self.records = self.texts = self.empty = self.unusable = self.dense = 0
        self.problems: list[str] = []
        self.mean, self._squares = torch.zeros(()), torch.zeros(())

    def add(self, batch: Batch) -> None:
        for item, problem in zip(batch.items, batch.problems, strict=True):
            if problem is not None:
                self.unusable += 1
                if len(self.problems) < 10:
                    self.problems.append(f"{item.where} {problem}")
        found = batch.measured
        self.records += len(batch.items)
        self.empty += int(found.empty.sum())
        self.dense += found.dense
        values = torch.stack([column.double() for column in found.columns.values()], 1)[~found.empty]
        if not len(values):
            return
        # Chan et al. 1979: squares are about the mean, so that nothing cancels.
        mean, total = values.mean(0), self.texts + len(values)
        away = mean - self.mean
        self._squares = self._squares + (values - mean).square().sum(0) + away**2 * (self.texts * len(values) / total)
        self.mean, self.texts = self.mean + away * (len(values) / total), total

    @property
    def standard_error(self) -> Tensor:
        """[K] float64; NaN for a single text."""
        return (self._squares / (self.texts - 1) / self.texts).sqrt() if self.texts > 1 else self.mean * torch.nan


def _unwritable(record: Record) -> str | None:
    try:
        text = json.dumps(record, ensure_ascii=False, default=str)
    except RecursionError:
        return "is nested too deeply"
    half = None if text.isascii() else SURROGATE.search(text)
    return None if half is None else f"has half a surrogate pair, \\u{ord(half[0]):04x}, in one of its fields"
