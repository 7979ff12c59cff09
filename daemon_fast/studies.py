"""The paper's experiments, each a function of tensors that returns plain numbers (Ji et al. 2024, section 4).

`daemon_fast.evaluate` collects what they need and writes the report; here nothing is drawn and nothing is read.
Rows of a table are dictionaries; metrics are fractions, `ent` is a perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from daemon_fast import ops
from daemon_fast.errors import FitDidNotConverge, InfeasibleTargets, InvalidInput
from daemon_fast.fit import fit
from daemon_fast.measures import distance_to_human, noise_floor, relative_rmse, weighted_mean

__all__ = [
    "Collected",
    "ablation",
    "alignment",
    "convergence",
    "forward_kl",
    "one_metric",
    "perplexity",
    "tail_quality",
    "temperatures",
    "transfer",
]

Row = dict[str, Any]
BOOTSTRAP = 1000
EXPECTED = ", expected"


@dataclass(frozen=True)
class Collected:
    """Human continuations of N prefixes, and M candidates of each.

    Attributes
    ----------
    names : K metric names
    human : [N, K] metrics of the human continuations
    human_tokens : [N] their lengths
    human_log_p : [N] their log-probability under p_theta at temperature 1, in nats
    human_log_base : [N] the same under what is tilted: the proposal, or p_theta again
    features : [N, M, K] metrics of the candidates
    log_p : [N, M] their log-probability under p_theta at temperature 1
    lengths : [N, M]
    base_log_w : [N, M] base log-weights, or None where they are 0
    """

    names: list[str]
    human: Tensor
    human_tokens: Tensor
    human_log_p: Tensor
    human_log_base: Tensor
    features: Tensor
    log_p: Tensor
    lengths: Tensor
    base_log_w: Tensor | None = None

    def columns(self, keep: Sequence[int]) -> Collected:
        """The same with some of the metrics only."""
        at = list(keep)
        return replace(
            self, names=[self.names[k] for k in at], human=self.human[:, at], features=self.features[:, :, at]
        )

    def weights(self, mu: Tensor) -> Tensor:
        """[N, M] float64 of each prefix's candidates."""
        return ops.importance_weights(self.log_w(mu)).weights

    def log_w(self, mu: Tensor) -> Tensor:
        """[N, M] float64"""
        log_w = -(self.features.double() @ mu.double())
        return log_w if self.base_log_w is None else log_w + self.base_log_w.double()

    def expected(self, mu: Tensor | None = None) -> Tensor:
        """[N, K] float64 metrics of one draw for each prefix by mu, or by the candidates as they come."""
        if mu is None:
            return self.features.double().mean(1)
        return weighted_mean(self.features, self.weights(mu))


# ---- 1. alignment ---------------------------------------------------------------------------------------------------


def alignment(
    held_out: Collected,
    methods: Mapping[str, Tensor],
    spread: Tensor,
    fitted: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Row]:
    """The paper's main table: means of each method, and how far they lie from human text.

    Parameters
    ----------
    held_out : whose `human` the methods are held against
    methods : name -> [N, K] metrics of one text per prefix; of their expectation, if the name ends with ", expected"
    spread : [K] standard deviation of human text, the unit of distance
    fitted : the columns that distances are taken over; default: all

    Returns
    -------
    A row for "human" and each method: mean and standard_error per metric, distance, its 95% interval by the bootstrap
    over prefixes, relative_rmse, and the metrics in which the method's mean is the nearest to human.
    """
    human, spread = held_out.human.double(), spread.double()
    at = list(range(len(held_out.names)) if fitted is None else fitted)
    generator = torch.Generator().manual_seed(seed)
    resamples = torch.randint(len(human), (BOOTSTRAP, len(human)), generator=generator)
    means = {name: values.double().mean(0) for name, values in methods.items()}
    # Expectations have less noise than single texts: they don't compete with them.
    contenders = [name for name in means if not name.endswith(EXPECTED)] or list(means)
    nearest = {
        k: min(contenders, key=lambda name: abs(float(means[name][k] - human[:, k].mean())))
        for k in range(len(held_out.names))
    }
    rows = [{"method": "human", **_mean_and_error(human)}]
    for name, values in methods.items():
        gap = ((values.double() - human) / spread)[:, at]  # of the same prefix: paired
        replicates = gap[resamples].mean(1).square().mean(1).sqrt()
        interval = torch.quantile(replicates, torch.tensor([0.025, 0.975], dtype=torch.float64))
        rows.append(
            {
                "method": name,
                **_mean_and_error(values.double()),
                "distance": distance_to_human(values[:, at], human[:, at], spread[at]),
                "interval": interval.tolist(),
                "relative_rmse": relative_rmse(values[:, at], human[:, at]),
                "nearest": [held_out.names[k] for k, best in nearest.items() if best == name],
            }
        )
    return rows


