"""Fixtures and strategies shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# The models of the tests are so small that a second thread only waits for the first; for processes started here too.
os.environ["OMP_NUM_THREADS"] = "1"

import emulated
import pytest
import torch
from hypothesis import HealthCheck, settings

# Derandomised: CI must not fail on a draw that no one can repeat.
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


def _device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "emulated":
        with emulated.operators():
            yield emulated.DEVICE
    else:
        yield request.getfixturevalue("cuda") if request.param == "cuda" else "cpu"


_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
# Each operator's tests run on the CPU, with the CUDA code on the CPU, and, where there is one, on a GPU.
device = pytest.fixture(_device, params=["cpu", "emulated", _GPU], name="device")
# For what takes minutes, or makes no sense, with CUDA code on the CPU.
real_device = pytest.fixture(_device, params=["cpu", _GPU], name="real_device")
# For what is said of CUDA alone.
cuda_code = pytest.fixture(_device, params=["emulated", _GPU], name="cuda_code")


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture
def threads():
    """Sets torch's thread count for a test, and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def all_cores():
    """For real models."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)
