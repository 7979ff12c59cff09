"""Conditions on metrics against the same condition in plain Python, and what is said of those that are none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from daemon_fast.errors import InvalidInput
from daemon_fast.filters import parse_filter

COLUMNS = {
    "sr_2": torch.tensor([0.0, 0.2, 0.5, 1.0]),
    "tr_8": torch.tensor([0.0, 0.7, 0.1, 0.3]),
    "top_2_gram": torch.tensor([0.1, 0.2, 0.30000000000000004, 1.5], dtype=torch.float64),
}
comparison = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(list(COLUMNS)), st.sampled_from(["", " "]), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]),
    st.sampled_from(["", "  "]), st.sampled_from(["0", "0.5", "1", ".1", "1.", "-1e-3", "5E-1", "+0.25", "1.5"]),
)  # fmt: skip
conditions = st.recursive(
    comparison,
    lambda inner: st.one_of(
        st.builds("({})".format, inner), st.builds("{} and {}".format, inner, inner),
        st.builds("{} or {}".format, inner, inner), st.builds("( {} or {}) and ({})".format, inner, inner, inner),
    ),
    max_leaves=8,
)  # fmt: skip


@given(conditions)
def test_means_what_python_means(text):
    condition = parse_filter(text)
    assert all(name in text for name in condition.names)
    listed = {name: column.tolist() for name, column in COLUMNS.items()}
    # Exact in both precisions, or the same in both: only halves and zeros are compared with float32 columns.
    if ".1" in text or "1e-3" in text:
        listed["sr_2"] = [0.0, 0.2, 0.5, 1.0]
        listed["tr_8"] = [0.0, 0.7, 0.1, 0.3]
    for i, passes in enumerate(condition(COLUMNS).tolist()):
        assert passes == eval(text, {name: values[i] for name, values in listed.items()})


def test_a_number_is_compared_in_the_precision_of_its_column():
    assert parse_filter("sr_2 > 0.2")(COLUMNS).tolist() == [False, False, True, True]
    assert parse_filter("sr_2 == 0.2")(COLUMNS).tolist() == [False, True, False, False]
    assert parse_filter("top_2_gram <= 0.3")(COLUMNS).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("text", "expected", "found", "position"),
    [
        ("", "a metric", "its end", 1),
        ("sr_2", "<, <=, >, >=, == or !=", "its end", 5),
        ("sr_2 >", "a number", "its end", 7),
        ("sr_2 = 0.2", "<, <=, >, >=, == or !=", "'='", 6),
        ("sr_2 > 0.2.1", "a number", "'0.2.1'", 8),
        ("sr_2 > 0x10", "a number", "'0x10'", 8),
        ("sr_2 > tr_8", "a number", "'tr_8'", 8),
        ("sr_2 > nan", "a number", "'nan'", 8),
        ("0.1 < sr_2 < 0.2", "a metric", "'0.1'", 1),
        ("sr_2 > 0.2 tr_8 < 1", "'and' or 'or'", "'tr_8'", 12),
        ("sr_2 > 0.2 and", "a metric", "its end", 15),
        ("and sr_2 > 0.2", "<, <=, >, >=, == or !=", "'sr_2'", 5),
        ("(sr_2 > 0.2", "')'", "its end", 12),
        ("sr_2 > 0.2)", "'and' or 'or'", "')'", 11),
        ("__import__('os').system('x')", "<, <=, >, >=, == or !=", "'('", 11),
    ],
)
def test_what_is_no_condition(text, expected, found, position):
    with pytest.raises(InvalidInput) as error:
        parse_filter(text)
    assert f"filter {text!r}: expected {expected} at position {position}, found {found};" in str(error.value)


def test_conditions_of_any_length():
    assert parse_filter(" and ".join(["sr_2 < 0.5"] * 10_000))(COLUMNS).tolist() == [True, True, False, False]


def test_brackets_of_any_depth_end_in_one_error():
    with pytest.raises(InvalidInput, match="nested too deeply"):
        parse_filter("(" * 100_000)
