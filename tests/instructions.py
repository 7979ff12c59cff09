"""Instructions that each CUDA kernel issues, counted, and the times that follow from them. No GPU is needed.

The PTX in the module runs on the CPU (see emulation/ptx.h), on inputs like those of benchmarks/gpu.py, and what warps
issue is counted: all instructions, those of the special function units, those of float64. PTX is not machine code:
moves and most address arithmetic vanish, 64-bit integers and divisions become several instructions. COST says what each
is taken for: on the loop of token_logprobs it agrees with the machine code to 5%.

Times are estimates, not measurements: the longest of reading, issuing, special functions and float64, as if all
overlapped perfectly, and of the warps with the most to do, one kernel after the other; and an allowance a launch.
Waiting for memory is not in them.

Run: python tests/instructions.py [--save]       (a module with CUDA kernels, cuobjdump and g++; two minutes)
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import emulated
import torch
from common import finish, table, zipf_tokens
from kernels import demangled

import daemon_fast

# Instructions of a warp that a multiprocessor of an H100 or H200 takes a cycle: 4 schedulers; 16 lanes of special
# function units; 64 of float64.
ISSUE, SPECIAL, WIDE = 4.0, 0.5, 2.0
MULTIPROCESSORS, CLOCK = 132, 1.755e9
BANDWIDTH = {"H100": 3.35e12 * 0.92, "H200": 4.8e12 * 0.92}  # by datasheet; 92% is what copies reach
DEPENDENT = 4.5  # cycles from an instruction of a warp to the next, on average, where each waits for the one before
LAUNCH = 2.2e-6  # of a kernel in a graph, start to end, with nothing to do; and from one to the next:
GAP = 1.0e-6

COST = [  # of machine code, by the start of the PTX instruction: the first that fits
    (r"mov|cvta|ld\.param|bar\.warp|cvt\.[us]64\.[us]32|cvt\.[us]32\.[us](16|64)|cvt\.[us]16\.u32", 0),
    (r"div\.rn\.f64", 34),
    (r"div\.rn\.f32", 10),
    (r"(div|rem)\.[us]64", 70),
    (r"(div|rem)\.[us]32", 16),
    (r"mul\.lo\.s64", 4),
    (r"(add|sub|shl|shr|and|or|xor|setp\.\w+|selp|min|max)\.[usb]64", 2),
    (r"ex2\.approx\.f32", 5),  # with care for results below the normal numbers
    (r"", 1),
]
SPECIAL_FUNCTIONS = r"(ex2|lg2|rcp|rsqrt|sqrt)\.approx\.(ftz\.)?f32|div\.rn\.f32"


@dataclass
class Case:
    name: str
    call: Callable[[], Any]  # the operator on a few rows
    rows: int  # that it has
    target: int  # rows of what is to be predicted
    bytes_a_row: int
    multiprocessors: int = MULTIPROCESSORS  # of the emulated device; 1: there, 64 rows are as many
    less: Callable[[], Any] | None = None  # a call on as many rows less, whose instructions are subtracted


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    tokens = zipf_tokens(64, 256, 0)
    lengths = torch.full((64,), 256)
    logits = (torch.randn(2, 50_257, generator=generator) * 3).bfloat16()
    ids, uniforms = torch.tensor([3, 50_000]), torch.tensor([0.3, 0.8], dtype=torch.float64)
    features, mu = (
        torch.randn(4224, 25, 9, generator=generator),
        torch.randn(9, generator=generator, dtype=torch.float64),
    )
    u = torch.rand(16, generator=generator, dtype=torch.float64)
    races = torch.rand(16, 25, generator=generator, dtype=torch.float64)
    v = 2 * 50_257
    ops = daemon_fast
    return [
        Case("repetition, 65,536 rows of 256", lambda: ops.repetition(tokens, lengths), 64, 65_536, 2080, 1),
        Case("repetition, 25 rows of 256", lambda: ops.repetition(tokens[:25], lengths[:25]), 25, 25, 2080),
        Case("token_logprobs bfloat16, temperature 0.97", lambda: ops.token_logprobs(logits, ids, 0.97), 2, 6400, v),
        Case("token_logprobs bfloat16, temperature 1", lambda: ops.token_logprobs(logits, ids), 2, 6400, v),
        Case("sample_tokens bfloat16, temperature 0.97", lambda: ops.sample_tokens(logits, uniforms, 0.97), 2, 25, v),
        Case("sir_select, M = 25, K = 9", lambda: ops.sir_select(features[:16], mu, u), 16, 4096, 1032),
        Case("race_select, M = 25, K = 9", lambda: ops.race_select(features[:16], mu, races), 16, 4096, 1232),
        Case("tilted_moments, M = 25, K = 9", lambda: ops.tilted_moments(features, mu), 2112, 40_000, 900,
             less=lambda: ops.tilted_moments(features[:2112], mu)),  # a prefix a warp, and a second one
    ]  # fmt: skip


def cost(instruction: str) -> int:
    return next(cost for pattern, cost in COST if re.match(pattern, instruction))


def issued(call: Callable[[], Any], multiprocessors: int) -> dict[str, dict[str, int]]:
    """Of each kernel that the call launches, instructions and how often they were issued to a warp."""
    library = emulated.load()
    library.emulation_count(ctypes.c_bool(True))
    with emulated.operators(multiprocessors=multiprocessors, ptx=True):
        call()
    counts: dict[str, dict[str, int]] = defaultdict(dict)

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64)
    def each(kernel, instruction, count):
        counts[demangled(kernel.decode())][instruction.decode()] = count

    library.emulation_issued(each)
    library.emulation_count(ctypes.c_bool(False))
    return counts


def per_row(case: Case) -> dict[str, float]:
    totals = dict.fromkeys(("issue", "special", "float64", "busiest warp"), 0.0)
    kernels = issued(case.call, case.multiprocessors)
    less = issued(case.less, case.multiprocessors) if case.less else {}
    for kernel, counts in kernels.items():
        for instruction, every in counts.items():
            if instruction.startswith("busiest "):
                totals["busiest warp"] += cost(instruction.removeprefix("busiest ")) * every
                continue
            count = every - less.get(kernel, {}).get(instruction, 0)
            weight = cost(instruction) * count / case.rows
            totals["issue"] += weight
            totals["special"] += count / case.rows if re.match(SPECIAL_FUNCTIONS, instruction) else 0
            totals["float64"] += weight if re.search(r"f64", instruction) else 0
    return {**totals, "launches": len(kernels)}


def main() -> None:
    rows, figures = [], []
    for case in cases():
        figure = per_row(case)
        units = {
            "issue": figure["issue"] / ISSUE,
            "special functions": figure["special"] / SPECIAL,
            "float64": figure["float64"] / WIDE,
        }
        seconds = {unit: cycles * case.target / MULTIPROCESSORS / CLOCK for unit, cycles in units.items()}
        seconds["busiest warp"] = figure["busiest warp"] * DEPENDENT / CLOCK
        start = LAUNCH + (figure["launches"] - 1) * GAP
        estimates = {}
        for device, bandwidth in BANDWIDTH.items():
            parts = {**seconds, "reading": case.target * case.bytes_a_row / bandwidth}
            limit = max(parts, key=parts.__getitem__)
            estimates[device] = (1e6 * (parts[limit] + start), limit)
        counts = [round(figure[key]) for key in ("issue", "special", "float64", "busiest warp", "launches")]
        times = [f"{us:.1f} us, {limit}" for us, limit in estimates.values()]
        rows.append([case.name, *counts, round(case.bytes_a_row), case.target, *times])
        figures.append({"work": case.name, **figure, "bytes": case.bytes_a_row, "rows": case.target, **estimates})
    header = ["work", "instructions a row", "special", "float64", "busiest warp", "launches", "bytes a row", "rows"]
    title = "# Instructions of the CUDA kernels\n\nCounted in PTX; times are estimates and no measurements.\n\n"
    finish("instructions", title + table([*header, *(f"{name}, by" for name in BANDWIDTH)], rows), figures)


if __name__ == "__main__":
    main()
