"""Files of records of any size: read one after another, written in the same order, taken up again where they stopped.

What is found of each record goes to a log beside the output, chunk by chunk. The last step reads the records a second
time and writes them with what was found: lines as they were, Parquet columns as they were. So memory holds one chunk,
and a run that is killed goes on to the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from daemon_fast.data.formats import (
    PARQUET_ROWS,
    SURROGATE,
    Format,
    Row,
    Source,
    arrow,
    compressed,
    escaped,
    find_sources,
    output_format,
    parquet_file,
    rows,
    to_json,
    valid_json,
    write_parquet,
)
from daemon_fast.errors import DataError, InvalidInput, LowEffectiveSampleSize
from daemon_fast.files import (
    LOCK,
    MANIFEST,
    alone,
    check_folder,
    check_same_run,
    check_writable,
    file_digest,
    replacing,
    writing,
)
from daemon_fast.progress import progress
from daemon_fast.prompts import ASSISTANT, Messages, as_messages, is_chat
from daemon_fast.seeds import batch_seed

if TYPE_CHECKING:
    from daemon_fast.decode import SIRDecoder
    from daemon_fast.proposals.base import Prefix

__all__ = [
    "DecodeWork",
    "Item",
    "Record",
    "Summary",
    "Work",
    "as_item",
    "lookup",
    "parts_of",
    "process",
    "read_records",
]

Record = dict[str, Any]
Check = Callable[..., None]
RESULT = "daemon"  # the field that a record gets
RESULTS = "results.jsonl"  # the log of a run
TOO_DEEP = "is nested too deeply"
NO_RECORD = "is a text: a record of fields is needed"
DEEPEST = 200  # objects and arrays within each other, which Python's recursion leaves room for wherever they are read


@dataclass(frozen=True)
class Item:
    """A record of a file and where it stands; or, where it can't be used, why.

    Attributes
    ----------
    text : what the asked field holds
    chat : in its place, where that is a chat: its messages up to the assistant's last, which is the response
    source : name of the file; in a folder or by a pattern, its path from there
    number : of the line, row or element, from 1
    unit : "line"; "row" of a Parquet file; "element" of a JSON array
    line : the record as it was read, one line of JSON, NaN and infinity included; None where it was none
    """

    record: Record
    text: str = ""
    problem: str | None = None
    source: str = ""
    number: int = 0
    unit: str = "line"
    line: str | None = None
    chat: Messages | None = None

    @property
    def prompt(self) -> str | Messages:
        return self.text if self.chat is None else self.chat

    @property
    def where(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


@dataclass(frozen=True)
class Summary:
    """Records that were written, and what was wrong with those that are errors."""

    records: int
    errors: list[str]


class Work(Protocol):
    """What is to be found of each record."""

    def __call__(self, items: Sequence[Item], number: int, /) -> list[Record]:
        """Of the records of a chunk that can be used, and its number: what each gets in its field "daemon"; an
        "error" in it says what is wrong with the record."""
        ...

    def result_type(self) -> Any:
        """The pyarrow type of these."""
        ...


# ---- reading --------------------------------------------------------------------------------------------------------


def read_records(
    where: str | os.PathLike[str],
    field: str | None = "text",
    *,
    format: Format | None = None,
    output: str | os.PathLike[str] | None = None,
    chats: bool = False,
) -> Iterator[Item]:
    """Records of files, one at a time.

    Parameters
    ----------
    where : a file, a folder, a pattern, or "-" for standard input, see `formats.find_sources`. Formats, by name in any
        case: .jsonl or .ndjson (a value a line), .json (an array, or lines), .txt (a text a line), each also with .gz
        or .zst; .parquet (it and .zst need pyarrow). Blank lines are left out
    field : that must be a string, "meta.title" or "messages.0.content" for one within others; the name that texts
        without one get: lines of text, strings of an array. None: none is asked for, and there must be records
    format : "json", "text" or "parquet", of files whose names don't tell
    output : what is written of them, which is none of a folder's or pattern's files
    chats : whether the field may hold a chat, a list of messages, in place of a string

    Raises
    ------
    DataError
        A file can't be read, or its format is unknown. What is wrong with a single record is told in its place.
    """
    for source in find_sources(os.fspath(where), format, None if output is None else os.fspath(output)):
        yield from _items(source, field, chats)


def _items(source: Source, field: str | None, chats: bool) -> Iterator[Item]:
    for row in rows(source):
        record, line, problem = _parsed(row, field)
        item = Item(record, "", problem) if field is None or problem else as_item(record, field, chats)
        yield replace(item, source=source.name, number=row.number, unit=row.unit, line=line)


def as_item(record: Record, field: str, chats: bool = True) -> Item:
    """A record with the text that its field holds; or with the chat, if that may be; or with what is wrong with it."""
    value = lookup(record, field)
    if chats and is_chat(value):
        messages, problem = _chat(value, field)
        return Item(record, problem=problem, chat=messages)
    return Item(record, value if isinstance(value, str) else "", _problem(record, value, field))


def _chat(value: Sequence[Any], field: str) -> tuple[Messages | None, str | None]:
    """A chat without its response, or what is wrong with it."""
    try:
        messages = as_messages(value, repr(field))
    except InvalidInput as error:
        return None, f"can't be used: {error}"
    return messages[:-1] if len(messages) > 1 and messages[-1]["role"] == ASSISTANT else messages, None


def _parsed(row: Row, field: str | None) -> tuple[Record, str | None, str | None]:
    """A row as a record; the line of JSON that it was, if it can be written again as it is; what is wrong with it."""
    if isinstance(row.content, dict):
        return row.content, None, None
    text = row.content
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            return {}, None, f"is not UTF-8: byte {error.start} is {row.content[error.start]:#04x}"
    text = text.rstrip("\r\n")
    if not row.is_json:
        return ({}, None, NO_RECORD) if field is None else ({field: text}, None, None)
    try:
        record = json.loads(text)
    except ValueError as error:
        return {}, None, f"is not JSON: {error}"
    except RecursionError:
        return {}, None, TOO_DEEP
    if isinstance(record, str):
        return ({}, None, NO_RECORD) if field is None else ({field: record}, None, None)
    if not isinstance(record, dict):
        return {}, None, f"is no JSON object but {type(record).__name__}"
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(record):
        return {}, None, TOO_DEEP
    return record, text.strip(), None


def _is_deep(record: Record) -> bool:
    layer: list[Any] = [record]
    for _ in range(DEEPEST):
        children = (item for value in layer for item in (value.values() if isinstance(value, dict) else value))
        layer = [child for child in children if isinstance(child, dict | list)]
        if not layer:
            return False
    return True


def lookup(record: Record, field: str) -> Any:
    """The value of a field; "a.b.0" is one within others, unless the record has a field of this very name."""
    if field in record:
        return record[field]
    value: Any = record
    for key in field.split("."):
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def _problem(record: Record, text: Any, field: str) -> str | None:
    if isinstance(text, bytes):
        return f"has no text but bytes in {field!r}: a column of strings is needed, of UTF-8"
    if not isinstance(text, str):
        others = [name for name, value in record.items() if isinstance(value, str) or is_chat(value)]
        return f"has no string field {field!r}" + (f", but {', '.join(others[:5])}" if others else "")
    if half := SURROGATE.search(text):
        return f"has half a surrogate pair, \\u{ord(half[0]):04x}, as character {half.start()} of {field!r}: no text"
    return None


# ---- a run ----------------------------------------------------------------------------------------------------------


def process(
    where: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    work: Work,
    settings: Record,
    field: str = "text",
    *,
    chunk_size: int = 64,
    description: str = "records",
    format: Format | None = None,
    force: bool = False,
) -> Summary:
    """Write each record of files with what `work` finds of it, in their order.

    Parameters
    ----------
    where, field, format : see `read_records`
    destination : .jsonl or .ndjson, also with .gz or .zst; .parquet; or "-", standard output, to which records go as
        they are done. Beside a file, a folder of the same name and ".parts" holds what is done until all is
    work : records that can't be used get {"error": ...} without it
    settings : what the result depends on, beside the records; a run with others does not go on with these parts
    chunk_size : records that are done together
    force : replace a destination that is there

    Raises
    ------
    InvalidInput
        The destination exists, or its parts are of another run.
    DataError
        A source can't be read, has changed meanwhile, or the destination can't be written; what is done is kept.
    """
    target = os.fspath(destination)
    sources = find_sources(os.fspath(where), format, target)
    to_parquet = output_format(target) == "parquet"
    if target == "-":
        return _stream(sources, work, field, chunk_size, description)
    check_writable(target, force)
    folder = parts_of(target)
    check_folder(folder)
    with writing(folder):
        folder.mkdir(exist_ok=True)
    with alone(folder):
        try:
            return _process(sources, where, target, folder, work, settings, field, chunk_size, description, to_parquet)
        finally:
            if not _holds_results(folder):
                _clear(folder)  # a run that found nothing binds no other


def parts_of(destination: str | os.PathLike[str]) -> Path:
    """The folder that holds what is done of an output until all is."""
    return Path(f"{os.fspath(destination)}.parts")


def _holds_results(folder: Path) -> bool:
    try:
        with (folder / RESULTS).open("rb") as log:
            return log.readline().endswith(b"\n")
    except FileNotFoundError:
        return False


def _clear(folder: Path) -> None:
    """Remove what runs wrote, and the folder, unless it holds something else."""
    with suppress(OSError):
        for name in (RESULTS, MANIFEST, SPOOL, LOCK):
            (folder / name).unlink(missing_ok=True)
        for left in folder.glob("*.tmp"):
            left.unlink()
        folder.rmdir()


def _process(
    sources: Sequence[Source], where: str | os.PathLike[str], target: str, folder: Path, work: Work, settings: Record,
    field: str, chunk_size: int, description: str, to_parquet: bool,
) -> Summary:  # fmt: skip
    output, kept = f"output {target}", f"what is done is kept in {folder}"
    run = {**settings, "field": field, "chunk_size": chunk_size}
    if not _holds_results(folder):  # of a run that was killed before it found anything
        for name in (RESULTS, MANIFEST):
            (folder / name).unlink(missing_ok=True)
    if any(source.path is None or not source.path.is_file() for source in sources):  # a pipe can't be read twice
        sources = [_spooled(sources[0], folder, output)]
        run["source"] = file_digest(folder / SPOOL)
    else:
        run["source"] = [_identity(source) for source in sources]
    check_same_run(folder, run, "parts")
    with _unchanged(sources, folder) as check:
        schema = _parquet_schema(sources, work) if to_parquet else None
        total = sum(1 for source in sources for _ in rows(source))  # also finds a file that is cut off before the work
        if not total:
            raise DataError(f"{os.fspath(where)} holds no record")
        with writing(output, kept):
            _work_off(sources, folder / RESULTS, work, field, chunk_size, total, description, check)
        errors = [result["error"] for result in _results(folder / RESULTS) if "error" in result]
        with writing(output, kept), replacing(target) as file:
            if schema is not None:
                _join_parquet(sources, folder / RESULTS, file, schema)
            elif to_parquet:
                _columns_to_parquet(sources, folder / RESULTS, field, file, work.result_type())
            else:
                with compressed(target, file) as lines:
                    for item, result in zip(_all(sources, field), _results(folder / RESULTS), strict=True):
                        lines.write(_line(item, result))
            check()
    (folder / RESULTS).unlink()
    return Summary(total, errors)


@contextmanager
def _unchanged(sources: Sequence[Source], folder: Path) -> Iterator[Check]:
    """Files are read three times: before the work, for it, and to be written with what it found.

    Yields
    ------
    What raises a DataError if one of those that it is given, by their names, is another than at the start. An error on
    the way may be because of that.
    """
    start = {source.name: (source, _stamp(source)) for source in sources}

    def check(names: Iterable[str] = start) -> None:
        for name in names:
            source, was = start[name]
            if (now := _stamp(source)) != was:
                what = f"{name} was {'changed' if now else 'removed'} while this run read it"
                kept = f": what is done is kept in {folder}, of the file as it was; delete it to begin again"
                raise DataError(what + (kept if _holds_results(folder) else ": begin again"))

    try:
        yield check
    except Exception:
        check()
        raise


def _stamp(source: Source) -> tuple[int, ...] | None:
    assert source.path is not None
    try:
        found = source.path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _all(sources: Sequence[Source], field: str, check: Check | None = None) -> Iterator[Item]:
    for source in sources:
        yield from _items(source, field, chats=True)
        if check is not None:
            check([source.name])


def _stream(sources: Sequence[Source], work: Work, field: str, chunk_size: int, description: str) -> Summary:
    """To standard output."""
    found, errors, total = _all(sources, field), [], 0
    with progress(desc=description, unit="record") as bar:
        for number, chunk in enumerate(iter(lambda: list(islice(found, chunk_size)), [])):
            for item, result in zip(chunk, _worked(chunk, work, number), strict=True):
                sys.stdout.buffer.write(_line(item, result))  # UTF-8, whatever a terminal's encoding is
                errors += [result["error"]] if "error" in result else []
            sys.stdout.flush()
            total += len(chunk)
            bar.update(len(chunk))
    if not total:
        raise DataError(f"{sources[0].name} holds no record")
    return Summary(total, errors)


SPOOL = "input"


def _spooled(source: Source, folder: Path, output: str) -> Source:
    """What comes through a pipe, as a file of the run."""
    with writing(output), replacing(folder / SPOOL) as file:
        if source.path is None:
            shutil.copyfileobj(sys.stdin.buffer, file)
        else:
            with source.path.open("rb") as pipe:
                shutil.copyfileobj(pipe, file)
    return replace(source, path=folder / SPOOL)


def _identity(source: Source) -> list[Any]:
    assert source.path is not None
    found = source.path.stat()
    return [source.name, found.st_size, found.st_mtime_ns]


def _work_off(
    sources: Sequence[Source], log: Path, work: Work, field: str, chunk_size: int, total: int, description: str,
    check: Check,
) -> None:  # fmt: skip
    """Append what is found of each record to the log, from where an earlier run stopped; `check`: see `_unchanged`."""
    done = _cut_to_whole_chunks(log, chunk_size, total)
    found = islice(_all(sources, field, check), done, None)
    with log.open("ab") as file, progress(desc=description, unit="record", total=total, initial=done) as bar:
        for number in range(done // chunk_size, -(-total // chunk_size)):
            chunk = list(islice(found, chunk_size))
            found_of_chunk = _worked(chunk, work, number)
            check({item.source for item in chunk})
            file.write(b"".join(f"{to_json(result)}\n".encode() for result in found_of_chunk))
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(chunk))


def _cut_to_whole_chunks(log: Path, chunk_size: int, total: int) -> int:
    """Records that the log holds, once what is left of a chunk that was cut off is cut away."""
    if not log.exists():
        return 0
    ends = [0]
    with log.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            ends.append(ends[-1] + len(line))
    done = len(ends) - 1
    if done < total:
        done -= done % chunk_size
    os.truncate(log, ends[done])
    return done


def _worked(chunk: Sequence[Item], work: Work, number: int) -> list[Record]:
    """A result for each record of a chunk."""
    problems = [
        item.problem or (f"has a field {RESULT!r} already" if RESULT in item.record else None) for item in chunk
    ]
    usable = [item for item, problem in zip(chunk, problems, strict=True) if problem is None]
    found = work(usable, number) if usable else []
    if len(found) != len(usable):
        raise InvalidInput(f"work returned {len(found)} results for {len(usable)} records")
    remaining, results = iter(found), []
    for item, problem in zip(chunk, problems, strict=True):
        if problem is not None:
            result: Record = {"error": f"{item.where} {problem}"}
            if RESULT in item.record:
                result["previous"] = item.record[RESULT]
        elif "error" in (result := next(remaining)):
            result = {"error": f"{item.where}: {result['error']}"}
        results.append(result)
    return results


def _results(log: Path) -> Iterator[Record]:
    with log.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


# ---- joining records and results ------------------------------------------------------------------------------------


def _line(item: Item, result: Record) -> bytes:
    """A line of JSON: the record's own text, so that no number of it changes, and the result."""
    if item.line is not None and RESULT not in item.record:
        own = valid_json(item.line)[:-1].rstrip()
        return f'{own}{", " if item.record else ""}"{RESULT}": {to_json(result)}}}\n'.encode()
    return f"{to_json({**item.record, RESULT: result})}\n".encode()


