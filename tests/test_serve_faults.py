"""The server among clients and engines that fail: none hangs, none is lost, and a process ends as it should."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import warnings

import httpx2
import pytest
import serve_fuzz
import tiny
import torch
from proposals import fault_proxy
from test_serve import MODEL, make_decoder, metric, post, serving, until

from daemon_fast import Energy, SIRDecoder, metrics
from daemon_fast.proposals import openai as server_proposal
from daemon_fast.proposals import transformers as transformers_proposal
from daemon_fast.serving import app as app_module
from daemon_fast.serving.batcher import Batcher


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", fault_proxy.KEY)
    warnings.simplefilter("ignore")


@pytest.fixture(scope="module")
def url():
    with serving(make_decoder()) as address:
        yield address


def address_of(url):
    return url.removeprefix("http://").removesuffix("/v1").split(":")


# ---- clients --------------------------------------------------------------------------------------------------------


def test_a_thousand_requests_as_no_client_sends_them(url):
    host, port = address_of(url)
    came = asyncio.run(serve_fuzz.storm(host, int(port), range(1000)))
    assert came["200"] > 100
    assert came["400"] > 100
    until(lambda: metric(url, "daemon_waiting_prompts") == 0)
    assert metric(url, "daemon_requests_total") >= 700
    assert post(url, {"model": MODEL, "prompt": "w1", "seed": 1}).status_code == 200


def test_a_body_has_its_size_and_time(url, monkeypatch):
    monkeypatch.setattr(app_module, "MOST_BYTES", 10_000)
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(app_module, "DISCARD_SECONDS", 0.2)
    reply = post(url, {"model": MODEL, "prompt": "w1 " * 100_000})
    assert (reply.status_code, reply.json()["error"]["message"]) == (413, "the body has more than 10000 bytes")
    host, port = address_of(url)
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        slow.sendall(b'Content-Length: 100\r\n\r\n{"model"')
        assert post(url, {"model": MODEL, "prompt": "w1"}).status_code == 200  # meanwhile
        reply = slow.recv(10_000)
    assert b"408" in reply.split(b"\r\n")[0]
    assert b"did not arrive within 0.3 s" in reply


def test_a_client_that_reads_slowly_keeps_none_waiting(url):
    host, port = address_of(url)
    body = json.dumps({"model": MODEL, "prompt": ["w1"] * 100, "n": 20, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(f"{head}\r\n\r\n".encode() + body)
        first = slow.recv(100)
        for _ in range(3):
            assert post(url, {"model": MODEL, "prompt": "w1"}).status_code == 200
        rest = b""
        while not rest.endswith(b"0\r\n\r\n"):
            rest += slow.recv(4096)
    assert first.startswith(b"HTTP/1.1 200")
    assert rest.count(b'"finish_reason"') == 2000


# ---- a server behind it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def behind(proxy, tokenizer, batch_size=16, **options):
    """A decoder whose candidates come from a server behind it."""
    settings = {"num_candidates": 6, "max_new_tokens": 12, "min_new_tokens": 0, "temperature": 0.9}
    proposal = server_proposal.ServerProposal(proxy.url, tokenizer, **settings, **options)
    mu = torch.tensor([3.0, 2.0], dtype=torch.float64)
    energy = Energy(metrics.parse(["sr_1", "tr_4"]), mu, torch.zeros(2), proposal.settings)
    return SIRDecoder(energy, proposal, batch_size)


def test_faults_of_the_server_behind_lose_no_request_and_change_none(tokenizer, monkeypatch):
    monkeypatch.setattr(server_proposal, "MAX_WAIT", 0.05)
    server = fault_proxy.TinyServer()
    requests = [{"model": MODEL, "prompt": tiny.text(1 + i % 5, i), "seed": i, "n": 2} for i in range(24)]
    with fault_proxy.FaultProxy(server) as sound, fault_proxy.FaultProxy(server, rate=0.4) as faulty:
        plain = behind(sound, tokenizer)
        with serving(behind(faulty, tokenizer, max_retries=10), one_by_one=True) as address:
            replies: dict[int, object] = {}

            def ask(i):
                replies[i] = post(address, requests[i])

            threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert sum(n for fault, n in faulty.met.items() if fault) > 5
        for i, request in enumerate(requests):
            want = plain([request["prompt"]], num_samples=2, seed=i)
            assert replies[i].status_code == 200
            assert [choice["text"] for choice in replies[i].json()["choices"]] == want.texts[0]


def test_a_server_behind_that_dies(tokenizer, monkeypatch):
    monkeypatch.setattr(server_proposal, "MAX_WAIT", 0.05)
    with (
        fault_proxy.FaultProxy(fault_proxy.TinyServer()) as proxy,
        serving(behind(proxy, tokenizer, max_retries=1), one_by_one=True) as address,
    ):
        assert post(address, {"model": MODEL, "prompt": "w1"}).status_code == 200
        proxy.rate, proxy.faults = 1.0, ("reset",)
        for _ in range(3):
            dead = post(address, {"model": MODEL, "prompt": "w1"})
            assert (dead.status_code, dead.json()["error"]["code"]) == (502, "engine_error")
            assert fault_proxy.KEY not in dead.text
        assert post(address, {"model": MODEL, "prompt": ""}).status_code == 400
        assert metric(address, 'daemon_requests_total{path="/v1/completions",status="502"}') == 3


class Hangs:
    """A server that answers no request for completions, and notes when its client has left."""

    def __init__(self):
        self.asked, self.left = threading.Event(), threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=(self._listening.accept()[0],), daemon=True).start()

    def _answer(self, connection):
        models = json.dumps({"data": [{"id": MODEL}]}).encode()
        with connection:
            while data := connection.recv(65536):
                if data.startswith(b"POST"):
                    self.asked.set()
                elif data.startswith(b"GET"):  # else the rest of a request
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(models), models))
            if self.asked.is_set():
                self.left.set()

    def close(self):
        self._listening.close()


def leaves(address, body, once):
    """A client that sends a request, and leaves at this event."""

    async def ask():
        async with httpx2.AsyncClient(timeout=60) as http:
            task = asyncio.create_task(http.post(f"{address}/completions", json=body))
            assert await asyncio.to_thread(once.wait, 20)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(ask())


@pytest.mark.parametrize("prompts", ["w1", ["w1", "w2", "w3"]])
def test_a_server_behind_is_told_when_nobody_waits_any_more(tokenizer, prompts):
    server = Hangs()
    with contextlib.closing(server), serving(behind(server, tokenizer), one_by_one=True) as address:
        leaves(address, {"model": MODEL, "prompt": prompts}, server.asked)
        assert server.left.wait(20)
        until(lambda: metric(address, 'daemon_requests_total{path="/v1/completions",status="499"}') == 1)


def test_a_server_behind_is_told_when_time_is_over(tokenizer):
    server = Hangs()
    with (
        contextlib.closing(server),
        serving(behind(server, tokenizer, batch_size=1), one_by_one=True, timeout=0.5) as address,
    ):
        for _ in range(2):  # one thread draws: the first request has let go of it
            assert post(address, {"model": MODEL, "prompt": "w1"}).status_code == 504
            assert server.left.wait(20)
            server.left.clear()


class Steps:
    """Steps of a batch, of which the fourth waits."""

    def __init__(self, monkeypatch):
        self.taken, self.reached, self.go_on = 0, threading.Event(), threading.Event()
        step = transformers_proposal._Batch._step

        def counted(batch, *arguments):
            self.taken += 1
            if self.taken == 4:
                self.reached.set()
                assert self.go_on.wait(20)
            step(batch, *arguments)

        monkeypatch.setattr(transformers_proposal._Batch, "_step", counted)


def test_a_batch_that_nobody_waits_for_is_stopped(monkeypatch):
    decoder = make_decoder(min_new_tokens=12)
    want = decoder(["w1"], seed=3).texts[0][0]
    steps = Steps(monkeypatch)
    with serving(decoder) as address:
        leaves(address, {"model": MODEL, "prompt": ["w1", "w2"]}, steps.reached)
        until(lambda: metric(address, 'daemon_requests_total{path="/v1/completions",status="499"}') == 1)
        steps.go_on.set()
        reply = post(address, {"model": MODEL, "prompt": "w1", "seed": 3}).json()
    assert reply["choices"][0]["text"] == want
    assert steps.taken == 4 + 11  # of 12 tokens the first is drawn from the prompt's logits


def test_a_batch_that_somebody_waits_for_is_drawn_to_its_end(monkeypatch):
    decoder = make_decoder(min_new_tokens=12)
    want = [decoder(["w1"], seed=seed).texts[0][0] for seed in (3, 4)]
    steps = Steps(monkeypatch)
    batcher = Batcher(decoder, False, 100, lambda _: None)
    first = batcher.submit(["w9"], 1, 0)
    assert steps.reached.wait(20)  # meanwhile these come, which share the next batch
    leaving, staying = batcher.submit(["w1"], 1, 3), batcher.submit(["w1"], 1, 4)
    steps.go_on.set()
    first.result(20)
    until(lambda: steps.taken > 11)
    leaving.cancel()
    assert staying.result(20).texts[0][0] == want[1]
    batcher.close()


# ---- a process of its own -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def energy(tmp_path_factory):
    return serve_fuzz.artefact(tmp_path_factory.mktemp("served"))


def environment():
    return {**os.environ, "DAEMON_FAST_API_KEY": "sk-of-clients", "OMP_NUM_THREADS": "1"}


def test_sigterm_answers_what_was_asked_for_before(energy, tmp_path):
    with (tmp_path / "log").open("w+") as log:
        process, host, port = serve_fuzz.start(energy, "--batch-size", "1", stderr=log, env=environment())
        address, replies = f"http://{host}:{port}/v1", []
        body = {"model": MODEL, "prompt": ["w11 w12"] * 100, "seed": 1}

        def ask():
            replies.append(post(address, body, Authorization="Bearer sk-of-clients"))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        try:
            for thread in threads:
                thread.start()
            until(lambda: metric(address, "daemon_waiting_prompts") > 100)
            process.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join(60)
            assert [reply.status_code for reply in replies] == [200, 200]
            assert len(replies[0].json()["choices"]) == 100
            assert process.wait(30) == -signal.SIGTERM
        finally:
            process.kill()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=5)
        log.seek(0)
        text = log.read()
    entries = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [entry["status"] for entry in entries if entry.get("path") == "/v1/completions"] == [200, 200]
    assert "sk-of-clients" not in text
    assert "w11" not in text


def test_ctrl_c_is_quiet_and_a_port_in_use_is_told(energy, tmp_path):
    with (tmp_path / "log").open("w+") as log:
        process, _, port = serve_fuzz.start(energy, stderr=log, env=environment())
        command = [*process.args[:-2], "--port", str(port)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=False)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        log.seek(0)
        assert "Traceback" not in log.read()
    assert second.returncode == 2
    assert f"port = {port}: can't be listened at: Address already in use" in second.stderr
