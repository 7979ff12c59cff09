"""What to do where no weighting of the candidates reaches the targets: computed from the candidates at hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from daemon_fast.errors import FitError
from daemon_fast.fit.dual import Problem
from daemon_fast.fit.newton import newton
from daemon_fast.fit.samples import Block, InMemory

__all__ = ["advice", "candidates_needed", "leave_out"]

SMALL_RIDGE = 1e-3  # under which mu points to where the targets lie beyond reach
MOST = 64  # times the candidates at hand: what they say of still more is no estimate


def advice(problem: Problem, human: Tensor | None = None, soft: bool = True) -> str:
    """Which metrics to leave out, which ridge, how many candidates and human texts.

    Parameters
    ----------
    human : [N', K], whose means are the targets, if they are known
    soft : whether a ridge is among the ways
    """
    n, m, _ = problem.samples.shape
    problem = replace(problem, draw="sir")  # both rules reach the same, and this one's moments cost a hundredth
    ways = ["ask for the nearest soft match with ridge = 'cv' or 0.01"] if soft else []
    directions = []
    if isinstance(problem.samples, InMemory):
        directions = _beyond_reach(problem)
        if names := leave_out(problem):
            ways.insert(0, f"leave out {', '.join(names)}: the others are within reach")
    needed = [candidates_needed(problem, direction) for direction in directions]
    if not needed or None in needed:
        far = f", though from these not even M = {MOST * m} is expected to be enough" if needed else ""
        ways.append(f"draw more candidates per prefix{far}")
    else:
        largest = max(found for found in needed if found is not None)
        ways.append(
            f"draw more candidates: M of about {largest} or more, if candidates vary about the means of their prefixes "
            f"as these {n * m} do"
        )
    texts = [_texts_needed(problem, human, direction) for direction in directions] if human is not None else []
    if human is not None and texts and None not in texts:
        ways.append(
            f"give more human texts: the targets lie within two standard errors of what is in reach, so that the "
            f"noise of {len(human)} texts may be all; about {max(found for found in texts if found is not None)} tell"
        )
    return f"With N = {n} prefixes and M = {m} candidates: " + "; or ".join(ways)


def leave_out(problem: Problem) -> list[str]:
    """Metrics without which the targets are within reach: those that are out of reach alone; with them one more, or
    two, of the others if that is enough; else those that pull hardest. None if no metric would be left."""
    low, high = problem.reachable()
    alone = ((problem.targets <= low) | (problem.targets >= high)).nonzero().flatten().tolist()
    left = [k for k in range(len(problem.names)) if k not in alone]
    for count in range(min(3, len(left))):
        for others in combinations(left, count):
            if _is_feasible(_of(problem, [k for k in left if k not in others])):
                return [problem.names[k] for k in sorted([*alone, *others])]
    while len(left) > 1:
        nu, _ = newton(replace(_of(problem, left), ridge=SMALL_RIDGE))
        left.pop(int(nu.abs().argmax()))
        if _is_feasible(_of(problem, left)):
            return [name for k, name in enumerate(problem.names) if k not in left]
    return []


def candidates_needed(problem: Problem, direction: Tensor) -> int | None:
    """M from which on the candidates are expected to reach as far as the targets in a direction [K].

    None: it is not known, because no candidate of any prefix goes as far, or M is far above that at hand.
    The deviations of all candidates from the means of their prefixes are taken as one law. By it, the expected largest
    of M draws follows from their ranks; it is scaled so that it agrees with what the M at hand reach.
    """
    assert isinstance(problem.samples, InMemory)
    block, (n, m, _) = problem.samples.block, problem.samples.shape
    if problem.normalization != "per_prefix" or m < 2 or (block.excluded is not None and block.excluded.any()):
        return None
    along = (block.features.double() @ direction.to(block.features.device)).cpu()
    means = along.mean(1, keepdim=True)
    gap, reached = float(direction @ problem.targets - means.mean()), float((along.amax(1) - means[:, 0]).mean())
    deviations = (along - means).flatten().sort().values
    ranks = torch.arange(n * m + 1, dtype=torch.float64, device="cpu") / (n * m)

    def largest(of: int) -> float:
        return float(deviations @ ranks.pow(of).diff())

    if along.max() <= direction @ problem.targets or largest(MOST * m) * reached < gap * largest(m):
        return None
    few, many = m, MOST * m
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if largest(middle) * reached >= gap * largest(m) else (middle, many)
    return many


def _texts_needed(problem: Problem, human: Tensor, direction: Tensor) -> int | None:
    """Human texts from which on their noise can't explain the distance; None if it can't already."""
    gap = float(direction @ problem.targets) - _reach(problem, direction)
    spread = float((human.double() @ direction).std()) if len(human) > 1 else 0.0
    needed = math.ceil((2 * spread / gap) ** 2) if gap > 0 and spread < 1e6 * gap else 0
    return needed if needed > len(human) else None


def _beyond_reach(problem: Problem) -> list[Tensor]:
    """Directions [K] in which targets lie beyond what weights reach: of each metric that is alone, else of all."""
    low, high = problem.reachable()
    units = torch.eye(len(low), dtype=torch.float64, device="cpu")
    directions = [*units[problem.targets >= high], *-units[problem.targets <= low]]
    if not directions:
        nu, _ = newton(replace(problem, ridge=SMALL_RIDGE))
        direction = -nu / problem.scale
        directions = [direction] if _reach(problem, direction) <= float(direction @ problem.targets) else []
    return directions


def _reach(problem: Problem, direction: Tensor) -> float:
    assert isinstance(problem.samples, InMemory)
    block = problem.samples.block
    along = block.features.double() @ direction.to(block.features.device)
    if block.excluded is not None:
        along = along.masked_fill(block.excluded[..., 0], -torch.inf)
    return float(along.amax(1).mean() if problem.normalization == "per_prefix" else along.max())


def _is_feasible(problem: Problem) -> bool:
    try:
        newton(replace(problem, ridge=0.0))
    except FitError:
        return False
    return True


def _of(problem: Problem, columns: list[int]) -> Problem:
    """The same problem of some of its metrics."""
    assert isinstance(problem.samples, InMemory)
    block = problem.samples.block
    return replace(
        problem,
        samples=InMemory(Block(block.features[..., columns], block.base_log_w)),
        targets=problem.targets[columns],
        names=tuple(problem.names[k] for k in columns),
        scale=problem.scale[columns],
    )
