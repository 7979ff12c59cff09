"""The model's side of drawing candidates: prompts processed once, then M candidates of each grown a token a step.

Transformers' `generate` repeats a prompt M times, prompt processing and key-value cache alike. Here the prompt is
processed once, the M candidates read one copy of its keys and values, and what they add is written into buffers whose
address and size never change.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from daemon_fast.errors import InvalidInput

__all__ = ["GrowingPromptCache", "Prompts", "SharedPromptCache", "cache_for", "process"]

# From how many prompt tokens on the M candidates read the prompt's keys and values in place rather than each its own
# copy. On a CPU sharing halves a step at 512 tokens and costs 0 to 3% at 32. On CUDA it takes ten small kernels in
# place of one, which about 512 tokens should repay: reckoned from bytes and launches, not measured.
SHARE_FROM = {"cpu": 0, "cuda": 512}
# On CUDA a step is captured in a graph, and so made for fixed sizes: prompts are padded to a multiple, and attention
# looks at the next of a few windows. On a CPU both are exact.
PROMPT_MULTIPLE = 64
SMALLEST_WINDOW = 64
TRIAL = [[1, 2, 3], [4]]
# Of the largest logit: two attention kernels agree to 1e-6 in float32 and to 1e-2 in 16 bits.
TRIAL_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}


@dataclass(frozen=True)
class Prompts:
    """N prompts, processed.

    Attributes
    ----------
    tokens : N lists of token ids
    logits : [N, V] float32
        Of the token that follows each prompt.
    cache : the model's own, of N rows
        Prompts shorter than the longest, P tokens, are padded on the left.
    lengths : [N] int64
    """

    tokens: list[list[int]]
    logits: Tensor
    cache: Any
    lengths: Tensor

    @property
    def width(self) -> int:
        """P"""
        return max(map(len, self.tokens))


def process(model: Any, tokens: list[list[int]]) -> Prompts:
    """Run the model over each prompt once, all in one batch."""
    width, device = max(map(len, tokens)), model.device
    ids = torch.tensor([[0] * (width - len(row)) + row for row in tokens], device=device)
    lengths = torch.tensor([len(row) for row in tokens], device=device)
    # Without padding there is no mask, which lets the attention take its fastest path.
    padded = any(len(row) < width for row in tokens)
    mask = _not_padding(lengths, width) if padded else None
    positions = (torch.arange(width, device=device) - (width - lengths[:, None])).clamp_min(0)
    cache = DynamicCache(config=model.config)
    return Prompts(tokens, _forward(model, ids, positions, cache, mask), cache, lengths)


def _not_padding(lengths: Tensor, width: int) -> Tensor:
    """[N, width] bool of prompts padded on the left."""
    return torch.arange(width, device=lengths.device) >= width - lengths[:, None]


def _forward(model: Any, ids: Tensor, positions: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
    """[B, V] float32 logits behind the last of ids [B, T]."""
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    if "position_ids" in accepted:
        options["position_ids"] = positions
    if mask is not None:
        options["attention_mask"] = mask.long()
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True, **options).logits[:, -1].float()
    return logits


def cache_for(
    model: Any, prompts: Prompts, num_candidates: int, max_new_tokens: int
) -> SharedPromptCache | GrowingPromptCache:
    """What suits the model. One that our attention doesn't suit keeps its own, with a warning: same results, slower."""
    if model not in _unsuited:
        _unsuited[model] = _why_unsuited(model)
    if _unsuited[model] is None:
        return SharedPromptCache(model, prompts, num_candidates, max_new_tokens)
    warnings.warn(
        f"{type(model).__name__} {_unsuited[model]}: its candidates are drawn with the model's own growing cache, "
        "which gives the same results more slowly",
        stacklevel=4,
    )
    return GrowingPromptCache(model, prompts, num_candidates)


_unsuited: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def _why_unsuited(model: Any) -> str | None:
    """Found out once a model, by what it says of itself and by a trial of a few tokens."""
    if not getattr(model, "_supports_attention_backend", False):
        return "takes no attention function from outside"
    prompts = process(model, TRIAL)
    if other := sorted({type(layer).__name__ for layer in prompts.cache.layers if type(layer) is not DynamicLayer}):
        return f"has a cache that ours can't replace ({', '.join(other)})"
    ids, slot = (torch.zeros(n, dtype=torch.int64, device=model.device) for n in (2 * len(TRIAL), 1))
    logits = []
    try:
        for kind in (
            GrowingPromptCache(model, prompts, 2), SharedPromptCache(model, prompts, 2, 1, True),
            SharedPromptCache(model, prompts, 2, 1, False),
        ):  # fmt: skip
            kind.load(prompts)
            logits.append(kind.step(ids, slot, 1))
    except NotImplementedError as error:
        return f"needs {error}"
    want = logits[0]
    for got in logits[1:]:
        if float((got - want).abs().max()) > TRIAL_TOLERANCE.get(model.dtype, 0.05) * float(want.abs().max()):
            return "gives other logits with our attention than with its own"
    return None


