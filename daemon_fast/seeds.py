"""Seeds of a run's batches, each independent of the others."""

from __future__ import annotations

import numpy as np

from daemon_fast.errors import InvalidInput

__all__ = ["batch_seed", "check_seed"]


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
    return int(np.random.SeedSequence([seed, batch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
