"""The formats of files of records: known by name, or for a pipe by content; what is not known is refused."""

from __future__ import annotations

import base64
import datetime
import errno
import glob
import gzip
import io
import json
import os
import re
import shutil
import stat
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, Literal

from daemon_fast.errors import DataError, InvalidInput, require
from daemon_fast.files import as_text

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "KNOWN",
    "OUTPUTS",
    "SURROGATE",
    "Format",
    "Row",
    "Source",
    "arrow",
    "compressed",
    "escaped",
    "find_sources",
    "output_format",
    "parquet_file",
    "python_values",
    "rows",
    "to_json",
    "valid_json",
    "write_parquet",
]

Format = Literal["json", "text", "parquet"]
FORMATS: dict[str, Format] = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".txt": "text", ".text": "text", ".parquet": "parquet",
}  # fmt: skip
KNOWN = ".jsonl, .ndjson, .json, .txt (these also with .gz or .zst), .parquet"
OUTPUTS = ".jsonl, .ndjson (these also with .gz or .zst), .parquet, or - for standard output"
LINES = OUTPUTS.replace(" .parquet,", "")
COMPRESSED = (".gz", ".zst")
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"  # what such a file begins with
ZSTANDARD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # or a frame to skip, as pzstd writes first
NOT_READ = {
    rb"BZh[1-9]1AY&SY": "bzip2", rb"\xfd7zXZ\0": "xz", rb"PK\x03\x04": "zip", rb"7z\xbc\xaf": "7-Zip",
    rb"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip
PACKED = (".bz2", ".xz", ".lzma", ".zip", ".7z", ".lz4", ".br", ".tar", ".tgz")
UTF8_MARK = b"\xef\xbb\xbf"
OTHER_MARKS = {  # those of UTF-32 first, of which one begins as UTF-16's does
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
ANY_FOLDERS = re.compile(r"(?:^|(?<=/))\*\*(?:/+|$)")
NO_TARGET = "it is a link that leads to nothing"
PARQUET_ROWS = 1024  # that are read together
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can hold it, UTF-8 can't
STRING_OR_CONSTANT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|NaN|-?Infinity')
STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]')
STANDARD_INPUT = "standard input"
AS_NULL = "NaN and infinite numbers of records are written as null, as JSON has neither"


@dataclass(frozen=True)
class Source:
    """A file of records, or standard input (no path).

    Attributes
    ----------
    name : of the file; in a folder or by a pattern, its path from there
    format : None: seen by what comes
    told : whether the caller has said so, or only its name
    """

    path: Path | None
    format: Format | None
    name: str = STANDARD_INPUT
    told: bool = False


@dataclass(frozen=True)
class Row:
    """A record before it is looked into: the text of a line, or of an element of a JSON array; or values of Parquet."""

    number: int
    content: bytes | str | dict[str, Any]
    is_json: bool = True
    unit: str = "line"


def find_sources(where: str | Path, format: Format | None = None, output: str | Path | None = None) -> list[Source]:
    """The files that a name stands for.

    Parameters
    ----------
    where : a file, a folder (all files in it, hidden ones and those that begin with "_" left out), a pattern such as
        "part-*.jsonl.gz", or "-" for standard input. Links are followed, and each file is read once
    format : of all of them; default: by name
    output : what is written: it, and what there is of it before it is whole, are none of a folder's or pattern's files

    Raises
    ------
    DataError
        No such file, none that matches, a link that leads to nothing, or a file of unknown format.
    """
    name, path = str(where), Path(where)
    if name == "-":
        return [Source(None, format, told=format is not None)]
    if not name:  # which Path takes for this folder
        raise DataError("the name of the file to read is empty")
    try:
        base, paths = _found(name, path, output)
    except OSError as error:  # a name too long, a folder that may not be read
        raise DataError(f"{error.filename or name} can't be read: {error.strerror or error}") from error
    if not paths:
        raise DataError(f"{name}: there is no file in it" if path.is_dir() else f"{name} matches no file")
    return [Source(p, format or _format_of(p), as_text(str(p.relative_to(base))), format is not None) for p in paths]


def _found(name: str, path: Path, output: str | Path | None) -> tuple[Path, list[Path]]:
    """Files, and what their names are told relative to."""
    if path.is_dir():
        hidden = (".", "_")
        inside = [os.path.join(folder, s) for folder in _folders(name, hidden) for s in os.listdir(folder)]
        return path, _files((p for p in inside if not os.path.basename(p).startswith(hidden)), path, output)
    if path.exists():
        return path.parent, [path]
    if glob.has_magic(name):
        fixed = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
        base = Path(*fixed[: len(path.parts) - 1])
        return base, _files(_matches(name), base, output)
    raise DataError(f"{name} can't be read: " + (NO_TARGET if path.is_symlink() else "No such file or directory"))


def _files(names: Iterable[str], base: Path, output: str | Path | None) -> list[Path]:
    """Those of these names below `base` that are files, each file once, by a name without links if it has one.

    Raises
    ------
    DataError
        A link leads to nothing.
    """
    found: dict[str, list[Path]] = {}
    for path in map(Path, names):
        if output is not None and _is_of(path, output):
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
                raise DataError(f"{path} can't be read: {NO_TARGET}") from error
            raise
        if stat.S_ISREG(mode):
            found.setdefault(os.path.realpath(path), []).append(path)
    whole = os.path.realpath(base)

    def by_links(path: Path, real: str) -> tuple[bool, int, Path]:
        return os.path.join(whole, path.relative_to(base)) != real, len(path.parts), path

    return sorted(min(paths, key=lambda path: by_links(path, real)) for real, paths in found.items())


def _folders(root: str, hidden: tuple[str, ...]) -> Iterator[str]:
    """A folder and those in it, through links too, each once: links last, as they may lead to any of the others."""
    seen, links = set[str](), [root]
    while links:
        nearby = [links.pop(0)]
        while nearby:
            folder = nearby.pop()
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            yield folder
            with os.scandir(folder or ".") as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if os.path.isdir(entry.path) and not entry.name.startswith(hidden):
                        (links if entry.is_symlink() else nearby).append(os.path.join(folder, entry.name))


def _matches(pattern: str) -> list[str]:
    """As `glob.glob` finds them, but for links that lead in circles, which it follows as far as the system lets it."""
    deep = ANY_FOLDERS.search(pattern)
    if deep is None:
        return glob.glob(pattern)
    roots = glob.glob(pattern[: deep.start()]) if deep.start() else [""]
    rest = pattern[deep.end() :] or "*"
    folders = (folder for root in roots for folder in _folders(root, (".",)))
    return [found for folder in folders for found in _matches(os.path.join(glob.escape(folder), rest))]


def _is_of(path: Path, output: str | Path) -> bool:
    """Whether it is an output, of its parts, or what is written before it takes its place; by whichever name."""
    found, wholes = {os.path.realpath(path), _place(path)}, {os.path.realpath(output), _place(output)}
    rests = [name.removeprefix(whole) for name in found for whole in wholes if name.startswith(whole)]
    return any(re.fullmatch(r"|\.parts[/\\].*|\.\d+\.tmp", rest, re.DOTALL) for rest in rests)


def _place(path: str | Path) -> str:
    """Where a name stands, whatever it leads to."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def _format_of(path: Path) -> Format | None:
    if not path.is_file():  # a pipe
        return None
    name = _uncompressed(path.name)
    suffix = Path(name).suffix
    if path.suffix.lower() in PACKED or suffix in PACKED:
        raise DataError(f"{path} is packed in a way that is not read: unpack it, or pack it as .gz or .zst")
    if suffix not in FORMATS or (suffix == ".parquet" and name != path.name.lower()):
        raise DataError(f"{path}: unknown format. Known by name: {KNOWN}; --format says what another file is")
    return FORMATS[suffix]


def _uncompressed(name: str) -> str:
    """A file's name in lower case, without what says how it is compressed."""
    lower = name.lower()
    return next((lower.removesuffix(suffix) for suffix in COMPRESSED if lower.endswith(suffix)), lower)


def output_format(path: str | Path, lines: bool = False) -> Format:
    """What a destination is to hold: "json" or "parquet".

    Parameters
    ----------
    lines : whether it must be lines of JSON

    Raises
    ------
    InvalidInput
        Neither.
    MissingPackage
        It can't be written without.
    """
    name = str(path).lower()
    if name.endswith((".zst", ".parquet")):
        arrow("lib")
    if name == "-" or _uncompressed(name).endswith((".jsonl", ".ndjson")):
        return "json"
    if name.endswith(".parquet") and not lines:
        return "parquet"
    raise InvalidInput(f"output {path}: unknown format. Known by name: {LINES if lines else OUTPUTS}")


# ---- reading --------------------------------------------------------------------------------------------------------


def rows(source: Source) -> Iterator[Row]:
    """The records of a source, one at a time; blank lines are none.

    Raises
    ------
    DataError
        It can't be read: it is missing, cut off, in another format or encoding.
    """
    try:
        if source.format == "parquet":
            yield from _parquet_rows(source)
            return
        with _opened(source) as file:
            yield from _text_rows(source, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source.name} can't be read: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def _opened(source: Source) -> Iterator[IO[bytes]]:
    """Bytes as they were before compression, without a byte order mark."""
    if source.path is None:
        yield _decompressed(source, sys.stdin.buffer)
        return
    with source.path.open("rb") as file:
        yield _decompressed(source, file)


def _decompressed(source: Source, file: Any) -> IO[bytes]:
    buffered = file if hasattr(file, "peek") else io.BufferedReader(file)
    start = buffered.peek(10)[:10]
    if start.startswith(GZIP):
        buffered = io.BufferedReader(gzip.GzipFile(fileobj=buffered))
    elif ZSTANDARD.match(start):
        buffered = io.BufferedReader(arrow("lib").CompressedInputStream(buffered, "zstd"))
    elif packed := next((name for magic, name in NOT_READ.items() if re.match(magic, start)), None):
        raise DataError(f"{source.name} is packed by {packed}, which is not read: unpack it, or pack it as .gz or .zst")
    if start.startswith(PARQUET):
        or_name = ", or a name that ends in .parquet" if source.format is not None else ""  # a pipe has none
        raise DataError(f"{source.name} is a Parquet file: give --format parquet{or_name}")
    start = buffered.peek(4)[:4]
    if start.startswith(UTF8_MARK):
        buffered.read(len(UTF8_MARK))
    elif mark := next((mark for mark in OTHER_MARKS if start.startswith(mark)), None):
        raise DataError(f"{source.name} is {OTHER_MARKS[mark]}: convert it to UTF-8")
    return buffered


def _text_rows(source: Source, file: IO[bytes]) -> Iterator[Row]:
    numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    start = first[1].lstrip()
    looks_like_json = start.startswith((b"{", b"["))
    is_json = source.format == "json" or (source.format is None and looks_like_json)
    if source.format == "text" and not source.told and _is_object(start):
        # Continued as if it were prose, it would give results that look right.
        raise DataError(f"{source.name} holds JSON, not text: name it .jsonl, or insist by --format text")
    of_many_lines = _uncompressed(source.name).endswith(".json") and not _is_object(start)
    if is_json and (start.startswith(b"[") or (start.startswith(b"{") and of_many_lines)):
        whole = start + b"".join(line for _, line in numbered)
        yield from _elements(source, whole)
        return
    for number, line in chain([first], numbered):
        yield Row(number, line, is_json)


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _elements(source: Source, content: bytes) -> Iterator[Row]:
    """The elements of a JSON array, or objects one after another, each as the text that it is."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source.name} is not UTF-8: byte {error.start} is {content[error.start]:#04x}") from error
    blank = re.compile(r"[\s,]*")
    at, number, is_array = 0, 0, text.startswith("[")
    at += is_array
    while True:
        at = blank.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text) and not is_array:
            return
        if is_array and text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                raise DataError(f"{source.name} is not JSON: something follows its array")
            return
        number += 1
        try:
            end = _end(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source.name} is not JSON in element {number}: {error}") from error
        # A line break in JSON is white space between tokens: in a string it is written as \n.
        yield Row(number, text[at:end].replace("\n", " ").replace("\r", " "), unit="element")
        at = end


def _end(text: str, begin: int) -> int:
    """Where a value of JSON ends. What Python can't hold of it is told later, of the record alone."""
    try:
        return json.JSONDecoder(parse_int=len).raw_decode(text, begin)[1]
    except RecursionError:
        depth = 0
        for found in STRING_OR_BRACKET.finditer(text, begin):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
            if depth == 0:
                return found.end()
        raise


# ---- Parquet --------------------------------------------------------------------------------------------------------


def arrow(module: str) -> Any:
    """A module of pyarrow."""
    return require(f"pyarrow.{module}", "Parquet and .zst files need", "'daemon-fast[parquet]'")


def parquet_file(source: Source) -> Any:
    """A `pyarrow.parquet.ParquetFile`."""
    parquet = arrow("parquet")
    try:
        file = parquet.ParquetFile(_seekable(source))
        names = file.schema_arrow.names
    except (ValueError, OSError, NotImplementedError) as error:  # what pyarrow raises derives from these
        raise DataError(f"{source.name} is no Parquet file: {error}") from error
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(f"{source.name} has several columns of one name, which no record can hold: {', '.join(twice)}")
    return file


def _seekable(source: Source) -> Path | IO[bytes]:
    """What comes through a pipe, in a file without a name: Parquet is read from its end."""
    if source.path is not None and source.path.is_file():
        return source.path
    file = TemporaryFile()  # noqa: SIM115 it lasts as long as it is read
    with nullcontext(sys.stdin.buffer) if source.path is None else source.path.open("rb") as pipe:
        shutil.copyfileobj(pipe, file)
    file.seek(0)
    return file


def _parquet_rows(source: Source) -> Iterator[Row]:
    number = 0
    with parquet_file(source) as file:
        batches = file.iter_batches(PARQUET_ROWS)
        while True:
            try:
                batch = next(batches, None)
            except (ValueError, NotImplementedError) as error:  # what pyarrow raises derives from these
                raise DataError(f"{source.name} can't be read after row {number}: {error}") from error
            if batch is None:
                return
            names = batch.schema.names
            for values in zip(*(python_values(column) for column in batch.columns), strict=True):
                number += 1
                yield Row(number, dict(zip(names, values, strict=True)), unit="row")


def python_values(column: pyarrow.Array) -> list[Any]:
    """Values as JSON can have them. What Python has no value for (nanoseconds, years above 9999) is text.

    Text that is not UTF-8, which Arrow doesn't check, is bytes.
    """
    types, lib = arrow("types"), arrow("lib")
    if types.is_temporal(column.type) or types.is_decimal(column.type):
        try:
            return column.cast(lib.string()).to_pylist()  # type: ignore[no-any-return]
        except (ValueError, NotImplementedError):
            pass
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError, NotImplementedError, ImportError):
        return [_python_value(value) for value in column]


