"""Fixtures and strategies shared by the tests."""

from __future__ import annotations

import os

# The models of the tests are so small that a second thread only waits for the first; for processes started here too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

# Derandomised: CI must not fail on a draw that no one can repeat.
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each operator's tests run on the CPU and, where there is one, on a GPU."""
    return request.getfixturevalue("cuda") if request.param == "cuda" else "cpu"


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
