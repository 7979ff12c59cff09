"""The race against SIR, from the same candidates of real prefixes: how many candidates does each need?

python benchmarks/draw.py --directory draw [--save]

Candidates are drawn once and kept in the directory; a run that is cut off goes on there. Prefixes are halved: mu is
fitted to the one half, for each rule and M, and judged on the other. Every M sees the same pool of candidates: groups
of M are its disjoint parts where mu is fitted, and random parts where a choice is judged.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import finish, table
from torch import Tensor

from daemon_fast import TransformersProposal, ops
from daemon_fast import metrics as metrics_module
from daemon_fast.data.collect import batches, scores
from daemon_fast.data.texts import read_texts, split
from daemon_fast.experiments.measures import weighted_mean
from daemon_fast.fit import fit
from daemon_fast.models import DEFAULT_ENCODER
from daemon_fast.ops import Draw
from daemon_fast.race import probabilities
from daemon_fast.seeds import generator

SIZES = (5, 8, 12, 25, 50)
RULES: tuple[Draw, ...] = ("sir", "race")
POOL, PREFIX_TOKENS, NEW_TOKENS, TEMPERATURE = 200, 32, 48, 0.97
RIDGE = 0.02  # what cross-validation chose for Wikipedia; without, M = 5 can't reach the targets
PARTS, TEXTS = 100, 500  # random parts of the pool for expectations, and draws of one text a prefix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--domains", nargs="*", default=["wikipedia", "news"])
    parser.add_argument("--prefixes", nargs="*", type=int, default=[48, 26], help="of each domain, half to fit to")
    parser.add_argument("--targets", type=int, default=600, help="human texts of each domain, if there are so many")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    settings = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "temperature": TEMPERATURE}
    proposal = TransformersProposal.load(dtype=torch.bfloat16, num_candidates=POOL, **settings)
    text, figures = [], {}
    for domain, count in zip(arguments.domains, arguments.prefixes, strict=True):
        data = measured(proposal, domain, arguments.directory / domain, count, arguments.targets)
        rows, verdict = compare(*data)
        figures[domain] = rows
        heads = [name for name in rows[0] if name not in ("rule", "M", "mu")]
        lines = [[f"{row['rule']}, M = {row['M']}", *(row[name] for name in heads)] for row in rows]
        text.append(f"## {domain}, {count} prefixes\n\n{table([domain, *heads], lines)}\n\n{verdict}")
    title = f"# Race and SIR: pools of {POOL} candidates of {NEW_TOKENS} tokens, ridge {RIDGE}"
    finish("draw", title + "\n\n" + "\n\n".join(text), figures)


def measured(
    proposal: TransformersProposal, domain: str, folder: Path, prefixes: int, targets: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Metrics of candidates [N, POOL, K], of human texts [N', K], of those the first N continue the prefixes; their
    lengths [N'] and log-probabilities [N'] under the proposal."""
    pairs = split(read_texts(domain), proposal.tokenizer, PREFIX_TOKENS, NEW_TOKENS, None, 0)[:targets]
    metrics = metrics_module.parse(metrics_module.DEFAULT, DEFAULT_ENCODER)
    parts = []
    for i, (candidates, _) in enumerate(batches(proposal, pairs[:prefixes].prefixes, folder, 0, 2, domain)):
        path = folder / f"features-{i:06d}.npy"
        if not path.exists():
            np.save(path, metrics_module.features(metrics, candidates).numpy())
        parts.append(torch.from_numpy(np.load(path)))
    human, of_human = [], []
    for scored in scores(proposal, pairs, folder / "human"):
        human.append(scored)
        of_human.append(metrics_module.features(metrics, scored)[:, 0])
    log_base = torch.cat([part.log_q[:, 0] for part in human])
    return torch.cat(parts), torch.cat(of_human), torch.cat([part.lengths for part in human]), log_base


