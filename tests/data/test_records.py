"""Files of records: order, bad records, resuming to the same bytes, full disks."""

from __future__ import annotations

import errno
import json
import os

import pytest

from daemon_fast.data import records
from daemon_fast.data.records import process, read_records
from daemon_fast.errors import DataError, InvalidInput

LINES = [json.dumps({"text": f"t{i}", "id": i}) for i in range(10)]


def write(path, lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
    return path


def shout(items, number):
    return [{"loud": item.record["text"].upper(), "chunk": number} for item in items]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_record_is_there_once_and_in_order(tmp_path):
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    summary = process(source, out, shout, {}, chunk_size=4)
    assert (summary.records, summary.errors) == (10, [])
    assert read(out) == [{"text": f"t{i}", "id": i, "daemon": {"loud": f"T{i}", "chunk": i // 4}} for i in range(10)]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_bad_records_are_told_in_their_place(tmp_path):
    lines = [LINES[0], '{"text"', "", '{"text": 7, "id": 1}', "[1]", b'{"text": "\xff"}\n']
    lines += ['{"text": "a", "daemon": 1}', LINES[9]]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    summary = process(source, out, shout, {}, chunk_size=3)
    found = read(out)
    assert summary.records == len(found) == 7
    assert [r["daemon"].get("loud") for r in found] == ["T0", None, None, None, None, None, "T9"]
    for problem, message in zip(
        summary.errors,
        [
            "in.jsonl, line 2 is not JSON",
            "in.jsonl, line 4 has no string field 'text'",
            "in.jsonl, line 5 has no string field 'text'",
            "in.jsonl, line 6 is not UTF-8: byte 10 is 0xff",
            "in.jsonl, line 7 has a field 'daemon' already",
        ],
        strict=True,
    ):
        assert problem.startswith(message)
    assert [r["daemon"]["error"] for r in found if "error" in r["daemon"]] == summary.errors
    assert found[2]["id"] == 1  # what could be read is kept


def test_killed_at_any_chunk_it_ends_with_the_same_bytes(tmp_path):
    source, whole, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    process(source, whole, shout, {}, chunk_size=2)
    done = []

    def dying(items, number):
        if len(done) % 2:
            done.append(None)
            raise KeyboardInterrupt
        done.append(number)
        return shout(items, number)

    for _ in range(20):
        try:
            process(source, out, dying, {}, chunk_size=2)
            break
        except KeyboardInterrupt:
            assert not out.exists()
    assert out.read_bytes() == whole.read_bytes()
    assert [number for number in done if number is not None] == [0, 1, 2, 3, 4]  # none was done twice


def test_memory_holds_one_chunk(tmp_path):
    source, seen = write(tmp_path / "in.jsonl", LINES), []
    process(source, tmp_path / "out.jsonl", lambda items, number: seen.append(len(items)) or shout(items, number), {},
            chunk_size=3)  # fmt: skip
    assert seen == [3, 3, 3, 1]


def test_text_and_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    text = write(tmp_path / "in.txt", ["one", "", " two "])
    process(text, tmp_path / "a.jsonl", shout, {})
    assert [r["text"] for r in read(tmp_path / "a.jsonl")] == ["one", " two "]
    rows = [{"text": f"t{i}" if i != 5 else None, "id": i} for i in range(10)]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "in.parquet")
    for name in ("first", "second"):
        summary = process(tmp_path / "in.parquet", tmp_path / f"{name}.parquet", shout, {}, chunk_size=3)
        assert summary.errors == ["in.parquet, row 6 has no string field 'text'"]
    found = parquet.read_table(tmp_path / "first.parquet").to_pylist()
    assert [r["id"] for r in found] == list(range(10))
    assert [r["daemon"]["loud"] for r in found] == [f"T{i}" if i != 5 else None for i in range(10)]
    assert found[5]["daemon"]["error"] == summary.errors[0]
    assert (tmp_path / "first.parquet").read_bytes() == (tmp_path / "second.parquet").read_bytes()


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    source, out, whole = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    process(source, whole, shout, {}, chunk_size=2)
    fsync, left = os.fsync, [3]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(DataError, match=r"out.jsonl can't be written: the disk is full; what is done is kept in"):
        process(source, out, shout, {}, chunk_size=2)
    assert len(list((tmp_path / "out.jsonl.parts").glob("0*.jsonl"))) == 2
    left[0] = 100
    process(source, out, shout, {}, chunk_size=2)
    assert out.read_bytes() == whole.read_bytes()


def test_parts_of_another_run_are_refused(tmp_path):
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"

    def dying(items, number):
        if number:
            raise KeyboardInterrupt
        return shout(items, number)

    with pytest.raises(KeyboardInterrupt):
        process(source, out, dying, {"seed": 1}, chunk_size=2)
    with pytest.raises(InvalidInput, match=r"parts of another run \(seed is 1 there, 2 here\)"):
        process(source, out, shout, {"seed": 2}, chunk_size=2)
    write(source, LINES[:9])
    with pytest.raises(InvalidInput, match=r"parts of another run \(bytes is"):
        process(source, out, shout, {"seed": 1}, chunk_size=2)


@pytest.mark.parametrize(
    ("source", "out", "error", "message"),
    [
        ("none.jsonl", "out.jsonl", DataError, "none.jsonl can't be read: No such file"),
        ("in.jsonl", "out.csv", InvalidInput, "out.csv must end in .jsonl or .parquet"),
        ("in.jsonl", "in.jsonl", InvalidInput, "in.jsonl is there already"),
        ("empty.jsonl", "out.jsonl", DataError, "holds no record"),
        ("in.jsonl", "no/in.jsonl/x.jsonl", DataError, "can't be written"),
    ],
)
def test_bad_files_are_named(tmp_path, source, out, error, message):
    write(tmp_path / "in.jsonl", LINES)
    write(tmp_path / "empty.jsonl", ["", ""])
    (tmp_path / "no").write_text("a file, not a folder")
    with pytest.raises(error, match=message):
        process(tmp_path / source, tmp_path / out, shout, {})


def test_no_parquet_without_a_parquet_file(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="is no Parquet file"):
        list(read_records(write(tmp_path / "in.parquet", LINES)))


def test_work_must_answer_every_record(tmp_path):
    source = write(tmp_path / "in.jsonl", LINES)
    with pytest.raises(InvalidInput, match="returned 9 results for 10 records"):
        process(source, tmp_path / "out.jsonl", lambda items, number: shout(items[1:], number), {})
