"""Metrics of texts against the definitions in plain Python, and sets of n-grams of a whole corpus."""

from __future__ import annotations

import json
import math
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizer, PreTrainedTokenizerFast

from daemon_fast import reference
from daemon_fast.data.records import Item
from daemon_fast.errors import InvalidInput, UnknownMetric
from daemon_fast.filters import parse_filter
from daemon_fast.gopher import GOPHER_THRESHOLDS, gopher_repetition
from daemon_fast.text_metrics import BATCH_RECORDS, DistinctNGrams, Summary, TextMetrics, measure_records

NGRAMS, WINDOWS = (1, 2, 3, 5), (1, 8)
texts = st.lists(st.text(st.sampled_from("aab \n\u00a0é"), max_size=60), max_size=6)


def table(measured):
    return torch.stack(list(measured.columns.values()), 1)


def defined(rows):
    found = reference.repetition(rows, [len(row) for row in rows], NGRAMS, WINDOWS)
    nothing = [math.nan] * (len(NGRAMS) + len(WINDOWS))
    return np.array([values if row else nothing for row, values in zip(rows, found, strict=True)]).reshape(
        -1, len(nothing)
    )


@given(texts)
def test_words(some):
    measured = TextMetrics(NGRAMS, WINDOWS)(some)
    rows = [text.split() for text in some]
    np.testing.assert_allclose(table(measured).numpy(), defined(rows), rtol=1e-6)
    assert measured.empty.tolist() == [not row for row in rows]


def test_characters_are_grapheme_clusters_without_white_space():
    woman, thumbs = "\U0001f469\u200d\U0001f52c", "\U0001f44d\U0001f3fd"  # of three code points and of two
    composed, decomposed = "é", unicodedata.normalize("NFD", "é")
    some = ["东京 东京", f"{woman}{thumbs}\n{woman}{thumbs}", f"{decomposed}a{decomposed}a", f"{composed}a{composed}a"]
    measured = TextMetrics((2,), (), unit="character")(some)
    assert measured.columns["sr_2"].tolist() == pytest.approx([1 / 3] * 4)
    thai = "ที่นี่ที่นี่"  # four syllables, each a consonant with a vowel and a tone over it
    assert TextMetrics((1,), (), unit="character")([thai]).columns["sr_1"].item() == 0.5


def test_one_long_text_does_not_widen_the_others(monkeypatch):
    monkeypatch.setattr("daemon_fast.text_metrics.BATCH_TOKENS", 100)
    some = ["a b a " * n for n in (1, 2, 60, 1, 0, 1, 30, 3)]
    together = table(TextMetrics(NGRAMS, WINDOWS)(some))
    np.testing.assert_allclose(together.numpy(), defined([text.split() for text in some]), rtol=1e-6)


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=6), st.sets(st.integers(1, 9), min_size=1))
def test_distinct_ngrams_are_those_of_a_set(rows, ngrams):
    distinct = DistinctNGrams()
    for row in rows:
        distinct.add([row])
    expected = []
    for n in ngrams:
        found = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
        expected.append((len(set(found)), len(found)))
    assert distinct.counts(list(ngrams)) == expected


def test_distinct_ngrams_of_words_from_batch_to_batch():
    metrics = TextMetrics((1, 2), ())
    metrics.distinct = DistinctNGrams()
    for some in (["a b a b", "c"], [], ["b a", "c d a b"]):
        metrics(some)
    assert metrics.distinct.counts([1, 2]) == [(4, 11), (4, 7)]


# ---- tokens ---------------------------------------------------------------------------------------------------------


