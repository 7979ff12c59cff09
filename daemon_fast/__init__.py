"""Language model decoding as direct metrics optimization (DAEMON), with fused C++/CUDA kernels."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from daemon_fast import errors, metrics
from daemon_fast.candidates import Candidates
from daemon_fast.decode import Decoded, SIRDecoder
from daemon_fast.energy import Energy
from daemon_fast.extension import build_info
from daemon_fast.fit import FitResult, fit
from daemon_fast.ops import importance_weights, repetition, sample_tokens, sir_select, tilted_moments, token_logprobs
from daemon_fast.proposals import Proposal, ProposalSettings
from daemon_fast.rewards import RepetitionReward

if TYPE_CHECKING:
    from daemon_fast.generation import generate
    from daemon_fast.proposals.transformers import TransformersProposal

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
    "TransformersProposal",
    "__version__",
    "build_info",
    "errors",
    "fit",
    "generate",
    "importance_weights",
    "metrics",
    "repetition",
    "sample_tokens",
    "sir_select",
    "tilted_moments",
    "token_logprobs",
]


def __getattr__(name: str) -> Any:
    # Transformers takes longer to import than torch, and whoever only counts n-grams doesn't need it.
    if name == "TransformersProposal":
        from daemon_fast.proposals.transformers import TransformersProposal

        return TransformersProposal
    if name == "generate":
        from daemon_fast.generation import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
