"""Each study on a language model whose every sequence can be listed: a wrong estimator fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import toy

from daemon_fast import fit, metrics
from daemon_fast.errors import InvalidInput
from daemon_fast.experiments import studies
from daemon_fast.experiments.studies import Collected

MU = torch.tensor([2.0, -1.5], dtype=torch.float64)
METRICS = metrics.parse(["sr_2", "tr_2"])
LISTED = metrics.features(METRICS, toy.as_candidates(toy.SEQUENCES, 1))[0].double()  # [81, 2]
P = toy.PROBABILITIES


def tilted(mu=MU):
    """[81] p_mu, and log Z."""
    w = P * torch.exp(-(LISTED @ mu))
    return w / w.sum(), float(w.sum().log())


def draw(probabilities, count, seed):
    return torch.multinomial(probabilities, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def collected(n=400, m=50, seed=0, human=None):
    """Human text drawn from p_mu, candidates from the model."""
    human = tilted()[0] if human is None else human
    of_human, drawn = draw(human, n, seed + 1), draw(P, n * m, seed)
    log_p = P.log()
    return Collected(
        names=["sr_2", "tr_2"],
        human=LISTED[of_human],
        human_tokens=torch.full((n,), toy.LENGTH),
        human_log_p=log_p[of_human],
        human_log_base=log_p[of_human],
        features=LISTED[drawn].reshape(n, m, 2),
        log_p=log_p[drawn].reshape(n, m),
        log_q=log_p[drawn].reshape(n, m),
        lengths=torch.full((n, m), toy.LENGTH),
    )


def test_the_first_of_what_was_collected():
    whole = studies.replace(collected(n=6, m=3), base_log_w=torch.arange(18.0).reshape(6, 3))
    part = whole.first(2, 4)
    assert part.features.shape == (2, 3, 2)
    assert torch.equal(part.base_log_w, whole.base_log_w[:2])
    assert torch.equal(part.human_log_p, whole.human_log_p[:4])
    assert len(whole.first(2).human) == 6
    assert whole.first(6, 6).expected(MU).tolist() == whole.expected(MU).tolist()


def test_alignment_finds_the_exact_distances():
    n = 20_000
    held_out = collected(n=n, m=1)
    spread = held_out.human.std(0)
    p_mu, _ = tilted()
    rows = studies.alignment(held_out, {"sampling": held_out.features[:, 0], "exact": LISTED[draw(p_mu, n, 9)]}, spread)
    by_name = {row["method"]: row for row in rows}
    truth = {"sampling": P @ LISTED, "exact": p_mu @ LISTED}
    for name, mean in truth.items():
        row = by_name[name]
        np.testing.assert_allclose(row["mean"], mean, atol=0.01)
        want = float((((mean - p_mu @ LISTED) / spread).square().mean()).sqrt())
        assert row["distance"] == pytest.approx(want, abs=0.02)
        assert row["interval"][0] <= row["distance"] + 0.01
        assert row["interval"][1] >= row["distance"] - 1e-9
    assert by_name["exact"]["nearest"] == ["sr_2", "tr_2"]
    assert by_name["sampling"]["nearest"] == []
    assert by_name["sampling"]["interval"][0] > by_name["exact"]["interval"][1]
    np.testing.assert_allclose(
        by_name["sampling"]["standard_error"], ((P @ LISTED**2 - (P @ LISTED) ** 2) / n).sqrt(), rtol=0.05
    )


def test_perplexity_gain_is_the_divergence():
    p_mu, log_z = tilted()
    held_out = collected(n=20_000, m=100)
    row = studies.perplexity(held_out, MU, sizes=[5, 100, 500])
    divergence = float((p_mu * (p_mu / P).log()).sum())
    assert row["kl"] == pytest.approx(divergence, abs=0.01)
    assert row["gain"] == pytest.approx(divergence, abs=4 * row["gain_error"] + 0.005)
    assert row["model"] == pytest.approx(math.exp(-float(p_mu @ P.log()) / toy.LENGTH), rel=0.01)
    assert row["perplexity"] == pytest.approx(math.exp(-float(p_mu @ p_mu.log()) / toy.LENGTH), rel=0.01)
    assert row["perplexity"] < row["base"] == row["model"]
    assert [part["m"] for part in row["by_m"]] == [5, 100]
    # log Z from few candidates is too low by about half the variance of the estimate, which the error measures.
    few = row["by_m"][0]
    weights = torch.exp(-(LISTED @ MU) - log_z)
    variance = float(P @ (weights - 1) ** 2) / 5
    assert few["log_z_error"] == pytest.approx(math.sqrt(variance), rel=0.25)
    assert few["gain"] - row["gain"] == pytest.approx(variance / 2, rel=0.5)


def test_candidates_of_a_proposal_serve_to_tilt_the_model():
    p_mu, _ = tilted()
    hot = P**0.8 / (P**0.8).sum()
    drawn, model = draw(hot, 20_000 * 100, 3), collected(n=20_000, m=100)
    held_out = studies.replace(
        model,
        features=LISTED[drawn].reshape(20_000, 100, 2),
        log_p=P.log()[drawn].reshape(20_000, 100),
        log_q=hot.log()[drawn].reshape(20_000, 100),
        human_log_base=model.human_log_p + 1,
    ).tilting_model()
    row = studies.perplexity(held_out, MU)
    assert row["base"] == row["model"]
    assert row["perplexity"] == pytest.approx(math.exp(-float(p_mu @ p_mu.log()) / toy.LENGTH), rel=0.01)
    np.testing.assert_allclose(held_out.expected(MU).mean(0), p_mu @ LISTED, atol=0.01)


def test_the_error_of_log_z_is_that_of_repeated_estimates():
    held_out = collected(n=5000, m=40)
    log_z = studies.ops.importance_weights(held_out.log_w(MU)).log_mean
    row = studies.perplexity(held_out, MU)
    assert row["log_z_error"] == pytest.approx(float(log_z.std()), rel=0.05)
    assert row["log_z_error_of_mean"] == pytest.approx(float(log_z.std()) / math.sqrt(5000), rel=0.1)


def test_bias_falls_like_one_over_m():
    pool = collected(n=60, m=8000)
    out = studies.convergence(pool, MU, [2, 4, 8, 16, 32, 8000])
    assert [row["m"] for row in out["rows"]] == [2, 4, 8, 16, 32]
    assert out["slope"] == pytest.approx(-1, abs=0.1)
    assert 0 < out["slope_error"] < 0.05
    assert out["used"] == [row["m"] for row in out["rows"] if row["ess"] >= studies.HEALTHY_ESS]
    assert len(out["used"]) >= 3
    weights = torch.exp(-(LISTED @ MU))
    share = float((P @ weights) ** 2 / (P @ weights**2))
    assert out["pool_ess"]["mean"] == pytest.approx(8000 * share, rel=0.02)
    assert out["pool_ess"]["min"] == pytest.approx(8000 * share, rel=0.1)
    # The bias itself, against that of a great many draws of 4 candidates.
    groups = LISTED[draw(P, 4 * 400_000, 77)].reshape(-1, 4, 2)
    weights = torch.softmax(-(groups @ MU), 1)
    exact = (groups * weights[..., None]).sum(1).mean(0) - tilted()[0] @ LISTED
    spread = pool.features.reshape(-1, 2).std(0)
    np.testing.assert_allclose(out["rows"][1]["bias"], exact / spread, atol=0.01)
    variance = [sum(row["variance"]) for row in out["rows"]]
    assert np.polyfit(np.log([2, 4, 8, 16, 32]), np.log(variance), 1)[0] == pytest.approx(-1, abs=0.15)


def test_the_noise_of_a_bias_covers_that_of_repeated_pools():
    """The jackknife is too large, by up to 2, for what is quadratic in the weights' noise."""
    found = [studies.convergence(collected(n=10, m=200, seed=10 * i), MU, [5, 20])["rows"] for i in range(40)]
    for rows in zip(*found, strict=True):
        spread = torch.tensor([row["bias"] for row in rows]).std(0).square().mean().sqrt()
        assert float(spread) < np.median([row["noise"] for row in rows]) < 2.2 * float(spread)


