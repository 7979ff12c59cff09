"""`generate(custom_generate=daemon_fast.generate)`: what Transformers' users know, by DAEMON."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TextStreamer,
    WatermarkingConfig,
)

import daemon_fast
from daemon_fast import Energy, SIRDecoder, TransformersProposal, metrics
from daemon_fast.errors import ArtefactError, InvalidInput

SETTINGS = {"num_candidates": 6, "max_new_tokens": 10, "min_new_tokens": 1, "temperature": 1.3}


@pytest.fixture
def model():
    return tiny.model("llama")


def energy_for(model, tokenizer=None, **settings):
    proposal = TransformersProposal(model, tokenizer or tiny.tokenizer(), **{**SETTINGS, **settings})
    mu = torch.tensor([30.0, -40.0], dtype=torch.float64)
    return Energy(metrics.parse(["tr_8", "sr_1"]), mu, torch.zeros(2), proposal.settings), proposal


def generate(model, energy, ids=((5, 9, 30),), **options):
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), len(ids[0]), dtype=torch.long)}
    options = {"max_new_tokens": 10, "energy": energy, "seed": 3, **inputs, **options}
    return model.generate(custom_generate=daemon_fast.generate, **options)


@pytest.mark.parametrize("draw", ["sir", "race"])
def test_it_returns_what_the_decoder_chooses(model, draw):
    energy, proposal = energy_for(model)
    energy = replace(energy, draw=draw)
    out = generate(model, energy, processing_class=tiny.tokenizer())
    chosen = SIRDecoder(energy, proposal, batch_size=1)([[5, 9, 30]], seed=3)
    row = chosen.tokens[0][0]
    assert out.dtype == torch.int64
    assert out[0, :3].tolist() == [5, 9, 30]
    assert out[0, 3 : 3 + len(row)].tolist() == row
    assert out[0, 3 + len(row) :].tolist() in ([], [0])  # the end of text


def test_prompts_of_a_batch_and_several_sequences_of_each(model):
    energy, _ = energy_for(model)
    ids = torch.tensor([[0, 0, 5], [5, 9, 30]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    out = generate(
        model,
        energy,
        input_ids=ids,
        attention_mask=mask,
        num_return_sequences=4,
        do_sample=True,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape[0] == 8
    assert torch.equal(out.sequences[:, :3], ids.repeat_interleave(4, dim=0))
    assert out.decoded.candidates.prefix_tokens == [[5], [5, 9, 30]]
    assert out.decoded.index.shape == (2, 4)
    texts = [row for chosen in out.decoded.tokens for row in chosen]
    for row, text in zip(out.sequences.tolist(), texts, strict=True):
        assert row[3 : 3 + len(text)] == text
        assert set(row[3 + len(text) :]) <= {0}


def test_end_of_text_is_returned_and_padded_behind(model):
    energy, _ = energy_for(model)
    out = generate(model, energy, num_return_sequences=50, do_sample=True, eos_token_id=[*range(7, 30)], pad_token_id=1)
    ended = 0
    for row in out[:, 3:].tolist():
        if at := [i for i, token in enumerate(row) if 7 <= token < 30]:
            assert all(token == 1 for token in row[at[0] + 1 :])
            ended += 1
        else:
            assert len(row) == 10
    assert ended


def test_lengths_come_from_the_generation_config(model):
    energy, _ = energy_for(model, max_new_tokens=4)
    config = GenerationConfig(max_new_tokens=4, min_new_tokens=4)
    inputs = {"input_ids": torch.tensor([[5, 9, 30]]), "energy": energy}
    out = model.generate(**inputs, generation_config=config, custom_generate=daemon_fast.generate)
    assert out.shape == (1, 7)
    with pytest.warns(UserWarning, match="max_new_tokens 4 -> 8"):
        assert generate(model, energy, max_new_tokens=8, min_new_tokens=8).shape == (1, 11)


def test_sampling_settings_are_the_artefacts_unless_do_sample(model):
    energy, _ = energy_for(model)
    fitted = generate(model, energy, return_dict_in_generate=True).decoded.candidates
    same = generate(model, energy, do_sample=True, return_dict_in_generate=True).decoded.candidates
    assert torch.equal(same.tokens, fitted.tokens)
    with pytest.warns(UserWarning, match=r"temperature 1.3 -> 0.5, top_k 0 -> 3"):
        sampled = generate(
            model, energy, do_sample=True, temperature=0.5, top_k=3, top_p=1.0, return_dict_in_generate=True
        ).decoded.candidates
    assert (fitted.token_log_q < sampled.token_log_q).float().mean() > 0.5
    assert not torch.equal(fitted.tokens, sampled.tokens)


def test_the_seed_is_torchs_unless_given(model):
    energy, _ = energy_for(model)

    def drawn(manual, **options):
        torch.manual_seed(manual)
        return generate(model, energy, return_dict_in_generate=True, **options).decoded.candidates.tokens

    assert torch.equal(drawn(0, seed=None), drawn(0, seed=None))
    assert not torch.equal(drawn(0, seed=None), drawn(1, seed=None))
    assert torch.equal(drawn(0), drawn(1))


def test_it_streams_the_chosen_text(model, capsys):
    energy, _ = energy_for(model)
    streamer = TextStreamer(tiny.tokenizer(), skip_prompt=True)
    out = generate(model, energy, streamer=streamer, max_new_tokens=10)
    assert capsys.readouterr().out.split() == tiny.tokenizer().decode(out[0, 3:]).split()


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


# Every field of the generation config: a value that asks for something, and what comes of it: "followed" (tested
# above), "no effect" on what is sampled, "refused" by us, or words of another error: that about a tokenizer is
# Transformers' own, raised before we are called.
FIELDS = {
    "max_length": (20, "followed"),
    "max_new_tokens": (10, "followed"),
    "min_length": (2, "followed"),
    "min_new_tokens": (2, "followed"),
    "do_sample": (True, "followed"),
    "temperature": (1.3, "followed"),
    "top_k": (0, "followed"),
    "top_p": (1.0, "followed"),
    "min_p": (0.0, "followed"),
    "num_return_sequences": (1, "followed"),
    "return_dict_in_generate": (False, "followed"),
    "renormalize_logits": (True, "followed"),
    "pad_token_id": (0, "followed"),
    "bos_token_id": (0, "followed"),
    "eos_token_id": (0, "followed"),
    "use_cache": (False, "no effect"),
    "cache_config": (None, "no effect"),
    "max_cache_len": (60, "no effect"),
    "compile_config": (None, "no effect"),
    "disable_compile": (True, "no effect"),
    "prefill_chunk_size": (4, "no effect"),
    "low_memory": (True, "no effect"),
    "continuous_batching_config": (None, "no effect"),
    "transformers_version": ("5", "no effect"),
    "early_stopping": (True, "no effect"),
    "length_penalty": (2.0, "no effect"),
    "decoder_start_token_id": (3, "no effect"),
    "is_assistant": (None, "no effect"),
    "num_assistant_tokens": (3, "no effect"),
    "num_assistant_tokens_schedule": ("heuristic", "no effect"),
    "assistant_confidence_threshold": (0.5, "no effect"),
    "assistant_lookbehind": (5, "no effect"),
    "target_lookbehind": (5, "no effect"),
    "assistant_ensemble_weight": (0.5, "no effect"),
    "max_matching_ngram_size": (2, "no effect"),
    "speculation_type": (None, "no effect"),
    "max_time": (1.0, "refused"),
    "stop_strings": (["w1"], "tokenizer"),
    "num_beams": (2, "refused"),
    "use_mtp": (True, "refused"),
    "cache_implementation": ("static", "refused"),
    "top_h": (0.5, "refused"),
    "typical_p": (0.9, "refused"),
    "epsilon_cutoff": (0.01, "refused"),
    "eta_cutoff": (0.01, "refused"),
    "repetition_penalty": (1.2, "refused"),
    "encoder_repetition_penalty": (1.2, "refused"),
    "no_repeat_ngram_size": (3, "refused"),
    "bad_words_ids": ([[5]], "refused"),
    "forced_bos_token_id": (0, "refused"),
    "forced_eos_token_id": (0, "refused"),
    "remove_invalid_values": (True, "refused"),
    "exponential_decay_length_penalty": ((3, 1.5), "refused"),
    "suppress_tokens": ([4], "refused"),
    "begin_suppress_tokens": ([4], "refused"),
    "sequence_bias": ([[[4], 2.0]], "refused"),
    "token_healing": (True, "tokenizer"),
    "guidance_scale": (2.0, "refused"),
    "watermarking_config": (WatermarkingConfig(), "refused"),
    "output_attentions": (True, "output_attentions is not offered"),
    "output_hidden_states": (True, "output_hidden_states is not offered"),
    "output_scores": (True, "output_scores is not offered"),
    "output_logits": (True, "output_logits is not offered"),
    "encoder_no_repeat_ngram_size": (2, "refused"),
    "prompt_lookup_num_tokens": (2, "refused"),
    "assistant_early_exit": (1, "refused"),
    "penalty_alpha": (0.6, "refused"),
    "dola_layers": ("high", "refused"),
    "diversity_penalty": (0.5, "refused"),
    "num_beam_groups": (2, "refused"),
    "constraints": ([], "refused"),
    "force_words_ids": ([[4]], "refused"),
}


def test_every_field_of_the_generation_config_is_thought_of():
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} == FIELDS.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("do_sample", [None, True])
@pytest.mark.parametrize("name", FIELDS)
def test_an_option_is_followed_or_refused(model, name, do_sample):
    value, outcome = FIELDS[name]
    energy, _ = energy_for(model)
    options = {"do_sample": do_sample, "return_dict_in_generate": outcome != "followed", "seed": 3, name: value}
    if outcome == "followed":
        generate(model, energy, **options)
    elif outcome == "no effect":
        got = generate(model, energy, **options).sequences
        assert torch.equal(got, generate(model, energy, do_sample=do_sample))
    else:
        message = f"{name} = .* can't be followed" if outcome == "refused" else outcome
        with pytest.raises(ValueError if outcome == "tokenizer" else InvalidInput, match=message):
            generate(model, energy, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": None}, "needs energy=.* got None"),
        ({"energy": "energy.json"}, "needs energy=.* got 'energy.json'"),
        ({"logits_processor": LogitsProcessorList([Nothing()])}, "Nothing can't be applied"),
        ({"stopping_criteria": [MaxTimeCriteria(1.0)]}, "MaxTimeCriteria can't be applied"),
        (
            {"stopping_criteria": [StopStringCriteria.__new__(StopStringCriteria)]},
            "StopStringCriteria can't be applied",
        ),
        ({"stopping_criteria": [type("Own", (MaxLengthCriteria,), {})(9)]}, "Own can't be applied"),
        ({"stopping_criteria": [MaxLengthCriteria(3)]}, "max_length = 3 leaves nothing to generate: the prompt has 3"),
        ({"logits_processor": [TemperatureLogitsWarper(0.5)]}, "TemperatureLogitsWarper in logits_processor can't be"),
        ({"prefix_allowed_tokens_fn": lambda i, ids: [4]}, "PrefixConstrainedLogitsProcessor can't be applied"),
        ({"assistant_model": tiny.model("llama")}, "assistant_model = <LlamaForCausalLM> can't be followed"),
        ({"negative_prompt_ids": torch.tensor([[3]])}, "negative_prompt_ids = tensor"),
        ({"synced_gpus": True}, "synced_gpus = True can't be followed"),
        ({"do_sample": False}, "do_sample = False asks for the likeliest tokens"),
        ({"temperature": 0.5}, "temperature = 0.5 needs do_sample=True"),
        ({"num_return_sequences": 0}, "num_return_sequences = 0 must be >= 1"),
        ({"num_candidates": 2.0}, "num_candidates = 2.0 must be an integer >= 1"),
        ({"num_candidates": 0}, "num_candidates = 0 must be >= 1"),
        ({"past_key_values": DynamicCache()}, "past_key_values is not offered"),
        ({"position_ids": torch.tensor([[3, 4, 5]])}, "position_ids is not offered"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds is not offered"),
        ({"token_type_ids": torch.tensor([[0, 1, 1]])}, "token_type_ids is not offered"),
        ({"encoder_hidden_states": torch.zeros(1, 3, 32)}, "encoder_hidden_states is not offered"),
    ],
)
def test_what_has_no_place_in_it_is_refused(options, message):
    model = tiny.model("gpt2")  # whose `forward` takes the most
    energy, _ = energy_for(model)
    with pytest.raises(InvalidInput, match=message):
        generate(model, **{"energy": energy, **options})


@pytest.mark.filterwarnings("ignore:mu was fitted with other")
def test_a_callers_criteria_end_texts_as_in_transformers(model):
    energy, _ = energy_for(model)
    many = {"num_return_sequences": 40, "do_sample": True, "min_new_tokens": 0, "eos_token_id": 14, "pad_token_id": 1}
    plain = generate(model, energy, **many)
    for criteria in ([MaxLengthCriteria(5)], [MaxLengthCriteria(7), MaxLengthCriteria(5)]):
        assert torch.equal(
            generate(model, energy, stopping_criteria=criteria, **many),
            generate(model, energy, **many, max_new_tokens=2),
        )
    # They take the place of those that the options ask for.
    assert generate(model, energy, stopping_criteria=[MaxLengthCriteria(15)], min_new_tokens=12).shape == (1, 15)
    for of_options in (0, None, [0, 14]):
        asked = {**many, "eos_token_id": of_options, "stopping_criteria": [EosTokenCriteria(14)]}
        assert torch.equal(generate(model, energy, **asked), plain)
    ended = [row for row in plain[:, 3:].tolist() if 14 in row]
    assert ended
    assert all(set(row[row.index(14) + 1 :]) <= {1} for row in ended)
    assert not torch.equal(generate(model, energy, **{**many, "eos_token_id": 0}), plain)
    assert torch.equal(generate(model, energy, logits_processor=[LogitNormalization()], **many), plain)


def test_inputs_that_say_nothing_new_are_taken():
    model = tiny.model("gpt2")
    energy, _ = energy_for(model)
    plain = generate(model, energy)
    inputs = {"token_type_ids": torch.zeros(1, 3, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 2]])}
    assert torch.equal(generate(model, energy, **inputs), plain)
    with pytest.warns(UserWarning, match=r"temperature 1.3 -> 1.0, top_k 0 -> 50"):
        generate(model, energy, do_sample=True, temperature=1.0, top_k=50)  # given by name, Transformers' defaults too


def test_a_continuation_has_a_token_unless_none_is_asked_for(model):
    proposal = TransformersProposal(model, tiny.tokenizer(), **{**SETTINGS, "num_candidates": 50})
    zero = torch.zeros(1, dtype=torch.float64)
    energy = Energy(metrics.parse(["ent"]), zero, zero, proposal.settings)
    ends = {"eos_token_id": list(range(40)), "return_dict_in_generate": True}
    lengths = generate(model, energy, **ends).decoded.candidates.lengths
    assert lengths.min() == 1
    assert generate(model, energy, min_new_tokens=0, **ends).decoded.candidates.lengths.min() == 0
    answers = Energy(energy.metrics, zero, zero, replace(proposal.settings, min_new_tokens=0))
    assert generate(model, answers, **ends).decoded.candidates.lengths.min() == 0


def test_another_vocabulary_is_an_error(model):
    energy, _ = energy_for(model, tiny.tokenizer(words=50))
    with pytest.raises(ArtefactError, match="vocabulary"):
        generate(model, energy, processing_class=tiny.tokenizer())
