"""Bins by probability, on the listed model."""

from __future__ import annotations

import numpy as np
import pytest
from toy_studies import FITTED, P, collected

from daemon_fast.experiments.studies import tail

pytest.importorskip("matplotlib")


def test_bins_are_ordered_and_exact():
    found = tail.compute(collected(n=5000, m=20), bins=4)
    assert sum(one.count for one in found.bins) == 100_000
    edges = [(one.low, one.high) for one in found.bins]
    assert edges == sorted(edges)
    assert all(low <= high for low, high in edges)
    order = P.log().argsort()
    inside = order[P[order].cumsum(0) < 0.25]  # sequences wholly in the first quarter
    share = float(P[inside].sum())
    exact = (P[inside] @ FITTED[inside] + (0.25 - share) * FITTED[order[len(inside)]]) / 0.25
    np.testing.assert_allclose(found.bins[0].means.mean, exact, atol=0.05)
    section = tail.section(found)
    assert section.tables[0].rows[0][0] == f"{edges[0][0]:.2f} to {edges[0][1]:.2f}"
    assert "<svg" in section.figures[0].svg
