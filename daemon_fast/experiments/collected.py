"""What the studies read, human text and candidates as tensors, and what their results share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from daemon_fast import ops
from daemon_fast.energy import Energy
from daemon_fast.errors import FitError, Undefined
from daemon_fast.experiments.measures import distance_interval, distance_to_human, weighted_mean
from daemon_fast.fit import fit
from daemon_fast.fit.samples import Block
from daemon_fast.ops import Draw, Normalization
from daemon_fast.proposals.candidates import Candidates
from daemon_fast.race import probabilities

__all__ = ["Collected", "Ess", "Means", "NotDone", "attempt"]

T = TypeVar("T")


@dataclass(frozen=True)
class Means:
    """Of K metrics, over prefixes; fractions, but for `ent`, a perplexity, and `nats`, its logarithm."""

    mean: list[float]
    standard_error: list[float]

    @classmethod
    def of(cls, values: Tensor) -> Means:
        """Of values [N, K]. The error of one prefix is not known: NaN."""
        values, n = values.double(), len(values)
        error = values.std(0) / math.sqrt(n) if n > 1 else torch.full_like(values[0], math.nan)
        return cls(values.mean(0).tolist(), error.tolist())


@dataclass(frozen=True)
class Ess:
    """Effective sample size of the candidates of a prefix, over prefixes."""

    mean: float
    min: float
    candidates: int

    @classmethod
    def of(cls, weights: Tensor) -> Ess:
        """Of normalised weights [N, M]."""
        ess = 1 / weights.square().sum(1)
        return cls(float(ess.mean()), float(ess.min()), weights.shape[1])


@dataclass(frozen=True)
class NotDone:
    """Stands where a result would: the study does not apply, a fit of it has no solution, or a figure is undefined."""

    reason: str


def attempt(study: Callable[[], T]) -> T | NotDone:
    """What a study finds, or why its fit has no solution or a figure no value. Any other fault ends the run."""
    try:
        return study()
    except (FitError, Undefined) as error:
        return NotDone(str(error))


@dataclass(frozen=True)
class Collected:
    """Human continuations of N prefixes, and M candidates of each.

    Attributes
    ----------
    names : K' metric names
    fitted : K, how many of them mu is for: the first. Others, such as `div`, are only reported
    spread : [K'] standard deviation of all human text measured in this domain, the unit of distance
    human : [N, K'] metrics of the human continuations
    human_tokens : [N] their lengths
    human_log_p : [N] their log-probability under p_theta at temperature 1, in nats
    human_log_base : [N] the same under what is tilted: the proposal, or p_theta again
    features : [N, M, K'] metrics of the candidates
    log_p, log_q : [N, M] their log-probability under p_theta at temperature 1, and under what they were drawn from
    lengths : [N, M]
    base_log_w : [N, M] base log-weights, or None where they are 0
    draw : the rule that chooses among candidates
    truncated : whether the proposal can't draw all that p_theta can: top-k, top-p or min-p leave tokens out
    """

    names: list[str]
    fitted: int
    spread: Tensor
    human: Tensor
    human_tokens: Tensor
    human_log_p: Tensor
    human_log_base: Tensor
    features: Tensor
    log_p: Tensor
    log_q: Tensor
    lengths: Tensor
    base_log_w: Tensor | None = None
    draw: Draw = "sir"
    truncated: bool = False

    @classmethod
    def of(
        cls, energy: Energy, names: list[str], candidates: Candidates, features: Tensor, human: Candidates,
        of_human: Tensor, spread: Tensor,
    ) -> Collected:  # fmt: skip
        """From candidates and scored human texts, whose metrics are [N, M, K'] and [N, K']: those of `energy` first."""
        log_p = human.log_p[:, 0]
        return cls(
            names=names,
            fitted=len(energy.names),
            spread=spread,
            human=of_human,
            human_tokens=human.lengths,
            human_log_p=log_p,
            human_log_base=human.log_q[:, 0] if energy.base == "proposal" else log_p,
            features=features,
            log_p=candidates.log_p,
            log_q=candidates.log_q,
            lengths=candidates.lengths.reshape(candidates.shape),
            base_log_w=energy.base_log_w(candidates),
            draw=energy.draw,
            truncated=energy.proposal_settings.truncates,
        )

    @property
    def fitted_names(self) -> list[str]:
        return self.names[: self.fitted]

    def columns(self, keep: Sequence[int]) -> Collected:
        """The same with some of the fitted metrics only."""
        at = list(keep)
        return replace(
            self, names=[self.names[k] for k in at], fitted=len(at), spread=self.spread[at], human=self.human[:, at],
            features=self.features[:, :, at],
        )  # fmt: skip

    def first(self, prefixes: int, human: int | None = None) -> Collected:
        """The same with the candidates of the first prefixes only, and the first human continuations only."""
        cut: dict[str, Any] = {
            name: getattr(self, name)[:prefixes] for name in ("features", "log_p", "log_q", "lengths")
        }
        cut |= {name: getattr(self, name)[:human] for name in vars(self) if name.startswith("human")}
        base_log_w = None if self.base_log_w is None else self.base_log_w[:prefixes]
        return replace(self, **cut, base_log_w=base_log_w)

    def tilting_model(self) -> Collected:
        """The same where p_theta itself is tilted, not the proposal."""
        truncated = self.truncated or bool((self.human_log_base == -torch.inf).any())
        return replace(
            self, human_log_base=self.human_log_p, base_log_w=self.log_p - self.log_q, truncated=truncated
        )  # fmt: skip

    def fit_mu(self, ridge: float, normalization: Normalization = "per_prefix", draw: Draw | None = None) -> Tensor:
        """[K] float64 mu of a fit of these candidates to these human texts, for their own rule unless told another."""
        block, human = self._block, self.human[:, : self.fitted]
        draw = draw or ("sir" if normalization == "global" else self.draw)
        return fit(
            block.features, human, block.base_log_w, normalization=normalization, draw=draw, ridge=ridge,
            names=self.fitted_names,
        ).mu  # fmt: skip

    @property
    def _block(self) -> Block:
        return Block(self.features[..., : self.fitted], self.base_log_w)

    def log_w(self, mu: Tensor) -> Tensor:
        """[N, M] float64"""
        return self._block.log_w(mu)

    def weights(self, mu: Tensor) -> Tensor:
        """[N, M] float64 importance weights of each prefix's candidates."""
        return ops.importance_weights(self.log_w(mu)).weights

    def chances(self, mu: Tensor) -> Tensor:
        """[N, M] float64 chances of each prefix's candidates to be chosen."""
        return probabilities(self.log_w(mu)) if self.draw == "race" else self.weights(mu)

    def expected(self, mu: Tensor | None = None) -> Tensor:
        """[N, K'] float64 metrics of one draw for each prefix by mu, or by the candidates as they come."""
        return self.features.double().mean(1) if mu is None else weighted_mean(self.features, self.chances(mu))

    def distance(self, values: Tensor) -> float:
        """To human text, of values [N, K'], over the fitted metrics."""
        k = self.fitted
        return distance_to_human(values[:, :k], self.human[:, :k], self.spread[:k])

    def interval(self, values: Tensor, seed: int = 0) -> tuple[float, float]:
        """95%, of that distance."""
        k = self.fitted
        return distance_interval(values[:, :k], self.human[:, :k], self.spread[:k], seed)
