"""Every class of Transformers' causal-LM mapping: right log-probabilities, or an error of the library's own."""

from __future__ import annotations

import conformance
import families
import pytest


@pytest.mark.sweep
@pytest.mark.parametrize("family", families.FAMILIES)
def test_log_probabilities_are_those_of_a_plain_pass_or_it_says_why_not(family):
    result = conformance.examine(family)
    if result.verdict == conformance.UNBUILT:
        pytest.skip(result.detail)
    assert result.good, f"{result.verdict} ({result.path or 'no path'}): {result.detail}"
    if result.bidirectional:
        assert result.verdict == conformance.REFUSED
