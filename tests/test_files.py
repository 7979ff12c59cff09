"""Files that appear whole or not at all, and folders of one run."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest

from daemon_fast import files
from daemon_fast.errors import DataError, InvalidInput


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.txt"
    files.write_text(target, "ü")
    assert target.read_bytes() == "ü".encode()

    def interrupted():
        with files.replacing(target) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_bytes() == "ü".encode()
    assert names(tmp_path) == ["a.txt"]


def test_links_stay_and_lead_to_the_new_file(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/target")
    for text in ("first", "second"):
        files.check_writable(tmp_path / "link", force=True)
        files.write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "target").read_text() == text
    assert names(tmp_path / "disk") == ["target"]


def test_pipes_and_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="it is a pipe or a device"):
        files.check_writable(tmp_path / "pipe", force=True)
    assert (tmp_path / "pipe").is_fifo()


def test_arrays_round_trip_and_damage_is_none(tmp_path):
    path = tmp_path / "a.npz"
    assert files.read_arrays(path) is None
    files.write_arrays(path, {"x": np.arange(5), "key": np.array("k")})
    found = files.read_arrays(path)
    assert (found["x"].tolist(), str(found["key"])) == ([0, 1, 2, 3, 4], "k")
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        assert files.read_arrays(path) is None


def test_a_full_disk_is_named_when_a_run_begins(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_text", full)
    with pytest.raises(DataError, match=r"manifest.json can't be written: the disk is full"):
        files.check_same_run(tmp_path, {"seed": 1}, "parts")


def test_a_folder_belongs_to_one_run(tmp_path):
    files.check_same_run(tmp_path, {"seed": 1, "sizes": (1, 2)}, "parts")
    files.check_same_run(tmp_path, {"seed": 1, "sizes": (1, 2)}, "parts")
    with pytest.raises(InvalidInput, match=r"holds parts of another run .seed is 1 there, 2 here"):
        files.check_same_run(tmp_path, {"seed": 2, "sizes": (1, 2)}, "parts")
    assert files.read_manifest(tmp_path) == {"seed": 1, "sizes": [1, 2]}
    (tmp_path / files.MANIFEST).write_text("{")
    files.check_same_run(tmp_path, {"seed": 3}, "parts")  # nothing but a damaged manifest: a new folder
    assert json.loads((tmp_path / files.MANIFEST).read_text()) == {"seed": 3}
    (tmp_path / files.MANIFEST).write_text("[]")
    (tmp_path / "00000000.jsonl").touch()
    with pytest.raises(InvalidInput, match=r"holds parts but no readable manifest\.json"):
        files.check_same_run(tmp_path, {"seed": 3}, "parts")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_what_can_not_be_written_says_why_and_what_is_kept(error, said):
    told = rf"^out can't be written: {said}; all is kept, and the same command goes on from there$"
    with pytest.raises(DataError, match=told), files.writing("out", "all is kept"):
        raise error


def test_what_cannot_be_written_is_known_before_the_work(tmp_path):
    target = tmp_path / "a.json"
    files.check_writable(target)
    assert names(tmp_path) == []  # and nothing is left
    with pytest.raises(DataError, match=r"missing/a\.json can't be written: there is no folder .*missing"):
        files.check_writable(tmp_path / "missing" / "a.json")
    assert names(tmp_path) == []
    with pytest.raises(DataError, match="it is a folder"):
        files.check_writable(tmp_path, force=True)
    with pytest.raises(DataError, match=r"can't be written: File name too long"):
        files.check_writable(tmp_path / ("x" * 255))
    with pytest.raises(DataError, match=r"can't be written: File name too long"):
        files.check_writable(tmp_path / ("x" * 300))
    target.write_text("old")
    with pytest.raises(DataError, match=r"a\.json/b can't be written: there is no folder"):
        files.check_writable(target / "b")
    with pytest.raises(InvalidInput, match=r"a\.json is there already: --force"):
        files.check_writable(target)
    files.check_writable(target, force=True)
    assert target.read_text() == "old"
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InvalidInput, match="link is there already"):
        files.check_writable(tmp_path / "link")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_known_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match=r"can't be written: Permission denied"):
        files.check_writable(tmp_path / "a.json")
