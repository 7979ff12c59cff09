"""The law of what `race_select` chooses from given candidates, and the dual whose gradient it is.

With weights w_j of M candidates and uniforms u_j, the first to arrive at u_j / w_j wins. With r = w / max w and t the
first arrival times max w,

    P(t) = Π_j (1 - r_j t)                        the chance that none has arrived before t
    p_j  = r_j ∫₀¹ P(t) / (1 - r_j t) dt          the chance that j wins
    W    = log max w + ∫₀¹ (1 - P(t)) / t dt      the expectation of max_j (log w_j - log u_j)

p is the gradient of W with respect to log w, as the softmax is that of log Σ w: -log u_j is an exponential variable
where SIR, as a race, has a Gumbel one (the theorem of Williams, Daly and Zachary on random utilities). So W is convex,
D(mu) = mean_i W_i + mu · F is a convex dual with ∇D = F - F̂(mu), F̂ = mean_i Σ_j p_ij f_ij, and the same targets are
within reach. Its second derivative in direction c = f - f_m, m a candidate of the largest weight, is

    mean_i  Σ_j p_j c_j c_jᵀ - ∫₀¹ t P (Σ_{j≠k} g_j g_k c_j c_kᵀ) dt,    g_j = r_j / (1 - r_j t)

All integrands are polynomials in t of degree M - 1 at most, so that Gauss-Legendre's rule of ⌈M/2⌉ nodes is exact.
For large M fewer do. On the ellipse of the foci 0 and 1 that reaches δ = sinh² θ beyond them, |1 - r z| <= 1 + r δ, so
that the first integrand is at most exp(S δ) with S = Σ r <= M, and the error of Q nodes at most
C exp(M sinh² θ - 4 Q θ) for every θ > 0 (Trefethen 2013, theorem 19.3), C = 32/15 / (1 - exp(-4 θ)). `num_nodes` takes
the fewest that bring this below `ACCURACY`: 3 √M or so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from daemon_fast import ops

__all__ = ["num_nodes", "probabilities", "race_moments"]

ACCURACY = 1e-15
ENTRIES = 1 << 23  # of [prefixes, M, nodes] at once, 64 MB


def probabilities(log_w: Tensor) -> Tensor:
    """[N, M] float64: each candidate's chance to win its prefix's race, from log-weights [N, M], one finite a row."""
    return torch.cat([_Race(part).p for part in _parts(log_w.double())])


def race_moments(features: Tensor, log_w: Tensor) -> ops.Moments:
    """W, mean and minus the Jacobian of the mean in mu, each averaged over prefixes: what `tilted_moments` is to SIR.

    Parameters
    ----------
    features : [N, M, K]
    log_w : [N, M] b - mu · f
    """
    n, _, k = features.shape
    device = features.device
    value = torch.zeros((), dtype=torch.float64, device=device)
    mean = torch.zeros(k, dtype=torch.float64, device=device)
    curvature = torch.zeros(k, k, dtype=torch.float64, device=device)
    start = 0
    for part in _parts(log_w.double()):
        race, f = _Race(part), features[start : start + len(part)].double()
        start += len(part)
        best = f[torch.arange(len(part), device=device), part.argmax(1)]
        c = f - best[:, None]
        value += race.value.sum()
        mean += (best + (race.p[..., None] * c).sum(1)).sum(0)
        density = race.weights * race.nodes * race.survival  # [n, Q]
        own = race.p + torch.einsum("nq,nqm->nm", density, race.g.square())
        together = (race.g @ c) * density.sqrt()[..., None]  # [n, Q, K]
        curvature += torch.einsum("nmk,nml->kl", own[..., None] * c, c)
        curvature -= torch.einsum("nqk,nql->kl", together, together)
    return ops.Moments(value / n, mean / n, (curvature + curvature.T) / (2 * n))


def _parts(log_w: Tensor) -> Iterator[Tensor]:
    """Prefixes whose integrands fit into memory together."""
    n, m = log_w.shape
    size = max(1, ENTRIES // (m * num_nodes(m)))
    for start in range(0, n, size):
        yield log_w[start : start + size]


class _Race:
    """Of log-weights [n, M]: p [n, M], value [n], and at Q nodes g [n, Q, M] and survival P [n, Q]."""

    def __init__(self, log_w: Tensor) -> None:
        highest = log_w.amax(1)
        r = (log_w - highest[:, None]).exp()
        nodes, weights = (torch.from_numpy(part).to(log_w.device) for part in _rule(num_nodes(log_w.shape[1])))
        left = 1 - nodes[:, None] * r[:, None]  # [n, Q, M]
        self.nodes, self.weights = nodes, weights
        self.g, self.survival = r[:, None] / left, left.prod(2)
        self.p = torch.einsum("nq,nqm->nm", weights * self.survival, self.g)
        self.value = highest + ((1 - self.survival) / nodes) @ weights


def num_nodes(m: int) -> int:
    """How many nodes integrate a race of M candidates exactly, or to `ACCURACY`."""
    exact = (m + 1) // 2
    theta = np.linspace(1e-3, 2, 2000)
    constant = math.log(32 / 15) - np.log1p(-np.exp(-4 * theta)) - math.log(ACCURACY)
    return min(exact, math.ceil(float(((m * np.sinh(theta) ** 2 + constant) / (4 * theta)).min())))


@cache
def _rule(count: int) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], ...]:
    """Nodes in (0, 1) and weights of Gauss and Legendre."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2
