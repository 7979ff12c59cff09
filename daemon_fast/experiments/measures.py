"""How near a method comes to human text: distance, its noise floor, and MAUVE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from daemon_fast.errors import Undefined, require
from daemon_fast.models import DEFAULT_ENCODER, load_encoder
from daemon_fast.proposals.transformers import TransformersProposal
from daemon_fast.seeds import generator

__all__ = [
    "FEATURIZERS", "distance_interval", "distance_to_human", "embed", "mauve_scores", "noise_floor", "relative_rmse",
    "wasserstein", "weighted_mean",
]  # fmt: skip

FEATURIZERS = ("encoder", "model")
EMBEDDED = 100  # texts at once
NOISE_DRAWS = 4000


def weighted_mean(features: Tensor, weights: Tensor) -> Tensor:
    """[N, K] float64: expected metrics of one draw for each prefix, from features [N, M, K] and weights [N, M]."""
    return (features.double() * weights.double()[..., None]).sum(1)


def distance_to_human(method: Tensor, human: Tensor, spread: Tensor) -> float:
    """Root mean square over metrics of (mean of method - mean of human) / (standard deviation of human text).

    Without what the noise of both means adds to its square: of a method whose expectations are human, the square is 0
    on average, and here 0 where it would be below.

    Parameters
    ----------
    method : [N, K] values, or expected values, per prefix
    human : [N', K] values per prefix; the first are of the same prefixes
    spread : [K] standard deviation of all human text that was measured, `human` and more

    Raises
    ------
    Undefined
        A metric that doesn't vary over the human texts, or a single prefix.
    """
    gap, terms = _gap(method, human, spread)
    return math.sqrt(max(0.0, float((gap.square() - terms.square().sum(0)).mean())))


def distance_interval(method: Tensor, human: Tensor, spread: Tensor, seed: int = 0) -> tuple[float, float]:
    """A 95% interval of that distance: those at which a gap as small as the one seen, and one as large, is no surprise.

    At a true distance D, the squared gap is |sqrt(K) D u + e|², with e normal noise of the covariance that the texts
    show, and u the direction of the gap. An end is the D at which 2.5% of it lie beyond the one seen. Where noise has
    made the gap smaller than it is on average for human expectations, the upper end is that of the average: a lucky
    sample does not measure better than others.

    Parameters
    ----------
    method, human, spread : as of `distance_to_human`
    seed : of the noise

    Raises
    ------
    Undefined
        As `distance_to_human`.
    """
    gap, terms = _gap(method, human, spread)
    covariance = terms.T @ terms
    variances, axes = torch.linalg.eigh(covariance)
    noise = torch.randn(NOISE_DRAWS, len(gap), generator=generator(seed, "interval"), dtype=torch.float64)
    noise = (noise * variances.clamp_min(0).sqrt()) @ axes.T
    size, length = noise.square().sum(1), float(gap.norm().clamp_min(1e-300))
    direction = gap / length
    along, variance = noise @ direction, float(direction @ covariance @ direction)
    # The direction is as noisy as the gap, and its error goes with the gap's: too little noise along it is seen where
    # the gap is too small. The upper end allows for that.
    error = 2 * float((noise @ (covariance @ direction - variance * direction)).std()) / length
    most = min(float(variances[-1]), variance + error)
    inflated = along * math.sqrt(most / max(variance, 1e-300))

    def end(seen: float, along: Tensor, share: float) -> float:
        """The D at which a share of the squared gaps lies below the one seen; 0 if fewer do at D = 0 already."""
        low, high = 0.0, 1.0 + 2 * math.sqrt(seen / len(gap)) + 4 * float(size.max().sqrt())
        for _ in range(30):
            middle = (low + high) / 2
            squares = len(gap) * middle**2 + 2 * math.sqrt(len(gap)) * middle * along + size
            low, high = (middle, high) if float((squares <= seen).double().mean()) > share else (low, middle)
        return low

    seen, usual = float(gap.square().sum()), float(covariance.trace())
    return end(seen, along, 0.975), end(max(seen, usual), inflated, 0.025)


def _gap(method: Tensor, human: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """[K] mean of method - mean of human, in standard deviations; [max(N, N'), K] terms whose squares sum to its noise.

    A term is what one prefix adds, by both of its texts: so noise that both have in common is not counted.
    """
    n, h = len(method), len(human)
    if min(n, h) < 2:
        raise Undefined("the distance to human text needs two prefixes at least: one has no standard deviation")
    if not (spread > 0).all():
        raise Undefined(f"metric {int((~(spread > 0)).nonzero()[0])} does not vary over the human texts")
    method, human = method.double() / spread, human.double() / spread
    terms = torch.zeros(max(n, h), method.shape[1], dtype=torch.float64)
    terms[:n] += (method - method.mean(0)) / n
    terms[:h] -= (human - human.mean(0)) / h
    return method.mean(0) - human.mean(0), terms * math.sqrt(min(n, h) / (min(n, h) - 1))


def noise_floor(num_human: int) -> float:
    """What the noise of the human means alone adds: a distance below it is hardly told from 0."""
    return 1 / math.sqrt(num_human)


def relative_rmse(method: Tensor, human: Tensor) -> float | None:
    """The paper's measure: root mean square over metrics of (mean of method - mean of human) / mean of human.

    None where a human mean is 0.
    """
    means = human.double().mean(0)
    if (means == 0).any():
        return None
    return float(((method.double().mean(0) - means) / means).square().mean().sqrt())


def wasserstein(values: Tensor, weights: Tensor, human: Tensor) -> float:
    """Wasserstein-1 distance of the law of `values` [S] with `weights` [S], which sum to 1, from human values [N].

    The area between the two distribution functions.
    """
    values, human = values.double(), human.double()
    points, order = torch.cat([values, human]).sort()
    mass = torch.cat([weights.double(), torch.full_like(human, -1 / len(human))])[order]
    return float((mass.cumsum(0)[:-1].abs() * points.diff()).sum())


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
        # An empty text is that of its end alone.
        rows = [torch.tensor(row or proposal.eos_token_ids[:1]) for row in texts[start : start + EMBEDDED]]
        # Padding stands behind, where causal attention does not look.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(proposal.model.device)
        states = proposal.model(ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        last = torch.tensor([len(row) - 1 for row in rows], device=ids.device)
        parts.append(states[torch.arange(len(rows), device=ids.device), last].float().cpu().numpy())
    return np.concatenate(parts)
