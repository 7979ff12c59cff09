"""The CUDA code on the CPU: host code, launches and kernels, as they are (see emulated.py and emulation/cuda.h).

What it computes is compared with the definitions in each operator's own tests. Here: every kernel that is compiled, in
several orders of its threads, at each limit of a device, under sanitizers, and every line.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys

import emulated
import kernels
import pytest
import torch

import daemon_fast
from daemon_fast.ops import _ops

F64 = torch.float64
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
RTOL = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7, F64: 1e-10}


def calls():
    """Operator and arguments: every kernel, at sizes on both sides of each choice that the launches make."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def uniforms(*shape):
        return torch.rand(*shape, generator=generator, dtype=F64)

    for token in (torch.int64, torch.int32):
        for T in (1, 33, 700, 7000, 20_000, 66_000):
            tokens = torch.randint(-20, 20, (3, T + 1), generator=generator).to(token)[:, :T]
            lengths = torch.tensor([T, T // 2, 0])
            for length in (lengths, lengths.int()):
                yield "repetition", tokens, length, [1, 2, 3, 5, T + 1], [1, 8, T]
        repeated = torch.randint(0, 2, (1, 66_000), generator=generator).to(
            token
        )  # more rounds than a table's word counts
        yield "repetition", repeated, torch.tensor([66_000]), list(range(1, 10)), [8]
        for T, alphabet in ((0, 1), (1, 1), (32, 9), (150, 1), (150, 10), (300, 10**9), (512, 300)):  # a warp a row
            tokens = torch.randint(-alphabet, alphabet, (5, T), generator=generator).to(token)
            lengths = torch.tensor([T, T // 2, 0, max(T - 1, 0), min(T, 1)])
            yield "repetition", tokens, lengths, [1, 2, 3, 4], [1, 8, 16, 32, max(T, 1)]
    for logit in FLOATS:
        for V in (1, 9, 2500):
            logits = (normal(3, V + 3) * 4).to(logit)[:, 3:]  # rows start anywhere between boundaries
            logits[1, : V // 2] = -math.inf
            for temperature in (1.0, 0.9):
                for id_type in (torch.int64, torch.int32):
                    ids = torch.tensor([0, V - 1, V // 2], dtype=id_type)
                    yield "token_logprobs", logits, ids, temperature
                    for grads in (normal(2, 3), torch.zeros(2, 3)):
                        yield "token_logprobs_backward", *grads, logits, ids, temperature
                yield "sample_tokens", logits, uniforms(3), temperature
        yield "sample_tokens", normal(3, 70_001).to(logit), uniforms(3), 0.9  # several pieces a lane
    for rows in (1, 128, 129):
        buffers = [torch.zeros(4, rows, dtype=kind) for kind in (torch.int64, torch.float32, torch.float32)]
        state = torch.zeros(rows, dtype=torch.int64), torch.arange(rows) % 3 > 0
        ids, slot, order = torch.arange(rows) % 5 - 1, torch.tensor([2]), torch.randperm(rows, generator=generator)
        for eos in (torch.tensor([3, 0]), torch.zeros(0, dtype=torch.int64)):
            yield "append_tokens", *buffers, *state, ids, normal(rows), normal(rows), slot, order, eos, rows > 1
    for M in (1, 25, 40, 65, 1024, 2789, 6125, 30_000):
        for feature in (torch.float32, F64):
            yield "importance_weights", normal(2, M).to(feature)
            features, mu = normal(2, M, 3).to(feature), torch.tensor([0.5, -1.0, 0.0], dtype=F64)
            for base in (None, normal(2, M), normal(2, M).double()):
                if base is not None and M > 1:
                    base[0, ::2] = -math.inf
                yield "sir_select", features, mu, uniforms(2, 3), base
                yield "race_select", features, mu, uniforms(2, 3, M), base
                for normalization in ("per_prefix", "global"):
                    yield (
                        "tilted_moments",
                        features[:, :2000],
                        mu,
                        None if base is None else base[:, :2000],
                        normalization,
                    )


def outputs(call):
    name, *arguments = call
    if name == "append_tokens":  # in place
        arguments = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    out = getattr(_ops, name)(*arguments)
    if out is None:
        return arguments[:5]
    return (out,) if isinstance(out, torch.Tensor) else out


def compare(call, got, want):
    for a, b in zip(got, want, strict=True):
        if call[0] in ("repetition", "append_tokens") or a.dtype == torch.int64:
            assert torch.equal(a, b), call[0]
        else:
            tolerance = max(RTOL[a.dtype], RTOL[call[1].dtype] if "logprobs" not in call[0] else 0)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=2e-6 if a.dtype != F64 else 1e-12, msg=call[0])


# First warp ahead, last warp ahead, a shuffle of all threads.
@pytest.mark.parametrize("order", [0] if emulated.SANITIZED else [0, 1, 2])
@pytest.mark.parametrize("ptx", [False] if emulated.SANITIZED else [False, True])
def test_every_kernel_gives_what_the_cpu_gives(order, ptx):
    if ptx and not emulated.has_ptx():
        pytest.skip("built without CUDA, or no cuobjdump")
    for call in calls():
        want = outputs(call)
        with emulated.operators(order=order, ptx=ptx, multiprocessors=1):  # for which 4 rows are many
            compare(call, outputs(call), want)
    assert emulated.launched() == emulated.compiled()


# ---- what the host can't see ------------------------------------------------------------------------------------


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


def undefined(out):
    """Rows of an output that are all NaN, as a list; the others must have none."""
    rows = torch.isnan(out.reshape(len(out), -1).float())
    assert torch.equal(rows.all(1), rows.any(1))
    return rows.all(1).tolist()


def test_token_logprobs_that_are_not_defined(cuda_code):
    logits = torch.randn(7, 600, generator=torch.Generator().manual_seed(0))
    logits[1] = -math.inf
    logits[2, 555] = math.nan
    logits[3, :] = -math.inf
    logits[3, 100] = math.nan
    logits[3, 300] = 0  # far from the NaN, which its thread sees among nothing but -inf
    logits, ids = on(cuda_code, logits, torch.tensor([5, 5, 5, 5, -1, 600, 5]))
    for temperature in (1.0, 0.9):
        for out in daemon_fast.token_logprobs(logits, ids, temperature):
            assert undefined(out) == [False, True, True, True, True, True, False]


def test_gradients_that_are_not_defined(cuda_code):
    logits = torch.randn(7, 600, generator=torch.Generator().manual_seed(0))
    logits[1] = -math.inf
    logits[2, 555] = math.nan
    logits[6, :3] = -math.inf
    logits, ids = on(cuda_code, logits, torch.tensor([5, 5, 5, 600, -1, 5, 5]))
    none, one = on(cuda_code, torch.zeros(7), torch.tensor([1.0, 1, 1, 1, 0, 0, 1]))
    for temperature in (1.0, 0.9):
        for grads in ((one, none), (none, one)):
            grad = _ops.token_logprobs_backward(*grads, logits, ids, temperature)
            assert undefined(grad) == [False, True, True, True, False, False, False]


def test_tokens_appended_outside(cuda_code):
    for slot, rows, lengths in ((3, [2, 0], [-1, 0, -1]), (0, [2, 3], [0, 0, 1]), (-1, [-1, 1], [0, -1, 0])):
        buffers = [torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, 3), torch.zeros(3, 3)]
        buffers += [torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)]
        given = torch.tensor([5, 6]), torch.zeros(2), torch.zeros(2), torch.tensor([slot]), torch.tensor(rows)
        buffers = on(cuda_code, *buffers)
        _ops.append_tokens(*buffers, *on(cuda_code, *given, torch.tensor([0])), True)
        assert buffers[3].tolist() == lengths
        assert buffers[0].sum() == (5 if slot == 0 else 0)


def test_sampled_tokens_that_are_not_defined(cuda_code):
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    logits[1] = -math.inf
    logits[2, 255] = math.nan
    logits[3, 7] = math.inf
    logits, uniforms = on(cuda_code, logits, torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, -0.1], dtype=F64))
    ids, log_p, log_q = daemon_fast.sample_tokens(logits, uniforms, 0.9)
    assert (ids < 0).tolist() == undefined(log_p) == undefined(log_q) == [False, *[True] * 5]


@pytest.mark.parametrize("M", [4, 100, 2000])
@pytest.mark.parametrize("rule", ["sir_select", "race_select"])
def test_draws_that_are_not_defined(cuda_code, rule, M):
    features, base = torch.zeros(5, M, 1), torch.zeros(5, M)
    features[1, 2] = math.nan
    base[2] = -math.inf
    base[:, 0] = -math.inf
    uniforms = torch.tensor([0.0, 0.3, 0.3, 1.0, math.nan], dtype=F64)
    if rule == "race_select":
        uniforms = torch.where(torch.arange(M) == 3, uniforms[:, None], 0.9)
        uniforms[0, 1] = 0
    arguments = on(cuda_code, features, torch.ones(1, dtype=F64), uniforms, base)
    index, *others = getattr(daemon_fast, rule)(*arguments)
    assert index.tolist() == [1, -1, -1, -1, -1]
    for out in others:
        assert undefined(out) == [False, True, True, False, False]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rule", ["sir_select", "race_select"])
def test_the_largest_of_few_weights_is_found_to_its_last_bits(cuda_code, rule, sign):
    """A warp looks for it in two halves; these log-weights differ in the lower one, and by far more than 1."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(25, generator=generator) for _ in range(6)])
    base = sign * 1e300 * (1 + order.double() * 2**-45)
    uniforms = torch.full((6, 25) if rule == "race_select" else (6,), 0.5, dtype=F64)
    arguments = on(cuda_code, torch.zeros(6, 25, 1, dtype=F64), torch.zeros(1, dtype=F64), uniforms, base)
    drawn = getattr(daemon_fast, rule)(*arguments)
    largest = (sign * order).argmax(1)
    assert torch.equal(drawn.index.cpu(), largest)
    assert torch.equal(drawn.weights.cpu(), torch.nn.functional.one_hot(largest, 25).double())


@pytest.mark.parametrize("normalization", ["per_prefix", "global"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("M", [25, 33])
def test_moments_that_are_not_defined(cuda_code, bad, normalization, M):
    features = torch.randn(40, M, 2, generator=torch.Generator().manual_seed(0))
    base = torch.zeros(40, M, dtype=F64)
    base[17] = bad if bad < 0 else 0
    base[17, M - 1] = bad
    features, mu, base = on(cuda_code, features, torch.ones(2, dtype=F64), base)
    defined = bad < 0 and normalization == "global"  # one prefix without weight is no loss to global weights
    for out in daemon_fast.tilted_moments(features, mu, base, normalization):
        assert undefined(out.reshape(1, -1)) == [not defined]
    for out in daemon_fast.tilted_moments(features, mu, torch.full_like(base, -math.inf), normalization):
        assert undefined(out.reshape(1, -1)) == [True]


def test_lengths_outside_a_row_are_marked(cuda_code):
    tokens, lengths = on(cuda_code, torch.zeros(4, 40, dtype=torch.int64), torch.tensor([40, 41, -1, 7]))
    assert undefined(daemon_fast.repetition(tokens, lengths, [2], [8])) == [False, True, True, False]


def test_nothing_gives_nothing(cuda_code):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=cuda_code)

    ids, none, mu = empty(0, dtype=torch.int64), empty(0, dtype=F64), empty(2, dtype=F64)
    assert daemon_fast.repetition(empty(0, 5, dtype=torch.int64)).shape == (0, 6)
    assert daemon_fast.repetition(empty(3, 0, dtype=torch.int64)).tolist() == [[0.0] * 6] * 3
    assert daemon_fast.token_logprobs(empty(0, 9), ids).log_p.shape == (0,)
    assert _ops.token_logprobs_backward(empty(0), empty(0), empty(0, 9), ids, 1.0).shape == (0, 9)
    assert daemon_fast.sample_tokens(empty(0, 9), none).ids.shape == (0,)
    assert daemon_fast.importance_weights(empty(0, 9)).weights.shape == (0, 9)
    assert daemon_fast.sir_select(empty(0, 9, 2), mu, none).index.shape == (0,)
    assert daemon_fast.race_select(empty(0, 9, 2), mu, empty(0, 9, dtype=F64)).index.shape == (0,)


def test_more_than_a_launch_can_hold_is_named(cuda_code):
    tokens = torch.zeros(1, 4, dtype=torch.int64, device=cuda_code)
    with pytest.raises(RuntimeError, match="ngrams has 33 entries, more than the 32"):
        daemon_fast.repetition(tokens, ngrams=list(range(1, 34)))
    for K in (400, 1025):
        features, mu = on(cuda_code, torch.zeros(2, 2, K), torch.zeros(K, dtype=F64))
        with pytest.raises(RuntimeError, match=f"features has K = {K}"):
            daemon_fast.tilted_moments(features, mu)
    longest = torch.zeros(1, dtype=torch.int32, device=cuda_code).expand(1, 2**29 + 1)
    with pytest.raises(RuntimeError, match="exceeds the maximum 536870912 on CUDA"):
        daemon_fast.repetition(longest)


# ---- what a device refuses --------------------------------------------------------------------------------------

H100, A100 = 227 * 1024, 163 * 1024  # bytes of shared memory that a block may have


@pytest.fixture
def report():
    if emulated.SANITIZED:
        pytest.skip("computes nothing")
    if not emulated.has_ptx():
        pytest.skip("built without CUDA, or no cuobjdump: the compiler's report has each kernel's static shared memory")


def select(M, dtype=torch.float32, base=None):
    base = None if base is None else torch.zeros(2, M, dtype=base)
    _ops.sir_select(torch.zeros(2, M, 0, dtype=dtype), torch.zeros(0, dtype=F64), torch.zeros(2, dtype=F64), base)


def race(M, dtype=torch.float32, base=None):
    base = None if base is None else torch.zeros(2, M, dtype=base)
    _ops.race_select(torch.zeros(2, M, 0, dtype=dtype), torch.zeros(0, dtype=F64), torch.zeros(2, M, dtype=F64), base)


def weigh(M, dtype=torch.float32):
    _ops.importance_weights(torch.zeros(2, M, dtype=dtype))


def repeat(T, dtype=torch.int64):
    _ops.repetition(torch.zeros(1, T, dtype=dtype), torch.tensor([T]), [2], [8])


@pytest.mark.usefixtures("report")
@pytest.mark.parametrize("optin", [H100, A100])
def test_shared_memory_up_to_what_a_device_grants(optin):
    """Each size is the first that its device sees: what a larger one was granted can't hide what is missing."""

    def launch(run, *arguments):
        with emulated.operators(shared_optin=optin, runs=False):
            run(*arguments)

    most = optin // 16
    for M in (*range(2500, 2600), *range(2780, 3080), *range(most - 600, most + 10)):
        launch(select, M)
    for M in (*range(5100, 5130), *range(6100, 6150), *range(2 * most - 1100, 2 * most + 10)):
        launch(weigh, M)
        launch(race, M)
    for M in (64, 65, 1024, 1025, 3000, most - 512, most - 511):
        for dtype in (torch.float32, F64):
            launch(weigh, 2 * M, dtype)
            for base in (torch.float32, F64):
                launch(select, M, dtype, base)
                launch(race, 2 * M, dtype, base)
    for T in range(500, 20_000, 50):
        for dtype in (torch.int32, torch.int64):
            launch(repeat, T, dtype)


@pytest.mark.usefixtures("report")
def test_no_kernel_has_more_static_shared_memory_than_the_launches_allow_for():
    text = (emulated.ROOT / "csrc/cuda/launch.h").read_text()
    limit = int(re.search(r"kMaxStaticSharedBytes = (\d+) \* 1024;", text)[1]) * 1024
    assert max(kernel.shared_bytes for kernel in kernels.kernels(kernels.cuobjdump())) <= limit


@pytest.mark.usefixtures("report")
def test_moments_of_as_many_features_as_the_documentation_says():
    promised = re.search(r"K above (\d+) on an A100, (\d+) on an H100", daemon_fast.tilted_moments.__doc__)
    for optin, K in zip((A100, H100), map(int, promised.groups()), strict=True):
        with emulated.operators(shared_optin=optin, runs=False):
            for normalization in ("per_prefix", "global"):
                _ops.tilted_moments(torch.zeros(3, 4, K), torch.zeros(K, dtype=F64), None, normalization)
                with pytest.raises(RuntimeError, match=rf"K = {K + 1}, whose moments need \d+ bytes of shared memory"):
                    _ops.tilted_moments(torch.zeros(3, 4, K + 1), torch.zeros(K + 1, dtype=F64), None, normalization)


def test_shared_memory_is_asked_for_once_a_kernel():
    with emulated.operators(runs=False):
        for M in (3000, 5000, 2600, 9000):
            select(M)
        assert emulated.grants() == 1
        select(3000, F64)
        assert emulated.grants() == 2


def test_global_scratch_is_bounded():
    def scratch(run):
        with torch.profiler.profile(profile_memory=True) as profile, emulated.operators(runs=False):
            run()
        return max(event.self_cpu_memory_usage for event in profile.events())

    def many_rows(rows, T):
        tokens = torch.zeros(T, dtype=torch.int64).expand(rows, T)
        return lambda: _ops.repetition(tokens, torch.zeros(rows, dtype=torch.int64), [2], [8])

    def many_groups(groups, M):
        base = torch.zeros(1, M).expand(groups, M)
        features, uniforms = torch.zeros(groups, M, 0), torch.zeros(groups, dtype=F64)
        return lambda: _ops.sir_select(features, torch.zeros(0, dtype=F64), uniforms, base)

    assert scratch(many_rows(2000, 10**6)) <= 2**30
    assert emulated.blocks() > 30
    assert scratch(many_groups(1000, 20_000)) == 4 * 132 * 20_000 * 16  # what fills the GPU is less
    assert emulated.blocks() == 4 * 132
    assert scratch(many_rows(2, 5 * 10**7)) > 2**30  # one row needs what it needs
    assert emulated.blocks() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("cudaSetDevice", r"cudaSetDevice\(\d+\) failed: invalid device ordinal"),
        ("cudaDeviceGetAttribute", "cudaDeviceGetAttribute failed: invalid device ordinal"),
        ("cudaFuncGetAttributes", "cudaFuncGetAttributes failed: invalid device ordinal"),
        ("cudaFuncSetAttribute", "cudaFuncSetAttribute failed: invalid device ordinal"),
        ("cudaLaunchKernelEx", r"sir_select failed on CUDA for an input of shape \[2, 3000, 0\]: invalid device ord"),
        ("current_stream", "torch gave no current stream for CUDA device"),
    ],
)
def test_a_failing_call_of_the_runtime_is_named_and_leaves_no_error(call, message):
    with emulated.operators(broken=call), pytest.raises(RuntimeError, match=message):
        select(3000)
    assert emulated.error() == 0


# ---- sanitizers and lines ---------------------------------------------------------------------------------------


@pytest.mark.skipif(emulated.SANITIZED, reason="this is the sanitized run")
def test_every_line_runs_under_sanitizers(capsys):
    for program in ("g++", "gcov"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}")
    for counts in emulated.folder(sanitized=True).glob("*.gcda"):
        counts.unlink()
    preloaded = []
    for name in ("libasan.so", "libstdc++.so"):  # which must know of each other before anything throws
        find = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        preloaded.append(find.stdout.strip())
    settings = {"EMULATION_SANITIZED": "1", "LD_PRELOAD": ":".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}
    env = {**os.environ, **settings}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    files = emulated.coverage().items()
    lines = [(count, f"{file}:{line}") for file, counts in files for line, count in counts.items()]
    missed = sorted(place for count, place in lines if count == 0)
    with capsys.disabled():
        print(f"\ncsrc/cuda: {len(lines) - len(missed)} of {len(lines)} lines ran", *missed)
    assert lines
    assert missed == []
