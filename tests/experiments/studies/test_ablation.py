"""Leaving a metric out, on the listed model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_studies import collected

from daemon_fast.experiments.collected import NotDone
from daemon_fast.experiments.studies import ablation


def test_it_shows_what_a_metric_does():
    found = ablation.compute(collected(n=3000), collected(n=3000, seed=5))
    whole, *without = found.rows
    assert [row.metric for row in found.rows] == [None, "sr_2", "tr_2"]
    assert whole.distance < 0.05
    for k, row in enumerate(without):
        assert abs(row.shift[k]) > 3 * abs(whole.shift[k])
        assert row.distance > whole.distance
    left_out, alone = ablation.section(found).tables

    def marked(table):
        return [[getattr(cell, "marked", False) for cell in row[1:3]] for row in table.rows]

    assert marked(left_out) == [[False, False], [True, False], [False, True]]
    assert marked(alone) == [[True, False], [False, True]]
    # Of two metrics, what one left out leaves is the other alone.
    assert [row.metric for row in found.alone] == ["sr_2", "tr_2"]
    assert found.alone[0].distance == without[1].distance
    assert found.alone[1].shift == without[0].shift


def test_errors_are_those_of_repeated_samples():
    to_fit = collected(n=300)
    found = [ablation.compute(to_fit, collected(n=100, m=20, seed=10 * i + 5)) for i in range(60)]
    for row in range(3):
        rows = [one.rows[row] for one in found]
        for k in range(2):
            spread = float(torch.tensor([one.shift[k] for one in rows]).std())
            assert np.mean([one.shift_error[k] for one in rows]) == pytest.approx(spread, rel=0.25)
        assert all(one.interval[0] <= one.distance <= one.interval[1] for one in rows)
        if row == 0:
            assert {(one.rise, one.rise_error) for one in rows} == {(0.0, 0.0)}
        else:
            spread = float(torch.tensor([one.rise for one in rows]).std())
            assert np.mean([one.rise_error for one in rows]) == pytest.approx(spread, rel=0.35)
            rise = np.mean([one.distance**2 - two.rows[0].distance ** 2 for one, two in zip(rows, found, strict=True)])
            assert np.mean([one.rise for one in rows]) == pytest.approx(rise)


def test_a_metric_that_alone_is_out_of_reach_says_so():
    found = ablation.compute(collected(n=100), collected(n=100, seed=5))
    section = ablation.section(replace(found, alone=[NotDone("sr_2 is out of reach"), found.alone[1]]))
    assert section.notes == ["sr_2 alone: not done: sr_2 is out of reach"]
    assert [row[0] for row in section.tables[1].rows] == ["tr_2"]