class GrowingPromptCache:
    """For any model whose cache can be expanded: the prompt's is copied M times, and grows by concatenation."""

    def __init__(self, model: Any, prompts: Prompts, num_candidates: int) -> None:
        if not hasattr(prompts.cache, "batch_repeat_interleave"):
            raise InvalidInput(f"the cache of {type(model).__name__} can't be expanded to several candidates")
        self._model, self._num_candidates = model, num_candidates

    def load(self, prompts: Prompts) -> None:
        """See `SharedPromptCache.load`."""
        self._cache = copy.deepcopy(prompts.cache)
        self._cache.batch_repeat_interleave(self._num_candidates)
        self._start = prompts.lengths.repeat_interleave(self._num_candidates)[:, None]
        padded = any(len(row) < prompts.width for row in prompts.tokens)
        self._mask = _not_padding(self._start[:, 0], prompts.width) if padded else None

    def window(self, slot: int) -> int:
        """See `SharedPromptCache.window`."""
        return slot + 1

    def step(self, ids: Tensor, slot: Tensor, window: int) -> Tensor:
        """See `SharedPromptCache.step`."""
        if self._mask is not None:
            self._mask = F.pad(self._mask, (0, 1), value=True)
        return _forward(self._model, ids[:, None], self._start + slot, self._cache, self._mask)

    def keep(self, rows: Tensor) -> None:
        """See `SharedPromptCache.keep`."""
        self._cache.batch_select_indices(rows)
        self._start = self._start[rows]
        self._mask = None if self._mask is None else self._mask[rows]


class SharedPromptCache:
    """M candidates of each of N prompts, R = N * M rows, in buffers made once; no step waits for the device.

    Parameters
    ----------
    share : whether candidates read their prompt's keys and values in place; default: by `SHARE_FROM`
    exact : whether prompts and windows are as long as they are, or rounded up to few sizes; default: on the CPU
    """

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        num_candidates: int,
        max_new_tokens: int,
        share: bool | None = None,
        exact: bool | None = None,
    ) -> None:
        device = prompts.lengths.device
        self._model, self._num_candidates, self._num_prompts = model, num_candidates, len(prompts.tokens)
        self._exact = device.type == "cpu" if exact is None else exact
        self._width = _padded_width(prompts.width, self._exact)
        self.share = self._width >= SHARE_FROM.get(device.type, 0) if share is None else share
        self._slots_before = 0 if self.share else self._width
        self._layers = [
            _Layer(layer, self._num_prompts * num_candidates, self._slots_before + max_new_tokens)
            for layer in prompts.cache.layers
        ]
        self._cache = Cache(layers=self._layers)
        self._start = torch.zeros(self._num_prompts * num_candidates, 1, dtype=torch.int64, device=device)
        self._is_prompt = torch.zeros(self._num_prompts, self._width, dtype=torch.bool, device=device)
        # A captured step reads these by address: `load` fills them, and never replaces them.
        self._expanded = self._is_prompt.repeat_interleave(num_candidates, dim=0) if not self.share else None

    def suits(self, prompts: Prompts) -> bool:
        """Whether `load` can take them."""
        return len(prompts.tokens) == self._num_prompts and _padded_width(prompts.width, self._exact) == self._width

    def load(self, prompts: Prompts) -> None:
        """Begin with these prompts."""
        for layer, own in zip(prompts.cache.layers, self._layers, strict=True):
            if self.share:
                own.share(layer.keys, layer.values, self._width)
            else:
                own.copy(layer.keys, layer.values, self._width)
        self._start.copy_(prompts.lengths.repeat_interleave(self._num_candidates)[:, None])
        self._is_prompt.copy_(_not_padding(prompts.lengths, self._width))
        self._padded = not self._exact or any(len(row) < self._width for row in prompts.tokens)
        if self._expanded is not None:
            self._expanded.copy_(self._is_prompt.repeat_interleave(self._num_candidates, dim=0))

    def window(self, slot: int) -> int:
        """How many slots the attention of a step looks at."""
        if self._exact:
            return slot + 1
        return max(SMALLEST_WINDOW, 1 << slot.bit_length())

    def step(self, ids: Tensor, slot: Tensor, window: int) -> Tensor:
        """Append one token to each row.

        Parameters
        ----------
        ids : [R] int64
        slot : [1] int64
            How many tokens each row has had before.
        window : `self.window` of it

        Returns
        -------
        [R, V] float32 logits of the next token.
        """
        window = min(window, self._layers[0].capacity - self._slots_before)
        at, end = slot + self._slots_before, self._slots_before + window
        for layer in self._layers:
            layer.at, layer.end = at, end
        seen = None if self._exact else torch.arange(window, device=slot.device) <= slot  # [window]
        self._masks = self._shared_masks(seen) if self.share else (self._mask(seen), None)
        with self._attention():
            return _forward(self._model, ids[:, None], self._start + slot, self._cache, None)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, of each prompt as many."""
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self._start = self._start[rows]
        self._expanded = None if self._expanded is None else self._expanded[rows]

    def _mask(self, seen: Tensor | None) -> Tensor | None:
        """[R, 1, 1, P + window] bool, or None if everything is visible."""
        if seen is None and not self._padded:
            return None
        assert self._expanded is not None
        rows, end = len(self._expanded), self._layers[0].end
        own = torch.ones(end - self._width, dtype=torch.bool, device=self._start.device) if seen is None else seen
        return torch.cat([self._expanded, own.expand(rows, -1)], dim=1)[:, None, None]

    def _shared_masks(self, seen: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What to add to the scores: [N, 1, 1, P] of the prompt, [window] of what the candidates added."""
        prompt = _as_bias(self._is_prompt)[:, None, None] if self._padded else None
        return prompt, None if seen is None else _as_bias(seen)

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """Meanwhile the model's layers call `_attention_function` in place of their own attention."""
        config = self._model.config.get_text_config(decoder=True)
        before, token = config._attn_implementation, _active.set(self)
        config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = before
            _active.reset(token)

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """[R, 1, H, D] attention of query [R, H, 1, D] to keys and values [R, H', S, D]; H is a multiple of H'."""
        rows, heads, _, depth = query.shape
        groups = keys.shape[1]
        query = query.reshape(rows, groups, heads // groups, depth)
        first, own = self._masks
        if not self.share:
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=first, scale=scale)
            return out.reshape(rows, 1, heads, -1)

        n = self._num_prompts
        prompt_keys, prompt_values = self._layers[layer].prompt
        # All candidates' queries of a prompt at once: its keys and values are read once, not M times.
        by_prompt = _by_prompt(query, n)  # [N, H', M * G, D]
        to_prompt = by_prompt @ prompt_keys.transpose(-1, -2)
        to_own = _by_prompt(query @ keys.transpose(-1, -2), n)
        if first is not None:
            to_prompt = to_prompt + first
        if own is not None:
            to_own = to_own + own
        scores = torch.cat([to_prompt, to_own], dim=-1)
        weights = torch.softmax(scores * scale, dim=-1, dtype=torch.float32).to(values.dtype)
        of_prompt, of_own = weights[..., : self._width], weights[..., self._width :]
        out = _by_row(of_prompt @ prompt_values, rows) + _by_row(of_own, rows) @ values
        return out.reshape(rows, 1, heads, -1)


