"""Files of records of any size: read one after another, written in the same order, taken up again where they stopped.

A chunk of records is the unit: it is read, worked on, and kept as a file of its own, which appears whole or not at all.
The last step joins them. So memory holds one chunk, and a run that is killed goes on to the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

from daemon_fast.errors import DataError, InvalidInput, LowEffectiveSampleSize, require
from daemon_fast.files import check_same_run, replacing, write_text, writing
from daemon_fast.seeds import batch_seed

if TYPE_CHECKING:
    from daemon_fast.decode import SIRDecoder

__all__ = ["Item", "Record", "Summary", "decode_records", "process", "read_records"]

Record = dict[str, Any]
RESULT = "daemon"  # the field that a record gets
PARQUET_ROWS = 1024  # that are read together


@dataclass(frozen=True)
class Item:
    """A record of a file and where it stands; or, where it can't be used, why.

    Attributes
    ----------
    source : name of the file
    number : of the line or row, from 1
    unit : "line", or "row" of a Parquet file
    """

    record: Record
    problem: str | None = None
    source: str = ""
    number: int = 0
    unit: str = "line"

    @property
    def where(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


@dataclass(frozen=True)
class Summary:
    """Records that were written, and what was wrong with those that are errors."""

    records: int
    errors: list[str]


def read_records(path: str | os.PathLike[str], field: str = "text") -> Iterator[Item]:
    """Records of a file, one at a time.

    Parameters
    ----------
    path : .jsonl (an object a line), .parquet (needs pyarrow), or a text file (a text a line); blank lines are left out
    field : that must be a string; the name that lines of a text file get

    Raises
    ------
    DataError
        The file can't be read. What is wrong with a single record is told in its place.
    """
    source = Path(path)
    try:
        if source.suffix == ".parquet":
            for number, row in enumerate(_parquet_rows(source), 1):
                yield Item(row, _problem(row, field), source.name, number, "row")
            return
        with source.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    record, problem = _parsed(line, field, source.suffix == ".jsonl")
                    yield Item(record, problem, source.name, number)
    except OSError as error:
        raise DataError(f"{source} can't be read: {error.strerror or error}") from error


def _parsed(line: bytes, field: str, is_json: bool) -> tuple[Record, str | None]:
    """A line of a file as a record, and what is wrong with it."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return {}, f"is not UTF-8: byte {error.start} is {line[error.start]:#04x}"
    if not is_json:
        return {field: text.rstrip("\r\n")}, None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, f"is not JSON: {error}"
    return record if isinstance(record, dict) else {}, _problem(record, field)


def _problem(record: Any, field: str) -> str | None:
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        return f"has no string field {field!r}"
    return f"has a field {RESULT!r} already" if RESULT in record else None


def _parquet_rows(path: Path) -> Iterator[Record]:
    parquet = _pyarrow("parquet")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # what pyarrow raises derives from it
        raise DataError(f"{path} is no Parquet file: {error}") from error
    with file:
        for batch in file.iter_batches(PARQUET_ROWS):
            yield from batch.to_pylist()


def _pyarrow(module: str) -> Any:
    return require(f"pyarrow.{module}", "Parquet files need", "'daemon-fast[parquet]'")


def process(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    work: Callable[[Sequence[Item], int], list[Record]],
    settings: Record,
    field: str = "text",
    chunk_size: int = 64,
    description: str = "records",
) -> Summary:
    """Write each record of a file with what `work` finds of it, in the file's order.

    Parameters
    ----------
    destination : .jsonl or .parquet; a folder of the same name and ".parts" holds what is done until all is
    work : from the records of a chunk that can be used, and its number, to what each gets in its field "daemon"; a
        record that can't be used gets {"error": ...} there
    settings : what the result depends on, beside the source; a run with others does not go on with these parts
    chunk_size : records that are done together

    Raises
    ------
    InvalidInput
        The destination exists, or its parts are of another run.
    DataError
        The source can't be read, or the destination not be written; what is done is kept.
    """
    target = Path(destination)
    if target.suffix not in (".jsonl", ".parquet"):
        raise InvalidInput(f"output {target} must end in .jsonl or .parquet")
    if target.suffix == ".parquet":
        _pyarrow("parquet")  # its lack shows now, not after hours
    if target.exists():
        raise InvalidInput(f"output {target} is there already: choose another name, or delete it")
    folder = Path(f"{target}.parts")
    output, kept = f"output {target}", f"what is done is kept in {folder}"
    run = {**settings, "field": field, "chunk_size": chunk_size, **_identity(Path(source))}
    with writing(output, kept):
        folder.mkdir(parents=True, exist_ok=True)
        check_same_run(folder, run, "parts")
    found, errors, parts, records = read_records(source, field), [], [], 0
    chunks = iter(lambda: list(islice(found, chunk_size)), [])
    for number, chunk in enumerate(tqdm(chunks, desc=description, unit="chunk")):
        part = folder / f"{number:08d}.jsonl"
        if not part.exists():
            lines = _lines(chunk, work([item for item in chunk if item.problem is None], number))
            with writing(output, kept):
                write_text(part, lines)
        errors += [record[RESULT]["error"] for record in _read_part(part) if "error" in record[RESULT]]
        records += len(chunk)
        parts.append(part)
    if not records:
        raise DataError(f"{source} holds no record")
    with writing(output, kept):
        with replacing(target) as file:
            (_join_parquet if target.suffix == ".parquet" else _join)(parts, file)
        shutil.rmtree(folder)
    return Summary(records, errors)


def _lines(chunk: Sequence[Item], results: Sequence[Record]) -> str:
    usable = sum(item.problem is None for item in chunk)
    if len(results) != usable:
        raise InvalidInput(f"work returned {len(results)} results for {usable} records")
    remaining, lines = iter(results), []
    for item in chunk:
        if item.problem is not None:
            result = {"error": f"{item.where} {item.problem}"}
        elif "error" in (result := next(remaining)):
            result = {"error": f"{item.where}: {result['error']}"}
        # A date of a Parquet file has no form in JSON but its text.
        lines.append(json.dumps({**item.record, RESULT: result}, ensure_ascii=False, default=str) + "\n")
    return "".join(lines)


def _identity(source: Path) -> Record:
    try:
        found = source.stat()
    except OSError as error:
        raise DataError(f"{source} can't be read: {error.strerror}") from error
    return {"source": source.name, "bytes": found.st_size, "modified": found.st_mtime_ns}


def _read_part(part: Path) -> list[Record]:
    with part.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _join(parts: Sequence[Path], target: IO[bytes]) -> None:
    for part in parts:
        with part.open("rb") as file:
            shutil.copyfileobj(file, target)


def _join_parquet(parts: Sequence[Path], target: IO[bytes]) -> None:
    """One row group a part; the schema is one that all parts fit into."""
    arrow, parquet = _pyarrow("lib"), _pyarrow("parquet")
    schema = arrow.Table.from_pylist(_read_part(parts[0])).schema
    for part in parts[1:]:
        own = arrow.Table.from_pylist(_read_part(part)).schema
        schema = arrow.unify_schemas([schema, own], promote_options="permissive")
    with parquet.ParquetWriter(target, schema) as writer:
        for part in parts:
            writer.write_table(arrow.Table.from_pylist(_read_part(part), schema=schema))


def decode_records(
    decoder: SIRDecoder, field: str, num_samples: int, seed: int
) -> Callable[[Sequence[Item], int], list[Record]]:
    """The work of `process`: continuations of the text in `field`, each with its metrics."""

    def work(items: Sequence[Item], number: int) -> list[Record]:
        results: list[Record] = []
        prefixes, good = [], []
        for item in items:
            result: Record = {}
            try:
                prefixes += decoder.proposal.tokenize([item.record[field]])
                good.append(result)
            except InvalidInput as error:
                result["error"] = str(error).replace("prefix 0", "its text", 1)
            results.append(result)
        if not prefixes:
            return results
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LowEffectiveSampleSize)  # each result has its own ess
            decoded = decoder(prefixes, num_samples=num_samples, seed=batch_seed(seed, number))
        rows = zip(decoded.texts, decoded.ess.tolist(), decoded.log_z.tolist(), decoded.features.tolist(), strict=True)
        for result, (texts, ess, log_z, features) in zip(good, rows, strict=True):
            metrics = [dict(zip(decoder.energy.names, values, strict=True)) for values in features]
            result |= {"texts": texts, "metrics": metrics, "ess": ess, "log_z": log_z}
        return results

    return work
