"""Files of records: order, bad records, resuming to the same bytes, full disks, outputs that can't fail."""

from __future__ import annotations

import datetime
import decimal
import errno
import gzip
import io
import json
import os
import sys

import pytest

from daemon_fast.data import records
from daemon_fast.data.records import process, read_records
from daemon_fast.errors import DataError, InvalidInput

LINES = [json.dumps({"text": f"t{i}", "id": i}) for i in range(10)]


def write(path, lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
    return path


class Work:
    def __init__(self, function):
        self.function = function

    def __call__(self, items, number):
        return self.function(items, number)

    def result_type(self):
        import pyarrow

        return pyarrow.struct([("loud", pyarrow.string()), ("chunk", pyarrow.int64()), ("error", pyarrow.string())])


@Work
def shout(items, number):
    return [{"loud": item.text.upper(), "chunk": number} for item in items]


def read(path):
    def none(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=none) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_record_is_there_once_and_in_order(tmp_path):
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    summary = process(source, out, shout, {}, chunk_size=4)
    assert (summary.records, summary.errors) == (10, [])
    assert read(out) == [{"text": f"t{i}", "id": i, "daemon": {"loud": f"T{i}", "chunk": i // 4}} for i in range(10)]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_bad_records_are_told_in_their_place(tmp_path):
    lines = [LINES[0], '{"text"', "", '{"text": 7, "id": 1}', "[1]", b'{"text": "\xff"}\n']
    lines += ['{"text": "a", "daemon": 1}', '{"text": "a \\ud835 b"}', "[" * 100_000, "1" * 5000, LINES[9]]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    summary = process(source, out, shout, {}, chunk_size=3)
    found = read(out)
    assert summary.records == len(found) == 10
    assert [r["daemon"].get("loud") for r in found] == ["T0", *[None] * 8, "T9"]
    for problem, message in zip(
        summary.errors,
        [
            "in.jsonl, line 2 is not JSON",
            "in.jsonl, line 4 has no string field 'text'",
            "in.jsonl, line 5 is no JSON object but list",
            "in.jsonl, line 6 is not UTF-8: byte 10 is 0xff",
            "in.jsonl, line 7 has a field 'daemon' already",
            "in.jsonl, line 8 has half a surrogate pair, \\ud835, as character 2 of 'text'",
            "in.jsonl, line 9 is nested too deeply",
            "in.jsonl, line 10 is not JSON",
        ],
        strict=True,
    ):
        assert problem.startswith(message)
    assert [r["daemon"]["error"] for r in found if "error" in r["daemon"]] == summary.errors
    assert found[2]["id"] == 1  # what could be read is kept
    assert found[5]["daemon"]["previous"] == 1
    assert found[6]["text"] == "a \ud835 b"


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
            process(source, out, Work(dying), {}, chunk_size=2)
            break
        except KeyboardInterrupt:
            assert not out.exists()
    assert out.read_bytes() == whole.read_bytes()
    assert [number for number in done if number is not None] == [0, 1, 2, 3, 4]  # none was done twice


@pytest.mark.parametrize("cut", [0, 1, 40, 90, 130, 200])
def test_a_log_that_is_cut_off_anywhere_is_taken_up(tmp_path, cut):
    source, whole, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    process(source, whole, shout, {}, chunk_size=3)

    def dying(items, number):
        if number == 3:
            raise KeyboardInterrupt
        return shout(items, number)

    with pytest.raises(KeyboardInterrupt):
        process(source, out, Work(dying), {}, chunk_size=3)
    os.truncate(tmp_path / "out.jsonl.parts" / records.RESULTS, cut)
    process(source, out, shout, {}, chunk_size=3)
    assert out.read_bytes() == whole.read_bytes()


def test_memory_holds_one_chunk(tmp_path):
    source, seen = write(tmp_path / "in.jsonl", LINES), []
    counting = Work(lambda items, number: seen.append(len(items)) or shout(items, number))
    process(source, tmp_path / "out.jsonl", counting, {}, chunk_size=3)
    assert seen == [3, 3, 3, 1]


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
    log = tmp_path / "out.jsonl.parts" / records.RESULTS
    assert len(log.read_bytes().splitlines()) >= 4
    left[0] = 100
    process(source, out, shout, {}, chunk_size=2)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("pattern", ["", "*.jsonl"])
def test_an_output_among_its_sources_is_none_of_them(tmp_path, pattern):
    source, out = tmp_path / "data" / pattern, tmp_path / "data" / "out.jsonl"
    out.parent.mkdir()
    write(out.parent / "in.jsonl", LINES)
    (out.parent / "out.jsonl.77.tmp").touch()  # a run that was killed as it ended
    calls = []

    @Work
    def killed(items, number):
        calls.append(number)
        return shout(items, number) if len(calls) < 2 else pytest.exit("killed")

    with pytest.raises(pytest.exit.Exception):
        process(source, out, killed, {}, chunk_size=3)
    for force in (False, True):
        assert process(source, out, shout, {}, chunk_size=3, force=force).records == 10


def test_two_runs_to_one_output_do_not_mix(tmp_path):
    source, out, seen = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl", []

    def twice(items, number):
        with pytest.raises(InvalidInput, match="is being written by another run"):
            process(source, out, shout, {}, chunk_size=2)
        seen.append(number)
        return shout(items, number)

    process(source, out, Work(twice), {}, chunk_size=2)
    assert seen == [0, 1, 2, 3, 4]
    assert len(read(out)) == 10


def overwritten(source):
    source.write_text(source.read_text().replace("t1", "u1"))


def appended(source):
    with source.open("a") as file:
        file.write(LINES[0] + "\n")


def replaced(source):
    when, other = source.stat().st_mtime_ns, source.with_name("other")
    other.write_text("".join(f"{line}\n" for line in LINES[::-1]))  # as long as before
    os.utime(other, ns=(when, when))
    other.replace(source)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (overwritten, "changed"), (appended, "changed"), (replaced, "changed"), (os.unlink, "removed"),
        (lambda source: os.truncate(source, 40), "changed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("when", [0, 2, 4, "joining"])
def test_a_source_that_changes_gives_no_record_the_results_of_another(tmp_path, monkeypatch, change, said, when):
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    line, before = records._line, source.read_bytes()

    @Work
    def changing(items, number):
        if number == when:
            change(source)
        return shout(items, number)

    def joining(item, result):
        if item.number == 3 and when == "joining":
            change(source)
        return line(item, result)

    monkeypatch.setattr(records, "_line", joining)
    with pytest.raises(DataError, match=f"in.jsonl was {said} while this run read it: ") as error:
        process(source, out, changing, {}, chunk_size=2)
    assert ("what is done is kept" in str(error.value)) == (when != 0)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.jsonl.parts"][: when != 0]
    monkeypatch.undo()
    if when != 0:
        write(source, LINES[:3])
        with pytest.raises(InvalidInput, match=r"holds parts of another run \(source is"):
            process(source, out, shout, {}, chunk_size=2)
        manifest = json.loads((tmp_path / "out.jsonl.parts" / "manifest.json").read_text())
        source.write_bytes(before)  # the file as it was: the run goes on
        os.utime(source, ns=(manifest["source"][0][2],) * 2)
    else:
        source.write_bytes(before)
    done = []
    process(source, out, Work(lambda items, number: done.append(number) or shout(items, number)), {}, chunk_size=2)
    assert len(done) == (5 - when if isinstance(when, int) else 0)
    assert [record["daemon"]["loud"] for record in read(out)] == [f"T{i}" for i in range(10)]


def test_a_file_of_a_folder_that_is_emptied_is_refused_before_its_results_are_kept(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out.jsonl"
    data.mkdir()
    for i in range(3):
        write(data / f"{i}.jsonl", LINES[:4])

    @Work
    def changing(items, number):
        if number == 0:
            write(data / "1.jsonl", [])
        return shout(items, number)

    with pytest.raises(DataError, match=r"^1.jsonl was changed while this run read it: what is done is kept"):
        process(data, out, changing, {}, chunk_size=2)
    assert len(read(tmp_path / "out.jsonl.parts" / records.RESULTS)) == 4


def test_parquet_that_changes_is_refused_too(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    parquet.write_table(pa.table({"text": ["a", "b", "c"]}), source)

    @Work
    def changing(items, number):
        parquet.write_table(pa.table({"text": ["d", "e"]}), source)
        return shout(items, number)

    with pytest.raises(DataError, match=r"in.parquet was changed while this run read it"):
        process(source, out, changing, {})
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:40], "can't be read"),
        ("in.jsonl", b"\n", "holds no record"),
        ("in.json", b'[{"text": "a"', "is not JSON in element 1"),
        ("in.jsonl", b'{"text": "a"}\n', "^no work$"),
    ],
)
def test_a_run_that_found_nothing_binds_no_other(tmp_path, name, content, message):
    source, out = tmp_path / name, tmp_path / "out.jsonl"
    source.write_bytes(content)

    @Work
    def failing(*_):
        raise DataError("no work")

    for _ in range(2):
        with pytest.raises(DataError, match=message):
            process(source, out, failing, {})
        assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / "out.jsonl.parts").mkdir()
    (tmp_path / "out.jsonl.parts" / "notes.txt").touch()  # is not ours
    (tmp_path / "out.jsonl.parts" / "manifest.json").write_text('{"seed": 7}')  # of a run that was killed
    (tmp_path / "out.jsonl.parts" / records.RESULTS).write_text('{"loud')
    (write if name == "in.jsonl" else lambda path, _: path.write_bytes(gzip.compress(LINES[0].encode())))(source, LINES)
    process(source, out, shout, {"seed": 8})
    assert len(read(out)) in (1, 10)
    assert [path.name for path in (tmp_path / "out.jsonl.parts").iterdir()] == ["notes.txt"]


def test_a_file_in_the_place_of_parts_is_named(tmp_path):
    (tmp_path / "out.jsonl.parts").write_text("mine")
    with pytest.raises(DataError, match=r"out.jsonl.parts can't be written: .*out.jsonl.parts is no folder$"):
        process(write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl", shout, {})
    assert (tmp_path / "out.jsonl.parts").read_text() == "mine"


def test_parts_of_another_run_are_refused(tmp_path):
    source, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"

    def dying(items, number):
        if number:
            raise KeyboardInterrupt
        return shout(items, number)

    with pytest.raises(KeyboardInterrupt):
        process(source, out, Work(dying), {"seed": 1}, chunk_size=2)
    with pytest.raises(InvalidInput, match=r"parts of another run \(seed is 1 there, 2 here\)"):
        process(source, out, shout, {"seed": 2}, chunk_size=2)
    write(source, LINES[:9])
    with pytest.raises(InvalidInput, match=r"parts of another run \(source is"):
        process(source, out, shout, {"seed": 1}, chunk_size=2)


@pytest.mark.parametrize(
    ("source", "out", "error", "message"),
    [
        ("none.jsonl", "out.jsonl", DataError, "none.jsonl can't be read: No such file"),
        ("in.jsonl", "out.csv", InvalidInput, r"out.csv: unknown format. Known by name: .jsonl, .ndjson"),
        ("in.jsonl", "in.jsonl", InvalidInput, "in.jsonl is there already"),
        ("empty.jsonl", "out.jsonl", DataError, "holds no record"),
        ("in.jsonl", "no/in.jsonl/x.jsonl", DataError, "can't be written"),
        ("in.jsonl", "missing/x.jsonl", DataError, "there is no folder"),
    ],
)
def test_bad_files_are_named_before_any_work(tmp_path, source, out, error, message):
    write(tmp_path / "in.jsonl", LINES)
    write(tmp_path / "empty.jsonl", ["", ""])
    (tmp_path / "no").write_text("a file, not a folder")
    with pytest.raises(error, match=message):
        process(tmp_path / source, tmp_path / out, Work(lambda *_: pytest.fail("worked")), {})


def test_what_is_there_is_overwritten_only_if_asked(tmp_path):
    source, out = write(tmp_path / "in.jsonl", LINES), write(tmp_path / "out.jsonl", ["mine"])
    with pytest.raises(InvalidInput, match="there already"):
        process(source, out, shout, {})
    assert out.read_text() == "mine\n"
    process(source, out, shout, {}, force=True)
    assert len(read(out)) == 10


def test_work_must_answer_every_record(tmp_path):
    source = write(tmp_path / "in.jsonl", LINES)
    with pytest.raises(InvalidInput, match="returned 9 results for 10 records"):
        process(source, tmp_path / "out.jsonl", Work(lambda items, number: shout(items[1:], number)), {})


# ---- what records carry ---------------------------------------------------------------------------------------------

ODD = [
    '{"text":"a","n":1.10,"big":12345678901234567890123,"huge":1e400,"s":"\\ud800","none":{},"mixed":{"a":1}}',
    '{ "text": "b" , "n": -0.0, "big": 1, "mixed": "x", "late": [1, "2"] }',
    '{"text": "c", "mixed": [], "n": null, "map": {"k1": 1}, "exact": 9007199254740993}',
    '{"text": "d", "map": {"k2": 2.5}, "exact": 0.5, "flag": true}',
]


def test_lines_are_carried_as_they_were(tmp_path):
    out = tmp_path / "out.jsonl"
    process(write(tmp_path / "in.jsonl", ODD), out, shout, {})
    for before, after in zip(ODD, out.read_text().splitlines(), strict=True):
        assert after.startswith(before.rstrip("} ") if before.endswith("] }") else before[:-1].rstrip())
        assert json.loads(after)["daemon"]["chunk"] == 0


def test_what_json_lacks_is_null(tmp_path):
    source = write(tmp_path / "in.jsonl", ['{"text": "a", "x": NaN, "y": [1, -Infinity]}'])
    with pytest.warns(UserWarning, match="are written as null, as JSON has neither"):
        process(source, tmp_path / "out.jsonl", shout, {})
    assert read(tmp_path / "out.jsonl")[0] == {
        "text": "a", "x": None, "y": [1, None], "daemon": {"loud": "A", "chunk": 0},
    }  # fmt: skip


def test_columns_give_back_what_was_put_in_or_are_json_text(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, types

    source, out = write(tmp_path / "in.jsonl", [*ODD, '{"text": "e", "n": NaN}']), tmp_path / "out.parquet"
    with pytest.warns(UserWarning, match="written as JSON text, as their values have no common type: big, none, mixed"):
        process(source, out, shout, {}, chunk_size=2)
    table = parquet.read_table(out)
    found = table.to_pylist()
    assert [row["daemon"]["loud"] for row in found] == ["A", "B", "C", "D", "E"]
    assert types.is_floating(table.schema.field("n").type)
    assert [row["n"] for row in found[:3]] == [1.1, 0.0, None]
    assert str(found[4]["n"]) == "nan"
    for name in ("big", "none", "mixed", "late", "map", "exact"):
        for line, row in zip(ODD, found, strict=False):
            before = json.loads(line).get(name)
            assert (None if row[name] is None else json.loads(row[name])) == before
    assert found[3]["flag"] is True
    assert (found[0]["s"], found[1]["s"]) == ("\\ud800", None)  # as JSON writes it: Arrow has no form for it


@pytest.mark.parametrize("depth", [150, 250, 600, 900])
@pytest.mark.parametrize("end", ["1", "NaN"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_deep_nesting_costs_its_own_record_at_most(tmp_path, depth, end, suffix):
    pytest.importorskip("pyarrow")
    deep = f'{{"text": "a", "x": {"[" * depth + end + "]" * depth}}}'
    brackets = json.dumps({"text": "[" * 1000})
    summary = process(write(tmp_path / "in.jsonl", [LINES[0], deep, brackets]), tmp_path / f"out.{suffix}", shout, {})
    assert summary.records == 3
    assert summary.errors == ([] if depth < records.DEEPEST else ["in.jsonl, line 2 is nested too deeply"])


def test_columns_that_differ_between_parts_of_a_file(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"text": "t", "x": i, "y": i, "z": None} for i in range(records.PARQUET_ROWS)]
    rows += [{"text": "t", "x": 0.5, "y": "s", "z": {"a": 1}}]
    source, out = write(tmp_path / "in.jsonl", map(json.dumps, rows)), tmp_path / "out.parquet"
    with pytest.warns(UserWarning, match="no common type: y$"):
        process(source, out, shout, {})
    table = parquet.read_table(out)
    assert [str(table.schema.field(name).type) for name in "xyz"] == ["double", "string", "struct<a: int64>"]
    assert table["x"].to_pylist() == [row["x"] for row in rows]
    assert table["y"].to_pylist() == [json.dumps(row["y"]) for row in rows]


def odd_table():
    import pyarrow as pa

    when = datetime.datetime(2024, 1, 1, 12, 30, 0, 5)
    return pa.table(
        {
            "text": pa.array(["a", None, "c"]).dictionary_encode(),
            "when": pa.array([when, None, when], pa.timestamp("ns", "Europe/Berlin")),
            "nanoseconds": pa.array([1, 2, 3], pa.int64()).cast(pa.timestamp("ns")),
            "far": pa.array([10**15, 0, 0], pa.timestamp("s")),  # the year 31690738
            "day": pa.array([datetime.date(2024, 1, 1), None, None]),
            "decimal": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-0.01")]),
            "bytes": pa.array([b"\xff\x00", b"", None]),
            "u64": pa.array([2**64 - 1, 0, 1], pa.uint64()),
            "u8": pa.array([1, 2, 3], pa.uint8()),
            "half": pa.array([1.5, float("nan"), float("inf")], pa.float32()).cast(pa.float16()),
            "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int32())),
            "nested": pa.array([{"a": [{"b": b"x"}]}, None, {"a": []}]),
            "long": pa.array([1, 2, 3], pa.duration("us")),
            "latin": pa.array([b"caf\xe9", b"x", b"y"]).view(pa.string()),
        }
    ).replace_schema_metadata({"made by": "us"})


def test_from_parquet_to_parquet_every_column_is_the_same(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(odd_table(), tmp_path / "in.parquet")
    before = parquet.read_table(tmp_path / "in.parquet")
    for name in ("first", "second"):
        summary = process(tmp_path / "in.parquet", tmp_path / f"{name}.parquet", shout, {}, chunk_size=2)
        (error,) = summary.errors
        assert error.startswith("in.parquet, row 2 has no string field 'text'")
    after = parquet.read_table(tmp_path / "first.parquet")
    for column in before.schema:
        assert after.schema.field(column.name).equals(column, check_metadata=True)
        assert [b.buffers() and b for b in after[column.name].chunks]
    for name in set(before.column_names) - {"half"}:
        assert after[name].equals(before[name])
    assert str(after["half"].to_pylist()) == str(before["half"].to_pylist())  # NaN
    assert after.schema.metadata == before.schema.metadata
    assert [row and row["loud"] for row in after["daemon"].to_pylist()] == ["A", None, "C"]
    assert after["daemon"][1]["error"].as_py() == summary.errors[0]
    assert (tmp_path / "first.parquet").read_bytes() == (tmp_path / "second.parquet").read_bytes()


def test_from_parquet_to_json_every_value_has_a_form(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(odd_table(), tmp_path / "in.parquet")
    process(tmp_path / "in.parquet", tmp_path / "out.jsonl", shout, {})
    first, second, third = read(tmp_path / "out.jsonl")
    assert first["when"].startswith("2024-01-01 13:30:00.000005")
    assert first["nanoseconds"] == "1970-01-01 00:00:00.000000001"
    assert (first["decimal"], third["decimal"]) == ("1.10", "-0.01")
    assert (first["bytes"], first["u64"], first["map"]) == ("/wA=", 2**64 - 1, [["k", 1]])
    assert (first["nested"], first["latin"]) == ({"a": [{"b": "eA=="}]}, "Y2Fm6Q==")
    assert "out of range" in first["far"]
    assert (second["half"], third["half"]) == (None, None)
    assert second["daemon"]["error"].startswith("in.parquet, row 2 has no string field 'text'")


def test_text_that_is_not_utf_8_in_parquet_is_that_records_error(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"text": pa.array([b"one", b"caf\xe9", b"two"]).view(pa.string())})
    parquet.write_table(table, tmp_path / "in.parquet")
    summary = process(tmp_path / "in.parquet", tmp_path / "out.parquet", shout, {})
    assert summary.errors == [
        "in.parquet, row 2 has no text but bytes in 'text': a column of strings is needed, of UTF-8"
    ]


def test_what_python_has_no_value_for_costs_no_run_within_others_either(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    latin = pa.array([b"caf\xe9", b"x"]).view(pa.string())
    far = pa.array([300_000_000_000, 0], pa.timestamp("s"))  # the year 11476
    columns = {
        "list": pa.ListArray.from_arrays([0, 1, 2], latin),
        "struct": pa.StructArray.from_arrays([latin, far], ["a", "b"]),
        "map": pa.MapArray.from_arrays([0, 1, 2], pa.array(["k", "l"]), latin),
        "far": pa.ListArray.from_arrays([0, 1, 2], far),
    }
    parquet.write_table(pa.table({"text": ["a", "b"], **columns}), tmp_path / "in.parquet")
    for suffix in ("jsonl", "parquet"):
        assert process(tmp_path / "in.parquet", tmp_path / f"out.{suffix}", shout, {}).errors == []
    row = read(tmp_path / "out.jsonl")[0]
    assert (row["list"], row["struct"]["a"], row["map"]) == (["Y2Fm6Q=="], "Y2Fm6Q==", [["k", "Y2Fm6Q=="]])
    assert row["far"][0].startswith("11476-")
    assert row["struct"]["b"].startswith("11476-")


def test_parquet_that_arrow_cannot_read_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    latin = pa.array([b"caf\xe9", b"x"]).view(pa.string())
    table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0, 1]), latin)})
    parquet.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"in\.parquet can't be read after row 0: Invalid UTF8 payload"):
        list(read_records(tmp_path / "in.parquet"))


def test_a_column_that_is_never_null_and_that_another_file_lacks(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "in").mkdir()
    schema = pa.schema([pa.field("text", pa.string(), nullable=False), pa.field("n", pa.int8(), nullable=False)])
    parquet.write_table(pa.table([["a"], [1]], schema=schema), tmp_path / "in" / "0.parquet")
    parquet.write_table(pa.table({"text": ["b"]}), tmp_path / "in" / "1.parquet")
    process(tmp_path / "in", tmp_path / "out.parquet", shout, {})
    assert parquet.read_table(tmp_path / "out.parquet")["n"].to_pylist() == [1, None]


def test_columns_of_one_name_are_refused(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_arrays([["a"], ["b"], [1]], names=["text", "x", "x"]), tmp_path / "in.parquet")
    for out in ("out.jsonl", "out.parquet"):
        with pytest.raises(DataError, match=r"several columns of one name, which no record can hold: x$"):
            process(tmp_path / "in.parquet", tmp_path / out, shout, {})


def test_a_column_of_the_results_name_is_refused_before_the_work(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"text": "a", "daemon": 1}]), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="has a column 'daemon' already"):
        process(tmp_path / "in.parquet", tmp_path / "out.parquet", Work(lambda *_: pytest.fail("worked")), {})


