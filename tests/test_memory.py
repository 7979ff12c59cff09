"""What can't fit in memory is refused before it is allocated."""

from __future__ import annotations

import pytest
import tiny
import torch

from daemon_fast import TransformersProposal, memory
from daemon_fast.errors import InvalidInput

CPU = torch.device("cpu")


def test_the_limit_is_the_smallest_that_the_system_names(monkeypatch, tmp_path):
    there = memory.available(CPU)
    assert there is not None
    assert there > 2**20
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    free = memory.available(CPU)
    (tmp_path / "memory.max").write_text("4096\n")
    assert free > memory.available(CPU) == 4096


def test_on_a_gpu_what_tensors_hold_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 500)
    assert memory.available(torch.device("cuda", 0)) == 1200


def test_a_batch_that_cannot_fit_is_named_with_its_parts(monkeypatch):
    settings = {"num_candidates": 50, "max_new_tokens": 8, "min_new_tokens": 8}
    proposal = TransformersProposal(tiny.model(), tiny.tokenizer(), **settings)
    rows, layers, heads, size = 2 * 50, 2, 2, 8
    kept = rows * 8 + 2 * 2  # tokens: those of the candidates, and two prompts of two
    needed = rows * 8 * 16 + 4 * rows * tiny.VOCABULARY + kept * layers * 2 * heads * size * 4
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "available", lambda _: needed)
    assert proposal.propose(["w1 w2", "w3"], seed=0).shape == (2, 50)
    monkeypatch.setattr(memory, "available", lambda _: needed - 1)
    with pytest.raises(InvalidInput, match=r"num_candidates = 50 of 2 .*logits.*keys and values.*lower num_candidates"):
        proposal.propose(["w1 w2", "w3"], seed=0)
    assert proposal.propose(["w1 w2"], seed=0).shape == (1, 50)
    monkeypatch.setattr(memory, "available", lambda _: None)  # the system does not say
    assert proposal.propose(["w1 w2", "w3"], seed=0).shape == (2, 50)