def test_no_slope_is_claimed_from_noise():
    assert studies.convergence(collected(n=3, m=60), torch.zeros(2), [5, 10, 20])["slope"] is None


def test_one_metric_alone_reaches_its_target():
    human = tilted(3 * MU)[0]
    to_fit, held_out = collected(n=3000, human=human), collected(n=3000, seed=5, human=human)
    out = studies.one_metric(to_fit, held_out, "sr_2")
    assert len(out["mu"]) == 1
    assert out["daemon"]["mean"][0] == pytest.approx(out["human"]["mean"][0], abs=0.01)
    assert abs(out["sampling"]["mean"][0] - out["human"]["mean"][0]) > 0.05
    assert out["perplexity"]["perplexity"] < out["perplexity"]["model"]
    with pytest.raises(InvalidInput, match="'sr_9' was not collected"):
        studies.one_metric(to_fit, held_out, "sr_9")


def test_refits_are_penalised_as_the_artefact_was():
    to_fit, held_out = collected(n=300), collected(n=300, seed=5)
    whole = fit(to_fit.features, to_fit.human, ridge=0.2).mu
    want = studies.distance_to_human(held_out.expected(whole), held_out.human, to_fit.human.double().std(0))
    assert studies.ablation(to_fit, held_out, ridge=0.2)[0]["distance"] == pytest.approx(want)
    refitted = studies.temperatures({1.0: (to_fit, held_out)}, MU, ridge=0.2)[2]
    assert (refitted["method"], refitted["distance"]) == ("refitted", pytest.approx(want))
    alone = fit(to_fit.features[..., :1], to_fit.human[:, :1], ridge=0.2).mu
    assert studies.one_metric(to_fit, held_out, "sr_2", ridge=0.2)["mu"] == pytest.approx(alone.tolist())


