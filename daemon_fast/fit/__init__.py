"""Fitting mu, the coefficients whose tilted model has the target expectations: checks, methods, diagnostics.

`dual` is what is minimised, `newton` how, `race` the law of a race, `samples` what is read, `resample` cross-validation
and the bootstrap, `advice` what to do where there is no solution; `from_texts` fits to human texts, from drawing the
candidates on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from daemon_fast import metrics as metrics_module
from daemon_fast import ops
from daemon_fast.arguments import integer, number, one_of, real_tensor, strings
from daemon_fast.energy import Base, Diagnostics, Energy, weightless
from daemon_fast.errors import FitError, InvalidInput, UnboundedTilt
from daemon_fast.fit import newton, resample
from daemon_fast.fit.advice import advice
from daemon_fast.fit.dual import Problem
from daemon_fast.fit.samples import Block, InMemory, Samples
from daemon_fast.metrics import Metric
from daemon_fast.ops import Draw, Normalization
from daemon_fast.proposals.base import ProposalSettings

__all__ = ["FitResult", "Ridge", "check_draw", "check_ridge", "fit", "warn_of_unbounded"]

TOLERATED = 0.1  # residual, in standard deviations of a metric, up to which a target counts as met

Method = Literal["newton", "rmse"]
Ridge = float | Literal["cv"]


@dataclass(frozen=True)
class FitResult:
    """A fitted mu and what is known of it.

    Attributes
    ----------
    mu : [K] float64
    names : K metric names
    targets : [K] float64
    residual : [K] float64
        Expectation of what is drawn minus target, in the metric's own unit.
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
    unmet : tuple of str
        Metrics whose residual is more than a tenth of `scale`, and more than two standard errors of the human mean
        where human values were given.
    """

    mu: Tensor
    names: tuple[str, ...]
    targets: Tensor
    residual: Tensor
    scale: Tensor
    normalization: Normalization
    draw: Draw
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
    unmet: tuple[str, ...] = ()

    def energy(
        self,
        metrics: Sequence[Metric],
        proposal_settings: ProposalSettings,
        base: Base = "proposal",
        seed: int = 0,
        num_targets: int | None = None,
        chat_template: str | None = None,
    ) -> Energy:
        """The artefact.

        Parameters
        ----------
        metrics : that were fitted
        proposal_settings : of the candidates
        base : what the base log-weights say is tilted
        seed : that drew the candidates
        num_targets : how many human texts gave the targets; default: as many as prefixes
        chat_template : fingerprint of the template that made the prompts from chats; None: they were texts
        """
        interval = self.confidence_interval
        return Energy(
            metrics=list(metrics),
            mu=self.mu,
            targets=self.targets,
            proposal_settings=proposal_settings,
            normalization=self.normalization,
            draw=self.draw,
            chat_template=chat_template,
            base=base,
            diagnostics=Diagnostics(
                ridge=self.ridge,
                residual=self.residual.tolist(),
                scale=self.scale.tolist(),
                confidence_interval=None if interval is None else interval.tolist(),
                ess_mean=self.ess_mean,
                ess_min=self.ess_min,
                kl=self.kl,
                condition_number=self.condition_number if math.isfinite(self.condition_number) else None,
                iterations=self.iterations,
                converged=self.converged,
                num_prefixes=self.num_prefixes,
                num_targets=self.num_prefixes if num_targets is None else num_targets,
                seed=seed,
                unmet=list(self.unmet),
            ),
        )


def fit(
    features: Tensor | Samples,  # [N, M, K] float32 or float64
    targets: Tensor,  # [K] means, or [N', K] human values
    base_log_w: Tensor | None = None,  # [N, M]
    *,
    normalization: Normalization = "per_prefix",
    draw: Draw = "sir",
    method: Method = "newton",
    ridge: Ridge = 0.0,
    names: Sequence[str] | None = None,
    tolerance: float | None = None,
    learning_rate: float = 0.05,
    bootstrap: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> FitResult:
    """Find mu such that what is drawn by the weights exp(b - mu · f) has the target means in expectation.

    F̂ is minus the gradient of a convex dual's log Z, by SIR as by the race; a damped Newton method on standardised
    features solves F̂(mu) = F to 1e-9 standard deviations in about ten steps, collinear metrics included.

    Parameters
    ----------
    features : [N, M, K] of any real dtype
        K metrics of M candidates of each of N prefixes; or `Samples`, in blocks that needn't share one memory. Here and
        below, an array or a list of numbers is taken for a tensor.
    targets : [K], or [N', K]
        Human means; or human values per prefix, whose mean is taken and which the bootstrap resamples too.
    base_log_w : [N, M], optional
        Base log-weights: log p_theta - log q where the target model is p_theta; left out (0) where the proposal
        itself is taken as the model.
    normalization : "per_prefix" or "global"
        Per prefix, weights are normalised within each prefix: what the decoder with M candidates does, so that its
        expected metrics on these prefixes equal the targets exactly. Global is the paper's: one normalisation over
        all samples.
    draw : "race" or "sir"
        The rule that will choose among a prefix's candidates, and whose expected metrics are to be the targets: see
        `ops.race_select` and `ops.sir_select`. By SIR they are those of the weights themselves.
    method : "newton" or "rmse"
        "rmse" is the paper's procedure, the reference: Adam on the relative root mean square error of F̂ against F
        (on its square, whose gradient vanishes at the minimum: on the root itself Adam oscillates by its step size).
        It stops at the tolerance or after 20,000 steps, and says which in `converged`.
    ridge : float >= 0, or "cv"
        Penalty ridge/2 · ‖mu * scale‖² on the dual of the rule that draws: F̂ - F = ridge · scale² · mu. 0 meets the
        targets exactly on these prefixes. Above 0 there always is a solution, the nearest soft match. "cv" takes the
        one, from 0 to 1.28, under which human texts left out of the fit are likeliest: with few prefixes or texts,
        meeting their means exactly fits their noise. It needs [N', K] targets, in no particular order; where N' >= N,
        the first N are those of the prefixes. Where targets are out of reach it is above 0, and `unmet` names those
        that were missed.
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
        Shapes, NaN, base log-weights that leave a prefix without weights, a constant metric, fewer prefixes than
        metrics, one candidate with per-prefix weights, a race with global weights, a ridge for "rmse", cross-validation
        of means or of too few texts.
    InfeasibleTargets
        No weighting of these candidates reaches the targets. Names the metrics, targets and reachable ranges, and what
        would help: see `daemon_fast.fit.advice`.
    FitDidNotConverge
        Neither solved nor proved infeasible.

    Warns
    -----
    UnboundedTilt
        A built-in metric, by its name, whose tilt grows without bound: `ent` with a negative coefficient.

    Source: Ji et al. 2024 (arXiv 2310.01041), section 3.3 and algorithm 1; the duals and Newton steps are ours.
    """
    check_draw(draw, normalization)
    learning_rate = number("learning_rate", learning_rate, "positive and finite", lambda x: 0 < x < math.inf)
    bootstrap = integer("bootstrap", bootstrap, ">= 0", lambda n: n >= 0)
    if tolerance is not None:
        tolerance = number("tolerance", tolerance, "positive and finite, or None", lambda x: 0 < x < math.inf)
    problem, human = _checked(features, targets, base_log_w, normalization, ridge, names)
    if method == "rmse" and ridge != 0:
        raise InvalidInput(f"ridge = {ridge!r} is for method='newton': 'rmse' has none")
    if ridge == "cv":
        problem = replace(problem, ridge=resample.cross_validated_ridge(problem, human))
    by_weights, problem = problem, replace(problem, draw=draw)
    if method not in ("newton", "rmse"):
        raise InvalidInput(f"method = {method!r}: it must be 'newton' or 'rmse'")
    try:
        if method == "newton":
            nu, iterations = newton.newton(problem, tolerance=tolerance or newton.TOLERANCE)
            converged = True
        else:
            nu, iterations, converged = newton.adam(problem, learning_rate, tolerance or 1e-3, progress)
    except FitError as error:
        raise type(error)(f"{error}. {advice(by_weights, human)}") from error
    result = _diagnosed(problem, nu, iterations, converged, method)
    result = replace(result, unmet=_unmet(result, human))
    known = filter(None, map(metrics_module.built_in, result.names))
    warn_of_unbounded(known, dict(zip(result.names, result.mu.tolist(), strict=True)), stacklevel=3)
    if bootstrap > 0:
        interval, infeasible = resample.bootstrap(problem, human, nu, bootstrap, seed, progress)
        result = replace(result, confidence_interval=interval, bootstrap_infeasible=infeasible)
    return result


def _checked(
    features: Tensor | Samples,
    targets: Tensor,
    base_log_w: Tensor | None,
    normalization: Normalization,
    ridge: Ridge,
    names: Sequence[str] | None,
) -> tuple[Problem, Tensor | None]:
    """The problem to solve, and the human values per prefix if they were given."""
    samples: Any = features
    if hasattr(features, "map"):
        if base_log_w is not None:
            raise InvalidInput("base_log_w is given beside samples in blocks, which hold their own")
    else:
        base_log_w = None if base_log_w is None else real_tensor("base_log_w is", base_log_w)
        samples = InMemory(Block(real_tensor("features is", features), base_log_w))
    n, m, k = samples.shape
    names = strings("names", names) if names is not None else tuple(f"metric {i}" for i in range(k))
    if len(names) != k:
        raise InvalidInput(f"names has {len(names)} entries, features has K = {k} metrics")
    if normalization not in ("per_prefix", "global"):
        raise InvalidInput(f"normalization = {normalization!r}: it must be 'per_prefix' or 'global'")
    check_ridge(ridge)
    targets = real_tensor("targets is", targets).double().cpu()
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

    per_prefix = normalization == "per_prefix"
    found = list(samples.map(lambda block: weightless(block.base_log_w, per_prefix)))
    for i, said in enumerate(found):
        if said is not None:
            raise InvalidInput(said + (f" (of block {i})" if len(found) > 1 else ""))

    human = targets if targets.ndim == 2 else None
    mean = targets if human is None else human.mean(0)
    penalty = 0.0 if isinstance(ridge, str) else float(ridge)
    problem = Problem.standardised(samples, mean, normalization, names, penalty)
    return problem, None if human is None else human - problem.centre


def check_draw(draw: Draw, normalization: Normalization) -> None:
    """Raise InvalidInput for what is no rule, or for a race with global weights."""
    one_of("draw", draw, get_args(Draw))
    if draw == "race" and normalization == "global":
        raise InvalidInput(
            "draw = 'race' is not defined for normalization = 'global': it is a race between the candidates of one "
            "prefix. Use draw = 'sir', or normalization = 'per_prefix'"
        )


def check_ridge(ridge: Ridge) -> None:
    """Raise InvalidInput for what is no ridge."""
    if isinstance(ridge, str):
        if ridge != "cv":
            raise InvalidInput(f"ridge = {ridge!r} must be a number >= 0 or 'cv'")
    else:
        number("ridge", ridge, "finite and >= 0, or 'cv'", lambda x: 0 <= x < math.inf)


def warn_of_unbounded(metrics: Iterable[Metric], mu: Mapping[str, float], stacklevel: int) -> None:
    """Warn of metrics whose tilt has no bound."""
    names = metrics_module.unbounded_tilts(metrics, mu)
    if not names:
        return
    what = ", ".join(f"{name} (coefficient {mu[name]:.3g})" for name in names)
    hint = "; fit nats in its place, whose tilt is a power of the model's probability" if "ent" in names else ""
    warnings.warn(
        f"exp(-mu · f) grows without bound in {what}: the exact p_mu may not exist, and expected metrics under M "
        f"candidates then drift as M grows, however large{hint}",
        UnboundedTilt,
        stacklevel=stacklevel,
    )


def _unmet(result: FitResult, human: Tensor | None) -> tuple[str, ...]:
    allowed = TOLERATED * result.scale
    if human is not None and len(human) > 1:
        allowed = allowed.maximum(2 * human.std(0) / math.sqrt(len(human)))
    missed = result.residual.abs() > allowed
    return tuple(name for name, is_missed in zip(result.names, missed.tolist(), strict=True) if is_missed)


def _diagnosed(problem: Problem, nu: Tensor, iterations: int, converged: bool, method: Method) -> FitResult:
    mu = nu / problem.scale
    _, mean, curvature = problem.tilted(nu)
    # Of p_mu itself the weights tell, whichever rule draws by them.
    by_weights = replace(problem, draw="sir")
    log_z, of_weights, _ = by_weights.tilted(nu)
    log_z_0 = by_weights.tilted(torch.zeros_like(nu)).log_z

    def ess_of(block: Block) -> tuple[float, float]:
        log_w = block.log_w(mu)
        some = log_w.isfinite().any(1)  # global weights may leave a prefix without any: its size is 0
        ess = log_w.new_zeros(len(log_w))  # not torch.zeros: Ray can't send a function that names torch and ops
        ess[some] = ops.importance_weights(log_w[some]).ess
        return float(ess.sum()), float(ess.min())

    ess_sums, ess_least = zip(*problem.samples.map(ess_of), strict=True)
    n, m, _ = problem.samples.shape
    eigenvalues = torch.linalg.eigvalsh(curvature / problem.scale.outer(problem.scale))
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    return FitResult(
        mu=mu,
        names=problem.names,
        targets=problem.targets + problem.centre,
        residual=mean - problem.targets,
        scale=problem.scale,
        normalization=problem.normalization,
        draw=problem.draw,
        method=method,
        ridge=problem.ridge,
        converged=converged,
        iterations=iterations,
        condition_number=largest / smallest if smallest > newton.SMALLEST_EIGENVALUE * largest else math.inf,
        ess_mean=sum(ess_sums) / n,
        ess_min=min(ess_least),
        kl=float(-(mu @ of_weights) - (log_z - log_z_0)),
        num_prefixes=n,
        num_candidates=m,
    )
