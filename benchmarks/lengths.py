"""What M whole candidates are worth as texts grow: distance, effective sample size and gain at 32 to 512 tokens.

    python benchmarks/lengths.py --human reuters.jsonl --directory lengths [--temperature 0.9] [--save]    # resumes

Candidates of 512 tokens are drawn once, for prefixes to fit to and for as many held out; shorter ones are their first
tokens, and each length has fits of its own, by SIR and by the race. Of the human texts, which `long_texts.py` makes,
100 give the targets, and 100 others are held out.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from common import device_name, finish, resumed, table
from torch import Tensor

from daemon_fast import TransformersProposal, fit, metrics, ops
from daemon_fast.data import read_texts, split
from daemon_fast.data.collect import collect, scores
from daemon_fast.errors import FitError
from daemon_fast.ops import Draw
from daemon_fast.proposals.candidates import Candidates
from daemon_fast.race import probabilities
from daemon_fast.seeds import generator

LENGTHS = (32, 64, 128, 256, 512)
METRICS = ["sr_2", "sr_3", "sr_4", "tr_16"]
RULES: tuple[Draw, ...] = ("sir", "race")
PREFIX_TOKENS, M, TEXTS = 32, 25, 100  # human texts of each half
RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--human", type=Path, required=True, help="records with a text")
    parser.add_argument("--directory", type=Path, required=True, help="keeps candidates")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--prefixes", type=int, default=24, help="to fit to, and as many held out")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    found = [x for x in resumed("lengths") if x["temperature"] != arguments.temperature]
    found.append(measured(arguments))
    header = ["T", "length", "metrics", "rule", "ridge", "unweighted", "distance", "ESS of 25", "least",
              "gain, nats a token"]  # fmt: skip
    rows = [
        [x["temperature"], row["length"], len(row["metrics"]), row["rule"], row["ridge"], f"{row['unweighted']:.3f}",
         f"{row['distance']:.3f} ± {row['error']:.3f}", f"{row['ess']:.1f}", f"{row['least_ess']:.1f}",
         f"{row['gain'][0]:.4f} ± {row['gain'][1]:.4f}"]
        for x in sorted(found, key=lambda x: -x["temperature"]) for row in x["rows"]
    ]  # fmt: skip
    said = [
        f"T = {x['temperature']}: {x['prefixes']} prefixes to fit to and as many held out, {x['texts']} human texts of "
        f"each half; {x['device']}, {x['dtype']}."
        for x in found
    ]
    finish("lengths", "# As texts grow\n\n" + table(header, rows) + "\n\n" + "\n".join(said), found)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    longest, n = max(LENGTHS), arguments.prefixes
    proposal = TransformersProposal.load(
        device=arguments.device, dtype=getattr(torch, arguments.dtype), num_candidates=M,
        temperature=arguments.temperature, min_new_tokens=longest, max_new_tokens=longest,
    )  # fmt: skip
    pairs = split(read_texts(arguments.human), proposal.tokenizer, PREFIX_TOKENS, longest)
    folder = arguments.directory / f"{arguments.human.stem}-{arguments.temperature}"
    halves = []
    for name, half, seed in (("fit", pairs[: len(pairs) // 2], 1), ("held-out", pairs[len(pairs) // 2 :], 2)):
        human = Candidates.concatenate(list(scores(proposal, half[:TEXTS], folder / f"{name}-human")))
        drawn, _ = collect(proposal, half.prefixes[:n], folder / name, seed, arguments.batch_size, name)
        halves.append((drawn, human))
    rows = [row for length in LENGTHS for row in at(length, *halves)]
    names = {name: getattr(arguments, name) for name in ("temperature", "prefixes", "dtype")}
    return {**names, "texts": len(halves[0][1].lengths), "device": device_name(), "rows": rows}


def at(length: int, to_fit: tuple[Candidates, ...], held_out: tuple[Candidates, ...]) -> list[dict[str, Any]]:
    """Of first tokens: fits, and what they are worth on held-out prefixes."""
    rows: list[dict[str, Any]] = []
    for names in (METRICS, [*METRICS, "nats"]):
        parsed = metrics.parse(names)
        fitted, targets, held, human = (
            metrics.features(parsed, first(x, length)).double() for x in (*to_fit, *held_out)
        )
        # Short texts may not repeat at all.
        columns = [k for k in range(len(names)) if min(x[..., k].std() for x in (fitted, targets, human)) > 0]
        fitted, held = fitted[..., columns], held[..., columns]
        targets, human = targets[:, 0, columns], human[:, 0, columns]
        zero = torch.zeros(len(columns), dtype=torch.float64)
        plain = judged(held, zero, "sir", human, length)
        for rule in RULES:
            mu, ridge = fitted_mu(fitted, targets, rule, [names[k] for k in columns])
            about = {"length": length, "metrics": [names[k] for k in columns], "ridge": ridge, "mu": mu.tolist()}
            rows.append(about | {"unweighted": plain["distance"]} | judged(held, mu, rule, human, length))
    return rows


def first(x: Candidates, length: int) -> Candidates:
    parts = {name: getattr(x, name)[:, :length] for name in ("tokens", "token_log_p", "token_log_q")}
    return dataclasses.replace(x, **parts, lengths=x.lengths.clamp_max(length), ended=None)


def fitted_mu(features: Tensor, targets: Tensor, rule: Draw, names: list[str]) -> tuple[Tensor, Any]:
    """Human means met exactly, or as softly as cross-validation says; and which."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"names": names, "draw": rule}
        try:
            return fit(features, targets, ridge=0, **given).mu, 0
        except FitError:
            return fit(features, targets, ridge="cv", **given).mu, "cv"


def judged(features: Tensor, mu: Tensor, rule: str, human: Tensor, length: int) -> dict[str, Any]:
    """Of features [N, M, K] and human metrics [N', K], of which the first N continue the same prefixes."""
    log_w = -(features @ mu)
    weights, log_z, ess = ops.importance_weights(log_w)
    chances = weights.double() if rule == "sir" else probabilities(log_w)
    expected = (chances[..., None] * features).sum(1)
    gains = (-(human[: len(features)] @ mu) - log_z) / length
    drawn = generator(0, "bootstrap")
    means = [x[torch.randint(len(x), (RESAMPLES, len(x)), generator=drawn)].mean(1) for x in (expected, human)]
    spread = human.std(0)
    return {
        "rule": rule, "ess": float(ess.mean()), "least_ess": float(ess.min()),
        "distance": float(((expected.mean(0) - human.mean(0)) / spread).square().mean().sqrt()),
        "error": float(((means[0] - means[1]) / spread).square().mean(1).sqrt().std()),
        "gain": [float(gains.mean()), float(gains.std()) / len(gains) ** 0.5],
    }  # fmt: skip


if __name__ == "__main__":
    main()
