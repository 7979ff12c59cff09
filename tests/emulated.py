"""The CUDA operators on the CPU: csrc/cuda, as it is, against the stand-ins for CUDA in emulation/ (see cuda.h there).

`load()` compiles it, once for each state of the sources; `operators()` sends calls of `torch.ops.daemon_fast` there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernels
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import daemon_fast
from daemon_fast import _C, ops

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "emulation"
DEVICE = "cpu:0"  # where its tensors are, in words that tests can tell from "cpu"
# The run under sanitizers, in a process of its own, also counts which lines run.
SANITIZED = "EMULATION_SANITIZED" in os.environ
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes"]
# Without inlining, since gcov gives the line of a call that was inlined no count.
CHECKED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "--coverage", "-fno-inline"]


def sources() -> list[Path]:
    return [*sorted(ROOT.glob("csrc/cuda/*.cu")), HERE / "control.cpp"]


@functools.cache
def folder(sanitized: bool = SANITIZED) -> Path:
    """Where objects and library of this state of the sources go."""
    state = hashlib.sha256(f"{torch.__version__} {FLAGS} {sanitized and CHECKED}".encode())
    for path in sorted([*ROOT.glob("csrc/**/*"), *HERE.glob("**/*")]):
        if path.is_file():
            state.update(path.read_bytes())
    return ROOT / "build" / ("emulation-sanitized" if sanitized else "emulation") / state.hexdigest()[:16]


def compile_all() -> Path:
    library = folder() / "emulated.so"
    if library.exists():
        return library
    for old in folder().parent.glob("*"):
        shutil.rmtree(old)
    folder().mkdir(parents=True, exist_ok=True)
    package = Path(torch.__file__).parent
    flags = [*FLAGS, *(CHECKED if SANITIZED else []), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-I", str(ROOT / "csrc"), "-I", str(HERE), "-isystem", str(package / "include")]

    def compile_one(source: Path) -> str:
        target = folder() / f"{source.stem}.o"
        subprocess.run(["g++", "-x", "c++", *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sources()))
    unfinished = folder() / "unfinished.so"
    link = ["g++", "-shared", *flags, *objects, "-o", str(unfinished), "-Wl,-Bsymbolic,--no-as-needed"]
    subprocess.run([*link, str(package / "lib/libtorch.so"), "-ldl"], check=True)
    return unfinished.rename(library)


@functools.cache
def load() -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    library = compile_all()
    assert ops  # imported because it registers the operators
    define = torch.library.Library("daemon_fast_emulated", "DEF")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("daemon_fast::"):
            define.define(
                str(getattr(torch.ops.daemon_fast, name.partition("::")[2]).default._schema).partition("::")[2]
            )
    load.library = define  # kept: it undoes the definitions when it goes
    torch.ops.load_library(str(library))
    emulated = ctypes.CDLL(str(library))
    emulated.emulation_ptx.restype = ctypes.c_char_p
    if has_ptx():
        tool = kernels.cuobjdump()
        for kernel in kernels.kernels(tool):
            if kernel.architecture == "sm_90":
                emulated.emulation_kernel(
                    kernel.symbol.encode(), *map(ctypes.c_int64, (kernel.shared_bytes, kernel.registers))
                )
        ptx = subprocess.run([tool, "--dump-ptx", _C.__file__], check=True, capture_output=True).stdout
        if error := emulated.emulation_ptx(ptx):
            raise RuntimeError(error.decode())
    return emulated


def has_ptx() -> bool:
    """Whether there is PTX to run, and the compiler's report of each kernel's resources."""
    return daemon_fast.build_info()["cuda"] is not None and kernels.cuobjdump() is not None


def launched() -> set[str]:
    """The kernels launched so far, by their mangled names."""
    names: set[str] = set()
    load().emulation_launched(ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda name: names.add(name.decode())))
    return names


def blocks() -> int:
    """Of the last launch."""
    return load().emulation_blocks()


def grants() -> int:
    """How often kernels asked for more shared memory on the current device."""
    return load().emulation_grants()


def error() -> int:
    """Which error the next call of the CUDA runtime would find."""
    return load().emulation_error()


def compiled() -> set[str]:
    """The kernels in the module."""
    listed = subprocess.run(["nm", "--defined-only", compile_all()], check=True, capture_output=True, text=True)
    names = re.findall(r" (_ZN11daemon_fast4cuda(\d+)(\w+))$", listed.stdout, re.MULTILINE)
    return {name for name, length, rest in names if rest[: int(length)].endswith("_kernel")}


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "daemon_fast" and not types and all(a.is_cpu for a in args if isinstance(a, torch.Tensor)):
            here = f"daemon_fast_emulated::{func._opname}"
            if torch._C._dispatch_has_kernel_for_dispatch_key(here, "CPU"):  # not every operator has a kernel for CUDA
                func = getattr(torch.ops.daemon_fast_emulated, func._opname).default
        return func(*args, **(kwargs or {}))


def coverage() -> dict[str, dict[int, int]]:
    """How often each line of csrc/cuda ran in the sanitized processes that have ended, by file and number."""
    counts: dict[str, dict[int, int]] = {}
    for path in folder(sanitized=True).glob("*.gcda"):
        command = ["gcov", "--json-format", "--stdout", str(path)]
        report = subprocess.run(command, cwd=path.parent, check=True, capture_output=True, text=True).stdout
        for file in json.loads(report)["files"]:
            name = Path(file["file"]).resolve()
            if name.parent == ROOT / "csrc/cuda":
                lines = counts.setdefault(name.name, {})
                for line in file["lines"]:
                    lines[line["line_number"]] = lines.get(line["line_number"], 0) + line["count"]
    return counts


@contextlib.contextmanager
def operators(*, multiprocessors=132, shared_optin=227 * 1024, order=0, ptx=None, runs=True, broken=None):
    """All calls of `torch.ops.daemon_fast` go to the emulated device, by default one like an H100.

    `order` of threads: 0 first warp ahead, 1 last warp ahead, else the seed of a shuffle. With `ptx`, the PTX in the
    module runs (default: if there is any), else what g++ made of the source. With `runs` False, launches are only
    checked. `broken` names a call of the CUDA runtime that fails.
    """
    ptx = has_ptx() and not SANITIZED if ptx is None else ptx
    limits, flags = map(ctypes.c_int64, (multiprocessors, shared_optin)), map(ctypes.c_bool, (ptx, runs))
    load().emulation_device(*limits, ctypes.c_int(order), *flags, broken and broken.encode())
    with _Operators():
        yield
