"""The model's side of drawing candidates: prompts processed once, then M candidates of each grown a token a step.

There are three ways, tried in this order. Each is held against a plain pass of the model before it is used.

1. `SharedPromptCache`: the M candidates read one copy of their prompt's keys and values, and what they add is written
   into buffers whose address and size never change. For attention in all layers, full or of a sliding window.
2. `GrowingPromptCache`: the model's own cache, repeated M times, whatever it holds: recurrent states, latent attention.
3. `GrowingPromptCache` without a cache: each step runs over the whole text. Right for any causal language model.

Prompts are processed in groups of equal length, so that none is padded.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from daemon_fast.errors import InvalidInput
from daemon_fast.proposals.twin import Twin

__all__ = ["GrowingPromptCache", "Prompts", "SharedPromptCache", "cache_for", "process", "way_of"]

# From how many bytes on, that the copies of a prompt's keys and values in one layer take, candidates read them in place
# rather than each its own copy. On a CPU sharing halves a step at 512 tokens and costs 0 to 3% at 32. On CUDA it takes
# ten small kernels in place of one. On an H100, M = 25 and 512 tokens, that takes 45 us a layer at GPT-2 XL's shape,
# where copies (84 MB) take 39; at OPT-6.7B's 53, where copies (210 MB) would take 88 by their bytes.
SHARE_FROM = {"cpu": 0, "cuda": 100_000_000}
# On CUDA a step is captured in a graph, and so made for fixed sizes: prompts are padded to one of a few widths, and
# attention looks at the next of a few windows. On a CPU both are exact.
SMALLEST_WIDTH = 64
SMALLEST_WINDOW = 64
BIAS_MULTIPLE = 16
# A trial: two prompts of different lengths, M = 2 candidates of each, some steps.
TRIAL_LENGTHS = (20, 3)
TRIAL_STEPS = 4
# The first is longer if attention has a window, of up to this many tokens: what lies behind one is tried, too.
LONGEST_WINDOW = 128
LONGEST_TRIAL = 48  # tokens, of those that show whether logits depend on what follows
# Of the spread of log-probabilities. What rounding does is seen in one text by itself and in a batch: two ways that
# are right may differ by some times that (SmolLM2: 6e-5). In 16 bits random models of two layers were seen to differ
# by 0.06.
LEAST_TOLERANCE, MOST_TOLERANCE, NOISE = 4e-5, 1e-3, 100
TOLERANCE_16_BITS = 0.15
ROUNDING = 4  # times the resolution of the largest logit and log-probability, which no tolerance is below
# A log-probability below which a token is masked: paddings of a vocabulary are, by -1e4, -1e9 or -inf.
MASKED = -1e3
# A trial shows what it is for if earlier tokens move log-probabilities by some times the tolerance.
SIGHT = {False: 50, True: 2}  # in 32 bits, in 16
# A trial says little of what weights near zero will do, an untrained model's or adapter's. Its outcome is kept until
# one has grown by this factor, by a sample of its elements: training needs few trials, a checkpoint that is loaded one.
GROWTH, SAMPLE = 4, 64


@dataclass(frozen=True)
class Group:
    """Prompts of one length, [n] of their places among all, and the model's own cache of them, if it has one."""

    places: Tensor
    tokens: Tensor  # [n, length]
    cache: Any


@dataclass(frozen=True)
class Prompts:
    """N prompts, processed.

    Attributes
    ----------
    tokens : N lists of token ids
    logits : [N, V] float16, bfloat16 or float32
        Of the token that follows each prompt.
    groups : by length
    lengths : [N] int64
    """

    tokens: list[list[int]]
    logits: Tensor
    groups: list[Group]
    lengths: Tensor

    @property
    def width(self) -> int:
        """P, the length of the longest."""
        return max(map(len, self.tokens))


