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
    # log Z from few candidates is too low by about half the variance of the estimate, which the error measures.
    weights = torch.exp(-(FITTED @ MU) - log_z)
    variance = float(P @ (weights - 1) ** 2) / 5
    assert few.m == 5
    assert few.log_z_error == pytest.approx(math.sqrt(variance), rel=0.25)
    assert few.gain_per_text - all_of_them.gain_per_text == pytest.approx(variance / 2, rel=0.5)


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


def test_what_is_infinite_or_unknown_says_so():
    held_out = collected(n=1, m=30)
    found = perplexity.compute(replace(held_out, human_log_base=torch.full((1,), -math.inf)), MU)
    text = perplexity.table(found).text() + " ".join(perplexity.verdict(found))
    assert "infinite (some human text can't be drawn)" in text
    assert "± unknown" in text
    assert "nan" not in text
    assert "inf " not in text


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
