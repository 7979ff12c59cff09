"""Formats of files of records: the same records, however they are packed; what is not known is refused."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import os
import sys
import threading
from pathlib import Path

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


@pytest.mark.parametrize("kind", [0x50, 0x5A, 0x5F])
def test_zstandard_with_frames_to_skip(tmp_path, kind):
    """RFC 8878, 3.1.2: a magic number, a length, and what no decoder reads; pzstd begins with one."""
    skip = bytes([kind, 0x2A, 0x4D, 0x18]) + (5).to_bytes(4, "little") + b"\0{[\n}"
    for content in (skip + zstandard(LINES), skip + skip + zstandard(LINES[:40]) + skip + zstandard(LINES[40:]) + skip):
        (tmp_path / "a.jsonl.zst").write_bytes(content)
        assert [item.record for item in read_records(tmp_path / "a.jsonl.zst")] == RECORDS


def linked(tmp_path):
    """A folder with files in links: to a folder elsewhere, to one beside it, to itself, and to a file beside it."""
    data, other = tmp_path / "data", tmp_path / "other"
    for folder, text in ((data / "b", "b"), (data / "c", "c"), (other / "deep", "o")):
        folder.mkdir(parents=True)
        (folder / "x.jsonl").write_text(json.dumps({"text": text}))
    (data / "a").symlink_to("c")  # comes before c, whose own name is told
    (data / "elsewhere").symlink_to(other)
    for loop in ("b/loop", "c/again", "elsewhere/deep/up"):
        (data / loop).symlink_to(data)
    (data / "b" / "same.jsonl").symlink_to("x.jsonl")
    return data


def test_links_are_followed_and_each_file_is_read_once(tmp_path):
    data = linked(tmp_path)
    expected = [("b/x.jsonl", "b"), ("c/x.jsonl", "c"), ("elsewhere/deep/x.jsonl", "o")]
    for where in (data, f"{data}/**/*.jsonl", f"{data}/**", f"{tmp_path}/dat[a]/**/**/x.jsonl"):
        found = [(item.source.removeprefix("data/"), item.text) for item in read_records(where)]
        assert found == expected, where
    assert [item.source for item in read_records(f"{data}/*/x.jsonl")] == ["b/x.jsonl", "c/x.jsonl"]
    assert [item.source for item in read_records(data / "a" / "x.jsonl")] == ["x.jsonl"]


@pytest.mark.parametrize("target", ["nothing", "dangling.jsonl"])
def test_links_that_lead_to_nothing_are_named(tmp_path, target):
    data = linked(tmp_path)
    link = data / "c" / "dangling.jsonl"
    link.symlink_to(target)
    (data / "c" / ".hidden").symlink_to("nothing")
    for where in (data, f"{data}/**/*.jsonl", f"{data}/c/*", link):
        with pytest.raises(DataError, match=r"c/dangling.jsonl can't be read: it is a link that leads to nothing"):
            list(read_records(where))
    # The output of a run may be such a link, among what it reads.
    assert len(list(read_records(data, output=link))) == 3


def test_a_pattern_finds_what_glob_finds(tmp_path, monkeypatch):
    """Where no link leads in a circle."""
    for name in ("a.txt", "d/b.txt", "d/e/c.txt", "d/e/**x/f.txt", "d/.h/g.txt", "d/_u/h.txt", "[d]/i.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    for pattern in (
        "**/*.txt", "**", "d/**/*.txt", "d/**", "*/**/*.txt", "**/e/**/*.txt", "d/e/**x/*", "**/_u/*", "[[]d]/**/*.txt",
        "./d/**/c.txt", f"{tmp_path}/**/c.txt", "d/../d/**/b.txt", "**/.h/*", "d//**//b.txt",
    ):  # fmt: skip
        expected = sorted(path.read_text() for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
        assert sorted(item.text for item in read_records(pattern)) == expected != [], pattern


@pytest.mark.parametrize("through", ["folder", "output", "both", "inside"])
def test_an_output_reached_by_another_name_is_no_source(tmp_path, through):
    data, link = tmp_path / "data", tmp_path / "link"
    data.mkdir()
    link.symlink_to(data)
    (data / "inner").symlink_to(data)
    (data / "in.jsonl").write_bytes(LINES)
    (data / "out.jsonl.parts").mkdir()
    (data / "out.jsonl.parts" / "results.jsonl").write_text("{}\n")
    for name in ("out.jsonl", "out.jsonl.77.tmp"):
        (data / name).write_bytes(LINES)
    source = {"folder": link, "output": data, "both": link, "inside": data / "inner"}[through]
    output = (data if through in ("folder", "inside") else link) / "out.jsonl"
    for where in (source, f"{source}/**/*"):
        assert [(item.source, item.record) for item in read_records(where, output=output, format="json")] == [
            ("in.jsonl", record) for record in RECORDS
        ]


def test_nan_is_null_and_nothing_else_changes(tmp_path):
    line = '{"a": 1.10, "a": 1e400, "text": "NaN, \\\\\\"-Infinity", "x": NaN, "y": [ -Infinity,Infinity], "z": 1.0}'
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.warns(UserWarning, match="are written as null, as JSON has neither"):
        process(tmp_path / "a.jsonl", tmp_path / "b.jsonl", lambda items, number: [{} for _ in items], {})
    expected = line.replace(": NaN", ": null").replace("[ -Infinity,Infinity]", "[ null,null]")
    assert (tmp_path / "b.jsonl").read_text() == expected[:-1] + ', "daemon": {}}\n'


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
        ("a.jsonl", b"PAR1....", "is a Parquet file: give --format parquet, or a name that ends in .parquet"),
        ("a.jsonl", LINES.decode().encode("utf-32"), "a.jsonl is UTF-32: convert it"),
        ("a.jsonl", codecs.BOM_UTF32_BE + LINES.decode().encode("utf-32-be"), "a.jsonl is UTF-32: convert it"),
        ("a.jsonl.bz2", b"", "a.jsonl.bz2 is packed in a way that is not read: unpack it, or pack it as .gz or .zst"),
        ("a.jsonl.XZ", b"", "packed in a way"),
        ("a.tar.gz", b"", "packed in a way"),
        ("a.jsonl", bz2.compress(LINES), "a.jsonl is packed by bzip2, which is not read: unpack it"),
        ("a.jsonl", lzma.compress(LINES), "a.jsonl is packed by xz"),
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


@pytest.mark.parametrize("through", ["standard input", "a named pipe"])
def test_parquet_through_a_pipe(tmp_path, monkeypatch, through):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    packed = io.BytesIO()
    parquet.write_table(pa.table({"text": ["a", "b"]}), packed)
    for format_ in (None, "parquet"):
        if through == "standard input":
            monkeypatch.setattr(sys, "stdin", type("Pipe", (), {"buffer": io.BytesIO(packed.getvalue())}))
            where, name = "-", "standard input"
        else:
            where, name = tmp_path / f"fifo-{format_}", f"fifo-{format_}"
            os.mkfifo(where)
            threading.Thread(target=where.write_bytes, args=[packed.getvalue()]).start()
        if format_ is None:
            with pytest.raises(DataError, match=f"^{name} is a Parquet file: give --format parquet"):
                list(read_records(where))
        else:
            assert [item.text for item in read_records(where, format="parquet")] == ["a", "b"]


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
