"""A batch of continuations: what a proposal makes and metrics read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from daemon_fast.errors import InvalidInput

__all__ = ["Candidates"]

Detokenize = Callable[[Sequence[Sequence[int]]], list[str]]


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
    """

    tokens: Tensor
    lengths: Tensor
    token_log_p: Tensor
    token_log_q: Tensor
    prefix_tokens: list[list[int]]
    detokenize: Detokenize

    def __post_init__(self) -> None:
        rows, n = self.tokens.shape[0], len(self.prefix_tokens)
        if n == 0 or rows % n:
            raise InvalidInput(f"tokens has {rows} rows, which is no multiple of the {n} prefixes")
        for name in ("token_log_p", "token_log_q"):
            if getattr(self, name).shape != self.tokens.shape:
                raise InvalidInput(
                    f"{name} has shape {list(getattr(self, name).shape)}, tokens has {list(self.tokens.shape)}"
                )
        if self.lengths.shape != (rows,):
            raise InvalidInput(f"lengths has shape {list(self.lengths.shape)}, expected [{rows}]")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M): prefixes, and candidates of each."""
        n = len(self.prefix_tokens)
        return n, self.tokens.shape[0] // n

    @property
    def log_p(self) -> Tensor:
        """[N, M] float64: log p_theta(continuation | prefix) at temperature 1."""
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

    @cached_property
    def texts(self) -> list[str]:
        """R continuation texts."""
        lengths = self.lengths.tolist()
        return self.detokenize([row[:n] for row, n in zip(self.tokens.tolist(), lengths, strict=True)])

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
    ) -> Candidates:
        """From R lists of what each candidate drew, an end-of-text token that doesn't count included.

        log_p, log_q : None where the engine doesn't tell
        """
        width = max(map(len, rows))

        def padded(lists: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
            return torch.tensor([[*row, *[0] * (width - len(row))] for row in lists], dtype=dtype)

        unknown = torch.full((len(rows), width), torch.nan)
        return Candidates(
            tokens=padded(rows, torch.int64),
            lengths=torch.tensor(lengths, dtype=torch.int64),
            token_log_p=unknown if log_p is None else padded(log_p, torch.float32),
            token_log_q=unknown if log_q is None else padded(log_q, torch.float32),
            prefix_tokens=prefix_tokens,
            detokenize=detokenize,
        )

    @staticmethod
    def concatenate(parts: Sequence[Candidates]) -> Candidates:
        """Join batches of prefixes; widths T may differ."""
        if not parts:
            raise InvalidInput("there are no candidates to concatenate")
        width = max(part.tokens.shape[1] for part in parts)

        def join(name: str) -> Tensor:
            columns = [getattr(part, name) for part in parts]
            return torch.cat([torch.nn.functional.pad(c, (0, width - c.shape[1])) for c in columns])

        return Candidates(
            tokens=join("tokens"),
            lengths=torch.cat([part.lengths for part in parts]),
            token_log_p=join("token_log_p"),
            token_log_q=join("token_log_q"),
            prefix_tokens=[prefix for part in parts for prefix in part.prefix_tokens],
            detokenize=parts[0].detokenize,
        )
