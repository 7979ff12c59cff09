"""Files that appear whole or not at all, and folders that belong to one run."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np

from daemon_fast.errors import DataError, InvalidInput

__all__ = [
    "LOCK",
    "MANIFEST",
    "alone",
    "as_text",
    "check_folder",
    "check_same_run",
    "check_writable",
    "digest",
    "file_digest",
    "read_arrays",
    "read_manifest",
    "replacing",
    "write_arrays",
    "write_text",
    "writing",
]

MANIFEST, LOCK = "manifest.json", "lock"
Arrays = dict[str, np.ndarray[Any, Any]]


def as_text(name: str) -> str:
    """A name of a file, or what else came by the command line, in UTF-8 also where the locale knows ASCII alone."""
    try:
        return os.fsencode(name).decode()
    except UnicodeError:
        return name


def check_writable(path: str | os.PathLike[str], force: bool = False) -> None:
    """Find out before the work whether a file can be written at its end.

    Parameters
    ----------
    force : whether a file that is there may be replaced

    Raises
    ------
    InvalidInput
        It is there, and `force` is not given.
    DataError
        Its folder is missing or can't be written, or it is a folder itself, a pipe or a device.
    """
    path = Path(path)
    with writing(path):  # what the system allows only it can say: permissions, read-only disks, long names
        if path.is_dir():
            raise DataError(f"{path} can't be written: it is a folder; give the name of a file")
        if path.exists() and not path.is_file():  # a file in the place of /dev/null would be a calamity
            raise DataError(f"{path} can't be written: it is a pipe or a device; give the name of a file")
        if not path.parent.is_dir():
            raise DataError(f"{path} can't be written: there is no folder {path.parent}")
        if os.path.lexists(path) and not force:
            raise InvalidInput(f"{path} is there already: --force (force=True) overwrites it; or choose another name")
        probe = _temporary(os.path.realpath(path))
        probe.open("wb").close()
        probe.unlink()


def check_folder(path: str | os.PathLike[str]) -> None:
    """Find out before the work whether files can be written into a folder, which may have to be made.

    Raises
    ------
    DataError
    """
    path = Path(path)
    with writing(path):
        there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        if not there.is_dir():
            raise DataError(f"{path} can't be written: {there} is no folder")
        with TemporaryFile(dir=there):
            pass


@contextmanager
def writing(path: str | os.PathLike[str], kept: str = "") -> Iterator[None]:
    """Turns what the system says of a file that can't be written into a DataError; `kept` tells what is not lost."""
    try:
        yield
    except OSError as error:
        full = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        after = f"; {kept}, and the same command goes on from there" if kept else ""
        raise DataError(f"{os.fspath(path)} can't be written: {full}{after}") from error


@contextmanager
def alone(folder: Path, threads: bool = True) -> Iterator[None]:
    """Two runs that write one folder would ruin each other's files. The lock ends with the process that holds it.

    Parameters
    ----------
    threads : whether runs of one process, too, are kept apart

    Raises
    ------
    InvalidInput
        Another run is writing it.
    """
    with writing(folder):
        file = (folder / LOCK).open("w")
    with file:
        try:
            (fcntl.flock if threads else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InvalidInput(f"{folder} is being written by another run") from error
        yield


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file to write; when it is closed, it takes the place of `path` in one step.

    It is on disk before that, so that a crash leaves the old file or the new one, and no half of it. A symbolic link
    stays one: what it leads to is replaced.
    """
    path = os.path.realpath(path)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary(path: str | os.PathLike[str]) -> Path:
    """What `replacing` writes before it is whole."""
    return Path(f"{os.fspath(path)}.{os.getpid()}.tmp")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """UTF-8, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """A compressed .npz, whole or not at all."""
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)


def read_arrays(path: str | os.PathLike[str]) -> Arrays | None:
    """All arrays of an .npz; None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None


def digest(*what: Any) -> str:
    """64 hexadecimal digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """64 hexadecimal digits of a file's content."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What a folder says of the run that it belongs to; None if it says nothing that can be read."""
    try:
        found = json.loads(Path(folder, MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def check_same_run(folder: Path, run: Mapping[str, Any], what: str) -> None:
    """Write the manifest of a new folder; hold that of an old one against `run`.

    Parameters
    ----------
    run : all that the folder's files depend on
    what : they are called in messages

    Raises
    ------
    InvalidInput
        The folder belongs to another run, or holds files without a readable manifest.
    DataError
        The manifest can't be written.
    """
    run = json.loads(json.dumps(run))
    found = read_manifest(folder)
    if found is None and any(path.suffix in (".npz", ".jsonl") for path in folder.iterdir()):
        raise InvalidInput(f"{folder} holds {what} but no readable {MANIFEST}: delete it or choose another")
    if found is None:
        with writing(folder / MANIFEST):
            write_text(folder / MANIFEST, json.dumps(run, indent=2) + "\n")
        return
    for name, value in run.items():
        if found.get(name) != value:
            raise InvalidInput(
                f"{folder} holds {what} of another run ({name} is {found.get(name)!r} there, {value!r} here): "
                "choose another, or delete this one"
            )
