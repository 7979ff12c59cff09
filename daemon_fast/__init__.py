"""Language model decoding as direct metrics optimization (DAEMON), with fused C++/CUDA kernels."""

from daemon_fast.extension import build_info
from daemon_fast.ops import importance_weights, repetition, sir_select, tilted_moments, token_logprobs

__all__ = ["build_info", "importance_weights", "repetition", "sir_select", "tilted_moments", "token_logprobs"]
