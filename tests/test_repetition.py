"""repetition against the plain-Python definitions: exact equality."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import daemon_fast
from daemon_fast import reference

AWKWARD_T = [0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 66, 127, 128, 129, 255, 256, 257, 513]
HASH_MULTIPLIER = 0x9E3779B97F4A7C15
HASH_INVERSE = pow(HASH_MULTIPLIER, -1, 2**64)


def as_int64(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# Ids that a wrong kernel would confuse: extremes, equal low words, and one and the same hash slot.
POOLS = {
    "one": [7],
    "two": [0, 1],
    "few": list(range(5)),
    "int32 extremes": [0, -1, 2**31 - 1, -(2**31), 2**31 - 2, 1],
    "zipf-like": [int(1000 / (i + 1)) for i in range(1000)],
    "distinct": list(range(100_000, 101_000)),
}
WIDE_POOLS = {
    "equal low words": [5, 5 + 2**32, 5 - 2**32, 5 + 2**40, 5 + 2**62],
    "int64 extremes": [0, -1, 2**63 - 1, -(2**63), 2**31, -(2**31) - 1],
    "one hash slot": [as_int64(HASH_INVERSE * i % 2**64) for i in range(40)],
}


def expected(tokens, lengths, ngrams, windows):
    values = reference.repetition(tokens.tolist(), lengths.tolist(), ngrams, windows)
    return np.array(values, dtype=np.float32).reshape(len(lengths), len(ngrams) + len(windows))


def layouts(tokens: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values behind other strides."""
    if kind == "columns":
        wide = torch.full((tokens.shape[0], 2 * tokens.shape[1]), 99, dtype=tokens.dtype)
        wide[:, ::2] = tokens
        return wide[:, ::2]
    if kind == "rows":
        tall = torch.full((3 * tokens.shape[0], tokens.shape[1] + 5), 99, dtype=tokens.dtype)
        tall[::3, 2 : 2 + tokens.shape[1]] = tokens
        return tall[::3, 2 : 2 + tokens.shape[1]]
    if kind == "transposed":
        return tokens.t().contiguous().t()
    return tokens


@st.composite
def calls(draw):
    rows, T = draw(st.integers(0, 6)), draw(st.sampled_from(AWKWARD_T))
    wide = draw(st.booleans())
    pool = draw(st.sampled_from([*POOLS.values(), *(WIDE_POOLS.values() if wide else [])]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = torch.from_numpy(rng.choice(np.array(pool, dtype=np.int64), size=(rows, T)))
    edges = [0, 1, 2, 3, 4, T - 1, T]
    lengths = [draw(st.sampled_from([e for e in edges if 0 <= e <= T]) | st.integers(0, T)) for _ in range(rows)]
    ngrams = draw(st.lists(st.integers(1, 9) | st.sampled_from([T, T + 1, 2**40]).filter(bool), max_size=5))
    windows = draw(st.lists(st.integers(1, 40) | st.sampled_from([T, 65_535, 65_536, 2**40]).filter(bool), max_size=5))
    kind = draw(st.sampled_from(["plain", "columns", "rows", "transposed"]))
    length_type = draw(st.sampled_from([torch.int32, torch.int64]))
    tokens = tokens if wide else tokens.to(torch.int32)
    return layouts(tokens, kind), torch.tensor(lengths, dtype=length_type), ngrams, windows


@given(calls())
@example((torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), [1, 2], [1]))
@example((torch.zeros(2, 4, dtype=torch.int64), torch.tensor([4, 4]), [], []))
@settings(max_examples=400)
def test_equals_the_definition(call):
    tokens, lengths, ngrams, windows = call
    out = daemon_fast.repetition(tokens, lengths, ngrams, windows)
    assert out.dtype == torch.float32
    np.testing.assert_array_equal(out.numpy(), expected(tokens, lengths, ngrams, windows))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
def test_every_size_on_every_device(device, pool, dtype):
    ngrams, windows = [1, 2, 3, 4, 7], [1, 8, 16, 32, 100]
    for T in AWKWARD_T:
        tokens = torch.from_numpy(np.random.default_rng(T).choice(np.array(pool), size=(4, T))).to(dtype)
        lengths = torch.tensor([T, T // 2, max(T - 1, 0), min(T, 3)])
        out = daemon_fast.repetition(tokens.to(device), lengths.to(device), ngrams, windows)
        np.testing.assert_array_equal(out.cpu().numpy(), expected(tokens, lengths, ngrams, windows))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 5, 20, 40]))
@settings(max_examples=30)
def test_padding_never_counts(seed, length):
    rng = np.random.default_rng(seed)
    row = torch.from_numpy(rng.integers(0, 4, size=(1, 40)))
    other = row.clone()
    other[:, length:] = torch.from_numpy(rng.integers(-(2**62), 2**62, size=(1, 40 - length)))
    lengths = torch.tensor([length])
    assert torch.equal(daemon_fast.repetition(row, lengths), daemon_fast.repetition(other, lengths))


