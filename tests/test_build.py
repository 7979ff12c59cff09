"""The compiled module: what it links, what it says of itself, and what an import without it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import kernels
import pytest
import torch

import daemon_fast
from daemon_fast import _C, extension

OPERATORS = (
    "repetition", "token_logprobs", "token_logprobs_backward", "sample_tokens", "append_tokens", "importance_weights",
    "sir_select", "race_select", "tilted_moments",
)  # fmt: skip


@pytest.fixture(scope="module")
def dynamic_section():
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    return subprocess.run(["readelf", "-d", _C.__file__], check=True, capture_output=True, text=True).stdout


def test_one_binary_for_torch_with_and_without_cuda(dynamic_section):
    needed = [line.split("[")[1].rstrip("]") for line in dynamic_section.splitlines() if "NEEDED" in line]
    # libtorch.so is how a CUDA torch brings the symbols that are weak here; nothing of CUDA may be needed.
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or name.startswith(("libc10", "libtorch_"))]


def test_only_weak_symbols_come_from_a_cuda_torch():
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    listed = subprocess.run(["nm", "-D", "--undefined-only", _C.__file__], check=True, capture_output=True, text=True)
    undefined = [line.split() for line in listed.stdout.splitlines()]
    assert [name for kind, name in undefined if kind == "U" and "cuda" in name and "device_type" not in name] == []
    # The stable ABI: C functions of torch's shim, and no C++ of torch or c10.
    assert [name for kind, name in undefined if kind == "U" and ("N2at" in name or "3c10" in name)] == []


def test_build_info():
    info = daemon_fast.build_info()
    assert info["version"] == daemon_fast.__version__
    assert info["compiler"].split()[0] in ("g++", "clang")
    assert info["torch"].startswith("2.")
    assert (info["cuda"] is None) == (info["cuda_architectures"] == "")


@pytest.fixture
def cuobjdump():
    if daemon_fast.build_info()["cuda"] is None:
        pytest.skip("built without CUDA: no nvcc was found, or DAEMON_FAST_CUDA=OFF")
    tool = kernels.cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")
    return tool


def test_cuda_code_for_every_architecture(cuobjdump):
    def listing(kind):
        return subprocess.run([cuobjdump, kind, _C.__file__], check=True, capture_output=True, text=True).stdout

    for architecture in daemon_fast.build_info()["cuda_architectures"].split(","):
        number, _, kind = architecture.partition("-")
        if kind in ("", "real"):
            assert f"sm_{number}.cubin" in listing("--list-elf")
        if kind in ("", "virtual"):
            assert f"sm_{number}.ptx" in listing("--list-ptx")


def test_no_kernel_spills_registers(cuobjdump):
    found = kernels.kernels(cuobjdump)
    names = {kernel.name.split("<")[0] for kernel in found}
    selection = {"sir_select", "race_select"}  # share theirs
    expected = {f"{name}_kernel" for name in {*OPERATORS} - selection}
    expected |= {"select_kernel", "select_few_kernel", "sum_pieces_kernel", "finish_tilted_moments_kernel"}
    assert names == expected
    assert [kernel for kernel in found if kernel.stack_bytes or kernel.local_bytes] == []


def test_operators_are_registered_with_torch():
    for name in OPERATORS:
        for key in ("CPU", *(["CUDA"] if daemon_fast.build_info()["cuda"] else [])):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"daemon_fast::{name}", key)


def test_a_missing_module_says_how_to_build(monkeypatch):
    monkeypatch.delattr(daemon_fast, "_C")
    monkeypatch.setitem(sys.modules, "daemon_fast._C", None)
    with pytest.raises(ImportError, match=r"can't be imported .* pip install --no-build-isolation \."):
        extension.load()


def test_a_module_of_another_version_says_how_to_build(monkeypatch):
    stale = types.ModuleType("daemon_fast._C")
    stale.build_info = lambda: {"version": "0.0.1"}
    monkeypatch.setattr(daemon_fast, "_C", stale)
    monkeypatch.setitem(sys.modules, "daemon_fast._C", stale)
    with pytest.raises(ImportError, match=rf"version 0.0.1, the package of {daemon_fast.__version__}.*pip install"):
        extension.load()


def test_an_old_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ImportError, match=r"needs torch >= 2.10, and this is torch 2.9.1\+cpu"):
        extension.load()


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "No torch beside .* Install torch >= 2.10"), ("2.9.1+cpu", r"torch 2.9.1\+cpu in .* is too old")],
)
def test_a_build_without_a_torch_that_serves_says_what_to_install(version, message, tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    if version is not None:
        (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
    command = ["cmake", "-S", Path(__file__).parents[1], "-B", tmp_path / "build", "-DDAEMON_FAST_CUDA=OFF"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DTORCH_DIR={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(message, " ".join(done.stderr.split()))


def test_importing_the_bare_source_tree_says_what_is_wrong(tmp_path):
    shutil.copytree(Path(extension.__file__).parent, tmp_path / "daemon_fast", ignore=shutil.ignore_patterns("*.so"))
    # -S: no site-packages hooks, hence no installed daemon_fast; torch is found by its path alone.
    code = f"import sys; sys.path += {sys.path!r}; sys.meta_path = sys.meta_path[-3:]; import daemon_fast.ops"
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install --no-build-isolation ." in result.stderr.splitlines()[-1]


SCRIPT = """
import sys, torch, daemon_fast
g = torch.Generator().manual_seed(0)
tokens = torch.randint(0, 30, (40, 300), generator=g)
features, mu = torch.randn(70, 25, 9, generator=g), torch.randn(9, generator=g, dtype=torch.float64)
logits, ids = torch.randn(20, 3000, generator=g) * 4, torch.randint(0, 3000, (20,), generator=g)
uniforms = torch.rand(70, generator=g, dtype=torch.float64)
races = torch.rand(70, 25, generator=g, dtype=torch.float64)
out = [daemon_fast.repetition(tokens), *daemon_fast.token_logprobs(logits, ids, 0.97)]
out += [*daemon_fast.token_logprobs(logits.half(), ids, 0.97), *daemon_fast.importance_weights(features[..., 0])]
out += [*daemon_fast.sample_tokens(logits, uniforms[:20], 0.97)]
out += [*daemon_fast.sir_select(features, mu, uniforms), *daemon_fast.race_select(features, mu, races)]
out += [*daemon_fast.tilted_moments(features, mu)]
torch.save(out, sys.argv[1])
"""


def test_the_baseline_code_gives_the_same_as_avx2(tmp_path):
    results = []
    for wish in ("baseline", "best"):
        path = tmp_path / f"{wish}.pt"
        env = {**os.environ, "DAEMON_FAST_CPU": wish}
        subprocess.run([sys.executable, "-c", SCRIPT, str(path)], env=env, check=True)
        results.append(torch.load(path, weights_only=True))
    for a, b in zip(*results, strict=True):
        if a.dtype == torch.int64:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 1e-12, atol=1e-12)
    assert torch.equal(results[0][0], results[1][0])  # counts: exactly
