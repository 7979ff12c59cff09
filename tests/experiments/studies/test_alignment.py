"""The main table against exact distances on the listed model, and what its verdict says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_studies import FITTED, LISTED, MU, P, collected, draw, tilted

from daemon_fast.experiments.studies import alignment
from daemon_fast.experiments.studies.alignment import Mauve

pytest.importorskip("matplotlib")


def test_it_finds_the_exact_distances():
    n, (p_mu, _) = 20_000, tilted()
    held_out = collected(n=n, m=20)
    drawn = {"sampling": held_out.features[:, 0], "exact": LISTED[draw(p_mu, n, 9)]}
    result = alignment.compute(held_out, MU, drawn)
    sampling, exact = result.of("sampling"), result.of("exact")
    for found, truth in ((sampling, P), (exact, p_mu), (result.of("sampling", expected=True), P)):
        np.testing.assert_allclose(found.means.mean, truth @ LISTED, atol=0.01)
        gap = (truth - p_mu) @ FITTED / held_out.spread[:2]
        assert found.distance == pytest.approx(float(gap.square().mean().sqrt()), abs=0.02)
        assert found.interval[0] <= found.distance <= found.interval[1]
    assert exact.nearest == ["sr_2", "tr_2", "div"]
    assert sampling.nearest == result.of("daemon", expected=True).nearest == []
    assert sampling.interval[0] > exact.interval[1]
    np.testing.assert_allclose(
        sampling.means.standard_error, ((P @ LISTED**2 - (P @ LISTED) ** 2) / n).sqrt(), rtol=0.05
    )
    assert result.of("daemon", expected=True).distance < 0.1 * sampling.distance
    assert result.noise_floor == pytest.approx(n**-0.5)


def test_spread_and_wasserstein_are_those_of_the_law_of_one_text():
    """Exact on the listed model: the law of one draw of each method, against that of human text, p_mu."""
    n, (p_mu, _) = 4000, tilted()
    held_out = collected(n=n, m=50)
    result = alignment.compute(held_out, MU, {"sampling": held_out.features[:, 0]})
    laws = {("sampling", False): P, ("sampling", True): P, ("daemon", True): p_mu}
    unit = held_out.spread
    for (name, expected), law in laws.items():
        found = result.of(name, expected)
        deviation = (law @ LISTED**2 - (law @ LISTED) ** 2).sqrt() / unit
        np.testing.assert_allclose(found.spread, deviation, rtol=0.05)
        for k in range(3):
            order = LISTED[:, k].argsort()
            gaps = (law - p_mu)[order].cumsum(0)[:-1].abs()
            want = float((gaps * LISTED[order, k].diff()).sum() / unit[k])
            assert found.wasserstein[k] == pytest.approx(want, abs=0.06)
    np.testing.assert_allclose(result.human_spread, 1, rtol=0.05)
    table = alignment.spread_table(result)
    assert table.rows[0][1].endswith(", -")
    sampling = result.of("sampling")
    assert table.rows[1][1] == f"{sampling.spread[0]:.2f}, {sampling.wasserstein[0]:.2f}"


def test_a_human_mean_of_zero_leaves_the_relative_measure_undefined():
    held_out = collected(n=50)
    nothing = replace(held_out, human=held_out.human.clone().index_fill_(1, torch.tensor([0]), 0.0))
    result = alignment.compute(nothing, MU, {"sampling": held_out.features[:, 0], "daemon": held_out.features[:, 1]})
    assert [method.relative_rmse for method in result.methods] == [None] * 4
    assert alignment.table(result).rows[1][2] == "undefined"


@pytest.fixture(scope="module")
def result():
    held_out = collected(n=1200, m=20)
    drawn = {
        "sampling": held_out.features[:, 0],
        "daemon": LISTED[draw(tilted()[0], 1200, 9)],
        "greedy": LISTED[draw(P**3 / (P**3).sum(), 1200, 8)],
    }
    return alignment.compute(held_out, MU, drawn, {name: Mauve(0.8125, 0.0042) for name in drawn})


def test_the_verdict_is_for_daemon_where_it_wins(result):
    expected, single, ess, mauve = alignment.verdict(result)
    daemon, sampling = result.of("daemon", expected=True), result.of("sampling", expected=True)
    assert f"DAEMON's distance to human text is {daemon.distance:.3f} standard deviations" in expected
    assert f"sampling's {sampling.distance:.3f}, the noise floor 0.029: DAEMON is nearer" in expected
    assert "the best baseline (greedy)" in single
    assert "DAEMON is the nearest of 3 methods." in single
    assert "MAUVE: plain sampling 0.812 ± 0.004, DAEMON" in mauve
    assert f"{result.ess.mean:.1f} of 20 candidates" in ess


def test_the_verdict_is_against_daemon_where_it_loses(result):
    def worse(method):
        return replace(method, distance=9.0, interval=(8.0, 10.0)) if method.name == "daemon" else method

    expected, single, *_ = alignment.verdict(replace(result, methods=[worse(method) for method in result.methods]))
    assert "DAEMON is not nearer." in expected
    assert single.endswith("DAEMON is not the nearest: plain sampling is.")
    methods = [replace(method, interval=(0.0, 10.0)) for method in result.methods]
    assert alignment.verdict(replace(result, methods=methods))[1].endswith("though the intervals overlap.")


def test_mauve_of_few_texts_is_flagged_and_no_verdict(result):
    assert str(alignment.table(result).head[3]) == "MAUVE"
    few = replace(result, prefixes=999)
    assert str(alignment.table(few).head[3]) == "MAUVE (means little: 999 texts)"
    assert not any("MAUVE" in sentence for sentence in alignment.verdict(few))


def test_an_interval_that_reaches_zero_is_said(result):
    def reaching(method):
        return replace(method, interval=(0.0, 0.1)) if method.name == "daemon" else replace(method, interval=(0.1, 0.2))

    told = alignment.verdict(replace(result, methods=[reaching(method) for method in result.methods]))[0]
    assert told.endswith("DAEMON is nearer, and its interval reaches 0.")


def test_the_section_names_the_amateur(result):
    assert "is the model itself, of its last 8 tokens alone" in alignment.section(result).notes[0]
    named = alignment.section(replace(result, amateur="distilgpt2"))
    assert named.notes == ["The amateur of contrastive decoding is distilgpt2."]


def test_an_effective_sample_size_near_one_is_said(result):
    low = replace(result, ess=replace(result.ess, min=1.04))
    assert "1.0 at least; below 2 there is next to no choice." in alignment.verdict(low)[2]


def test_the_section_marks_the_nearest_and_draws_two_figures(result):
    rows = {row[0]: row for row in alignment.table(result).rows}
    assert [cell.marked for cell in rows["DAEMON"][-3:]] == [True] * 3
    assert not any(cell.marked for cell in rows["plain sampling, expected"][-3:])
    assert [figure.svg.count("<svg") for figure in alignment.section(result).figures] == [1, 1]


def test_without_mauve_there_is_no_column_of_it(result):
    without = replace(result, methods=[replace(method, mauve=None) for method in result.methods])
    assert "MAUVE" not in alignment.table(without).text()
    assert not any("MAUVE" in sentence for sentence in alignment.verdict(without))
