"""Other ways to decode, to hold DAEMON against: Transformers' own, four of the literature, and two choices of its own
candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from daemon_fast.errors import InvalidInput
from daemon_fast.experiments.collected import Collected

__all__ = [
    "BASELINES", "CHOICES", "SEQUENCES", "ContrastiveDecoding", "Truncation", "choices", "contrastive_search", "decode",
    "p_less", "top_n_sigma",
]  # fmt: skip

SAMPLE = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
# Name -> options of `generate`. What the contrastive ones, top-n-sigma and p-less do is below.
BASELINES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam 5": {"do_sample": False, "num_beams": 5},
    "top-k 50": {**SAMPLE, "top_k": 50},
    "nucleus 0.95": {**SAMPLE, "top_p": 0.95},
    "typical 0.95": {**SAMPLE, "typical_p": 0.95},
    "min-p 0.1": {**SAMPLE, "min_p": 0.1},
    "top-n-sigma 1": SAMPLE,
    "p-less": SAMPLE,
    "contrastive decoding": {"do_sample": False},
    "contrastive search": {},
}
SEQUENCES = {"beam 5": 5, "contrastive search": 5}  # that the model reads for one continuation, where not one
AMATEUR_WINDOW = 8
CHOICES = ("nearest candidate", "likeliest candidate")


@torch.inference_mode()
def decode(
    method: str,
    model: Any,
    prefixes: Sequence[Sequence[int]],
    new_tokens: int,
    seed: int,
    amateur: Any = None,
    min_new_tokens: int | None = None,
    eos: Sequence[int] = (),
) -> Tensor:
    """One continuation of each prefix.

    Parameters
    ----------
    method : one of `BASELINES`
    prefixes : N lists of token ids of equal length
    new_tokens : of every continuation at most
    min_new_tokens : before which end-of-text is not drawn; default: `new_tokens`
    eos : tokens that end a text; default: those of the model's generation config
    seed : of torch's global generator, which `generate` draws from
    amateur : the weaker model of contrastive decoding; default: the model itself, of the last 8 tokens alone

    Returns
    -------
    [N, T] int64, T at most new_tokens; what follows an end-of-text token is of no meaning
    """
    if method not in BASELINES:
        raise InvalidInput(f"unknown baseline {method!r}; known: {', '.join(BASELINES)}")
    ids = torch.tensor([list(prefix) for prefix in prefixes], device=model.device)
    shortest = new_tokens if min_new_tokens is None else min_new_tokens
    if not eos:
        configured = model.generation_config.eos_token_id
        eos = [] if configured is None else [configured] if isinstance(configured, int) else configured
    if method == "contrastive search":
        found: Tensor = contrastive_search(model, ids, new_tokens, shortest, list(eos))
        return found
    processors: dict[str, LogitsProcessor] = {
        "top-n-sigma 1": Truncation(top_n_sigma),
        "p-less": Truncation(p_less),
        "contrastive decoding": ContrastiveDecoding(amateur or model, None if amateur is not None else AMATEUR_WINDOW),
    }
    processor = LogitsProcessorList([processors[method]] if method in processors else [])
    torch.manual_seed(seed)
    pad = model.generation_config.pad_token_id
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=shortest, max_new_tokens=new_tokens,
        eos_token_id=list(eos) or None, pad_token_id=0 if pad is None else pad, logits_processor=processor,
        **BASELINES[method],
    )  # fmt: skip
    drawn: Tensor = out[:, ids.shape[1] :]
    return drawn


def choices(held_out: Collected, targets: Tensor) -> dict[str, Tensor]:
    """Of DAEMON's own M candidates, the one that a score prefers: what M candidates are worth without its weights.

    Parameters
    ----------
    targets : [K] human means, as DAEMON was given them

    Returns
    -------
    name in `CHOICES` -> [N] int64, which candidate: the one whose fitted metrics lie nearest to the targets, in
    standard deviations of human text; and the one of the highest log p_theta a token (best of n)
    """
    k = held_out.fitted
    gaps = (held_out.features[..., :k].double() - targets) / held_out.spread[:k]
    per_token = held_out.log_p.double() / held_out.lengths.clamp_min(1)
    return dict(zip(CHOICES, (gaps.square().sum(2).argmin(1), per_token.argmax(1)), strict=True))


class Truncation(LogitsProcessor):  # type: ignore[misc]
    """Leaves out the tokens whose logits lie below a threshold, a function of logits [N, V] that gives [N, 1]."""

    def __init__(self, threshold: Callable[[Tensor], Tensor]) -> None:
        self._threshold = threshold

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out: Tensor = scores.masked_fill(scores < self._threshold(scores.float()), -torch.inf)
        return out


def top_n_sigma(logits: Tensor) -> Tensor:
    """The largest less one standard deviation of the logits (n = 1). Source: Tang et al. 2024 (arXiv 2411.07641)."""
    known = logits.isfinite()  # end-of-text, which is not to be drawn, is -inf
    count = known.sum(-1, keepdim=True)
    centred = logits - logits.where(known, 0.0).sum(-1, keepdim=True) / count
    variance = centred.square().where(known, 0.0).sum(-1, keepdim=True) / count
    return logits.amax(-1, keepdim=True) - variance.sqrt()


def p_less(logits: Tensor) -> Tensor:
    """Where p = Σ p², the chance that two draws agree. Source: Tan et al. 2025 (arXiv 2509.23234)."""
    return (2 * logits).logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)


class ContrastiveDecoding(LogitsProcessor):  # type: ignore[misc]
    """log p(expert) - log p(amateur), over tokens of at least `alpha` times the likeliest one's probability.

    Source: Li et al. 2023 (arXiv 2210.15097), with greedy search in place of their beam.
    """

    def __init__(self, amateur: Any, window: int | None = None, alpha: float = 0.1) -> None:
        self._amateur, self._window, self._alpha = amateur, window, alpha

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        context = input_ids if self._window is None else input_ids[:, -self._window :]
        expert = scores.float().log_softmax(-1)
        amateur = self._amateur(context, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
        plausible = expert >= expert.amax(-1, keepdim=True) + torch.tensor(self._alpha).log().to(expert.device)
        out: Tensor = (expert - amateur).masked_fill(~plausible, -torch.inf)
        return out


def contrastive_search(
    model: Any, ids: Tensor, new_tokens: int, min_new_tokens: int, eos: list[int], k: int = 5, alpha: float = 0.6
) -> Tensor:
    """Of the k likeliest tokens, the one with the largest (1 - alpha) p - alpha (greatest cosine to an earlier state).

    Parameters
    ----------
    ids : [N, P] int64
    min_new_tokens : before which end-of-text is not drawn

    Returns
    -------
    [N, T] int64, T at most new_tokens; what follows an end-of-text token is of no meaning.

    Source: Su et al. 2022 (arXiv 2202.06417). Transformers 5 has it no more.
    """
    n, cache, rows = len(ids), DynamicCache(config=model.config), torch.arange(len(ids), device=ids.device)
    forward: Callable[..., Any] = model.forward
    out = forward(ids, past_key_values=cache, use_cache=True, output_hidden_states=True)
    states, logits = out.hidden_states[-1], out.logits[:, -1]
    ends = torch.tensor(eos, device=ids.device)
    drawn: list[Tensor] = []
    running = torch.ones(n, dtype=torch.bool, device=ids.device)
    for t in range(new_tokens):
        if t < min_new_tokens:
            logits[:, ends] = -torch.inf
        p, tokens = logits.float().softmax(-1).topk(k)
        cache.batch_repeat_interleave(k)
        out = forward(tokens.reshape(-1, 1), past_key_values=cache, use_cache=True, output_hidden_states=True)
        new = out.hidden_states[-1][:, -1].reshape(n, k, -1)
        cosine = torch.nn.functional.cosine_similarity(new[:, :, None].float(), states[:, None].float(), dim=-1)
        best = ((1 - alpha) * p - alpha * cosine.amax(-1)).argmax(1)
        drawn.append(tokens[rows, best])
        running &= ~torch.isin(drawn[-1], ends)
        if not running.any():
            break
        states = torch.cat([states, new[rows, best][:, None]], dim=1)
        logits = out.logits[:, -1].reshape(n, k, -1)[rows, best]
        cache.batch_select_indices(rows * k + best)
    return torch.stack(drawn, dim=1)
