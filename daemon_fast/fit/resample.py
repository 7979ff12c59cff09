"""What resampled prefixes and human texts say of a fit: which ridge to take, and how certain mu is."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from daemon_fast.errors import FitError, InvalidInput
from daemon_fast.fit.dual import Problem
from daemon_fast.fit.newton import newton
from daemon_fast.fit.samples import Block, InMemory
from daemon_fast.seeds import generator

__all__ = ["FOLDS", "bootstrap", "cross_validated_ridge", "cv_needs"]

FOLDS = 5
# In units of the fit's curvature, from hardly any tilt to the exact fit: each solution starts the next.
RIDGES = (*(0.01 * 2.0**i for i in range(7, -3, -1)), 0.0)


def cross_validated_ridge(problem: Problem, human: Tensor | None) -> float:
    """The ridge with the lowest dual on prefixes and human texts that were left out of the fit.

    The dual is SIR's, whichever rule draws: the mean over human texts of -log p_mu(x) / p_0(x), so that the lowest
    makes them the likeliest.
    """
    if human is None:
        raise InvalidInput("ridge = 'cv' needs targets of shape [N', K], one row a human text, got [K] means")
    if not isinstance(problem.samples, InMemory):
        raise InvalidInput("ridge = 'cv' needs samples in one tensor: blocks can't be split")
    if min(problem.samples.shape[0], len(human)) < FOLDS:
        raise InvalidInput(cv_needs(problem.samples.shape[0], len(human)))
    of_prefix, of_text = (torch.arange(count, device="cpu") % FOLDS for count in (problem.samples.shape[0], len(human)))
    loss, weighted = dict.fromkeys(RIDGES, 0.0), _weighted(problem)
    try:
        newton(problem)
    except FitError:
        loss[0.0] = math.inf  # parts of the prefixes may be within reach of their texts, but all are not
    for fold in range(FOLDS):
        own = (of_prefix == fold) & weighted
        if not own.any() or own.sum() == weighted.sum():
            continue
        to_fit = _part(problem, (of_prefix != fold) & weighted, human[of_text != fold])
        left_out = _part(problem, own, human[of_text == fold])
        nu = None
        for ridge in RIDGES:
            try:
                nu, _ = newton(replace(to_fit, ridge=ridge), start=nu)
                loss[ridge] += left_out.dual(nu)[0]
            except FitError:
                loss[ridge] = math.inf
    return min(loss, key=lambda ridge: loss[ridge])


def cv_needs(prefixes: int, texts: int) -> str:
    """What is said of too few for cross-validation."""
    least = f"at least {FOLDS} prefixes and {FOLDS} human texts"
    return f"ridge = 'cv' needs {least}, got {prefixes} and {texts}: give a number"


def bootstrap(
    problem: Problem, human: Tensor | None, nu: Tensor, replicates: int, seed: int, progress: bool
) -> tuple[Tensor | None, int]:
    """[2, K] quantiles of mu over resampled prefixes, and the number of replicates that had no solution."""
    if not isinstance(problem.samples, InMemory):
        raise InvalidInput(f"bootstrap = {replicates} needs samples in one tensor: blocks can't be resampled")
    random, n = generator(seed, "bootstrap"), problem.samples.shape[0]
    fitted: list[Tensor] = []
    weighted = _weighted(problem)
    for _ in tqdm(range(replicates), desc="bootstrap", disable=not progress):
        drawn = torch.randint(n, (n,), generator=random, device="cpu")
        # Human values of the same prefixes are drawn with them; of other texts, by themselves.
        of_human = drawn
        if human is not None and len(human) != n:
            of_human = torch.randint(len(human), (len(human),), generator=random, device="cpu")
        some = drawn[weighted[drawn]]
        if not len(some):
            continue
        replicate = _part(problem, some, None if human is None else human[of_human])
        try:
            fitted.append(newton(replicate, start=nu)[0] / problem.scale)
        except FitError:
            continue
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")
    interval = torch.stack(fitted).quantile(quantiles, dim=0) if fitted else None
    return interval, replicates - len(fitted)


def _weighted(problem: Problem) -> Tensor:
    """[N] bool: prefixes that have candidates of positive weight. By global weights others may have none."""
    assert isinstance(problem.samples, InMemory)
    excluded, n = problem.samples.block.excluded, problem.samples.shape[0]
    return torch.ones(n, dtype=torch.bool, device="cpu") if excluded is None else ~excluded[..., 0].all(1).cpu()


def _part(problem: Problem, prefixes: Tensor, human: Tensor | None) -> Problem:
    """The same problem of some prefixes (indices, or a mask) and human texts, in the same units."""
    assert isinstance(problem.samples, InMemory)
    block = problem.samples.block
    base_log_w = None if block.base_log_w is None else block.base_log_w[prefixes]
    targets = problem.targets if human is None else human.mean(0)
    return replace(problem, samples=InMemory(Block(block.features[prefixes], base_log_w)), targets=targets)
