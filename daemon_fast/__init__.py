"""Language model decoding as direct metrics optimization (DAEMON), with fused C++/CUDA kernels."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daemon_fast import errors, metrics
    from daemon_fast.decode import Decoded, SIRDecoder
    from daemon_fast.energy import Energy
    from daemon_fast.extension import build_info
    from daemon_fast.fit import FitResult, fit
    from daemon_fast.fit.from_texts import fit_energy
    from daemon_fast.integrations.generate import generate
    from daemon_fast.integrations.reward import RepetitionReward
    from daemon_fast.ops import (
        importance_weights,
        race_select,
        repetition,
        sample_tokens,
        sir_select,
        tilted_moments,
        token_logprobs,
    )
    from daemon_fast.proposals.base import Proposal, ProposalSettings
    from daemon_fast.proposals.candidates import Candidates
    from daemon_fast.proposals.openai import ServerProposal
    from daemon_fast.proposals.transformers import TransformersProposal
    from daemon_fast.proposals.vllm import VLLMProposal

__version__: str

__all__ = [
    "Candidates",
    "Decoded",
    "Energy",
    "FitResult",
    "Proposal",
    "ProposalSettings",
    "RepetitionReward",
    "SIRDecoder",
    "ServerProposal",
    "TransformersProposal",
    "VLLMProposal",
    "__version__",
    "build_info",
    "errors",
    "fit",
    "fit_energy",
    "generate",
    "importance_weights",
    "metrics",
    "race_select",
    "repetition",
    "sample_tokens",
    "sir_select",
    "tilted_moments",
    "token_logprobs",
]


# What each name needs is imported when it is asked for: the command line answers --help without torch, and whoever only
# counts n-grams doesn't wait for Transformers.
_HOMES = {
    "Candidates": "proposals.candidates",
    "Decoded": "decode",
    "Energy": "energy",
    "FitResult": "fit",
    "Proposal": "proposals.base",
    "ProposalSettings": "proposals.base",
    "RepetitionReward": "integrations.reward",
    "SIRDecoder": "decode",
    "ServerProposal": "proposals.openai",
    "TransformersProposal": "proposals.transformers",
    "VLLMProposal": "proposals.vllm",
    "build_info": "extension",
    "fit": "fit",
    "fit_energy": "fit.from_texts",
    "generate": "integrations.generate",
    "importance_weights": "ops",
    "race_select": "ops",
    "repetition": "ops",
    "sample_tokens": "ops",
    "sir_select": "ops",
    "tilted_moments": "ops",
    "token_logprobs": "ops",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # a third of the time that --help takes

        return version("daemon-fast")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in ("errors", "metrics"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `fit` the function: to import anything of the package `daemon_fast.fit` would make it that package."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.fit if name == "fit" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
