"""The paper's experiments, each a function of tensors that returns plain numbers (Ji et al. 2024, section 4).

`daemon_fast.experiments.run` collects what they need and writes the report; here nothing is drawn and nothing is read.
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
from daemon_fast.experiments.measures import distance_to_human, noise_floor, relative_rmse, weighted_mean
from daemon_fast.fit import fit
from daemon_fast.ops import Normalization

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
ORDERS, JACKKNIFE = 8, 10
HEALTHY_ESS = 4.0  # below it, bias is far from its leading term in 1 / M
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
    log_p, log_q : [N, M] their log-probability under p_theta at temperature 1, and under what they were drawn from
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
    log_q: Tensor
    lengths: Tensor
    base_log_w: Tensor | None = None

    def columns(self, keep: Sequence[int]) -> Collected:
        """The same with some of the metrics only."""
        at = list(keep)
        return replace(
            self, names=[self.names[k] for k in at], human=self.human[:, at], features=self.features[:, :, at]
        )

    def first(self, prefixes: int, human: int | None = None) -> Collected:
        """The same with the candidates of the first prefixes only, and the first human continuations only."""
        cut: Row = {name: getattr(self, name)[:prefixes] for name in ("features", "log_p", "log_q", "lengths")}
        cut |= {name: getattr(self, name)[:human] for name in vars(self) if name.startswith("human")}
        base_log_w = None if self.base_log_w is None else self.base_log_w[:prefixes]
        return replace(self, **cut, base_log_w=base_log_w)

    def tilting_model(self) -> Collected:
        """The same where p_theta itself is tilted, not the proposal."""
        return replace(self, human_log_base=self.human_log_p, base_log_w=self.log_p - self.log_q)

    def fit_mu(self, ridge: float, normalization: Normalization = "per_prefix") -> Tensor:
        """[K] float64 mu of a fit of these candidates to these human texts; see `daemon_fast.fit`."""
        return fit(
            self.features, self.human, self.base_log_w, normalization=normalization, ridge=ridge, names=self.names
        ).mu

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


def convergence(pool: Collected, mu: Tensor, sizes: Sequence[int], seed: int = 0) -> Row:
    """Bias and variance of the draw's expected metrics against M, from one large pool of candidates a prefix.

    Groups of M are disjoint parts of the pool, in several random orders. The pool's own weighted mean stands for the
    truth; its bias, of order 1 / pool, is removed by Richardson's extrapolation of pool and half pool. Errors are
    of the candidates, by a jackknife that leaves out a tenth of them at a time (up to twice too large, as biases are
    quadratic in the noise of weights); prefixes are given.

    Returns
    -------
    rows : per M, up to half the pool: bias [K] and variance [K] in units of the candidates' standard deviation,
        bias_norm (root mean square of the bias over metrics), its noise, mean ESS
    slope, slope_error : of log bias_norm on log M, over the sizes that were used; None with fewer than three
    used : sizes whose mean ESS is at least `HEALTHY_ESS` and whose bias exceeds twice its noise
    pool_ess : mean and min of the ESS of the whole pool; where its share is far below that of the groups of M, few
        candidates carry the weight, and neither the pool nor the slope says much
    """
    features, log_w = pool.features.double(), pool.log_w(mu)
    n, m, k = features.shape
    sizes = [size for size in sizes if size <= m // 2]
    spread = features.reshape(-1, k).std(0).clamp_min(1e-12)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(m, generator=generator) for _ in range(ORDERS)]

    def groups(size: int, order: Tensor) -> tuple[Tensor, float]:
        """[N, groups, K] weighted means, and their mean ESS."""
        count = len(order) // size
        some = order[: count * size]
        weighed = ops.importance_weights(log_w[:, some].reshape(n * count, size))
        part = features[:, some].reshape(n * count, size, k)
        return weighted_mean(part, weighed.weights).reshape(n, count, k) / spread, float(weighed.ess.mean())

    def biases(orders: list[Tensor]) -> Tensor:
        """[sizes, K]"""
        half = torch.stack([groups(len(order) // 2, order)[0].mean(1) for order in orders]).mean(0)
        truth = 2 * groups(len(orders[0]), orders[0])[0][:, 0] - half
        return torch.stack(
            [torch.stack([(groups(s, order)[0].mean(1) - truth).mean(0) for order in orders]).mean(0) for s in sizes]
        )

    def norms(bias: Tensor) -> Tensor:
        return bias.square().mean(-1).sqrt()

    bias = biases(orders)
    tenth = torch.arange(m) % JACKKNIFE
    left_out = torch.stack([biases([order[tenth[order] != i] for order in orders]) for i in range(JACKKNIFE)])

    def error(replicates: Tensor) -> Tensor:
        return ((JACKKNIFE - 1) * replicates.var(0, correction=0)).sqrt()

    noise = norms(error(left_out))
    rows: list[Row] = []
    for i, size in enumerate(sizes):
        found = [groups(size, order) for order in orders]
        rows.append(
            {
                "m": size,
                "bias": bias[i].tolist(),
                "variance": torch.stack([values.var(1).mean(0) for values, _ in found]).mean(0).tolist(),
                "bias_norm": float(norms(bias)[i]),
                "noise": float(noise[i]),
                "ess": sum(ess for _, ess in found) / len(found),
            }
        )
    used = [i for i, row in enumerate(rows) if row["ess"] >= HEALTHY_ESS and row["bias_norm"] > 2 * row["noise"]]
    slope = slope_error = None
    if len(used) >= 3:
        x = np.log([sizes[i] for i in used])
        slope = float(np.polyfit(x, norms(bias)[used].log().numpy(), 1)[0])
        replicates = [float(np.polyfit(x, norms(one)[used].log().numpy(), 1)[0]) for one in left_out]
        slope_error = float(error(torch.tensor(replicates, dtype=torch.float64)))
    ess = ops.importance_weights(log_w).ess
    return {
        "rows": rows,
        "slope": slope,
        "slope_error": slope_error,
        "used": [sizes[i] for i in used],
        "pool_ess": {"mean": float(ess.mean()), "min": float(ess.min()), "candidates": m},
    }


# ---- 4. one metric, 6. ablation -------------------------------------------------------------------------------------


def one_metric(to_fit: Collected, held_out: Collected, name: str = "sr_4", ridge: float = 0.0) -> Row:
    """Fit a single metric: what becomes of it on held-out prefixes, and of the perplexity of human text.

    Parameters
    ----------
    ridge : of this fit; see `daemon_fast.fit`

    Raises
    ------
    InvalidInput
        The metric was not collected.
    """
    if name not in to_fit.names:
        raise InvalidInput(f"metric {name!r} was not collected; there are {', '.join(to_fit.names)}")
    k = to_fit.names.index(name)
    fitted, held = to_fit.columns([k]), held_out.columns([k])
    mu = fitted.fit_mu(ridge)
    return {
        "metric": name,
        "mu": mu.tolist(),
        "human": _mean_and_error(held.human.double()),
        "sampling": _mean_and_error(held.expected()),
        "daemon": _mean_and_error(held.expected(mu)),
        "perplexity": perplexity(held, mu),
    }


def ablation(to_fit: Collected, held_out: Collected, ridge: float = 0.0) -> list[Row]:
    """Leave each metric out of the fit; how far all of them then lie from human text, in its standard deviations."""
    k, spread = len(to_fit.names), to_fit.human.double().std(0)
    rows = []
    for left_out in [None, *range(k)]:
        kept = [i for i in range(k) if i != left_out]
        mu = torch.zeros(k, dtype=torch.float64)
        mu[kept] = to_fit.columns(kept).fit_mu(ridge)
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


# ---- 5. temperature, 9. transfer ------------------------------------------------------------------------------------


def temperatures(collected: Mapping[float, tuple[Collected, Collected]], mu: Tensor, ridge: float = 0.0) -> list[Row]:
    """Diversity against coherence at several proposal temperatures: plain, refitted at each, and with a mu given.

    Perplexity is that of human text: under the proposal, or under p_mu. Where the effective sample size is low, log Z
    of p_mu is, too, and its perplexity means nothing.

    Parameters
    ----------
    collected : temperature -> (to fit, held out)
    mu : [K] fitted at another temperature
    ridge : of the fits at each
    """

    def described(held_out: Collected, spread: Tensor, values: Tensor) -> Row:
        row = {**_mean_and_error(values), "distance": distance_to_human(values, held_out.human, spread)}
        mean = dict(zip(held_out.names, row["mean"], strict=True))
        row["coherence"], row["diversity"] = mean.get("coh"), mean.get("div")
        if "div" not in mean:  # from its parts, where it was not a metric of the fit
            parts = [1 - mean[name] for name in ("sr_2", "sr_3", "sr_4") if name in mean]
            row["diversity"] = math.prod(parts) if len(parts) == 3 else None
        return row

    rows: list[Row] = []
    for tau, (to_fit, held_out) in sorted(collected.items()):
        spread = to_fit.human.double().std(0)
        if not rows:
            rows.append(
                {"temperature": None, "method": "human", **described(held_out, spread, held_out.human.double())}
            )
        try:
            refitted = to_fit.fit_mu(ridge)
        except (InfeasibleTargets, FitDidNotConverge):
            refitted = None
        for method, tilt in (("sampling", torch.zeros_like(mu)), ("refitted", refitted), ("reused", mu)):
            row: Row = {"temperature": tau, "method": method}
            if tilt is None:
                row["infeasible"] = True
            else:
                found = perplexity(held_out, tilt)
                row |= {name: found[name] for name in ("perplexity", "gain_per_token", "gain_per_token_error")}
                row |= described(held_out, spread, held_out.expected(tilt))
                row["ess"] = float((1 / held_out.weights(tilt).square().sum(1)).mean())
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


def forward_kl(to_fit: Collected, held_out: Collected) -> Row:
    """The other projection onto human expectations F, beside DAEMON's, on the same candidates and without a ridge.

    DAEMON minimises the mean over prefixes of KL(q_i || p_i) under mean_i E_{q_i} f = F, which gives
    q_ij ∝ p_ij exp(-mu · f_ij). The forward counterpart minimises the mean of KL(p_i || q_i) under the same
    constraint, and Σ_j q_ij = 1 in each prefix. With multipliers λ and ν_i, stationarity in q_ij reads
    p_ij / q_ij = ν_i + λ·(f_ij - F):

        q_ij = p_ij / (ν_i + λ·(f_ij - F)),    ν_i such that Σ_j q_ij = 1,
        λ maximises the concave  mean_i [Σ_j p_ij log(ν_i + λ·(f_ij - F)) - ν_i]

    the empirical likelihood of Owen (1988), here of N samples that share a mean. This is the right counterpart: it
    moves the same distribution to the same expectations, and only the direction of the divergence differs. Maximum
    likelihood of an exponential tilt on human text would not do: its solution *is* p_mu, as its gradient is
    F - E_mu f. Weights are normalised within each prefix, as the decoder's are and as mu is fitted.

    Forward KL must keep mass wherever p has some, and its weights fall only like 1/f where exp(-mu·f) falls
    exponentially: bad candidates keep more weight, and single ones can get a lot, as a denominator nears zero.

    Raises
    ------
    InvalidInput, InfeasibleTargets
        The candidates of the fit cannot reach the human means.
    """
    mu, features = to_fit.fit_mu(0.0), to_fit.features.double()
    centre, scale = to_fit.human.double().mean(0), features.flatten(0, 1).std(0).clamp_min(1e-12)

    def standardized(collected: Collected) -> tuple[Tensor, Tensor]:
        prior = torch.full(collected.log_p.shape, 1 / collected.log_p.shape[1], dtype=torch.float64)
        if collected.base_log_w is not None:
            prior = collected.base_log_w.double().softmax(1)
        return (collected.features.double() - centre) / scale, prior

    multiplier = _forward_multiplier(*standardized(to_fit))
    spread = to_fit.human.double().std(0)
    rows = []
    for name, collected in (("fit", to_fit), ("held out", held_out)):
        for direction, weights in (
            ("reverse", collected.weights(mu)),
            ("forward", _forward_weights(*standardized(collected), multiplier)),
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


def _forward_weights(g: Tensor, prior: Tensor, multiplier: Tensor) -> Tensor:
    """[N, M] prior / (ν + λ·g), each row's ν such that it sums to 1; g [N, M, K] is f - F, prior [N, M]."""
    slack = g @ multiplier
    slack = slack - slack.amin(1, keepdim=True)  # so that ν is above 0, and at most 1
    low, high = torch.zeros(len(g), 1, dtype=torch.float64), torch.ones(len(g), 1, dtype=torch.float64)
    for _ in range(64):  # the sum falls as ν grows
        middle = (low + high) / 2
        too_large = (prior / (middle + slack)).sum(1, keepdim=True) > 1
        low, high = torch.where(too_large, middle, low), torch.where(too_large, high, middle)
    weights = prior / (high + slack)
    return weights / weights.sum(1, keepdim=True)