def _parquet_schema(sources: Sequence[Source], work: Work) -> Any:
    """The schema of the output where all sources are Parquet: theirs, and the result's column. None otherwise."""
    if any(source.format != "parquet" for source in sources):
        return None
    lib = arrow("lib")
    schemas = []
    for source in sources:
        with parquet_file(source) as file:
            schemas.append(file.schema_arrow)
    try:
        schema = lib.unify_schemas(schemas)
    except (ValueError, TypeError) as error:
        raise DataError(f"the files have columns of different types: {error}") from error
    everywhere = set.intersection(*(set(some.names) for some in schemas))
    for i, column in enumerate(schema):
        if column.name not in everywhere:  # null where a file lacks it
            schema = schema.set(i, column.with_nullable(True))
    if RESULT in schema.names:
        raise DataError(f"{sources[0].name} has a column {RESULT!r} already")
    schema = schema.append(lib.field(RESULT, work.result_type()))
    write_parquet(io.BytesIO(), schema, [])  # a type that can't be written shows now
    return schema


def _join_parquet(sources: Sequence[Source], log: Path, target: IO[bytes], schema: Any) -> None:
    """The sources' own columns, of their own types, and the results as one more."""
    lib, results = arrow("lib"), _results(log)
    column = schema.field(RESULT)

    def tables() -> Iterator[Any]:
        for source in sources:
            with parquet_file(source) as file:
                for batch in file.iter_batches(PARQUET_ROWS):
                    found = lib.array(list(islice(results, len(batch))), column.type)
                    table = lib.Table.from_batches([batch]).append_column(column, found)
                    missing = [field for field in schema if field.name not in table.schema.names]
                    for field in missing:
                        table = table.append_column(field, lib.nulls(len(table), field.type))
                    yield table.select(schema.names).cast(schema)

    write_parquet(target, schema, tables())


