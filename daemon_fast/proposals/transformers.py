"""Candidates from any Transformers causal language model.

`daemon_fast.proposals.prompt_cache` runs the model; here tokens are drawn from its logits. Their log-probabilities are
gathered step by step, so that no [steps, M, V] logits exist.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from daemon_fast import ops, stop
from daemon_fast.errors import InvalidInput
from daemon_fast.memory import available, check_candidates
from daemon_fast.models import DEFAULT_MODEL, load_language_model
from daemon_fast.proposals import base
from daemon_fast.proposals.base import (
    Prefix,
    ProposalSettings,
    ends,
    given_rows,
    seed_of_each,
    tokenize,
    vocabulary_fingerprint,
)
from daemon_fast.proposals.candidates import Candidates
from daemon_fast.proposals.prompt_cache import Prompts, SharedPromptCache, bytes_of, cache_for, process, way_of
from daemon_fast.proposals.twin import Twin, context_of, rope_switch, text_config, unwrapped

__all__ = ["TransformersProposal"]

SCORE_LOGITS = {"cpu": 2**26, "cuda": 2**29}  # that `score` holds at a time, of all tokens of as many texts as it can
# Steps between two looks at which candidates go on: on CUDA a look waits for the device.
LOOK_EVERY = {"cpu": 1, "cuda": 16}
KEPT = 4  # batches that are kept on CUDA, with their buffers and captured steps
DROP_ABOVE = 0.25  # share of rows that must have ended before the others are moved together


class TransformersProposal:
    """Draws candidates from a Transformers causal LM.

    Parameters
    ----------
    model : a causal LM of Transformers, on its device; also inside torch.compile, PEFT's adapters and the like. It is
        used in evaluation mode, without gradient checkpointing, and left as it is.
    tokenizer : its tokenizer, or None if prefixes are given as token ids (then there are no texts)
    model_id : recorded in artefacts; default: the model's own
    eos_token_ids : default: those of the model's generation config, or the tokenizer's; and the one by which its chat
        template ends an answer
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
        eos_token_ids: int | Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        size = text_config(model).vocab_size
        vocabulary = vocabulary_fingerprint(tokenizer) if tokenizer is not None else str(size)
        self.settings = ProposalSettings(model_id or unwrapped(model).config._name_or_path, vocabulary, **settings)
        if eos_token_ids is None:
            configured = getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
            eos_token_ids = base.eos_token_ids(configured, tokenizer)
        self.eos_token_ids = base.some_token_ids(eos_token_ids, "eos_token_ids")
        if bad := [i for i in self.eos_token_ids if not 0 <= i < size]:
            raise InvalidInput(f"eos_token_ids has {bad[0]}: it must be token ids from 0 to {size - 1}")
        self._sampler = _Sampler(self.settings, self.eos_token_ids)
        self.path: str | None = None
        self._kept: list[_Batch] = []  # of earlier calls, none of which is drawing; the one used last is the last

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
            _check_switch(switch, i, len(row), most, f"max_new_tokens = {most}")
        return rows

    def propose(self, prefixes: Sequence[Prefix], seed: int | Sequence[int]) -> Candidates:
        """M candidates of each prefix, all prefixes in one batch; in two if rotary embeddings change with the length
        (LongRoPE) and prefixes lie on both sides. The model runs in the dtype of its weights: autocast is off for it.

        Nothing is kept from call to call that the model's weights decide. On CUDA a step is captured in a graph, which
        serves later calls of about the same shape (as long prompts once they are padded, half as many or more) for as
        long as the model is the same one, in the same state. Four shapes are kept, with their buffers; calls at a time
        of several threads have one each.

        Parameters
        ----------
        prefixes : N strings, lists of token ids or chats
        seed : of all random numbers, from 0 to 2^63 - 1; the same seed gives the same ones again. Or N seeds, one of
            each prefix: it gets the random numbers that it would get alone. Its candidates are those then, too, but
            where a logit that was rounded otherwise in the larger batch turns a draw.

        Raises
        ------
        InvalidInput
            No prefixes, an empty one, one too long for the model's context; a model that is no causal LM, or whose
            logits leave nothing to draw; not as many seeds as prefixes.
        """
        tokens = self.tokenize(prefixes)
        each = [own for own, _ in seed_of_each(seed, len(tokens))]
        with torch.inference_mode():
            drawn = self._draw(tokens, each if isinstance(seed, Sequence) else each[:1])
        # Made outside of inference mode, they may stand in a graph of gradients.
        ids, lengths, log_p, log_q, ended = (x.clone() for x in drawn)
        return Candidates(ids, lengths, log_p, log_q, tokens, self.detokenize, ended)

    def _draw(self, tokens: list[list[int]], seeds: list[int]) -> tuple[Tensor, ...]:
        """See `_Batch.run`."""
        model = Twin(self.model)
        self.path = way_of(model)
        sides = _sides(model, tokens)
        if len(sides) == 1:
            return self._draw_together(model, tokens, seeds)
        if len(seeds) == 1:
            generator = torch.Generator().manual_seed(seeds[0])
            seeds = torch.randint(2**63 - 1, (len(tokens),), generator=generator, device="cpu").tolist()
        parts = [self._draw_together(model, [tokens[i] for i in side], [seeds[i] for i in side]) for side in sides]
        order = torch.tensor([i for side in sides for i in side], device=model.device).argsort()
        joined = [torch.cat(columns) for columns in zip(*parts, strict=True)]
        return tuple(x.view(len(tokens), -1, *x.shape[1:])[order].flatten(0, 1) for x in joined)

    def _draw_together(self, model: Twin, tokens: list[list[int]], seeds: list[int]) -> tuple[Tensor, ...]:
        prompts = process(model, tokens, cached=self.path != "recomputed")
        state = model.state() if model.device.type == "cuda" else None
        batch = self._kept_for(prompts, state)
        if batch is None:
            self._make_room(model, prompts)
            batch = _Batch(self._sampler, model, prompts, state)
        keeps = batch.graphs is not None
        try:
            return batch.run(model, prompts, seeds)
        except InvalidInput:
            keeps = False  # NaN may be left in its buffers, where a mask hides nothing of it
            raise
        finally:
            if keeps:
                self._kept.append(batch)

    def _kept_for(self, prompts: Prompts, state: int | None) -> _Batch | None:
        """A kept batch, which is this call's alone from here on; those of a model that has changed are dropped."""
        for batch in reversed([*self._kept]):
            if batch.state != state:
                self._take(batch)
            elif batch.suits(prompts) and self._take(batch):
                return batch
        return None

    def _make_room(self, model: Twin, prompts: Prompts) -> None:
        """Before a batch is made: drop those used longest ago, if there are too many or it would take more than half of
        the memory that is there.
        """
        if not self._kept:
            return
        needed = 2 * sum(bytes_of(model, prompts, self.settings.num_candidates, self.settings.max_new_tokens).values())
        # No name may hold one that is dropped, or it would not be freed before the memory is asked for again.
        while len(self._kept) >= KEPT or (self._kept and needed > (available(model.device) or 0)):
            with contextlib.suppress(IndexError):  # another thread has taken it
                del self._kept[0]

    def _take(self, batch: _Batch) -> bool:
        """Whether it was there still: another thread may have taken it."""
        with contextlib.suppress(ValueError):
            self._kept.remove(batch)
            return True
        return False

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> Candidates:
        """Given continuations, one of each prefix, with the log-probabilities that the model gives them (M = 1).

        Parameters
        ----------
        prefixes, continuations : N lists of token ids each, none empty; a continuation that ended has the end-of-text
            token as its last, which counts towards its length as it does for candidates

        Returns
        -------
        Candidates
            `token_log_q` is what the proposal would give: -inf for a token that it can't draw.

        Raises
        ------
        InvalidInput
            None, an empty one, a token outside the vocabulary, a text too long for the model's context; or a model that
            is no causal LM.
        """
        model = Twin(self.model)
        way_of(model)  # refuses what is no causal language model
        size = model.config.vocab_size
        prefix_tokens, continuations = given_rows(prefixes, continuations, size)
        rows = [p + c for p, c in zip(prefix_tokens, continuations, strict=True)]
        for i, (prefix, row) in enumerate(zip(prefix_tokens, rows, strict=True)):
            added = f"its continuation of {len(row) - len(prefix)}"
            if model.context is not None and len(row) > model.context:
                raise InvalidInput(
                    f"prefix {i} has {len(prefix)} tokens; with {added} it exceeds the model's context of "
                    f"{model.context}"
                )
            _check_switch(model.rope_switch, i, len(prefix), len(row) - len(prefix), added)
        ended, lengths = ends(continuations, self.eos_token_ids, self.settings.count_eos)
        shape = len(rows), max(map(len, continuations))
        tokens = torch.zeros(shape, dtype=torch.int64, device="cpu")
        log_p, log_q = (torch.zeros(shape, dtype=torch.float32, device="cpu") for _ in range(2))
        sampler = self._sampler.on(model.device)
        together = SCORE_LOGITS.get(model.device.type, SCORE_LOGITS["cpu"])
        batch_size = max(1, together // (size * max(map(len, rows))))
        sides = _sides(model, rows)
        for batch in (side[i : i + batch_size] for side in sides for i in range(0, len(side), batch_size)):
            # Padding on the right is invisible to a causal model.
            texts = [torch.tensor(rows[i], device="cpu") for i in batch]
            padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
            with torch.inference_mode():
                logits = model.plain(padded.to(model.device))
                for i, of_text in zip(batch, logits, strict=True):
                    n, start = len(continuations[i]), len(prefix_tokens[i])
                    ids = torch.tensor(rows[i][start:], device=model.device)
                    own = of_text[start - 1 : start - 1 + n].float()
                    step_p, step_q = sampler.log_probs(own, min(n, self.settings.min_new_tokens), ids)
                    tokens[i, :n], log_p[i, :n], log_q[i, :n] = ids.cpu(), step_p.cpu(), step_q.cpu()
        return Candidates(tokens, lengths, log_p, log_q, prefix_tokens, self.detokenize, ended)


def _check_switch(switch: int | None, i: int, length: int, added: int, named: str) -> None:
    """Refuse a prefix of this length that rotary embeddings change behind: see `rope_switch`."""
    if switch is not None and length <= switch < length + added:
        raise InvalidInput(
            f"prefix {i} has {length} tokens; with {named} it passes {switch}, from where on this model's rotary "
            "embeddings change, also for the tokens before: no text across that has one probability"
        )


def _sides(model: Twin, rows: list[list[int]]) -> list[list[int]]:
    """Places of what can be run in one batch, whose longest text decides on rotary embeddings: see `rope_switch`."""
    long = [model.rope_switch is not None and len(row) > model.rope_switch for row in rows]
    sides = ([i for i, own in enumerate(long) if own == side] for side in (False, True))
    return [side for side in sides if side]


class _Sampler:
    """Draws tokens from a model's logits, as the settings say."""

    def __init__(self, settings: ProposalSettings, eos: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.settings = settings
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self._truncate = [TopKLogitsWarper(settings.top_k)] if settings.top_k else []
        if settings.top_p < 1:
            self._truncate.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p > 0:
            self._truncate.append(MinPLogitsWarper(settings.min_p))

    def on(self, device: torch.device) -> _Sampler:
        return _Sampler(self.settings, self.eos.tolist(), device)

    def _scores(self, logits: Tensor, without_eos: int) -> tuple[Tensor, float]:
        """[R, V] logits that the proposal draws from, and the temperature at which it does.

        The first `without_eos` rows lie below the minimum length.
        """
        scores, temperature = logits, self.settings.temperature
        if without_eos:
            scores = scores.clone()
            # Assigned by an index, the number would be copied from the host, which waits and can't be captured.
            scores[:without_eos].index_fill_(1, self.eos, -torch.inf)
        if self._truncate:
            scores, temperature = scores.float() / temperature, 1.0
            for warper in self._truncate:
                scores = warper(None, scores)
        return scores, temperature

    def log_probs(self, logits: Tensor, without_eos: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[R] log p of ids [R] at temperature 1, and log q under the proposal."""
        scores, temperature = self._scores(logits, without_eos)
        log_p, log_q = ops.token_logprobs(scores, ids, temperature)
        return (log_p if scores is logits else ops.token_logprobs(logits, ids).log_p), log_q

    def draw(self, logits: Tensor, without_eos: int, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[R] ids drawn from logits [R, V] by one uniform each [R] float64, and their log p and log q."""
        scores, temperature = self._scores(logits, without_eos)
        ids, log_p, log_q = ops.sample_tokens(scores, uniforms, temperature)
        return ids, (log_p if scores is logits else ops.token_logprobs(logits, ids).log_p), log_q


class _Batch:
    """M candidates of each of N prompts while they are drawn: buffers of fixed address, and the step that fills them.

    Nothing in a step waits for the device, and a step reads nothing that only the host knows: on CUDA it is captured
    in a graph and replayed.
    """

    def __init__(self, sampler: _Sampler, model: Twin, prompts: Prompts, state: int | None = None) -> None:
        s, device = sampler.settings, model.device
        self._sampler, self.state = sampler.on(device), state
        self._num_prompts = len(prompts.tokens)
        check_candidates(s, self._num_prompts, device, **bytes_of(model, prompts, s.num_candidates, s.max_new_tokens))
        self._cache = cache_for(model, prompts, s.num_candidates, s.max_new_tokens)
        self._rows = torch.arange(self._num_prompts * s.num_candidates, device=device)  # that still grow
        shape = s.max_new_tokens, len(self._rows)
        self._uniforms = torch.zeros(shape, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._log_p, self._log_q = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        self._lengths = torch.zeros(shape[1], dtype=torch.int64, device=device)
        self._running = torch.zeros(shape[1], dtype=torch.bool, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)  # of the tokens drawn last
        self.graphs = _Graphs(model) if device.type == "cuda" and isinstance(self._cache, SharedPromptCache) else None

    def suits(self, prompts: Prompts) -> bool:
        """Whether it can draw candidates of these, too."""
        return isinstance(self._cache, SharedPromptCache) and self._cache.suits(prompts)

    def run(self, model: Twin, prompts: Prompts, seeds: Sequence[int]) -> tuple[Tensor, ...]:
        """Tokens [R, T], lengths [R], log p and log q [R, T] of what it draws; and which [R] have ended.

        Parameters
        ----------
        seeds : one of all prompts, or one of each
        """
        s, device = self._sampler.settings, self._slot.device
        self._cache.load(model, prompts)
        n = len(prompts.tokens)
        rows = n * s.num_candidates  # others, of a batch made for more prompts, have ended before they begin
        # Drawn on the host, so that a seed means the same on every device.
        shape = s.max_new_tokens, rows // len(seeds)
        generators = [torch.Generator().manual_seed(own) for own in seeds]
        each = [torch.rand(shape, generator=g, dtype=torch.float64, device="cpu") for g in generators]
        self._uniforms[:, :rows] = torch.cat(each, 1).to(device)
        for buffer in (self._tokens, self._log_p, self._log_q, self._lengths, self._slot):
            buffer.zero_()
        self._running.fill_(False)
        self._running[:rows] = True
        wanted = stop.current()
        own_or_last = torch.arange(self._num_prompts, device=device).clamp_max_(n - 1)
        self._draw(prompts.logits[own_or_last].repeat_interleave(s.num_candidates, dim=0), s.min_new_tokens > 0)
        for slot in range(s.max_new_tokens - 1):
            wanted.check()
            if slot % LOOK_EVERY.get(device.type, 1) == 0 and not self._go_on():
                break
            window, below_minimum = self._cache.window(slot), slot + 1 < s.min_new_tokens
            if self.graphs is None:
                self._step(window, below_minimum)
            else:
                self.graphs.take(self._step, window, below_minimum)
        if device.type != "cpu":
            self._check_drawn(rows)
        # Copies: another thread may take the batch as soon as this call is through.
        tokens, log_p, log_q = (
            x[:, :rows].T.clone(memory_format=torch.contiguous_format) for x in (self._tokens, self._log_p, self._log_q)
        )
        return tokens, self._lengths[:rows].clone(), log_p, log_q, ~self._running[:rows]

    def _check_drawn(self, rows: int) -> None:
        """On the CPU `sample_tokens` itself raises; elsewhere it can only mark what it drew."""
        if len(bad := self._log_p[:, :rows].isnan().any(0).nonzero()):
            raise self._nothing_to_draw(int(bad[0]))

    def _nothing_to_draw(self, row: int, below_minimum: bool = False) -> InvalidInput:
        m, shortest = self._sampler.settings.num_candidates, self._sampler.settings.min_new_tokens
        least = f" (min_new_tokens = {shortest} leaves out end-of-text tokens)" if below_minimum else ""
        return InvalidInput(
            f"prefix {row // m}: the logits behind its candidate {row % m} are all -inf, or hold NaN or +inf{least}"
        )

    def _go_on(self) -> bool:
        """Whether any candidate still grows; on the CPU, those that don't cost time, and are dropped from the batch."""
        grows = self._running[self._rows].view(self._num_prompts, -1)
        most = int(grows.sum(1).max())
        m = grows.shape[1]
        if self._slot.device.type == "cpu" and 0 < most <= (1 - DROP_ABOVE) * m:
            # Of each prompt as many: those that grow come first, then some that have ended.
            order = (~grows).long().argsort(dim=1, stable=True)[:, :most]
            kept = (torch.arange(len(grows), device="cpu")[:, None] * m + order).flatten()
            self._cache.keep(kept)
            self._rows = self._rows[kept]
        return most > 0

    def _step(self, window: int, below_minimum: bool) -> None:
        logits = self._cache.step(self._tokens[self._slot, self._rows], self._slot, window)
        self._slot += 1
        self._draw(logits, below_minimum)

    def _draw(self, logits: Tensor, below_minimum: bool) -> None:
        """Draw the token at position `slot` of each row."""
        uniforms = self._uniforms[self._slot, self._rows]
        try:
            ids, log_p, log_q = self._sampler.draw(logits, len(logits) if below_minimum else 0, uniforms)
        except RuntimeError as error:
            if (told := re.match(r"sample_tokens: logits\[(\d+)\] are all -inf", str(error))) is None:
                raise
            raise self._nothing_to_draw(int(self._rows[int(told[1])]), below_minimum) from error
        ops.append_tokens(
            self._tokens, self._log_p, self._log_q, self._lengths, self._running, ids=ids, ids_log_p=log_p,
            ids_log_q=log_q, slot=self._slot, rows=self._rows, eos=self._sampler.eos,
            count_eos=self._sampler.settings.count_eos,
        )  # fmt: skip


# Of each model of which a step could not be captured: what it was then, and why.
_uncapturable: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()
# Graphs whose capture failed: torch's allocator of pinned memory goes on asking them whether a capture is theirs.
_failed: list[Any] = []


class _Graphs:
    """Steps captured in CUDA graphs, one for each pair of a step's arguments, and replayed. All share one memory pool:
    they run one after the other, and leave nothing in it.

    Attributes
    ----------
    recorded : window, whether below the minimum length -> graph
    why_not : what can't be captured, and so runs without; else None
    """

    def __init__(self, model: Twin) -> None:
        self._model, self._name, self._structure = ref(model.model), model.name, model.structure
        found = _uncapturable.get(model.model)
        self.why_not = found[1] if found is not None and found[0] == self._structure else None
        self.recorded: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def take(self, step: Callable[[int, bool], None], window: int, below_minimum: bool) -> None:
        """Replay the step, or take it; the first of its kind is captured for those that follow."""
        if (graph := self.recorded.get((window, below_minimum))) is not None:
            graph.replay()
        elif self.why_not is None:
            self._take_and_capture(step, window, below_minimum)
        else:
            step(window, below_minimum)

    def _take_and_capture(self, step: Callable[[int, bool], None], window: int, below_minimum: bool) -> None:
        """Take one step, which also warms up what must not start inside a capture, then record the next ones."""
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                step(window, below_minimum)
                self.recorded[window, below_minimum] = _captured(lambda: step(window, below_minimum), self._pool)
        except _CaptureFailed as failed:
            self.why_not = str(failed)
            if (model := self._model()) is not None:
                _uncapturable[model] = self._structure, self.why_not
            warnings.warn(
                f"a step of {self._name} can't be captured in a CUDA graph ({self.why_not}): it runs without one, to "
                "the same result but slower",
                stacklevel=2,
            )
        except BaseException:  # an interrupt: a later call may capture, but not in a pool that was given back
            self._pool = torch.cuda.graph_pool_handle()
            raise
        finally:
            torch.cuda.current_stream().wait_stream(stream)


class _CaptureFailed(Exception):
    """Says why."""


def _captured(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """A graph of what `run` launches on the current stream, which must not be the default one.

    As `torch.cuda.graph`, which after a failure leaves its stream current and the allocator in its pool, and raises
    what comes of the failure in place of what it was.

    Raises
    ------
    _CaptureFailed
        Torch is as it was before.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what is cached can't be used inside a capture
    graph = torch.cuda.CUDAGraph()
    # By default another thread's allocation would break the capture, or be broken by it.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        run()
        graph.capture_end()
    except Exception as error:
        _abandon(graph, pool)
        said = " ".join(str(error).split())[:300]
        raise _CaptureFailed(f"{type(error).__name__}: {said}") from error
    except BaseException:
        _abandon(graph, pool)
        raise
    return graph


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Bring a capture to an end in which something failed."""
    with contextlib.suppress(RuntimeError):
        graph.capture_end()  # raises again, and stops half-way, if the capture itself is broken
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    graph.reset()
    _failed.append(graph)
    # Before torch 2.12, CUDA's generator gives no numbers after a failed capture until another has succeeded: one with
    # memory of its own, as the failed one may have given back the pool's.
    with contextlib.suppress(RuntimeError):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device="cuda")
        graph.capture_end()
