"""Seeds of a run's batches and of its uses, each independent of the others.

Two uses of one seed must not share numbers. If they did, the uniform that drew a candidate's first token would choose
among the candidates, too, and what is chosen would no longer follow the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from daemon_fast.errors import InvalidInput

if TYPE_CHECKING:
    import torch

__all__ = ["batch_seed", "check_seed", "generator", "stream"]


def check_seed(seed: int) -> None:
    """Raise InvalidInput for a seed that is no run's."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise InvalidInput(f"seed = {seed!r} must be an integer from 0 to 2^63 - 1")


def batch_seed(seed: int, batch: int) -> int:
    """An independent seed for each batch of a run, from 0 to 2^63 - 1.

    Raises
    ------
    InvalidInput
        A seed out of this range.
    """
    check_seed(seed)
    return _first(np.random.SeedSequence([seed, batch]))


def stream(seed: int, use: str) -> int:
    """An independent seed for each use of a seed, from 0 to 2^63 - 1.

    Raises
    ------
    InvalidInput
        A seed out of this range.
    """
    check_seed(seed)
    return _first(np.random.SeedSequence(seed, spawn_key=tuple(use.encode())))


def generator(seed: int, use: str) -> torch.Generator:
    """The random numbers, on the CPU, of one use of a seed."""
    import torch  # files of records need seeds, and no torch

    return torch.Generator().manual_seed(stream(seed, use))


def _first(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