def _python_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, NotImplementedError, ImportError):
        lib = arrow("lib")
    if isinstance(scalar, lib.StructScalar):
        return {name: _python_value(value) for name, value in scalar.items()}
    if isinstance(scalar, lib.MapScalar):
        return [tuple(_python_value(entry).values()) for entry in scalar.values]
    if isinstance(scalar, lib.ListScalar):
        return [_python_value(value) for value in scalar.values]
    if isinstance(scalar, lib.DictionaryScalar | lib.ExtensionScalar):
        return _python_value(scalar.value)
    if isinstance(scalar, lib.BinaryScalar):
        return scalar.as_buffer().to_pybytes()
    return scalar.cast(lib.string()).as_py()


# ---- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def compressed(path: str | Path, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """What is written to `file` is compressed as the name of `path` says."""
    name = str(path).lower()
    if name.endswith(".gz"):
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as target:  # no name, no time: the same bytes each time
            yield target  # type: ignore[misc]
    elif name.endswith(".zst"):
        with arrow("lib").CompressedOutputStream(_KeptOpen(file), "zstd") as target:
            yield target
    else:
        yield file


class _KeptOpen:
    """What Arrow closes, though more is to be done with it."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self.write, self.flush = file.write, file.flush

    def close(self) -> None:
        pass


def to_json(value: Any) -> str:
    """One line of valid JSON in UTF-8, whatever a record may hold.

    NaN and infinity are null, as JSON has neither; a date is ISO 8601, a decimal number text, bytes are base64; half a
    surrogate pair stays an escape.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_json)
    except ValueError:
        warnings.warn(AS_NULL, stacklevel=2)
        text = json.dumps(_finite(value), ensure_ascii=False, default=_as_json)
    return SURROGATE.sub(escaped, text)


def valid_json(line: str) -> str:
    """A line of JSON as Python reads it, with null for NaN and infinity; all else of it stays as it is."""
    if "NaN" not in line and "Infinity" not in line:
        return line
    valid = STRING_OR_CONSTANT.sub(lambda found: found[0] if found[0].startswith('"') else "null", line)
    if valid != line:
        warnings.warn(AS_NULL, stacklevel=2)
    return valid


def escaped(half: re.Match[str]) -> str:
    """Half a surrogate pair as JSON writes it."""
    return f"\\u{ord(half[0]):04x}"


def _as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # NaN is not below anything
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_parquet(file: IO[bytes], schema: Any, tables: Iterable[Any]) -> None:
    """Tables of one schema, a row group each."""
    with arrow("parquet").ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(table)
