"""Everything that a GPU has to show, in one command: build, parity tests, sanitizers, and tables of every operator.

Times come from CUDA events: per call of a captured graph that runs the call on all inputs in turn, and per eager call.
Inputs together exceed the L2 cache, but where a caller's would be in it too (25 candidates). Both sides take turns in
every round; figures are medians. Results go to benchmarks/results/gpu.{json,md}.

Run: python benchmarks/gpu.py       (needs a torch with CUDA, nvcc, scikit-build-core, pybind11, ninja; under 8 minutes)
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
ROUNDS = 15
CALLS = 32  # at least, in one graph and in one timed run of eager calls
L2_TIMES = 3  # inputs that should not be in L2 take this many times its size
SANITIZED = """
import torch, daemon_fast
f64 = torch.float64
for T in (1, 33, 256, 700, 20000):
    tokens = torch.randint(0, 50, (5, T), device="cuda")
    daemon_fast.repetition(tokens, torch.tensor([T, 0, 1, T // 2, T], device="cuda"), [1, 2, 3, 4], [1, 8, 32])
for V in (7, 5001):
    logits, ids = torch.randn(9, V, device="cuda"), torch.zeros(9, dtype=torch.int64, device="cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        daemon_fast.token_logprobs(logits.to(dtype), ids, 0.97)
        daemon_fast.sample_tokens(logits.to(dtype), torch.rand(9, dtype=f64, device="cuda"), 0.97)
for M in (25, 300, 2000, 20000):
    features, mu = torch.randn(3, M, 9, device="cuda"), torch.randn(9, dtype=f64, device="cuda")
    daemon_fast.importance_weights(features[..., 0])
    daemon_fast.sir_select(features, mu, torch.rand(3, 4, dtype=f64, device="cuda"))
    daemon_fast.race_select(features, mu, torch.rand(3, 4, M, dtype=f64, device="cuda"))
    for normalization in ("per_prefix", "global"):
        daemon_fast.tilted_moments(features, mu, normalization=normalization)
torch.cuda.synchronize()
"""


@dataclass
class Case:
    """One line of the table."""

    name: str
    ours: Callable[..., Any]
    torch: Callable[..., Any] | None
    inputs: list[tuple[Any, ...]]
    bytes_moved: int  # what a call must at least read and write
    target: str
    met: Callable[[dict[str, float]], bool]


def build() -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    subprocess.run(command, check=True)


def parity_tests() -> str:
    """pytest's closing line, after all GPU tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    print(result.stdout[-6000:], result.stderr[-2000:])
    return result.stdout.strip().splitlines()[-1]


def sanitizers() -> dict[str, str]:
    """compute-sanitizer's last line for each of its tools, over every kernel."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"compute-sanitizer": "not installed"}
    verdicts = {}
    for kind in ("memcheck", "racecheck", "initcheck"):
        command = [tool, "--tool", kind, sys.executable, "-c", SANITIZED]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            verdicts[kind] = (result.stdout.strip().splitlines() or ["no output"])[-1]
        except subprocess.TimeoutExpired:
            verdicts[kind] = "not finished in 60 s"
    return verdicts


def microseconds(run: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def captured(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> tuple[Callable[[], None], int]:
    """A graph of the call on all inputs in turn, and how many calls it holds."""
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
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    size = source.numel() * 4
    times = timed(
        {
            "copy": eager(lambda: target.copy_(source), [()]),
            "read": eager(lambda: source.sum(), [()]),
            "empty graph": captured(lambda: torch.cuda._sleep(0), [()]),
            "empty eager": eager(lambda: torch.cuda._sleep(0), [()]),
        }
    )
    return {
        "copy, bytes/s": 2 * size / (1e-6 * times["copy"]),
        "read, bytes/s": size / (1e-6 * times["read"]),
        "empty kernel in a graph, us": times["empty graph"],
        "empty kernel, eager, us": times["empty eager"],
    }


def sets(bytes_each: int, make: Callable[[int], tuple[Any, ...]], at_least: int = 2) -> list[tuple[Any, ...]]:
    """As many inputs as it takes to exceed the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [make(seed) for seed in range(max(at_least, -(-L2_TIMES * cache // bytes_each)))]


def cases(ceiling: dict[str, float]) -> list[Case]:
    from choosing import torch_logprobs, torch_moments, torch_race, torch_select
    from common import zipf_tokens
    from repetition import vectorised_torch

    import daemon_fast

    copy, read = ceiling["copy, bytes/s"], ceiling["read, bytes/s"]

    def tokens(rows: int, dtype: torch.dtype = torch.int64) -> Callable[[int], tuple[Any, ...]]:
        lengths = torch.full((rows,), 256, device="cuda")
        pool = zipf_tokens(8192, 256, 0)
        generator = torch.Generator().manual_seed(0)

        def make(_: int) -> tuple[Any, ...]:
            chosen = torch.randint(len(pool), (rows,), generator=generator)
            return pool[chosen].to("cuda", dtype), lengths

        return make

    mu = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cuda()

    def groups(g: int) -> Callable[[int], tuple[Any, ...]]:
        return lambda _: (torch.randn(g, 25, 9, device="cuda"), mu, torch.rand(g, dtype=torch.float64, device="cuda"))

    def racing(g: int) -> Callable[[int], tuple[Any, ...]]:
        return lambda _: (*groups(g)(0)[:2], torch.rand(g, 25, dtype=torch.float64, device="cuda"))

    def logits(_: int) -> tuple[Any, ...]:
        values = torch.randn(6400, 50_257, device="cuda", dtype=torch.bfloat16)
        return values, torch.randint(50_257, (6400,), device="cuda")

    def choice(token_ids: torch.Tensor, lengths: torch.Tensor, uniform: torch.Tensor) -> Any:
        features = daemon_fast.repetition(token_ids, lengths)
        return daemon_fast.sir_select(features[None], mu[:6], uniform)

    few, many = [tokens(25)(i) for i in range(16)], tokens(65_536)
    uniform = torch.full((1,), 0.5, dtype=torch.float64, device="cuda")
    repetition = daemon_fast.repetition
    python_us = plain_python_us(few[0][0])

    def bandwidth(case_bytes: int, time_us: float) -> float:
        return case_bytes / (1e-6 * time_us)

    return [
        Case("repetition (25, 256) int64", repetition, lambda t, _: vectorised_torch(t), few, 25 * 256 * 8,
             f"<= 8 us; >= 1,000 x plain Python ({python_us:,.0f} us); >= 30 x torch",
             lambda f: f["ours"] <= 8 and python_us >= 1000 * f["ours"] and f["torch"] >= 30 * f["ours"]),
        Case("repetition (65,536, 256) int64", repetition, lambda t, _: vectorised_torch(t),
             sets(65_536 * 256 * 8, many), 65_536 * 256 * 8 + 65_536 * 6 * 4, ">= 20% of copy bandwidth, toward 40%",
             lambda f: bandwidth(65_536 * 256 * 8, f["ours"]) >= 0.2 * copy),
        Case("token_logprobs bfloat16 [6,400 x 50,257]", lambda x, i: daemon_fast.token_logprobs(x, i, 0.97),
             torch_logprobs, sets(6400 * 50_257 * 2, logits), 6400 * 50_257 * 2,
             ">= 85% of read bandwidth; >= 3 x torch",
             lambda f: bandwidth(6400 * 50_257 * 2, f["ours"]) >= 0.85 * read and f["torch"] >= 3 * f["ours"]),
        Case("token_logprobs bfloat16, temperature 1", lambda x, i: daemon_fast.token_logprobs(x, i),
             lambda x, i: x.log_softmax(1).gather(1, i[:, None]), sets(6400 * 50_257 * 2, logits), 6400 * 50_257 * 2,
             ">= 85% of read bandwidth",
             lambda f: bandwidth(6400 * 50_257 * 2, f["ours"]) >= 0.85 * read),
        Case("sir_select (1, 25, 9)", daemon_fast.sir_select, torch_select, [groups(1)(i) for i in range(16)],
             25 * 9 * 4, "<= 5 us", lambda f: f["ours"] <= 5),
        Case("sir_select (4,096, 25, 9)", daemon_fast.sir_select, torch_select,
             sets(4096 * 25 * 9 * 4, groups(4096)), 4096 * 25 * 10 * 4, "<= 5 us", lambda f: f["ours"] <= 5),
        Case("race_select (1, 25, 9)", daemon_fast.race_select, torch_race, [racing(1)(i) for i in range(16)],
             25 * 9 * 4 + 25 * 8, "<= 5 us", lambda f: f["ours"] <= 5),
        Case("race_select (4,096, 25, 9)", daemon_fast.race_select, torch_race,
             sets(4096 * 25 * 11 * 4, racing(4096)), 4096 * 25 * 12 * 4, "<= 5 us", lambda f: f["ours"] <= 5),
        Case("tokens to choice, M = 25, T = 256", choice, None, [(*few_inputs, uniform) for few_inputs in few],
             25 * 256 * 8, "<= 15 us", lambda f: f["ours"] <= 15),
        Case("tilted_moments 10^6 x 9", lambda x: daemon_fast.tilted_moments(x, mu), lambda x: torch_moments(x, mu),
             sets(36_000_000, lambda _: (torch.randn(40_000, 25, 9, device="cuda"),)), 36_000_000, "<= 100 us",
             lambda f: f["ours"] <= 100),
    ]  # fmt: skip


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


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU; what needs none is in the other benchmarks")
    begin = time.perf_counter()
    build()
    from common import RESULTS, machine, table

    tests, verdicts = parity_tests(), sanitizers()
    ceiling = ceilings()
    rows, figures = [], []
    for case in cases(ceiling):
        us = measure(case)
        met, share = case.met(us), case.bytes_moved / (1e-6 * us["ours"]) / ceiling["copy, bytes/s"]
        ratio = us["torch"] / us["ours"] if "torch" in us else "-"
        other = (us.get("torch", "-"), us.get("torch, eager", "-"))
        verdict = "hit" if met else "missed"
        rows.append([case.name, us["ours"], us["ours, eager"], *other, ratio, f"{share:.1%}", case.target, verdict])
        figures.append({"work": case.name, "us": us, "bytes": case.bytes_moved, "target": case.target, "met": met})
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    device = {
        **machine(),
        "gpu": torch.cuda.get_device_name(0),
        "cuda": str(torch.version.cuda),
        "driver": driver(),
    }
    header = [
        "work", "ours, graph, us", "ours, eager", "torch, graph", "torch, eager", "torch / ours",
        "of copy bandwidth", "target", "",
    ]  # fmt: skip
    ceiling_rows = [
        [name, f"{value / 1e12:.2f} TB/s" if "bytes" in name else f"{value:.2f}"] for name, value in ceiling.items()
    ]
    parts = [
        f"# {device['gpu']}",
        table(header, rows),
        table(["ceiling, measured", ""], ceiling_rows),
        f"Tests: {tests}",
        *[f"{name}: {verdict}" for name, verdict in verdicts.items()],
        ", ".join(f"{key} {value}" for key, value in device.items()),
        f"Command: python benchmarks/gpu.py, {time.perf_counter() - begin:.0f} s in all",
    ]
    report = "\n\n".join(parts) + "\n"
    print(report)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu.md").write_text(report)
    document = {"machine": device, "ceilings": ceiling, "tests": tests, "sanitizers": verdicts, "figures": figures}
    (RESULTS / "gpu.json").write_text(json.dumps(document, indent=2) + "\n")
    if " failed" in tests or " error" in tests:
        sys.exit(1)


def driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else "unknown"


if __name__ == "__main__":
    main()
