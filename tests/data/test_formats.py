"""Formats of files of records: the same records, however they are packed; what is not known is refused."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import sys
import threading

import pytest

from daemon_fast.data.records import process, read_records
from daemon_fast.errors import DataError

RECORDS = [{"text": "one two"}, {"text": "ü\u2028€", "n": [1, {"a": None}]}, {"text": "three"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=2, ensure_ascii=False).encode()
PRETTY = "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode()
TEXT = "".join(record["text"] + "\n" for record in RECORDS).encode()


def zstandard(content):
    pyarrow = pytest.importorskip("pyarrow")
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", ARRAY),
        ("a.JSON", json.dumps(RECORDS).encode()),
        ("a.json", PRETTY),
        ("a.jsonl", ARRAY),
        ("a.jsonl", codecs.BOM_UTF8 + LINES),
        ("a.json", codecs.BOM_UTF8 + ARRAY),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl", b"\n \n" + LINES.replace(b"\n", b"\n\n")),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.gz", gzip.compress(LINES[:40]) + gzip.compress(LINES[40:])),
        ("a.json.GZ", gzip.compress(codecs.BOM_UTF8 + ARRAY)),
        ("a.jsonl.gz", LINES),  # unpacked on the way
    ],
)
def test_json(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    found = list(read_records(tmp_path / name))
    assert [item.record for item in found] == RECORDS
    assert [item.problem for item in found] == [None] * 3
    assert [json.loads(item.line) for item in found] == RECORDS
    assert not any("\n" in item.line for item in found)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", TEXT),
        ("a.TXT", codecs.BOM_UTF8 + TEXT),
        ("a.txt.gz", gzip.compress(TEXT)),
        ("a.json", json.dumps([record["text"] for record in RECORDS]).encode()),
    ],
)
def test_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [item.record for item in read_records(tmp_path / name, "body")] == [{"body": r["text"]} for r in RECORDS]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.json.ZST"])
def test_zstandard(tmp_path, name):
    (tmp_path / name).write_bytes(zstandard(LINES[:40]) + zstandard(LINES[40:]))
    assert [item.record for item in read_records(tmp_path / name)] == RECORDS


def test_a_folder_and_a_pattern(tmp_path):
    for i, record in enumerate(RECORDS):
        folder = tmp_path / "data" / f"d{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"part-{i}.jsonl").write_text(json.dumps(record))
    (tmp_path / "data" / "_SUCCESS").write_text("")
    (tmp_path / "data" / ".hidden").write_text("")
    by_name = [RECORDS[i] for i in (0, 2, 1)]
    assert [item.record for item in read_records(tmp_path / "data")] == by_name
    assert [item.record for item in read_records(f"{tmp_path}/data/*/part-*.jsonl")] == by_name
    assert [item.record for item in read_records(f"{tmp_path}/data/**/part-[01].jsonl")] == RECORDS[:2]
    (tmp_path / "data" / "notes.md").write_text("# notes")
    with pytest.raises(DataError, match=r"notes.md: unknown format. Known by name: .jsonl"):
        list(read_records(tmp_path / "data"))
    with pytest.raises(DataError, match="matches no file"):
        list(read_records(f"{tmp_path}/*.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\na\n", "a.csv: unknown format"),
        ("a", b"text\n", "a: unknown format"),
        ("a.parquet.gz", b"", "unknown format"),
        ("a.txt", LINES, "a.txt holds JSON, not text"),
        ("a.jsonl", TEXT.decode().encode("utf-16"), "a.jsonl is UTF-16"),
        ("a.json", ARRAY[:-20], "a.json is not JSON in element 3"),
        ("a.json", ARRAY + b"{}", "something follows its array"),
        ("a.json", b"[1, \xff]", "a.json is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES * 1000)[:-9], "a.jsonl.gz can't be read"),
        ("a.jsonl", b"PAR1....", "is a Parquet file"),
        ("a.parquet", LINES, "is no Parquet file"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=message):
        list(read_records(tmp_path / name))


def test_names_that_no_file_can_have(tmp_path):
    with pytest.raises(DataError, match="can't be read: File name too long"):
        list(read_records(tmp_path / ("x" * 300)))
    with pytest.raises(DataError, match="the name of the file to read is empty"):
        list(read_records(""))


def test_an_element_of_an_array_that_python_cannot_hold_costs_no_other(tmp_path):
    deep, digits = "[" * 100_000 + '"]\\"]"' + "]" * 100_000, "1" * 5000
    (tmp_path / "a.json").write_text(
        f'[{{"text": "a"}}, {{"x": {deep}, "text": "b"}}, {{"n": {digits}}}, {{"text": "c"}}]'
    )
    found = list(read_records(tmp_path / "a.json"))
    assert [item.text for item in found] == ["a", "", "", "c"]
    assert found[1].problem == "is nested too deeply"
    assert found[2].problem.startswith("is not JSON: Exceeds the limit")


def test_a_format_that_the_name_does_not_tell(tmp_path):
    (tmp_path / "prompts").write_bytes(LINES)
    assert [item.record for item in read_records(tmp_path / "prompts", format="json")] == RECORDS
    texts = [item.record["text"] for item in read_records(tmp_path / "prompts", format="text")]
    assert texts[0] == LINES.decode().split("\n")[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LINES, RECORDS),
        (ARRAY, RECORDS),
        (gzip.compress(LINES), RECORDS),
        (TEXT, [{"text": r["text"]} for r in RECORDS]),
    ],
)
@pytest.mark.parametrize("through", ["standard input", "a named pipe"])
def test_pipes_are_known_by_what_comes(tmp_path, monkeypatch, content, expected, through):
    if through == "standard input":
        monkeypatch.setattr(sys, "stdin", type("Pipe", (), {"buffer": io.BytesIO(content)}))
        assert [item.record for item in read_records("-")] == expected
        return
    os.mkfifo(tmp_path / "fifo")
    writer = threading.Thread(target=(tmp_path / "fifo").write_bytes, args=[content])
    writer.start()
    assert [item.record for item in read_records(tmp_path / "fifo")] == expected
    writer.join()


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("a.b", "within"),
        ("c.d", "of this name"),
        ("list.1.e", "element"),
        ("list.0", "plain"),
        ("a", None),
        ("list.9", None),
    ],
)
def test_fields_within_others(tmp_path, field, text):
    record = {"a": {"b": "within"}, "c.d": "of this name", "c": {"d": "no"}, "list": ["plain", {"e": "element"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (item,) = read_records(tmp_path / "a.jsonl", field)
    assert item.text == (text or "")
    assert item.problem == (None if text else f"has no string field {field!r}, but c.d")


@pytest.mark.parametrize("name", ["out.ndjson", "out.jsonl.gz", "out.JSONL.zst"])
def test_outputs(tmp_path, name):
    if name.endswith("zst"):
        pytest.importorskip("pyarrow")
    (tmp_path / "in.jsonl").write_bytes(LINES)
    packed = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        process(tmp_path / "in.jsonl", tmp_path / folder / name, lambda items, number: [{} for _ in items], {})
        packed.append((tmp_path / folder / name).read_bytes())
    assert packed[0] == packed[1]
    assert packed[0].startswith({"n": b"{", "z": b"\x1f\x8b", "t": b"\x28\xb5"}[name[-1] if name[-1] != "n" else "n"])
    found = list(read_records(tmp_path / "b" / name))
    assert [{key: value for key, value in item.record.items() if key != "daemon"} for item in found] == RECORDS
