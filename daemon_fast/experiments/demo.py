"""`daemon-fast demo`: a real language model, fitted to and decoded on real text, compared with plain sampling."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daemon_fast import metrics as metrics_module
from daemon_fast.data.collect import collect
from daemon_fast.data.texts import read_texts, split
from daemon_fast.decode import Decoded, SIRDecoder
from daemon_fast.energy import Energy
from daemon_fast.experiments.measures import (
    distance_to_human,
    human_perplexity,
    noise_floor,
    relative_rmse,
    weighted_mean,
)
from daemon_fast.fit import fit
from daemon_fast.fit.from_texts import measure
from daemon_fast.models import DEFAULT_ENCODER, DEFAULT_MODEL
from daemon_fast.proposals.transformers import TransformersProposal

__all__ = ["run"]

PREFIX_TOKENS, NEW_TOKENS, NUM_CANDIDATES, TEMPERATURE = 32, 64, 25, 0.97
SIZES = {False: (96, 48), True: (16, 8)}  # quick -> prefixes to fit, prefixes held out
BATCH_SIZE = 4
EXAMPLES = 3


def run(output: Path, *, quick: bool, device: str | None, seed: int, echo: Callable[[str], Any] = print) -> None:
    """Fit on Wikipedia prefixes, decode held-out ones, and report; everything is written to `output`.

    Raises
    ------
    DaemonFastError
        A model or text package is missing, or `output` holds the candidates of another run.
    """
    num_fit, num_held_out = SIZES[quick]
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Any:
        begin = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin

    echo(f"Loading {DEFAULT_MODEL} and {num_fit + num_held_out} Wikipedia introductions ...")
    with stage("load"):
        metrics = metrics_module.parse(metrics_module.DEFAULT, DEFAULT_ENCODER)
        settings: dict[str, Any] = {
            "min_new_tokens": NEW_TOKENS,
            "max_new_tokens": NEW_TOKENS,
            "num_candidates": NUM_CANDIDATES,
        }
        proposal = TransformersProposal.load(DEFAULT_MODEL, device, temperature=TEMPERATURE, **settings)
        texts = read_texts("wikipedia")
        pairs = split(texts, proposal.tokenizer, PREFIX_TOKENS, NEW_TOKENS, num_fit + num_held_out, seed)
    to_fit, held_out = pairs[:num_fit], pairs[num_fit:]

    echo(f"Fitting {len(metrics)} metrics on {num_fit} prefixes x {NUM_CANDIDATES} candidates ...")
    with stage("fit and metrics"):
        directory = output / "candidates" / ("quick" if quick else "full")
        fitted = measure(proposal, to_fit, metrics, seed=seed, batch_size=BATCH_SIZE, directory=directory / "fit")
        names = metrics_module.column_names(metrics)
        result = fit(fitted.features, fitted.human, ridge="cv", names=names, seed=seed)
    energy, drawing = result.energy(metrics, proposal.settings, seed=seed), fitted.seconds
    energy.save(output / "energy.json")

    echo(f"Decoding {num_held_out} held-out prefixes ...")
    decoder = SIRDecoder(energy, proposal, BATCH_SIZE)
    with stage("decode"):
        candidates, drawing_held_out = collect(
            proposal, held_out.prefixes, directory / "held-out", seed + 1, BATCH_SIZE, "held-out candidates"
        )
        decoded = decoder.choose(candidates, seed=seed)
    with stage("score human text"):
        human = proposal.score(held_out.prefixes, held_out.continuations)
        human_features = energy.features(human)
    seconds["fit and metrics"] -= drawing
    seconds["decode"] -= drawing_held_out

    report = _report(energy, decoded, human_features[:, 0], torch.cat([fitted.human, human_features[:, 0]]))
    report["perplexity of human text"] = asdict(human_perplexity(energy, human, human_features, decoded))
    report["fit"] = asdict(energy.diagnostics) if energy.diagnostics else None
    report["seconds"] = {"draw candidates": drawing + drawing_held_out, **_clipped(seconds), **decoded.seconds}
    report["examples"] = _examples(proposal, held_out.continuations, decoded)
    (output / "results.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print(report, echo)
    from daemon_fast.plot import plot_alignment

    plot_alignment(report, output / "alignment.png")
    echo(f"\nWritten to {output}: alignment.png, results.json, energy.json, candidates/")


def _report(energy: Energy, decoded: Decoded, human: Tensor, all_human: Tensor) -> dict[str, Any]:
    """Means, errors and distances of human text, plain sampling and DAEMON, in fractions.

    The unit of distance, the standard deviation of human text, comes from all of it: `human` [N, K] is held out.
    """
    spread = all_human.double().std(0)
    uniform = torch.full_like(decoded.weights, 1 / decoded.weights.shape[1])
    methods = {
        "human": human.double(),
        "sampling": weighted_mean(decoded.candidate_features, uniform),
        "daemon": weighted_mean(decoded.candidate_features, decoded.weights),
    }
    drawn = {"sampling": decoded.candidate_features[:, 0], "daemon": decoded.features[:, 0]}
    n = len(human)
    return {
        "metrics": energy.names,
        "mean": {name: value.mean(0).tolist() for name, value in methods.items()},
        "standard error": {name: (value.std(0) / math.sqrt(n)).tolist() for name, value in methods.items()},
        "human standard deviation": spread.tolist(),
        "distance to human": {name: distance_to_human(methods[name], human, spread) for name in drawn},
        "distance to human, one text per prefix": {
            name: distance_to_human(value, human, spread) for name, value in drawn.items()
        },
        "noise floor": noise_floor(n),
        "relative rmse": {name: relative_rmse(methods[name], human) for name in drawn},
        "held-out prefixes": n,
        "candidates per prefix": decoded.weights.shape[1],
        "ess": {"mean": float(decoded.ess.mean()), "min": float(decoded.ess.min())},
    }


def _examples(proposal: TransformersProposal, continuations: list[list[int]], decoded: Decoded) -> list[dict[str, str]]:
    m = decoded.candidates.shape[1]
    human = proposal.detokenize(continuations[:EXAMPLES])
    return [
        {
            "prefix": decoded.candidates.prefix_texts[i],
            "human": human[i],
            "sampling": decoded.candidates.texts[i * m],
            "daemon": decoded.texts[i][0],
        }
        for i in range(min(EXAMPLES, len(human)))
    ]


def _clipped(seconds: dict[str, float]) -> dict[str, float]:
    """Candidates read back from an earlier run took their time then: what is left can't be below zero."""
    return {name: max(0.0, value) for name, value in seconds.items()}