def _padded_width(width: int, exact: bool) -> int:
    return width if exact else -(-width // PROMPT_MULTIPLE) * PROMPT_MULTIPLE


def _as_bias(visible: Tensor) -> Tensor:
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)


def _by_prompt(x: Tensor, n: int) -> Tensor:
    """[N * M, H, G, D] -> [N, H, M * G, D]"""
    return x.view(n, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3)


def _by_row(x: Tensor, rows: int) -> Tensor:
    """[N, H, M * G, D] -> [N * M, H, G, D]"""
    return x.view(*x.shape[:2], rows // x.shape[0], -1, x.shape[3]).transpose(1, 2).flatten(0, 1)


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer of the model, as its own attention asks for them.

    Attributes
    ----------
    keys, values : [R, H, capacity, D]
        What the candidates added, behind their prompt's where each has its own copy.
    prompt : keys and values [N, H, P, D] of the prompts, if they are shared
    at, end : the slot that a step writes, and the end of what its attention reads
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, source: Any, rows: int, capacity: int) -> None:
        super().__init__()
        self.capacity, self.is_initialized = capacity, True
        self.at, self.end = torch.zeros(1, dtype=torch.int64), 0
        # Zeros, not garbage: a slot that the mask hides must not hold NaN.
        self.keys, self.values = (
            x.new_zeros(rows, x.shape[1], capacity, x.shape[3]) for x in (source.keys, source.values)
        )
        self.prompt: tuple[Tensor, ...] = ()

    def share(self, keys: Tensor, values: Tensor, width: int) -> None:
        """Take prompts' keys and values [N, H, P', D] into [N, H, P, D], on the right."""
        if not self.prompt:
            self.prompt = tuple(x.new_zeros(*x.shape[:2], width, x.shape[3]) for x in (keys, values))
        for x, own in zip((keys, values), self.prompt, strict=True):
            own[:, :, width - x.shape[2] :] = x

    def copy(self, keys: Tensor, values: Tensor, width: int) -> None:
        """Take them into the first P slots of each of their candidates."""
        for x, own in zip((keys, values), (self.keys, self.values), strict=True):
            own.view(len(x), -1, *own.shape[1:])[:, :, :, width - x.shape[2] : width] = x[:, None]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.at, keys)
        self.values.index_copy_(2, self.at, values)
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        """Nothing is left to do."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end, 0

    def get_seq_length(self) -> int:
        return self.end - 1

    def get_max_length(self) -> int:
        return self.capacity


# ---- Transformers' hook ---------------------------------------------------------------------------------------------

ATTENTION = "daemon_fast_candidates"
_active: ContextVar[SharedPromptCache] = ContextVar("active")


def _attention_function(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    for name in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _active.get().attend(module.layer_idx, query, key, value, scale), None


AttentionInterface.register(ATTENTION, _attention_function)