def test_ablation_shows_what_a_metric_does():
    rows = studies.ablation(collected(n=3000), collected(n=3000, seed=5))
    assert [row["left_out"] for row in rows] == [None, "sr_2", "tr_2"]
    assert rows[0]["distance"] < 0.05
    for k, row in enumerate(rows[1:]):
        assert abs(row["shift"][k]) > 3 * abs(rows[0]["shift"][k])
        assert row["distance"] > rows[0]["distance"]


def test_temperatures_refit_reaches_human_and_reuse_only_where_it_was_fitted():
    hot = (P**0.5) / (P**0.5).sum()

    def at(probabilities, seed):
        one = collected(n=3000, seed=seed)
        drawn = draw(probabilities, 3000 * 50, seed + 9)
        return studies.replace(one, features=LISTED[drawn].reshape(3000, 50, 2))

    rows = studies.temperatures({1.0: (at(P, 0), at(P, 1)), 2.0: (at(hot, 2), at(hot, 3))}, MU)
    got = {(row["temperature"], row["method"]): row for row in rows}
    assert len(got) == 7
    assert got[1.0, "reused"]["distance"] < 0.06
    assert got[2.0, "refitted"]["distance"] < 0.06
    assert got[2.0, "reused"]["distance"] > 0.2
    assert got[1.0, "sampling"]["ess"] == pytest.approx(50)
    weights = torch.exp(-(LISTED @ MU))
    assert got[1.0, "reused"]["ess"] == pytest.approx(50 * float((P @ weights) ** 2 / (P @ weights**2)), rel=0.1)
    assert got[None, "human"]["diversity"] is None  # it takes sr_2, sr_3 and sr_4