def with_ends(path):
    """Adds <s> and </s>, and knows them in a text."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "a", "b", "<", "s", ">", "/"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    return str(path)


def test_special_tokens_are_never_counted(tmp_path):
    some = ["a b a b", "", "<s> a b </s> a b </s>", "x y z", "</s> <s>", "a"]
    measured = TextMetrics((1, 2), (1,), tokenizer=with_ends(tmp_path))(some)
    rows = [[3, 4, 3, 4], [], [3, 4, 3, 4], [2, 2, 2], [], [3]]  # what is unknown is text, and counted
    assert measured.empty.tolist() == [not row for row in rows]
    expected = reference.repetition(rows, [len(row) for row in rows], (1, 2), (1,))
    got = table(measured)[~measured.empty].tolist()
    assert got == [pytest.approx(values) for values, row in zip(expected, rows, strict=True) if row]


def test_special_tokens_of_bert(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##b"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizer(tokenizer_object=backend, vocab=dict(zip(words, range(8), strict=True))).save_pretrained(tmp_path)
    metrics = TextMetrics((1,), (), tokenizer=str(tmp_path))
    metrics.distinct = DistinctNGrams()
    measured = metrics(["ab a", "a [MASK] b [SEP] a", "[CLS]"])
    assert measured.columns["sr_1"].tolist()[:2] == [pytest.approx(1 / 3), pytest.approx(1 / 3)]
    assert measured.empty.tolist() == [False, False, True]
    assert metrics.distinct.counts([1]) == [(3, 6)]


# ---- Gopher's, names, dense text ------------------------------------------------------------------------------------


def test_gopher_columns():
    some = ["buy now " * 9, "", "a few words of text that do not repeat themselves at all", " \n"]
    measured = TextMetrics((2,), (), gopher=True)(some)
    values = gopher_repetition(some)
    limits = list(GOPHER_THRESHOLDS.values())
    for i in (0, 2):
        row = {name: column[i].item() for name, column in measured.columns.items()}
        assert [row[name] for name in GOPHER_THRESHOLDS] == values[i].tolist()
        assert row["gopher_violations"] == sum(v > limit for v, limit in zip(values[i].tolist(), limits, strict=True))
    assert measured.columns["gopher_violations"][0] > 3
    assert measured.columns["gopher_violations"][2] == 2  # "a few words" is 11 of 56 characters
    assert table(measured)[[1, 3]].isnan().all()
    chinese = ["今天很好" * 5]
    assert table(TextMetrics((), (), gopher=True)(chinese))[0, 4] == 0  # one word
    by_character = table(TextMetrics((), (), unit="character", gopher=True)(chinese))[0, :13]
    assert by_character.tolist() == reference.gopher_repetition(chinese[0], list(chinese[0]))


def test_metrics_by_name():
    metrics = TextMetrics.named(["tr_8", "sr_12", "top_2_gram"])
    assert metrics.names[:3] == ["sr_12", "tr_8", "dup_para_frac"]
    assert TextMetrics.named(["sr_3"]).names == ["sr_3"]
    for name in ("sr_0", "bleu", "sr_-1", "tr_9999999999", "gopher"):
        with pytest.raises(UnknownMetric, match=rf"unknown metric '{name}'; known: sr_<n>, tr_<w>, dup_para_frac, .*"):
            TextMetrics.named([name])
    with pytest.raises(InvalidInput, match="unit = 'byte' must be 'word' or 'character'"):
        TextMetrics(unit="byte")


def test_text_without_spaces_is_noticed():
    chinese, thai = "今天天气很好。我们去公园散步。然后回家吃饭。", "วันนี้อากาศดีมากเราไปเดินเล่นที่สวน"
    german = "Die Donaudampfschifffahrtsgesellschaft sucht Kapitäne für den Sommer."
    some = [chinese, thai, german, "short", "", "The quick brown fox jumps over the lazy dog."]
    assert TextMetrics()(some).dense == 2
    assert TextMetrics(unit="character")(some).dense == 0


# ---- records --------------------------------------------------------------------------------------------------------


def items(records):
    return [Item(record, record["text"], None, "f.jsonl", number) for number, record in enumerate(records, 1)]


def test_every_record_has_its_row(monkeypatch):
    monkeypatch.setattr("daemon_fast.text_metrics.BATCH_RECORDS", 2)
    some = items([{"text": "a a a", "id": 5}, {"text": " "}, {"text": "x"}, {"text": "\ud835", "id": 1}, {"text": "y"}])
    some.append(Item({"id": "k"}, "", "has no string field 'text'", "f.jsonl", 9))
    some.append(Item({"text": "z", "n": {"deep": ["\udc00"]}, "id": "\ud835"}, "z", None, "f.jsonl", 10))
    batches = list(measure_records(some, TextMetrics((1,), ())))
    rows = [json.loads(row) for batch in batches for row in batch.rows(None)]
    assert rows[0] == {"source": "f.jsonl", "line": 1, "id": 5, "sr_1": pytest.approx(2 / 3)}
    assert rows[1] == {"source": "f.jsonl", "line": 2, "empty": True, "sr_1": None}
    assert rows[2] == {"source": "f.jsonl", "line": 3, "sr_1": 0.0}
    problem = "has half a surrogate pair, {}, in one of its fields"
    assert rows[3] == {"source": "f.jsonl", "line": 4, "id": 1, "error": problem.format("\\ud835")}
    assert rows[5] == {"source": "f.jsonl", "line": 9, "id": "k", "error": "has no string field 'text'"}
    assert rows[6]["error"] == problem.format("\\udc00")
    assert "id" not in rows[6]
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5, 9, 10]
    assert [json.loads(row).get("id") for batch in batches for row in batch.rows("text")][:3] == ["a a a", " ", "x"]
    passing = [json.loads(line) for batch in batches for line in batch.passing(parse_filter("sr_1 != 7"))]
    assert [record["text"] for record in passing] == ["a a a", "x", "y"]


def test_the_summary_is_that_of_one_table(monkeypatch):
    monkeypatch.setattr("daemon_fast.text_metrics.BATCH_CHARACTERS", 10)
    generator = np.random.default_rng(0)
    some = [" ".join(generator.choice(list("abc"), size=n)) for n in generator.integers(0, 9, 40)]
    summary = Summary()
    found = [Item({}, "", "is not JSON", "f", 41), *items({"text": text} for text in some)]
    for batch in measure_records(found, TextMetrics(NGRAMS, WINDOWS)):
        summary.add(batch)
    values = defined([text.split() for text in some if text])
    assert (summary.records, summary.texts, summary.unusable) == (41, len(values), 1)
    assert summary.texts + summary.empty == 40
    assert summary.problems == ["f, line 41 is not JSON"]
    np.testing.assert_allclose(summary.mean.numpy(), values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        summary.standard_error.numpy(), values.std(0, ddof=1) / len(values) ** 0.5, rtol=1e-6, atol=1e-12
    )


def test_records_are_read_as_they_are_needed():
    read = []

    def endless():
        for item in items({"text": "a b"} for _ in range(10 * BATCH_RECORDS)):
            read.append(item.number)
            yield item

    batches = measure_records(endless(), TextMetrics())
    assert len(next(batches).items) == BATCH_RECORDS
    assert len(read) == BATCH_RECORDS


def test_lines_are_valid_json():
    def never(constant):
        raise AssertionError(constant)

    found = Item({"text": "猫", "a": math.nan, "b": [math.inf]}, "猫")
    (batch,) = measure_records([found], TextMetrics())
    (line,) = batch.passing(parse_filter("sr_2 == 0"))
    assert json.loads(line, parse_constant=never) == {"text": "猫", "a": None, "b": [None]}
    (row,) = batch.rows("a")
    assert json.loads(row, parse_constant=never)["id"] is None
