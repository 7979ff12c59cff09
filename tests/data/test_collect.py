"""Candidates saved batch by batch: an interrupted run ends with the same as an uninterrupted one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import toy

from daemon_fast import Candidates, ProposalSettings
from daemon_fast.data.collect import batch_seed, batches, collect, scores
from daemon_fast.data.texts import Pairs
from daemon_fast.errors import DataError, InvalidInput

PREFIXES = [[i] for i in range(10)]


class Interrupted(toy.ToyProposal):
    """Is interrupted at its third batch."""

    def propose(self, prefixes, seed):
        if self.calls == 2:
            raise KeyboardInterrupt
        return super().propose(prefixes, seed)

    def score(self, prefixes, continuations):
        if self.calls == 2:
            raise KeyboardInterrupt
        return super().score(prefixes, continuations)


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "lengths", "token_log_p", "token_log_q"))


def test_resumes_to_the_same_result(tmp_path):
    whole, _ = collect(toy.ToyProposal(5), PREFIXES, tmp_path / "whole", seed=1)
    with pytest.raises(KeyboardInterrupt):
        collect(Interrupted(5), PREFIXES, tmp_path / "cut", seed=1)
    rest = toy.ToyProposal(5)
    resumed, seconds = collect(rest, PREFIXES, tmp_path / "cut", seed=1)
    assert rest.calls == 1
    assert same(whole, resumed)
    assert seconds > 0
    idle = toy.ToyProposal(5)
    collect(idle, PREFIXES, tmp_path / "cut", seed=1)
    assert idle.calls == 0


def test_scores_resume_to_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setattr("daemon_fast.data.collect.SCORE_TEXTS", 16)
    texts = Pairs([[0]] * len(toy.SEQUENCES), toy.SEQUENCES.tolist())  # 81: five batches and a text
    whole = toy.ToyProposal(5).score(texts.prefixes, texts.continuations)
    with pytest.raises(KeyboardInterrupt):
        list(scores(Interrupted(5), texts, tmp_path))
    rest = toy.ToyProposal(5)
    assert same(Candidates.concatenate(list(scores(rest, texts, tmp_path))), whole)
    assert rest.calls == 4
    other = Pairs(texts.prefixes, texts.continuations[::-1])
    with pytest.raises(InvalidInput, match="holds candidates of another run \\(continuations is"):
        list(scores(rest, other, tmp_path))


def test_a_damaged_batch_is_drawn_again(tmp_path):
    whole, _ = collect(toy.ToyProposal(5), PREFIXES, tmp_path, seed=1)
    good = (tmp_path / "batch-000001.npz").read_bytes()
    middle = len(good) // 2
    for damage in (b"", b"PK\x03\x04 not a zip", good[:-30], good[:middle] + b"\0" * 40 + good[middle + 40 :]):
        (tmp_path / "batch-000001.npz").write_bytes(damage)
        proposal = toy.ToyProposal(5)
        again, _ = collect(proposal, PREFIXES, tmp_path, seed=1)
        assert proposal.calls == 1
        assert same(whole, again)


def test_a_full_disk_keeps_the_batches_that_are_there(tmp_path, monkeypatch):
    whole, _ = collect(toy.ToyProposal(5), PREFIXES, tmp_path / "whole", seed=1)
    save, left = np.savez_compressed, [2]

    def full(file, **arrays):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(file, **arrays)

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(DataError, match=r"batch-000002.npz can't be written: the disk is full; the batches in .* kept"):
        collect(toy.ToyProposal(5), PREFIXES, tmp_path / "cut", seed=1)
    left[0] = 100
    rest = toy.ToyProposal(5)
    resumed, _ = collect(rest, PREFIXES, tmp_path / "cut", seed=1)
    assert rest.calls == 1
    assert same(whole, resumed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed is 1 there, 2 here"),
        ({"batch_size": 3}, "batch_size is 4 there, 3 here"),
        ({"prefixes": PREFIXES[::-1]}, "prefixes is"),
        ({"prefixes": PREFIXES[:-1]}, "num_prefixes is 10 there, 9 here"),
        ({"proposal": toy.ToyProposal(6)}, "num_candidates is 5 there, 6 here"),
    ],
)
def test_candidates_of_another_run_are_not_mixed_in(tmp_path, change, message):
    call = {"proposal": toy.ToyProposal(5), "prefixes": PREFIXES, "directory": tmp_path, "seed": 1}
    collect(**call)
    with pytest.raises(InvalidInput, match=message):
        collect(**{**call, **change})


def test_batches_without_a_manifest_are_not_trusted(tmp_path):
    collect(toy.ToyProposal(5), PREFIXES, tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"no readable manifest\.json"):
        collect(toy.ToyProposal(5), PREFIXES, tmp_path)


def test_batch_seeds_differ():
    seeds = {batch_seed(seed, batch) for seed in range(50) for batch in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_candidates", 0, "num_candidates = 0 must be >= 1"),
        ("min_new_tokens", 65, "min_new_tokens = 65 must be from 0 to max_new_tokens = 64"),
        ("temperature", 0.0, "temperature = 0.0 must be positive and finite"),
        ("top_k", -1, "top_k = -1 must be >= 0"),
        ("top_p", 0.0, r"top_p = 0.0 must be in \(0, 1\]"),
    ],
)
def test_settings_are_checked(field, value, message):
    with pytest.raises(InvalidInput, match=message):
        ProposalSettings("m", "v", **{field: value})


class WithModel(toy.ToyProposal):
    def __init__(self, weight):
        super().__init__(5)
        self.model = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(self.model.weight, weight)
        torch.nn.init.zeros_(self.model.bias)


def test_candidates_of_other_weights_are_not_mixed_in(tmp_path):
    collect(WithModel(1.0), PREFIXES, tmp_path)
    with pytest.raises(InvalidInput, match=r"holds candidates of another run \(weights is '\w+' there, '\w+' here\)"):
        collect(WithModel(1.5), PREFIXES, tmp_path)
    again = WithModel(1.0)
    collect(again, PREFIXES, tmp_path)
    assert again.calls == 0
    collect(toy.ToyProposal(5), PREFIXES, tmp_path)  # of an engine that doesn't tell


def test_a_folder_that_another_process_writes_is_refused_and_whole_candidates_are_read(tmp_path):
    code = (
        "import sys; from pathlib import Path; from daemon_fast.files import alone\n"
        "with alone(Path(sys.argv[1]), threads=False): print('held', flush=True); sys.stdin.read()"
    )

    def other():
        command = [sys.executable, "-c", code, str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"held\n"
        return process

    with other() as process, pytest.raises(InvalidInput, match="is being written by another run"):
        collect(toy.ToyProposal(5), PREFIXES, tmp_path)
    assert process.returncode == 0
    whole, _ = collect(toy.ToyProposal(5), PREFIXES, tmp_path)
    with other():
        again, _ = collect(toy.ToyProposal(5), PREFIXES, tmp_path)
    assert same(whole, again)


def test_a_run_that_its_caller_left_does_not_keep_the_next_from_going_on(tmp_path):
    left = batches(toy.ToyProposal(5), PREFIXES, tmp_path)
    next(left)
    rest = toy.ToyProposal(5)
    collect(rest, PREFIXES, tmp_path)
    assert rest.calls == 2