def _columns_to_parquet(sources: Sequence[Source], log: Path, field: str, target: IO[bytes], result_type: Any) -> None:
    """Records of JSON as columns. A column that no type of Arrow holds as it is, is written as JSON text."""
    lib = arrow("lib")

    def blocks() -> Iterator[list[Record]]:
        found = _all(sources, field)
        for block in iter(lambda: list(islice(found, PARQUET_ROWS)), []):
            yield [_whole_characters(item.record) for item in block]

    types = _column_types(blocks)
    as_text = [name for name, kind in types.items() if kind is None]
    if as_text:
        warnings.warn(f"written as JSON text, as their values have no common type: {', '.join(as_text)}", stacklevel=3)
    fields = [lib.field(name, kind or lib.string()) for name, kind in types.items()]
    schema, results = lib.schema([*fields, lib.field(RESULT, result_type)]), _results(log)

    def tables() -> Iterator[Any]:
        for block in blocks():
            columns = [_arrow_column(block, name, kind) for name, kind in types.items()]
            columns.append(lib.array([_flat(result) for result in islice(results, len(block))], result_type))
            yield lib.Table.from_arrays(columns, schema=schema)

    write_parquet(target, schema, tables())


def _whole_characters(value: Any) -> Any:
    """Half a surrogate pair, which Arrow can't hold, is written as JSON escapes it: no other record loses its type."""
    if isinstance(value, str):
        return SURROGATE.sub(escaped, value)
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(item) for key, item in value.items()}
    return [_whole_characters(item) for item in value] if isinstance(value, list) else value


