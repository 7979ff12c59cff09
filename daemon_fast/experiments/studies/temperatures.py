"""Diversity against coherence at several temperatures of the proposal (Ji et al. 2024, section 4.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from daemon_fast.experiments import page
from daemon_fast.experiments.collected import Collected, Ess, NotDone, attempt
from daemon_fast.experiments.domain import DomainData
from daemon_fast.experiments.measures import noise_floor
from daemon_fast.experiments.page import COLOURS, LABELS, Row, Section, Table, ess_cell, perplexity_cell
from daemon_fast.experiments.studies import perplexity

HEADING = "Temperature of the proposal"
TEMPERATURES = (0.8, 0.85, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class Tilt:
    """Of held-out prefixes, in expectation."""

    distance: float
    interval: tuple[float, float]
    diversity: float
    coherence: float | None  # None where `coh` was not measured
    perplexity: float | None  # of human text, under the proposal or under p_mu; None where it is undefined
    gain: float | None  # nats a token over the proposal
    gain_error: float | None
    ess: float  # mean over prefixes; where it is low, log Z of p_mu is, too, and the perplexity means nothing


@dataclass(frozen=True)
class Temperature:
    temperature: float
    sampling: Tilt  # from the proposal as it is
    refitted: Tilt | NotDone  # with mu fitted at this temperature
    reused: Tilt  # with the artefact's mu


@dataclass(frozen=True)
class Temperatures:
    human_diversity: float
    human_coherence: float | None
    noise_floor: float
    rows: list[Temperature]


def compute(collected: Mapping[float, tuple[Collected, Collected]], mu: Tensor, ridge: float = 0.0) -> Temperatures:
    """Plain sampling, a mu refitted, and a mu given, at each temperature.

    Parameters
    ----------
    collected : temperature -> (to fit, held out), the same prefixes at all
    mu : [K] fitted at another temperature
    ridge : of the fits at each
    """

    def tilted(held_out: Collected, by: Tensor) -> Tilt:
        values, found = held_out.expected(by), attempt(lambda: perplexity.compute(held_out, by).tilted)
        known = None if isinstance(found, NotDone) else found
        return Tilt(
            held_out.distance(values),
            held_out.interval(values),
            *_diversity_and_coherence(held_out, values),
            known.perplexity if known else None,
            known.gain if known else None,
            known.gain_error if known else None,
            Ess.of(held_out.weights(by)).mean,
        )

    rows = []
    for tau, (to_fit, held_out) in sorted(collected.items()):
        refitted = attempt(partial(to_fit.fit_mu, ridge))
        rows.append(
            Temperature(
                tau,
                tilted(held_out, torch.zeros_like(mu)),
                refitted if isinstance(refitted, NotDone) else tilted(held_out, refitted),
                tilted(held_out, mu),
            )
        )
    human = held_out.human
    return Temperatures(*_diversity_and_coherence(held_out, human), noise_floor(len(human)), rows)


def _diversity_and_coherence(collected: Collected, values: Tensor) -> tuple[float, float | None]:
    mean = dict(zip(collected.names, values.double().mean(0).tolist(), strict=True))
    return mean["div"], mean.get("coh")


def run(data: DomainData) -> Temperatures:
    n, collected = data.options.sizes.sweep_prefixes, {}
    to_fit_pairs, held_out_pairs = data.to_fit_pairs[:n], data.held_out_pairs[:n]
    own = data.energy.proposal_settings.temperature
    for tau in sorted({*TEMPERATURES, own}):
        if tau == own:
            collected[tau] = data.to_fit.first(n), data.held_out.first(n, n)
            continue
        proposal, name = data.proposal_with(temperature=tau), f"temperature-{tau}"
        to_fit = data.collected(f"{name}-fit", proposal, to_fit_pairs, data.target_pairs)
        held_out = data.collected(f"{name}-held-out", proposal, held_out_pairs, held_out_pairs)
        if data.energy.base == "proposal":  # which is another one here
            scored, _ = data.scored(f"{name}-human", held_out_pairs, proposal)
            held_out = replace(held_out, human_log_base=scored.log_q[:, 0])
        collected[tau] = to_fit, held_out
    return compute(collected, data.energy.mu, data.ridge)


# ---- what the report says -------------------------------------------------------------------------------------------


def section(result: Temperatures) -> Section:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    rows: list[Row] = [["-", "human", "-", share(result.human_diversity), share(result.human_coherence), "-", "-"]]
    notes = []
    for row in result.rows:
        for method, found in _methods(row).items():
            first: Row = [f"{row.temperature:g}", LABELS.get(method, method)]
            if isinstance(found, NotDone):
                rows.append([*first, "out of reach", "", "", "", ""])
                notes.append(f"No refit at {row.temperature:g}: {found.reason}")
                continue
            rows.append(
                [*first, page.distance(found.distance, found.interval), share(found.diversity), share(found.coherence),
                 perplexity_cell(found.perplexity, found.ess), ess_cell(found.ess)]
            )  # fmt: skip
    figures = []
    if (coherence := result.human_coherence) is not None:
        figures.append(page.svg(7, 4.5, partial(_draw, result, coherence), "Diversity against coherence"))
    head = ["temperature", "method", "distance", "diversity x100", "coherence x100", "perplexity of human text", "ESS"]
    caption = (
        f"Held-out prefixes, in expectation, with 95% intervals; noise floor {result.noise_floor:.3f}. Perplexity "
        "under the proposal (sampling) or under p_mu; undefined where human text can't be drawn, or where a single "
        "candidate decides log Z."
    )
    return Section(
        "Diversity against coherence, with mu refitted at each temperature and with the artefact's own reused.",
        [Table(head, rows, caption)],
        figures,
        notes,
    )


def _methods(row: Temperature) -> dict[str, Tilt | NotDone]:
    return {"sampling": row.sampling, "refitted": row.refitted, "reused": row.reused}


def _draw(result: Temperatures, human_coherence: float, figure: Any) -> None:
    axes = figure.subplots()
    axes.plot(100 * result.human_diversity, 100 * human_coherence, "*", color=COLOURS["human"], label="human")
    for method in ("sampling", "refitted", "reused"):
        found = [(row.temperature, _methods(row)[method]) for row in result.rows]
        points = [
            (tau, 100 * one.diversity, 100 * one.coherence)
            for tau, one in found
            if isinstance(one, Tilt) and one.coherence is not None
        ]
        x, y = [point[1] for point in points], [point[2] for point in points]
        axes.plot(x, y, "o-", color=COLOURS[method], label=LABELS.get(method, method))
        for tau, *at in points:
            axes.annotate(f"{tau:g}", at, fontsize=8, xytext=(3, 3), textcoords="offset points")
    axes.set_xlabel("diversity x100")
    axes.set_ylabel("coherence x100")
    axes.legend()
