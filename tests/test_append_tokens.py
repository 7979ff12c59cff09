"""append_tokens against the definition, which keeps a list for each row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon_fast import ops, reference

T, R = 7, 5


def buffers(rows=R, device="cpu"):
    return (
        torch.zeros(T, rows, dtype=torch.int64, device=device), torch.zeros(T, rows, device=device),
        torch.zeros(T, rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device),
        torch.ones(rows, dtype=torch.bool, device=device),
    )  # fmt: skip


def step(rows, slot, eos=(0,), count_eos=True, device="cpu", ids=None):
    """What a step appends: ids i at rows given, log-probabilities that tell rows and slots apart."""
    rows = torch.as_tensor(rows)
    ids = torch.arange(len(rows)) + 1 if ids is None else torch.as_tensor(ids)
    given = {
        "ids": ids, "ids_log_p": -rows - 0.01 * slot - 1.0, "ids_log_q": -rows - 0.01 * slot - 2.0,
        "slot": torch.tensor([slot]), "rows": rows, "eos": torch.tensor(eos, dtype=torch.int64),
    }  # fmt: skip
    return {name: x.to(device) for name, x in given.items()} | {"count_eos": count_eos}


def check(seed, rows, eos, count_eos, device):
    """T steps of all rows in any order against lists; rows that have ended may be left out."""
    rng = np.random.default_rng(seed)
    made, lists = buffers(rows, device), [[] for _ in range(rows)]
    for slot in range(T):
        ids = rng.integers(0, 6, rows)
        one = step(np.arange(rows), slot, eos, count_eos, ids=ids)
        reference.append_tokens(lists, ids.tolist(), one["ids_log_p"].tolist(), one["ids_log_q"].tolist(), eos)
        order = rng.permutation(rows)
        ended = [any(i in eos for i, _, _ in lists[r][:-1]) for r in order]
        order = order[~(np.array(ended, dtype=bool) & (rng.random(rows) < 0.5))]
        ops.append_tokens(*made, **step(order, slot, eos, count_eos, device, ids=ids[order]))
    tokens, log_p, log_q, lengths, running = (x.cpu() for x in made)
    for r, drawn in enumerate(lists):
        for got, want in zip((tokens, log_p, log_q), zip(*drawn, strict=True), strict=True):
            assert torch.equal(got[: len(drawn), r], torch.tensor(want, dtype=got.dtype))
            assert (got[len(drawn) :, r] == 0).all()
        ended = drawn[-1][0] in eos
        assert int(lengths[r]) == len(drawn) - (ended and not count_eos)
        assert bool(running[r]) == (not ended)


@given(st.integers(0, 10**6), st.integers(1, 9), st.lists(st.integers(0, 5), max_size=3), st.booleans())
@settings(max_examples=100)
def test_equals_the_definition(seed, rows, eos, count_eos):
    check(seed, rows, eos, count_eos, "cpu")


@pytest.mark.parametrize("count_eos", [False, True])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 1000])
def test_every_size_on_every_device(device, rows, count_eos):
    check(rows, rows, [0, 3], count_eos, device)
    check(rows, rows, [], count_eos, device)


def test_an_id_that_could_not_be_drawn_ends_its_row(device):
    made = buffers(3, device)
    marked = step([0, 1, 2], 0, device=device, ids=[4, -1, 5])
    marked["ids_log_p"][1] = math.nan
    ops.append_tokens(*made, **marked)
    tokens, log_p, _, lengths, running = (x.cpu() for x in made)
    assert tokens[0].tolist() == [4, 0, 5]
    assert lengths.tolist() == [1, 0, 1]
    assert running.tolist() == [True, False, True]
    assert log_p.isnan().any(0).tolist() == [False, True, False]


def test_opcheck(device):
    given = step([2, 0], 3, device=device)
    torch.library.opcheck(torch.ops.daemon_fast.append_tokens.default, (*buffers(device=device), *given.values()))


def test_compiled_it_changes_what_it_is_given():
    made, again = buffers(), buffers()
    compiled = torch.compile(ops.append_tokens, fullgraph=True, backend="aot_eager")
    for slot in range(2):
        compiled(*made, **step([3, 1], slot))
        ops.append_tokens(*again, **step([3, 1], slot))
    assert all(torch.equal(x, y) for x, y in zip(made, again, strict=True))


SHAPES = [
    ({"tokens": torch.zeros(T, dtype=torch.int64)}, r"append_tokens: tokens must have shape \[T, R\], got \[7\]"),
    ({"tokens": torch.zeros(T, R, dtype=torch.int32)}, "tokens must be int64, got int32"),
    ({"log_p": torch.zeros(T, R + 1)}, r"log_p must have tokens.shape\[1\] = 5 at dimension 1, got shape \[7, 6\]"),
    ({"log_q": torch.zeros(T + 1, R)}, r"log_q must have tokens.shape\[0\] = 7"),
    ({"lengths": torch.zeros(4, dtype=torch.int64)}, r"lengths must have tokens.shape\[1\] = 5"),
    ({"running": torch.zeros(R)}, "running must be bool, got float32"),
    ({"ids": torch.zeros(2, dtype=torch.int32)}, "ids must be int64"),
    ({"ids_log_p": torch.zeros(3)}, r"ids_log_p must have ids.shape\[0\] = 2"),
    ({"ids_log_q": torch.zeros(2).double()}, "ids_log_q must be float32, got float64"),
    ({"slot": torch.zeros(2, dtype=torch.int64)}, "slot must have size = 1"),
    ({"rows": torch.zeros(1, dtype=torch.int64)}, r"rows must have ids.shape\[0\] = 2"),
    ({"eos": torch.zeros(1)}, "eos must be int64"),
]


def call(changed, place="cpu"):
    names = ["tokens", "log_p", "log_q", "lengths", "running"]
    given = dict(zip(names, buffers(), strict=True)) | step([2, 0], 3) | changed
    given = {name: x.to(place) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    ops.append_tokens(**given)


@pytest.mark.parametrize("place", ["cpu", "meta"])  # on meta it is the fake kernel that says so
@pytest.mark.parametrize(("changed", "message"), SHAPES)
def test_a_wrong_shape_or_dtype_is_named(changed, message, place):
    with pytest.raises(RuntimeError, match=message):
        call(changed, place)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slot": torch.tensor([7])}, "slot = 7 is outside the 7 slots of tokens"),
        ({"slot": torch.tensor([-1])}, "slot = -1 is outside"),
        ({"rows": torch.tensor([0, 5])}, r"rows\[1\] = 5 is outside the 5 rows of tokens"),
        ({"tokens": torch.zeros(R, T, dtype=torch.int64).T}, "tokens must be contiguous"),
    ],
)
def test_bad_input_is_named(changed, message):
    with pytest.raises(RuntimeError, match=message):
        call(changed)
