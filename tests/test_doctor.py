"""What `daemon-fast doctor` advises where a GPU can't be used: an old driver is a library that says that it is old."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from daemon_fast import build_info, doctor

ARCHITECTURES = "80-real,90-real,100-real,120-real,90-virtual"


def advice(driver=(13, 0), torch_cuda="13.0", kernels_cuda="13.0.88", capabilities=((9, 0),)):
    return list(doctor._advice(driver, torch_cuda, kernels_cuda, ARCHITECTURES, list(capabilities)))


def test_nothing_is_advised_where_all_is_well():
    assert advice() == advice(driver=(14, 2), torch_cuda="12.8") == []


@pytest.mark.parametrize(
    ("machine", "says", "does"),
    [
        ({"driver": (12, 4), "capabilities": ()}, "serves CUDA 12.4, and the kernels are of CUDA 13.0", "update the"),
        ({"torch_cuda": None, "capabilities": ()}, "this torch is a build without CUDA", "install one with it"),
        ({"kernels_cuda": None}, "has no CUDA kernels", "build it from source: pip install"),
        ({"capabilities": [(9, 0), (7, 0)]}, "compute capability 7.0", "DAEMON_FAST_CUDA_ARCHITECTURES=70 pip install"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_to_do(machine, says, does):
    (sentence,) = advice(**machine)
    assert says in sentence
    assert does in sentence


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 3), (11, 0), (12, 1), (13, 0)])
def test_cubins_serve_their_major_version_and_ptx_all_newer_ones(capability):
    assert doctor._serves(ARCHITECTURES, *capability)
    assert not doctor._serves(ARCHITECTURES, 7, 5)


def test_cubins_alone_serve_nothing_newer():
    assert doctor._serves("80-real,90-real", 9, 0)
    assert not doctor._serves("80-real,90-real", 10, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_an_old_driver_is_found(tmp_path):
    source = "int cuDriverGetVersion(int* version) { *version = 12040; return 0; }"
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=source, text=True, check=True)
    command = [sys.executable, "-m", "daemon_fast", "doctor"]
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CUDA driver: serves CUDA 12.4" in done.stdout
    assert ("CUDA 13" in done.stdout.splitlines()[-1]) == (build_info()["cuda"] is not None)
