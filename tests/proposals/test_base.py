"""What may be given as prefixes, to every engine and to the decoder."""

from __future__ import annotations

import json
import re
import reprlib

import numpy as np
import pytest
import tiny
import torch
import toy

from daemon_fast import Energy, ProposalSettings, SIRDecoder, metrics
from daemon_fast.errors import InvalidInput
from daemon_fast.proposals.base import as_list, seed_of_each, tokenize

ONE = {
    "a string": "w3 w7 w28",
    "a list of ids": [5, 9, 30],
    "a tuple": (5, 9, 30),
    "a range": range(5, 8),
    "numpy ints": list(np.array([5, 9, 30])),
    "an array": np.array([5, 9, 30], dtype=np.int32),
    "a tensor [P]": torch.tensor([5, 9, 30]),
    "tensors without dimensions": list(torch.tensor([5, 9, 30])),
}
TWO = {
    "strings": ["w3 w7", "w28"],
    "lists of ids": [[5, 9], [30]],
    "a string and ids": ("w3 w7", [30]),
    "a tensor [N, P]": torch.tensor([[5, 9], [30, 2]]),
    "an array [N, P]": np.array([[5, 9], [30, 2]]),
    "tensors": [torch.tensor([5, 9]), np.array([30])],
}
BAD = {
    "None": (None, "prefixes = None must be a string, a list of token ids, a chat, or a list of these"),
    "a number": (5, "prefixes = 5 must be"),
    "a tensor []": (torch.tensor(5), r"prefixes = tensor\(5\) must be"),
    "bytes": (b"w1", "prefixes = b'w1' must be"),
    "a chat": ([{"role": "user", "content": "w1"}], "prefix 0 is a chat, and the tokenizer '' has no chat template"),
    "a message without a content": ([[{"role": "user"}]], "prefix 0, message 0 has a content of type NoneType"),
    "one message": (
        {"role": "system"},
        "prefixes has a dict in place of a text or token ids: a chat is a list of mess",
    ),
    "what a tokenizer gives": (tiny.tokenizer()(["w1"]), r"prefixes has a BatchEncoding.*give its \['input_ids'\]"),
    "another dictionary": ([[3], {}], "prefix 1 has a dict in place of a text or token ids$"),
    "floats": ([[5, 9.0]], r"prefix 0 has 9.0 at position 1: a token id is an integer"),
    "a flat list of floats": ([0.5], "prefixes has 0.5 at position 0"),
    "a tensor of floats": (torch.tensor([[0.5]]), "prefix 0 has 0.5 at position 0"),
    "booleans": ([[5], [True]], "prefix 1 has True at position 0"),
    "an array of booleans": (np.array([True]), "prefixes has True at position 0"),
    "strings of ids": ([["5", "9"]], "prefix 0 has '5' at position 0"),
    "None among texts": (["w1", None], "prefix 1 = None must be a list of token ids"),
    "an id among lists": ([[5], 9], "prefix 1 = 9 must be a list of token ids"),
    "a tensor of three dimensions": (torch.zeros(1, 1, 1).long(), r"prefix 0 has \[0\] at position 0"),
}


BAD_SETTINGS = {
    "num_candidates": (True, 3.0, "3", None, np.bool_(True), torch.tensor(True), np.float64(3)),
    "max_new_tokens": (True, 3.0, "3", None),
    "min_new_tokens": (False, 0.0, None),
    "top_k": (True, 5.0, None),
    "temperature": (True, "0.9", None, torch.tensor(0.9), 1j),
    "top_p": (True, "0.9", None),
    "min_p": (False, "0", None),
    "count_eos": (1, "yes", None),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_of_another_type_are_named(name):
    for bad in BAD_SETTINGS[name]:
        with pytest.raises(InvalidInput, match=rf"^{name} = {re.escape(reprlib.repr(bad))} must be "):
            ProposalSettings("m", "v", **{name: bad})


def test_settings_take_numpys_numbers():
    given = {
        "num_candidates": np.int64(3), "max_new_tokens": np.int32(9), "min_new_tokens": np.uint8(2),
        "temperature": np.float64(0.5), "top_k": np.int64(5), "top_p": np.float32(0.5), "min_p": 0,
    }  # fmt: skip
    settings = ProposalSettings("m", "v", **given)
    assert settings == ProposalSettings("m", "v", 3, 9, 2, 0.5, 5, 0.5, 0.0)
    assert json.loads(json.dumps(settings.to_json())) == settings.to_json()


def test_seeds_are_integers():
    assert seed_of_each(np.int64(2**62), 2) == [(2**62, 0), (2**62, 1)]
    assert seed_of_each([3, np.int32(4)], 2) == [(3, 0), (4, 0)]
    for bad in (1.0, None, True, "1", 2**64, [1, 2.0], np.array([3, 4])):
        with pytest.raises(InvalidInput, match=r"seed = .* must be"):
            seed_of_each(bad, 2)


@pytest.mark.parametrize("form", ONE)
def test_one_prefix(form):
    rows = tokenize(ONE[form], tiny.tokenizer(), tiny.VOCABULARY, None, 1)
    assert rows == [[5, 6, 7] if form == "a range" else [5, 9, 30]]
    assert {type(token) for token in rows[0]} == {int}


@pytest.mark.parametrize("form", TWO)
def test_two_prefixes(form):
    rows = tokenize(TWO[form], tiny.tokenizer(), tiny.VOCABULARY, None, 1)
    assert rows == [[5, 9], [30, 2] if "[N, P]" in form else [30]]


@pytest.mark.parametrize("form", BAD)
def test_what_is_neither_text_nor_ids_is_named(form):
    prefixes, message = BAD[form]
    with pytest.raises(InvalidInput, match=message):
        tokenize(prefixes, tiny.tokenizer(), tiny.VOCABULARY, None, 1)


def test_the_decoder_takes_and_refuses_the_same():
    proposal = toy.ToyProposal(num_candidates=10)
    zero = torch.zeros(1, dtype=torch.float64)
    decoder = SIRDecoder(Energy(metrics.parse(["sr_1"]), zero, zero, proposal.settings), proposal, batch_size=1)
    for forms, count in ((ONE, 1), (TWO, 2)):
        for prefixes in forms.values():
            assert len(decoder(prefixes).index) == count
    for form, (prefixes, message) in BAD.items():
        if form != "a chat":  # which is for the proposal's tokenizer to refuse
            with pytest.raises(InvalidInput, match=message):
                decoder(prefixes)


def test_nothing_is_no_prefix():
    assert as_list([]) == as_list(torch.zeros(0, 3).long()) == []
    with pytest.raises(InvalidInput, match="there are no prefixes"):
        tokenize([], tiny.tokenizer(), tiny.VOCABULARY, None, 1)


def test_half_a_character_is_no_text():
    with pytest.raises(InvalidInput, match=r"prefix 1 has the lone surrogate '\\ud835' at position 2"):
        tokenize(["w1", "w2\ud835"], tiny.tokenizer(), tiny.VOCABULARY, None, 1)
