"""What users give for arguments, as what the code behind them takes: one check of each kind, and one wording."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from daemon_fast.errors import InvalidInput

__all__ = ["integer", "number", "one_of", "real_tensor", "strings"]


def integer(name: str, value: Any, limit: str, within: Callable[[int], bool]) -> int:
    """An int, NumPy's included, as int; a bool is none.

    Parameters
    ----------
    limit : such as ">= 1", as it is told
    within : whether a value is

    Raises
    ------
    InvalidInput
    """
    try:
        whole = None if _is_bool(value) or getattr(value, "ndim", 0) > 0 else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        raise InvalidInput(f"{name} = {reprlib.repr(value)} must be an integer {limit}")
    if not within(whole):
        raise InvalidInput(f"{name} = {whole} must be {limit}")
    return whole


def number(name: str, value: Any, limit: str, within: Callable[[float], bool]) -> float:
    """A real number, NumPy's included, as float. See `integer`."""
    if _is_bool(value) or not isinstance(value, Real):
        raise InvalidInput(f"{name} = {reprlib.repr(value)} must be a number {limit}")
    try:
        real = float(value)
    except OverflowError:  # an integer
        real = math.inf if operator.gt(value, 0) else -math.inf
    if not within(real):
        raise InvalidInput(f"{name} = {reprlib.repr(value)} must be {limit}")
    return real


def one_of(name: str, value: Any, options: Sequence[str]) -> None:
    """Raise InvalidInput for another value."""
    if value not in options:
        raise InvalidInput(f"{name} = {value!r} must be one of {', '.join(options)}")


def strings(name: str, value: Any) -> tuple[str, ...]:
    """A list of strings, one at least."""
    listed = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if not listed or not all(isinstance(item, str) for item in listed):
        raise InvalidInput(f"{name} = {reprlib.repr(value)} must be a list of strings")
    return listed


def real_tensor(said: str, value: Any) -> Tensor:
    """A dense tensor of real numbers; arrays and lists are taken, too.

    Parameters
    ----------
    said : how the error begins: "mu is"

    Returns
    -------
    float32 of float32 and narrower floats, which it holds exactly; float64 of all else

    Raises
    ------
    InvalidInput
    """
    try:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(f"{said} {reprlib.repr(value)}: it must be a tensor of real numbers") from None
    if tensor.is_complex() or tensor.layout is not torch.strided or tensor.is_meta:
        kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}".replace("torch.", "")
        raise InvalidInput(f"{said} a tensor of {kind}: it must be a dense one of real numbers")
    narrow = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return tensor.to(torch.float32 if narrow else torch.float64)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) in (np.dtype(bool), torch.bool)
