"""The shipped CUDA device code, compiled by g++ and run on CPU threads (see emulation/cuda.h), against the
definitions. No GPU is needed; what such a run can't show is said in that header."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from daemon_fast import reference

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    out = tmp_path_factory.mktemp("emulation") / "emulation.so"
    command = [compiler, "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    command += ["-I", str(HERE.parent / "csrc"), "-I", str(HERE / "emulation"), "-o", str(out)]
    subprocess.run([*command, str(HERE / "emulation/repetition.cpp")], check=True)
    return ctypes.CDLL(str(out))


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def emulate(library, tokens, lengths, ngrams, windows, *, index_bytes, threads):
    out = np.full((len(lengths), len(ngrams) + len(windows)), np.nan, dtype=np.float32)
    tokens, lengths = np.ascontiguousarray(tokens), np.asarray(lengths, dtype=np.int64)
    n, w = np.asarray(ngrams, dtype=np.int32), np.asarray(windows, dtype=np.int32)
    library.emulate_repetition(
        pointer(tokens), ctypes.c_int(tokens.itemsize), ctypes.c_int(index_bytes), pointer(lengths),
        ctypes.c_int64(tokens.shape[0]), ctypes.c_int64(tokens.shape[1]), pointer(n), ctypes.c_int(len(n)),
        pointer(w), ctypes.c_int(len(w)), ctypes.c_uint(threads), pointer(out),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("threads", [1, 7])
@pytest.mark.parametrize("index_bytes", [2, 4])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("alphabet", [1, 2, 10, 10**9])
def test_repetition_device_code(library, alphabet, dtype, index_bytes, threads):
    rng = np.random.default_rng(alphabet)
    for T in (1, 2, 3, 5, 16, 31, 64, 257):
        tokens = rng.integers(-alphabet, alphabet, size=(5, T)).astype(dtype)
        lengths = [T, 0, 1, T // 2, max(T - 1, 0)]
        ngrams, windows = [1, 2, 3, 4, T + 1], [1, 8, 16, T]
        got = emulate(library, tokens, lengths, ngrams, windows, index_bytes=index_bytes, threads=threads)
        want = reference.repetition(tokens.tolist(), lengths, ngrams, windows)
        np.testing.assert_array_equal(got, np.array(want, dtype=np.float32))
