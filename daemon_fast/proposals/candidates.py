"""A batch of continuations: what a proposal makes and metrics read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from daemon_fast.errors import InvalidInput
from daemon_fast.prompts import TAIL

__all__ = ["Candidates"]

Detokenize = Callable[[Sequence[Sequence[int]]], list[str]]

BROKEN = "\ufffd"  # what part of a character's bytes is decoded to


@dataclass(frozen=True)
class Candidates:
    """M continuations of each of N prefixes; row r = i * M + j is candidate j of prefix i, R = N * M.

    Attributes
    ----------
    tokens : [R, T] int64
        Continuations without their prefix. Only tokens[r, :lengths[r]] counts.
    lengths : [R] int64
    token_log_p : [R, T] float32
        log p_theta of each token at temperature 1, in nats. An end-of-text token is included also where it doesn't
        count towards the length; 0 behind the last token drawn; NaN where the engine doesn't tell.
    token_log_q : [R, T] float32
        The same under the proposal that drew them.
    prefix_tokens : N lists of token ids
    detokenize : turns lists of token ids into texts
    ended : [R] bool, or None
        Whether an end-of-text token ended it; one that was cut at the maximum length has not ended. None: not known.
    """

    tokens: Tensor
    lengths: Tensor
    token_log_p: Tensor
    token_log_q: Tensor
    prefix_tokens: list[list[int]]
    detokenize: Detokenize
    ended: Tensor | None = None

    def __post_init__(self) -> None:
        rows, n = self.tokens.shape[0], len(self.prefix_tokens)
        if n == 0 or rows % n:
            raise InvalidInput(f"tokens has {rows} rows, which is no multiple of the {n} prefixes")
        for name in ("token_log_p", "token_log_q"):
            if getattr(self, name).shape != self.tokens.shape:
                raise InvalidInput(
                    f"{name} has shape {list(getattr(self, name).shape)}, tokens has {list(self.tokens.shape)}"
                )
        for name in ("lengths", "ended"):
            value = getattr(self, name)
            if value is not None and value.shape != (rows,):
                raise InvalidInput(f"{name} has shape {list(value.shape)}, expected [{rows}]")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M): prefixes, and candidates of each."""
        n = len(self.prefix_tokens)
        return n, self.tokens.shape[0] // n

    @property
    def log_p(self) -> Tensor:
        """[N, M] float64: log p_theta(continuation | prefix) at temperature 1, that of its end-of-text included."""
        return self.token_log_p.double().sum(-1).reshape(self.shape)

    @property
    def log_q(self) -> Tensor:
        """[N, M] float64: log q(continuation | prefix) under the proposal.

        Raises
        ------
        InvalidInput
            The engine that drew them doesn't tell.
        """
        log_q = self.token_log_q.double().sum(-1).reshape(self.shape)
        if log_q.isnan().any():
            raise InvalidInput(
                "the engine gives no log-probabilities under the proposal, only those at temperature 1: tilt the "
                "proposal (base = 'proposal'), or draw at temperature 1 without top-k, top-p and min-p"
            )
        return log_q

    def of_prefix(self, i: int) -> Candidates:
        """Those of one prefix."""
        n, m = self.shape
        if n == 1 and i == 0:
            return self
        rows = slice(i * m, (i + 1) * m)
        return replace(
            self,
            tokens=self.tokens[rows],
            lengths=self.lengths[rows],
            token_log_p=self.token_log_p[rows],
            token_log_q=self.token_log_q[rows],
            prefix_tokens=self.prefix_tokens[i : i + 1],
            ended=None if self.ended is None else self.ended[rows],
        )

    @cached_property
    def texts(self) -> list[str]:
        """R continuation texts, each as it reads behind its prefix: the space between the two belongs to it."""
        return self.texts_of(range(len(self.tokens)))

    def texts_of(self, rows: Sequence[int]) -> list[str]:
        """Continuation texts of some rows only."""
        m, tokens, lengths = self.shape[1], self.tokens.tolist(), self.lengths.tolist()
        return texts_behind(self.prefix_tokens, [(r // m, tokens[r][: lengths[r]]) for r in rows], self.detokenize)

    @cached_property
    def prefix_texts(self) -> list[str]:
        """N prefix texts."""
        return self.detokenize(self.prefix_tokens)

    @staticmethod
    def from_rows(
        rows: Sequence[Sequence[int]],
        log_p: Sequence[Sequence[float]] | None,
        log_q: Sequence[Sequence[float]] | None,
        lengths: Sequence[int],
        prefix_tokens: list[list[int]],
        detokenize: Detokenize,
        ended: Sequence[bool] | None = None,
    ) -> Candidates:
        """From R lists of what each candidate drew, an end-of-text token that doesn't count included.

        log_p, log_q, ended : None where the engine doesn't tell. Of an empty row they are not known: what ended it is
            not among its tokens
        """
        width = max(1, *map(len, rows))

        def padded(lists: Sequence[Sequence[float]], dtype: Any) -> Tensor:  # NumPy takes a quarter of torch's time
            return torch.from_numpy(np.array([[*row, *[0] * (width - len(row))] for row in lists], dtype=dtype))

        def log_probs(lists: Sequence[Sequence[float]] | None) -> Tensor:
            if lists is None:
                return torch.full((len(rows), width), torch.nan, dtype=torch.float32, device="cpu")
            return padded([row or [torch.nan] for row in lists], np.float32)

        return Candidates(
            tokens=padded(rows, np.int64),
            lengths=torch.tensor(lengths, dtype=torch.int64, device="cpu"),
            token_log_p=log_probs(log_p),
            token_log_q=log_probs(log_q),
            prefix_tokens=prefix_tokens,
            detokenize=detokenize,
            ended=None if ended is None else torch.tensor(ended, dtype=torch.bool, device="cpu"),
        )

    @staticmethod
    def concatenate(parts: Sequence[Candidates]) -> Candidates:
        """Join batches of prefixes; widths T may differ."""
        if not parts:
            raise InvalidInput("there are no candidates to concatenate")
        if len(parts) == 1:
            return parts[0]
        width = max(part.tokens.shape[1] for part in parts)

        def join(name: str) -> Tensor:
            columns = [getattr(part, name) for part in parts]
            return torch.cat([torch.nn.functional.pad(c, (0, width - c.shape[1])) for c in columns])

        known = [part.ended for part in parts if part.ended is not None]
        return Candidates(
            tokens=join("tokens"),
            lengths=torch.cat([part.lengths for part in parts]),
            token_log_p=join("token_log_p"),
            token_log_q=join("token_log_q"),
            prefix_tokens=[prefix for part in parts for prefix in part.prefix_tokens],
            detokenize=parts[0].detokenize,
            ended=torch.cat(known) if len(known) == len(parts) else None,
        )


def texts_behind(
    prefixes: Sequence[Sequence[int]], rows: Sequence[tuple[int, Sequence[int]]], detokenize: Detokenize
) -> list[str]:
    """Texts of continuations as they read behind their prefixes: the text of both, less that of the prefix.

    A continuation decoded alone isn't what the model wrote: tokenizers of SentencePiece's kind drop a text's first
    space, byte-level ones can't read a character of which the prefix has the first bytes, and spaces before punctuation
    may be cleaned up.

    Parameters
    ----------
    prefixes : N lists of token ids
    rows : the number of its prefix, and the token ids of each continuation
    """
    if not rows:
        return []
    whole = detokenize(prefixes)
    tails = [list(prefix[-TAIL:]) for prefix in prefixes]
    # A tail does where its text is the end of the prefix's: not if it begins within a character, or shows nothing, so
    # that the first space would be dropped behind it.
    ends = [
        (tail, end) if end.strip() and BROKEN not in end and text.endswith(end) else (list(prefix), text)
        for prefix, text, tail, end in zip(prefixes, whole, tails, detokenize(tails), strict=True)
    ]
    both = detokenize([[*ends[i][0], *row] for i, row in rows])
    texts = [_less(ends[i][1], text) for (i, _), text in zip(rows, both, strict=True)]
    lost = [r for r, text in enumerate(texts) if text is None]
    alone = dict(zip(lost, detokenize([rows[r][1] for r in lost]), strict=True)) if lost else {}
    return [alone[r] if text is None else text for r, text in enumerate(texts)]


def _less(before: str, text: str) -> str | None:
    """`text` less `before`, which it begins with; None where what follows changed more than the border."""
    if text.startswith(before):
        return text[len(before) :]
    whole_characters = before.rstrip(BROKEN)
    if whole_characters != before and text.startswith(whole_characters):
        return text[len(whole_characters) :]  # the prefix ended within a character
    at = 0
    for letter in "".join(before.split()):  # spaces at the border were cleaned up
        while at < len(text) and text[at].isspace():
            at += 1
        if text[at : at + 1] != letter:
            return None
        at += 1
    # A space that was one byte of a row of them isn't cleaned up: broken characters stand in its place, too.
    return None if text[at:].startswith(BROKEN) else text[at:]