def _flat(result: Record) -> Record:
    """A column has no place for what the field held before, but the error's text."""
    if "previous" not in result:
        return result
    return {"error": f"{result['error']}: {to_json(result['previous'])}"}


def _column_types(blocks: Callable[[], Iterable[list[Record]]]) -> dict[str, Any]:
    """A type for each field of the records that gives back what was put in; None where there is none."""
    lib = arrow("lib")
    types: dict[str, Any] = {}
    for block in blocks():
        for name in dict.fromkeys(key for record in block for key in record if key != RESULT):
            if name in types and types[name] is None:
                continue
            own = _type_of([record.get(name) for record in block])
            if name in types and own is not None and own != types[name]:
                schemas = [lib.schema([(name, kind)]) for kind in (types[name], own)]
                try:
                    own = lib.unify_schemas(schemas, promote_options="permissive").field(name).type
                except (ValueError, TypeError):
                    own = None
            types[name] = own
    # A common type of blocks may be wider than each, and change values: 2**53 + 1 as a float, a field that one lacks.
    for block in blocks():
        for name, kind in types.items():
            if kind is not None and _type_of([record.get(name) for record in block], kind) is None:
                types[name] = None
    return types


def _type_of(values: list[Any], kind: Any = None) -> Any:
    """The type in which Arrow gives these values back as they are; None if it doesn't."""
    try:
        column = arrow("lib").array(values, kind)
        same = _writable(column.type) and all(map(_same, column.to_pylist(), values))
    except (ValueError, TypeError, OverflowError, NotImplementedError, RecursionError):
        return None
    return column.type if same else None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    return bool(one == other or (one != one and other != other))  # NaN


