"""The repetition rules of Gopher against their definition in plain Python, and that against datatrove where it is."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from daemon_fast import reference
from daemon_fast.errors import InvalidInput
from daemon_fast.gopher import BATCH_TEXTS, GOPHER_THRESHOLDS, gopher_repetition, gopher_violations, split_words

NAMES = list(GOPHER_THRESHOLDS)


def defined(texts, words):
    rows = [reference.gopher_repetition(text, row) for text, row in zip(texts, words, strict=True)]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(texts), len(NAMES))


def one(text, words=None):
    values = gopher_repetition([text], None if words is None else [words])
    return dict(zip(NAMES, values[0].tolist(), strict=True))


few = st.text(st.sampled_from("ab'. \n\t\u3000é猫\U0001f600"), min_size=1, max_size=80)
loops = st.builds(lambda part, n, rest: part * n + rest, few, st.integers(1, 12), few)


@given(st.lists(st.one_of(few, loops, st.text(min_size=1)), min_size=1, max_size=5))
def test_equals_the_definition(texts):
    assert torch.equal(gopher_repetition(texts), defined(texts, map(split_words, texts)))


@given(st.lists(st.tuples(loops, st.lists(st.text(st.sampled_from("ab \n"), min_size=1), max_size=40)), min_size=1))
def test_equals_the_definition_on_words_of_another_tokenizer(rows):
    texts, words = map(list, zip(*rows, strict=True))
    assert torch.equal(gopher_repetition(texts, words), defined(texts, words))


def test_violations_are_compared_in_double_precision():
    fractions = torch.tensor([list(GOPHER_THRESHOLDS.values())], dtype=torch.float64)
    assert not gopher_violations(fractions).any()
    assert gopher_violations(fractions.nextafter(torch.tensor(2.0, dtype=torch.float64))).all()
    assert not gopher_violations(gopher_repetition([""])).any()


def test_more_texts_than_one_call_takes():
    r = random.Random(0)
    texts = ["".join(r.choices("abc \n", k=r.randint(1, 300))) for _ in range(2 * BATCH_TEXTS + 1)]
    words = [split_words(text) for text in texts]
    assert torch.equal(gopher_repetition(texts), defined(texts, words))
    assert torch.equal(gopher_repetition(texts, words), defined(texts, words))


def test_figures_by_hand():
    found = one("a b a b c")
    assert found["top_2_gram"] == 2 * len("a b") / 9
    assert found["top_3_gram"] == len("a b a") / 9  # none repeats: the first
    assert found["top_4_gram"] == len("a b a b") / 9
    found = one("x y z v w " * 3)  # 30 characters; of three 5-grams two are repeats
    assert found["duplicated_5_n_grams"] == 10 / 30
    assert found["duplicated_6_n_grams"] == 6 / 30
    found = one("one\ntwo\none\n\none\n\none")
    assert (found["dup_line_frac"], found["dup_line_char_frac"]) == (3 / 5, 9 / 21)
    assert (found["dup_para_frac"], found["dup_para_char_frac"]) == (1 / 3, 3 / 21)


def test_ngrams_are_compared_as_strings():
    found = one("0123456789", ["ab", "c", "d", "e", "f", "a", "bc", "d", "e", "f"])
    assert found["duplicated_5_n_grams"] == 0.6  # without spaces both are "abcdef"
    assert found["top_2_gram"] == 2 * len("d e") / 10
    found = one("0123456789", ["a b", "c", "x", "a", "b c"])
    assert found["top_2_gram"] == 2 * len("a b c") / 10


def test_texts_that_hold_little():
    assert all(math.isnan(value) for value in one("").values())
    lines = {"dup_line_frac": 1 / 2, "dup_line_char_frac": 1 / 4}  # a space is a line, though no word
    assert one(" \n\n ") == {**dict.fromkeys(NAMES, 0.0), **lines}
    assert one("word") == dict.fromkeys(NAMES, 0.0)
    assert one("two words")["top_2_gram"] == 1.0
    assert gopher_repetition([]).shape == (0, 13)
    assert gopher_repetition(["a b"], [[]])[0].tolist() == [0.0] * 13


def test_lone_surrogates_are_characters_too():
    text = "\ud835 \ud835 a \ud835 \ud835"
    assert torch.equal(gopher_repetition([text]), defined([text], [split_words(text)]))


@given(st.text())
def test_words_are_those_of_the_regular_expression(text):
    # By the length of the n-gram that comes first, at each word: `split_words` and the operator split alike.
    words = split_words(text)
    for i in range(len(words) - 1):
        rest = " ".join(words[i:])
        assert gopher_repetition([rest]).equal(gopher_repetition([rest], [words[i:]]))


def test_characters_split_as_the_regular_expression_has_it():
    some = [*range(0x3100), *range(0x3100, sys.maxunicode + 1, 31)]
    texts = [f"a{chr(c)}b a{chr(c)}b" for c in some]
    assert gopher_repetition(texts).equal(gopher_repetition(texts, list(map(split_words, texts))))


def test_bad_words_are_named():
    with pytest.raises(InvalidInput, match="words are those of 1 texts, but there are 2 texts"):
        gopher_repetition(["a", "b"], [["a"]])
    with pytest.raises(InvalidInput, match=r"words\[1\]\[2\] is empty"):
        gopher_repetition(["a", "b"], [["a"], ["b", "c", ""]])


def test_operator():
    op = torch.ops.daemon_fast.gopher_repetition.default
    characters = torch.tensor([97, -1, 98, -1, -48, 97, -1], dtype=torch.int32)
    ends = torch.tensor([2, 2, 7])
    assert op(characters, ends, [1, 2], [1]).tolist() == [[1, 0, 0], [0, 0, 0], [1, 3, 0]]
    torch.library.opcheck(op, (characters, ends, [1, 2], [1]))
    torch.library.opcheck(op, (characters, ends, [], []))
    for message, *arguments in (
        (r"characters must be int32, got int64", characters.long(), ends, [2], [5]),
        (r"text_ends must have shape \[N\], got \[1, 3\]", characters, ends[None], [2], [5]),
        (r"text_ends\[1\] = 1 is not in \[2, 7\]", characters, torch.tensor([2, 1, 7]), [2], [5]),
        (r"text_ends\[0\] = 8 is not in \[0, 7\]", characters, torch.tensor([8]), [2], [5]),
        (r"top\[0\] = 0 is below the minimum 1", characters, ends, [0], [5]),
        (r"duplicated\[1\] = -1 is below the minimum 1", characters, ends, [2], [5, -1]),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_results_do_not_depend_on_threads():
    code = (
        "import torch, random; from daemon_fast.gopher import gopher_repetition; r = random.Random(1);"
        "t = [''.join(r.choices('ab c', k=200)) for _ in range(200)]; torch.set_num_threads({});"
        "print(gopher_repetition(t).tolist())"
    )
    one, two = (subprocess.check_output([sys.executable, "-c", code.format(n)]) for n in (1, 2))
    assert one == two


def test_equals_datatrove(monkeypatch):
    module = "datatrove.pipeline.filters.gopher_repetition_filter"
    datatrove = pytest.importorskip(module, reason="datatrove is not installed (make test installs it)")
    from datatrove.data import Document

    monkeypatch.setattr(datatrove, "split_into_words", lambda text, language: split_words(text))  # its own needs spaCy

    r = random.Random(0)
    texts = ["".join(r.choices("ab c.\n", k=r.randint(1, 120))) for _ in range(300)]
    found = gopher_repetition(texts, list(map(split_words, texts)))
    for name, values in zip(NAMES, found.T.tolist(), strict=True):
        # Each rule by itself, its limit at the value of one of the texts: it must say the same of all.
        for limit in sorted({value for value in values if value > 0})[:20]:
            rule = {name: limit} if name.startswith("dup_") else {}
            n = int("".join(filter(str.isdigit, name)) or 0)
            top = ((n, limit),) if name.startswith("top") else ()
            duplicated = ((n, limit),) if name.startswith("duplicated") else ()
            none = dict.fromkeys(NAMES[:4])
            judge = datatrove.GopherRepetitionFilter(**{**none, **rule}, top_n_grams=top, dup_n_grams=duplicated)
            assert [judge.filter(Document(text=t, id="")) is True for t in texts] == [v <= limit for v in values]
