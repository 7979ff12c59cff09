"""A make-believe CUDA device, where there is none: tensors that say cuda:0 and are computed on the CPU.

What a real device refuses, this one refuses: operands that lie elsewhere, and inside a capture whatever waits for the
device or copies between it and the host. A capture changes nothing and records operators, with their memory and
whatever else they were given; a replay runs them again, on what lies there by then. A capture in which something was
refused can't end, and leaves behind what it does with CUDA: an allocator in its pool, a generator without numbers.

Only for a torch without CUDA: one with it chooses kernels that the CPU lacks. Not shown: what CUDA's own kernels
compute and how fast, streams, its allocator, its choice of attention kernels.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import itertools
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Operators whose result or its shape the host must see before it goes on.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim",
    "unique_consecutive", "allclose", "bincount",
}  # fmt: skip


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.to(out_dtype) @ b.to(out_dtype)


def _histc(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    return torch.histc(x.float(), bins, min, max).to(x.dtype)


HAS_CUDA = torch.version.cuda is not None
ONLY_ON_CUDA = {torch.ops.aten.mm.dtype: _mm, torch.ops.aten.histc.default: _histc}


class OnDevice(Tensor):
    """A tensor of the device; `inner` is its memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device("cuda", 0), requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} on the make-believe device, outside of it")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"


