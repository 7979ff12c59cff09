"""Prompts and texts with tokenizers of real kinds: SentencePiece's, byte-level BPE, WordPiece.

What a text must be is computed here from the bytes of the pieces, without a decoder.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from daemon_fast import Candidates, TransformersProposal
from daemon_fast.errors import InvalidInput
from daemon_fast.proposals.base import ids_behind, prompt_ids, tokenize
from daemon_fast.proposals.candidates import TAIL

SPECIALS = ["<unk>", "<s>", "</s>"]
SAMPLE = "The model's text — as it wrote it: naïve, 東京, ok 😀 . Isn't it ? Yes , it 's\n\nso  well done"


def sentencepiece(before="always", after=""):
    """As Llama-2's: pieces with ▁ for a space, one before the text, bytes for what has no piece."""
    words = [word for text in SAMPLE.split() for word in ("▁" + text, text)]
    letters = sorted({letter for text in SAMPLE if text.isascii() for letter in text if not letter.isspace()})
    pieces = list(dict.fromkeys([*SPECIALS, *(f"<0x{b:02X}>" for b in range(256)), "▁", *letters, *words]))
    scores = [(p, 0.0 if p in SPECIALS else -20.0 if p.startswith("<0x") else -float(10 - len(p) / 10)) for p in pieces]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=before, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {after}".strip(), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level():
    """As GPT-2's: tokens are of bytes, so that a character may lie in two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "t"), ("Ġ", "it"), ("Ã", "¯"), ("ð", "Ł")]
    vocabulary = dict.fromkeys(["<eos>", *alphabet, *("".join(pair) for pair in merges)])
    vocabulary = {token: i for i, token in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<eos>")


def word_piece():
    """As BERT's, with the clean-up of spaces before punctuation that Transformers has for it."""
    pieces = ["[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz.,?'!", *("##" + letter for letter in "abcdest")]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate([*pieces, "it", "do", "n't", "'s"])}))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(cleanup=False)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        clean_up_tokenization_spaces=True,
    )  # fmt: skip


def candidates(tokenizer, prefixes, rows):
    """One candidate of each prefix, as every proposal makes them."""

    def detokenize(ids):
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    nothing = [[0.0] * len(row) for row in rows]
    return Candidates.from_rows(rows, nothing, nothing, list(map(len, rows)), prefixes, detokenize)


def written(tokenizer, ids):
    """The bytes that these tokens stand for."""
    letters = {letter: byte for byte, letter in _bytes_to_letters().items()}
    out = b""
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token in tokenizer.all_special_tokens:
            continue
        if token.startswith("<0x"):
            out += bytes([int(token[3:5], 16)])
        elif "▁" in token or "<0x00>" in tokenizer.get_vocab():
            out += token.replace("▁", " ").encode()
        else:
            out += bytes(letters[letter] for letter in token)
    return out


def _bytes_to_letters():
    """GPT-2's: bytes that can be printed stand for themselves, the others for letters from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


KINDS = {"SentencePiece": sentencepiece(), "byte-level BPE": byte_level()}
WORDS = st.lists(st.sampled_from([*SAMPLE.split(" "), " ", "\n", "é", "😀", "▁", "xyz"]), min_size=1, max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(words=WORDS, at=st.floats(0, 1), extra=st.integers(0, 2))
def test_a_text_is_what_the_model_wrote(kind, words, at, extra):
    tokenizer = KINDS[kind]
    ids = tokenizer(" ".join(words))["input_ids"]
    cut = min(len(ids), 1 + round(at * (len(ids) - 1)))
    prefix, row = ids[:cut] + [tokenizer.eos_token_id] * extra, ids[cut:]
    c = candidates(tokenizer, [prefix], [row])
    before, behind = written(tokenizer, prefix), written(tokenizer, row)
    shown = before.decode(errors="ignore")  # without the first bytes of a character that the row completes
    want = (before + behind).decode()[len(shown) :]
    if not before and kind == "SentencePiece":
        want = want.removeprefix(" ")  # nothing precedes it: the space before a text is none of its own
    assert c.texts == [want]
    assert c.prefix_texts[0].rstrip("\ufffd") + c.texts[0] == tokenizer.decode(prefix + row, skip_special_tokens=True)


def test_a_byte_that_breaks_the_prefixs_last():
    """A tab and half a character, each one token of a byte, read as two broken characters: only one is the row's."""
    tokenizer = KINDS["SentencePiece"]
    tab, half, letter = tokenizer.convert_tokens_to_ids(["<0x09>", "<0x80>", "T"])
    for prefix in ([tab], [letter, tab]):
        assert tokenizer.decode([*prefix, half]).endswith("\ufffd\ufffd")
        assert candidates(tokenizer, [prefix], [[half]]).texts == ["\ufffd"]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(list(KINDS)))
