"""Perplexity of human text under p_mu on the model that can be listed, where it is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy
from toy_studies import FITTED, LISTED, MU, P, collected, drawn_from, tilted

from daemon_fast import ops
from daemon_fast.errors import Undefined
from daemon_fast.experiments.collected import NotDone
from daemon_fast.experiments.studies import perplexity


def test_the_gain_is_the_divergence():
    p_mu, log_z = tilted()
    found = perplexity.compute(collected(n=20_000, m=100), MU, sizes=[5, 100, 500])
    all_of_them, (few,) = found.tilted, found.by_m
    divergence = float((p_mu * (p_mu / P).log()).sum())
    assert all_of_them.kl_per_text == pytest.approx(divergence, abs=0.01)
    assert all_of_them.gain_per_text == pytest.approx(divergence, abs=4 * all_of_them.gain_per_text_error + 0.005)
    assert found.model == pytest.approx(math.exp(-float(p_mu @ P.log()) / toy.LENGTH), rel=0.01)
    assert all_of_them.perplexity == pytest.approx(math.exp(-float(p_mu @ p_mu.log()) / toy.LENGTH), rel=0.01)
    assert all_of_them.perplexity < found.base == found.model
    weights = torch.exp(-(FITTED @ MU) - log_z)
    variance = float(P @ (weights - 1) ** 2) / 5
    assert few.m == 5
    assert few.log_z_error == pytest.approx(math.sqrt(variance), rel=0.25)
    # Without the jackknife, log Z from five candidates would be too low by about half of its variance.
    assert few.gain_per_text - all_of_them.gain_per_text == pytest.approx(0, abs=0.15 * variance / 2)


def test_the_jackknife_takes_the_leading_bias_off():
    """Of a law with two outcomes, whose samples can all be listed: what is left falls like 1 / M², not 1 / M."""
    p, energy = 0.3, -1.2
    z = 1 - p + p * math.exp(-energy)
    kl = -p * math.exp(-energy) / z * energy - math.log(z)
    bias = {}
    for m in (8, 16, 32):
        chances = torch.tensor([math.comb(m, i) * p**i * (1 - p) ** (m - i) for i in range(m + 1)], dtype=torch.float64)
        tilt = torch.tensor([[-energy] * i + [0.0] * (m - i) for i in range(m + 1)], dtype=torch.float64)
        found = perplexity.log_z_and_kl(torch.zeros_like(tilt), tilt)
        plain = tilt.logsumexp(1) - math.log(m)
        weights = tilt.softmax(1)
        plain_kl = (weights * tilt).sum(1) - plain
        pairs = ((plain, math.log(z)), (found.log_z, math.log(z)), (plain_kl, kl), (found.kl, kl))
        bias[m] = [float(chances @ estimate) - truth for estimate, truth in pairs]
    for of_m, of_double in ((bias[8], bias[16]), (bias[16], bias[32])):
        halved = [one / two for one, two in zip(of_m, of_double, strict=True)]
        assert halved[0] == pytest.approx(2, abs=0.1)
        assert halved[2] == pytest.approx(2, abs=0.15)
        assert halved[1] > 2.2
        assert halved[3] > 2.9
    assert bias[16][1] / bias[32][1] == pytest.approx(4, abs=0.6)
    assert bias[16][3] / bias[32][3] == pytest.approx(4, abs=0.6)
    assert abs(bias[8][1]) < 0.02 * abs(bias[8][0])


def test_the_jackknife_leaves_each_candidate_out():
    generator = torch.Generator().manual_seed(0)
    base, tilt = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    tilt[0, 2] = 60.0  # which leaves next to nothing to the others

    def plain(base, tilt):
        log_z = ((base + tilt).logsumexp(0) - base.logsumexp(0)).item()
        return log_z, float((base + tilt).softmax(0) @ tilt) - log_z

    found = perplexity.log_z_and_kl(base, tilt)
    for row in range(3):
        whole = plain(base[row], tilt[row])
        kept = [[i for i in range(6) if i != j] for j in range(6)]
        without = [plain(base[row, some], tilt[row, some]) for some in kept]
        for k, got in enumerate((found.log_z, found.kl)):
            want = 6 * whole[k] - 5 * sum(one[k] for one in without) / 6
            assert float(got[row]) == pytest.approx(want, rel=1e-9)
    with pytest.raises(Undefined, match="one candidate has all the weight"):
        perplexity.log_z_and_kl(torch.zeros(1, 2), torch.tensor([[0.0, 2000.0]]))


@pytest.mark.parametrize("size", [5, 8, 12, 29])
def test_all_candidates_count_whatever_the_size(size):
    """A candidate that alone is not like the others changes every estimate, wherever it stands."""
    held_out = collected(n=2, m=30)
    alike = torch.zeros_like(held_out.features)
    found = set()
    for at in (0, 11, 29):
        features = alike.clone()
        features[:, at] = 1.0
        estimate = perplexity.compute(replace(held_out, features=features), MU, [size]).by_m[0]
        found.add(round(estimate.gain, 12))
    none = perplexity.compute(replace(held_out, features=alike), MU, [size]).by_m[0].gain
    assert len(found) == 1
    assert found != {round(none, 12)}


def test_a_gain_is_in_nats_a_token():
    """What perplexity falls by; the figure of a whole text has a name of its own."""
    found = perplexity.compute(collected(), MU)
    assert found.tilted.gain == pytest.approx(math.log(found.base / found.tilted.perplexity))
    assert found.tilted.gain_per_text == pytest.approx(toy.LENGTH * found.tilted.gain)
    assert found.tilted.gain_per_text_error == pytest.approx(toy.LENGTH * found.tilted.gain_error)


def test_candidates_of_a_proposal_serve_to_tilt_the_model():
    p_mu, _ = tilted()
    model = collected(n=20_000, m=100)
    held_out = drawn_from(replace(model, human_log_base=model.human_log_p + 1), P**0.8 / (P**0.8).sum(), 3)
    held_out = held_out.tilting_model()
    found = perplexity.compute(held_out, MU)
    assert found.base == found.model
    assert found.tilted.perplexity == pytest.approx(math.exp(-float(p_mu @ p_mu.log()) / toy.LENGTH), rel=0.01)
    np.testing.assert_allclose(held_out.expected(MU).mean(0), p_mu @ LISTED, atol=0.01)


@pytest.mark.parametrize("mu", [torch.zeros(2, dtype=torch.float64), MU])
def test_the_divergence_is_from_the_model_not_from_what_drew(mu):
    p_mu, _ = tilted(mu)
    other = P**0.5 / (P**0.5).sum()
    held_out = drawn_from(collected(n=400, m=2000, human=p_mu), other, 3).tilting_model()
    found = perplexity.compute(held_out, mu).tilted
    assert found.kl_per_text == pytest.approx(float((p_mu * (p_mu / P).log()).sum()), abs=0.01)


def test_without_a_tilt_there_is_no_gain_whatever_the_proposal_cannot_draw():
    """As by top-k: base log-weights know nothing of the sequences left out, whose share must not count as a gain."""
    half = torch.where(torch.arange(81) < 40, P, 0) / P[:40].sum()
    held_out = drawn_from(collected(n=50, m=30), half, 3).tilting_model()
    found = perplexity.compute(held_out, torch.zeros(2, dtype=torch.float64), [5])
    for estimate in (found.tilted, *found.by_m):
        assert estimate.gain == pytest.approx(0, abs=1e-12)
        assert estimate.kl_per_text == pytest.approx(0, abs=1e-12)
        assert estimate.perplexity == pytest.approx(found.model)


def test_what_is_undefined_is_refused():
    held_out = collected(n=20, m=30)
    unseen = held_out.human_log_base.clone()
    unseen[:3] = -math.inf
    of_top_p = replace(held_out, human_log_base=unseen, truncated=True)
    with pytest.raises(Undefined, match="can't draw 3 of 20 human texts"):
        perplexity.compute(of_top_p, MU)
    seen = replace(held_out, truncated=True)
    assert perplexity.compute(seen, MU).tilted == perplexity.compute(held_out, MU).tilted
    for truncated in (of_top_p, seen, replace(of_top_p, truncated=False)):
        with pytest.raises(Undefined, match="log Z of tilting p_theta is not known"):
            perplexity.compute(truncated.tilting_model(), MU)
    for few in (held_out.first(1, 1), collected(n=20, m=1)):
        with pytest.raises(Undefined, match="two prefixes and two candidates at least"):
            perplexity.compute(few, MU)
    with pytest.raises(Undefined, match="too large for a number"):
        perplexity.compute(replace(held_out, human_log_p=torch.full((20,), -3000.0)), MU)


def test_the_error_of_log_z_is_that_of_repeated_estimates():
    held_out = collected(n=5000, m=40)
    log_z = ops.importance_weights(held_out.log_w(MU)).log_mean
    found = perplexity.compute(held_out, MU).tilted
    assert found.log_z_error == pytest.approx(float(log_z.std()), rel=0.05)
    assert found.log_z_error_of_mean == pytest.approx(float(log_z.std()) / math.sqrt(5000), rel=0.1)


@pytest.fixture(scope="module")
def found():
    return perplexity.compute(collected(n=2000), MU, [5])


def changed(found, **changes):
    return replace(found, tilted=replace(found.tilted, **changes))


def test_the_verdict_gives_the_gain_and_its_error(found):
    gain = f"{found.tilted.gain:.4f} ± {found.tilted.gain_error:.4f} nats a token"
    (only,) = perplexity.verdict(found)
    assert only.endswith(f"a gain of {gain}.")
    assert perplexity.verdict(changed(found, gain_error=1.0))[0].endswith(", not clear of its error.")
    assert perplexity.verdict(changed(found, gain=-9.0))[0].endswith(": DAEMON is worse than what it tilts.")
    tempered = replace(found, model=found.base / 2, tilting_model=found)
    assert perplexity.verdict(tempered)[1].endswith("DAEMON is not better than the model.")
    assert gain in perplexity.verdict(tempered)[2]


def test_what_means_nothing_is_flagged(found):
    text = perplexity.table(changed(found, perplexity=0.8)).text()
    assert "0.800 (means nothing: below 1)" in text
    assert perplexity.verdict(changed(found, perplexity=0.8))[0].endswith("which means nothing here.")
    lonely = changed(found, ess=1.3)
    assert "means nothing: log Z of an ESS of 1.3" in perplexity.table(lonely).text()
    assert "1.3 (next to no choice)" in perplexity.section(lonely).tables[1].text()


def test_a_refit_without_a_solution_says_so_in_its_place(found):
    section = perplexity.section(replace(found, tilting_model=NotDone("ent is out of reach")))
    assert section.notes == ["Tilting p_theta itself: not done: ent is out of reach"]
