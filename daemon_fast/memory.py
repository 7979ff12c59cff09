"""How much memory there is, and refusals of what can't fit in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from daemon_fast.errors import InvalidInput

if TYPE_CHECKING:
    from daemon_fast.proposals.base import ProposalSettings

__all__ = ["available", "check_candidates", "check_fits"]

TOKEN_BYTES = 8 + 4 + 4  # a token id, log p and log q
CGROUP = Path("/sys/fs/cgroup")
SMALL = 2**24  # bytes that are there: to read how many there are would take longer than to allocate them


def available(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device, at most; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    limits = [_in_use_by_nobody(), _limit_of_container()]
    return min((limit for limit in limits if limit is not None), default=None)


def check_fits(what: str, needed: Mapping[str, int], device: torch.device, lower: str) -> None:
    """Refuse an allocation before it is begun.

    Parameters
    ----------
    what : is asked for, with the values of its arguments
    needed : bytes of each part; a lower bound, so that only what can't fit is refused
    lower : the arguments to make smaller

    Raises
    ------
    InvalidInput
        Names what needs how much, and how much there is.
    """
    total = sum(needed.values())
    if total <= SMALL or (limit := available(device)) is None or total <= limit:
        return
    parts = ", ".join(f"{name} {_readable(size)}" for name, size in needed.items())
    raise InvalidInput(
        f"{what} takes at least {_readable(total)} of memory ({parts}), and there are {_readable(limit)} ({device}): "
        f"lower {lower}"
    )


def check_candidates(
    settings: ProposalSettings, num_prefixes: int, device: torch.device | None = None, **more: int
) -> None:
    """Refuse a batch of candidates that can't fit: see `check_fits`.

    Parameters
    ----------
    num_prefixes : whose candidates are drawn together
    device : that holds them; default: the CPU
    more : bytes of what an engine needs beside tokens and log-probabilities
    """
    m, steps = settings.num_candidates, settings.max_new_tokens
    check_fits(
        f"num_candidates = {m} of {num_prefixes} prefixes together, {steps} tokens each,",
        {"tokens and log-probabilities": num_prefixes * m * steps * TOKEN_BYTES, **more},
        device or torch.device("cpu"),
        "num_candidates, or the number of prefixes drawn together (batch_size)",
    )


def _in_use_by_nobody() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
        return 1024 * (kib["MemAvailable"] + kib.get("SwapFree", 0))
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:  # not Linux: all that there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _limit_of_container() -> int | None:
    """Of the control group that this process sees as its root: version 2, then 1."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return int((CGROUP / name).read_text(encoding="ascii"))
        except (OSError, ValueError):  # "max": no limit
            continue
    return None


def _readable(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size < 1e13 else f"{size / 1e12:.0f} TB"
