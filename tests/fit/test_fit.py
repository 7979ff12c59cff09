"""The fit: exact solutions, proofs of infeasibility, diagnostics."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from daemon_fast import fit, ops
from daemon_fast.errors import FitDidNotConverge, InfeasibleTargets, InvalidInput, UnboundedTilt
from daemon_fast.fit import newton
from daemon_fast.fit.resample import FOLDS, RIDGES
from daemon_fast.fit.samples import Block

F64 = torch.float64


def problem(n=60, m=25, k=4, seed=0, strength=0.5):
    """Features, and targets that a known mu solves per prefix."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, m, k, generator=generator, dtype=F64)
    features += torch.randn(n, 1, k, generator=generator, dtype=F64)
    mu = torch.randn(k, generator=generator, dtype=F64) * strength
    return features, ops.tilted_moments(features, mu).mean, mu


def expectation(features, mu, normalization="per_prefix", base=None):
    return ops.tilted_moments(features, mu, base, normalization).mean


@pytest.mark.parametrize("normalization", ["per_prefix", "global"])
def test_expected_metrics_equal_the_targets(normalization):
    features, targets, _ = problem()
    result = fit(features, targets, normalization=normalization)
    assert result.converged
    assert ((expectation(features, result.mu, normalization) - targets).abs() / result.scale).max() < 1e-9
    assert result.iterations <= 12


def test_recovers_the_mu_that_made_the_targets():
    features, targets, mu = problem()
    torch.testing.assert_close(fit(features, targets).mu, mu, rtol=1e-8, atol=1e-8)


def test_base_log_weights_tilt_what_they_should():
    features, _, mu = problem()
    base = torch.randn(features.shape[:2], dtype=F64)
    targets = expectation(features, mu, base=base)
    torch.testing.assert_close(fit(features, targets, base).mu, mu, rtol=1e-8, atol=1e-8)


