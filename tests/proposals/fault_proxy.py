"""A completions server over a tiny model, and a proxy that spoils replies as real servers and networks do."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import struct
import threading
import time
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET

import tiny

from daemon_fast import TransformersProposal

KEY = "sk-this-must-never-be-seen"
MODEL = "tiny"
OPENAI_FIELDS = {
    "model", "prompt", "n", "seed", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty",
    "logprobs", "echo",
}  # fmt: skip
PASSING = ("delay", "reset", "429", "500", "503", "truncated", "no choices", "aborted")


class TinyServer:
    """Answers as vLLM does, from a tiny Llama."""

    def __init__(self):
        self.model, self.tokenizer = tiny.model(), tiny.tokenizer()
        self._drawing = threading.Lock()

    def __call__(self, path, body):
        """(status, reply) to a request."""
        if path == "/v1/models":
            return 200, {"data": [{"id": MODEL, "max_model_len": tiny.CONTEXT}]}
        if body["model"] != MODEL:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        with self._drawing:
            rows = list(self._echo(body) if body.get("echo") else self._draw(body))
        return 200, {"choices": [self._choice(i, *row) for i, row in enumerate(rows)]}

    def _draw(self, body):
        settings = {
            "num_candidates": body["n"], "max_new_tokens": body["max_tokens"], "temperature": body["temperature"],
            "top_p": body["top_p"], "top_k": max(body.get("top_k", 0), 0), "min_p": body.get("min_p", 0.0),
            "min_new_tokens": body.get("min_tokens", 0),
        }  # fmt: skip
        c = TransformersProposal(self.model, self.tokenizer, **settings).propose([body["prompt"]], body["seed"])
        for r, n in enumerate((c.token_log_p != 0).sum(1).tolist()):
            yield c.tokens[r, :n].tolist(), c.token_log_p[r, :n].tolist()

    def _echo(self, body):
        prompt = body["prompt"]
        c = TransformersProposal(self.model, self.tokenizer).score([prompt[:1]], [prompt[1:]])
        yield prompt, [None, *c.token_log_p[0].tolist()]

    def _choice(self, index, ids, log_p):
        return {
            "index": index,
            "text": self.tokenizer.decode(ids, skip_special_tokens=True),
            "finish_reason": "stop" if ids[-1] == 0 else "length",
            "token_ids": ids,
            "logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": log_p},
        }


def forward(url):
    """Answers with what another server answers."""
    where = urllib.parse.urlsplit(url)

    def answer(path, body):
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=120)
        method = "GET" if body is None else "POST"
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())

    return answer


class FaultProxy:
    """Serves `answer` on a port of its own, with faults.

    Parameters
    ----------
    answer : from a path and a request to a status and a reply
    rate : share of requests for completions that meet a fault which passes; which do is drawn from the request and how
        often it came, so that it doesn't depend on which thread comes first
    faults : those that pass, to draw from
    always : faults that don't: "no ids", "no log-probs", "strict" (unknown fields are refused), "chat form", "401"
    fewer : choices that a reply has at most
    """

    def __init__(self, answer, rate=0.0, faults=PASSING, always=(), fewer=None, seed=0, delay=0.05):
        self.answer, self.rate, self.faults, self.always = answer, rate, faults, set(always)
        self.fewer, self.seed, self.delay = fewer, seed, delay
        self.in_flight = self.most_in_flight = 0
        self.requests, self.met, self.bodies = Counter(), Counter(), []
        self._counting = threading.Lock()

    def __enter__(self):
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.reply(*proxy.answer(self.path, None))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with proxy._counting:
                    proxy.in_flight += 1
                    proxy.most_in_flight = max(proxy.most_in_flight, proxy.in_flight)
                try:
                    proxy.serve(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client has gone
                finally:
                    with proxy._counting:
                        proxy.in_flight -= 1

            def reply(self, status, reply, cut=None, **headers):
                data = json.dumps(reply).encode()[:cut]
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(data)

            def reset(self):
                self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()

            def log_message(self, *args):
                pass

            def finish(self):
                with contextlib.suppress(OSError):
                    super().finish()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # of connections that it reset itself
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def serve(self, handler, body):
        key = json.dumps(body, sort_keys=True)
        with self._counting:
            self.requests[key] += 1
            self.bodies.append(body)
            chance = random.Random(f"{self.seed} {key} {self.requests[key]}")
            fault = chance.choice(self.faults) if chance.random() < self.rate else None
            self.met[fault] += 1
        if "401" in self.always:
            return handler.reply(401, {"error": {"message": f"Incorrect API key provided: {KEY}.\nTry another."}})
        if "strict" in self.always and (unknown := sorted(body.keys() - OPENAI_FIELDS)):
            return handler.reply(400, {"error": {"message": f"Unrecognized request argument supplied: {unknown[0]}"}})
        if "no log-probs" in self.always and body.get("echo"):
            return handler.reply(400, {"error": {"message": "Only no echo is supported"}})
        if fault == "reset":
            return handler.reset()
        if fault == "429":
            return handler.reply(429, {"error": {"message": "slow down"}}, Retry_After="0.01")
        if fault in ("500", "503"):
            return handler.reply(int(fault), {"error": {"message": "engine is busy"}}, Retry_After="0.01")
        if fault == "no choices":
            return handler.reply(200, {"choices": []}, Retry_After="0.01")
        if fault == "delay":
            time.sleep(self.delay)
        status, reply = self.answer(handler.path, body)
        if status == 200:
            for choice in reply["choices"]:
                self.spoil(choice)
                if fault == "aborted":
                    choice["finish_reason"] = "abort"
            reply["choices"] = reply["choices"][: self.fewer]
        return handler.reply(status, reply, cut=-20 if fault == "truncated" else None)

    def spoil(self, choice):
        given, ids = choice["logprobs"], choice.get("token_ids")
        if "chat form" in self.always and given:
            entries = zip(ids, given["token_logprobs"], strict=True)
            choice["logprobs"] = {"content": [{"id": i, "token": "", "logprob": p} for i, p in entries]}
        if self.always & {"no ids", "chat form"}:
            choice.pop("token_ids", None)
        if "no ids" in self.always and given:
            given["tokens"] = ["" for _ in given["tokens"]]
        if "no log-probs" in self.always:
            choice["logprobs"] = None