def process(model: Twin, tokens: Sequence[Sequence[int]], cached: bool = True) -> Prompts:
    """Run the model over each prompt once, those of one length in one batch."""
    lengths = [len(row) for row in tokens]
    groups, logits = [], [torch.empty(0, device="cpu")] * len(tokens)
    model.set_attention(None)
    for length in sorted(set(lengths)):
        places = [i for i, n in enumerate(lengths) if n == length]
        ids = torch.tensor([list(tokens[i]) for i in places], device=model.device)
        out = model(ids, use_cache=cached, logits_to_keep=1)
        for i, row in zip(places, _last_logits(out), strict=True):
            logits[i] = row
        cache = next(((name, out[name]) for name in CACHES if out.get(name) is not None), None) if cached else None
        groups.append(Group(torch.tensor(places, device=model.device), ids, cache))
    listed = [list(row) for row in tokens]
    return Prompts(listed, torch.stack(logits), groups, torch.tensor(lengths, device=model.device))


def _last_logits(out: Any) -> Tensor:
    """[B, V] of the last token, as the model gives them where the operators read that."""
    logits: Tensor = out.logits[:, -1]
    return logits if logits.dtype in (torch.float16, torch.bfloat16, torch.float32) else logits.float()


# What models call the cache, which they return and take.
CACHES = ("past_key_values", "cache_params", "state")


# ---- which way ------------------------------------------------------------------------------------------------------

# Of each model that was tried: what it was, what came out, and how large its weights were, see `_sizes`.
_tried: WeakKeyDictionary[Any, tuple[Any, str, Tensor]] = WeakKeyDictionary()


def way_of(model: Twin) -> str:
    """ "shared", "growing" or "recomputed": the first whose logits are those of a plain pass.

    Raises
    ------
    InvalidInput
        The model is no causal language model: a token's logits depend on what follows it.
    """
    if model.way is None:
        found = _tried.get(model.model)
        sizes = _sizes(model)
        if found is not None and found[0] == model.structure and not _outgrown(found[2], sizes):
            model.way = found[1]
        else:
            model.way, sees = _try(model)
            if sees:  # else what came out holds for the weights that the model has now
                _tried[model.model] = model.structure, model.way, sizes
            else:
                _tried.pop(model.model, None)
    return model.way


