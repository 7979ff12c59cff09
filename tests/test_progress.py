"""Progress in a log: whole lines, with count and total."""

from __future__ import annotations

import re

from daemon_fast import progress as module
from daemon_fast.progress import progress


def test_lines_of_a_log(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(progress(range(3), desc="draw", unit="prefix")) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "\r" not in shown
    lines = shown.splitlines()
    assert [re.search(r"(\d)/3", line)[1] for line in lines if "/3" in line][:3] == ["0", "1", "2"]
    assert re.fullmatch(r"draw: 100%.* 3/3 \[.*prefix/s\]", lines[-1])


def test_few_lines_for_quick_work(capsys):
    for _ in progress(range(1000), desc="draw", unit="prefix"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "1000/1000" in lines[1]


def test_what_an_earlier_run_did_counts(capsys):
    with progress(desc="decode", unit="record", total=10, initial=6) as bar:
        bar.update(4)
    assert "10/10" in capsys.readouterr().err


def test_it_can_be_turned_off(capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(progress(range(3), desc="draw", unit="prefix")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
