"""Engines by name, as the command line and the workers of a cluster are told: what can't be is one line."""

from __future__ import annotations

import importlib.util
import socket

import pytest
import tiny
from test_cli import fails, fit_arguments, run

from daemon_fast import TransformersProposal
from daemon_fast.errors import InvalidInput
from daemon_fast.proposals.load import EngineSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("model"))


def test_settings_are_known_before_the_model_is_loaded(folder):
    engine, settings = EngineSpec(model_id=folder), {"num_candidates": 3, "temperature": 0.9}
    proposal = engine.proposal(**settings)
    assert isinstance(proposal, TransformersProposal)
    assert engine.settings(**settings) == proposal.settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "tgi"}, "engine = 'tgi' must be 'transformers', 'vllm', or the address of a server"),
        ({"engine_kwargs": {"tensor_parallel_size": 2}}, "are for vLLM and servers; the engine is 'transformers'"),
        (
            {"name": "http://localhost:1/v1", "engine_kwargs": {"tp": 2}},
            "engine_kwargs has 'tp'; for a server",
        ),
        ({"name": "vllm", "device": "cuda:1"}, "device = 'cuda:1' is for Transformers"),
        ({"name": "http://localhost:1/v1", "dtype": "bfloat16"}, "has chosen its own"),
    ],
)
def test_what_an_engine_does_not_take_is_an_error(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        EngineSpec(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "tgi"], "engine = 'tgi' must be"),
        (["--engine", "vllm", "--engine-args", "{"], "--engine-args is not JSON"),
        (["--engine", "vllm", "--engine-args", "[1]"], "--engine-args = [1] must be a JSON object"),
        (["--engine-args", '{"max_model_len": 64}'], "are for vLLM"),
    ],
)
def test_the_command_line_says_what_is_wrong(folder, tmp_path, options, message):
    fails(run(*fit_arguments(folder, "wikipedia", tmp_path / "e.json", *options)), message)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_vllm_that_is_not_installed(folder, tmp_path):
    fails(run(*fit_arguments(folder, "wikipedia", tmp_path / "e.json", "--engine", "vllm")), "pip install vllm")


def test_a_server_that_is_not_there(folder, tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="needs openai: pip install 'daemon-fast[server]'")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    fails(run(*fit_arguments(folder, "wikipedia", tmp_path / "e.json", "--engine", address)), address)
