"""Compilers and an architecture other than those that built the module: no warning, and the same results."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import daemon_fast

ROOT = Path(__file__).parents[1]
AARCH64 = "aarch64-linux-gnu-g++"
COMPILERS = [*(f"g++-{n}" for n in range(11, 15)), *(f"clang++-{n}" for n in range(14, 20)), AARCH64]
# As CMakeLists.txt has them, but for -O3, which only takes longer.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-falign-loops=32",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
    "-fno-math-errno",
    "-fPIC",
]


def found(program):
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"no {program}")
    return path


@pytest.mark.parametrize("compiler", COMPILERS)
def test_cpu_code_compiles_without_a_warning(compiler, tmp_path):
    name, _, version = daemon_fast.build_info()["compiler"].partition(" ")
    if compiler == f"{name.replace('clang', 'clang++')}-{version.split('.')[0]}":
        pytest.skip("it built the module")
    command = [found(compiler), *FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", ROOT / "csrc"]
    command += ["-isystem", Path(torch.__file__).parent / "include", "-c", *ROOT.glob("csrc/cpu/*.cpp")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_repetition_is_the_same_on_aarch64(tmp_path):
    program = tmp_path / "repetition"
    command = [found(AARCH64), *FLAGS, "-O3", "-static", "-I", ROOT / "csrc", "-o", program]
    emulator = found("qemu-aarch64")
    subprocess.run([*command, ROOT / "tests/aarch64/repetition.cpp"], check=True)

    rng = np.random.default_rng(0)
    lengths = np.array([*rng.integers(0, 301, size=40), 0, 1, 2, 300])
    tokens = rng.zipf(1.3, size=(len(lengths), 300)) % 200 - 100
    rows = np.concatenate([lengths[:, None], tokens], axis=1)
    out = subprocess.run([emulator, program], input=rows.tobytes(), capture_output=True, check=True).stdout
    want = daemon_fast.repetition(
        torch.from_numpy(tokens), torch.from_numpy(lengths), [1, 2, 3, 4, 300], [1, 8, 32, 300]
    )
    got = np.frombuffer(out, dtype=np.float32).reshape(len(lengths), 2, -1)
    for index_width in (0, 1):
        np.testing.assert_array_equal(got[:, index_width], want.numpy())
