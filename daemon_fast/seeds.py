"""Seeds of a run's batches, each independent of the others."""

from __future__ import annotations

import numpy as np

__all__ = ["batch_seed"]


def batch_seed(seed: int, batch: int) -> int:
    """An independent seed for each batch of a run, from 0 to 2^63 - 1."""
    return int(np.random.SeedSequence([seed, batch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
