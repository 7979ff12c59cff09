"""Fitting mu, the coefficients whose tilted model has the target expectations: checks, diagnostics, bootstrap.

The dual and the methods that minimise it are in `daemon_fast.solvers`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from daemon_fast import ops, solvers
from daemon_fast.errors import FitDidNotConverge, InfeasibleTargets, InvalidInput
from daemon_fast.samples import Block, InMemory, Samples
from daemon_fast.solvers import Problem

__all__ = ["FitResult", "Normalization", "Ridge", "fit"]

Normalization = Literal["per_prefix", "global"]
Method = Literal["newton", "rmse"]
Ridge = float | Literal["cv"]

FOLDS = 5
# In units of the fit's curvature, from hardly any tilt to the exact fit: each solution starts the next.
RIDGES = (*(0.01 * 2.0**i for i in range(7, -3, -1)), 0.0)


@dataclass(frozen=True)
class FitResult:
    """A fitted mu and what is known of it.

    Attributes
    ----------
    mu : [K] float64
    names : K metric names
    targets : [K] float64
    residual : [K] float64
        Expectation under the fitted weights minus target, in the metric's own unit.
    scale : [K] float64
        Standard deviation of each metric within a prefix (per_prefix) or over all samples (global).
    ridge : float
        The one given, or the one that cross-validation chose.
    converged : bool
        Residuals within 1e-9 standard deviations (with ridge > 0: the gradient of the penalised dual).
    iterations : int
        Newton or Adam steps.
    condition_number : float
        Of the Hessian in standardised coordinates, at mu; inf for exactly collinear metrics.
    ess_mean, ess_min : float
        Effective sample size over the prefixes, of num_candidates.
    kl : float
        Estimate of KL(p_mu ‖ p_theta) in nats: how far the tilt moves the model, averaged over prefixes.
    confidence_interval : [2, K] float64 or None
        2.5% and 97.5% bootstrap quantiles of mu over prefixes.
    bootstrap_infeasible : int
        Bootstrap replicates without a solution; they are not in the interval.
    """

    mu: Tensor
    names: tuple[str, ...]
    targets: Tensor
    residual: Tensor
    scale: Tensor
    normalization: Normalization
    method: Method
    ridge: float
    converged: bool
    iterations: int
    condition_number: float
    ess_mean: float
    ess_min: float
    kl: float
    num_prefixes: int
    num_candidates: int
    confidence_interval: Tensor | None = None
    bootstrap_infeasible: int = 0


def fit(
    features: Tensor | Samples,  # [N, M, K] float32 or float64
    targets: Tensor,  # [K] means, or [N', K] human values
    base_log_w: Tensor | None = None,  # [N, M]
    normalization: Normalization = "per_prefix",
    method: Method = "newton",
    ridge: Ridge = 0.0,
    *,
    names: Sequence[str] | None = None,
    tolerance: float | None = None,
    learning_rate: float = 0.05,
    bootstrap: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> FitResult:
    """Find mu such that the weights exp(b - mu · f) give the features the target means.

    The expectation is minus the gradient of a convex dual's log Z; a damped Newton method on standardised features
    solves F̂(mu) = F to 1e-9 standard deviations in about ten steps, collinear metrics included.

    Parameters
    ----------
    features : [N, M, K] float32 or float64
        K metrics of M candidates of each of N prefixes; or `Samples`, in blocks that needn't share one memory.
    targets : [K], or [N', K]
        Human means; or human values per prefix, whose mean is taken and which the bootstrap resamples too.
    base_log_w : [N, M], optional
        Base log-weights: log p_theta - log q where the target model is p_theta; left out (0) where the proposal
        itself is taken as the model.
    normalization : "per_prefix" or "global"
        Per prefix, weights are normalised within each prefix: what the decoder with M candidates does, so that its
        expected metrics on these prefixes equal the targets exactly. Global is the paper's: one normalisation over
        all samples.
    method : "newton" or "rmse"
        "rmse" is the paper's procedure, the reference: Adam on the relative root mean square error of F̂ against F
        (on its square, whose gradient vanishes at the minimum: on the root itself Adam oscillates by its step size).
        It stops at the tolerance or after 20,000 steps, and says which in `converged`.
    ridge : float >= 0, or "cv"
        Penalty ridge/2 · ‖mu * scale‖² on the dual. 0 meets the targets exactly on these prefixes. Above 0 there always
        is a solution, the nearest soft match. "cv" takes the one, from 0 to 1.28, under which human texts left out of
        the fit are likeliest: with few prefixes or texts, meeting their means exactly fits their noise. It needs
        [N', K] targets, in no particular order; where N' >= N, the first N are those of the prefixes. It does not make
        targets reachable: they must be so without a ridge.
    names : K metric names for messages and the result
    tolerance : float, optional
        Largest residual to stop at, in standard deviations. Default: 1e-10 for Newton, 1e-3 for Adam.
    learning_rate : of Adam, in standardised coefficients
    bootstrap : int
        Replicates, over prefixes, for `confidence_interval`; 0: none. Of a tensor only.
    seed : of the bootstrap
    progress : show a progress bar for the bootstrap and for Adam

    Raises
    ------
    InvalidInput
        Shapes, NaN, a constant metric, fewer prefixes than metrics, one candidate with per-prefix weights, a ridge for
        "rmse", cross-validation of means or of too few texts.
    InfeasibleTargets
        No weighting of these candidates reaches the targets. Names the metrics, targets and reachable ranges.
    FitDidNotConverge
        Neither solved nor proved infeasible.

    Source: Ji et al. 2024 (arXiv 2310.01041), section 3.3 and algorithm 1; the dual and Newton steps are ours.
    """
    problem, human = _checked(features, targets, base_log_w, normalization, ridge, names)
    if method == "rmse" and ridge != 0:
        raise InvalidInput(f"ridge = {ridge!r} is for method='newton': 'rmse' has none")
    if ridge == "cv":
        problem = replace(problem, ridge=_cross_validated(problem, human))
    if method == "newton":
        nu, iterations = solvers.newton(problem, tolerance=tolerance or solvers.TOLERANCE)
        converged = True
    elif method == "rmse":
        nu, iterations, converged = solvers.adam(problem, learning_rate, tolerance or 1e-3, progress)
    else:
        raise InvalidInput(f"method = {method!r}: it must be 'newton' or 'rmse'")
    result = _diagnosed(problem, nu, iterations, converged, normalization, method)
    if bootstrap > 0:
        interval, infeasible = _bootstrap(problem, human, nu, bootstrap, seed, progress)
        result = replace(result, confidence_interval=interval, bootstrap_infeasible=infeasible)
    return result


def _checked(
    features: Tensor | Samples,
    targets: Tensor,
    base_log_w: Tensor | None,
    normalization: str,
    ridge: Ridge,
    names: Sequence[str] | None,
) -> tuple[Problem, Tensor | None]:
    """The problem to solve, and the human values per prefix if they were given."""
    if isinstance(features, Tensor):
        samples: Samples = InMemory(Block(features, base_log_w))
    elif base_log_w is not None:
        raise InvalidInput("base_log_w is given beside samples in blocks, which hold their own")
    else:
        samples = features
    n, m, k = samples.shape
    names = tuple(names) if names is not None else tuple(f"metric {i}" for i in range(k))
    if len(names) != k:
        raise InvalidInput(f"names has {len(names)} entries, features has K = {k} metrics")
    if normalization not in ("per_prefix", "global"):
        raise InvalidInput(f"normalization = {normalization!r}: it must be 'per_prefix' or 'global'")
    if isinstance(ridge, str):
        if ridge != "cv":
            raise InvalidInput(f"ridge = {ridge!r} must be a number >= 0 or 'cv'")
    elif not (ridge >= 0 and math.isfinite(ridge)):
        raise InvalidInput(f"ridge = {ridge} must be finite and >= 0")
    targets = torch.as_tensor(targets, dtype=torch.float64, device="cpu")
    if targets.ndim not in (1, 2) or targets.shape[-1] != k or len(targets) == 0:
        raise InvalidInput(f"targets must have shape [K] = [{k}] or [N', K] = [N', {k}], got {list(targets.shape)}")
    if n < k:
        raise InvalidInput(f"{n} prefixes are fewer than the {k} metrics to fit: give at least as many prefixes")
    if m == 1 and normalization == "per_prefix":
        raise InvalidInput("M = 1 candidate leaves per-prefix weights nothing to choose: use M >= 2, or 'global'")
    finite = torch.stack(list(samples.map(lambda block: block.features.isfinite().flatten(0, 1).all(0).cpu()))).all(0)
    for what, good in (("features", finite), ("targets", targets.reshape(-1, k).isfinite().all(0))):
        if not good.all():
            raise InvalidInput(f"{what} of {names[int((~good).nonzero()[0])]} hold NaN or infinite values")

    human = targets if targets.ndim == 2 else None
    mean = targets if human is None else human.mean(0)
    penalty = 0.0 if isinstance(ridge, str) else float(ridge)
    return Problem.standardised(samples, mean, normalization == "per_prefix", names, penalty), human


def _diagnosed(
    problem: Problem, nu: Tensor, iterations: int, converged: bool, normalization: Normalization, method: Method
) -> FitResult:
    mu = nu / problem.scale
    log_z, mean, covariance = problem.tilted(nu)
    log_z_0 = problem.tilted(torch.zeros_like(nu)).log_z

    def ess_of(block: Block) -> tuple[float, float]:
        ess = ops.importance_weights(block.log_w(mu)).ess
        return float(ess.sum()), float(ess.min())

    ess_sums, ess_least = zip(*problem.samples.map(ess_of), strict=True)
    n, m, _ = problem.samples.shape
    eigenvalues = torch.linalg.eigvalsh(covariance / problem.scale.outer(problem.scale))
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    return FitResult(
        mu=mu,
        names=problem.names,
        targets=problem.targets,
        residual=mean - problem.targets,
        scale=problem.scale,
        normalization=normalization,
        method=method,
        ridge=problem.ridge,
        converged=converged,
        iterations=iterations,
        condition_number=largest / smallest if smallest > solvers.SMALLEST_EIGENVALUE * largest else math.inf,
        ess_mean=sum(ess_sums) / n,
        ess_min=min(ess_least),
        kl=float(-(mu @ mean) - (log_z - log_z_0)),
        num_prefixes=n,
        num_candidates=m,
    )


def _cross_validated(problem: Problem, human: Tensor | None) -> float:
    """The ridge with the lowest dual on prefixes and human texts that were left out of the fit.

    The dual is the mean over human texts of -log p_mu(x) / p_0(x), so the lowest makes them the likeliest.
    """
    if human is None:
        raise InvalidInput("ridge = 'cv' needs targets of shape [N', K], one row a human text, got [K] means")
    if not isinstance(problem.samples, InMemory):
        raise InvalidInput("ridge = 'cv' needs samples in one tensor: blocks can't be split")
    if min(problem.samples.shape[0], len(human)) < FOLDS:
        raise InvalidInput(
            f"ridge = 'cv' needs at least {FOLDS} prefixes and {FOLDS} human texts, got {problem.samples.shape[0]} and "
            f"{len(human)}: give a number"
        )
    solvers.newton(problem)  # raises where the targets are out of reach
    of_prefix, of_text = (torch.arange(count) % FOLDS for count in (problem.samples.shape[0], len(human)))
    loss = dict.fromkeys(RIDGES, 0.0)
    for fold in range(FOLDS):
        to_fit = _part(problem, of_prefix != fold, human[of_text != fold])
        left_out = _part(problem, of_prefix == fold, human[of_text == fold])
        nu = None
        for ridge in RIDGES:
            try:
                nu, _ = solvers.newton(replace(to_fit, ridge=ridge), start=nu)
                loss[ridge] += left_out.dual(nu)[0]
            except (InfeasibleTargets, FitDidNotConverge):
                loss[ridge] = math.inf
    return min(loss, key=lambda ridge: loss[ridge])


def _part(problem: Problem, prefixes: Tensor, human: Tensor | None) -> Problem:
    """The same problem of some prefixes (indices, or a mask) and human texts, in the same units."""
    assert isinstance(problem.samples, InMemory)
    block = problem.samples.block
    base_log_w = None if block.base_log_w is None else block.base_log_w[prefixes]
    targets = problem.targets if human is None else human.mean(0)
    return replace(problem, samples=InMemory(Block(block.features[prefixes], base_log_w)), targets=targets)


def _bootstrap(
    problem: Problem, human: Tensor | None, nu: Tensor, replicates: int, seed: int, progress: bool
) -> tuple[Tensor | None, int]:
    """[2, K] quantiles of mu over resampled prefixes, and the number of replicates that had no solution."""
    if not isinstance(problem.samples, InMemory):
        raise InvalidInput(f"bootstrap = {replicates} needs samples in one tensor: blocks can't be resampled")
    generator, n = torch.Generator().manual_seed(seed), problem.samples.shape[0]
    fitted: list[Tensor] = []
    for _ in tqdm(range(replicates), desc="bootstrap", disable=not progress):
        drawn = torch.randint(n, (n,), generator=generator)
        # Human values of the same prefixes are drawn with them; of other texts, by themselves.
        of_human = drawn
        if human is not None and len(human) != n:
            of_human = torch.randint(len(human), (len(human),), generator=generator)
        replicate = _part(problem, drawn, None if human is None else human[of_human])
        try:
            fitted.append(solvers.newton(replicate, start=nu)[0] / problem.scale)
        except (InfeasibleTargets, FitDidNotConverge):
            continue
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    interval = torch.stack(fitted).quantile(quantiles, dim=0) if fitted else None
    return interval, replicates - len(fitted)
