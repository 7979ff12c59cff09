"""The API reference builds without a warning, and the examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import pkgutil
from pathlib import Path

import pytest
import tiny
import torch

import daemon_fast
from daemon_fast import Energy, TransformersProposal
from daemon_fast.fit import from_texts


def examples():
    """Every docstring of the package that has examples, by the name of what it describes."""
    for module in pkgutil.walk_packages(daemon_fast.__path__, "daemon_fast."):
        source = Path(importlib.util.find_spec(module.name).origin)
        if source.suffix == ".py" and ">>>" in source.read_text(encoding="utf-8"):
            for found in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module.name)):
                if found.examples:
                    yield found.name, found


EXAMPLES = dict(examples())


def small(**settings):
    """A tiny model in place of an example's, which draws few tokens."""
    few = {"num_candidates": 8, "max_new_tokens": 12, "min_new_tokens": 12}
    return TransformersProposal(tiny.model(), tiny.tokenizer(), **{**settings, **few})


def checked(function):
    """Takes what `function` takes, and gives a small proposal."""

    def stand_in(*args, **kwargs):
        return small(**inspect.signature(function).bind(*args, **kwargs).arguments.get("settings", {}))

    return stand_in


def fit_energy(proposal, human, metrics):
    assert human == "wikipedia"
    texts = [tiny.text(30, seed) for seed in range(12)]
    return from_texts.fit_energy(proposal, texts, metrics, num_prefixes=6, prefix_tokens=4)


@pytest.fixture(scope="module")
def energy():
    return fit_energy(small(), "wikipedia", ["sr_2", "nats"])


@pytest.fixture
def names(energy, tmp_path, monkeypatch):
    """What examples use without saying where it comes from."""
    monkeypatch.chdir(tmp_path)
    energy.save("energy.json")
    proposals = {}
    for name in ("TransformersProposal", "VLLMProposal", "ServerProposal"):
        real = getattr(daemon_fast, name)
        proposals[name] = checked(real)
        if hasattr(real, "load"):
            proposals[name].load = checked(real.load)
    model, tokens = tiny.model(), torch.arange(2, 12)[None]
    model.requires_grad_(True)
    return {
        **proposals, "daemon_fast": daemon_fast, "Energy": Energy, "energy": energy, "fit_energy": fit_energy,
        "model": model, "tokens": tokens, "inputs": {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # a tiny random model is far from any text
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_gives_what_it_shows(name, names):
    example = EXAMPLES[name]
    example.globs.update({key: value for key, value in names.items() if key in example.docstring})
    for line in example.examples:
        if not line.want:  # an example may leave out what it gives
            line.source = f"_ = ({line.source.strip()})\n" if is_expression(line.source) else line.source
    out: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=out.append).failed == 0, "".join(out)


def is_expression(source):
    try:
        compile(source, "example", "eval")
    except SyntaxError:
        return False
    return True


def test_the_reference_is_written_without_a_warning(tmp_path):
    pytest.importorskip("pdoc")
    import docs

    docs.build(tmp_path)
    pages = {str(page.relative_to(tmp_path)) for page in tmp_path.rglob("*.html")}
    assert {"index.html", "daemon_fast.html", "daemon_fast/ops.html", "daemon_fast/proposals/base.html"} <= pages
    page = (tmp_path / "daemon_fast.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in daemon_fast.__all__ if name not in ("errors", "metrics"))
