"""Perplexity of human text under the model, under what is tilted, and under p_mu (Ji et al. 2024, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from daemon_fast import ops
from daemon_fast.experiments.collected import Collected, NotDone, attempt
from daemon_fast.experiments.domain import DomainData
from daemon_fast.experiments.page import Row, Section, Table, ess_cell, number, perplexity_cell

HEADING = "Perplexity of human text"
SIZES = (5, 10, 25, 50, 100)


@dataclass(frozen=True)
class Estimate:
    """Of p_mu, with log Z from M candidates a prefix; errors are standard errors over prefixes."""

    m: int
    perplexity: float  # a token
    gain: float  # nats a token over what is tilted
    gain_error: float
    gain_per_text: float  # nats a text
    gain_per_text_error: float
    kl_per_text: float  # of p_mu from what is tilted: what the gain is if human expectations are met
    log_z_error: float  # of one prefix, by the delta method
    log_z_error_of_mean: float
    ess: float  # mean over prefixes


@dataclass(frozen=True)
class Perplexity:
    """Of human text, a token."""

    model: float  # under p_theta at temperature 1
    base: float  # under what is tilted
    tilted: Estimate  # under p_mu, from all candidates
    by_m: list[Estimate]  # from fewer
    tilting_model: Perplexity | NotDone | None = None  # with mu refitted to tilt p_theta, where it is not tilted anyway


def compute(held_out: Collected, mu: Tensor, sizes: Sequence[int] = ()) -> Perplexity:
    """Perplexities, and the paper's identity for the gain.

    log p_mu(x) = log base(x) - E(x) - log Z, where Z is the expectation of exp(-E) under the base. That of a prefix is
    estimated from its M candidates, weighed by the base's own weights where others than the base drew them: with mu = 0
    it is 1, also if they can't draw all that the base can. By the delta method the standard error of log Z is
    √Σ_j (w̄_j - b̄_j)², of weights w̄ and base weights b̄ that sum to 1 each. If human expectations are met, the mean gain
    of p_mu over the base, in nats a text, is KL(p_mu || base), which the same weights estimate: mean over prefixes of
    -Σ_j w̄_j E_j - log Z.

    Parameters
    ----------
    mu : [K]
    sizes : numbers of candidates to repeat it with, each taking as many disjoint groups as M holds
    """
    energy_of_human = held_out.human[:, : held_out.fitted].double() @ mu
    energy = held_out.features[..., : held_out.fitted].double() @ mu
    base = torch.zeros_like(energy) if held_out.base_log_w is None else held_out.base_log_w.double()
    tokens = float(held_out.human_tokens.sum())
    n, m = energy.shape

    def with_size(size: int) -> Estimate:
        groups, base_groups = (part[:, : m // size * size].reshape(-1, size) for part in (energy, base))
        weighed, unweighed = ops.importance_weights(base_groups - groups), ops.importance_weights(base_groups)
        log_z = weighed.log_mean - unweighed.log_mean
        gains = -energy_of_human - log_z.reshape(n, -1).mean(1)
        kl = -(weighed.weights * groups).sum(1) - log_z
        log_z_error = (weighed.weights - unweighed.weights).square().sum(1).sqrt()
        per_text, error = float(gains.mean()), float(gains.std()) / math.sqrt(n) if n > 1 else math.nan
        return Estimate(
            m=size,
            perplexity=math.exp(-float((held_out.human_log_base.double() + gains).sum()) / tokens),
            gain=per_text * n / tokens,
            gain_error=error * n / tokens,
            gain_per_text=per_text,
            gain_per_text_error=error,
            kl_per_text=float(kl.mean()),
            log_z_error=float(log_z_error.mean()),
            log_z_error_of_mean=float(log_z_error.square().mean().sqrt()) / math.sqrt(len(groups)),
            ess=float(weighed.ess.mean()),
        )

    def plain(log_p: Tensor) -> float:
        return math.exp(-float(log_p.double().sum()) / tokens)

    return Perplexity(
        model=plain(held_out.human_log_p),
        base=plain(held_out.human_log_base),
        tilted=with_size(m),
        by_m=[with_size(size) for size in sizes if size < m],
    )


def run(data: DomainData) -> Perplexity:
    found = compute(data.held_out, data.energy.mu, SIZES)
    if data.energy.base == "model":
        return found

    def tilting_model() -> Perplexity:
        mu = data.to_fit.tilting_model().fit_mu(data.ridge)
        return compute(data.held_out.tilting_model(), mu)

    return replace(found, tilting_model=attempt(tilting_model))


# ---- what the report says -------------------------------------------------------------------------------------------


def section(result: Perplexity) -> Section:
    by_m: list[Row] = [
        [str(x.m), perplexity_cell(x.perplexity, x.ess), f"{x.gain_per_text:.4f} ± {number(x.gain_per_text_error, 4)}",
         number(x.kl_per_text), number(x.log_z_error), ess_cell(x.ess)]
        for x in (*result.by_m, result.tilted)
    ]  # fmt: skip
    fewer = Table(
        ["M", "perplexity", "gain, nats a text", "KL, nats a text", "error of log Z", "ESS"],
        by_m,
        "The same from fewer candidates: log Z from few candidates is too low, which flatters the perplexity. Error of "
        f"log Z: of one prefix; of their mean it is {result.tilted.log_z_error_of_mean:.3f} at M = {result.tilted.m}.",
    )
    other, notes = result.tilting_model, []
    if isinstance(other, NotDone):
        notes.append(f"Tilting p_theta itself: not done: {other.reason}")
    return Section(
        "The paper proves that p_mu is never worse than what it tilts, and better by KL(p_mu || tilted) where human "
        "expectations are met exactly: gain and KL, in nats a text, should agree.",
        [table(result), fewer],
        notes=notes,
        verdict=verdict(result),
    )


def table(result: Perplexity) -> Table:
    rows: list[Row] = [["p_theta, the model itself", number(result.model), "-"]]
    if result.base != result.model:
        rows.append(["the proposal, which is tilted", number(result.base), "-"])
    tilts = {"p_mu": result}
    if isinstance(result.tilting_model, Perplexity):
        tilts["p_mu refitted to tilt p_theta itself"] = result.tilting_model
    for name, found in tilts.items():
        tilted = found.tilted
        gain = f"{tilted.gain:.4f} ± {number(tilted.gain_error, 4)}"
        rows.append([name, perplexity_cell(tilted.perplexity, tilted.ess), gain])
    caption = "Human continuations of held-out prefixes. Gain: over what is tilted, ± standard error over prefixes."
    return Table(["perplexity of human text", "perplexity", "gain, nats a token"], rows, caption)


def verdict(result: Perplexity) -> list[str]:
    tilted = result.tilted
    found = perplexity_cell(tilted.perplexity, tilted.ess)
    sentence = (
        f"Perplexity of human text is {found} under DAEMON and {number(result.base)} under what it tilts: a gain of "
        f"{tilted.gain:.4f} ± {number(tilted.gain_error, 4)} nats a token"
    )
    if found.flag:
        return [f"{sentence}, which means nothing here."]
    if abs(tilted.gain) < 2 * tilted.gain_error:
        sentence += ", not clear of its error"
    elif tilted.gain < 0:
        sentence += ": DAEMON is worse than what it tilts"
    sentences = [f"{sentence}."]
    if result.base != result.model:
        verb = "better" if tilted.perplexity < result.model else "not better"
        sentences.append(f"The model itself has {result.model:.3f}: DAEMON is {verb} than the model.")
    if isinstance(other := result.tilting_model, Perplexity):
        again = other.tilted
        sentences.append(
            f"Refitted to tilt the model itself, DAEMON has {perplexity_cell(again.perplexity, again.ess)}: a gain of "
            f"{again.gain:.4f} ± {number(again.gain_error, 4)} nats a token over the model."
        )
    return sentences
