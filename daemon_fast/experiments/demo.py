"""`daemon-fast demo`: a real language model, fitted to and decoded on real text, compared with plain sampling."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

from daemon_fast import metrics as metrics_module
from daemon_fast.data.collect import collect
from daemon_fast.data.texts import read_texts, split
from daemon_fast.decode import Decoded, SIRDecoder
from daemon_fast.energy import Diagnostics
from daemon_fast.experiments.collected import Collected
from daemon_fast.experiments.page import new_figure
from daemon_fast.experiments.studies import alignment, perplexity
from daemon_fast.files import write_text, writing
from daemon_fast.fit import fit
from daemon_fast.fit.from_texts import measure
from daemon_fast.models import DEFAULT_ENCODER, DEFAULT_MODEL
from daemon_fast.proposals.transformers import TransformersProposal
from daemon_fast.seeds import stream

__all__ = ["run"]

PREFIX_TOKENS, NEW_TOKENS, NUM_CANDIDATES, TEMPERATURE = 32, 64, 25, 0.97
SIZES = {False: (96, 48), True: (16, 8)}  # quick -> prefixes to fit, prefixes held out
BATCH_SIZE = 4
EXAMPLES = 3
WIDTH = 110  # of the terminal's lines


@dataclass(frozen=True)
class Example:
    prefix: str
    human: str
    sampling: str
    daemon: str


@dataclass(frozen=True)
class Results:
    """What results.json holds."""

    alignment: alignment.Alignment
    perplexity: perplexity.Perplexity
    fit: Diagnostics | None
    seconds: dict[str, float]
    examples: list[Example]


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
        proposal = TransformersProposal.load(
            DEFAULT_MODEL, device, temperature=TEMPERATURE, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
            num_candidates=NUM_CANDIDATES,
        )  # fmt: skip
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
            proposal,
            held_out.prefixes,
            directory / "held-out",
            stream(seed, "held-out"),
            BATCH_SIZE,
            "held-out candidates",
        )
        decoded = decoder.choose(candidates, seed=seed)
    with stage("score human text"):
        human = proposal.score(held_out.prefixes, held_out.continuations)
        of_human = energy.features(human)[:, 0]
    seconds["fit and metrics"] -= drawing
    seconds["decode"] -= drawing_held_out
    # Candidates read back from an earlier run took their time then: what is left can't be below zero.
    seconds = {name: max(0.0, value) for name, value in seconds.items()}

    spread = torch.cat([fitted.human, of_human]).double().std(0)
    collected = Collected.of(energy, names, candidates, decoded.candidate_features, human, of_human, spread)
    drawn = {"sampling": decoded.candidate_features[:, 0], "daemon": decoded.features[:, 0]}
    results = Results(
        alignment.compute(collected, energy.mu, drawn, seed=seed),
        perplexity.compute(collected, energy.mu),
        energy.diagnostics,
        {"draw candidates": drawing + drawing_held_out, **seconds, **decoded.seconds},
        _examples(proposal, held_out.continuations, decoded),
    )
    with writing(output):
        write_text(output / "results.json", json.dumps(asdict(results), indent=2, ensure_ascii=False) + "\n")
        figure = new_figure(8, 0.5 * len(names) + 2)
        alignment.draw_metrics(results.alignment, figure)
        figure.savefig(output / "alignment.png")
    _print(results, echo)
    echo(f"\nWritten to {output}: alignment.png, results.json, energy.json, candidates/")


def _examples(proposal: TransformersProposal, continuations: list[list[int]], decoded: Decoded) -> list[Example]:
    m, prefixes, texts = decoded.candidates.shape[1], decoded.candidates.prefix_texts, decoded.candidates.texts
    human = proposal.detokenize(continuations[:EXAMPLES])
    return [Example(prefixes[i], text, texts[i * m], decoded.texts[i][0]) for i, text in enumerate(human)]


def _print(results: Results, echo: Callable[[str], Any]) -> None:
    for table in (alignment.table(results.alignment), alignment.spread_table(results.alignment)):
        echo(f"\n{table.text(transposed=True)}\n{fill(table.caption, WIDTH)}")
    compared = perplexity.table(results.perplexity)
    echo(f"\n{compared.text()}\n{fill(compared.caption, WIDTH)}")
    echo("")
    for sentence in (*alignment.verdict(results.alignment), *perplexity.verdict(results.perplexity)):
        echo(fill(sentence, WIDTH))
    echo("\nSeconds: " + ", ".join(f"{name} {value:.3g}" for name, value in results.seconds.items()))
    for example in results.examples:
        echo(f"\n[prefix]   {_line(example.prefix)}")
        for who in ("human", "sampling", "daemon"):
            echo(f"[{who}]".ljust(11) + _line(getattr(example, who)))


def _line(text: str) -> str:
    return " ".join(text.split())