def _writable(kind: Any) -> bool:
    """Parquet has no struct without fields."""
    if arrow("types").is_struct(kind) and kind.num_fields == 0:
        return False
    return all(_writable(kind.field(i).type) for i in range(kind.num_fields))


def _arrow_column(block: list[Record], name: str, kind: Any) -> Any:
    values = [record.get(name) for record in block]
    if kind is None:
        values = [None if value is None else to_json(value) for value in values]
    return arrow("lib").array(values, kind or arrow("lib").string())


# ---- decoding -------------------------------------------------------------------------------------------------------


class DecodeWork:
    """The work that continues each record's text, or answers its chat.

    Parameters
    ----------
    decoder : its batch size is a good chunk size: what a kill can lose
    num_samples : continuations of each
    seed : of the whole run; each chunk has its own from it
    """

    def __init__(self, decoder: SIRDecoder, num_samples: int, seed: int) -> None:
        self._decoder, self._num_samples, self._seed = decoder, num_samples, seed

    def result_type(self) -> Any:
        lib = arrow("lib")
        metrics = lib.struct([(name, lib.float64()) for name in self._decoder.energy.names])
        return lib.struct(
            [
                ("texts", lib.list_(lib.string())),
                ("metrics", lib.list_(metrics)),
                ("ess", lib.float64()),
                ("log_z", lib.float64()),
                ("error", lib.string()),
            ]
        )

    def __call__(self, items: Sequence[Item], number: int) -> list[Record]:
        results: list[Record] = []
        prefixes: list[Prefix] = []
        good = []
        for item in items:
            result: Record = {}
            try:
                prompt = self._decoder.prompts([item.prompt])
                self._decoder.proposal.tokenize(prompt)
                prefixes += prompt  # not its token ids, which a server may not take
                good.append(result)
            except InvalidInput as error:
                result["error"] = str(error).replace("prefix 0", "its text", 1)
            results.append(result)
        seed = batch_seed(self._seed, number)
        try:
            found = self._decoded(prefixes, seed)
        except InvalidInput:  # of one of them, which must not cost the others
            found = [self._alone(prefix, batch_seed(seed, i)) for i, prefix in enumerate(prefixes)]
        for result, one in zip(good, found, strict=True):
            result |= one
        return results

    def _alone(self, prefix: Prefix, seed: int) -> Record:
        try:
            return self._decoded([prefix], seed)[0]
        except InvalidInput as error:
            return {"error": str(error).replace("prefix 0", "its text", 1)}

    def _decoded(self, prefixes: list[Prefix], seed: int) -> list[Record]:
        if not prefixes:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LowEffectiveSampleSize)  # each result has its own ess
            decoded = self._decoder(prefixes, num_samples=self._num_samples, seed=seed)
        names = self._decoder.energy.names
        rows = zip(decoded.texts, decoded.ess.tolist(), decoded.log_z.tolist(), decoded.features.tolist(), strict=True)
        return [
            {
                "texts": texts,
                "metrics": [dict(zip(names, row, strict=True)) for row in features],
                "ess": ess,
                "log_z": log_z,
            }
            for texts, ess, log_z, features in rows
        ]