def test_transfer_knows_its_own_domain():
    other = torch.tensor([-3.0, 1.0], dtype=torch.float64)
    domains = {"a": collected(n=3000), "b": collected(n=3000, seed=5, human=tilted(other)[0])}
    spread = {name: one.human.std(0) for name, one in domains.items()}
    rows = studies.transfer(domains, {"a": MU, "b": other}, spread)
    got = {(row["fitted_on"], row["used_on"]): row["distance"] for row in rows}
    for name in "ab":
        assert got[name, name] < 0.06
    assert got["a", "b"] > 0.3 < got["b", "a"]


def test_forward_kl_is_the_other_projection():
    to_fit, held_out = collected(n=2000, m=100), collected(n=2000, m=100, seed=5)
    out = studies.forward_kl(to_fit, held_out)
    rows = {(row["on"], row["direction"]): row for row in out["rows"]}
    for direction in ("reverse", "forward"):
        assert rows["held out", direction]["distance"] < 0.08
        np.testing.assert_allclose(rows["fit", direction]["mean"], to_fit.human.double().mean(0), atol=1e-8)
    # The exact solution on the listed model: the same expectations, and no q with them lies nearer in forward KL.
    target = to_fit.human.double().mean(0)
    g = (LISTED - target)[None]
    q = studies._forward_weights(g, P[None], studies._forward_multiplier(g, P[None]))[0]
    assert float(q.sum()) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(q @ LISTED, target, atol=1e-8)
    everything = LISTED.expand(2, -1, -1)  # each sequence once, weighted by its probability: the exact reverse solution
    reverse = fit(everything, target, P.log().expand(2, -1)).mu
    p_mu = tilted(reverse)[0]
    np.testing.assert_allclose(p_mu @ LISTED, target, atol=1e-8)
    assert float(P @ (P / q).log()) < float(P @ (P / p_mu).log())
    assert float(q @ (q / P).log()) > float(p_mu @ (p_mu / P).log())


def test_forward_kl_out_of_reach_is_an_error():
    g = torch.rand(3, 50, 2, dtype=torch.float64) + 0.1
    with pytest.raises(InvalidInput, match="no forward-KL solution"):
        studies._forward_multiplier(g, torch.full((3, 50), 0.02, dtype=torch.float64))


def test_forward_weights_are_the_stationary_point():
    """ν_i + λ·g is prior over weight, and rows that differ each have their own ν."""
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(6, 30, 2, generator=generator, dtype=torch.float64)
    prior = torch.randn(6, 30, generator=generator, dtype=torch.float64).softmax(1)
    multiplier = torch.tensor([0.8, -5.0], dtype=torch.float64)
    weights = studies._forward_weights(g, prior, multiplier)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
    nu = prior / weights - g @ multiplier
    np.testing.assert_allclose(nu, nu[:, :1].expand_as(nu), rtol=1e-6)
    solved = studies._forward_multiplier(g, prior)
    mean = (studies._forward_weights(g, prior, solved)[..., None] * g).sum(1).mean(0)
    np.testing.assert_allclose(mean, 0, atol=1e-9)


def test_tail_bins_are_ordered_and_exact():
    held_out = collected(n=5000, m=20)
    rows = studies.tail_quality(held_out, bins=4)
    assert sum(row["count"] for row in rows) == 100_000
    edges = [(row["from"], row["to"]) for row in rows]
    assert edges == sorted(edges)
    assert all(low <= high for low, high in edges)
    order = P.log().argsort()
    cumulative = P[order].cumsum(0)
    inside = order[cumulative < 0.25]  # sequences wholly in the first quarter
    share = float(P[inside].sum())
    exact = (P[inside] @ LISTED[inside] + (0.25 - share) * LISTED[order[len(inside)]]) / 0.25
    np.testing.assert_allclose(rows[0]["mean"], exact, atol=0.05)