def repetition_like(n=100, m=25, seed=0):
    """All nine metrics as they really relate: div is a function of sr_2 .. sr_4."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.zipf(1.4, size=(n * m, 64)) % 200)
    table = ops.repetition(tokens)
    div = (1 - table[:, :3]).prod(1, keepdim=True)
    extra = torch.from_numpy(rng.normal(size=(n * m, 2)) * [0.1, 5] + [0.5, 20]).float()
    return torch.cat([table, div, extra], 1).reshape(n, m, 9)


@pytest.mark.parametrize("normalization", ["per_prefix", "global"])
def test_all_nine_metrics_at_once(normalization):
    features = repetition_like()
    mu = torch.tensor([5, -3, 2, 4, -2, 1, -1, -2, 0.05], dtype=F64)
    targets = expectation(features, mu, normalization)
    result = fit(features, targets, normalization=normalization)
    assert (result.residual.abs() / result.scale).max() < 1e-9


def test_exactly_collinear_metrics_converge_and_are_reported():
    features, targets, _ = problem()
    twice = torch.cat([features, 3 * features[..., :1] + 2], dim=-1)
    result = fit(twice, torch.cat([targets, 3 * targets[:1] + 2]))
    assert (result.residual.abs() / result.scale).max() < 1e-9
    assert result.condition_number == math.inf
    with pytest.raises(InfeasibleTargets, match="jointly out of reach"):
        fit(twice, torch.cat([targets, 3 * targets[:1] + 2.01]))


def test_a_target_outside_the_range_of_its_metric_is_named():
    features, targets, _ = problem()
    targets[2] = 100.0
    high = features[..., 2].amax(1).mean()
    with pytest.raises(InfeasibleTargets, match=rf"c \(target 100, reachable .* to {high:.6g}\)") as caught:
        fit(features, targets, names=["a", "b", "c", "d"])
    assert "a (" not in str(caught.value)
    assert "M = 25" in str(caught.value)


def test_a_target_at_the_edge_of_the_range_is_infeasible():
    features, targets, _ = problem()
    targets[1] = features[..., 1].amin(1).mean()  # needs mu = +inf
    with pytest.raises(InfeasibleTargets, match="metric 1"):
        fit(features, targets)


def margin_by_linear_programming(features, targets):
    """Largest s such that target + s · (target - mean) is a per-prefix mixture: >= 0 means feasible."""
    n, m, k = features.shape
    centre = features.mean((0, 1)).numpy()
    columns = features.reshape(n * m, k).numpy().T / n
    a_eq = np.zeros((k + n, n * m + 1))
    a_eq[:k, :-1], a_eq[:k, -1] = columns, centre - targets.numpy()
    for i in range(n):
        a_eq[k + i, i * m : (i + 1) * m] = 1
    b_eq = np.concatenate([targets.numpy(), np.ones(n)])
    solved = linprog(np.r_[np.zeros(n * m), -1], A_eq=a_eq, b_eq=b_eq, bounds=[(0, None)] * (n * m) + [(-1, 100)])
    assert solved.status == 0
    return -solved.fun


@given(st.integers(0, 10**6), st.floats(0.2, 2.0), st.integers(2, 6))
@settings(max_examples=60)
def test_agrees_with_linear_programming_about_what_is_feasible(seed, distance, m):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(12, m, 3, generator=generator, dtype=F64)
    targets = features.mean((0, 1)) + distance * torch.randn(3, generator=generator, dtype=F64) * 0.5
    margin = margin_by_linear_programming(features, targets)
    if abs(margin) < 1e-4:
        return  # at the edge, either answer is right
    if margin > 0:
        result = fit(features, targets)
        assert (result.residual.abs() / result.scale).max() < 1e-9
    else:
        with pytest.raises(InfeasibleTargets):
            fit(features, targets)


def test_more_candidates_make_targets_feasible():
    # As on real text: 8 metrics, human means away from the model's, M = 4 too few and M = 25 enough.
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(96, 25, 8, generator=generator, dtype=F64)
    targets = torch.full((8,), 0.45, dtype=F64)
    with pytest.raises(InfeasibleTargets, match="M = 4"):
        fit(features[:, :4], targets)
    assert fit(features, targets).converged


def test_ridge_gives_the_nearest_soft_match_of_infeasible_targets():
    features, targets, _ = problem()
    targets[2] = 100.0
    result = fit(features, targets, ridge=0.1)
    assert result.converged
    # At the minimum of the penalised dual, (target - expectation) / scale + ridge * mu * scale = 0.
    balance = (targets - expectation(features, result.mu)) / result.scale + 0.1 * result.mu * result.scale
    assert balance.abs().max() < 1e-9


def population(n, k, seed, prefixes_differ=0.5, texts=None):
    """Candidates and human texts of one prefix each: normal, human text tilted by mu = 0.4 in each metric."""
    generator = torch.Generator().manual_seed(seed)
    level = prefixes_differ * torch.randn(n, 1, k, generator=generator, dtype=F64)
    features = level + torch.randn(n, 25, k, generator=generator, dtype=F64)
    human = level[:, 0] + torch.randn(n, k, generator=generator, dtype=F64) - 0.4
    if texts is not None:
        more = torch.randn(texts - n, k, generator=generator, dtype=F64) * math.hypot(1, prefixes_differ) - 0.4
        human = torch.cat([human, more])
    return features, human


@pytest.mark.parametrize("normalization", ["per_prefix", "global"])
@pytest.mark.parametrize("texts", [None, 57])
def test_cross_validation_takes_the_ridge_of_the_likeliest_left_out_text(normalization, texts):
    features, human = population(30, 3, 0, texts=texts)
    base = 0.3 * torch.randn(30, 25, generator=torch.Generator().manual_seed(1), dtype=F64)
    result = fit(features, human, base, normalization=normalization, ridge="cv")
    loss = dict.fromkeys(RIDGES, 0.0)
    for ridge in RIDGES:
        for fold in range(FOLDS):
            kept, texts_kept = (torch.arange(count) % FOLDS != fold for count in (30, len(human)))
            parts = features[kept], human[texts_kept], base[kept]
            mu = minimum_of_the_penalised_dual(*parts, normalization, ridge, result.scale)
            log_w = base[~kept] - features[~kept] @ mu
            log_z = log_w.logsumexp(1).mean() if normalization == "per_prefix" else log_w.logsumexp((0, 1))
            loss[ridge] += float(log_z + human[~texts_kept].mean(0) @ mu)
    assert 0 < result.ridge == min(loss, key=loss.get)
    torch.testing.assert_close(
        result.mu, fit(features, human, base, normalization=normalization, ridge=result.ridge).mu
    )


def minimum_of_the_penalised_dual(features, human, base, normalization, ridge, scale):
    """By a general-purpose minimiser."""

    def dual(mu):
        mu = torch.tensor(mu, requires_grad=True)
        log_w = base - features @ mu
        log_z = log_w.logsumexp(1).mean() if normalization == "per_prefix" else log_w.logsumexp((0, 1))
        value = log_z + human.mean(0) @ mu + ridge / 2 * (mu * scale).square().sum()
        value.backward()
        return value.item(), mu.grad.numpy()

    return torch.from_numpy(minimize(dual, np.zeros(features.shape[2]), jac=True, method="BFGS", tol=1e-9).x)


def test_cross_validation_shrinks_where_there_is_little_text_and_hardly_where_there_is_much():
    few, many = (torch.tensor([fit(*population(n, 8, seed), ridge="cv").ridge for seed in range(seeds)])
                 for n, seeds in ((20, 12), (1000, 3)))  # fmt: skip
    assert few.median() >= 0.08
    assert many.median() <= 0.005
    # It pays: mu comes nearer to the truth than that of the exact fit.
    nearer = 0
    for seed in range(12):
        features, human = population(20, 8, seed)
        exact, chosen = ((fit(features, human, ridge=ridge).mu - 0.4).norm() for ridge in (0.0, "cv"))
        nearer += bool(chosen < exact)
    assert nearer >= 10


def test_cross_validation_fits_what_only_a_ridge_can_fit_and_names_what_it_missed():
    features, human = population(30, 3, 0)
    human[:, 1] += 10
    with pytest.raises(InfeasibleTargets, match="out of reach"):
        fit(features, human)
    result = fit(features, human, ridge="cv")
    assert result.ridge > 0
    assert result.unmet == ("metric 1",)


def test_a_target_counts_as_met_within_its_standard_error_or_a_tenth_of_the_spread():
    features, human = population(200, 2, 0)
    for ridge in (0.0, 0.1, 1.0, 10.0, 1000.0):
        result = fit(features, human, ridge=ridge)
        error = human.std(0) / math.sqrt(200)
        missed = [
            (abs(r) > 2 * e) and (abs(r) > 0.1 * s)
            for r, e, s in zip(result.residual, error, result.scale, strict=True)
        ]
        assert result.unmet == tuple(f"metric {k}" for k in range(2) if missed[k])
        means_only = fit(features, human.mean(0), ridge=ridge)
        far = means_only.residual.abs() > 0.1 * means_only.scale
        assert means_only.unmet == tuple(f"metric {k}" for k in range(2) if far[k])
    assert fit(features, human).unmet == ()
    assert len(fit(features, human, ridge=1000.0).unmet) == 2


def test_cross_validation_passes_over_folds_that_only_a_ridge_can_fit():
    features = torch.rand(20, 9, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    human = torch.full((20, 1), 1.2, dtype=F64)  # no candidate has it,
    human[::5] = -2.6  # but the mean of all is 0.44
    with pytest.raises(InfeasibleTargets):
        fit(features[torch.arange(20) % 5 > 0], human[torch.arange(20) % 5 > 0])
    assert fit(features, human, ridge="cv").ridge > 0


def test_rmse_approaches_the_newton_solution():
    features, targets, _ = problem(n=200)
    exact = fit(features, targets, normalization="global")
    paper = fit(features, targets, normalization="global", method="rmse", tolerance=1e-6)
    assert paper.converged
    assert (paper.residual.abs() / paper.scale).max() < 1e-6
    torch.testing.assert_close(paper.mu, exact.mu, rtol=0, atol=1e-5)


def test_rmse_says_when_it_stops_short(monkeypatch):
    features, targets, _ = problem()
    monkeypatch.setattr(newton, "MAX_ADAM_STEPS", 3)
    result = fit(features, targets, method="rmse")
    assert not result.converged
    assert result.iterations == 3


def test_diagnostics():
    features, targets, mu = problem()
    result = fit(features, targets)
    log_w = -(features @ mu)
    weights = torch.softmax(log_w, dim=1)
    ess = 1 / weights.square().sum(1)
    assert result.ess_mean == pytest.approx(float(ess.mean()))
    assert result.ess_min == pytest.approx(float(ess.min()))
    # KL from the empirical model (M equal weights) to the tilted one, averaged over prefixes
    kl = (weights * (weights * 25).log()).sum(1).mean()
    assert result.kl == pytest.approx(float(kl))
    covariance = ops.tilted_moments(features, mu).covariance / result.scale.outer(result.scale)
    assert result.condition_number == pytest.approx(float(torch.linalg.cond(covariance)), rel=1e-6)
    assert (result.num_prefixes, result.num_candidates) == (60, 25)


@pytest.mark.parametrize("share", [0.1, 1e-2, 1e-3])
def test_a_rare_event_made_common(share):
    # The first Newton step overshoots by far; the solution is known: log odds, from `share` to 1/2.
    features = torch.zeros(1000, 4, 1, dtype=F64)
    features.view(-1)[: round(4000 * share)] = 1
    result = fit(features, torch.tensor([0.5]), normalization="global")
    assert result.mu.item() == pytest.approx(math.log(share / (1 - share)))


def test_kl_is_that_from_the_base_weights():
    features, targets, _ = problem()
    base = torch.randn(60, 25, generator=torch.Generator().manual_seed(5), dtype=F64) + 3
    result = fit(features, targets, base)
    before, after = torch.softmax(base, dim=1), torch.softmax(base - features @ result.mu, dim=1)
    assert result.kl == pytest.approx(float((after * (after / before).log()).sum(1).mean()))


@pytest.mark.parametrize("texts", [80, 300], ids=["of the same prefixes", "more texts than prefixes"])
def test_bootstrap_intervals_cover_the_truth(texts):
    # Candidates and human text from one population, whose mu is known: mean of a tilted normal is -mu.
    covered = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(80, 50, 1, generator=generator, dtype=F64)
        human = torch.randn(texts, 1, generator=generator, dtype=F64) - 0.4
        result = fit(features, human, bootstrap=60, seed=seed)
        low, high = result.confidence_interval[:, 0].tolist()
        assert low < result.mu.item() < high
        covered += low < 0.4 < high
    assert covered >= 15  # of 20 at 95%: fewer happen once in 10,000 times


def test_bootstrap_counts_replicates_without_a_solution():
    features, _, _ = problem(n=6, m=3, k=1)
    low, high = features.amin(1).mean(), features.amax(1).mean()
    result = fit(features, (low + 0.02 * (high - low)).reshape(1), bootstrap=50)
    assert 0 < result.bootstrap_infeasible < 50


def test_neither_solved_nor_proved_is_an_error(monkeypatch):
    features, targets, _ = problem()
    monkeypatch.setattr(newton, "MAX_STEPS", 2)
    with pytest.raises(FitDidNotConverge, match="residual of"):
        fit(features, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3, 4)}, r"\[N, M, K\] with K >= 1, got \[3, 4\]"),
        ({"features": torch.zeros(9, 4, 0)}, r"K >= 1, got \[9, 4, 0\]"),
        ({"targets": torch.zeros(3)}, r"targets must have shape \[K\] = \[4\] or \[N', K\] = \[N', 4\], got \[3\]"),
        ({"targets": torch.zeros(7, 3)}, r"got \[7, 3\]"),
        ({"targets": torch.zeros(0, 4)}, r"got \[0, 4\]"),
        ({"targets": torch.full((4,), math.nan)}, "targets of metric 0 hold NaN"),
        ({"base_log_w": torch.zeros(60, 3)}, r"base_log_w must have shape \[N, M\] = \[60, 25\], got \[60, 3\]"),
        ({"names": 5}, "names = 5 must be a list of strings"),
        ({"names": "abcd"}, "names = 'abcd' must be a list of strings"),
        ({"names": ["a"]}, "names has 1 entries, features has K = 4"),
        ({"normalization": "both"}, "normalization = 'both'"),
        ({"method": "sgd"}, "method = 'sgd'"),
        ({"ridge": -1.0}, "ridge = -1.0 must be finite and >= 0"),
        ({"ridge": "auto"}, "ridge = 'auto' must be a number >= 0 or 'cv'"),
        ({"ridge": 0.1, "method": "rmse"}, "ridge = 0.1 is for method='newton'"),
        ({"ridge": "cv"}, r"ridge = 'cv' needs targets of shape \[N', K\], one row a human text, got \[K\] means"),
        ({"ridge": "cv", "targets": torch.zeros(4, 4)}, "needs at least 5 prefixes and 5 human texts, got 60 and 4"),
        ({"ridge": None}, "ridge = None must be a number finite and >= 0, or 'cv'"),
        ({"ridge": True}, "ridge = True must be a number"),
        ({"bootstrap": 1.5}, "bootstrap = 1.5 must be an integer >= 0"),
        ({"bootstrap": -1}, "bootstrap = -1 must be >= 0"),
        ({"learning_rate": -1, "method": "rmse"}, "learning_rate = -1 must be positive and finite"),
        ({"learning_rate": None}, "learning_rate = None must be a number positive"),
        ({"tolerance": 0}, "tolerance = 0 must be positive and finite, or None"),
        ({"features": None}, "features is None: it must be a tensor of real numbers"),
        ({"features": torch.zeros(60, 25, 4) * 1j}, "features is a tensor of strided complex64 on cpu"),
        ({"targets": ["a"] * 4}, r"targets is \['a', 'a', 'a', 'a'\]: it must be"),
        ({"base_log_w": "none"}, "base_log_w is 'none': it must be"),
        ({"features": torch.randn(3, 25, 4)}, "3 prefixes are fewer than the 4 metrics"),
        ({"features": torch.randn(60, 1, 4)}, "M = 1 candidate"),
    ],
)
def test_bad_input_is_named(change, message):
    features, targets, _ = problem()
    with pytest.raises(InvalidInput, match=message):
        fit(**{"features": features, "targets": targets, **change})


@pytest.mark.parametrize(
    "kind", [torch.float16, torch.bfloat16, torch.int64, torch.uint8, "array", "list", "numpy numbers"]
)
def test_features_of_any_real_dtype_are_fitted(kind):
    features = torch.randint(9, (60, 25, 4), generator=torch.Generator().manual_seed(0)).double()
    base = torch.zeros(60, 25).double()
    want = fit(features, features.mean((0, 1)) + 0.1, base, bootstrap=3, ridge=0.5, seed=1)
    if isinstance(kind, torch.dtype):
        given = features.to(kind), features.mean((0, 1)) + 0.1, base.to(kind)
    else:
        given = features.numpy(), (features.mean((0, 1)) + 0.1).numpy(), base.numpy()
    if kind == "list":
        given = tuple(x.tolist() for x in given)
    numbers = (
        {"bootstrap": np.int64(3), "ridge": np.float32(0.5), "seed": np.int64(1)} if kind == "numpy numbers" else {}
    )
    got = fit(*given, **{"bootstrap": 3, "ridge": 0.5, "seed": 1, **numbers})
    torch.testing.assert_close(got.mu, want.mu, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.confidence_interval, want.confidence_interval, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("unit", [1e300, 1e-300, 1e150, 1e-150])
def test_units_whose_squares_float64_does_not_hold_are_refused(unit):
    features, targets, _ = problem()
    units = torch.tensor([1, unit, 1, 1], dtype=torch.float64)
    for options in ({}, {"ridge": 1.0}, {"normalization": "global"}, {"method": "rmse"}):
        with pytest.raises(InvalidInput, match=r"metric b ranges over .*: a fit takes from 1e-140 to 1e\+140"):
            fit(features * units, targets * units, names=list("abcd"), **options)


@pytest.mark.parametrize("unit", [1e130, 1e-130])
def test_other_units_are_fitted(unit):
    features, targets, _ = problem()
    units = torch.tensor([1, unit, 1, 1], dtype=torch.float64)
    want = fit(features, targets).mu
    torch.testing.assert_close(fit(features * units, targets * units).mu * units, want, rtol=1e-6, atol=1e-6)


def test_bad_features_are_named():
    features, targets, _ = problem()
    bad = features.clone()
    bad[5, 7, 2] = math.nan
    with pytest.raises(InvalidInput, match="features of c hold NaN"):
        fit(bad, targets, names=list("abcd"))
    constant = features.clone()
    constant[..., 1] = constant[:, :1, 1]  # differs between prefixes, but no weighting can change it
    with pytest.raises(InvalidInput, match="metric b is constant within every prefix"):
        fit(constant, targets, names=list("abcd"))
    with pytest.raises(InvalidInput, match="target of b is 0"):
        fit(features, targets * torch.tensor([1, 0, 1, 1]), names=list("abcd"), method="rmse")


@pytest.mark.parametrize("normalization", ["per_prefix", "global"])
def test_base_weights_that_leave_nothing_to_weigh_are_the_same_error_on_every_device(device, normalization):
    features, targets, _ = problem()
    for bad, message in ((math.nan, "prefix 3 hold NaN"), (math.inf, "prefix 3 hold NaN"), (-math.inf, "-infinity")):
        base = torch.zeros(60, 25, dtype=F64)
        base[3 if normalization == "per_prefix" or bad != -math.inf else slice(None)] = bad
        with pytest.raises(InvalidInput, match=f"base log-weights.*{message}"):
            fit(features.to(device), targets, base.to(device), normalization=normalization)


def test_global_weights_may_leave_a_prefix_without_any():
    features, targets, _ = problem()
    base = torch.zeros(60, 25, dtype=F64)
    base[3] = -math.inf
    result = fit(features, targets, base, normalization="global")
    kept = torch.arange(60) != 3
    torch.testing.assert_close(result.mu, fit(features[kept], targets, normalization="global").mu)
    assert result.ess_min == 0


def test_moments_that_a_gpu_marks_as_undefined_are_an_error(monkeypatch):
    features, targets, _ = problem()
    undefined = ops.Moments(torch.tensor(math.nan), torch.full((4,), math.nan), torch.full((4, 4), math.nan))
    monkeypatch.setattr(ops, "tilted_moments", lambda *_: undefined)
    with pytest.raises(InvalidInput, match="log-weights hold NaN or infinity"):
        fit(features, targets)


class Blocks:
    """Parts of one tensor, handed out one at a time."""

    def __init__(self, sizes, features, base_log_w=None):
        self.shape = tuple(features.shape)
        bases = [None] * len(sizes) if base_log_w is None else base_log_w.split(sizes)
        self.blocks = [Block(part, base) for part, base in zip(features.split(sizes), bases, strict=True)]

    def map(self, function):
        return map(function, self.blocks)


@pytest.mark.parametrize("normalization", ["per_prefix", "global"])
@pytest.mark.parametrize("with_base", [False, True])
def test_blocks_give_what_one_tensor_gives(normalization, with_base):
    features, targets, _ = problem()
    base = None
    if with_base:
        base = torch.randn(features.shape[:2], dtype=F64)
        base[::7, 3] = -torch.inf
    whole = fit(features, targets, base, normalization=normalization)
    parts = fit(Blocks([1, 40, 19], features, base), targets, normalization=normalization)
    for name in ("mu", "scale", "residual"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-9)
    for name in ("ess_mean", "ess_min", "kl", "condition_number"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-9)
    assert (parts.num_prefixes, parts.num_candidates) == (60, 25)


@pytest.mark.parametrize("normalization", ["per_prefix", "global"])
def test_blocks_prove_what_is_out_of_reach(normalization):
    features, targets, _ = problem()
    far = targets + 0.9 * (features.amax((0, 1)) - targets)  # each reachable alone over all samples
    for some in (features, Blocks([30, 30], features)):
        with pytest.raises(InfeasibleTargets, match="out of reach"):
            fit(some, far, normalization=normalization)


def test_blocks_hold_their_own_base_weights_and_are_not_resampled():
    features, targets, _ = problem()
    blocks = Blocks([30, 30], features)
    with pytest.raises(InvalidInput, match="base_log_w is given beside samples in blocks"):
        fit(blocks, targets, torch.zeros(60, 25))
    with pytest.raises(InvalidInput, match="bootstrap = 3 needs samples in one tensor"):
        fit(blocks, targets, bootstrap=3)
    with pytest.raises(InvalidInput, match="ridge = 'cv' needs samples in one tensor"):
        fit(blocks, targets.expand(60, -1), ridge="cv")


@pytest.mark.parametrize("draw", ["sir", "race"])
def test_metrics_far_from_zero_lose_no_digits(draw):
    """Shifted, a problem has the same mu: in one tensor, in blocks, with cross-validation, and in messages."""
    features, human = population(40, 12, 0)
    exact = fit(features, human.mean(0), draw=draw)
    for offset in (2.0**20, -(2.0**30)):
        found = fit(features.double() + offset, human.double() + offset, draw=draw)
        assert found.iterations <= exact.iterations + 2
        torch.testing.assert_close(found.mu, exact.mu, rtol=0, atol=2e-16 * abs(offset) * 100)
        torch.testing.assert_close(found.targets, human.double().mean(0) + offset)
    ridge = fit(features, human, draw=draw, ridge="cv").ridge
    assert fit(features.double() + 2.0**20, human.double() + 2.0**20, draw=draw, ridge="cv").ridge == ridge
    with pytest.raises(InfeasibleTargets, match=r"metric 0 \(target 1\.04863e\+06, reachable 1\.0485"):
        fit(features.double() + 2.0**20, human.double() + 2.0**20 + 50, draw=draw)


def test_a_tilt_without_bound_warns():
    features, targets = torch.randn(30, 8, 1, dtype=F64, generator=torch.Generator().manual_seed(0)).exp(), None
    for up, name, expected in ((0.3, "ent", 1), (-0.3, "ent", 0), (0.3, "nats", 0), (0.3, "sr_2", 0), (0.3, "mine", 0)):
        targets = features.mean((0, 1)) * (1 + up)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(features, targets, names=[name])
        found = [warning for warning in caught if issubclass(warning.category, UnboundedTilt)]
        assert len(found) == expected
        assert all("ent (coefficient -" in str(one.message) and one.filename == __file__ for one in found)


def test_prefixes_without_weights_take_no_part_in_a_global_fit():
    """Theirs may be a whole fold, or all that a bootstrap draws."""
    features, human = population(6, 2, 0)
    base = torch.zeros(6, 25, dtype=F64)
    base[[1, 3]] = -math.inf
    found = fit(features, human, base, normalization="global", ridge="cv", bootstrap=20)
    without = fit(features[[0, 2, 4, 5]], human.mean(0), base[[0, 2, 4, 5]], normalization="global", ridge=found.ridge)
    torch.testing.assert_close(found.mu, without.mu, rtol=1e-6, atol=1e-8)
    assert found.ess_min == 0
    assert found.confidence_interval.isfinite().all()
