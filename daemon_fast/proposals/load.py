"""Which engine draws candidates, by name: what the command line and the workers of a cluster are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from daemon_fast.errors import InvalidInput, Problems
from daemon_fast.models import DEFAULT_MODEL, load_tokenizer
from daemon_fast.proposals.base import Proposal, ProposalSettings, vocabulary_fingerprint

__all__ = ["EngineSpec"]


SERVER_KWARGS = ("served_model", "log_probs", "max_in_flight", "timeout", "max_retries")


@dataclass(frozen=True)
class EngineSpec:
    """All that it takes to make a proposal, also on another machine.

    Attributes
    ----------
    name : "transformers", "vllm", or the address of an OpenAI-compatible server, such as "http://localhost:8000/v1"
    model_id : Hugging Face id, folder, GGUF file or embedded name; of a server's model, whose tokenizer it is
    device : for Transformers, such as "cuda:0"; default: a GPU where there is one
    dtype : of the weights: "float32", "bfloat16" or "float16"; left alone for a server, which has its own
    engine_kwargs : for vLLM, as `vllm.LLM` takes them: tensor_parallel_size, gpu_memory_utilization, max_model_len; for
        a server, as `ServerProposal` does: served_model, log_probs, max_in_flight, timeout, max_retries
    """

    name: str = "transformers"
    model_id: str = DEFAULT_MODEL
    device: str | None = None
    dtype: str = "float32"
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bad = []
        if self.name not in ("transformers", "vllm") and not self.is_server:
            bad.append(f"engine = {self.name!r} must be 'transformers', 'vllm', or the address of a server: http://...")
        elif self.device is not None and self.name != "transformers":
            bad.append(f"device = {self.device!r} is for Transformers: the engine {self.name!r} has its own")
        if self.engine_kwargs and self.name == "transformers":
            bad.append(
                f"engine_kwargs = {dict(self.engine_kwargs)} are for vLLM and servers; the engine is {self.name!r}"
            )
        if self.is_server and (unknown := sorted(set(self.engine_kwargs) - set(SERVER_KWARGS))):
            bad.append(f"engine_kwargs has {unknown[0]!r}; for a server there are {', '.join(SERVER_KWARGS)}")
        if self.dtype != "float32" and self.is_server:
            bad.append(f"dtype = {self.dtype!r}: the server {self.name!r} has chosen its own")
        Problems(map(InvalidInput, bad)).report()

    @property
    def is_server(self) -> bool:
        return self.name.startswith(("http://", "https://"))

    def proposal(self, **settings: Any) -> Proposal:
        """Load it. `settings` : the fields of `ProposalSettings` but model_id and vocabulary.

        Raises
        ------
        InvalidInput, ModelUnavailable, DeviceUnavailable, EngineError
        """
        if self.is_server:
            from daemon_fast.proposals.openai import ServerProposal

            return ServerProposal(self.name, self.model_id, **self.engine_kwargs, **settings)
        dtype = getattr(torch, self.dtype)
        if self.name == "vllm":
            from daemon_fast.proposals.vllm import VLLMProposal

            return VLLMProposal.load(self.model_id, dtype, self.engine_kwargs, **settings)
        from daemon_fast.proposals.transformers import TransformersProposal

        return TransformersProposal.load(self.model_id, self.device, dtype, **settings)

    def settings(self, **settings: Any) -> ProposalSettings:
        """What the proposal's own will be; loads no more than the tokenizer."""
        return ProposalSettings(self.model_id, vocabulary_fingerprint(load_tokenizer(self.model_id)), **settings)
