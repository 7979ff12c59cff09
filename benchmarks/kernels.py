"""Registers, shared memory and spills of each compiled CUDA kernel, read from the module. Needs no GPU.

Run: python benchmarks/kernels.py [--save]
"""

from __future__ import annotations

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


def kernels(tool: str) -> list[Kernel]:
    """All kernels of the module for real architectures."""
    dump = subprocess.run([tool, "--dump-resource-usage", _C.__file__], check=True, capture_output=True, text=True)
    demangle = shutil.which("c++filt")
    text = subprocess.run([demangle], input=dump.stdout, check=True, capture_output=True, text=True).stdout
    found, architecture, name = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (?:void )?(.*):$", line):
            name = re.sub(r"\(.*", "", match[1].replace("daemon_fast::cuda::", ""))
        elif "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(REG|SHARED|STACK|LOCAL):(\d+)", line)}
            values = (numbers[key] for key in ("REG", "SHARED", "STACK", "LOCAL"))
            found.append(Kernel(architecture, name, *values))
    return found


def main() -> None:
    tool = cuobjdump()
    if tool is None:
        raise SystemExit("no cuobjdump: pip install nvidia-cuda-cuobjdump")
    found = kernels(tool)
    header = ["arch", "kernel", "registers", "static shared bytes", "stack bytes", "local bytes"]
    finish("kernels", "# Resources of the CUDA kernels\n\n" + table(header, found), [k._asdict() for k in found])


if __name__ == "__main__":
    main()
