"""`daemon-fast evaluate`: the paper's experiments for fitted artefacts, each on its own domain of human text.

Whatever takes long (candidates, baselines, features) is saved as it is made; a run that is killed and started again
goes on from there, to the same report.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from daemon_fast.errors import InvalidInput
from daemon_fast.experiments.collected import NotDone, attempt
from daemon_fast.experiments.domain import Domain, DomainData, Options, Sizes
from daemon_fast.experiments.measures import FEATURIZERS
from daemon_fast.experiments.page import Chapter, Section, new_figure, render
from daemon_fast.experiments.studies import STUDIES
from daemon_fast.files import write_text, writing

__all__ = ["STUDIES", "Domain", "DomainReport", "Report", "Sizes", "evaluate"]

TITLE = "Direct metrics optimization: does it do what it claims?"


@dataclass(frozen=True)
class DomainReport:
    names: list[str]  # of the artefact's metrics
    mu: list[float]
    ridge: float
    fit_prefixes: int
    target_texts: int
    held_out: int
    left_out: int  # records that can't be used
    min_new_tokens: int
    new_tokens: int
    verdict: list[str]  # sentences
    studies: dict[str, Any]  # what each that was asked for found, or `NotDone`

    @property
    def summary(self) -> str:
        return (
            f"mu is from the candidates of {self.fit_prefixes} prefixes and the means of {self.target_texts} human "
            f"texts, with a ridge of {self.ridge:g}. {self.held_out} prefixes are held out; continuations have "
            + (
                f"{self.new_tokens} tokens."
                if self.min_new_tokens == self.new_tokens
                else f"{self.min_new_tokens} to {self.new_tokens} tokens."
            )
        )


@dataclass(frozen=True)
class Report:
    """What report.json holds, and report.html says."""

    title: str
    command: str
    model: str
    settings: dict[str, Any]
    domains: dict[str, DomainReport]


def evaluate(
    domains: Sequence[Domain],
    output: str | os.PathLike[str],
    model: Any,
    tokenizer: Any,
    *,
    wanted: Sequence[str] = tuple(STUDIES),
    sizes: Sizes | None = None,
    amateur: Any = None,
    featurizer: str = "encoder",
    encoder: str | None = None,
    prefix_tokens: int = 32,
    batch_size: int = 4,
    seed: int = 0,
    command: str = "",
) -> Report:
    """Run studies and write report.json and report.html to `output`.

    Parameters
    ----------
    domains : with artefacts of `fit`; their prefixes are those that the fit, given the same seed, did not take
    model, tokenizer : the language model that the artefacts were fitted for
    wanted : names out of `STUDIES`
    amateur : the weaker model of contrastive decoding; default: the model itself, of a short context
    featurizer : what MAUVE compares texts by, "encoder" (sentence embeddings) or "model" (the LM's last hidden state)
    encoder : for the embeddings; default: `daemon_fast.models.DEFAULT_ENCODER`
    seed : the one that the fit was given, too

    Raises
    ------
    InvalidInput, DataError
        An unknown study, no held-out text left, an output folder that holds another run, or one that can't be written.
    MissingPackage
        matplotlib is not installed.
    """
    if unknown := sorted(set(wanted) - set(STUDIES)):
        raise InvalidInput(f"unknown study {unknown[0]!r}; known: {', '.join(STUDIES)}")
    if featurizer not in FEATURIZERS:
        raise InvalidInput(f"featurizer = {featurizer!r} must be {' or '.join(FEATURIZERS)}")
    energies = {domain.name: domain.energy for domain in domains}
    if len(energies) < len(domains) or not domains:
        raise InvalidInput(f"domains must have different names, got {[domain.name for domain in domains]}")
    folder, sizes = Path(output), sizes or Sizes()
    for name, energy in energies.items():
        if "temperatures" in wanted and sizes.sweep_prefixes < len(energy.names):
            raise InvalidInput(
                f"sweep_prefixes = {sizes.sweep_prefixes} must be at least {len(energy.names)}, the number of metrics "
                f"of {name}: they are fitted to as many prefixes at each temperature"
            )
    options = Options(sizes, amateur, featurizer, encoder, prefix_tokens, batch_size, seed)
    data = [DomainData(domain, energies, folder / domain.name, model, tokenizer, options) for domain in domains]
    new_figure(1, 1)  # says that matplotlib is missing before hours of drawing
    found, chapters = {}, []
    for one in data:
        studies = {name: rounded(attempt(partial(study.run, one))) for name, study in STUDIES.items() if name in wanted}
        sections = [(STUDIES[name].HEADING, _section(name, result)) for name, result in studies.items()]
        verdict = [sentence for _, section in sections for sentence in section.verdict]
        report = DomainReport(
            names=one.energy.names,
            mu=rounded(one.energy.mu.tolist()),
            ridge=one.ridge,
            fit_prefixes=len(one.to_fit_pairs),
            target_texts=len(one.target_pairs),
            held_out=len(one.held_out_pairs),
            left_out=one.left_out,
            min_new_tokens=one.energy.proposal_settings.min_new_tokens,
            new_tokens=one.energy.proposal_settings.max_new_tokens,
            verdict=verdict,
            studies=studies,
        )
        found[one.domain.name] = report
        chapters.append(Chapter(one.domain.name, report.summary, verdict, sections))
    settings = {**dataclasses.asdict(sizes), "prefix_tokens": prefix_tokens, "seed": seed, "featurizer": featurizer}
    whole = Report(TITLE, command, data[0].proposal.settings.model_id, settings, found)
    text = json.dumps(_finite(dataclasses.asdict(whole)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    page = render(TITLE, {"model": whole.model, "command": command, **settings}, chapters)
    with writing(folder):
        write_text(folder / "report.json", text)
        write_text(folder / "report.html", page)
    return whole


def _section(name: str, result: Any) -> Section:
    return Section(f"Not done: {result.reason}") if isinstance(result, NotDone) else STUDIES[name].section(result)


def _finite(value: Any) -> Any:
    """None for what is infinite or not defined, for which JSON has no number; the page says it in words."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rounded(value: Any) -> Any:
    """Floats to eight digits, and 0 below 1e-12: sums differ by rounding between runs, and a report must not."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: rounded(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(rounded, value))
    if isinstance(value, float):
        return 0.0 if abs(value) <= 1e-12 else float(f"{value:.8g}")
    return value
