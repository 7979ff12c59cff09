"""Candidates from any Transformers causal language model.

`daemon_fast.proposals.prompt_cache` runs the model; here tokens are drawn from its logits. Their log-probabilities are
gathered step by step, so that no [steps, M, V] logits exist.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from daemon_fast import ops
from daemon_fast.errors import InvalidInput
from daemon_fast.memory import check_candidates
from daemon_fast.models import DEFAULT_MODEL, load_language_model
from daemon_fast.proposals import base
from daemon_fast.proposals.base import Prefix, ProposalSettings, tokenize, vocabulary_fingerprint
from daemon_fast.proposals.candidates import Candidates
from daemon_fast.proposals.prompt_cache import Prompts, SharedPromptCache, bytes_of, cache_for, process, way_of
from daemon_fast.proposals.twin import Twin, context_of, device_of, rope_switch, text_config, unwrapped

__all__ = ["TransformersProposal"]

SCORE_TOKENS = 1024  # positions whose logits [positions, V] `score` holds at a time
# Steps between two looks at which candidates go on: on CUDA a look waits for the device.
LOOK_EVERY = {"cpu": 1, "cuda": 16}
DROP_ABOVE = 0.25  # share of rows that must have ended before the others are moved together


class TransformersProposal:
    """Draws candidates from a Transformers causal LM.

    Parameters
    ----------
    model : a causal LM of Transformers, on its device; also inside torch.compile, PEFT's adapters and the like. It is
        used in evaluation mode, without gradient checkpointing, and left as it is.
    tokenizer : its tokenizer, or None if prefixes are given as token ids (then there are no texts)
    model_id : recorded in artefacts; default: the model's own
    eos_token_ids : default: those of the model's generation config, or the tokenizer's
    **settings : the fields of `ProposalSettings`

    Attributes
    ----------
    path : how candidates were drawn last: "shared", "growing" or "recomputed", see `daemon_fast.proposals.prompt_cache`

    Examples
    --------
    >>> proposal = TransformersProposal.load(num_candidates=25, max_new_tokens=64, temperature=0.97)
    >>> proposal.propose(["The Roman Empire was"], seed=0).texts[0]
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        model_id: str | None = None,
        eos_token_ids: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        size = text_config(model).vocab_size
        vocabulary = vocabulary_fingerprint(tokenizer) if tokenizer is not None else str(size)
        self.settings = ProposalSettings(model_id or unwrapped(model).config._name_or_path, vocabulary, **settings)
        if eos_token_ids is None:
            configured = getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
            eos_token_ids = base.eos_token_ids(configured, tokenizer)
        eos = list(eos_token_ids)
        if bad := [i for i in eos if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < size]:
            raise InvalidInput(f"eos_token_ids has {bad[0]!r}: it must be token ids from 0 to {size - 1}")
        self._eos = torch.tensor(eos, dtype=torch.int64, device=device_of(unwrapped(model)))
        self._truncate = [TopKLogitsWarper(self.settings.top_k)] if self.settings.top_k else []
        if self.settings.top_p < 1:
            self._truncate.append(TopPLogitsWarper(self.settings.top_p))
        if self.settings.min_p > 0:
            self._truncate.append(MinPLogitsWarper(self.settings.min_p))
        self.path: str | None = None
        self._batch: _Batch | None = None

    @classmethod
    def load(
        cls,
        model_id: str = DEFAULT_MODEL,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> TransformersProposal:
        """From a Hugging Face id, folder, GGUF file or embedded name; see `daemon_fast.models`."""
        model, tokenizer = load_language_model(model_id, device, dtype)
        return cls(model, tokenizer, model_id=model_id, **settings)

    def detokenize(self, rows: Sequence[Sequence[int]]) -> list[str]:
        if self.tokenizer is None:
            raise InvalidInput("texts need a tokenizer: this proposal was made without one")
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def tokenize(self, prefixes: Sequence[Prefix]) -> list[list[int]]:
        """Token ids of each prefix, checked against the model's context.

        Raises
        ------
        InvalidInput
        """
        size, context = text_config(self.model).vocab_size, context_of(self.model)
        most = self.settings.max_new_tokens
        rows = tokenize(prefixes, self.tokenizer, size, context, most)
        switch = rope_switch(self.model)
        for i, row in enumerate(rows):
            if switch is not None and len(row) <= switch < len(row) + most:
                raise InvalidInput(
                    f"prefix {i} has {len(row)} tokens; with max_new_tokens = {most} it passes {switch}, from "
                    "where on this model's rotary embeddings change, also for the tokens before: no text across that "
                    "has one probability"
                )
        return rows

    @torch.inference_mode()
    def propose(self, prefixes: Sequence[Prefix], seed: int) -> Candidates:
        """M candidates of each prefix, all prefixes in one batch.

        Nothing is kept from call to call that the model's weights decide. On CUDA a step is captured in a graph, which
        serves later calls of the same shape for as long as the model is the same one, in the same state.

        Parameters
        ----------
        prefixes : N strings or lists of token ids
        seed : of all random numbers; the same seed gives the same ones again

        Raises
        ------
        InvalidInput
            No prefixes, an empty one, one too long for the model's context; or a model that is no causal LM.
        """
        if not -(2**63) <= seed < 2**64:
            raise InvalidInput(f"seed = {seed} must be from -2^63 to 2^64 - 1")
        tokens = self.tokenize(prefixes)
        model = Twin(self.model)
        self.path = way_of(model)
        prompts = process(model, tokens, cached=self.path != "recomputed")
        state = model.state() if model.device.type == "cuda" else None
        batch = self._batch
        if batch is None or batch.state != state or not batch.suits(prompts):
            batch = self._batch = None  # its buffers are freed before others are made
            batch = _Batch(self, model, prompts, state)
        if model.device.type == "cuda":
            self._batch = batch
        batch.run(model, prompts, seed)
        return batch.candidates()

    @torch.inference_mode()
    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> Candidates:
        """Given continuations, one of each prefix, with the log-probabilities that the model gives them (M = 1).

        Parameters
        ----------
        prefixes, continuations : N lists of token ids each, none empty

        Returns
        -------
        Candidates
            `token_log_q` is what the proposal would give: -inf for a token that it can't draw.

        Raises
        ------
        InvalidInput
            None, an empty one, a token outside the vocabulary; or a model that is no causal LM.
        """
        model = Twin(self.model)
        way_of(model)  # refuses what is no causal language model
        prefix_tokens = [list(map(int, prefix)) for prefix in prefixes]
        size = model.config.vocab_size
        if len(prefix_tokens) == 0 or len(prefix_tokens) != len(continuations):
            raise InvalidInput(
                f"there are {len(prefix_tokens)} prefixes and {len(continuations)} continuations: give one for each"
            )
        for name, given in (("prefix", prefix_tokens), ("continuation", continuations)):
            for i, row in enumerate(given):
                if len(row) == 0:
                    raise InvalidInput(f"{name} {i} is empty: it has no log-probability")
                if bad := [token for token in row if not 0 <= token < size]:
                    raise InvalidInput(f"{name} {i} has token {bad[0]}, outside the vocabulary of {size}")
        rows = [p + list(map(int, c)) for p, c in zip(prefix_tokens, continuations, strict=True)]
        lengths = torch.tensor([len(c) for c in continuations])
        shape = len(rows), int(lengths.max())
        tokens, log_p, log_q = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), torch.zeros(shape)
        batch_size = max(1, SCORE_TOKENS // max(map(len, rows)))
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            # Padding on the right is invisible to a causal model.
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], batch_first=True)
            logits = model.plain(padded.to(model.device))
            for i, row in enumerate(batch, begin):
                n, start = len(continuations[i]), len(prefix_tokens[i])
                ids = torch.tensor(row[start:], device=model.device)
                own = logits[i - begin, start - 1 : start - 1 + n].float()
                step_p, step_q = self._log_probs(own, self._scores(own, min(n, self.settings.min_new_tokens)), ids)
                tokens[i, :n], log_p[i, :n], log_q[i, :n] = ids.cpu(), step_p.cpu(), step_q.cpu()
        return Candidates(tokens, lengths, log_p, log_q, prefix_tokens, self.detokenize)

    def _scores(self, logits: Tensor, without_eos: int) -> Tensor | None:
        """[R, V] logits at the proposal's temperature, truncated; None if there is nothing to truncate.

        The first `without_eos` rows lie below the minimum length.
        """
        if not self._truncate and not without_eos:
            return None
        scores = logits / self.settings.temperature
        scores[:without_eos, self._eos] = -torch.inf
        for warper in self._truncate:
            scores = warper(None, scores)
        return scores

    def _log_probs(self, logits: Tensor, scores: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[R] log p at temperature 1, and log q under the proposal."""
        if scores is None:
            return ops.token_logprobs(logits, ids, self.settings.temperature)
        return ops.token_logprobs(logits, ids).log_p, ops.token_logprobs(scores, ids).log_p

    def draw(self, logits: Tensor, without_eos: int, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[R] ids drawn from logits [R, V] by one uniform each [R] float64, and their log p and log q.

        The first `without_eos` rows lie below the minimum length.
        """
        scores = self._scores(logits, without_eos)
        if scores is None:
            return ops.sample_tokens(logits, uniforms, self.settings.temperature)
        ids, log_q, _ = ops.sample_tokens(scores, uniforms)
        return ids, ops.token_logprobs(logits, ids).log_p, log_q

    def is_eos(self, ids: Tensor) -> Tensor:
        """[R] bool"""
        return (ids[:, None] == self._eos).any(1)


class _Batch:
    """M candidates of each of N prompts while they are drawn: buffers of fixed address, and the step that fills them.

    Nothing in a step waits for the device, and a step reads nothing that only the host knows: on CUDA it is captured
    in a graph and replayed.
    """

    def __init__(self, proposal: TransformersProposal, model: Twin, prompts: Prompts, state: int | None = None) -> None:
        s, device = proposal.settings, model.device
        self._proposal, self._prompts, self.state = proposal, prompts, state
        check_candidates(s, len(prompts.tokens), device, **bytes_of(model, prompts, s.num_candidates, s.max_new_tokens))
        self._cache = cache_for(model, prompts, s.num_candidates, s.max_new_tokens)
        self._rows = torch.arange(len(prompts.tokens) * s.num_candidates, device=device)  # that still grow
        shape = s.max_new_tokens, len(self._rows)
        self._uniforms = torch.zeros(shape, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._log_p, self._log_q = torch.zeros(2, *shape, device=device)
        self._lengths = torch.zeros(shape[1], dtype=torch.int64, device=device)
        self._running = torch.zeros(shape[1], dtype=torch.bool, device=device)
        self._ids = torch.zeros_like(self._lengths)  # drawn last, one per row that still grows
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        captures = device.type == "cuda" and isinstance(self._cache, SharedPromptCache)
        self._graphs = _Graphs(captures, model.name)

    def suits(self, prompts: Prompts) -> bool:
        """Whether it can draw candidates of these, too."""
        return isinstance(self._cache, SharedPromptCache) and self._cache.suits(prompts)

    def run(self, model: Twin, prompts: Prompts, seed: int) -> None:
        s, device = self._proposal.settings, self._slot.device
        self._prompts = prompts
        self._cache.load(model, prompts)
        # Drawn on the host, so that a seed means the same on every device.
        generator = torch.Generator().manual_seed(seed)
        self._uniforms.copy_(torch.rand(self._uniforms.shape, generator=generator, dtype=torch.float64))
        for buffer in (self._tokens, self._log_p, self._log_q, self._lengths, self._slot):
            buffer.zero_()
        self._running.fill_(True)
        self._draw(prompts.logits.repeat_interleave(s.num_candidates, dim=0), s.min_new_tokens > 0)
        for slot in range(s.max_new_tokens - 1):
            if slot % LOOK_EVERY.get(device.type, 1) == 0 and not self._go_on():
                break
            self._graphs.take(self._step, self._cache.window(slot), slot + 1 < s.min_new_tokens)

    def candidates(self) -> Candidates:
        """Those drawn."""
        tokens, log_p, log_q = (x.T.contiguous() for x in (self._tokens, self._log_p, self._log_q))
        prompts, detokenize = self._prompts.tokens, self._proposal.detokenize
        return Candidates(tokens, self._lengths.clone(), log_p, log_q, prompts, detokenize)

    def _go_on(self) -> bool:
        """Whether any candidate still grows; on the CPU, those that don't cost time, and are dropped from the batch."""
        grows = self._running[self._rows].view(len(self._prompts.tokens), -1)
        most = int(grows.sum(1).max())
        m = grows.shape[1]
        if self._slot.device.type == "cpu" and 0 < most <= (1 - DROP_ABOVE) * m:
            # Of each prompt as many: those that grow come first, then some that have ended.
            order = (~grows).long().argsort(dim=1, stable=True)[:, :most]
            kept = (torch.arange(len(grows))[:, None] * m + order).flatten()
            self._cache.keep(kept)
            self._rows, self._ids = self._rows[kept], self._ids[kept]
        return most > 0

    def _step(self, window: int, below_minimum: bool) -> None:
        logits = self._cache.step(self._ids, self._slot, window)
        self._slot += 1
        self._draw(logits, below_minimum)

    def _draw(self, logits: Tensor, below_minimum: bool) -> None:
        """Draw the token at position `slot` of each row."""
        at = (self._slot, self._rows)
        ids, log_p, log_q = self._proposal.draw(logits, len(logits) if below_minimum else 0, self._uniforms[at])
        running, ended = self._running[self._rows], self._proposal.is_eos(ids)
        self._tokens[at] = ids.where(running, 0)
        self._log_p[at], self._log_q[at] = log_p.where(running, 0), log_q.where(running, 0)
        counted = running if self._proposal.settings.count_eos else running & ~ended
        self._lengths[self._rows] += counted
        self._running[self._rows] = running & ~ended
        self._ids.copy_(ids)


class _Graphs:
    """Steps captured in CUDA graphs, one for each pair of a step's arguments, and replayed."""

    def __init__(self, captures: bool, model: str) -> None:
        self.captures, self._model = captures, model
        self._recorded: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    def take(self, step: Callable[[int, bool], None], window: int, below_minimum: bool) -> None:
        """Replay the step, or take it; the first of its kind is captured for those that follow."""
        if (graph := self._recorded.get((window, below_minimum))) is not None:
            graph.replay()
        elif self.captures:
            self._capture(step, window, below_minimum)
        else:
            step(window, below_minimum)

    def _capture(self, step: Callable[[int, bool], None], window: int, below_minimum: bool) -> None:
        """Take one step, which also warms up what must not start inside a capture, then record the next ones."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(window, below_minimum)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step(window, below_minimum)
        except RuntimeError as error:
            self.captures = False
            warnings.warn(
                f"a step of {self._model} can't be captured in a CUDA graph ({str(error).splitlines()[0]}): it runs "
                "without one, to the same result but slower",
                stacklevel=2,
            )
        else:
            self._recorded[window, below_minimum] = graph
