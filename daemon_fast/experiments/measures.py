"""How near a method comes to human text: distance, its noise floor, and the perplexity of human text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from daemon_fast.decode import Decoded
from daemon_fast.energy import Energy
from daemon_fast.errors import InvalidInput
from daemon_fast.proposals.candidates import Candidates

__all__ = ["Perplexity", "distance_to_human", "human_perplexity", "noise_floor", "relative_rmse", "weighted_mean"]


def weighted_mean(features: Tensor, weights: Tensor) -> Tensor:
    """[N, K] float64: expected metrics of one draw for each prefix, from features [N, M, K] and weights [N, M]."""
    return (features.double() * weights.double()[..., None]).sum(1)


def distance_to_human(method: Tensor, human: Tensor, spread: Tensor | None = None) -> float:
    """Root mean square over metrics of (mean of method - mean of human) / (standard deviation of human).

    Parameters
    ----------
    method : [N, K] values, or expected values, per prefix
    human : [N', K] values per prefix
    spread : [K], optional
        Standard deviation of human text, where more of it is known than `human`.

    Raises
    ------
    InvalidInput
        A metric that doesn't vary over the human texts.
    """
    human = human.double()
    spread = human.std(0) if spread is None else spread
    if not (spread > 0).all():
        raise InvalidInput(f"metric {int((~(spread > 0)).nonzero()[0])} does not vary over the human texts")
    return float(((method.double().mean(0) - human.mean(0)) / spread).square().mean().sqrt())


def noise_floor(num_human: int) -> float:
    """The distance that a method of exactly human expectations would show, from the noise of the human means."""
    return 1 / math.sqrt(num_human)


def relative_rmse(method: Tensor, human: Tensor) -> float:
    """The paper's measure: root mean square over metrics of (mean of method - mean of human) / mean of human."""
    means = human.double().mean(0)
    return float(((method.double().mean(0) - means) / means).square().mean().sqrt())


@dataclass(frozen=True)
class Perplexity:
    """Of human text, per token.

    Attributes
    ----------
    model : under p_theta at temperature 1
    base : under what the artefact tilts: the proposal, or p_theta again
    tilted : under p_mu
    gain, gain_error : nats per token that p_mu gains over the base, and the standard error over prefixes
    """

    model: float
    base: float
    tilted: float
    gain: float
    gain_error: float


def human_perplexity(energy: Energy, human: Candidates, human_features: Tensor, decoded: Decoded) -> Perplexity:
    """Perplexity of human continuations, with log Z of each prefix from the decoder's candidates.

    log p_mu(x | prefix) = log base(x | prefix) - E(x) - log Z(prefix)

    Parameters
    ----------
    human : N continuations, scored (M = 1)
    human_features : [N, 1, K]
    decoded : of the same N prefixes
    """
    tokens = float(human.lengths.sum())
    log_model = human.log_p[:, 0]
    log_base = human.log_q[:, 0] if energy.base == "proposal" else log_model
    gains = -(human_features[:, 0].double() @ energy.mu) - decoded.log_z.double()
    error = float(gains.std() * math.sqrt(len(gains))) / tokens if len(gains) > 1 else math.nan
    return Perplexity(
        model=math.exp(-float(log_model.sum()) / tokens),
        base=math.exp(-float(log_base.sum()) / tokens),
        tilted=math.exp(-float((log_base + gains).sum()) / tokens),
        gain=float(gains.sum()) / tokens,
        gain_error=error,
    )
