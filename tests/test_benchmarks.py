"""The benchmark scripts go with the library: each imports, and the one that builds on its insides runs small."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted(p.stem for p in Path(__file__).parents[1].joinpath("benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import(name, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which scaling.py sets
    if name == "scaling":
        pytest.importorskip("ray", reason="needs ray: pip install 'daemon-fast[ray]'")
    assert importlib.import_module(name).__doc__


def test_the_benchmark_of_the_fit_solves_its_problem(monkeypatch):
    fit = importlib.import_module("fit")
    monkeypatch.setattr(fit, "N", 400)
    problem = fit.problem()
    known = {
        name: getattr(problem, name) for name in ("samples", "targets", "normalization", "names", "scale", "ridge")
    }
    steps = {}
    for method in ("newton", "L-BFGS"):
        watched = fit.Watched(**known)
        fit.METHODS[method][0](watched)
        _, steps[method] = watched.reached(1e-9)
    assert 3 < steps["newton"] < 20
    assert steps["newton"] < steps["L-BFGS"] < 200
