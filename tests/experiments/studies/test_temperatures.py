"""The sweep of temperatures on the listed model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_studies import FITTED, LISTED, MU, P, collected, drawn_from, tilted

from daemon_fast.experiments.collected import NotDone
from daemon_fast.experiments.studies import temperatures

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def found():
    hot = (P**0.5) / (P**0.5).sum()
    pairs = {
        tau: tuple(drawn_from(collected(n=3000, seed=2 * i + j), p, 9 + 2 * i + j) for j in range(2))
        for i, (tau, p) in enumerate({1.0: P, 2.0: hot}.items())
    }
    return temperatures.compute(pairs, MU)


def test_refits_reach_human_and_reuse_only_where_it_was_fitted(found):
    own, hot = found.rows
    assert (own.temperature, hot.temperature) == (1.0, 2.0)
    assert own.reused.distance < 0.06
    assert hot.refitted.distance < 0.06
    assert hot.reused.distance > 0.2
    assert own.sampling.ess == pytest.approx(50)
    weights = torch.exp(-(FITTED @ MU))
    assert own.reused.ess == pytest.approx(50 * float((P @ weights) ** 2 / (P @ weights**2)), rel=0.1)


def test_diversity_is_the_mean_of_that_of_texts(found):
    """E[Π(1 - sr_n)], as in the alignment table; not Π(1 - E[sr_n])."""
    p_mu, _ = tilted()
    assert found.human_diversity == pytest.approx(float(p_mu @ LISTED[:, 2]), abs=0.01)
    assert found.rows[0].sampling.diversity == pytest.approx(float(P @ LISTED[:, 2]), abs=0.01)
    assert found.rows[0].reused.diversity == pytest.approx(float(p_mu @ LISTED[:, 2]), abs=0.01)


def test_the_section_says_what_is_out_of_reach_and_what_means_nothing(found):
    own, hot = found.rows
    cold = replace(own, temperature=0.8, refitted=NotDone("ent is out of reach"), reused=replace(own.reused, ess=1.2))
    section = temperatures.section(replace(found, rows=[cold, hot]))
    assert section.notes == ["No refit at 0.8: ent is out of reach"]
    assert section.figures == []  # no coherence among these metrics
    text = section.tables[0].text()
    assert "out of reach" in text
    assert "1.2 (next to no choice)" in text
    assert "log Z of an ESS of 1.2" in text


def test_the_figure_of_diversity_against_coherence(found):
    """A point a temperature and method, the human star, and nothing for a refit that is out of reach."""
    rows = [
        replace(
            row,
            sampling=replace(row.sampling, coherence=0.5),
            refitted=NotDone("out") if row is found.rows[0] else replace(row.refitted, coherence=0.6),
            reused=replace(row.reused, coherence=0.4),
        )
        for row in found.rows
    ]
    result = replace(found, human_coherence=0.55, rows=rows)
    (figure,) = temperatures.section(result).figures
    assert figure.alt == "Diversity against coherence"
    drawn = {}

    class Axes:
        def plot(self, x, y, *_, label, **__):
            drawn[label] = x, y

        def __getattr__(self, name):
            return lambda *_, **__: None

    class Canvas:
        def subplots(self):
            return Axes()

    temperatures._draw(result, 0.55, Canvas())
    assert drawn["human"] == (pytest.approx(100 * found.human_diversity), pytest.approx(55))
    assert drawn["plain sampling"] == ([100 * row.sampling.diversity for row in rows], [50, 50])
    assert drawn["refitted"] == ([100 * rows[1].refitted.diversity], [60])
    assert drawn["reused"][1] == [40, 40]


def test_a_metric_that_does_not_vary_at_a_temperature_is_an_answer():
    """Few short texts may have no repetition at all: the other temperatures are still told."""
    to_fit, held_out = collected(n=20), collected(n=20, seed=5)
    flat = replace(to_fit, features=to_fit.features.clone())
    flat.features[..., 1] = 0.0
    cold, own = temperatures.compute({0.5: (flat, held_out), 1.0: (to_fit, held_out)}, MU).rows
    assert isinstance(cold.refitted, NotDone)
    assert "tr_2 is constant within every prefix" in cold.refitted.reason
    assert not isinstance(own.refitted, NotDone)
