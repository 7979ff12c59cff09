"""The repetition rules of Gopher: shares of a text that its repeated lines, paragraphs and word n-grams take up.

Rae et al. 2021 (arXiv 2112.11446), table A1, as datatrove's `GopherRepetitionFilter` has them, to the last digit; in
plain Python they stand in `daemon_fast.reference`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cache
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from daemon_fast import extension
from daemon_fast.errors import InvalidInput

__all__ = ["GOPHER_THRESHOLDS", "gopher_repetition", "gopher_violations", "split_words"]

extension.load()  # registers the operators
_ops = torch.ops.daemon_fast

# A text that exceeds one of them is left out; in datatrove's names, and in the order in which it looks at them.
GOPHER_THRESHOLDS = {
    "dup_para_frac": 0.3,
    "dup_para_char_frac": 0.2,
    "dup_line_frac": 0.3,
    "dup_line_char_frac": 0.2,
    "top_2_gram": 0.20,
    "top_3_gram": 0.18,
    "top_4_gram": 0.16,
    "duplicated_5_n_grams": 0.15,
    "duplicated_6_n_grams": 0.14,
    "duplicated_7_n_grams": 0.13,
    "duplicated_8_n_grams": 0.12,
    "duplicated_9_n_grams": 0.11,
    "duplicated_10_n_grams": 0.10,
}
TOP, DUPLICATED = (2, 3, 4), (5, 6, 7, 8, 9, 10)
WORD = re.compile(r"\w+|[^\w\s]")
PARAGRAPH_BREAK, LINE_BREAK = re.compile(r"\n{2,}"), re.compile(r"\n+")
BATCH_TEXTS = 256  # whose words are looked at in one call of the operator

# What the operator takes: a code point c; BY_ITSELF - c for one that is a word by itself; BETWEEN_WORDS.
BETWEEN_WORDS, BY_ITSELF = -1, -2

Words = tuple[NDArray[np.int32], NDArray[np.int64]]  # [C] of such, and [N] where each text ends in them


def gopher_repetition(texts: Sequence[str], words: Sequence[Sequence[str]] | None = None) -> Tensor:
    """The thirteen fractions that Gopher's repetition rules limit.

    Parameters
    ----------
    texts : N strings
    words : of each text, split by another tokenizer; default: those of `split_words`

    Returns
    -------
    [N, 13] float64, on the CPU
        In the order of `GOPHER_THRESHOLDS`. NaN for an empty text, which has no fractions.
        dup_para_frac, dup_line_frac: the share of paragraphs (between empty lines) and of lines that occurred before.
        dup_para_char_frac, dup_line_char_frac: their characters, of all of the text.
        top_n_gram: the characters of the most frequent n-gram, spaces between its words included, times how often it
        occurs; of a text without a repeated n-gram, of its first one.
        duplicated_n_n_grams: the characters of n-grams that occurred before, each counted once, spaces left out.
        For fewer than n words both are 0.

    Raises
    ------
    InvalidInput
        Words of more or fewer texts than there are, or an empty word.

    Examples
    --------
    >>> from daemon_fast.gopher import gopher_repetition, gopher_violations
    >>> found = gopher_repetition(["Buy now! Buy now! Buy now!"])
    >>> found[0, 4]  # "Buy now" thrice: 21 of 26 characters
    tensor(0.8077, dtype=torch.float64)
    >>> gopher_violations(found).any(dim=1)
    tensor([True])
    """
    if words is not None and len(words) != len(texts):
        raise InvalidInput(f"words are those of {len(words)} texts, but there are {len(texts)} texts")
    for i, row in enumerate(words or ()):
        if "" in row:
            raise InvalidInput(f"words[{i}][{list(row).index('')}] is empty: a word has one character at least")
    counts = np.zeros((len(texts), len(GOPHER_THRESHOLDS)))
    sizes = np.ones_like(counts)
    for begin in range(0, len(texts), BATCH_TEXTS):
        batch = slice(begin, begin + BATCH_TEXTS)
        split = _split(texts[batch]) if words is None else _given(words[batch])
        counts[batch, 4:] = _ops.gopher_repetition(*map(torch.from_numpy, split), TOP, DUPLICATED)
        sizes[batch] = np.array([len(text) or np.nan for text in texts[batch]])[:, None]
    for i, text in enumerate(texts):
        if "\n" in text:
            for column, parts in ((0, PARAGRAPH_BREAK.split(text.strip())), (2, LINE_BREAK.split(text))):
                counts[i, column : column + 2] = _duplicates(parts)
                sizes[i, column] = len(parts)
    return torch.from_numpy(counts / sizes)


def gopher_violations(fractions: Tensor) -> Tensor:
    """[N, 13] bool: which of `gopher_repetition`'s fractions exceed their threshold. None do of an empty text."""
    return fractions > torch.tensor(list(GOPHER_THRESHOLDS.values()), dtype=torch.float64, device=fractions.device)


@torch.library.register_fake("daemon_fast::gopher_repetition")  # type: ignore[untyped-decorator]
def _(characters: Tensor, text_ends: Tensor, top: Sequence[int], duplicated: Sequence[int]) -> Tensor:
    return text_ends.new_empty((text_ends.shape[0], len(top) + len(duplicated)))


def split_words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, and every other character that is not white space by itself."""
    return WORD.findall(text)


@cache
def _marks() -> NDArray[np.int32]:
    """Of each code point what the operator takes, for words as `WORD` finds them."""
    marks = np.arange(sys.maxunicode + 1, dtype=np.int32)
    every = "".join(map(chr, marks.tolist()))
    for found in re.finditer(r"[^\w\s]+", every):
        marks[slice(*found.span())] = BY_ITSELF - marks[slice(*found.span())]
    for found in re.finditer(r"\s+", every):
        marks[slice(*found.span())] = BETWEEN_WORDS
    return marks


def _split(texts: Sequence[str]) -> Words:
    """`split_words` of each text, in an eighth of its time."""
    return _marks()[_code_points("".join(texts))], np.cumsum([len(text) for text in texts], dtype=np.int64)


def _given(words: Sequence[Sequence[str]]) -> Words:
    flat = list(chain.from_iterable(words))
    ends = np.cumsum(np.fromiter(map(len, flat), np.int64, len(flat)))
    characters = np.insert(_code_points("".join(flat)), ends, BETWEEN_WORDS)
    return characters, np.cumsum([sum(map(len, row)) + len(row) for row in words], dtype=np.int64)


def _code_points(text: str) -> NDArray[np.int32]:
    return np.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), np.int32)


def _duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts occurred before, and the characters in them."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count, characters = count + 1, characters + len(part)
        seen.add(part)
    return count, characters