@pytest.mark.parametrize("T", [2048, 8192, 20_000, 65_534, 65_535, 65_536, 70_000])
def test_long_rows(device, T):
    rng = np.random.default_rng(T)
    tokens = torch.from_numpy(rng.zipf(1.3, size=(1, T)) % 5000)
    lengths = torch.tensor([T])
    out = daemon_fast.repetition(tokens.to(device), lengths.to(device), [2, 3, 4], [8, 32])
    np.testing.assert_array_equal(out.cpu().numpy(), expected(tokens, lengths, [2, 3, 4], [8, 32]))


def test_windows_wider_than_16_bits(device):
    tokens = torch.arange(70_000, device=device)
    tokens[-1] = 0  # repeats the first token, 69,999 back
    out = daemon_fast.repetition(tokens[None], ngrams=[], windows=[65_535, 65_536, 69_998, 69_999])
    np.testing.assert_array_equal(out[0].cpu().numpy(), np.float32([0, 0, 0, 1 / 70_000]))


def test_all_tokens_of_one_hash_slot(device):
    tokens = torch.tensor([as_int64(HASH_INVERSE * i % 2**64) for i in range(300)] * 2)[None]
    out = daemon_fast.repetition(tokens.to(device), ngrams=[1, 2, 3], windows=[300, 299])
    np.testing.assert_array_equal(out.cpu().numpy(), expected(tokens, torch.tensor([600]), [1, 2, 3], [300, 299]))


@pytest.mark.parametrize("count", [2, 3])
def test_same_result_for_any_number_of_threads(threads, count):
    tokens = torch.from_numpy(np.random.default_rng(0).zipf(1.2, size=(500, 100)) % 1000)
    threads(1)
    one = daemon_fast.repetition(tokens)
    threads(count)
    assert torch.equal(daemon_fast.repetition(tokens), one)


def test_defaults_are_full_rows_and_the_papers_metrics():
    tokens = torch.randint(0, 20, (3, 50))
    full = torch.full((3,), 50)
    assert torch.equal(daemon_fast.repetition(tokens), daemon_fast.repetition(tokens, full, [2, 3, 4], [8, 16, 32]))


def test_opcheck(device):
    tokens = torch.randint(0, 9, (3, 20), device=device)
    lengths = torch.tensor([20, 0, 7], device=device)
    torch.library.opcheck(torch.ops.daemon_fast.repetition.default, (tokens, lengths, [2, 3], [8]))
    torch.library.opcheck(torch.ops.daemon_fast.repetition.default, (tokens.int(), lengths.int(), [], []))


@pytest.mark.parametrize("place", ["cpu", "meta"])  # on meta it is the fake kernel that says so
@pytest.mark.parametrize(
    ("tokens", "lengths", "ngrams", "windows", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), [2], [8], r"tokens must have shape \[R, T\], got \[3\]"),
        (torch.zeros(3, 4), torch.zeros(3).long(), [2], [8], "tokens must be int32 or int64, got float32"),
        (torch.zeros(3, 4).long(), torch.zeros(3, 1).long(), [2], [8], r"lengths must have shape \[R\], got \[3, 1\]"),
        (torch.zeros(3, 4).long(), torch.zeros(3), [2], [8], "lengths must be int32 or int64, got float32"),
        (torch.zeros(3, 4).long(), torch.zeros(2).long(), [2], [8], r"tokens.shape\[0\] = 3 .* got shape \[2\]"),
    ],
)
def test_a_wrong_shape_or_dtype_is_named(tokens, lengths, ngrams, windows, message, place):
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.repetition(tokens.to(place), lengths.to(place), ngrams, windows)


@pytest.mark.parametrize(
    ("tokens", "lengths", "ngrams", "windows", "message"),
    [
        (torch.zeros(3, 4).long(), torch.tensor([4, 5, 4]), [2], [8], r"lengths\[1\] = 5 exceeds tokens.* = 4"),
        (torch.zeros(3, 4).long(), torch.tensor([4, 4, -1]).int(), [2], [8], r"lengths\[2\] = -1 is negative"),
        (torch.zeros(3, 4).long(), torch.zeros(3).long(), [2, 0], [8], r"ngrams\[1\] = 0 is below the minimum 1"),
        (torch.zeros(3, 4).long(), torch.zeros(3).long(), [2], [-3], r"windows\[0\] = -3 is below the minimum 1"),
    ],
)
def test_bad_input_is_named(tokens, lengths, ngrams, windows, message):
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.repetition(tokens, lengths, ngrams, windows)
