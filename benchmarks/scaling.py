"""Weak scaling on a Ray cluster: twice the work on two workers as on one, one thread each.

Decoding and measuring run SmolLM2 on Wikipedia introductions; the fit's reduction runs on random features. A worker
loads its model once, whatever is to be done, so that the rate counts from the first result on. Each number of workers
has a cluster of its own, all in one process, in turn.
Run: python benchmarks/scaling.py [--save]
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # of every worker; before torch is imported

import pyarrow
import ray
import torch
from common import finish, table
from tqdm import tqdm

from daemon_fast import Energy, SIRDecoder, metrics
from daemon_fast.data.texts import read_texts
from daemon_fast.fit.samples import tilted_moments
from daemon_fast.integrations import ray as cluster
from daemon_fast.proposals.load import EngineSpec

ROUNDS = 2
WORKERS = (1, 2)
M, PREFIX, TOKENS = 10, 32, 16
DTYPE = "float32"  # what every CPU computes in at full speed
ROWS, BATCH = 16, 4  # prefixes per worker, and drawn together
NAMES = ["sr_2", "sr_3", "sr_4", "tr_8", "tr_16", "tr_32", "ent", "coh"]
BLOCKS, BLOCK_ROWS = 8, 10_000  # per worker: 2 million samples


def texts(workers: int) -> Any:
    """Introductions of 96 tokens at least, for certain: of 150 words."""
    long = [text for text in read_texts("wikipedia") if len(text.split()) >= 150]
    rows = [{"text": text} for text in long[: workers * ROWS]]
    return ray.data.from_items(rows, override_num_blocks=workers * ROWS // BATCH)


def prompts(workers: int) -> Any:
    return texts(workers).map(lambda row: {"text": " ".join(row["text"].split()[:24])})


def rate(dataset: Any) -> tuple[float, float]:
    """Rows per second from the first result on, and seconds to the first result."""
    begin, seen = time.perf_counter(), []
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        seen.append((time.perf_counter() - begin, len(batch)))
    first, last = seen[0][0], seen[-1][0]
    return sum(rows for _, rows in seen[1:]) / (last - first), first


def random_block(seed: int) -> pyarrow.Table:
    features = torch.rand(BLOCK_ROWS, M, len(NAMES), generator=torch.Generator().manual_seed(seed))
    run = pyarrow.array(["{}", *[None] * (BLOCK_ROWS - 1)], pyarrow.string())
    weights = pyarrow.nulls(BLOCK_ROWS, pyarrow.list_(pyarrow.float64(), M))
    columns = {"features": cluster._column(features), "human": cluster._column(features[:, 0])}
    return pyarrow.table({**columns, "base_log_w": weights, "run": run})


def measure(workers: int, energy: Energy) -> dict[str, float]:
    one = {"num_cpus": 1, "compute": ray.data.ActorPoolStrategy(size=workers), "batch_size": BATCH}
    drawn = {"prefix_tokens": PREFIX, "new_tokens": TOKENS, "num_candidates": M}
    engine = EngineSpec(dtype=DTYPE)
    decoded, start = rate(cluster.decode(prompts(workers), energy, engine, **one))
    measured, _ = rate(cluster.measure(texts(workers), NAMES, engine, **drawn, **one))
    blocks = [random_block(i) for i in range(workers * BLOCKS)]
    samples = cluster.RaySamples(ray.data.from_arrow(blocks))
    mu, seconds = torch.zeros(len(NAMES), dtype=torch.float64), []
    for _ in range(5):
        begin = time.perf_counter()
        tilted_moments(samples, mu, "per_prefix")
        seconds.append(time.perf_counter() - begin)
    step = statistics.median(seconds)
    begin = time.perf_counter()
    for _ in range(5):
        samples.map(lambda block: None)
    empty = (time.perf_counter() - begin) / 5 / len(blocks)
    return {
        "decode, prefixes/s": decoded,
        "measure, prefixes/s": measured,
        "tilted_moments, samples/s": workers * BLOCKS * BLOCK_ROWS * M / step,
        "an empty reduction, ms a block": 1e3 * empty,
        "to the first result, s": start,
    }


def parts(energy: Energy) -> dict[str, float]:
    """Milliseconds per prefix of each part of a decode, in this process, on one thread."""
    engine = EngineSpec(dtype=DTYPE)
    decoder = SIRDecoder(energy, engine.proposal(**energy.proposal_settings.sampling()), BATCH)
    found: dict[str, list[float]] = {}
    prefixes = [" ".join(text.split()[:24]) for text in read_texts("wikipedia")[: (ROUNDS + 1) * BATCH]]
    for i in range(ROUNDS + 1):
        for name, seconds in decoder(prefixes[i * BATCH :][:BATCH], seed=i).seconds.items():
            found.setdefault(name, []).append(1e3 * seconds / BATCH)
    return {name: statistics.median(values[1:]) for name, values in found.items()}  # the first one warms up


def main() -> None:
    known = metrics.parse(NAMES, "all-minilm-l6-v2")
    settings = EngineSpec().settings(num_candidates=M, max_new_tokens=TOKENS, min_new_tokens=TOKENS, temperature=0.97)
    zeros = torch.zeros(len(NAMES), dtype=torch.float64)
    energy = Energy(known, zeros, zeros, settings)  # what mu is costs no time
    runs: dict[int, list[dict[str, float]]] = {workers: [] for workers in WORKERS}
    for workers in tqdm(WORKERS * ROUNDS, desc="clusters"):
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        runs[workers].append(measure(workers, energy))
        ray.shutdown()
    found = {w: {name: statistics.median(run[name] for run in runs[w]) for name in runs[w][0]} for w in WORKERS}
    rows = [
        [name, f"{one:,.3g}", f"{found[2][name]:,.3g}", f"{found[2][name] / one:.2f}" if "/s" in name else ""]
        for name, one in found[1].items()
    ]
    title = f"# Weak scaling: M = {M}, {TOKENS} tokens, SmolLM2-135M in {DTYPE}, one thread a worker, {ROUNDS} rounds"
    alone = parts(energy)
    text = f"{title}\n\n{table(['', '1 worker', '2 workers', 'ratio'], rows)}\n\n## One decode, ms a prefix\n\n"
    text += table(["part", "ms"], [[name, value] for name, value in alone.items()])
    finish("scaling", text, {"workers": found, "rounds": runs, "parts": alone})


if __name__ == "__main__":
    main()
