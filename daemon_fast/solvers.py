"""The convex dual of the fit, the methods that minimise it, and the proof that targets are out of reach.

With weights w_ij ∝ exp(b_ij - mu · f_ij) and standardised coefficients nu = mu * scale, the dual is

    D(mu) = log Z(mu) + mu · F          ∇D = F - F̂(mu)          ∇²D = covariance of f under w

where log Z is averaged over prefixes (per-prefix weights) or taken over all samples (global weights). It is convex,
and has a minimum if and only if F lies inside the convex hull of what weights can reach. If it does not, some
direction d separates: d · F > max over weights of d · F̂, and the iterates run off along d. Each iterate is therefore
tried as such a direction: a success is a proof, whatever the solver did to get there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from daemon_fast import ops
from daemon_fast.errors import FitDidNotConverge, InfeasibleTargets, InvalidInput
from daemon_fast.samples import Block, Samples, tilted_moments

TOLERANCE = 1e-10  # of the gradient, in standard deviations
GOOD_ENOUGH = 1e-9  # where rounding stops progress before TOLERANCE
MAX_STEPS = 200
MAX_STEP = 8.0  # in standardised coefficients, at first: farther away the quadratic model says nothing
SMALLEST_EIGENVALUE = 1e-13  # of the Hessian, relative to its largest: what rounding leaves of a collinear direction
MAX_ADAM_STEPS = 20_000
BOUNDARY = 1e-9  # in standard deviations: a target so near to the edge of what is reachable needs an infinite mu


@dataclass(frozen=True)
class Problem:
    """What is to be solved: samples of N prefixes, targets [K] and scale [K]."""

    samples: Samples
    targets: Tensor
    per_prefix: bool
    names: tuple[str, ...]
    scale: Tensor
    ridge: float

    @staticmethod
    def standardised(
        samples: Samples,
        targets: Tensor,
        per_prefix: bool,
        names: tuple[str, ...],
        ridge: float,
    ) -> Problem:
        """With the standard deviation of each metric under the base weights as its scale."""
        ones = torch.ones_like(targets)
        problem = Problem(samples, targets, per_prefix, names, ones, ridge)
        low, high = problem.reachable()
        for name, constant in zip(names, (low == high).tolist(), strict=True):
            if constant:
                where = " within every prefix" if per_prefix else ""
                raise InvalidInput(f"metric {name} is constant{where}: no weighting can change it; leave it out")
        scale = problem.tilted(torch.zeros_like(ones)).covariance.diagonal().sqrt()
        # Base weights can be so uneven that nothing is left to vary; any positive scale serves then.
        return replace(problem, scale=torch.where(scale > 1e-9 * (high - low), scale, high - low))

    def tilted(self, nu: Tensor) -> ops.Moments:
        """On the device of the samples; the results, a handful of numbers, on the CPU, where the solvers work."""
        moments = tilted_moments(self.samples, nu / self.scale, self.per_prefix)
        if not moments.log_z.isfinite():  # on the CPU the operator itself raises, and names the row
            raise InvalidInput("log-weights hold NaN or infinity, or are all -inf where one must be finite")
        return moments

    def dual(self, nu: Tensor) -> tuple[float, Tensor, Tensor]:
        """Value, gradient [K] and Hessian [K, K] of the dual in nu, ridge included."""
        log_z, mean, covariance = self.tilted(nu)
        value = float(log_z + (nu / self.scale) @ self.targets + 0.5 * self.ridge * nu @ nu)
        gradient = (self.targets - mean) / self.scale + self.ridge * nu
        hessian = covariance / self.scale.outer(self.scale)
        return value, gradient, hessian + self.ridge * torch.eye(len(nu), dtype=torch.float64)

    def reachable(self) -> tuple[Tensor, Tensor]:
        """[K] lowest and highest expectation of each metric over all weightings."""
        per_prefix = self.per_prefix

        def of_block(block: Block) -> tuple[Tensor, Tensor]:
            low = high = block.features
            if (excluded := block.excluded) is not None:
                low, high = low.masked_fill(excluded, torch.inf), high.masked_fill(excluded, -torch.inf)
            lowest, highest = low.amin(1).double(), high.amax(1).double()
            if per_prefix:
                return lowest.sum(0).cpu(), highest.sum(0).cpu()
            return lowest.amin(0).cpu(), highest.amax(0).cpu()

        low, high = (torch.stack(column) for column in zip(*self.samples.map(of_block), strict=True))
        if per_prefix:
            return low.sum(0) / self.samples.shape[0], high.sum(0) / self.samples.shape[0]
        return low.amin(0), high.amax(0)

    def check_reachable(self) -> None:
        """Raise InfeasibleTargets for a target outside the range of its own metric."""
        low, high = self.reachable()
        out = (self.targets <= low + BOUNDARY * self.scale) | (self.targets >= high - BOUNDARY * self.scale)
        if out.any():
            ranges = ", ".join(self._range(k, low, high) for k in out.nonzero().flatten().tolist())
            raise InfeasibleTargets(f"out of reach of any weighting of the candidates: {ranges}. {self._advice()}")

    def check_separated(self, nu: Tensor) -> None:
        """Raise InfeasibleTargets if -nu separates the targets from all that weights can reach."""
        direction, per_prefix = -nu / self.scale, self.per_prefix

        def of_block(block: Block) -> float:
            along = block.features.double() @ direction.to(block.features.device)
            if (excluded := block.excluded) is not None:
                along = along.masked_fill(excluded[..., 0], -torch.inf)
            return float(along.amax(1).sum() if per_prefix else along.max())

        farthest = list(self.samples.map(of_block))
        reached = sum(farthest) / self.samples.shape[0] if per_prefix else max(farthest)
        if reached - float(direction @ self.targets) > BOUNDARY * float(nu.norm()):
            return
        low, high = self.reachable()
        involved = (nu.abs() >= 0.05 * nu.abs().max()).nonzero().flatten().tolist()
        ranges = ", ".join(self._range(k, low, high) for k in involved)
        raise InfeasibleTargets(
            f"jointly out of reach of any weighting of the candidates, though each is reachable alone: {ranges}. "
            f"{self._advice()}"
        )

    def _range(self, k: int, low: Tensor, high: Tensor) -> str:
        return f"{self.names[k]} (target {self.targets[k]:.6g}, reachable {low[k]:.6g} to {high[k]:.6g})"

    def _advice(self) -> str:
        n, m, _ = self.samples.shape
        return (
            f"With N = {n} prefixes and M = {m} candidates: draw more candidates per prefix, leave a metric out, "
            "or ask for the nearest soft match with ridge > 0"
        )


def newton(problem: Problem, start: Tensor | None = None, tolerance: float = TOLERANCE) -> tuple[Tensor, int]:
    """Minimise the dual by damped Newton steps.

    Returns
    -------
    nu : [K] float64, standardised coefficients; number of steps

    Raises
    ------
    InfeasibleTargets
        Proved: see the module's text.
    FitDidNotConverge
        Neither solved nor proved.
    """
    if problem.ridge == 0:
        problem.check_reachable()
    nu = torch.zeros_like(problem.scale) if start is None else start
    value, gradient, hessian = problem.dual(nu)
    for step in range(MAX_STEPS):
        error = float(gradient.abs().max())
        if error <= tolerance:
            return nu, step
        if problem.ridge == 0 and step >= 3:
            problem.check_separated(nu)
        direction = _newton_direction(gradient, hessian, MAX_STEP + 2 * float(nu.abs().max()))
        slope = float(gradient @ direction)
        size = 1.0
        while size > 1e-9:
            trial = nu + size * direction
            trial_value, trial_gradient, trial_hessian = problem.dual(trial)
            # Near the minimum the dual no longer shows progress in its last digit, the gradient still does.
            if trial_value <= value + 1e-4 * size * slope or (
                float(trial_gradient.abs().max()) < 0.5 * error and trial_value <= value + 1e-12 * (1 + abs(value))
            ):
                break
            size /= 2
        else:
            break
        nu, value, gradient, hessian = trial, trial_value, trial_gradient, trial_hessian
    error = float(gradient.abs().max())
    if error <= max(tolerance, GOOD_ENOUGH):
        return nu, step
    raise FitDidNotConverge(
        f"the fit stopped after {step + 1} steps with a residual of {error:.2g} standard deviations, its largest "
        f"coefficient {float(nu.abs().max()):.3g} per standard deviation: the targets are at the edge of what the "
        f"candidates can reach. {problem._advice()}"
    )


def _newton_direction(gradient: Tensor, hessian: Tensor, longest: float) -> Tensor:
    """-H⁻¹ g, without the directions in which collinear metrics leave H no curvature and g nothing to gain."""
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    along = vectors.T @ gradient
    floor = max(float(eigenvalues[-1]) * SMALLEST_EIGENVALUE, 1e-300)
    flat = (eigenvalues <= floor) & (along.abs() <= TOLERANCE)
    step = torch.where(flat, 0.0, along / eigenvalues.clamp_min(floor))
    direction: Tensor = -(vectors @ step)
    return direction * min(1.0, longest / float(direction.abs().max()))


def adam(problem: Problem, learning_rate: float, tolerance: float, progress: bool = False) -> tuple[Tensor, int, bool]:
    """The paper's fit: Adam on the mean square of the relative residuals, by its exact gradient.

    Returns
    -------
    nu : [K] float64, standardised coefficients; number of steps; whether the tolerance was reached

    Raises
    ------
    InvalidInput
        A target of 0, whose relative error is not defined.
    InfeasibleTargets
        A target outside the range of its own metric.
    """
    if (problem.targets == 0).any():
        name = problem.names[int((problem.targets == 0).nonzero()[0])]
        raise InvalidInput(f"target of {name} is 0: its relative error is not defined; use method='newton'")
    problem.check_reachable()
    nu = torch.zeros_like(problem.scale)
    first, second = torch.zeros_like(nu), torch.zeros_like(nu)
    for step in tqdm(range(1, MAX_ADAM_STEPS + 1), desc="fit (Adam)", disable=not progress):
        _, mean, covariance = problem.tilted(nu)
        residual = mean - problem.targets
        if (residual / problem.scale).abs().max() <= tolerance:
            return nu, step - 1, True
        gradient = -2 / len(nu) * (covariance @ (residual / problem.targets.square())) / problem.scale
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        nu = nu - learning_rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return nu, MAX_ADAM_STEPS, False
