"""Language model decoding as direct metrics optimization (DAEMON), with fused C++/CUDA kernels."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from daemon_fast import errors, metrics
from daemon_fast.decode import Decoded, SIRDecoder
from daemon_fast.energy import Energy
from daemon_fast.extension import build_info
from daemon_fast.fit import FitResult, fit
from daemon_fast.fit.from_texts import fit_energy
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

if TYPE_CHECKING:
    from daemon_fast.integrations.generate import generate
    from daemon_fast.proposals.openai import ServerProposal
    from daemon_fast.proposals.transformers import TransformersProposal
    from daemon_fast.proposals.vllm import VLLMProposal

__version__ = version("daemon-fast")

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


# Transformers takes longer to import than torch, and whoever only counts n-grams doesn't need it.
_LATER = {
    "ServerProposal": "daemon_fast.proposals.openai",
    "TransformersProposal": "daemon_fast.proposals.transformers",
    "VLLMProposal": "daemon_fast.proposals.vllm",
    "generate": "daemon_fast.integrations.generate",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
