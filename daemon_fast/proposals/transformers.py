"""Candidates from any Transformers causal language model.

The prompt is processed once per prefix and its key-value cache expanded to M rows (Transformers' own `generate`
repeats the prompt M times). Log-probabilities are gathered step by step, so that no [steps, M, V] logits exist.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper

from daemon_fast import ops
from daemon_fast.candidates import Candidates
from daemon_fast.errors import InvalidInput
from daemon_fast.models import DEFAULT_MODEL, load_language_model
from daemon_fast.proposals import Prefix, ProposalSettings, vocabulary_fingerprint

__all__ = ["TransformersProposal"]

CDF_BLOCK = 256  # ids whose probabilities are summed before one of them is picked
SCORE_TOKENS = 1024  # positions whose logits [positions, V] `score` holds at a time


class TransformersProposal:
    """Draws candidates from a Transformers causal LM.

    Parameters
    ----------
    model : a causal LM in evaluation mode, on its device
    tokenizer : its tokenizer, or None if prefixes are given as token ids (then there are no texts)
    name : recorded in artefacts; default: the model's own
    eos_token_ids : default: those of the model's generation config, or the tokenizer's
    **settings : the fields of `ProposalSettings`

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
        name: str | None = None,
        eos_token_ids: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        vocabulary = vocabulary_fingerprint(tokenizer) if tokenizer is not None else str(model.config.vocab_size)
        self.settings = ProposalSettings(model=name or model.config._name_or_path, vocabulary=vocabulary, **settings)
        eos = _eos_token_ids(model, tokenizer) if eos_token_ids is None else list(eos_token_ids)
        self._eos = torch.tensor(eos, dtype=torch.int64, device=model.device)
        self._truncate = [TopKLogitsWarper(self.settings.top_k)] if self.settings.top_k else []
        if self.settings.top_p < 1:
            self._truncate.append(TopPLogitsWarper(self.settings.top_p))

    @classmethod
    def load(
        cls,
        reference: str = DEFAULT_MODEL,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> TransformersProposal:
        """From a Hugging Face id, folder, GGUF file or embedded name; see `daemon_fast.models`."""
        model, tokenizer = load_language_model(reference, device, dtype)
        return cls(model, tokenizer, name=reference, **settings)

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
        if len(prefixes) == 0:
            raise InvalidInput("there are no prefixes")
        if any(isinstance(prefix, str) for prefix in prefixes) and self.tokenizer is None:
            raise InvalidInput("a prefix is a string, and this proposal was made without a tokenizer: give token ids")
        rows = [self.tokenizer(p)["input_ids"] if isinstance(p, str) else [int(i) for i in p] for p in prefixes]
        context, new = getattr(self.model.config, "max_position_embeddings", None), self.settings.max_new_tokens
        for i, row in enumerate(rows):
            if not row:
                raise InvalidInput(f"prefix {i} is empty: a language model needs at least one token to continue")
            if context is not None and len(row) + new > context:
                raise InvalidInput(
                    f"prefix {i} has {len(row)} tokens; with max_new_tokens = {new} it exceeds the model's context "
                    f"of {context}"
                )
            size = self.model.config.vocab_size
            if bad := [token for token in row if not 0 <= token < size]:
                raise InvalidInput(f"prefix {i} has token {bad[0]}, outside the vocabulary of {size}")
        return rows

    @torch.inference_mode()
    def propose(self, prefixes: Sequence[Prefix], seed: int) -> Candidates:
        """M candidates of each prefix, all prefixes in one batch; shorter prefixes are padded on the left.

        Raises
        ------
        InvalidInput
            No prefixes, an empty one, or one too long for the model's context.
        """
        prefix_tokens, s, device = self.tokenize(prefixes), self.settings, self.model.device
        generator = torch.Generator(device).manual_seed(seed)
        rollout = _Rollout(self.model, prefix_tokens, s.num_candidates)

        rows = len(prefix_tokens) * s.num_candidates
        tokens = torch.zeros(rows, s.max_new_tokens, dtype=torch.int64, device=device)
        log_p, log_q = torch.zeros(2, rows, s.max_new_tokens, device=device)
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        running = torch.ones(rows, dtype=torch.bool, device=device)
        for t in range(s.max_new_tokens):
            ids, step_p, step_q = self._draw(rollout.logits, rows if t < s.min_new_tokens else 0, generator)
            ended = torch.isin(ids, self._eos)
            tokens[:, t] = ids.where(running, 0)
            log_p[:, t], log_q[:, t] = step_p.where(running, 0), step_q.where(running, 0)
            lengths += running if s.count_eos else running & ~ended
            running &= ~ended
            if t + 1 == s.max_new_tokens or not running.any():
                break
            rollout.step(ids)
        return Candidates(tokens, lengths, log_p, log_q, prefix_tokens, self.detokenize)

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
        """
        prefix_tokens = [list(map(int, prefix)) for prefix in prefixes]
        rows = [p + list(map(int, c)) for p, c in zip(prefix_tokens, continuations, strict=True)]
        lengths = torch.tensor([len(c) for c in continuations])
        shape = len(rows), int(lengths.max())
        tokens, log_p, log_q = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), torch.zeros(shape)
        batch_size = max(1, SCORE_TOKENS // max(map(len, rows)))
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            # Padding on the right is invisible to a causal model.
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], batch_first=True)
            logits = self.model(padded.to(self.model.device), use_cache=False).logits
            for i, row in enumerate(batch, begin):
                n, start = len(continuations[i]), len(prefix_tokens[i])
                ids = torch.tensor(row[start:], device=self.model.device)
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

    def _draw(self, logits: Tensor, without_eos: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """[R] ids drawn from the proposal, and their log p and log q."""
        scores = self._scores(logits, without_eos)
        probabilities = torch.softmax(logits / self.settings.temperature if scores is None else scores, dim=-1)
        uniforms = torch.rand(len(logits), generator=generator, device=logits.device, dtype=torch.float64)
        ids = _inverse_cdf(probabilities, uniforms)
        return ids, *self._log_probs(logits, scores, ids)


class _Rollout:
    """The model's state while M candidates of each prefix grow, one token a step."""

    def __init__(self, model: Any, prefix_tokens: list[list[int]], num_candidates: int) -> None:
        self._model = model
        accepted = inspect.signature(model.forward).parameters
        self._positioned = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

        device, width = model.device, max(map(len, prefix_tokens))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prefix_tokens], device=device)
        pads = torch.tensor([width - len(p) for p in prefix_tokens], device=device)
        # Without padding there is no mask, which lets the attention take its fastest path.
        self._mask = (torch.arange(width, device=device) >= pads[:, None]).long() if pads.any() else None
        self._position = torch.arange(width, device=device) - pads[:, None]
        self._cache = DynamicCache(config=model.config)
        logits = self._forward(ids, self._position.clamp_min(0))

        if not hasattr(self._cache, "batch_repeat_interleave"):
            raise InvalidInput(f"the cache of {type(model).__name__} can't be expanded to several candidates")
        self._cache.batch_repeat_interleave(num_candidates)
        self._mask = None if self._mask is None else self._mask.repeat_interleave(num_candidates, dim=0)
        self._position = self._position[:, -1:].repeat_interleave(num_candidates, dim=0)
        self.logits = logits.repeat_interleave(num_candidates, dim=0)  # [R, V] float32

    def step(self, ids: Tensor) -> None:
        """Append one token [R] to each candidate."""
        self._position = self._position + 1
        if self._mask is not None:
            self._mask = F.pad(self._mask, (0, 1), value=1)
        self.logits = self._forward(ids[:, None], self._position)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        options: dict[str, Any] = dict(self._last_only)
        if self._positioned:
            options["position_ids"] = positions
        if self._mask is not None:
            options["attention_mask"] = self._mask
        out = self._model(ids, past_key_values=self._cache, use_cache=True, **options)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[:, -1].float()
        return logits


def _inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """[R] indices drawn from rows of probabilities [R, V] by one uniform [R] each.

    In two levels, blocks and then ids of one block: a running sum over all of V costs ten times as much.
    """
    rows, v = probabilities.shape
    if v % CDF_BLOCK:
        probabilities = F.pad(probabilities, (0, -v % CDF_BLOCK))
    blocks = probabilities.view(rows, -1, CDF_BLOCK)
    mass = blocks.sum(-1).double()
    cumulative = mass.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, target, mass)
    inside = blocks[torch.arange(rows, device=blocks.device), block].double()
    target = target - (cumulative - mass).gather(1, block[:, None])
    return block * CDF_BLOCK + _first_above(inside.cumsum(-1), target, inside)


def _first_above(cumulative: Tensor, target: Tensor, mass: Tensor) -> Tensor:
    """[R] first index whose cumulative mass exceeds the target; rounding can't lead to one without mass."""
    index = torch.searchsorted(cumulative, target, right=True)
    positions = torch.arange(mass.shape[1], device=mass.device)
    last = positions.where(mass > 0, 0).amax(1, keepdim=True)
    return index.minimum(last)[:, 0]


def _eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        ids = getattr(tokenizer, "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
