"""What a fit reads: metrics of the candidates of N prefixes, in one tensor or in blocks that needn't share one memory.

All that the fit asks of them is reductions over blocks, so that they can lie in memory, in files or on other machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from daemon_fast import ops
from daemon_fast.errors import InvalidInput
from daemon_fast.race import race_moments

__all__ = ["Block", "InMemory", "Samples", "centred", "tilted_moments"]

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """Metrics [n, M, K] of the candidates of n prefixes, float32 or float64; base log-weights [n, M], or None for 0."""

    features: Tensor
    base_log_w: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or self.features.shape[2] == 0:
            raise InvalidInput(f"features must have shape [N, M, K] with K >= 1, got {list(self.features.shape)}")
        if self.base_log_w is not None and self.base_log_w.shape != self.features.shape[:2]:
            n, m, _ = self.features.shape
            raise InvalidInput(f"base_log_w must have shape [N, M] = [{n}, {m}], got {list(self.base_log_w.shape)}")

    def log_w(self, mu: Tensor) -> Tensor:
        """[n, M] float64 on the block's device: b - mu · f."""
        log_w = -(self.features.double() @ mu.to(self.features.device))
        return log_w if self.base_log_w is None else log_w + self.base_log_w

    def less(self, centre: Tensor) -> Block:
        """The same of features - centre [K], in float64."""
        return Block(self.features.double() - centre.to(self.features.device), self.base_log_w)

    @property
    def excluded(self) -> Tensor | None:
        """[n, M, 1] bool: candidates of weight zero; None if there are no base log-weights."""
        return None if self.base_log_w is None else (self.base_log_w == -torch.inf)[..., None]


class Samples(Protocol):
    """Samples of N prefixes in blocks."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, M, K of all blocks together."""
        ...

    def map(self, function: Callable[[Block], T]) -> Iterable[T]:
        """What `function` returns for each block, in their order: a few numbers, on the CPU."""
        ...


@dataclass(frozen=True)
class InMemory:
    """One block, in memory."""

    block: Block

    @property
    def shape(self) -> tuple[int, int, int]:
        n, m, k = self.block.features.shape
        return n, m, k

    def map(self, function: Callable[[Block], T]) -> list[T]:
        return [function(self.block)]


@dataclass(frozen=True)
class _Centred:
    """Samples less a centre [K], block by block."""

    samples: Samples
    centre: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.samples.shape

    def map(self, function: Callable[[Block], T]) -> Iterable[T]:
        centre = self.centre
        return self.samples.map(lambda block: function(block.less(centre)))


def centred(samples: Samples, centre: Tensor) -> Samples:
    """The same with features - centre [K]."""
    return InMemory(samples.block.less(centre)) if isinstance(samples, InMemory) else _Centred(samples, centre)


def tilted_moments(
    samples: Samples, mu: Tensor, normalization: ops.Normalization, draw: ops.Draw = "sir"
) -> ops.Moments:
    """`ops.tilted_moments`, or `race_moments`, of all blocks together, on the CPU.

    Per prefix, log Z, mean and covariance are means over prefixes. Over all samples, a block counts by its share of
    the weight, and its mean's distance from that of all adds to the covariance.
    """

    def of_block(block: Block) -> tuple[int, ops.Moments]:
        if draw == "race":
            found = race_moments(block.features, block.log_w(mu))
        else:
            found = ops.tilted_moments(block.features, mu.to(block.features.device), block.base_log_w, normalization)
        return len(block.features), ops.Moments(*(part.cpu() for part in found))

    sizes, parts = zip(*samples.map(of_block), strict=True)
    if len(parts) == 1:
        first: ops.Moments = parts[0]
        return first
    log_z, mean, covariance = (torch.stack(column) for column in zip(*parts, strict=True))
    share = torch.tensor(sizes, dtype=torch.float64, device="cpu") / sum(sizes)
    if normalization == "per_prefix":
        return ops.Moments(share @ log_z, share @ mean, torch.tensordot(share, covariance, 1))
    of_all = torch.logsumexp(log_z + share.log(), 0)
    share = torch.exp(log_z + share.log() - of_all)
    apart = mean - share @ mean
    return ops.Moments(of_all, share @ mean, torch.tensordot(share, covariance, 1) + apart.T @ (share[:, None] * apart))
