"""Every class of Transformers' causal-LM mapping: right log-probabilities, or an error of the library's own."""

from __future__ import annotations

from types import SimpleNamespace

import conformance
import families
import pytest

from daemon_fast import TransformersProposal
from daemon_fast.errors import DaemonFastError

EVERY = [*families.FAMILIES, *families.VARIANTS]


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


def test_rotary_factors_that_change_with_the_length():
    """Phi-3 takes other factors once a row is longer than its original context, for the tokens before, too."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * (families.HEAD // 2), "long_factor": [4.0] * (families.HEAD // 2),
    }  # fmt: skip
    model = families.build("phi3", original_max_position_embeddings=16, rope_parameters=rope)
    plain = conformance.Plain(model)
    assert "how much" in plain.unfit()
    for prefixes, within in (([[5, 9, 30], [7]], True), ([list(range(5, 17))], False)):
        proposal = TransformersProposal(model, None, eos_token_ids=conformance.EOS, **conformance.SETTINGS)
        try:
            candidates = proposal.propose(prefixes, 0)
        except DaemonFastError:
            assert not within
            continue
        by_prefix = SimpleNamespace(logits=plain.logits_of_prefixes)
        assert conformance.largest_error(candidates, prefixes, by_prefix) <= conformance.TOLERANCE


def test_the_table_says_what_came_of_each(results):
    table = conformance.TABLE.read_text(encoding="utf-8")
    stale = [r.family for r in results if conformance.cells(r)[:3] not in conformance.read_cells(table)]
    assert not stale, "python tests/conformance.py --save"
