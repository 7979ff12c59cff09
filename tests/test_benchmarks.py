"""The benchmark scripts go with the library: each imports, and the one that builds on its insides runs small."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import make_believe
import numpy as np
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


def test_long_texts_read_as_they_were_written():
    """Brown's words have tags, and Reuters' lines are cut; what is no running text, or known, is left out."""
    long_texts = importlib.import_module("long_texts")
    line = "The/at jury/nn said/vbd ,/, ``/`` no/at (/( such/jj )/) '/' deed/nn ''/'' ;/; ;/; ./."
    assert long_texts.untagged(line) == 'The jury said, "no (such) \' deed".'
    told = "\n    ".join(["Some cocoa was sold on Friday\nin Bahia, traders said."] * 20)
    figures = "\n    ".join(["1.5 2.5 3.5 4.5"] * 60)
    bodies = [f"{told}\n Reuter\n\x03", told, figures, "Short."]
    file = "data/full/reuters-000.json", json.dumps([{"title": "COCOA", "body": body} for body in bodies])

    def tokenizer(text):
        return {"input_ids": list(range(max(len(text), long_texts.PART)))}

    (story,) = long_texts.stories([file, ("README.md", "no story")], tokenizer)
    assert story["title"] == "COCOA"
    assert story["text"].split("\n") == ["Some cocoa was sold on Friday in Bahia, traders said."] * 20
    words = " ".join(["word/nn"] * 10 + ["./."])
    parts = list(long_texts.parts([("package/ca01", f"{words}\n" * 30)], lambda text: {"input_ids": text.split()}))
    assert [part["sample"] for part in parts] == ["ca01"]  # the rest is too short
    assert len(parts[0]["text"].split()) >= long_texts.PART


# ---- gpu.py: what drives its stages, and all of them small ----------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    return importlib.import_module("gpu").Results(tmp_path / "out" / "gpu-none.json")


def run(results, name, code, seconds=30):
    return importlib.import_module("gpu").run_stage(name, [sys.executable, "-u", "-c", code], results, seconds)


SAVES = """
import json, pathlib, sys
path = pathlib.Path({path!r})
document = json.loads(path.read_text())
document["stages"]["one"]["figures"] = [1, 2]
path.write_text(json.dumps(document))
print("said before the end")
"""


def test_a_stage_and_what_it_saved(results):
    results.machine({"gpu": "none"})
    assert run(results, "one", SAVES.format(path=str(results.path))) == "ok"
    found = results.read()["stages"]["one"]
    assert (found["status"], found["figures"], found["output"]) == ("ok", [1, 2], ["said before the end"])
    assert run(results, "one", "") == "ok"
    assert "figures" not in results.read()["stages"]["one"]  # nothing is left of an earlier run
    assert not list(results.path.parent.glob("*.part"))


def test_a_stage_that_fails_leaves_what_it_saved(results):
    code = SAVES.format(path=str(results.path)) + "raise RuntimeError('at last')"
    assert run(results, "one", code) == "failed: exit status 1"
    found = results.read()["stages"]["one"]
    assert found["figures"] == [1, 2]
    assert found["output"][-1] == "RuntimeError: at last"
    assert run(results, "two", "import os; os.kill(os.getpid(), 11)") == "failed: exit status -11"
    assert list(results.read()["stages"]) == ["one", "two"]


def test_a_stage_that_does_not_end_is_ended_with_what_it_started(results, tmp_path):
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    code = SAVES.format(path=str(results.path)) + (
        "import signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(600)\n"
    )
    assert run(results, "one", code, seconds=5) == "not finished in 5 s"
    assert results.read()["stages"]["one"]["figures"] == [1, 2]
    alive.unlink()
    time.sleep(0.3)
    assert not alive.exists()


@pytest.mark.skipif(make_believe.HAS_CUDA, reason="this torch has CUDA itself")
def test_the_stages_rehearsed(tmp_path):
    """On the CPU and the make-believe device: what a GPU must not be the first to run."""
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    stages = ["build", "parity", "sanitizers", "operators", "peers", "call", "sharing"]
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, 50, (9, 300)))
    command = [sys.executable, script, "--rehearse", "--tokens", tokens, "--output", tmp_path]
    result = subprocess.run(
        [*command, *(x for stage in stages for x in ("--stage", stage))], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    document = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    assert document["machine"]["rehearsal"]
    assert document["machine"]["torch"]
    ended = {name: stage["status"].split(":")[0] for name, stage in document["stages"].items()}
    assert ended in ({**dict.fromkeys(stages, "ok"), "sanitizers": x} for x in ("ok", "skipped"))
    assert sum(document["stages"]["parity"]["counts"].values()) >= 10
    work = [figure["work"].split()[0] for figure in document["stages"]["operators"]["figures"]]
    assert {"sample_tokens", "append_tokens", "repetition", "tokens", "tilted_moments"} <= set(work)
    for figure in document["stages"]["call"]["figures"]:
        assert figure["graphs"] >= 1
        assert figure["why not captured"] is None
        assert figure["floor, s"] > 0
        assert "sample_tokens" in figure["profile"]
    assert [(prefix, own > 0, shared > 0) for _, prefix, own, shared, _ in document["stages"]["sharing"]["rows"]] == [
        (3, True, True), (20, True, True)
    ] * 2  # fmt: skip
    report = (tmp_path / "gpu-rehearsal.md").read_text()
    assert "no time here means anything" in report
    assert "GPT-2 XL's shape" in report


def test_a_failed_stage_shows_in_the_exit_status(tmp_path, monkeypatch):
    gpu = importlib.import_module("gpu")
    statuses = iter(["ok", "failed: exit status 1", "skipped: nothing there"])
    monkeypatch.setattr(gpu, "run_stage", lambda *_: next(statuses))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--output", str(tmp_path), "--stage", "build",
                                      "--stage", "parity", "--stage", "sanitizers"])  # fmt: skip
    monkeypatch.setenv("DAEMON_FAST_REHEARSES", "0")
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1


def test_without_a_gpu_it_says_so(monkeypatch):
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU"):
        gpu.main()


def test_the_gpu_build_insists_on_cuda(monkeypatch):
    """A missing nvcc must not build for the CPU in silence."""
    gpu, seen = importlib.import_module("gpu"), {}

    class Shown:
        stdout = json.dumps({"cuda": None})

    def recording(command, env=None, **_):
        seen.update({"pip" if "pip" in command else "show": env})
        return Shown

    monkeypatch.delenv("DAEMON_FAST_CUDA", raising=False)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu.subprocess, "run", recording)
    with pytest.raises(SystemExit, match="without CUDA kernels"):
        gpu.build(lambda **_: None)
    assert (seen["pip"]["DAEMON_FAST_CUDA"], seen["pip"]["DAEMON_FAST_CUDA_ARCHITECTURES"]) == ("ON", "90-real")
