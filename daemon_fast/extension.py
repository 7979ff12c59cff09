"""Loads the compiled module `daemon_fast._C`, which registers the operators, or says how to build it."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

import torch

HOW_TO_BUILD = (
    "Build it from the source tree, in the environment whose torch you use: pip install --no-build-isolation . "
    "(or `make build`, which makes an environment of its own)."
)


def load() -> ModuleType:
    """Import the compiled module and check that it belongs to this package.

    Raises
    ------
    ImportError
        The module is missing, can't be loaded by this torch, or was built from another version of the sources.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise ImportError(
            f"daemon_fast needs torch >= 2.10, and this is torch {torch.__version__}: pip install --upgrade torch"
        )
    try:
        module = importlib.import_module("daemon_fast._C")
    except ImportError as error:
        raise ImportError(
            f"daemon_fast's compiled module can't be imported ({error}). {HOW_TO_BUILD} If it is installed already, "
            "you may be importing the source folder instead of the installed package: change the directory."
        ) from error
    built = module.build_info()["version"]
    installed = importlib.metadata.version("daemon-fast")
    if built != installed:
        raise ImportError(
            f"daemon_fast's compiled module is of version {built}, the package of {installed}. {HOW_TO_BUILD}"
        )
    return module


def build_info() -> dict[str, str | None]:
    """Facts about the compiled module: version, torch (of its headers), compiler, cuda, cuda_architectures.

    `cuda` is the version of nvcc, or None for a build without CUDA kernels.
    """
    info: dict[str, str | None] = load().build_info()
    return info
