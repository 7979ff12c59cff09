"""`generate(custom_generate=daemon_fast.generate)`: what Transformers' users know, by DAEMON."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, MaxTimeCriteria, TextStreamer

import daemon_fast
from daemon_fast import Energy, SIRDecoder, TransformersProposal, metrics
from daemon_fast.errors import ArtefactError, InvalidInput

SETTINGS = {"num_candidates": 6, "max_new_tokens": 10, "min_new_tokens": 0, "temperature": 1.3}


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


def test_it_returns_what_the_decoder_chooses(model):
    energy, proposal = energy_for(model)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": None}, "needs energy="),
        ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor can't be applied"),
        ({"do_sample": True, "typical_p": 0.9}, "TypicalLogitsWarper can't be applied"),
        ({"logits_processor": LogitsProcessorList([Nothing()])}, "Nothing can't be applied"),
        ({"stopping_criteria": [MaxTimeCriteria(1.0)]}, "MaxTimeCriteria can't be applied"),
        ({"num_beams": 2}, "num_beams = 2 must be 1"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores is not offered"),
    ],
)
def test_what_has_no_place_in_it_is_refused(model, options, message):
    energy, _ = energy_for(model)
    with pytest.raises(InvalidInput, match=message):
        generate(model, options.pop("energy", energy), **options)


def test_another_vocabulary_is_an_error(model):
    energy, _ = energy_for(model, tiny.tokenizer(words=50))
    with pytest.raises(ArtefactError, match="vocabulary"):
        generate(model, energy, processing_class=tiny.tokenizer())