# ---- pipes ----------------------------------------------------------------------------------------------------------


class Pipe:
    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


def test_from_standard_input_to_a_file_it_resumes(tmp_path, monkeypatch):
    content, out = "".join(f"{line}\n" for line in LINES).encode(), tmp_path / "out.jsonl"

    def dying(items, number):
        if number:
            raise KeyboardInterrupt
        return shout(items, number)

    monkeypatch.setattr(sys, "stdin", Pipe(content))
    with pytest.raises(KeyboardInterrupt):
        process("-", out, Work(dying), {}, chunk_size=4)
    monkeypatch.setattr(sys, "stdin", Pipe(content))
    process("-", out, Work(lambda items, number: shout(items, number) if number else pytest.fail("again")), {},
            chunk_size=4)  # fmt: skip
    assert [r["id"] for r in read(out)] == list(range(10))
    monkeypatch.setattr(sys, "stdin", Pipe(b"{}\n"))
    assert process("-", tmp_path / "b.jsonl", shout, {}).errors == ["standard input, line 1 has no string field 'text'"]


def test_to_standard_output_records_go_as_they_are_done(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Pipe("".join(f"{line}\n" for line in LINES[:3]).encode()))
    seen = []

    def looking(items, number):
        seen.append(capsys.readouterr().out)
        return shout(items, number)

    process("-", "-", Work(looking), {}, chunk_size=1)
    assert [len(text.splitlines()) for text in seen] == [0, 1, 1]
    assert json.loads(seen[1])["daemon"]["loud"] == "T0"


def test_records_of_several_files_are_numbered_by_file(tmp_path):
    write(tmp_path / "a.jsonl", LINES[:2])
    write(tmp_path / "b.jsonl", ["x"])
    found = list(read_records(tmp_path))
    assert [item.where for item in found] == ["a.jsonl, line 1", "a.jsonl, line 2", "b.jsonl, line 1"]
    assert [item.problem is None for item in found] == [True, True, False]
