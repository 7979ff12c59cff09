"""A single coefficient on the listed model."""

from __future__ import annotations

import pytest
from toy_studies import MU, collected, tilted

from daemon_fast.errors import InvalidInput
from daemon_fast.experiments.studies import one_metric


def test_it_reaches_its_target():
    human = tilted(3 * MU)[0]
    to_fit, held_out = collected(n=3000, human=human), collected(n=3000, seed=5, human=human)
    found = one_metric.compute(to_fit, held_out, "sr_2")
    assert found.daemon.mean == pytest.approx(found.human.mean, abs=0.01)
    assert abs(found.sampling.mean[0] - found.human.mean[0]) > 0.05
    assert found.perplexity.tilted.perplexity < found.perplexity.model
    text = one_metric.section(found).tables[0].text()
    assert f"{100 * found.daemon.mean[0]:.2f} ± " in text
    for missing in ("sr_9", "div"):  # div is measured, but not fitted
        with pytest.raises(InvalidInput, match=f"'{missing}' was not collected"):
            one_metric.compute(to_fit, held_out, missing)
