"""Leaving a metric out, on the listed model."""

from __future__ import annotations

from toy_studies import collected

from daemon_fast.experiments.studies import ablation


def test_it_shows_what_a_metric_does():
    found = ablation.compute(collected(n=3000), collected(n=3000, seed=5))
    whole, *without = found.rows
    assert [row.metric for row in found.rows] == [None, "sr_2", "tr_2"]
    assert whole.distance < 0.05
    for k, row in enumerate(without):
        assert abs(row.shift[k]) > 3 * abs(whole.shift[k])
        assert row.distance > whole.distance
    (table,) = ablation.section(found).tables
    assert [[getattr(cell, "marked", False) for cell in row[1:3]] for row in table.rows] == [
        [False, False], [True, False], [False, True]
    ]  # fmt: skip
