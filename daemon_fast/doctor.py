"""`daemon-fast doctor`: versions, build, devices, and one self-check of each operator on each device."""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from daemon_fast import gopher, ops, reference
from daemon_fast.extension import build_info

__all__ = ["advice", "facts", "self_checks"]


def facts() -> dict[str, str]:
    """Versions, build and devices."""
    build = build_info()
    cuda = f"nvcc {build['cuda']} for {build['cuda_architectures']}" if build["cuda"] else "not compiled"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    driver = _driver_cuda()
    versions = {name: _version(name) for name in ("transformers", "sentence-transformers", "numpy")}
    return {
        "daemon-fast": str(build["version"]),
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        **versions,
        "compiled with": f"{build['compiler']}, headers of torch {build['torch']}",
        "CUDA kernels": cuda,
        "CUDA driver": f"serves CUDA {driver[0]}.{driver[1]}" if driver else "none",
        "CPU": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "GPUs": ", ".join(devices) or "none",
    }


def advice() -> list[str]:
    """What keeps a GPU of this machine from being used, and what to do: a sentence each. Empty if nothing does."""
    driver, build = _driver_cuda(), build_info()
    if driver is None:
        return []
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return list(_advice(driver, torch.version.cuda, build["cuda"], str(build["cuda_architectures"]), capabilities))


def _advice(
    driver: tuple[int, int],  # the newest CUDA that it serves
    torch_cuda: str | None,  # of which torch is a build
    kernels_cuda: str | None,  # whose nvcc compiled the kernels
    architectures: str,  # such as 80-real,90-real,90-virtual
    capabilities: list[tuple[int, int]],  # of each GPU
) -> Iterator[str]:
    source = "pip install --force-reinstall --no-deps --no-binary :all: --no-build-isolation daemon-fast"
    if torch_cuda is None:
        yield "There is a CUDA driver, but this torch is a build without CUDA: install one with it (pytorch.org)."
    if kernels_cuda is None:
        yield f"This daemon_fast has no CUDA kernels: put nvcc on PATH and build it from source: {source}"
        return
    needed = int(kernels_cuda.split(".")[0])
    if driver[0] < needed:
        yield (
            f"The driver serves CUDA {driver[0]}.{driver[1]}, and the kernels are of CUDA {kernels_cuda}: update the "
            f"driver to one that serves CUDA {needed}.0, or put nvcc of CUDA {driver[0]} on PATH and build from "
            f"source: {source}"
        )
    for major, minor in capabilities:
        if not _serves(architectures, major, minor):
            yield (
                f"The kernels ({architectures}) don't run on a GPU of compute capability {major}.{minor}: build from "
                f"source: DAEMON_FAST_CUDA_ARCHITECTURES={major}{minor} {source}"
            )


def _serves(architectures: str, major: int, minor: int) -> bool:
    """Whether code for these architectures runs on a GPU: cubins within their major version, PTX on all newer ones."""
    for architecture in architectures.split(","):
        number, _, kind = architecture.partition("-")
        made_for = divmod(int(number.rstrip("af")), 10)
        newer = made_for <= (major, minor)
        if newer and (kind != "real" or made_for[0] == major):
            return True
    return False


def _driver_cuda() -> tuple[int, int] | None:
    """The newest version of CUDA that the driver serves, or None if there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def self_checks() -> Iterator[tuple[str, str, str]]:
    """(operator, device, "ok" or what is wrong), each compared with the plain-Python definition."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        for name, check in CHECKS.items():
            if device != "cpu" and name in ON_CPU_ONLY:
                continue
            try:
                yield name, device, check(device)
            except (RuntimeError, NotImplementedError) as error:
                yield name, device, str(error).splitlines()[0]


def _compare(got: tuple[Tensor, ...], expected: tuple[object, ...]) -> str:
    for tensor, value in zip(got, expected, strict=True):
        want = torch.tensor(value, dtype=torch.float64).reshape(tensor.shape)
        worst = float(((tensor.cpu().double() - want).abs() / want.abs().clamp_min(1)).max())
        if not worst <= 1e-6:
            return f"wrong by {worst:.2g}"
    return "ok"


def _repetition(device: str) -> str:
    tokens, lengths = torch.arange(60).reshape(3, 20) % 7, torch.tensor([20, 13, 0])
    got = ops.repetition(tokens.to(device), lengths.to(device))
    return _compare((got,), (reference.repetition(tokens.tolist(), lengths.tolist(), (2, 3, 4), (8, 16, 32)),))


