"""Every class of Transformers' causal-LM mapping: right log-probabilities, or an error of the library's own."""

from __future__ import annotations

import conformance
import families
import pytest

EVERY = [*families.FAMILIES, *families.VARIANTS]
pytestmark = pytest.mark.sweep


@pytest.fixture(scope="module")
def results():
    """Of the tests that ran."""
    return []


@pytest.mark.parametrize("family", EVERY)
def test_log_probabilities_are_those_of_a_plain_pass_or_it_says_why_not(family, results):
    result = conformance.examine(family)
    results.append(result)
    if result.verdict == conformance.UNBUILT:
        pytest.skip(result.detail)
    assert result.good, f"{result.verdict} ({result.path or 'no path'}): {result.detail}"


def test_the_table_says_what_came_of_each(results):
    table = conformance.TABLE.read_text(encoding="utf-8")
    stale = [r.family for r in results if conformance.cells(r)[:4] not in conformance.read_cells(table)]
    assert not stale, "python tests/conformance.py --save"