def compare(features: Tensor, human: Tensor, lengths: Tensor, log_base: Tensor) -> tuple[list[dict[str, Any]], str]:
    """A row for each rule and M; and how the race of 12 candidates stands to SIR's draw from 25, with errors."""
    features, human, n = features.double(), human.double(), len(features)
    to_fit, held_out = features[::2], features[1::2]
    own = torch.arange(n)[1::2]  # human texts of the held-out prefixes, which the targets leave out
    targets = human[~torch.isin(torch.arange(len(human)), own)].mean(0)
    spread, within = human.std(0), (features - features.mean(1, keepdim=True)).flatten(0, 1).std(0)
    of_pool = fit(to_fit, targets, ridge=RIDGE).mu
    truth = weighted_mean(held_out, ops.importance_weights(-(held_out @ of_pool)).weights).mean(0)
    rows, values, gains = [], {}, {}
    for m in SIZES:
        groups = to_fit[:, : POOL // m * m].reshape(-1, m, features.shape[2])
        for rule in RULES:
            mu = fit(groups, targets, draw=rule, ridge=RIDGE).mu
            gain = -(human[own] @ mu) - ops.importance_weights(-(held_out @ mu)).log_mean
            gains[rule, m], values[rule, m] = gain, (expected(held_out, mu, m, rule) - targets) / spread
            rows.append(
                {
                    "rule": rule,
                    "M": m,
                    "expected": norm(values[rule, m].mean(0)),
                    "one text": one_text(held_out, mu, m, rule, targets, spread),
                    "bias": norm((expected(held_out, of_pool, m, rule).mean(0) - truth) / within),
                    "mu off": norm((mu - of_pool) * within) / norm(of_pool * within),
                    "perplexity": math.exp(-float((log_base[own] + gain).sum() / lengths[own].sum())),
                    "mu": mu.tolist(),
                }
            )
    few, many = ("race", 12), ("sir", 25)
    random, resampled = generator(0, "prefixes"), []
    for _ in range(1000):
        some = torch.randint(len(own), (len(own),), generator=random)
        resampled.append(norm(values[few][some].mean(0)) - norm(values[many][some].mean(0)))
    nearer = norm(values[few].mean(0)) - norm(values[many].mean(0))
    gained = (gains[few] - gains[many]) / lengths[own]
    likelier, error = float(gained.mean()), float(gained.std()) / len(own) ** 0.5
    return rows, (
        f"The race of 12 candidates less SIR of 25: distance in expectation {nearer:.4f} ± {np.std(resampled):.4f}, "
        f"log-likelihood of human text {likelier:.5f} ± {error:.5f} nats a token"
    )


def norm(values: Tensor) -> float:
    """Root mean square over metrics."""
    return float(values.square().mean().sqrt())


def chances(log_w: Tensor, rule: Draw) -> Tensor:
    return probabilities(log_w) if rule == "race" else ops.importance_weights(log_w).weights


def expected(features: Tensor, mu: Tensor, m: int, rule: Draw) -> Tensor:
    """[N, K] metrics of what is chosen from M candidates, the mean over random parts of each pool."""
    random, (n, _, k) = generator(m, "parts"), features.shape
    total = torch.zeros(n, k, dtype=torch.float64)
    for _ in range(PARTS):
        part = features[:, torch.randperm(POOL, generator=random)[: POOL // m * m]].reshape(-1, m, k)
        total += weighted_mean(part, chances(-(part @ mu), rule)).reshape(n, -1, k).mean(1)
    return total / PARTS


def one_text(features: Tensor, mu: Tensor, m: int, rule: Draw, targets: Tensor, spread: Tensor) -> float:
    """Distance of one text a prefix, root mean square over draws."""
    random, rows, squares = generator(m, "texts"), torch.arange(len(features)), 0.0
    for _ in range(TEXTS):
        part = features[:, torch.randperm(POOL, generator=random)[:m]]
        chosen = torch.multinomial(chances(-(part @ mu), rule), 1, generator=random)[:, 0]
        squares += norm((part[rows, chosen].mean(0) - targets) / spread) ** 2
    return math.sqrt(squares / TEXTS)


if __name__ == "__main__":
    main()
