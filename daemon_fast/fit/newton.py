"""Two methods that minimise the dual: damped Newton steps, and the paper's Adam."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from daemon_fast.errors import FitDidNotConverge, InvalidInput
from daemon_fast.fit.dual import Problem

__all__ = ["adam", "damped_newton", "newton"]

TOLERANCE = 1e-10  # of the gradient, in standard deviations
GOOD_ENOUGH = 1e-9  # where rounding stops progress before TOLERANCE
MAX_STEPS = 200
MAX_STEP = 8.0  # in standardised coefficients, at first: farther away the quadratic model says nothing
SMALLEST_EIGENVALUE = 1e-13  # of the Hessian, relative to its largest: what rounding leaves of a collinear direction
MAX_ADAM_STEPS = 20_000

# From a point [K] to a convex function's value, gradient [K] and Hessian [K, K], all float64.
Convex = Callable[[Tensor], tuple[float, Tensor, Tensor]]


def newton(problem: Problem, start: Tensor | None = None, tolerance: float = TOLERANCE) -> tuple[Tensor, int]:
    """Minimise the dual by damped Newton steps; that of the race from SIR's minimum, whose steps cost a tenth.

    Returns
    -------
    nu : [K] float64, standardised coefficients; number of steps

    Raises
    ------
    InfeasibleTargets
        Proved: see `daemon_fast.fit.dual`.
    FitDidNotConverge
        Neither solved nor proved.
    """
    exact, before = problem.ridge == 0, 0
    if exact:
        problem.check_reachable()
    if start is None and problem.draw == "race":
        start, before = newton(replace(problem, draw="sir"), tolerance=tolerance)
    start = torch.zeros_like(problem.scale) if start is None else start
    nu, steps, error = damped_newton(problem.dual, start, tolerance, problem.check_separated if exact else None)
    if error <= max(tolerance, GOOD_ENOUGH):
        return nu, before + steps
    raise FitDidNotConverge(
        f"the fit stopped after {steps + 1} steps with a residual of {error:.2g} standard deviations, its largest "
        f"coefficient {float(nu.abs().max()):.3g} per standard deviation: the targets are at the edge of what the "
        "candidates can reach"
    )


def damped_newton(
    convex: Convex, start: Tensor, tolerance: float = TOLERANCE, check: Callable[[Tensor], None] | None = None
) -> tuple[Tensor, int, float]:
    """Minimise a convex function by Newton steps, each halved until it makes progress.

    Parameters
    ----------
    tolerance : largest gradient entry to stop at
    check : called with each iterate from the fourth on; raises where it proves that there is no minimum

    Returns
    -------
    Where it stopped [K], the number of steps, and the largest gradient entry there.
    """
    at = start
    value, gradient, hessian = convex(at)
    for step in range(MAX_STEPS):
        error = float(gradient.abs().max())
        if error <= tolerance:
            return at, step, error
        if check is not None and step >= 3:
            check(at)
        direction = _newton_direction(gradient, hessian, MAX_STEP + 2 * float(at.abs().max()))
        slope = float(gradient @ direction)
        size = 1.0
        while size > 1e-9:
            trial = at + size * direction
            trial_value, trial_gradient, trial_hessian = convex(trial)
            # Near the minimum the value no longer shows progress in its last digit, the gradient still does.
            if trial_value <= value + 1e-4 * size * slope or (
                float(trial_gradient.abs().max()) < 0.5 * error and trial_value <= value + 1e-12 * (1 + abs(value))
            ):
                break
            size /= 2
        else:
            break
        at, value, gradient, hessian = trial, trial_value, trial_gradient, trial_hessian
    return at, step, float(gradient.abs().max())


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
    nu = torch.zeros_like(problem.scale, requires_grad=True)
    optimizer = torch.optim.Adam([nu], lr=learning_rate)
    for step in tqdm(range(MAX_ADAM_STEPS), desc="fit (Adam)", disable=not progress):
        _, mean, covariance = problem.tilted(nu.detach())
        residual = mean - problem.targets
        if (residual / problem.scale).abs().max() <= tolerance:
            return nu.detach(), step, True
        nu.grad = -2 / len(nu) * (covariance @ (residual / problem.targets.square())) / problem.scale
        optimizer.step()
    return nu.detach(), MAX_ADAM_STEPS, False