class Device(TorchDispatchMode):
    """
    Attributes
    ----------
    waits : how often an operator waited for the device, by its name
    began, captured, replayed : numbers of captures that began and ended well, and of replays
    pools : of the captures
    broken : whether something was refused in the capture that goes on
    allocates_in : pools of the captures that have not ended
    generates : whether there are random numbers outside of a capture
    stream : the current one
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.began = self.captured = self.replayed = 0
        self.pools: set[Any] = set()
        self.broken, self.generates, self.stream = False, True, _Stream()
        self.allocates_in: list[Any] = []
        self.tape: list[Any] | None = None  # of the capture that goes on
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}  # by storage: a flat view of it, and what it held before
        self.own: set[int] = set()  # storages made inside the capture

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        here = [x for x in leaves if isinstance(x, OnDevice)]
        device = kwargs.get("device")
        if not here and not any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves):
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__.split(".")[-1]
        with self:  # in inference mode, operators made of others come whole
            if (out := function.decompose(*args, **kwargs)) is not NotImplemented:
                return out
        self._refuse(name, args, kwargs, [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, OnDevice)])
        on_host = device is not None and torch.device(device).type != "cuda"
        inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
        if self.tape is not None:
            self._save_what_is_written(function, inner_args, inner_kwargs)
        out = ONLY_ON_CUDA.get(function, function)(*inner_args, **inner_kwargs)
        if self.tape is not None:
            self._record(function, inner_args, inner_kwargs, out)
        if on_host:
            return out
        same = {id(x.inner): x for x in here}  # an operator in place returns what it was given
        return tree_map(lambda x: _on_device(x, same) if isinstance(x, Tensor) else x, out)

    def _refuse(self, name: str, args: Any, kwargs: Any, on_host: list[Tensor]) -> None:
        device = kwargs.get("device")
        copies = name in ("copy_", "_to_copy")
        to_host = copies and (
            (name == "copy_" and not isinstance(args[0], OnDevice))
            or (device is not None and torch.device(device).type != "cuda")
        )
        indexes = name in ("index", "index_put_", "_index_put_impl_", "_unsafe_index")
        if on_host and not copies and not indexes and any(x.dim() for x in on_host):
            shapes = [list(x.shape) for x in on_host]
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} got {shapes} on the CPU")
        # Indices by bool are counted first; numbers on the host that a kernel can't take as arguments are copied.
        by_mask = indexes and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        of_unknown_size = name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 3
        by_fallback = name == "_grouped_mm" and args[0].dtype != torch.bfloat16  # which looks at the offsets
        to_or_from_host = to_host or (on_host and (copies or indexes))
        if name in WAITING or by_mask or to_or_from_host or of_unknown_size or by_fallback:
            self._wait(name)

    def _wait(self, name: str) -> None:
        self.waits[name] += 1
        if self.tape is not None:
            self.broken = True
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} waits for the device")

    def _save_what_is_written(self, function: Any, args: Any, kwargs: Any) -> None:
        for i, argument in enumerate(function._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = kwargs.get(argument.name, args[i] if i < len(args) else None)
            for x in tree_leaves(given):
                if isinstance(x, Tensor) and (key := _storage(x)) not in self.own and key not in self.saved:
                    whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
                    self.saved[key] = whole, whole.clone()

    def _record(self, function: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x if isinstance(x, Tensor) and _storage(x) not in given else None for x in tree_leaves(out)]
        self.own |= {_storage(x) for x in made if x is not None}
        self.tape.append((function, args, kwargs, made))

    def begin(self, pool: Any = None) -> None:
        self.tape, self.saved, self.own, self.broken = [], {}, set(), False
        self.allocates_in.append(pool)
        self.generates = False
        self.began += 1
        self.pools.add(pool)

    def end(self) -> list[Any]:
        if self.tape is None:
            raise RuntimeError("no capture goes on")
        tape, self.tape = self.tape, None
        for whole, before in self.saved.values():
            whole.copy_(before)
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.allocates_in.pop()
        self.generates = True
        self.captured += 1
        return tape


def _inner(x: Any) -> Any:
    if isinstance(x, OnDevice):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def _on_device(x: Tensor, same: dict[int, OnDevice]) -> OnDevice:
    return same[id(x)] if id(x) in same else OnDevice(x)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@functools.cache
def _guarded() -> None:
    """Installs a guard for the device, compiled from make_believe.cpp."""
    torch_dir = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-I", torch_dir / "include", "-L", torch_dir / "lib"]
        subprocess.run([*command, Path(__file__).with_suffix(".cpp"), "-o", library, "-lc10"], check=True)
        ctypes.CDLL(str(library)).install()


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


@contextlib.contextmanager
def device() -> Iterator[Device]:
    """Tensors may lie on "cuda" inside."""
    fake = Device()
    default = fake.stream

    class Graph:
        def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
            assert fake.stream is not default, "CUDA graphs must be captured on a non-default stream"
            self._stream = fake.stream
            fake.begin(pool)

        def capture_end(self) -> None:
            assert fake.stream is self._stream, "Capture must end on the same stream it began on"
            self._tape = fake.end()

        def reset(self) -> None:
            self._tape = None

        def replay(self) -> None:
            fake.replayed += 1
            for function, args, kwargs, made in self._tape:
                for x, before in zip(tree_leaves(function(*args, **kwargs)), made, strict=True):
                    if before is not None:
                        before.copy_(x)

    @contextlib.contextmanager
    def stream(chosen: Any) -> Iterator[None]:
        before, fake.stream = fake.stream, chosen
        try:
            yield
        finally:
            fake.stream = before

    def end_allocate(device: int, pool: Any) -> None:
        if pool not in fake.allocates_in:
            raise RuntimeError("not currently recording to mempool_id")
        fake.allocates_in.remove(pool)

    pools = itertools.count(1)
    stand_ins = {
        "_lazy_init": lambda: None, "Stream": _Stream, "current_stream": lambda: fake.stream, "CUDAGraph": Graph,
        "stream": stream, "synchronize": lambda *_: None, "empty_cache": lambda: None, "current_device": lambda: 0,
        "mem_get_info": lambda *_: (1 << 36, 1 << 37), "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0, "get_device_capability": lambda *_: (9, 0),
        "graph_pool_handle": lambda: (0, next(pools)),
        "is_current_stream_capturing": lambda: fake.tape is not None,
    }  # fmt: skip
    if HAS_CUDA:
        raise RuntimeError(f"torch {torch.__version__} has CUDA: there the make-believe device can't stand in for it")
    _guarded()
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda"): made on the host, then copied
    try:
        end = mock.patch.object(torch._C, "_cuda_endAllocateToPool", end_allocate)
        with mock.patch.multiple(torch.cuda, **stand_ins), end, fake:
            yield fake
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)


def moved(model: nn.Module) -> nn.Module:
    """A copy of the model on the device."""
    model = copy.deepcopy(model)
    seen: dict[int, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, x in own.items():
                if x is not None and id(x) not in seen:
                    there = OnDevice(x.detach().clone())
                    seen[id(x)] = nn.Parameter(there, requires_grad=False) if own is module._parameters else there, x
                own[name] = None if x is None else seen[id(x)][0]
    return model