def _gopher_repetition(device: str) -> str:
    text = "a b c d e f " * 3 + "\na b\na b"
    return _compare((gopher.gopher_repetition([text])[0],), (reference.gopher_repetition(text, text.split()),))


def _token_logprobs(device: str) -> str:
    logits, ids = torch.linspace(-3, 3, 200).reshape(2, 100), torch.tensor([3, 99])
    got = ops.token_logprobs(logits.to(device), ids.to(device), 0.97)
    return _compare(tuple(got), reference.token_logprobs(logits.tolist(), ids.tolist(), 0.97))


def _sample_tokens(device: str) -> str:
    logits, uniforms = torch.linspace(-3, 3, 200).reshape(2, 100), torch.tensor([0.3, 0.9], dtype=torch.float64)
    ids = reference.sample_tokens(logits.tolist(), uniforms.tolist(), 0.97)
    got = ops.sample_tokens(logits.to(device), uniforms.to(device), 0.97)
    return _compare(tuple(got), (ids, *reference.token_logprobs(logits.tolist(), ids, 0.97)))


def _append_tokens(device: str) -> str:
    buffers = (
        torch.zeros(2, 3, dtype=torch.int64, device=device), torch.zeros(2, 3, device=device),
        torch.zeros(2, 3, device=device), torch.zeros(3, dtype=torch.int64, device=device),
        torch.ones(3, dtype=torch.bool, device=device),
    )  # fmt: skip
    rows, eos = torch.arange(3, device=device), torch.tensor([0], device=device)
    lists: list[list[tuple[int, float, float]]] = [[], [], []]
    for slot, ids in enumerate(([4, 0, 5], [0, 6, 7])):
        drawn, place = torch.tensor(ids, device=device), torch.tensor([slot], device=device)
        ops.append_tokens(
            *buffers, ids=drawn, ids_log_p=-drawn.float(), ids_log_q=drawn.float(), slot=place, rows=rows, eos=eos,
            count_eos=True,
        )  # fmt: skip
        reference.append_tokens(lists, ids, [-float(i) for i in ids], list(map(float, ids)), [0])
    columns = [[[*column, 0][:2] for column in zip(*row, strict=True)] for row in lists]
    expected = [[column[k] for column in columns] for k in range(3)]
    lengths, running = [len(row) for row in lists], [row[-1][0] != 0 for row in lists]
    return _compare((*(x.T for x in buffers[:3]), *buffers[3:]), (*expected, lengths, running))


def _importance_weights(device: str) -> str:
    log_w = torch.tensor([[0.0, 1.0, -math.inf], [1e4, -1e4, 1e4]])
    return _compare(tuple(ops.importance_weights(log_w.to(device))), reference.importance_weights(log_w.tolist()))


def _problem(device: str) -> tuple[Tensor, Tensor, list[list[list[float]]]]:
    features, mu = torch.linspace(-1, 1, 40).reshape(2, 10, 2).sin(), torch.tensor([1.0, -2.0], dtype=torch.float64)
    return features.to(device), mu.to(device), features.tolist()


def _sir_select(device: str) -> str:
    features, mu, listed = _problem(device)
    uniforms = torch.tensor([0.1, 0.9], dtype=torch.float64, device=device)
    expected = reference.sir_select(listed, mu.tolist(), uniforms.tolist())
    return _compare(tuple(ops.sir_select(features, mu, uniforms)), expected)


def _race_select(device: str) -> str:
    features, mu, listed = _problem(device)
    uniforms = torch.linspace(0.05, 0.95, 20, dtype=torch.float64, device=device).reshape(2, 10)
    expected = reference.race_select(listed, mu.tolist(), uniforms.tolist())
    return _compare(tuple(ops.race_select(features, mu, uniforms)), expected)


def _tilted_moments(device: str) -> str:
    features, mu, listed = _problem(device)
    return _compare(tuple(ops.tilted_moments(features, mu)), reference.tilted_moments(listed, mu.tolist()))


CHECKS: dict[str, Callable[[str], str]] = {
    "repetition": _repetition,
    "gopher_repetition": _gopher_repetition,
    "token_logprobs": _token_logprobs,
    "sample_tokens": _sample_tokens,
    "append_tokens": _append_tokens,
    "importance_weights": _importance_weights,
    "sir_select": _sir_select,
    "race_select": _race_select,
    "tilted_moments": _tilted_moments,
}
ON_CPU_ONLY = ("gopher_repetition",)  # where the strings are
