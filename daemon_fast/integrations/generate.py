"""`model.generate(..., custom_generate=daemon_fast.generate, energy=energy)`: DAEMON where Transformers' users are."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitNormalization,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from daemon_fast.arguments import integer
from daemon_fast.decode import Decoded, SIRDecoder
from daemon_fast.energy import Energy
from daemon_fast.errors import InvalidInput
from daemon_fast.proposals.base import eos_token_ids
from daemon_fast.proposals.transformers import TransformersProposal

__all__ = ["GenerateOutput", "generate"]

# What the proposal does itself; anything else would change what candidates are drawn from behind its back.
PROCESSORS = (
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor, LogitNormalization,
)  # fmt: skip
CRITERIA = (MaxLengthCriteria, EosTokenCriteria)  # which are followed, also those that a caller made
# Transformers' own defaults, which say nothing of what a user wants
SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}

# Fields of the generation config that DAEMON follows,
FOLLOWED = {
    *SAMPLING_DEFAULTS, "do_sample", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "eos_token_id",
    "pad_token_id", "bos_token_id", "num_return_sequences", "return_dict_in_generate", "renormalize_logits",
}  # fmt: skip
# and those that change nothing in what is sampled: how Transformers' own loop computes, and details of beams, encoders
# and assistants, which are refused by themselves.
WITHOUT_EFFECT = {
    "use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size",
    "low_memory", "continuous_batching_config", "transformers_version", "early_stopping", "length_penalty",
    "decoder_start_token_id", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
    "max_matching_ngram_size", "speculation_type",
}  # fmt: skip
# All other fields are refused, but for None, False and the values by which they ask for nothing.
NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "penalty_alpha": 0.0, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1,
}  # fmt: skip
# Arguments that Transformers' `generate` doesn't pass on
KEPT_BACK = ("assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask", "synced_gpus")
# What Transformers itself gives to a model, beside the ids
PREPARED = {"attention_mask", "logits_to_keep", "use_cache", "return_dict"}
PREPARED_CACHES = {"past_key_values", "cache_params"}


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
        the generation config, or of a MaxLengthCriteria and an EosTokenCriteria, which take their place as in
        Transformers; min_new_tokens is 1 unless given, or 0 where the artefact was fitted so. Chats are the
        ids of `tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")`. Temperature,
        top_k, top_p and min_p are those that the artefact was fitted with; with do_sample=True, one that is given to
        `generate`, or that in the generation config is not Transformers' default, is taken instead, with a warning.
        use_cache and other settings of how Transformers' own loop computes have no effect. Whatever else would change
        what is generated is refused, by name.
    energy : Energy
        The fitted artefact.
    processing_class : tokenizer, optional
        Needed by metrics that read texts (`coh`); also checks that the artefact was fitted for this vocabulary, and, if
        to chats, tells which token ends an answer where the generation config lacks it. Not `tokenizer`: that one
        Transformers keeps to itself.
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
        No energy, or an option of `generate` or an input of the model that DAEMON has no place for.

    Examples
    --------
    >>> model.generate(**inputs, custom_generate=daemon_fast.generate, energy=energy, max_new_tokens=32)
    """
    if not isinstance(energy, Energy):
        raise InvalidInput(
            f"custom_generate=daemon_fast.generate needs energy=, a fitted artefact (Energy.load), got {_short(energy)}"
        )
    config, caller = generation_config, _caller()
    _refuse_options(config, caller)
    _refuse_processors(logits_processor, stopping_criteria, caller.get("logits_processor"))
    given = caller.get("kwargs", {})
    _refuse_inputs(model, model_kwargs, given)
    # `generate` has repeated each prompt num_return_sequences times; they share their candidates.
    samples = integer("num_return_sequences", config.num_return_sequences, ">= 1", lambda n: n >= 1)
    prompts, mask = input_ids[::samples], model_kwargs.get("attention_mask")
    rows = prompts.tolist()
    if mask is not None:
        kept = mask[::samples].bool().tolist()
        rows = [[i for i, real in zip(row, k, strict=True) if real] for row, k in zip(rows, kept, strict=True)]
    sampling = _sampling(config, energy, given)
    proposal = _proposal(
        model, energy, config, stopping_criteria or (), sampling, processing_class, num_candidates, input_ids.shape[1]
    )
    decoder = SIRDecoder(energy, proposal, 1)
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    streamer = streamer or caller.get("streamer")
    decoded = decoder(rows, num_samples=samples, seed=seed)
    sequences, lengths = _sequences(input_ids, decoded, _padding(config), energy.proposal_settings.count_eos)
    if streamer is not None:
        for token in sequences[0, input_ids.shape[1] :][: lengths[0]].cpu():
            streamer.put(token[None])
        streamer.end()
    return GenerateOutput(sequences=sequences, decoded=decoded) if config.return_dict_in_generate else sequences


def _caller() -> dict[str, Any]:
    """The variables of Transformers' `generate`: it hands a callable neither the streamer nor some other arguments,
    and of its options not which were given and which are defaults."""
    frame = sys._getframe(2)
    return frame.f_locals if frame.f_code.co_name == "generate" else {}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"<{type(value).__name__}>"


