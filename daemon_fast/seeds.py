"""Seeds of a run's batches and uses, each independent of the others.

Two uses of one seed must not share numbers: the uniform that drew a candidate's first token would choose among the
candidates, too, and what is chosen would no longer follow the weights.
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["batch_seed", "generator", "stream"]


def batch_seed(seed: int, batch: int) -> int:
    """An independent seed for each batch of a run, from 0 to 2^63 - 1."""
    return _state(np.random.SeedSequence([seed % 2**64, batch]))


def stream(seed: int, use: str) -> int:
    """An independent seed for each use of a seed, from 0 to 2^63 - 1."""
    return _state(np.random.SeedSequence(seed % 2**64, spawn_key=tuple(use.encode())))


def generator(seed: int, use: str) -> torch.Generator:
    """Random numbers on the CPU for one use of a seed."""
    return torch.Generator().manual_seed(stream(seed, use))


def _state(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
