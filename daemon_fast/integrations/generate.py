"""`model.generate(..., custom_generate=daemon_fast.generate, energy=energy)`: DAEMON where Transformers' users are."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from daemon_fast.decode import Decoded, SIRDecoder
from daemon_fast.energy import Energy
from daemon_fast.errors import InvalidInput
from daemon_fast.proposals.transformers import TransformersProposal

__all__ = ["GenerateOutput", "generate"]

# What the proposal does itself; anything else would change what candidates are drawn from behind its back.
PROCESSORS = (
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)  # fmt: skip
CRITERIA = (MaxLengthCriteria, EosTokenCriteria)
# Transformers' own defaults, which say nothing of what a user wants
SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]
    """With return_dict_in_generate=True: `sequences`, and `decoded` with weights, ESS and metrics."""

    decoded: Decoded | None = None


def generate(
    model: Any,
    input_ids: Tensor,  # [B, P] int64
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    energy: Energy | None = None,
    processing_class: Any = None,
    streamer: Any = None,
    num_candidates: int | None = None,
    seed: int | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateOutput:
    """Decode by DAEMON inside Transformers' `generate`.

    Parameters
    ----------
    model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, **model_kwargs
        As `generate` passes them on. Lengths, end-of-text ids, the padding id and num_return_sequences S are those of
        the generation config. Temperature, top_k, top_p and min_p are those that the artefact was fitted with; with
        do_sample=True, one that is not Transformers' default is taken instead, with a warning.
    energy : Energy
        The fitted artefact.
    processing_class : tokenizer, optional
        Needed by metrics that read texts (`coh`); also checks that the artefact was fitted for this vocabulary. Not
        `tokenizer`: that one Transformers keeps to itself.
    num_candidates : M; default: as fitted
    seed : default: drawn from torch's global generator, which `transformers.set_seed` seeds

    Notes
    -----
    Nothing is kept from call to call. On CUDA each call captures its step in a graph anew; a `SIRDecoder` keeps it.

    Returns
    -------
    [B * S, P + T] int64, as `generate` does: prompt and continuation, end-of-text included, padded on the right; or a
    `GenerateOutput` with return_dict_in_generate=True. The S sequences of a prompt share its candidates.

    Raises
    ------
    InvalidInput
        No energy, or an option of `generate` that DAEMON has no place for.

    Examples
    --------
    >>> model.generate(**inputs, custom_generate=daemon_fast.generate, energy=energy, max_new_tokens=64)
    """
    if energy is None:
        raise InvalidInput("custom_generate=daemon_fast.generate needs energy=, a fitted artefact (Energy.load)")
    config = generation_config
    _refuse(config, logits_processor, stopping_criteria)
    # `generate` has repeated each prompt num_return_sequences times; they share their candidates.
    samples = config.num_return_sequences
    prompts, mask = input_ids[::samples], model_kwargs.get("attention_mask")
    rows = prompts.tolist()
    if mask is not None:
        kept = mask[::samples].bool().tolist()
        rows = [[i for i, real in zip(row, k, strict=True) if real] for row, k in zip(rows, kept, strict=True)]
    decoder = SIRDecoder(
        energy, _proposal(model, energy, config, processing_class, num_candidates, input_ids.shape[1]), 1
    )
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    streamer = streamer or _streamer_of_caller()
    decoded = decoder(rows, num_samples=samples, seed=seed)
    sequences, lengths = _sequences(input_ids, decoded, _padding(config), energy.proposal_settings.count_eos)
    if streamer is not None:
        for token in sequences[0, input_ids.shape[1] :][: lengths[0]].cpu():
            streamer.put(token[None])
        streamer.end()
    return GenerateOutput(sequences=sequences, decoded=decoded) if config.return_dict_in_generate else sequences


def _streamer_of_caller() -> Any:
    """Transformers 5 hands a callable everything but the streamer, which stays a local variable of its `generate`."""
    frame = sys._getframe(2)
    return frame.f_locals.get("streamer") if frame.f_code.co_name == "generate" else None


def _refuse(config: Any, processors: Any, criteria: Any) -> None:
    other = [type(x).__name__ for x in processors or () if not isinstance(x, PROCESSORS)]
    other += [type(x).__name__ for x in criteria or () if not isinstance(x, CRITERIA)]
    if other:
        raise InvalidInput(
            f"DAEMON draws candidates from the model itself: {', '.join(other)} can't be applied to them. Put what it "
            "is for into a metric, or filter what comes out"
        )
    if (config.num_beams or 1) > 1:
        raise InvalidInput(f"num_beams = {config.num_beams} must be 1: DAEMON samples")
    asked = [name for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
             if getattr(config, name, None)]  # fmt: skip
    if asked:
        raise InvalidInput(f"{asked[0]} is not offered: the scores of M candidates are not kept")


def _proposal(
    model: Any, energy: Energy, config: Any, tokenizer: Any, num_candidates: int | None, prompt: int
) -> TransformersProposal:
    """With the artefact's settings, and what the generation config says of lengths and of the end of a text."""
    fitted = energy.proposal_settings
    sampling = {name: getattr(fitted, name) for name in SAMPLING_DEFAULTS}
    if config.do_sample:
        given = {name: getattr(config, name, None) for name in SAMPLING_DEFAULTS}
        sampling |= {name: x for name, x in given.items() if x is not None and x != SAMPLING_DEFAULTS[name]}
    longest = config.max_length - prompt
    shortest = config.min_new_tokens or max(0, (config.min_length or 0) - prompt)
    settings = {
        **sampling,
        "num_candidates": num_candidates or fitted.num_candidates,
        "max_new_tokens": longest,
        "min_new_tokens": min(shortest, longest),
        "count_eos": fitted.count_eos,
    }
    eos = config.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    made = TransformersProposal(model, tokenizer, model_id=fitted.model_id, eos_token_ids=eos, **settings)
    if tokenizer is None:  # there is nothing to check the vocabulary by
        made.settings = replace(made.settings, vocabulary=fitted.vocabulary)
    return made


def _padding(config: Any) -> int:
    pad = config.pad_token_id
    if pad is None:
        eos = config.eos_token_id
        pad = 0 if eos is None else eos if isinstance(eos, int) else eos[0]
    return int(pad)


def _sequences(input_ids: Tensor, decoded: Decoded, pad: int, count_eos: bool) -> tuple[Tensor, list[int]]:
    """Prompts and their chosen continuations, and how many tokens each of these has."""
    candidates, m = decoded.candidates, decoded.candidates.shape[1]
    rows = (torch.arange(len(decoded.index), device=decoded.index.device)[:, None] * m + decoded.index).flatten()
    tokens, lengths = candidates.tokens[rows], candidates.lengths[rows].clone()
    if not count_eos:
        lengths += lengths < tokens.shape[1]  # the end-of-text token that ended it
    behind = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
    width = int(lengths.max())
    out = torch.cat([input_ids, tokens.masked_fill(behind, pad)[:, :width].to(input_ids.device)], dim=1)
    return out, lengths.tolist()
