"""A fit to human texts: prefixes and continuations, candidates, metrics, mu."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from daemon_fast import metrics as metrics_module
from daemon_fast.data.collect import batches, human_folder, scores
from daemon_fast.data.texts import Pairs, read_texts, split
from daemon_fast.energy import Base, Energy
from daemon_fast.errors import InvalidInput
from daemon_fast.fit import Ridge, fit
from daemon_fast.metrics import Function, Metric
from daemon_fast.models import DEFAULT_ENCODER, Encoder
from daemon_fast.ops import Normalization
from daemon_fast.proposals.base import Proposal

__all__ = ["Measured", "fit_energy", "measure"]


def fit_energy(
    proposal: Proposal,
    human: str | os.PathLike[str] | Sequence[str] | Pairs,
    metrics: Sequence[str | Metric | Function] = metrics_module.DEFAULT,
    *,
    encoder: Encoder | str = DEFAULT_ENCODER,
    num_prefixes: int = 96,
    num_targets: int | None = None,
    prefix_tokens: int = 32,
    normalization: Normalization = "per_prefix",
    base: Base = "proposal",
    ridge: Ridge = "cv",
    bootstrap: int = 0,
    seed: int = 0,
    batch_size: int = 4,
    directory: str | os.PathLike[str] | None = None,
) -> Energy:
    """Fit an artefact: the proposal, tilted, then has the expected metrics of human text.

    Each human text is cut into a prefix and a continuation as long as the proposal's; the proposal continues the
    prefixes; mu is what makes the candidates' expected metrics those of the human continuations.

    Parameters
    ----------
    proposal : draws the candidates: M of `max_new_tokens` tokens at most, for each prefix
    human : texts; or a file or embedded collection, see `daemon_fast.data.texts.read_texts`; or prefixes and
        continuations, `Pairs`, of which all are used unless num_prefixes and num_targets say less
    metrics : names, metric objects and functions, see `daemon_fast.metrics.parse`
    encoder : for `coh`, a sentence-transformers model, or its id, path or embedded name
    num_prefixes : N, of which candidates are drawn
    num_targets : human continuations that give the targets; default: those of the prefixes
    prefix_tokens : where texts are cut
    normalization, ridge, bootstrap : see `daemon_fast.fit`
    base : "proposal": that is tilted, as in the paper; "model": p_theta at temperature 1 is
    seed : of the choice of texts, the candidates and the bootstrap
    batch_size : prefixes drawn together
    directory : keeps candidates batch by batch, so that a run that is cut off goes on there. None: nothing is kept

    Raises
    ------
    DataError
        Too few texts are long enough.
    InvalidInput, InfeasibleTargets, FitDidNotConverge
        See `daemon_fast.fit`.

    Examples
    --------
    >>> proposal = TransformersProposal.load(num_candidates=25, min_new_tokens=64, max_new_tokens=64, temperature=0.97)
    >>> fit_energy(proposal, "wikipedia", ["sr_2", "sr_4", "ent"]).save("energy.json")
    """
    objects = metrics_module.parse(metrics, encoder)
    if isinstance(human, Pairs):
        pairs, targets = human[:num_prefixes], human[:num_targets]
    else:
        texts = read_texts(human) if isinstance(human, str | os.PathLike) else human
        wanted, new_tokens = max(num_prefixes, num_targets or 0), proposal.settings.max_new_tokens
        if proposal.tokenizer is None:
            raise InvalidInput("human texts need a proposal with a tokenizer; without one, give Pairs of token ids")
        found = split(texts, proposal.tokenizer, prefix_tokens, new_tokens, wanted, seed)
        pairs, targets = found[:num_prefixes], found[: num_targets or num_prefixes]
    measured = measure(
        proposal, pairs, objects, targets=targets, base=base, seed=seed, batch_size=batch_size, directory=directory
    )
    result = fit(
        measured.features, measured.human, measured.base_log_w, normalization=normalization, ridge=ridge,
        names=metrics_module.column_names(objects), bootstrap=bootstrap, seed=seed, progress=True,
    )  # fmt: skip
    return result.energy(objects, proposal.settings, base, seed, len(targets))


class Measured(NamedTuple):
    """What a fit reads."""

    features: Tensor  # [N, M, K] float32, of the candidates
    human: Tensor  # [N', K] float32, of the human continuations
    base_log_w: Tensor | None  # [N, M] float64
    seconds: float  # that drawing the candidates took, in whichever run


def measure(
    proposal: Proposal,
    pairs: Pairs,
    metrics: Sequence[Metric],
    *,
    targets: Pairs | None = None,
    base: Base = "proposal",
    seed: int = 0,
    batch_size: int = 4,
    directory: str | os.PathLike[str] | None = None,
) -> Measured:
    """Draw candidates of `pairs` and measure them, and the continuations of `targets` (default: of the same pairs).

    Memory holds the metrics of all candidates, and the candidates themselves of one batch.
    """
    features, base_log_w, seconds = [], [], 0.0
    for candidates, spent in batches(proposal, pairs.prefixes, directory, seed, batch_size, "candidates to fit"):
        features.append(metrics_module.features(metrics, candidates))
        base_log_w += [] if base == "proposal" else [candidates.log_p - candidates.log_q]
        seconds += spent
    folder = None if directory is None else human_folder(directory)
    scored = scores(proposal, pairs if targets is None else targets, folder)
    human = [metrics_module.features(metrics, batch)[:, 0] for batch in scored]
    return Measured(torch.cat(features), torch.cat(human), torch.cat(base_log_w) if base_log_w else None, seconds)