def _print(report: dict[str, Any], echo: Callable[[str], Any]) -> None:
    n = report["held-out prefixes"]
    echo(f"\nExpected metrics on {n} held-out prefixes, x100 (ent: perplexity); mean ± standard error over prefixes")
    echo(f"{'':>8} {'human':>18} {'plain sampling':>18} {'DAEMON':>18}")
    for k, name in enumerate(report["metrics"]):
        scale = 1 if name == "ent" else 100
        cells = [
            f"{scale * report['mean'][method][k]:.2f} ± {scale * report['standard error'][method][k]:.2f}"
            for method in ("human", "sampling", "daemon")
        ]
        echo(f"{name:>8} {cells[0]:>18} {cells[1]:>18} {cells[2]:>18}")
    rows = [
        ("distance to human, in standard deviations", "distance to human"),
        ("the same for one drawn text per prefix", "distance to human, one text per prefix"),
        ("relative RMSE (the paper's)", "relative rmse"),
    ]
    echo("")
    for label, key in rows:
        echo(f"{label:>42}: sampling {report[key]['sampling']:.3f}, DAEMON {report[key]['daemon']:.3f}")
    echo(f"{'noise floor of the distance':>42}: {report['noise floor']:.3f} (1/sqrt of {n} human texts)")
    p = report["perplexity of human text"]
    echo(
        f"{'perplexity of human text':>42}: model {p['model']:.3f}, at the proposal's temperature {p['base']:.3f}, "
        f"DAEMON {p['tilted']:.3f} (gain {p['gain']:.4f} ± {p['gain_error']:.4f} nats a token)"
    )
    ess = report["ess"]
    echo(
        f"{'effective sample size':>42}: {ess['mean']:.1f} of {report['candidates per prefix']} on average, "
        f"{ess['min']:.1f} at least"
    )
    echo(f"{'seconds':>42}: " + ", ".join(f"{name} {value:.3g}" for name, value in report["seconds"].items()))
    for example in report["examples"]:
        echo(f"\n[prefix]   {_line(example['prefix'])}")
        for who in ("human", "sampling", "daemon"):
            echo(f"[{who}]".ljust(11) + _line(example[who]))


def _line(text: str) -> str:
    return " ".join(text.split())
