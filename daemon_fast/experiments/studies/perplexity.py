"""Perplexity of human text under the model, under what is tilted, and under p_mu (Ji et al. 2024, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from daemon_fast import ops
from daemon_fast.errors import Undefined
from daemon_fast.experiments.collected import Collected, NotDone, attempt
from daemon_fast.experiments.domain import DomainData
from daemon_fast.experiments.page import Row, Section, Table, ess_cell, number, perplexity_cell

HEADING = "Perplexity of human text"
SIZES = (5, 10, 25, 50, 100)
LARGEST = 700.0  # of a logarithm whose exponential float64 holds


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

    log p_mu(x) = log base(x) - E(x) - log Z, Z the mean of exp(-E) under the base, for which a prefix's M candidates
    stand: with base weights v̄_j ∝ exp(b_j), which are 1/M where the proposal itself is tilted, and with
    w̄_j ∝ exp(b_j - E_j),

        log Z = log Σ_j v̄_j exp(-E_j)        KL(p_mu || base) = -Σ_j w̄_j E_j - log Z

    The first is too low by O(1/M), the second off by as much: a jackknife over the candidates leaves O(1/M²). The
    standard error of log Z is sqrt(Σ_j (w̄_j - v̄_j)²), by the delta method. If human expectations are met, the mean
    gain of p_mu over the base, in nats a text, is that KL.

    Parameters
    ----------
    mu : [K]
    sizes : numbers of candidates to repeat it with, in groups that use all candidates alike

    Raises
    ------
    Undefined
        Human text that the proposal can't draw, one prefix or candidate, or a prefix whose log Z a single candidate
        decides.
    """
    if (unseen := int((held_out.human_log_base == -torch.inf).sum())) > 0:
        raise Undefined(
            f"the proposal leaves out tokens, and can't draw {unseen} of {len(held_out.human)} human texts: their "
            "perplexity is infinite, under it and under what tilts it"
        )
    if held_out.truncated and held_out.base_log_w is not None:
        raise Undefined(
            "the proposal leaves out tokens (top-k, top-p or min-p), so that its candidates can't stand for all that "
            "p_theta draws: log Z of tilting p_theta is not known"
        )
    energy_of_human = held_out.human[:, : held_out.fitted].double() @ mu
    tokens, (n, m) = float(held_out.human_tokens.sum()), held_out.lengths.shape
    if n < 2 or m < 2:
        raise Undefined(f"a gain and its error need two prefixes and two candidates at least: there are {n} x {m}")
    tilt = -(held_out.features[..., : held_out.fitted].double() @ mu)
    base = torch.zeros_like(tilt) if held_out.base_log_w is None else held_out.base_log_w.double()

    def perplexity_of(log_p: Tensor) -> float:
        a_token = -float(log_p.double().sum()) / tokens
        if not a_token < LARGEST:
            raise Undefined(f"perplexity of human text is too large for a number: exp({a_token:.4g})")
        return math.exp(a_token)

    def with_size(size: int) -> Estimate:
        starts = torch.arange(0, m, math.gcd(m, size))  # groups overlap where M is no multiple of their size
        at = (starts[:, None] + torch.arange(size)) % m
        found = log_z_and_kl(*(values[:, at].reshape(-1, size) for values in (base, tilt)))
        gains = -energy_of_human - found.log_z.reshape(n, -1).mean(1)
        per_text, error = float(gains.mean()), float(gains.std()) / math.sqrt(n)
        return Estimate(
            m=size,
            perplexity=perplexity_of(held_out.human_log_base.double() + gains),
            gain=per_text * n / tokens,
            gain_error=error * n / tokens,
            gain_per_text=per_text,
            gain_per_text_error=error,
            kl_per_text=float(found.kl.mean()),
            log_z_error=float(found.log_z_error.mean()),
            log_z_error_of_mean=float(found.log_z_error.square().mean().sqrt()) / math.sqrt(n * m / size),
            ess=float(found.ess.mean()),
        )

    return Perplexity(
        model=perplexity_of(held_out.human_log_p),
        base=perplexity_of(held_out.human_log_base),
        tilted=with_size(m),
        by_m=[with_size(size) for size in sizes if size < m],
    )


class LogZ(NamedTuple):
    """Of G groups of candidates, each [G] float64."""

    log_z: Tensor
    log_z_error: Tensor
    kl: Tensor
    ess: Tensor


def log_z_and_kl(base: Tensor, tilt: Tensor) -> LogZ:
    """log Z and KL(p_mu || base), jackknifed, from base log-weights and -E, each [G, M]; see `compute`.

    Raises
    ------
    Undefined
        A group with a candidate without which nothing is left.
    """
    m, ess = base.shape[1], ops.importance_weights(base + tilt).ess
    v, w = base.softmax(1), (base + tilt).softmax(1)
    # From the tilt of the largest weight, so that its rounding does not hide the others.
    most = tilt.gather(1, w.argmax(1, keepdim=True))
    tilt = tilt - most
    mean = (w * tilt).sum(1, keepdim=True)
    log_z = (base + tilt).logsumexp(1, keepdim=True) - base.logsumexp(1, keepdim=True)
    v_left, w_left = _left_out(v), _left_out(w)
    if not ((v_left > 0) & (w_left > 0)).all():
        raise Undefined("one candidate has all the weight of its prefix: log Z is not known")
    # Without candidate j:
    log_zs = log_z + w_left.log() - v_left.log()
    means = mean + w * (mean - tilt) / w_left
    jackknifed = m * log_z - (m - 1) * log_zs.mean(1, keepdim=True)
    kl = m * (mean - log_z) - (m - 1) * (means - log_zs).mean(1, keepdim=True)
    return LogZ((jackknifed + most)[:, 0], (w - v).square().sum(1).sqrt(), kl[:, 0], ess)


def _left_out(weights: Tensor) -> Tensor:
    """[G, M] sums of the other weights of a group, from weights [G, M] that sum to 1."""
    first = weights.argmax(1, keepdim=True)
    return (1 - weights).scatter(1, first, weights.scatter(1, first, 0.0).sum(1, keepdim=True))


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
        "The same from fewer candidates. log Z is jackknifed over them: from few it would be too low, and flatter the "
        "perplexity. Error of log Z: of one prefix; of their mean it is "
        f"{result.tilted.log_z_error_of_mean:.3f} at M = {result.tilted.m}.",
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
