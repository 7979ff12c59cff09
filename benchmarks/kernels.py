"""Registers, shared memory and spills of each compiled CUDA kernel, read from the module. Needs no GPU.

Run: python benchmarks/kernels.py [--save]
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from common import finish, table

from daemon_fast import _C


class Kernel(NamedTuple):
    architecture: str
    symbol: str
    name: str
    registers: int
    shared_bytes: int  # static; the launch adds dynamic shared memory
    stack_bytes: int
    local_bytes: int


def cuobjdump() -> str | None:
    """Path of the tool: in PATH, or in the wheel nvidia-cuda-cuobjdump, which puts it where no PATH leads."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) / "cu13/bin/cuobjdump" for place in (spec.submodule_search_locations or [])] if spec else []
    return shutil.which("cuobjdump") or next((str(place) for place in places if place.exists()), None)


@functools.cache
def demangled(symbol: str) -> str:
    text = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout
    return re.sub(r"\(.*|^void ", "", text.strip().replace("daemon_fast::cuda::", ""))


def kernels(tool: str) -> list[Kernel]:
    """All kernels of the module for real architectures."""
    dump = subprocess.run([tool, "--dump-resource-usage", _C.__file__], check=True, capture_output=True, text=True)
    found, architecture, symbol = [], "", ""
    for line in dump.stdout.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\w+):$", line):
            symbol = match[1]
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(REG|SHARED|STACK|LOCAL):(\d+)", line)}
            values = (numbers[key] for key in ("REG", "SHARED", "STACK", "LOCAL"))
            found.append(Kernel(architecture, symbol, demangled(symbol), *values))
    return found


def main() -> None:
    tool = cuobjdump()
    if tool is None:
        raise SystemExit("no cuobjdump: pip install nvidia-cuda-cuobjdump")
    found = kernels(tool)
    header = ["arch", "kernel", "registers", "static shared bytes", "stack bytes", "local bytes"]
    rows = [(kernel.architecture, *kernel[2:]) for kernel in found]
    finish("kernels", "# Resources of the CUDA kernels\n\n" + table(header, rows), [k._asdict() for k in found])


if __name__ == "__main__":
    main()