@torch.inference_mode()
def _sizes(model: Twin) -> Tensor:
    """Root mean squares of some elements of each matrix, and of each single number: a gate."""
    some = [
        p.reshape(-1)[:: p.numel() // SAMPLE | 1]  # an odd step: not all of one column
        for p in model.model.parameters()
        # Quantised or sharded ones, which aren't plain tensors, are not trained.
        if type(p.data) is Tensor
        and p.is_floating_point()
        and p.element_size() > 1
        and not p.is_meta
        and (p.ndim > 1 or p.numel() == 1)
    ]
    lengths = torch.tensor([len(x) for x in some], dtype=torch.float32, device="cpu")
    if not some:
        return lengths
    norms = torch.stack([norm.to(model.device, torch.float32) for norm in torch._foreach_norm(some)])
    return norms.cpu() / lengths.sqrt()


def _outgrown(tried: Tensor, now: Tensor) -> bool:
    """Whether any part of the model may do now what it did too little of in the trial to be seen."""
    return len(tried) != len(now) or bool((now > GROWTH * tried).any())


@torch.inference_mode()
def _try(model: Twin) -> tuple[str, bool]:
    """The way, and whether the weights are such that another would have been told from it."""
    tolerance, sees = _check_causal(model)
    return _first_right(model, tolerance), sees


def _first_right(model: Twin, tolerance: float) -> str:
    first, second = TRIAL_LENGTHS
    wanted = max([first, *(window + TRIAL_STEPS for window in _windows(model))])
    most = min(n - TRIAL_STEPS for n in (model.context, model.rope_switch, wanted + TRIAL_STEPS) if n)
    generator = torch.Generator().manual_seed(1)
    lengths = [max(1, min(length, most)) for length in (wanted, second)]
    drawn = torch.randint(model.config.vocab_size, (2, max(lengths)), generator=generator, device="cpu").tolist()
    trial = [row[:length] for row, length in zip(drawn, lengths, strict=True)]
    rows = [prompt for prompt in trial for _ in range(2)]
    added = torch.randint(model.config.vocab_size, (4, TRIAL_STEPS), generator=generator, device="cpu")
    plain = []
    for row, more in zip(rows, added.tolist(), strict=True):
        logits = model.plain(torch.tensor([[*row, *more]], device=model.device))
        plain.append(_log_probs(logits)[0, len(row) - 1 :])
    reasons: list[str] = []
    for way in ("shared", "growing"):
        try:
            if _agrees(model, way, trial, added, plain, tolerance):
                if way == "growing":
                    warnings.warn(
                        f"{model.name} {reasons[0]}: its candidates are drawn with the model's own growing cache, "
                        "which gives the same results more slowly",
                        stacklevel=7,
                    )
                return way
            reasons.append("gives other logits with our attention than with its own")
        except Exception as error:  # whatever a model raises that is not made for this
            reasons.append(f"can't share its prompt's cache ({type(error).__name__}: {' '.join(str(error).split())})")
    warnings.warn(
        f"{model.name} has no cache that can be kept: each step of its candidates computes the whole text again, which "
        "gives the same results much more slowly",
        stacklevel=7,
    )
    return "recomputed"


def _windows(model: Twin) -> list[int]:
    """Those of attention, as configurations name them, that a trial can pass."""
    words = "window", "local_attention", "attention_chunk"
    sizes = [size for name, size in vars(model.config).items() if any(word in name for word in words)]
    return [size for size in sizes if type(size) is int and size <= LONGEST_WINDOW]


def _check_causal(model: Twin) -> tuple[float, bool]:
    """By how much log-probabilities of one way may differ from another's, and whether earlier tokens move them by far
    more.

    Raises
    ------
    InvalidInput
        The logits of a text depend on what follows.
    """
    length = min(LONGEST_TRIAL, model.context or LONGEST_TRIAL, model.rope_switch or LONGEST_TRIAL)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (3, length), generator=generator, device="cpu").to(model.device)
    try:
        logits = model.plain(ids)
    except Exception as error:  # whatever a model raises that reads something else
        said = " ".join(str(error).split())[:200]
        raise InvalidInput(
            f"{model.name} can't be run over texts of token ids [B, T]: {type(error).__name__}: {said}"
        ) from error
    whole = _log_probs(logits)
    if whole.isnan().any():
        raise InvalidInput(f"{model.name} gives logits that hold NaN or +inf, or are all -inf: do its weights?")
    spread = _spread(whole.flatten(0, 1))
    if halved := model.dtype in (torch.float16, torch.bfloat16):
        tolerance = TOLERANCE_16_BITS * spread
    else:
        alone = torch.cat([_log_probs(model.plain(row[None])) for row in ids])
        noise = _difference(alone, whole)
        tolerance = min(max(LEAST_TOLERANCE * spread, NOISE * noise), MOST_TOLERANCE * spread)
    largest = [float(x.masked_fill(whole <= MASKED, 0).abs().max()) for x in (logits, whole)]
    eps = [torch.finfo(x.dtype).eps for x in (logits, whole)]
    rounding = max(ROUNDING * e * x for e, x in zip(eps, largest, strict=True))
    tolerance = max(tolerance, rounding)
    for cut in sorted({1 + i * (length - 1) // 6 for i in range(6)}):
        if not _difference(_log_probs(model.plain(ids[:, :cut])), whole[:, :cut]) <= tolerance:
            raise InvalidInput(
                f"{model.name} is no causal language model as it is configured: the logits of a token depend on those "
                "that follow it (is_decoder = False?)"
            )
    half = length // 2
    other = torch.cat([(ids[:1, :half] + 1) % model.config.vocab_size, ids[:1, half:]], dim=1)
    effect = _difference(_log_probs(model.plain(other))[:, half:], whole[:1, half:])
    return max(rounding, min(tolerance, effect / 4)), effect >= SIGHT[halved] * tolerance


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest of log-probabilities, without tokens that are masked in both; NaN if there is one."""
    return float((a - b).abs().masked_fill((a <= MASKED) & (b <= MASKED), 0).max())


def _spread(log_p: Tensor) -> float:
    """How far a token's log-probability is at most from its mean over all rows of log_p [n, V], where not masked."""
    masked = log_p <= MASKED
    mean = log_p.masked_fill(masked, 0).sum(0) / (~masked).sum(0).clamp_min(1)
    return float((log_p - mean).abs().masked_fill(masked, 0).max())


def _agrees(
    model: Twin, way: str, trial: list[list[int]], added: Tensor, plain: list[Tensor], tolerance: float
) -> bool:
    prompts = process(model, trial)
    shares = [(True, True), (True, False), (False, True), (False, False)] if way == "shared" else [(True, True)]
    for share, exact in shares:
        cache = (
            SharedPromptCache(model, prompts, 2, TRIAL_STEPS, share, exact)
            if way == "shared"
            else GrowingPromptCache(model, 2)
        )
        if isinstance(cache, SharedPromptCache) and not share and cache.share:
            continue  # its attention can only share
        cache.load(model, prompts)
        slot = torch.zeros(1, dtype=torch.int64, device=model.device)
        for t in range(TRIAL_STEPS):
            got = _log_probs(cache.step(added[:, t].to(model.device), slot, cache.window(t)))
            if not _difference(got, torch.stack([want[t + 1] for want in plain])) <= tolerance:
                return False
            slot += 1
    return True


def cache_for(
    model: Twin, prompts: Prompts, num_candidates: int, max_new_tokens: int
) -> SharedPromptCache | GrowingPromptCache:
    """What suits the model."""
    if way_of(model) == "shared":
        return SharedPromptCache(model, prompts, num_candidates, max_new_tokens)
    return GrowingPromptCache(model, num_candidates)


def bytes_of(model: Twin, prompts: Prompts, num_candidates: int, max_new_tokens: int) -> dict[str, int]:
    """What drawing candidates of these prompts allocates at least: logits [R, V], and keys and values if shared."""
    rows = len(prompts.tokens) * num_candidates
    needed = {"logits": prompts.logits.element_size() * rows * prompts.logits.shape[1]}
    if way_of(model) == "shared":
        layers, width = _layers_of(model, prompts.groups[0]), _padded_width(prompts.width, model.device.type == "cpu")
        copies = len(prompts.tokens) if _shares(model, layers, rows, width) else rows
        own = rows * max_new_tokens * sum(map(_bytes_of_a_token, layers))
        needed["keys and values"] = own + copies * sum(_bytes_of_a_prompt(layer, width) for layer in layers)
    return needed


def _bytes_of_a_token(layer: Any) -> int:
    """Its key and value in one layer of the model's cache."""
    return sum(x.shape[1] * x.shape[3] * x.element_size() for x in (layer.keys, layer.values))


def _bytes_of_a_prompt(layer: Any, width: int) -> int:
    return _bytes_of_a_token(layer) * _slots_of_a_prompt(width, getattr(layer, "sliding_window", None))


def _slots_of_a_prompt(width: int, window: int | None) -> int:
    """A sliding window sees the last ones only."""
    return width if window is None else min(width, max(window - 1, 1))


def _shares(model: Twin, layers: list[Any], rows: int, width: int) -> bool:
    """Whether candidates read their prompt's keys and values in place."""
    copies = rows * max(_bytes_of_a_prompt(layer, width) for layer in layers)
    return copies >= SHARE_FROM.get(model.device.type, 0) or _needs_sharing(model)


# ---- the model's own cache, or none ---------------------------------------------------------------------------------


class GrowingPromptCache:
    """M candidates of each prompt, with the model's own cache, repeated M times; without one, over the whole text."""

    def __init__(self, model: Twin, num_candidates: int) -> None:
        self._num_candidates = num_candidates

    def load(self, model: Twin, prompts: Prompts) -> None:
        """See `SharedPromptCache.load`."""
        m = self._num_candidates
        self._model, self._parts = model, []
        for group in prompts.groups:
            rows = (group.places[:, None] * m + torch.arange(m, device=group.places.device)).flatten()
            tokens = group.tokens.repeat_interleave(m, dim=0)
            cache = None if group.cache is None else (group.cache[0], _repeated(group.cache[1], len(group.tokens), m))
            self._parts.append(_Part(rows, tokens, cache))

    def window(self, slot: int) -> int:
        """See `SharedPromptCache.window`."""
        return slot + 1

    def step(self, ids: Tensor, slot: Tensor, window: int) -> Tensor:
        """See `SharedPromptCache.step`."""
        self._model.set_attention(None)
        found, order = [], []
        for part in self._parts:
            part.tokens = torch.cat([part.tokens, ids[part.rows, None]], dim=1)
            if part.cache is None:
                out = self._model(part.tokens, use_cache=False, logits_to_keep=1)
            else:
                name, cache = part.cache
                end = part.tokens.shape[1] - 1
                positions = torch.full((len(part.rows), 1), end, device=ids.device)
                out = self._model(part.tokens[:, -1:], positions, use_cache=True, logits_to_keep=1, **{name: cache})
                part.cache = (name, out[name])
            found.append(_last_logits(out))
            order.append(part.rows)
        logits = torch.cat(found)
        return logits[torch.cat(order).argsort()]

    def keep(self, rows: Tensor) -> None:
        """See `SharedPromptCache.keep`."""
        place = torch.full((int(sum(len(part.rows) for part in self._parts)),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        for part in self._parts:
            kept = (place[part.rows] >= 0).nonzero().flatten()
            part.cache = None if part.cache is None else (part.cache[0], _selected(part.cache[1], kept, len(part.rows)))
            part.rows, part.tokens = place[part.rows][kept], part.tokens[kept]


@dataclass
class _Part:
    rows: Tensor  # [r] places among all rows
    tokens: Tensor  # [r, length so far]
    cache: tuple[str, Any] | None  # what the model calls it, and the cache


def _repeated(cache: Any, n: int, m: int) -> Any:
    """A copy of a cache of n rows, each repeated m times."""
    index = torch.arange(n, device="cpu").repeat_interleave(m)
    return _selected(copy.deepcopy(cache), index, n)


def _selected(cache: Any, rows: Tensor, size: int) -> Any:
    """The rows of a cache of `size` rows: of every tensor in it, however deep, whose first dimension is of that size.

    Caches differ in what they hold: keys and values, states of convolutions and recurrences, statistics. What they
    share is that rows of the batch come first.
    """
    seen: dict[int, tuple[Any, Any]] = {}  # what was there, which lives on so that its id stays its own, and what is

    def of(value: Any) -> Any:
        if id(value) in seen:
            return seen[id(value)][1]
        if isinstance(value, Tensor):
            batched = value.ndim > 1 and value.shape[0] == size
            seen[id(value)] = value, value[rows.to(value.device)] if batched else value
            return seen[id(value)][1]
        if isinstance(value, dict):
            return {key: of(item) for key, item in value.items()} if type(value) is dict else value
        if type(value) in (list, tuple):
            return type(value)(map(of, value))
        if type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
            seen[id(value)] = value, value
            vars(value).update({name: of(item) for name, item in vars(value).items()})
        return value

    return of(cache)


# ---- one copy of each prompt ----------------------------------------------------------------------------------------


class SharedPromptCache:
    """M candidates of each of N prompts, R = N * M rows, in buffers made once; no step waits for the device.

    Parameters
    ----------
    share : whether candidates read their prompt's keys and values in place; default: by `SHARE_FROM`
    exact : whether prompts and windows are as long as they are, or rounded up to few sizes; default: on the CPU
    """

    def __init__(
        self,
        model: Twin,
        prompts: Prompts,
        num_candidates: int,
        max_new_tokens: int,
        share: bool | None = None,
        exact: bool | None = None,
    ) -> None:
        device = model.device
        self._num_candidates, self._num_prompts, self._capacity = num_candidates, len(prompts.tokens), max_new_tokens
        self._exact = device.type == "cpu" if exact is None else exact
        self._width = _padded_width(prompts.width, self._exact)
        caches = [_layers_of(model, group) for group in prompts.groups]
        self._windows = [getattr(layer, "sliding_window", None) for layer in caches[0]]
        self._rows = self._num_prompts * num_candidates
        wanted = _shares(model, caches[0], self._rows, self._width) if share is None else share
        # A captured step and its buffers serve one kind of attention only.
        self.share = wanted or _needs_sharing(model)
        longest = [max((c[i] for c in caches), key=lambda x: x.keys.shape[2]) for i in range(len(caches[0]))]
        self._layers = [
            _Layer(layer, window, self._num_prompts, num_candidates, self._width, max_new_tokens, self.share)
            for layer, window in zip(longest, self._windows, strict=True)
        ]
        self._cache = Cache(layers=self._layers)
        self._start = torch.zeros(self._rows, 1, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(self._num_prompts, dtype=torch.int64, device=device)
        self.model = model

    def suits(self, prompts: Prompts) -> bool:
        """Whether `load` can take them: at least half as many prompts, of the same length once it is padded."""
        n = len(prompts.tokens)
        return n <= self._num_prompts <= 2 * n and _padded_width(prompts.width, self._exact) == self._width

    def load(self, model: Twin, prompts: Prompts) -> None:
        """Begin with these prompts, of a twin of the same model. Rows behind theirs mean nothing."""
        self.model = model
        for group in prompts.groups:
            for layer, own in zip(_layers_of(model, group), self._layers, strict=True):
                own.load(group.places, layer.keys, layer.values)
        # A captured step reads these by address: they are filled, and never replaced.
        n = len(prompts.tokens)
        self._start[: n * self._num_candidates] = prompts.lengths.repeat_interleave(self._num_candidates)[:, None]
        self._lengths[:n] = prompts.lengths
        self._padded = not self._exact or len(prompts.groups) > 1

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
        [R, V] logits of the next token.
        """
        self._slot, self._window = slot, min(window, self._capacity)
        self._biases: dict[tuple[int, int | None, torch.dtype], Tensor | None] = {}
        places = {before: slot + before for before in {layer.before for layer in self._layers}}
        for layer in self._layers:
            layer.at, layer.end = places[layer.before], layer.before + self._window
        self.model.set_attention(ATTENTION)
        with _now(self):
            out = self.model(
                ids[:, None], self._start + slot, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        return _last_logits(out)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, of each prompt as many."""
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self._start = self._start[rows]
        self._rows = len(rows)

    def _bias_of(self, layer: _Layer, dtype: torch.dtype) -> Tensor | None:
        """What is added to a step's scores in all layers of this kind: see `_make_bias`."""
        key = (layer.width, layer.window, dtype)
        if key not in self._biases:
            self._biases[key] = self._make_bias(layer, dtype)
        return self._biases[key]

    def _make_bias(self, layer: _Layer, dtype: torch.dtype) -> Tensor | None:
        """[N or R, 1, 1, S]: 0 for what a step sees of the prompt's slots and those that candidates filled, else -inf;
        None if it sees all.

        A prompt's tokens stand on the right of its `width` slots. From the slot of a step, column c of all lies
        slot + width - c tokens back; a sliding window sees less than `layer.window` back.
        """
        w, size = layer.window, layer.width + self._window
        if self._exact and not self._padded and (w is None or size <= w):  # exact: slot is window - 1
            return None
        # Rows of 16 times some elements: torch would copy others, in each layer, to align them.
        column = torch.arange(-(-size // BIAS_MULTIPLE) * BIAS_MULTIPLE, device=self._slot.device)
        back = self._slot + layer.width - column
        visible = (back >= 0) & (column >= layer.width - self._lengths[:, None])
        if w is not None:
            visible &= back < w
        bias = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)
        if not self.share:
            bias = bias[:, None].expand(-1, self._rows // self._num_prompts, -1).reshape(self._rows, -1)
        return bias[:, None, None, :size]

    def attend(
        self,
        layer: _Layer,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """[R, 1, H, D] attention of query [R, H, 1, D] to keys and values [R, H', S, D]; H is a multiple of H'."""
        rows, heads, _, depth = query.shape
        groups, n = keys.shape[1], self._num_prompts
        query = query.reshape(rows, groups, heads // groups, depth)
        bias = self._bias_of(layer, query.dtype)
        if not self.share:
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)
            return out.reshape(rows, 1, heads, -1)

        prompt_keys, prompt_values = layer.prompt
        # All candidates' queries of a prompt at once: its keys and values are read once, not M times.
        to_prompt = _by_prompt(query, n) @ prompt_keys.transpose(-1, -2)  # [N, H', M * G, width]
        to_own = _by_prompt(query @ keys.transpose(-1, -2), n)
        scores = torch.cat([to_prompt, to_own], dim=-1) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if bias is not None:
            scores += bias
        if sinks is not None:  # a score of each head that takes weight and gives nothing
            each = sinks.to(scores.dtype).reshape(1, groups, 1, heads // groups).expand(n, -1, rows // n, -1)
            scores = torch.cat([scores, each.reshape(n, groups, -1, 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        of_prompt = weights[..., : layer.width]
        of_own = weights[..., layer.width : layer.width + keys.shape[2]]
        out = _by_row(of_prompt @ prompt_values, rows) + _by_row(of_own, rows) @ values
        return out.reshape(rows, 1, heads, -1)


def _layers_of(model: Twin, group: Group) -> list[Any]:
    """Layers of full or sliding-window attention.

    Raises
    ------
    NotImplementedError
        The cache holds something else.
    """
    cache: Any = None if group.cache is None else group.cache[1]
    if not getattr(model.module, "_supports_attention_backend", False):
        raise NotImplementedError("it takes no attention function from outside")
    if type(getattr(cache, "layers", None)) is not list:
        raise NotImplementedError(f"its cache is {type(cache).__name__}")
    other = sorted({type(x).__name__ for x in cache.layers if type(x) not in (DynamicLayer, DynamicSlidingWindowLayer)})
    if other or "chunked_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise NotImplementedError(f"its cache has {', '.join(other) or 'chunks'}")
    return cache.layers  # type: ignore[no-any-return]


def _needs_sharing(model: Twin) -> bool:
    """Whether its attention has what torch's own function has not: capped scores, sinks."""
    return bool(getattr(model.config, "attn_logit_softcapping", None)) or any(
        hasattr(module, "sinks") for module in model.module.modules()
    )


def _padded_width(width: int, exact: bool) -> int:
    """The next of 64, 96, 128, 192, 256, ...: calls of other lengths have mostly been captured then."""
    if exact:
        return width
    double = max(SMALLEST_WIDTH, 1 << (width - 1).bit_length())
    return 3 * double // 4 if width <= 3 * double // 4 >= SMALLEST_WIDTH else double


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
    window : tokens that a sliding window sees, itself included; None: all
    width : slots of a prompt, of which a sliding window keeps the last ones only
    keys, values : [R, H, capacity, D]
        What the candidates added, behind their prompt's where each has its own copy.
    prompt : keys and values [N, H, width, D] of the prompts, if they are shared
    before : slots that lie before what the candidates add
    at, end : the slot that a step writes, and the end of what its attention reads
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, source: Any, window: int | None, n: int, m: int, width: int, capacity: int, share: bool) -> None:
        super().__init__()
        self.is_initialized, self.window, self._num_candidates = True, window, m
        self.width = _slots_of_a_prompt(width, window)
        self.before = 0 if share else self.width
        self.at, self.end = torch.zeros(1, dtype=torch.int64, device="cpu"), 0
        # Zeros, not garbage: a slot that the mask hides must not hold NaN.
        self.keys, self.values = (
            x.new_zeros(n * m, x.shape[1], self.before + capacity, x.shape[3]) for x in (source.keys, source.values)
        )
        self.prompt: tuple[Tensor, ...] = ()
        if share:
            self.prompt = tuple(
                x.new_zeros(n, x.shape[1], self.width, x.shape[3]) for x in (source.keys, source.values)
            )

    def load(self, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Take keys and values [n, H, P', D] of the prompts at these places, on the right of their slots."""
        for x, own, shared in zip((keys, values), (self.keys, self.values), self.prompt or (None, None), strict=True):
            x = x[:, :, -self.width :]
            if shared is not None:
                shared[places, :, self.width - x.shape[2] :] = x
            else:
                own.view(-1, self._num_candidates, *own.shape[1:])[
                    places, :, :, self.width - x.shape[2] : self.width
                ] = x[:, None]

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
        return self.end


# ---- Transformers' hook ---------------------------------------------------------------------------------------------

ATTENTION = "daemon_fast_candidates"
_active: ContextVar[SharedPromptCache] = ContextVar("active")  # of this thread


@contextlib.contextmanager
def _now(cache: SharedPromptCache) -> Iterator[None]:
    token = _active.set(cache)
    try:
        yield
    finally:
        _active.reset(token)


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
    cache = _active.get()
    layer = cache._layers[module.layer_idx]
    if options.get("position_bias") is not None:
        raise NotImplementedError("attention with position_bias")
    if options.get("sliding_window") not in (None, layer.window):
        raise NotImplementedError(f"a sliding window of {options['sliding_window']} over a cache without")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cache.attend(layer, query, key, value, scale, options.get("softcap"), options.get("s_aux")), None


AttentionInterface.register(ATTENTION, _attention_function)
