"""The shipped CUDA kernels, compiled by g++ and run on the CPU (see emulation/cuda.h), against the definitions.

No GPU is needed; what such a run can't show is said in that header. Each kernel runs with its threads in several
orders, and once more under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from daemon_fast import reference

HERE = Path(__file__).parent
SANITIZED = "EMULATION_SANITIZED" in os.environ
# First warp ahead, last warp ahead, two shuffles of all threads. Values are compared in all of them; which memory a
# kernel touches, which is what sanitizers see, does not depend on the order.
ORDERS = [3] if SANITIZED else [0, 1, 2, 3]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    out = tmp_path_factory.mktemp("emulation") / "emulation.so"
    command = [compiler, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-shared", "-fPIC", *(SANITIZERS if SANITIZED else [])]
    command += ["-I", str(HERE.parent / "csrc"), "-I", str(HERE / "emulation"), "-o", str(out)]
    subprocess.run([*command, str(HERE / "emulation/kernels.cpp")], check=True)
    return ctypes.CDLL(str(out))


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
def test_all_of_these_under_sanitizers():
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    find = ["g++", "-print-file-name=libasan.so"]
    runtime = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    env = {**os.environ, "EMULATION_SANITIZED": "1", "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


def pointer(array):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def call(library, name, *arguments):
    kinds = {int: ctypes.c_int64, float: ctypes.c_double, np.ndarray: pointer, type(None): pointer}
    getattr(library, name)(*(kinds.get(type(a), lambda a: a)(a) for a in arguments))


def small(value):
    return ctypes.c_int(value)


# ---- repetition -------------------------------------------------------------------------------------------------


def repetition(library, tokens, lengths, ngrams, windows, *, threads=32, scratch=0, order=0):
    out = np.full((len(lengths), len(ngrams) + len(windows)), -1, dtype=np.float32)
    n, w = np.asarray(ngrams, dtype=np.int32), np.asarray(windows, dtype=np.int32)
    call(
        library, "emulate_repetition", tokens, small(tokens.itemsize),
        tokens.strides[0] // tokens.itemsize, lengths, small(int(lengths.dtype == np.int64)), *tokens.shape,
        n, small(len(n)), w, small(len(w)), small(threads), small(scratch), small(order), out,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [32, 128])
@pytest.mark.parametrize("alphabet", [1, 2, 10, 10**9])
def test_repetition(library, alphabet, threads, order):
    rng = np.random.default_rng(alphabet + order)
    for T, dtype in ((1, np.int32), (2, np.int64), (31, np.int32), (32, np.int64), (33, np.int64), (65, np.int32),
                     (150, np.int64), (300, np.int32)):  # fmt: skip
        tokens = rng.integers(-alphabet, alphabet, size=(5, T)).astype(dtype)
        lengths = np.array([T, 0, 1, T // 2, max(T - 1, 0)], dtype=np.int32)
        ngrams, windows = [1, 2, 3, 4, T + 1], [1, 8, 16, 32, T]
        got = repetition(library, tokens, lengths, ngrams, windows, threads=threads, order=order)
        want = reference.repetition(tokens.tolist(), lengths.tolist(), ngrams, windows)
        np.testing.assert_array_equal(got, np.array(want, dtype=np.float32))


@pytest.mark.parametrize("order", ORDERS[:3])
def test_repetition_of_long_rows_in_global_memory(library, order):
    tokens = np.random.default_rng(0).zipf(1.3, size=(5, 1100)) % 200
    lengths = np.array([1100, 700, 3, 0, 1099])
    got = repetition(library, tokens, lengths, [2, 3, 4], [8, 32], threads=128, scratch=1, order=order)
    want = reference.repetition(tokens.tolist(), lengths.tolist(), [2, 3, 4], [8, 32])
    np.testing.assert_array_equal(got, np.array(want, dtype=np.float32))


def test_repetition_of_strided_rows_and_bad_lengths(library):
    wide = np.random.default_rng(0).integers(0, 5, size=(4, 50))
    tokens = wide[:, :40]
    lengths = np.array([40, 41, -1, 7])
    got = repetition(library, tokens, lengths, [2], [8])
    want = reference.repetition(tokens[[0, 3]].tolist(), [40, 7], [2], [8])
    np.testing.assert_array_equal(got[[0, 3]], np.array(want, dtype=np.float32))
    assert np.isnan(got[[1, 2]]).all()


# ---- token_logprobs ---------------------------------------------------------------------------------------------


def bfloat16(values):
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def token_logprobs(library, logits, ids, temperature, *, order=0):
    kind = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}[logits.dtype]
    log_p, log_q = np.full((2, len(logits)), 7, dtype=np.float32)
    call(
        library, "emulate_token_logprobs", logits, small(kind), logits.strides[0] // logits.itemsize,
        np.asarray(ids, dtype=np.int64), *logits.shape, float(temperature), small(order), log_p, log_q,
    )  # fmt: skip
    return log_p, log_q


@pytest.mark.parametrize("order", ORDERS[:3])
@pytest.mark.parametrize("temperature", [1.0, 0.97, 3.0])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_token_logprobs(library, kind, temperature, order):
    rng = np.random.default_rng(order)
    for V in (1, 2, 7, 8, 9, 63, 64, 511, 2100):
        wide = (rng.standard_normal((4, V + 3)) * 5).astype(np.float32)  # rows start anywhere between boundaries
        wide[1, : V // 2] = -np.inf
        stored = bfloat16(wide) if kind == "bfloat16" else wide.astype(kind)
        exact = widened(stored) if kind == "bfloat16" else stored
        ids = [0, V - 1, V // 2, V // 3]
        for offset in (0, 3):
            got = token_logprobs(library, stored[:, offset : offset + V], ids, temperature, order=order)
            values = exact[:, offset : offset + V].astype(np.float64)
            log_p = values[range(4), ids] - np.log(np.exp(values - values.max(1, keepdims=True)).sum(1)) - values.max(1)
            cold = values / temperature
            log_q = cold[range(4), ids] - np.log(np.exp(cold - cold.max(1, keepdims=True)).sum(1)) - cold.max(1)
            np.testing.assert_allclose(got[0], log_p, rtol=1e-6, atol=2e-6)
            np.testing.assert_allclose(got[1], log_q, rtol=1e-6, atol=2e-6)


def test_token_logprobs_that_are_not_defined(library):
    logits = np.random.default_rng(0).standard_normal((7, 600)).astype(np.float32)
    logits[1] = -np.inf
    logits[2, 555] = np.nan
    logits[3, :] = -np.inf
    logits[3, 100] = np.nan
    logits[3, 300] = 0  # far from the NaN, which its thread sees among nothing but -inf
    ids = [5, 5, 5, 5, -1, 600, 5]
    for temperature in (1.0, 0.9):
        for out in token_logprobs(library, logits, ids, temperature):
            assert np.isnan(out).tolist() == [False, True, True, True, True, True, False]


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_token_logprobs_at_the_ends_of_the_range(library, temperature):
    logits = np.full((3, 300), np.finfo(np.float32).min, dtype=np.float32)  # what masks write
    logits[1, 77] = 3e38
    logits[2, 5::50] = 12.5
    log_p, log_q = token_logprobs(library, logits, [299, 77, 55], temperature)
    for got in (log_p, log_q):
        np.testing.assert_allclose(got, [-math.log(300), 0, -math.log(6)], rtol=1e-6)


def token_logprobs_backward(library, grad_log_p, grad_log_q, logits, ids, temperature, *, order=0):
    kind = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}[logits.dtype]
    grad = np.full(logits.shape, 7, dtype=logits.dtype)
    call(
        library, "emulate_token_logprobs_backward", np.asarray(grad_log_p, dtype=np.float32),
        np.asarray(grad_log_q, dtype=np.float32), logits, small(kind), logits.strides[0] // logits.itemsize,
        np.asarray(ids, dtype=np.int64), *logits.shape, float(temperature), small(order), grad,
    )  # fmt: skip
    return grad


@pytest.mark.parametrize("order", ORDERS[:3])
@pytest.mark.parametrize("temperature", [1.0, 0.97, 3.0])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_token_logprobs_backward(library, kind, temperature, order):
    rng = np.random.default_rng(order)
    grad_log_p, grad_log_q = np.array([1.5, 0, -0.7, 0], dtype=np.float32), np.array([0.3, -2, 0, 0], dtype=np.float32)
    for V in (1, 2, 7, 8, 9, 63, 64, 511, 2100):
        wide = (rng.standard_normal((4, V + 3)) * 5).astype(np.float32)
        wide[1, : V // 2] = -np.inf
        stored = bfloat16(wide) if kind == "bfloat16" else wide.astype(kind)
        ids = [0, V - 1, V // 2, V // 3]
        for offset in (0, 3):
            logits = stored[:, offset : offset + V]
            grad = token_logprobs_backward(library, grad_log_p, grad_log_q, logits, ids, temperature, order=order)
            exact, got = (widened(x) if kind == "bfloat16" else x.astype(np.float32) for x in (logits, grad))
            want = reference.token_logprobs_backward(grad_log_p, grad_log_q, exact.astype(np.float64), ids, temperature)
            rounding = {"float32": 2e-6, "float16": 2**-11, "bfloat16": 2**-8}[kind]
            np.testing.assert_allclose(got, np.array(want), rtol=rounding, atol=2e-6)


def test_token_logprobs_backward_that_is_not_defined(library):
    logits = np.random.default_rng(0).standard_normal((7, 600)).astype(np.float32)
    logits[1] = -np.inf
    logits[2, 555] = np.nan
    logits[6, :3] = -np.inf
    ids, none, one = [5, 5, 5, 600, -1, 5, 5], [0] * 7, [1, 1, 1, 1, 0, 0, 1]
    for temperature in (1.0, 0.9):
        for grads in ((one, none), (none, one)):
            grad = token_logprobs_backward(library, *grads, logits, ids, temperature)
            assert np.isnan(grad).all(1).tolist() == [False, True, True, True, False, False, False]
            assert np.isfinite(grad[[0, 4, 5, 6]]).all()


def sample_tokens(library, logits, uniforms, temperature, *, order=0):
    kind = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}[logits.dtype]
    ids = np.full(len(logits), 7, dtype=np.int64)
    log_p, log_q = np.full((2, len(logits)), 7, dtype=np.float32)
    call(
        library, "emulate_sample_tokens", logits, small(kind), logits.strides[0] // logits.itemsize,
        np.asarray(uniforms, dtype=np.float64), *logits.shape, float(temperature), small(order), ids, log_p, log_q,
    )  # fmt: skip
    return ids, log_p, log_q


@pytest.mark.parametrize("order", ORDERS[:3])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_sample_tokens(library, kind, temperature, order):
    rng = np.random.default_rng(order)
    for V in (1, 2, 7, 255, 1024, 2051, 34_000 if order == 0 else 3071):
        wide = (rng.standard_normal((6, V + 3)) * 3).astype(np.float32)
        wide[1, : V // 2] = -np.inf
        wide[2, V // 2 + 1 :] = -np.inf
        stored = bfloat16(wide) if kind == "bfloat16" else wide.astype(kind)
        exact = (widened(stored) if kind == "bfloat16" else stored)[:, :V].astype(np.float64)
        uniforms = np.array([0.0, 0.0, 1 - 2**-53, *rng.random(3)])
        ids, log_p, log_q = sample_tokens(library, stored[:, :V], uniforms, temperature, order=order)
        want = np.array(reference.sample_tokens(exact.tolist(), uniforms.tolist(), temperature))
        cold = exact / temperature
        p = np.exp(cold - cold.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        edge = np.take_along_axis(p.cumsum(1), np.minimum(ids, want)[:, None], 1)[:, 0]
        assert ((ids == want) | (np.abs(edge - uniforms) < 1e-6)).all()
        assert (exact[range(6), ids] > -np.inf).all()
        got = token_logprobs(library, stored[:, :V], ids, temperature)
        np.testing.assert_allclose((log_p, log_q), got, rtol=1e-6, atol=1e-6)


def test_sample_tokens_that_are_not_defined(library):
    logits = np.random.default_rng(0).standard_normal((6, 3000)).astype(np.float32)
    logits[1] = -np.inf
    logits[2, 2555] = np.nan
    logits[3, 7] = np.inf
    ids, log_p, log_q = sample_tokens(library, logits, [0.5, 0.5, 0.5, 0.5, 1.0, -0.1], 0.9)
    assert (ids[1:] == -1).all()
    assert ids[0] >= 0
    assert np.isnan(log_p).tolist() == np.isnan(log_q).tolist() == [False, *[True] * 5]


# ---- weights and draws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scratch", [0, 1])
@pytest.mark.parametrize(("M", "threads"), [(1, 32), (25, 32), (33, 32), (127, 128), (300, 128)])
def test_importance_weights(library, M, threads, scratch, order):
    rng = np.random.default_rng(M)
    log_w = rng.standard_normal((6, M)) * 3
    log_w[1] += 1e4
    log_w[2] -= 1e4
    log_w[3, :-1] = -np.inf
    log_w[4] = -np.inf
    log_w[5, M // 2] = np.nan
    weights, log_mean, ess = np.full((6, M), -1.0), np.full(6, -1.0), np.full(6, -1.0)
    call(
        library, "emulate_importance_weights", log_w, 6, M, small(threads), small(scratch), small(order),
        weights, log_mean, ess,
    )  # fmt: skip
    want = reference.importance_weights(log_w[:4].tolist())
    for got, expected in zip((weights, log_mean, ess), want, strict=True):
        np.testing.assert_allclose(got[:4], expected, rtol=1e-12)
        assert np.isnan(got[4:]).all()


@pytest.mark.parametrize("rule", ["sir_select", "race_select"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("scratch", "base_given"), [(0, False), (0, True), (1, True)])
@pytest.mark.parametrize(("M", "threads"), [(1, 0), (25, 0), (32, 0), (25, 32), (64, 32), (70, 128), (260, 128)])
def test_selection(library, M, threads, scratch, base_given, order, rule):
    rng = np.random.default_rng(M)
    G, K, S = 5, 9, 3
    features = rng.standard_normal((G, M, K)).astype(np.float32)
    mu = rng.standard_normal(K)
    base = rng.standard_normal((G, M)).astype(np.float32) if base_given else None
    if base_given and M > 1:
        base[1, ::2] = -np.inf
    uniforms = rng.random((G, S) if rule == "sir_select" else (G, S, M))
    uniforms[:, 0].T[:] = [0, 1 - 2**-53, 0.5, 1 - 2**-53, 0]
    index, weights = np.full((G, S), -9), np.full((G, M), -1, dtype=np.float32)
    log_z, ess = np.full((2, G), -1, dtype=np.float32)
    call(
        library, f"emulate_{rule}", features, mu, base, uniforms, G, M, K, S, small(threads), small(scratch),
        small(order), index, weights, log_z, ess,
    )  # fmt: skip
    rows = None if base is None else base.tolist()
    for s in range(S):
        want = getattr(reference, rule)(features.tolist(), mu.tolist(), uniforms[:, s].tolist(), rows)
        assert index[:, s].tolist() == want[0]
    np.testing.assert_allclose(weights, want[1], rtol=1e-6)
    np.testing.assert_allclose(log_z, want[2], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(ess, want[3], rtol=1e-6)


@pytest.mark.parametrize("threads", [0, 32, 128])
def test_uniforms_hit_the_edges_of_the_cumulative_weights(library, threads):
    base = np.tile(np.float32([-np.inf, 0, -np.inf, 0]), (6, 1))
    uniforms = np.array([0.0, 0.25, 0.5 - 2**-53, 0.5, 0.75, 1 - 2**-53])
    index, weights = np.full(6, -9), np.zeros((6, 4), dtype=np.float32)
    log_z, ess = np.zeros((2, 6), dtype=np.float32)
    call(
        library, "emulate_sir_select", np.zeros((6, 4, 1), dtype=np.float32), np.zeros(1), base, uniforms, 6, 4, 1, 1,
        small(threads), small(0), small(0), index, weights, log_z, ess,
    )  # fmt: skip
    assert index.tolist() == [1, 1, 1, 3, 3, 3]


@pytest.mark.parametrize("threads", [0, 32])
@pytest.mark.parametrize("rule", ["sir_select", "race_select"])
def test_a_selection_marks_what_it_cannot_draw(library, rule, threads):
    features = np.zeros((5, 4, 1), dtype=np.float32)
    features[1, 2] = np.nan
    base = np.zeros((5, 4), dtype=np.float32)
    base[2] = -np.inf
    uniforms = np.array([0.3, 0.3, 0.3, 1.0, np.nan])
    if rule == "race_select":
        uniforms = np.where(np.arange(4) == 3, uniforms[:, None], [[0.9, 0.1, 0.9, 0]])
    index, weights = np.full(5, -9), np.full((5, 4), -1, dtype=np.float32)
    log_z, ess = np.full((2, 5), -1, dtype=np.float32)
    call(
        library, f"emulate_{rule}", features, np.ones(1), base, uniforms, 5, 4, 1, 1, small(threads), small(0),
        small(0), index, weights, log_z, ess,
    )  # fmt: skip
    assert index.tolist() == [1, -1, -1, -1, -1]
    for out in (weights[:, 0], log_z, ess):
        assert np.isnan(out).tolist() == [False, True, True, False, False]


# ---- tilted_moments ---------------------------------------------------------------------------------------------


def tilted_moments(library, features, mu, base, normalization, *, warps=0, blocks=0, order=0):
    k = features.shape[2]
    log_z, mean, covariance = np.full(1, -1.0), np.full(k, -1.0), np.full((k, k), -1.0)
    call(
        library, "emulate_tilted_moments", features, mu, base, *features.shape,
        small(int(normalization == "per_prefix")), small(warps), blocks, small(order), log_z, mean, covariance,
    )  # fmt: skip
    return log_z, mean, covariance


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("normalization", ["per_prefix", "global"])
@pytest.mark.parametrize(
    ("N", "M", "K", "warps", "blocks"),
    [(1, 1, 1, 0, 0), (3, 4, 0, 0, 0), (7, 25, 9, 0, 0), (3, 70, 2, 2, 2), (5, 32, 33, 1, 2), (9, 33, 1, 3, 1)],
)
def test_tilted_moments(library, N, M, K, warps, blocks, normalization, order):
    rng = np.random.default_rng(N * M)
    features = (rng.standard_normal((N, M, K)) + 1000 * (K == 2)).astype(np.float32)
    mu = rng.standard_normal(K) * 0.5
    for base in (None, rng.standard_normal((N, M)) * 50):
        if base is not None and M > 1:
            base[:, ::3] = -np.inf
        got = tilted_moments(library, features, mu, base, normalization, warps=warps, blocks=blocks, order=order)
        rows = None if base is None else base.tolist()
        want = reference.tilted_moments(features.tolist(), mu.tolist(), rows, normalization)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got[2], np.array(want[2]).reshape(K, K), rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(got[2], got[2].T)


@pytest.mark.parametrize("normalization", ["per_prefix", "global"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tilted_moments_that_are_not_defined(library, bad, normalization):
    features = np.random.default_rng(0).standard_normal((40, 33, 2)).astype(np.float32)
    base = np.zeros((40, 33))
    base[17] = bad if bad < 0 else 0
    base[17, 32] = bad
    results = tilted_moments(library, features, np.ones(2), base, normalization)
    defined = bad < 0 and normalization == "global"  # one prefix without weight is no loss to global weights
    assert all(np.isfinite(out).all() == defined and np.isnan(out).all() != defined for out in results)
    base[:] = -np.inf
    assert all(np.isnan(out).all() for out in tilted_moments(library, features, np.ones(2), base, normalization))
