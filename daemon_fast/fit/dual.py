"""The convex dual of the fit, and the proof that targets are out of reach.

With weights w_ij ∝ exp(b_ij - mu · f_ij) and standardised coefficients nu = mu * scale, the dual is

    D(mu) = log Z(mu) + mu · F          ∇D = F - F̂(mu)          ∇²D = covariance of f under w

where log Z is averaged over prefixes (per-prefix weights) or taken over all samples (global weights). It is convex,
and has a minimum if and only if F lies inside the convex hull of what weights can reach. If it does not, some
direction d separates: d · F > max over weights of d · F̂, and the iterates run off along d. Each iterate is therefore
tried as such a direction: a success is a proof, whatever the solver did to get there.

All this holds of SIR, whose chances are the weights, and of the race, whose chances and dual are in `race`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from daemon_fast import ops
from daemon_fast.errors import ConstantMetric, InfeasibleTargets, InvalidInput
from daemon_fast.fit.samples import Block, Samples, centred, tilted_moments
from daemon_fast.ops import Draw, Normalization

__all__ = ["Problem"]

FAR = 1000.0  # times a metric's range: from there on its distance from zero costs digits that the fit needs
NARROWEST, WIDEST = 1e-140, 1e140  # ranges of a metric whose squares float64 holds
BOUNDARY = 1e-9  # in standard deviations: a target so near to the edge of what is reachable needs an infinite mu


@dataclass(frozen=True)
class Problem:
    """What is to be solved: samples of N prefixes, targets [K] and scale [K].

    `centre` [K] was taken from samples and targets: messages add it again.
    """

    samples: Samples
    targets: Tensor
    normalization: Normalization
    names: tuple[str, ...]
    scale: Tensor
    ridge: float
    draw: Draw = "sir"
    centre: Tensor | float = 0.0

    @staticmethod
    def standardised(
        samples: Samples,
        targets: Tensor,
        normalization: Normalization,
        names: tuple[str, ...],
        ridge: float,
    ) -> Problem:
        """With the standard deviation of each metric under the base weights as its scale.

        Metrics far from zero are centred: exp(-mu · f) would lose log2 of |f| / (high - low) bits of their differences.
        """
        ones = torch.ones_like(targets)
        problem = Problem(samples, targets, normalization, names, ones, ridge)
        low, high = problem.reachable()
        for name, width in zip(names, (high - low).tolist(), strict=True):
            if width != 0 and not NARROWEST <= width <= WIDEST:
                raise InvalidInput(
                    f"metric {name} ranges over {width:.3g}: a fit takes from {NARROWEST:g} to {WIDEST:g}: change its "
                    "unit"
                )
            if width == 0:
                where = " within every prefix" if normalization == "per_prefix" else ""
                raise ConstantMetric(f"metric {name} is constant{where}: no weighting can change it; leave it out")
        middle = (low + high) / 2
        if (middle.abs() > FAR * (high - low)).any():
            problem = replace(problem, samples=centred(samples, middle), targets=targets - middle, centre=middle)
        scale = problem.tilted(torch.zeros_like(ones)).covariance.diagonal().sqrt()
        # Base weights can be so uneven that nothing is left to vary; any positive scale serves then.
        return replace(problem, scale=torch.where(scale > 1e-9 * (high - low), scale, high - low))

    def tilted(self, nu: Tensor) -> ops.Moments:
        """On the device of the samples; the results, a handful of numbers, on the CPU, where the solvers work."""
        moments = tilted_moments(self.samples, nu / self.scale, self.normalization, self.draw)
        if not moments.log_z.isfinite():  # what a CUDA operator can't raise, it marks
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
        per_prefix = self.normalization == "per_prefix"

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
            raise InfeasibleTargets(f"out of reach of any weighting of the candidates: {ranges}")

    def check_separated(self, nu: Tensor) -> None:
        """Raise InfeasibleTargets if -nu separates the targets from all that weights can reach."""
        direction, per_prefix = -nu / self.scale, self.normalization == "per_prefix"

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
            f"jointly out of reach of any weighting of the candidates, though each is reachable alone: {ranges}"
        )

    def _range(self, k: int, low: Tensor, high: Tensor) -> str:
        target, lowest, highest = (float((x + self.centre)[k]) for x in (self.targets, low, high))
        return f"{self.names[k]} (target {target:.6g}, reachable {lowest:.6g} to {highest:.6g})"
