"""A completions server over a tiny model, a proxy that spoils replies as networks do, tables of what servers do."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import random
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET

import tiny

from daemon_fast import TransformersProposal

KEY = "sk-this-must-never-be-seen"
MODEL = "tiny"
OPENAI_FIELDS = {
    "model", "prompt", "n", "seed", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty",
    "logprobs", "echo", "messages", "top_logprobs", "max_completion_tokens",
}  # fmt: skip
PASSING = ("delay", "reset", "429", "500", "503", "truncated", "no choices", "aborted")


class TinyServer:
    """Answers as vLLM does, from a tiny Llama; chats, if its tokenizer has a template. `eos` : that end its texts."""

    def __init__(self, tokenizer=None, eos=None):
        self.eos = eos
        self.model, self.tokenizer = tiny.model(), tokenizer or tiny.tokenizer()
        self._drawing = threading.Lock()
        self._end = self.tokenizer.get_vocab().get("<end>")

    def __call__(self, path, body):
        """(status, reply) to a request."""
        if chats := path.endswith("/chat/completions"):
            text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            body = {**body, "prompt": text}
        if body is not None and isinstance(body["prompt"], str):
            body = {**body, "prompt": self.tokenizer(body["prompt"])["input_ids"]}
        if path == "/v1/models":
            return 200, {"data": [{"id": MODEL, "max_model_len": tiny.CONTEXT}]}
        if body["model"] != MODEL:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        with self._drawing:
            rows = list(self._echo(body) if body.get("echo") else self._draw(body))
        form = self._message if chats else self._choice
        return 200, {"choices": [form(i, *row) for i, row in enumerate(rows)]}

    def _draw(self, body):
        settings = {
            "num_candidates": body.get("n", 1),
            "max_new_tokens": body.get("max_tokens") or body["max_completion_tokens"],
            "temperature": body["temperature"], "top_p": body["top_p"], "top_k": max(body.get("top_k", 0), 0),
            "min_p": body.get("min_p", 0.0), "min_new_tokens": body.get("min_tokens", 0),
        }  # fmt: skip
        proposal = TransformersProposal(self.model, self.tokenizer, eos_token_ids=self.eos, **settings)
        c = proposal.propose([body["prompt"]], body.get("seed", 0))
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
            "finish_reason": "stop" if ids[-1] in (0, self._end) else "length",
            "token_ids": ids,
            "logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": log_p},
        }

    def _message(self, index, ids, log_p):
        choice = self._choice(index, ids, log_p)
        entries = [{"token": f"token_id:{i}", "logprob": p, "bytes": None} for i, p in zip(ids, log_p, strict=True)]
        message = {"role": "assistant", "content": choice.pop("text"), "refusal": None, "tool_calls": []}
        return {**choice, "message": message, "logprobs": {"content": entries}}


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
    answer : from a path and a request to a status and a reply; headers of it, if any
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
        self.requests, self.met, self.bodies, self.credentials = Counter(), Counter(), [], set()
        self._counting = threading.Lock()

    def __enter__(self):
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                proxy.credentials.add(self.headers["Authorization"])
                status, reply, *headers = proxy.answer(self.path, None)
                self.reply(status, reply, **dict(*headers))

            def do_POST(self):
                proxy.credentials.add(self.headers["Authorization"])
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
        status, reply, *headers = self.answer(handler.path, body)
        if status == 200 and (self.always or self.fewer or fault == "aborted"):
            for choice in reply["choices"]:
                self.spoil(choice)
                if fault == "aborted":
                    choice["finish_reason"] = "abort"
            reply["choices"] = reply["choices"][: self.fewer]
        return handler.reply(status, reply, cut=-20 if fault == "truncated" else None, **dict(*headers))

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


def refuses(said, when):
    """Answers 400 to some requests."""

    def spoil(answer, path, body):
        if path.endswith("/completions") and when(body):
            return 400, {"error": {"message": said(body) if callable(said) else said}}
        return answer(path, body)

    return spoil


def changes(request):
    """Does something else than it was asked for."""

    def spoil(answer, path, body):
        return answer(path, body if body is None else {**body, **request(body)})

    return spoil


def replies(change):
    """Replies something else: `change` gets the choices, and returns the reply."""

    def spoil(answer, path, body):
        status, reply = answer(path, body)
        return (status, change(reply["choices"])) if path.endswith("/completions") else (status, reply)

    return spoil


def choices(change):
    """Changes each choice, in place."""

    def spoil(answer, path, body):
        status, reply = answer(path, body)
        for choice in reply.get("choices", ()):
            change(choice)
        return status, reply

    return spoil


def lists(status, reply):
    """Answers so when asked for its models."""
    return lambda answer, path, body: (status, reply) if path.endswith("/models") else answer(path, body)


def copies(request):
    """n copies of one candidate."""

    def spoil(answer, path, body):
        if body is None:
            return answer(path, body)
        status, reply = answer(path, {**body, "n": 1, **request(body)})
        return status, {"choices": [{**reply["choices"][0], "index": i} for i in range(body.get("n", 1))]}

    return spoil


def sets(**fields):
    return choices(lambda choice: choice.update(fields))


def text_only(**fields):
    """Only texts and how they ended."""

    def spoil(choice):
        choice.pop("token_ids")
        choice["logprobs"] = None
        choice.update(fields)

    return choices(spoil)


def cut(reason):
    def spoil(choice):
        given = choice["logprobs"]
        choice["token_ids"], given["token_logprobs"] = choice["token_ids"][:2], given["token_logprobs"][:2]
        choice.update(finish_reason=reason, text="")

    return choices(spoil)


def draws_on(choice):
    """Goes on behind the end of text."""
    given, more = choice["logprobs"], 12 - len(choice["token_ids"])
    choice["token_ids"] = choice["token_ids"] + [7] * more
    given["token_logprobs"] = given["token_logprobs"] + [-1.0] * more
    choice["finish_reason"] = "length"


def own_text(answer, path, body):
    """Takes only texts, and says so as a validator does."""
    if body is not None and not isinstance(body.get("prompt", ""), str):
        return 422, {"detail": [{"loc": ["body", "prompt"], "msg": "Input should be a valid string"}]}
    return answer(path, body)


def both(*spoils):
    def spoil(answer, path, body):
        for outer in reversed(spoils):
            answer = functools.partial(outer, answer)
        return answer(path, body)

    return spoil


@dataclass(frozen=True)
class Fault:
    """What a server does, and what must come of it.

    Attributes
    ----------
    spoil : from the good server's answer, a path and a request to status and reply
    error : what the EngineError says; None: candidates come
    same : whether they are the good server's candidates; else others, as good
    told : what is warned of
    options : of the proposal
    """

    spoil: Callable
    error: str | None = None
    same: bool = True
    told: str | None = None
    options: dict = field(default_factory=dict)


UNSAMPLED = "that is no sample of the model"
CUT = "neither an end-of-text token nor max_tokens = 12 ended it"
UNNAMED = {"served_model": MODEL}
STRICT = refuses(lambda b: f"unknown field {sorted(b.keys() - OPENAI_FIELDS)[0]}", lambda b: b.keys() - OPENAI_FIELDS)
TEXTS = {"log_probs": False}

FAULTS = {
    # n and seeds
    "copies of one seed": Fault(copies(lambda _: {}), same=False, told="asked for one by one"),
    "copies whatever the seed": Fault(copies(lambda _: {"seed": 7}), "seems to ignore temperature or seed"),
    "copies in texts": Fault(
        both(text_only(finish_reason="length"), copies(lambda b: {"seed": 7, "min_tokens": 12})),
        "equal candidates of up to 12 tokens",
        options=TEXTS,
    ),
    "greedy": Fault(changes(lambda b: {"temperature": 1e-3, "min_tokens": 12}), "more than chance allows"),
    "n has a bound": Fault(refuses(lambda b: f"n = {b['n']} exceeds 4 slots", lambda b: b["n"] > 4), same=False),
    "n has a bound of 1": Fault(refuses("only one", lambda b: b["n"] > 1), same=False),
    "n is cut": Fault(changes(lambda b: {"n": min(b["n"], 4)}), same=False),
    "n is ignored": Fault(changes(lambda b: {"n": 1}), same=False),
    "n not with a seed": Fault(
        refuses("n with a seed is not supported", lambda b: b["n"] > 1 and "seed" in b), same=False
    ),
    "n is unknown": Fault(both(refuses("unexpected n", lambda b: "n" in b), changes(lambda b: {"n": 1})), same=False),
    "seed is unknown": Fault(
        both(refuses("unexpected seed", lambda b: "seed" in b), changes(lambda b: {"seed": random.randrange(2**30)})),
        same=False,
        told="takes no seed",
    ),
    "n is refused by an error under 200": Fault(
        lambda answer, path, body: (
            answer(path, body) if body is None or body["n"] == 1 else (200, {"error": "n must be 1"})
        ),
        same=False,
    ),
    # prompts and fields
    "texts only": Fault(own_text, told="takes only texts as prompts"),
    "texts only, and few fields": Fault(both(own_text, STRICT), told="takes only texts as prompts"),
    "texts only, few fields and no n, all told alike": Fault(
        refuses("Bad Request", lambda b: b.keys() - OPENAI_FIELDS or b["n"] > 1 or not isinstance(b["prompt"], str)),
        same=False,
        told="takes only texts as prompts",
    ),
    "few fields, n has a bound": Fault(
        both(STRICT, refuses("n is too large", lambda b: b["n"] > 2)),
        same=False,
        told="only the fields that OpenAI defines",
    ),
    "refuses everything": Fault(refuses("no credit", lambda b: True), r"answers 400: no credit$"),
    # tokens
    "more tokens": Fault(
        changes(lambda b: {"max_tokens": 15, "min_tokens": 15}), "gives 15 tokens, though max_tokens = 12"
    ),
    "more text": Fault(
        both(text_only(finish_reason="length"), changes(lambda b: {"max_tokens": 40, "min_tokens": 40})),
        r"gives \d+ tokens, though max_tokens = 12",
        options=TEXTS,
    ),
    "an id too large": Fault(sets(token_ids=[5, tiny.VOCABULARY]), "gives token 62, outside the vocabulary of 62"),
    "an id below 0": Fault(sets(token_ids=[-1]), "gives token -1, outside the vocabulary of 62"),
    "ids of words": Fault(sets(token_ids=["w1"]), "a choice that makes no sense"),
    "ids of fractions": Fault(sets(token_ids=[5.5]), "a choice that makes no sense"),
    "draws on behind the end": Fault(choices(draws_on)),
    "probabilities for logarithms": Fault(
        choices(lambda c: c["logprobs"].update(token_logprobs=[0.5] * len(c["token_ids"]))), "must be at most 0"
    ),
    # how candidates ended
    **{
        f"ended by {reason}": Fault(sets(finish_reason=reason))
        for reason in ("eos_token", "eos", "end_turn", "length", "x", None)
    },
    "says nothing of the end": Fault(choices(lambda c: c.pop("finish_reason"))),
    "texts say nothing of the end": Fault(
        text_only(finish_reason=None), same=False, told="does not say how candidates ended", options=TEXTS
    ),
    "texts ended by x": Fault(
        text_only(finish_reason="x"), "finish_reason = 'x', and gives no token ids", options=TEXTS
    ),
    **{
        f"ended by {reason}": Fault(sets(finish_reason=reason), UNSAMPLED)
        for reason in ("content_filter", "tool_calls")
    },
    "failed midway": Fault(
        sets(finish_reason="error", error={"message": "out of\nmemory"}), rf"\(out of memory\): {UNSAMPLED}"
    ),
    "aborted for ever": Fault(sets(finish_reason="abort"), "in 3 attempts: a reply was aborted"),
    "cut, and no reason": Fault(cut(None), CUT),
    "cut for length": Fault(cut("length"), CUT),
    "cut, another reason": Fault(cut("shutdown"), f"finish_reason = 'shutdown': {CUT}"),
    "ignores min_tokens, knows ignore_eos": Fault(
        changes(lambda b: {"min_tokens": 12 * b.get("ignore_eos", False)}), options={"min_new_tokens": 12}
    ),
    "ignores min_tokens and ignore_eos": Fault(
        changes(lambda b: {"min_tokens": 0}), "it needs min_new_tokens = 0", options={"min_new_tokens": 12}
    ),
    "ignores min_tokens in texts": Fault(
        text_only(text="w1", finish_reason="stop"),
        "it needs min_new_tokens = 0",
        options={"min_new_tokens": 11, **TEXTS},
    ),
    # texts and choices
    "no text, but ids": Fault(choices(lambda c: c.pop("text"))),
    "null for the text, but ids": Fault(sets(text=None)),
    "null for the text": Fault(text_only(text=None), r"neither token ids nor a text \(text = null\)", options=TEXTS),
    "an empty text": Fault(text_only(text="", finish_reason="length"), "gives an empty text, though", options=TEXTS),
    "half of the text": Fault(
        text_only(text="w1 w2", finish_reason="length"), "gives a text of 2 tokens", options=TEXTS
    ),
    "no numbers": Fault(choices(lambda c: c.pop("index"))),
    "one number": Fault(sets(index=0), same=False),
    "one choice again and again": Fault(replies(lambda given: {"choices": [given[0]] * len(given)}), same=False),
    "no choices": Fault(replies(lambda _: {"choices": None}), "in 3 attempts: the reply has no choices"),
    "choices that are none": Fault(replies(lambda _: {"choices": "none"}), "the reply has no choices"),
    "a list": Fault(replies(lambda given: given), "the reply has no choices"),
    "a chat": Fault(
        replies(lambda given: {"choices": [{"index": 0, "message": {"content": "w1"}, "finish_reason": "stop"}]}),
        "it answers as a chat",
        options=TEXTS,
    ),
    # errors under 200
    "an error": Fault(replies(lambda _: {"error": {"message": "no\ncredit"}}), "answers an error: no credit$"),
    "an error in a word": Fault(replies(lambda _: {"error": "no credit"}), "answers an error: no credit$"),
    "an error beside choices": Fault(
        replies(lambda given: {"choices": given, "error": {"message": "no"}}), "error: no$"
    ),
    "an error of a code": Fault(replies(lambda _: {"error": {"message": "pay", "code": 402}}), "answers 402: pay$"),
    "an error that stays": Fault(
        replies(lambda _: {"error": {"message": "full", "code": 503}}), "no answer in 3 attempts: full$"
    ),
    "an overload that stays": Fault(
        replies(lambda _: {"error": {"message": "full", "type": "overloaded_error"}}), "no answer in 3 attempts: full$"
    ),
    "no error": Fault(replies(lambda given: {"choices": given, "error": None})),
    # routes
    "no /models": Fault(lists(404, {"detail": "Not Found"}), options=UNNAMED),
    "no /models, and no name": Fault(
        lists(404, {"detail": "Not Found"}), r"which models it serves \(answers 404: Not Found\)"
    ),
    "/models refused": Fault(lists(400, {"error": {"message": "no"}}), options=UNNAMED),
    "/models refused, and no name": Fault(
        lists(200, {"error": "no list"}), r"which models it serves \(answers no list, but no list\)"
    ),
    "no models": Fault(lists(200, {"data": []}), options=UNNAMED),
    "no models, and no name": Fault(lists(200, {"data": []}), "its list is empty"),
    "models that are no list": Fault(lists(200, {"status": "ok"}), options=UNNAMED),
    "a bare list": Fault(lists(200, [{"id": MODEL}])),
    "a bare list of names": Fault(lists(200, [MODEL])),
    "null for models": Fault(lists(200, None), options=UNNAMED),
    "no completions": Fault(
        lambda answer, path, body: answer(path, body) if body is None else (404, {"detail": "Not Found"}),
        r"404: Not Found; it needs .*/v1/completions to continue a text or token ids",
    ),
}


# ---- chats ----------------------------------------------------------------------------------------------------------


def lacks(route, status=404, reply=None):
    """Has no such address."""
    reply = {"detail": "Not Found"} if reply is None else reply
    return lambda answer, path, body: (status, reply) if path == f"/v1/{route}" else answer(path, body)


CHATS_ONLY = lacks("completions")
CHAT_MODEL = {
    "message": "This is a chat model and not supported in the v1/completions endpoint. Did you mean to use "
    "v1/chat/completions?",
    "code": 404,
}
OWN_TEMPLATE = "puts chats in its own template"


def message(change):
    """Changes the message of each choice, in place."""
    return both(CHATS_ONLY, choices(lambda choice: change(choice, choice["message"])))


def holds(**fields):
    return message(lambda choice, message: message.update(fields))


def without_end(choice, message):
    """Tells nothing of the token that ended it; of the empty answer, nothing at all. Nor any ids."""
    choice.pop("token_ids")
    entries = choice["logprobs"]["content"]
    if choice["finish_reason"] == "stop":
        entries.pop()
    for entry in entries:
        entry["token"] = ""
    if not entries:
        message["content"] = choice["logprobs"] = None


def without_ids(choice, message):
    choice.pop("token_ids")


CHAT_FAULTS = {
    "completions": Fault(lambda answer, path, body: answer(path, body)),
    "chats only": Fault(CHATS_ONLY, told=OWN_TEMPLATE),
    **{
        f"chats only, by {status}": Fault(lacks("completions", status), told=OWN_TEMPLATE) for status in (405, 410, 501)
    },
    "a chat model's own words": Fault(lacks("completions", 404, {"error": CHAT_MODEL}), told=OWN_TEMPLATE),
    "chats only, under 200": Fault(lacks("completions", 200, {"error": CHAT_MODEL}), told=OWN_TEMPLATE),
    "texts only": Fault(own_text, told=OWN_TEMPLATE),
    "texts only, no chats": Fault(
        both(own_text, lacks("chat/completions")),
        r"valid string.*\(nor is there .*/v1/chat/completions, for messages\)",
    ),
    "neither": Fault(both(CHATS_ONLY, lacks("chat/completions")), "404: Not Found; it needs .*/v1/chat/completions$"),
    "refuses the chat": Fault(both(CHATS_ONLY, refuses("no credit", lambda b: True)), "answers 400: no credit$"),
    "max_tokens has another name": Fault(
        both(CHATS_ONLY, refuses("Unsupported parameter: 'max_tokens'", lambda b: "max_tokens" in b)), told=OWN_TEMPLATE
    ),
    "max_tokens has another name, few fields, one at a time": Fault(
        both(
            CHATS_ONLY,
            STRICT,
            refuses("Unsupported parameter: 'max_tokens'", lambda b: "max_tokens" in b),
            refuses("n must be 1", lambda b: b["n"] > 1),
        ),
        same=False,
        told=OWN_TEMPLATE,
    ),
    "ids in the names of tokens alone": Fault(message(without_ids), told=OWN_TEMPLATE),
    "an answer in parts": Fault(
        message(lambda _, m: m.update(content=[{"type": "text", "text": m["content"]}])), told=OWN_TEMPLATE
    ),
    "parts that are no text": Fault(holds(content=[{"type": "thinking"}]), "answers with a part of type 'thinking'"),
    "no message": Fault(both(CHATS_ONLY, choices(lambda c: c.pop("message"))), "gives a choice without a message"),
    **{
        f"has {name}": Fault(holds(**{name: value}), f"answers with {name} .*only what the model writes as an answer")
        for name, value in (
            ("reasoning_content", "Let me think"),
            ("reasoning", "Let me think"),
            ("refusal", "I can't"),
            ("tool_calls", [{"id": "a"}]),
            ("function_call", {"name": "a"}),
        )
    },
    "filtered": Fault(both(CHATS_ONLY, sets(finish_reason="content_filter")), UNSAMPLED),
}