def _forward_multiplier(g: Tensor, prior: Tensor) -> Tensor:
    """[K] λ at which the rows' mean expectation of g is 0, by damped Newton steps on the concave dual.

    Raises
    ------
    InvalidInput
        0 lies outside the mean of the rows' convex hulls: no weights have these expectations.
    """
    k = g.shape[2]
    multiplier, weights = torch.zeros(k, dtype=torch.float64), prior

    def value(weights: Tensor, multiplier: Tensor) -> float:
        inside = prior / weights  # ν + λ·g
        nu = inside[:, 0] - g[:, 0] @ multiplier
        return float(((prior * inside.log()).sum(1) - nu).mean())

    for _ in range(100):
        gradient = (weights[..., None] * g).sum(1).mean(0)
        curve = weights.square() / prior  # prior / (ν + λ·g)²; profiling ν out subtracts the mean under it
        centred = g - (curve[..., None] * g).sum(1, keepdim=True) / curve.sum(1)[:, None, None]
        hessian = torch.einsum("nm,nmk,nml->kl", curve, centred, centred) / len(g)
        step: Tensor = torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]
        if float(gradient.abs().max()) < 1e-9:  # the last step squares it
            return multiplier + step
        length, here, slope = 1.0, value(weights, multiplier), float(gradient @ step)
        while length > 1e-10:
            weights = _forward_weights(g, prior, multiplier + length * step)
            if value(weights, multiplier + length * step) >= here + 1e-4 * length * slope:
                break
            length /= 2
        multiplier = multiplier + length * step
    raise InvalidInput("the human means lie outside what the candidates can reach: no forward-KL solution")


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
