"""Several problems are one error, with a line each."""

from __future__ import annotations

import pickle

import pytest

from daemon_fast.errors import DataError, InvalidInput, Problems, SeveralProblems, UnknownMetric
from daemon_fast.metrics import parse
from daemon_fast.proposals.base import ProposalSettings
from daemon_fast.seeds import batch_seed, check_seed


def test_one_problem_is_raised_as_it_is_and_several_as_one():
    Problems().report()
    problems, one = Problems(), DataError("a")
    with problems:
        raise one
    with pytest.raises(DataError) as raised:
        problems.report()
    assert raised.value is one
    with problems:
        raise DataError("a")  # once is enough
    with problems:
        parse(["foo", "bar", "sr_2", "sr_2"])
    with pytest.raises(SeveralProblems) as several:
        problems.report()
    assert [type(problem) for problem in several.value.problems] == [
        DataError,
        UnknownMetric,
        UnknownMetric,
        InvalidInput,
    ]
    assert str(several.value).splitlines()[0] == "a"
    assert len(str(several.value).splitlines()) == 4
    assert str(pickle.loads(pickle.dumps(several.value))) == str(several.value)


def test_what_is_no_problem_of_a_user_is_not_collected():
    problems = Problems()
    with pytest.raises(KeyError), problems:
        raise KeyError
    assert not problems.found


def test_settings_name_all_that_is_out_of_range():
    with pytest.raises(SeveralProblems, match=r"(?s)num_candidates = 0 .*temperature = -1 .*top_p = 2 "):
        ProposalSettings("", "", num_candidates=0, temperature=-1, top_p=2)
    with pytest.raises(InvalidInput, match="top_k = -1 must be >= 0"):
        ProposalSettings("", "", top_k=-1)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, "1"])
def test_a_seed_out_of_range_is_named(seed):
    with pytest.raises(InvalidInput, match=r"seed = .* must be an integer from 0 to 2\^63 - 1"):
        check_seed(seed)
    with pytest.raises(InvalidInput):
        batch_seed(seed, 0)


def test_seeds_in_range_are_none_of_them_alike():
    assert len({batch_seed(seed, batch) for seed in (0, 1, 2**63 - 1) for batch in range(5)}) == 15