def test_any_tokens_read_as_behind_the_whole_prefix(data, kind):
    tokenizer = KINDS[kind]
    ids = st.lists(st.integers(0, len(tokenizer) - 1), max_size=3 * TAIL)
    prefixes = data.draw(st.lists(ids.filter(bool), min_size=3, max_size=3))
    rows = data.draw(st.lists(ids, min_size=3, max_size=3))
    texts = candidates(tokenizer, prefixes, rows).texts
    for prefix, row, text in zip(prefixes, rows, texts, strict=True):
        before, both = (tokenizer.decode(x, skip_special_tokens=True) for x in (prefix, prefix + row))
        if both.startswith(before):
            assert text == both[len(before) :]
        elif both.startswith(whole := before.rstrip("\ufffd")):
            assert text == both[len(whole) :]
        else:  # only broken characters read otherwise behind others
            assert "\ufffd" in both
            assert text == tokenizer.decode(row, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("prefix", "row", "want"),
    [
        ("it", "'s", "'s"),
        ("do", "n't", "n't"),
        ("do", "it .", " it."),
        ("it .", "do", " do"),
        ("do ,", "? it", "? it"),
        ("a ' b '", "s it", "s it"),
        ("a", "##b", "b"),
    ],
)
def test_spaces_that_are_cleaned_up_at_the_border(prefix, row, want):
    tokenizer = word_piece()
    before, behind = (tokenizer.convert_tokens_to_ids(text.split()) for text in (prefix, row))
    c = candidates(tokenizer, [before], [behind])
    assert c.texts == [want]
    whole = tokenizer.decode(before + behind)
    assert "".join((c.prefix_texts[0] + c.texts[0]).split()) == "".join(whole.split())
    assert whole.endswith(c.texts[0])


def test_chosen_texts_are_the_candidates():
    tokenizer = sentencepiece()
    ids = tokenizer("The model's text as it wrote it")["input_ids"]
    c = candidates(tokenizer, [ids[:2], ids[:3], ids[:4]], [ids[2:], ids[3:], []])
    assert c.texts == [" model's text as it wrote it", " text as it wrote it", ""]
    assert c.texts_of([1, 0, 1]) == [c.texts[1], c.texts[0], c.texts[1]]
    assert c.texts_of([]) == []


def test_a_proposals_text_follows_its_prompt():
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1} | {f"▁w{i}": i + 2 for i in range(60)}, "<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    c = TransformersProposal(tiny.model(), tokenizer, num_candidates=3, max_new_tokens=4).propose(["w1 w2"], 0)
    for row, n, text in zip(c.tokens.tolist(), c.lengths, c.texts, strict=True):
        assert "w1 w2" + text == tokenizer.decode(c.prefix_tokens[0] + row[:n], skip_special_tokens=True)


def test_a_prompt_ends_where_its_text_ends():
    plain, ending = sentencepiece(), sentencepiece(after="</s>")
    for text in ("The model's text", "it", "so </s>", "a"):
        assert prompt_ids(text, ending) == prompt_ids(text, plain) == plain(text)["input_ids"]
    assert ending("it")["input_ids"][-1] == ending.eos_token_id
    assert tokenize(["it"], ending, len(ending), None, 4) == [plain("it")["input_ids"]]
    assert prompt_ids("", ending) == [1]
    bert = word_piece()
    assert prompt_ids("it do", bert) == bert("it do")["input_ids"][:-1]
    with pytest.raises(InvalidInput, match="prefix 0 is empty"):
        tokenize([""], byte_level(), 300, None, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_servers_text_is_tokenized_where_it_stands(kind):
    tokenizer = KINDS[kind]
    ids = tokenizer("The model's text as it wrote it")["input_ids"]
    for cut in range(2, len(ids)):
        text = candidates(tokenizer, [ids[:cut]], [ids[cut:]]).texts[0]
        assert ids_behind(ids[:cut], text, tokenizer) == ids[cut:]
    assert ids_behind(ids[:3], "", tokenizer) == []
    # In the middle of a word, the model may have written what a tokenizer would have joined: the text is kept.
    row = ids_behind(tokenizer("The mod")["input_ids"], "el text", tokenizer)
    assert tokenizer.decode(ids[:2] + row).endswith("el text")
    assert not tokenizer.decode(ids[:2] + row).endswith(" el text")


def test_texts_cost_little_more_than_decoding():
    """Long prefixes are not decoded with every candidate."""
    tokenizer, decoded = byte_level(), []

    def detokenize(rows):
        decoded.extend(map(len, rows))
        return tokenizer.batch_decode(rows)

    ids = tokenizer("the text " * 200)["input_ids"]
    rows = [ids[:20]] * 25
    zeros = torch.zeros(25, 20)
    c = Candidates(torch.tensor(rows), torch.full((25,), 20), zeros, zeros, [ids], detokenize)
    assert len(set(c.texts)) == 1
    assert sum(decoded) <= len(ids) + TAIL + 25 * (20 + TAIL)
