"""A batch of continuations: shapes, sums, texts, joining."""

from __future__ import annotations

import pytest
import torch

from daemon_fast import Candidates
from daemon_fast.errors import InvalidInput


def candidates(rows=6, width=4, prefixes=3, **changes):
    given = {
        "tokens": torch.arange(rows * width).reshape(rows, width),
        "lengths": torch.tensor([0, 1, 2, 3, 4, 4][:rows]),
        "token_log_p": -torch.ones(rows, width),
        "token_log_q": -2 * torch.ones(rows, width),
        "prefix_tokens": [[7]] * prefixes,
        "detokenize": lambda rows: [" ".join(map(str, row)) for row in rows],
    }
    return Candidates(**{**given, **changes})


def test_only_what_counts_is_text():
    c = candidates()
    assert c.shape == (3, 2)
    assert c.texts == ["", " 4", " 8 9", " 12 13 14", " 16 17 18 19", " 20 21 22 23"]
    assert c.prefix_texts == ["7"] * 3
    assert torch.equal(c.log_p, torch.full((3, 2), -4.0, dtype=torch.float64))
    assert torch.equal(c.log_q, 2 * c.log_p)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefixes": 4}, "tokens has 6 rows, which is no multiple of the 4 prefixes"),
        ({"prefixes": 0}, "no multiple of the 0 prefixes"),
        ({"token_log_p": torch.zeros(6, 3)}, r"token_log_p has shape \[6, 3\], tokens has \[6, 4\]"),
        ({"token_log_q": torch.zeros(5, 4)}, r"token_log_q has shape \[5, 4\], tokens has \[6, 4\]"),
        ({"lengths": torch.zeros(5, dtype=torch.int64)}, r"lengths has shape \[5\], expected \[6\]"),
    ],
)
def test_shapes_that_do_not_go_together_are_named(changes, message):
    with pytest.raises(InvalidInput, match=message):
        candidates(**changes)


def test_an_engine_that_tells_no_log_q_is_told_so():
    with pytest.raises(InvalidInput, match="gives no log-probabilities under the proposal"):
        _ = candidates(token_log_q=torch.full((6, 4), torch.nan)).log_q


def test_parts_of_different_widths_are_joined():
    joined = Candidates.concatenate([candidates(), candidates(rows=2, width=6, prefixes=1)])
    assert joined.shape == (4, 2)
    assert joined.tokens.shape == (8, 6)
    assert joined.texts == [*candidates().texts, "", " 6"]
    with pytest.raises(InvalidInput, match="no candidates to concatenate"):
        Candidates.concatenate([])