def _mean_and_error(values: Tensor) -> Row:
    return {
        "mean": values.mean(0).tolist(),
        "standard_error": (values.std(0) / math.sqrt(len(values))).tolist(),
    }


# ---- 2. perplexity --------------------------------------------------------------------------------------------------


def perplexity(held_out: Collected, mu: Tensor, sizes: Sequence[int] = ()) -> Row:
    """Perplexity of human text under p_theta, under what is tilted, and under p_mu; and the paper's identity for it.

    log p_mu(x) = log base(x) - E(x) - log Z. log Z of a prefix is estimated from its M candidates, with a standard
    error of sqrt((M / ESS - 1) / M), by the delta method. If human expectations are met, the mean gain of p_mu over
    the base, in nats a text, is KL(p_mu || base), which the same weights estimate: mean over prefixes of
    Σ_j w̄_j log(M w̄_j).

    Parameters
    ----------
    sizes : numbers of candidates to repeat it with, each taking as many disjoint groups as M holds
    """
    m = held_out.features.shape[1]
    energy_of_human = held_out.human.double() @ mu.double()
    log_w, tokens = held_out.log_w(mu), float(held_out.human_tokens.sum())
    n = len(log_w)

    def with_size(size: int) -> Row:
        groups = log_w[:, : m // size * size].reshape(-1, size)
        weighed = ops.importance_weights(groups)
        log_z = weighed.log_mean.reshape(n, -1).mean(1)
        gains = -energy_of_human - log_z
        kl = (weighed.weights * torch.log((weighed.weights * size).clamp_min(1e-300))).sum(1)
        log_z_error = ((size / weighed.ess - 1).clamp_min(0) / size).sqrt()
        return {
            "m": size,
            "perplexity": math.exp(-float((held_out.human_log_base.double() + gains).sum()) / tokens),
            "gain": float(gains.mean()),
            "gain_error": float(gains.std() / math.sqrt(n)),
            "gain_per_token": float(gains.sum()) / tokens,
            "gain_per_token_error": float(gains.std() * math.sqrt(n)) / tokens,
            "kl": float(kl.mean()),
            "log_z_error": float(log_z_error.mean()),
            "log_z_error_of_mean": float(log_z_error.square().mean().sqrt()) / math.sqrt(groups.shape[0]),
        }

    def plain(log_p: Tensor) -> float:
        return math.exp(-float(log_p.double().sum()) / tokens)

    return {
        "model": plain(held_out.human_log_p),
        "base": plain(held_out.human_log_base),
        **with_size(m),
        "by_m": [with_size(size) for size in sizes if size <= m],
    }


# ---- 3. convergence -------------------------------------------------------------------------------------------------


def convergence(pool: Collected, mu: Tensor, sizes: Sequence[int]) -> Row:
    """Bias and variance of the draw's expected metrics against M, from one large pool of candidates a prefix.

    The pool's own weighted mean stands for the truth; groups of M are disjoint parts of it. Its own bias, of order
    1 / pool, is removed from the truth by Richardson's extrapolation of pool and half pool.

    Returns
    -------
    rows : per M, bias [K] and variance [K] in units of the candidates' standard deviation, bias_norm (root mean square
        over metrics), its noise (standard error over groups), mean ESS
    slope : of log bias_norm on log M, over the sizes whose bias exceeds twice its noise; None with fewer than three
    """
    features, log_w = pool.features.double(), pool.log_w(mu)
    n, m, k = features.shape
    spread = features.reshape(-1, k).std(0).clamp_min(1e-12)

    def means(size: int) -> tuple[Tensor, float]:
        groups = m // size
        weighed = ops.importance_weights(log_w[:, : groups * size].reshape(n * groups, size))
        part = features[:, : groups * size].reshape(n * groups, size, k)
        return weighted_mean(part, weighed.weights).reshape(n, groups, k), float(weighed.ess.mean())

    truth = (2 * means(m)[0] - means(m // 2)[0].mean(1, keepdim=True)).mean(1)  # [N, K]
    rows: list[Row] = []
    for size in sizes:
        if size > m // 2:
            continue
        values, ess = means(size)
        bias = (values.mean(1) - truth) / spread
        # Prefixes are given: the noise is that of the candidates, within each prefix.
        noise = (values.var(1) / values.shape[1] / spread**2).mean(0).sqrt() / math.sqrt(n)
        rows.append(
            {
                "m": size,
                "bias": bias.mean(0).tolist(),
                "variance": (values.var(1).mean(0) / spread**2).tolist(),
                "bias_norm": float(bias.mean(0).square().mean().sqrt()),
                "noise": float(noise.square().mean().sqrt()),
                "ess": ess,
            }
        )
    usable = [row for row in rows if row["bias_norm"] > 2 * row["noise"]]
    slope = None
    if len(usable) >= 3:
        x, y = (np.log([row[name] for row in usable]) for name in ("m", "bias_norm"))
        slope = float(np.polyfit(x, y, 1)[0])
    return {"rows": rows, "slope": slope, "used": [row["m"] for row in usable]}


# ---- 4. one metric, 6. ablation -------------------------------------------------------------------------------------


def one_metric(to_fit: Collected, held_out: Collected, name: str = "sr_4") -> Row:
    """Fit a single metric: what becomes of it on held-out prefixes, and of the perplexity of human text.

    Raises
    ------
    InvalidInput
        The metric was not collected.
    """
    if name not in to_fit.names:
        raise InvalidInput(f"metric {name!r} was not collected; there are {', '.join(to_fit.names)}")
    k = to_fit.names.index(name)
    fitted, held = to_fit.columns([k]), held_out.columns([k])
    mu = _fit(fitted)
    return {
        "metric": name,
        "mu": mu.tolist(),
        "human": _mean_and_error(held.human.double()),
        "sampling": _mean_and_error(held.expected()),
        "daemon": _mean_and_error(held.expected(mu)),
        "perplexity": perplexity(held, mu),
    }


def ablation(to_fit: Collected, held_out: Collected) -> list[Row]:
    """Leave each metric out of the fit; how far all of them then lie from human text, in its standard deviations."""
    k, spread = len(to_fit.names), to_fit.human.double().std(0)
    rows = []
    for left_out in [None, *range(k)]:
        kept = [i for i in range(k) if i != left_out]
        mu = torch.zeros(k, dtype=torch.float64)
        mu[kept] = _fit(to_fit.columns(kept))
        got = held_out.expected(mu)
        shift = (got.mean(0) - held_out.human.double().mean(0)) / spread
        rows.append(
            {
                "left_out": None if left_out is None else to_fit.names[left_out],
                "shift": shift.tolist(),
                "distance": distance_to_human(got, held_out.human, spread),
            }
        )
    return rows


def _fit(to_fit: Collected, **options: Any) -> Tensor:
    return fit(to_fit.features, to_fit.human, to_fit.base_log_w, names=to_fit.names, **options).mu


# ---- 5. temperature, 9. transfer ------------------------------------------------------------------------------------


def temperatures(
    collected: Mapping[float, tuple[Collected, Collected]], mu: Tensor, diversity: str = "div", coherence: str = "coh"
) -> list[Row]:
    """Diversity against coherence at several proposal temperatures: plain, refitted at each, and with a mu given.

    Parameters
    ----------
    collected : temperature -> (to fit, held out)
    mu : [K] fitted at another temperature
    """
    rows = []
    for tau, (to_fit, held_out) in sorted(collected.items()):
        names, spread = held_out.names, to_fit.human.double().std(0)
        try:
            refitted = _fit(to_fit)
        except (InfeasibleTargets, FitDidNotConverge):
            refitted = None
        for method, values in (
            ("human", held_out.human.double()),
            ("sampling", held_out.expected()),
            ("refitted", None if refitted is None else held_out.expected(refitted)),
            ("reused", held_out.expected(mu)),
        ):
            if values is None:
                rows.append({"temperature": tau, "method": method, "infeasible": True})
                continue
            row: Row = {"temperature": tau, "method": method, **_mean_and_error(values)}
            row["distance"] = distance_to_human(values, held_out.human, spread)
            for name, label in ((diversity, "diversity"), (coherence, "coherence")):
                if name in names:
                    row[label] = row["mean"][names.index(name)]
            if "diversity" not in row:  # from its parts, where it was not a metric of the fit
                parts = [names.index(f"sr_{n}") for n in (2, 3, 4) if f"sr_{n}" in names]
                row["diversity"] = float(math.prod(1 - row["mean"][k] for k in parts)) if len(parts) == 3 else None
            rows.append(row)
    return rows


def transfer(held_out: Mapping[str, Collected], mu: Mapping[str, Tensor], spread: Mapping[str, Tensor]) -> list[Row]:
    """mu fitted on one domain, used on another: distance to human on each, beside that of plain sampling."""
    rows = []
    for target, collected in held_out.items():
        sampling = distance_to_human(collected.expected(), collected.human, spread[target])
        for source, coefficients in mu.items():
            values = collected.expected(coefficients)
            rows.append(
                {
                    "fitted_on": source,
                    "used_on": target,
                    "distance": distance_to_human(values, collected.human, spread[target]),
                    "sampling": sampling,
                    "noise_floor": noise_floor(len(collected.human)),
                    **_mean_and_error(values),
                }
            )
    return rows


# ---- 7. reverse against forward KL ----------------------------------------------------------------------------------


def forward_kl(to_fit: Collected, held_out: Collected, mu: Tensor) -> Row:
    """The other projection onto human expectations, on the same candidates.

    DAEMON's p_mu is the q that minimises KL(q || p) under E_q f = F: q ∝ p exp(-mu · f). The forward counterpart
    minimises KL(p || q) = const - E_p log q under the same constraints. With multipliers ν and λ, stationarity of
    Σ_x -p(x) log q(x) + λ·(Σ_x q(x) f(x) - F) + ν (Σ_x q(x) - 1) gives -p/q + λ·f + ν = 0, and multiplying by q and
    summing, ν = 1 - λ·F:

        q(x) = p(x) / (1 + λ·(f(x) - F)),        λ maximises the concave  E_p log(1 + λ·(f - F))

    which on a sample is the empirical likelihood of Owen (1988). This is the right counterpart: it moves the same
    distribution to the same expectations, and only the direction of the divergence differs. Maximum likelihood of an
    exponential tilt on human text would not do: its solution *is* p_mu, since its gradient is F - E_mu f.

    Forward KL must keep mass wherever p has some, and its weights fall only like 1/f where exp(-mu·f) falls
    exponentially: bad candidates keep more weight, and single ones can get a lot, as the denominator nears zero.

    Weights of a prefix's candidates are normalised within it. λ is fitted over all samples, as the derivation has it.
    """
    features = to_fit.features.double().reshape(-1, len(to_fit.names))
    base = None if to_fit.base_log_w is None else to_fit.base_log_w.double().flatten()
    centre, scale = to_fit.human.double().mean(0), features.std(0).clamp_min(1e-12)
    prior = torch.softmax(torch.zeros(len(features), dtype=torch.float64) if base is None else base, 0)
    multiplier = _empirical_likelihood((features - centre) / scale, prior)

    def log_w(collected: Collected) -> Tensor:
        denominator = 1 + ((collected.features.double() - centre) / scale) @ multiplier
        # A held-out sample may lie where no sample of the fit did, beyond the pole: it gets the largest weight fitted.
        floor = float((1 + ((features - centre) / scale) @ multiplier).min())
        out = -denominator.clamp_min(floor).log()
        return out if collected.base_log_w is None else out + collected.base_log_w.double()

    spread = to_fit.human.double().std(0)
    rows = []
    for name, collected in (("fit", to_fit), ("held out", held_out)):
        for direction, weights in (
            ("reverse", collected.weights(mu)),
            ("forward", ops.importance_weights(log_w(collected)).weights),
        ):
            values = weighted_mean(collected.features, weights)
            rows.append(
                {
                    "on": name,
                    "direction": direction,
                    **_mean_and_error(values),
                    "distance": distance_to_human(values, collected.human, spread),
                    "ess": float((1 / weights.square().sum(1)).mean()),
                    "largest_weight": float(weights.amax(1).mean()),
                }
            )
    return {"rows": rows, "multiplier": (multiplier / scale).tolist()}


def _empirical_likelihood(g: Tensor, prior: Tensor) -> Tensor:
    """[K] λ that maximises Σ_i prior_i log(1 + λ·g_i), by damped Newton steps that stay inside every 1 + λ·g_i > 0.

    Raises
    ------
    InvalidInput
        0 lies outside the convex hull of g: no weights have these expectations.
    """
    multiplier = torch.zeros(g.shape[1], dtype=torch.float64)

    def value(at: Tensor) -> float:
        inside = 1 + g @ at
        return float((prior * inside.log()).sum()) if bool((inside > 0).all()) else -math.inf

    for _ in range(200):
        scaled = g / (1 + g @ multiplier)[:, None]
        gradient = prior @ scaled
        if float(gradient.abs().max()) < 1e-9:
            if abs(float((prior / (1 + g @ multiplier)).sum()) - 1) > 1e-6:  # λ runs off to infinity
                break
            return multiplier
        step = torch.linalg.lstsq((scaled * prior[:, None]).T @ scaled, gradient[:, None]).solution[:, 0]
        length, here = 1.0, value(multiplier)
        while value(multiplier + length * step) < here + 1e-4 * length * float(gradient @ step) and length > 1e-10:
            length /= 2
        multiplier = multiplier + length * step
    raise InvalidInput("the human means lie outside the convex hull of the candidates' metrics: no forward-KL solution")


# ---- 8. tail --------------------------------------------------------------------------------------------------------


def tail_quality(held_out: Collected, bins: int = 8) -> list[Row]:
    """Candidates in bins of equal number by log p_theta a token, least probable first: metrics of each bin.

    Tests that the low-probability region is the poor one.
    """
    per_token = (held_out.log_p.double() / held_out.lengths).flatten()
    features = held_out.features.double().reshape(len(per_token), -1)
    return [
        {
            "from": float(per_token[part].min()),
            "to": float(per_token[part].max()),
            "count": len(part),
            **_mean_and_error(features[part]),
        }
        for part in per_token.argsort().tensor_split(bins)
    ]
