"""How near a method comes to human text: distance, its noise floor, and MAUVE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from daemon_fast.errors import InvalidInput, require
from daemon_fast.models import DEFAULT_ENCODER, load_encoder
from daemon_fast.proposals.transformers import TransformersProposal

__all__ = [
    "FEATURIZERS",
    "distance_interval",
    "distance_to_human",
    "embed",
    "mauve_scores",
    "noise_floor",
    "relative_rmse",
    "weighted_mean",
]

FEATURIZERS = ("encoder", "model")
EMBEDDED = 100  # texts at once
TAIL = 0.025  # on either side of an interval


def weighted_mean(features: Tensor, weights: Tensor) -> Tensor:
    """[N, K] float64: expected metrics of one draw for each prefix, from features [N, M, K] and weights [N, M]."""
    return (features.double() * weights.double()[..., None]).sum(1)


def distance_to_human(method: Tensor, human: Tensor, spread: Tensor) -> float:
    """Root mean square over metrics of (mean of method - mean of human) / (standard deviation of human text).

    Parameters
    ----------
    method : [N, K] values, or expected values, per prefix
    human : [N', K] values per prefix
    spread : [K] standard deviation of all human text that was measured, `human` and more

    Raises
    ------
    InvalidInput
        A metric that doesn't vary over the human texts.
    """
    if not (spread > 0).all():
        raise InvalidInput(f"metric {int((~(spread > 0)).nonzero()[0])} does not vary over the human texts")
    return float(((method.double().mean(0) - human.double().mean(0)) / spread).square().mean().sqrt())


def distance_interval(differences: Tensor, resamples: Tensor) -> tuple[float, float]:
    """95% confidence interval of a distance, by the bootstrap.

    A distance is a norm: noise lifts it, and the resampled ones doubly, so that their quantiles are no interval where
    it is small. Instead the interval holds each distance t at which the one that was found would be neither among the
    lowest nor the highest 2.5%: t in the direction that was found, plus the noise of the resampled means; and the one
    that was found, which by luck can be lower than any distance explains.

    Parameters
    ----------
    differences : [N, K] method - human, in standard deviations of human text; of the same prefix each
    resamples : [B, N] numbers of resampled prefixes
    """

    def distance(values: Tensor) -> Tensor:
        return values.square().mean(-1).sqrt()

    mean = differences.mean(0)
    found, noise = distance(mean), torch.stack([differences[some].mean(0) for some in resamples]) - mean
    direction = mean / found.clamp_min(1e-300)

    def up_to(holds: Callable[[Tensor], Tensor]) -> float:
        """The distance up to which something holds of the distances found in its place."""
        low, high = 0.0, float(found + distance(noise).max())
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(distance(middle * direction + noise)) else (low, middle)
        return low

    lowest = up_to(lambda others: (others >= found).double().mean() <= TAIL)
    highest = up_to(lambda others: (others <= found).double().mean() > TAIL)
    return lowest, max(highest, float(found))


def noise_floor(num_human: int) -> float:
    """The distance that a method of exactly human expectations would show, from the noise of the human means."""
    return 1 / math.sqrt(num_human)


def relative_rmse(method: Tensor, human: Tensor) -> float:
    """The paper's measure: root mean square over metrics of (mean of method - mean of human) / mean of human."""
    means = human.double().mean(0)
    return float(((method.double().mean(0) - means) / means).square().mean().sqrt())


def mauve_scores(human: np.ndarray[Any, Any], others: np.ndarray[Any, Any], draws: int) -> list[float]:
    """MAUVE of texts against human ones, by their embeddings: one score for each of `draws` seeds of its clustering.

    Parameters
    ----------
    human : [N, d]
    others : [draws or fewer, N, d], taken in turn

    Raises
    ------
    MissingPackage
        mauve-text is not installed.
    """
    compute = require("mauve", "MAUVE needs", "'daemon-fast[evaluate]'").compute_mauve
    return [
        float(compute(p_features=human, q_features=others[seed % len(others)], seed=seed, verbose=False).mauve)
        for seed in range(draws)
    ]


@torch.inference_mode()
def embed(
    texts: Sequence[Sequence[int]], proposal: TransformersProposal, featurizer: str, encoder: str | None
) -> np.ndarray[Any, Any]:
    """[N, d] of N lists of token ids: sentence embeddings, or the language model's last hidden state.

    featurizer : "encoder" or "model"
    """
    if featurizer == "encoder":
        loaded = load_encoder(encoder or DEFAULT_ENCODER)
        return np.asarray(loaded.encode(proposal.detokenize(texts), show_progress_bar=False), dtype=np.float32)
    parts = []
    for start in range(0, len(texts), EMBEDDED):
        rows = [torch.tensor(row) for row in texts[start : start + EMBEDDED]]
        # Padding stands behind, where causal attention does not look.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(proposal.model.device)
        states = proposal.model(ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        last = torch.tensor([len(row) - 1 for row in rows], device=ids.device)
        parts.append(states[torch.arange(len(rows), device=ids.device), last].float().cpu().numpy())
    return np.concatenate(parts)