def _refuse_options(config: Any, caller: dict[str, Any]) -> None:
    asked = [name for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
             if getattr(config, name, None)]  # fmt: skip
    if asked:
        raise InvalidInput(f"{asked[0]} is not offered: the scores of M candidates are not kept")
    fields = (name for name in vars(GenerationConfig()) if not name.startswith("_"))
    options = {name: getattr(config, name, None) for name in fields if name not in FOLLOWED | WITHOUT_EFFECT}
    for name, value in (options | {name: caller.get(name) for name in KEPT_BACK}).items():
        if value is None or value is False or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        raise InvalidInput(
            f"{name} = {_short(value)} can't be followed: DAEMON samples candidates from the model itself. Leave it "
            f"out, or give {name}={NEUTRAL.get(name)} where model.generation_config sets it. What it is for may be a "
            "metric, or a filter of what comes out"
        )
    given = caller.get("kwargs", {})
    if given.get("do_sample") is False:
        raise InvalidInput("do_sample = False asks for the likeliest tokens, but DAEMON samples: leave it out")


def _refuse_processors(processors: Any, criteria: Any, own: Any) -> None:
    """`own`: those of the processors that a caller made."""
    for kind in {type(x) for x in own or ()} & set(PROCESSORS) - {LogitNormalization}:
        raise InvalidInput(f"{kind.__name__} in logits_processor can't be followed: give the option that it stands for")
    other = [type(x).__name__ for x in processors or () if type(x) not in PROCESSORS]
    other += [type(x).__name__ for x in criteria or () if type(x) not in CRITERIA]
    if other:
        raise InvalidInput(
            f"DAEMON draws candidates from the model itself: {', '.join(other)} can't be applied to them. Put what it "
            "is for into a metric, or filter what comes out"
        )


def _refuse_inputs(model: Any, inputs: dict[str, Any], given: dict[str, Any]) -> None:
    """Candidates continue token ids and nothing else. `given`: what was passed to `generate` by name."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise InvalidInput(f"{type(model).__name__} is an encoder-decoder: DAEMON continues the text of a decoder")
    for name, value in inputs.items():
        if value is None or name in PREPARED or (name == "position_ids" and _counts_tokens(value, inputs)):
            continue
        if name.endswith("token_type_ids") and not torch.as_tensor(value).any():  # a text of one part
            continue
        if name in PREPARED_CACHES and name not in given:
            continue
        raise InvalidInput(
            f"{name} is not offered: candidates are drawn from input_ids and attention_mask alone, got a "
            f"{type(value).__name__}"
        )


def _counts_tokens(position_ids: Tensor, inputs: dict[str, Any]) -> bool:
    """Whether these are the positions that tokens have anyway: 0, 1, ... from the first that is not masked."""
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(position_ids)
    return bool(((position_ids == mask.long().cumsum(-1) - 1) | (mask == 0)).all())


def _sampling(config: Any, energy: Energy, given: dict[str, Any]) -> dict[str, Any]:
    """Temperature, top_k, top_p and min_p. `given`: what was passed to `generate` by name."""
    fitted = {name: getattr(energy.proposal_settings, name) for name in SAMPLING_DEFAULTS}
    options = {name: getattr(config, name, None) for name in SAMPLING_DEFAULTS}
    asked = {
        name: value
        for name, value in options.items()
        if value is not None and (value != SAMPLING_DEFAULTS[name] or given.get(name) is not None)
    }
    if not config.do_sample:
        for name, value in asked.items():
            if value != fitted[name]:
                raise InvalidInput(
                    f"{name} = {value} needs do_sample=True: without, it is the artefact's {fitted[name]}. Give that "
                    f"too, or {name}=None"
                )
    return fitted | asked


def _proposal(
    model: Any,
    energy: Energy,
    config: Any,
    criteria: Iterable[Any],
    sampling: dict[str, Any],
    tokenizer: Any,
    num_candidates: int | None,
    prompt: int,
) -> TransformersProposal:
    """With the artefact's settings, and what the criteria, or else the generation config, say of lengths and of the end
    of a text."""
    fitted = energy.proposal_settings
    limits = [criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria)]
    longest = min(limits, default=config.max_length) - prompt
    if longest < 1:
        raise InvalidInput(
            f"max_length = {longest + prompt} leaves nothing to generate: the prompt has {prompt} tokens"
        )
    shortest = config.min_new_tokens
    if shortest is None:
        shortest = max(min(1, fitted.min_new_tokens), (config.min_length or 0) - prompt)
    settings = {
        **sampling,
        "num_candidates": fitted.num_candidates if num_candidates is None else num_candidates,
        "max_new_tokens": longest,
        "min_new_tokens": min(shortest, longest),
        "count_eos": fitted.count_eos,
    }
    eos = config.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    ends = [criterion.eos_token_id.tolist() for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
    if ends and (named := {token for tokens in ends for token in tokens}) != set(eos):
        eos = sorted(named)
    elif energy.chat_template is not None:  # the turn's end, which some configs lack: it ended candidates in the fit
        eos = eos_token_ids(eos, tokenizer)
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
