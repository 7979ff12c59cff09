"""The server, asked by real clients over loopback: replies, refusals, batches, limits. The model is a tiny one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
import warnings

import pytest
import tiny
import torch

from daemon_fast import Energy, SIRDecoder, TransformersProposal, metrics

for package in ("openai", "starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"needs the package {package}: pip install 'daemon-fast[serve]'")
import httpx2  # noqa: E402 - what openai comes with
import openai  # noqa: E402
import uvicorn  # noqa: E402

from daemon_fast.serving import app as app_module  # noqa: E402
from daemon_fast.serving import batcher as batcher_module  # noqa: E402
from daemon_fast.serving.app import Limits, listen, make_app  # noqa: E402
from daemon_fast.serving.batcher import Batcher, QueueFull  # noqa: E402

MODEL = "tiny"
NAMES = ["sr_1", "sr_2", "tr_4"]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}w7"
MESSAGES = [{"role": "system", "content": "w1 w2"}, {"role": "user", "content": "w3"}]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    warnings.simplefilter("ignore")


def make_decoder(batch_size=8, **settings):
    """Of a tiny model, whose candidates weigh very differently."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    settings = {"num_candidates": 6, "max_new_tokens": 12, "min_new_tokens": 0, "temperature": 0.9, **settings}
    proposal = TransformersProposal(tiny.model(), tokenizer, model_id=MODEL, **settings)
    mu = torch.tensor([3.0, -2.0, 5.0], dtype=torch.float64)
    return SIRDecoder(Energy(metrics.parse(NAMES), mu, torch.zeros(3), proposal.settings), proposal, batch_size)


@contextlib.contextmanager
def serving(decoder, one_by_one=False, **limits):
    """The address of a server in this process."""
    app, listening = make_app(decoder, one_by_one, [MODEL], Limits(**limits)), listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def decoder():
    return make_decoder()


@pytest.fixture(scope="module")
def url(decoder):
    with serving(decoder) as address:
        yield address


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def post(url, body, path="/completions", **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with httpx2.Client(timeout=60) as http:
        return http.post(f"{url}{path}", content=content, headers={"Content-Type": "application/json", **headers})


def metric(url, name):
    with httpx2.Client() as http:
        lines = http.get(url.replace("/v1", "/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


# ---- replies --------------------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_decoder_gives_in_process(client, decoder):
    for prompt in ("w1 w2 w3", [4, 9, 11], tiny.text(20, 3)):
        got = client.completions.create(model=MODEL, prompt=prompt, n=4, seed=11)
        want = decoder([prompt], num_samples=4, seed=11)
        assert [choice.text for choice in got.choices] == want.texts[0]
        assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
        told = got.daemon
        assert (told["seed"], told["num_candidates"]) == (11, 6)
        (one,) = told["prompts"]
        assert one["index"] == want.index[0].tolist()
        assert one["weights"] == want.weights[0].tolist()
        assert (one["ess"], one["log_z"]) == (float(want.ess[0]), float(want.log_z[0]))
        assert one["metrics"] == [dict(zip(NAMES, row, strict=True)) for row in want.features[0].tolist()]
        assert told["candidate_tokens"] == got.usage.completion_tokens == int(want.candidates.lengths.sum())
        assert got.usage.prompt_tokens == len(want.candidates.prefix_tokens[0])
        assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
        assert told["chosen_tokens"] == sum(map(len, want.tokens[0]))
        for choice, tokens in zip(got.choices, want.tokens[0], strict=True):
            assert choice.finish_reason == ("stop" if len(tokens) < 12 else "length")


@pytest.mark.parametrize(("seed", "drawn"), [(-1, 2**63 - 1), (-(2**63), 0), (2**63 - 1, 2**63 - 1)])
def test_a_seed_is_any_signed_integer_of_64_bits(client, decoder, seed, drawn):
    got = client.completions.create(model=MODEL, prompt="w1 w2 w3", n=2, seed=seed)
    assert got.daemon["seed"] == drawn
    assert [choice.text for choice in got.choices] == decoder(["w1 w2 w3"], num_samples=2, seed=drawn).texts[0]


def test_several_prompts_of_a_request(client, decoder):
    prompts = [tiny.text(n, n) for n in (3, 9, 5, 1)] * 3  # more than are drawn at a time
    got = client.completions.create(model=MODEL, prompt=prompts, n=2, seed=3)
    alone = SIRDecoder(decoder.energy, decoder.proposal, batch_size=1)
    want = alone(prompts, num_samples=2, seed=3)
    assert [choice.text for choice in got.choices] == [text for texts in want.texts for text in texts]
    assert [one["weights"] for one in got.daemon["prompts"]] == want.weights.tolist()
    assert [choice.index for choice in got.choices] == list(range(24))


def test_a_chat_is_its_template_continued(client, decoder):
    got = client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=5, n=2)
    ids = decoder.proposal.tokenizer("system w1 w2 user w3 w7")["input_ids"]
    want = decoder([ids], num_samples=2, seed=5)
    assert [choice.message.content for choice in got.choices] == want.texts[0]
    assert {choice.message.role for choice in got.choices} == {"assistant"}
    assert got.daemon["prompts"][0]["weights"] == want.weights[0].tolist()
    parts = [{"role": "developer", "content": [{"type": "text", "text": "w1"}, {"type": "text", "text": "w2"}]}]
    again = client.chat.completions.create(model=MODEL, messages=[*parts, MESSAGES[1]], seed=5, n=2)
    assert [choice.message.content for choice in again.choices] == want.texts[0]
    answered = [*MESSAGES, got.choices[0].message, {"role": "user", "content": "w9"}]  # as clients go on
    assert client.chat.completions.create(model=MODEL, messages=answered, seed=5).choices[0].message.content


def test_a_stream_holds_the_same(client, url):
    whole = client.completions.create(model=MODEL, prompt="w1 w2", n=3, seed=2)
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="w1 w2", n=3, seed=2, stream=True, stream_options={"include_usage": True}
        )
    )
    texts, reasons = [""] * 3, [None] * 3
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert chunks[-2].daemon == whole.daemon

    async def chat():
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as own:
            stream = await own.chat.completions.create(model=MODEL, messages=MESSAGES, seed=5, stream=True)
            return [chunk async for chunk in stream]

    got = "".join(chunk.choices[0].delta.content or "" for chunk in asyncio.run(chat()))
    assert got == client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=5).choices[0].message.content


def test_the_seed_that_the_server_drew_gives_the_same_again(client):
    first, second = (client.completions.create(model=MODEL, prompt="w5 w6") for _ in range(2))
    assert first.daemon["seed"] != second.daemon["seed"]
    again = client.completions.create(model=MODEL, prompt="w5 w6", seed=first.daemon["seed"])
    assert (again.choices, again.daemon) == (first.choices, first.daemon)


@pytest.mark.parametrize("max_tokens", [1, 5, 11, 12, 13, 4096])
def test_max_tokens_cuts_the_chosen_text(client, decoder, max_tokens):
    got = client.completions.create(model=MODEL, prompt="w1 w2 w3", n=6, seed=4, max_tokens=max_tokens)
    want = decoder(["w1 w2 w3"], num_samples=6, seed=4)
    for choice, text, tokens in zip(got.choices, want.texts[0], want.tokens[0], strict=True):
        assert choice.text.split() == text.split()[:max_tokens]  # a word is a token
        assert choice.finish_reason == ("stop" if len(tokens) <= max_tokens and len(tokens) < 12 else "length")
    assert got.daemon["prompts"][0]["weights"] == want.weights[0].tolist()
    assert got.usage.completion_tokens == int(want.candidates.lengths.sum())
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=max_tokens)
    assert len(chat.choices[0].message.content.split()) <= max_tokens


def test_a_text_ends_before_the_first_stop(client, decoder):
    want = decoder(["w1 w2 w3"], num_samples=6, seed=4).texts[0]
    stops = [want[0].split()[3], want[1].split()[5] + " ", "w1 w2 w3 w4"]
    got = client.completions.create(model=MODEL, prompt="w1 w2 w3", n=6, seed=4, stop=stops)
    cut = 0
    for choice, text in zip(got.choices, want, strict=True):
        parts = [text.split(stop)[0] for stop in stops]
        assert choice.text == min(parts, key=len)
        if choice.text != text:
            assert choice.finish_reason == "stop"
            cut += 1
    assert cut >= 2
    one = client.completions.create(model=MODEL, prompt="w1 w2 w3", n=6, seed=4, stop=stops[0])
    assert [choice.text for choice in one.choices] == [text.split(stops[0])[0] for text in want]


def test_models_and_health(client, url):
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve(MODEL).id == MODEL
    assert (model.daemon["metrics"], model.daemon["num_candidates"]) == (NAMES, 6)
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-4' does not exist"):
        client.models.retrieve("gpt-4")
    with httpx2.Client() as http:
        assert http.get(url.replace("/v1", "/health")).json() == {"status": "ok"}


def test_counts(client, url):
    before = [metric(url, name) for name in ("daemon_candidate_tokens_total", "daemon_chosen_tokens_total")]
    ok = 'daemon_requests_total{path="/v1/completions",status="200"}'
    bad = 'daemon_requests_total{path="/v1/completions",status="400"}'
    requests = metric(url, ok), metric(url, bad)
    got = client.completions.create(model=MODEL, prompt="w1 w2", n=2)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="")
    after = [metric(url, name) for name in ("daemon_candidate_tokens_total", "daemon_chosen_tokens_total")]
    assert after[0] - before[0] == got.usage.completion_tokens
    assert after[1] - before[1] == got.daemon["chosen_tokens"]
    assert (metric(url, ok), metric(url, bad)) == (requests[0] + 1, requests[1] + 1)


def test_another_client(url, decoder, monkeypatch):
    """Hugging Face's, which shares no code with openai's."""
    from huggingface_hub import AsyncInferenceClient, InferenceClient

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it is about the hub, and loopback isn't it
    own = InferenceClient(base_url=url, api_key="none")
    got = own.chat_completion(MESSAGES, model=MODEL, seed=5, max_tokens=9)
    ids = decoder.proposal.tokenizer("system w1 w2 user w3 w7")["input_ids"]
    want = decoder([ids], seed=5).texts[0][0]
    assert got.choices[0].message.content.split() == want.split()[:9]
    streamed = own.chat_completion(MESSAGES, model=MODEL, seed=5, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices) == want

    async def several():
        async with AsyncInferenceClient(base_url=url, api_key="none") as many:
            return await asyncio.gather(*(many.chat_completion(MESSAGES, model=MODEL, seed=5) for _ in range(5)))

    assert {reply.choices[0].message.content for reply in asyncio.run(several())} == {want}


def test_replies_are_not_held_back_for_a_fuller_packet():
    """Asyncio sends at once only where a socket names its protocol: replies of large bodies else took 40 ms more."""
    with contextlib.closing(listen("127.0.0.1", 0)) as listening:
        assert listening.proto == socket.IPPROTO_TCP


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", 0.7, "temperature = 0.7 is not what the artefact was fitted for: leave it out, or give 0.9"),
        ("top_p", 0.5, "leave it out, or give 1.0"),
        ("top_k", 40, "leave it out, or give 0"),
        ("min_tokens", 3, "leave it out, or give 0"),
        ("logit_bias", {"5": 3}, "another distribution than mu was fitted for"),
        ("frequency_penalty", 0.1, "another distribution"),
        ("best_of", 4, "the artefact sets how many candidates are drawn"),
        ("logprobs", 0, "log-probabilities are not returned"),
        ("echo", True, "the prompt is not repeated"),
        ("suffix", "w1", "texts are continued"),
        ("tools", [{"type": "function"}], "no tools are called"),
        ("response_format", {"type": "json_object"}, "only text is drawn"),
        ("beam_width", 4, "unknown field: beam_width"),
        ("n", 0, "greater than or equal to 1"),
        ("n", 129, "less than or equal to 128"),
        ("n", "2", "valid integer"),
        ("seed", -(2**63) - 1, "greater than or equal to -9223372036854775808"),
        ("max_tokens", 0, "greater than or equal to 1"),
        ("stop", ["w1", ""], "none empty"),
        ("stop", 5, "a string or a list of strings"),
        ("stop", ["x"] * 17, "at most 16 are taken"),
        ("stream", "yes", "valid boolean"),
        ("stream_options", {"include_usage": True}, "stream_options is for stream = true"),
        ("prompt", "", "is empty"),
        ("prompt", [], "there are no prefixes"),
        ("prompt", None, "must be a string"),
        ("prompt", {"role": "user"}, "a chat is a list of messages"),
        ("prompt", [{"role": "user", "content": "w1"}], "send it as messages to /v1/chat/completions"),
        ("prompt", [1, 2.5], "a token id is an integer"),
        ("prompt", [True], "a token id is an integer"),
        ("prompt", [tiny.VOCABULARY], "outside the vocabulary of 62"),
        ("prompt", "w1 " * 60, "exceeds the model's context of 64"),
        ("prompt", ["w1"] * 300, "at most 256 may wait"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(url, field, value, said):
    reply = post(url, {"model": MODEL, "prompt": "w1", **{field: value}})
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert said in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least 1 item"),
        ("w1", "valid array"),
        ([{"role": "user"}], "messages.0.content: Field required"),
        ([{"role": "tool", "content": "w1"}], "messages.0.role is 'tool'"),
        ([{"role": "user", "content": 5}], "message 0 has a content of type int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a part of type 'image_url': only text can be"),
        ([{"role": "user", "content": "w1", "tool_calls": []}], "messages.0.tool_calls is not supported"),
    ],
)
def test_messages_that_can_not_be_read(url, messages, said):
    reply = post(url, {"model": MODEL, "messages": messages}, "/chat/completions")
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_a_template_that_refuses(monkeypatch, url, decoder):
    monkeypatch.setattr(decoder.proposal.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    reply = post(url, {"model": MODEL, "messages": MESSAGES}, "/chat/completions")
    assert "roles must alternate" in reply.json()["error"]["message"]
    monkeypatch.setattr(decoder.proposal.tokenizer, "chat_template", None)
    reply = post(url, {"model": MODEL, "messages": MESSAGES}, "/chat/completions")
    assert (reply.status_code, "no chat template" in reply.json()["error"]["message"]) == (400, True)


def test_what_happens_anyway_may_be_asked_for(client):
    neutral = {
        "temperature": 0.9, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1,
        "echo": False, "suffix": None, "logprobs": None, "user": "someone", "stop": None, "stream": False,
    }  # fmt: skip
    extra = {"top_k": -1, "min_p": 0, "min_tokens": 0, "repetition_penalty": 1.0, "ignore_eos": False}
    plain = client.completions.create(model=MODEL, prompt="w1", seed=1)
    assert (
        client.completions.create(model=MODEL, prompt="w1", seed=1, **neutral, extra_body=extra).choices
        == plain.choices
    )


def test_a_model_or_a_path_that_is_not_there(client, url):
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-4' does not exist; there is 'tiny'") as caught:
        client.completions.create(model="gpt-4", prompt="w1")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    reply = post(url, {}, "/embeddings")
    assert reply.status_code == 404
    assert reply.json()["error"]["message"].startswith("there is no /v1/embeddings; there are /v1/completions, ")
    with httpx2.Client() as http:
        reply = http.get(f"{url}/completions")
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert reply.json()["error"]["message"].startswith("GET is not for /v1/completions")


def test_a_key(decoder):
    with serving(decoder, api_key="sk-secret-ü") as address:
        wrong = {"Authorization": "Bearer wrong"}, {"Authorization": "sk-secret-ü".encode()}, {"Host": "x/health"}
        for header in ({}, *wrong):
            reply = post(address, {"model": MODEL, "prompt": "w1"}, **header)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        reply = post(address, {"model": MODEL, "prompt": "w1"}, Authorization="Bearer sk-secret-ü".encode())
        assert reply.status_code == 200
        with httpx2.Client() as http:
            assert http.get(address.replace("/v1", "/health")).status_code == 200
            assert http.get(f"{address}/models").status_code == 401


# ---- batches, queues, clients that leave ----------------------------------------------------------------------------


class Gate:
    """A proposal that draws only when it is let, and notes what."""

    def __init__(self, proposal):
        self._proposal, self.open, self.entered, self.drawn = proposal, threading.Event(), threading.Event(), []

    def __getattr__(self, name):
        return getattr(self._proposal, name)

    def propose(self, prefixes, seed):
        self.entered.set()
        assert self.open.wait(20)
        self.drawn.append(list(prefixes))
        return self._proposal.propose(prefixes, seed)


@pytest.fixture
def gate(decoder):
    gate = Gate(decoder.proposal)
    yield gate
    gate.open.set()


def gated(decoder, gate, batch_size=8):
    return SIRDecoder(decoder.energy, gate, batch_size)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


def test_requests_that_wait_together_are_drawn_together_and_get_what_they_get_alone(decoder, gate):
    requests = [(tiny.text(1 + i % 7, i), 100 + i, 1 + i % 3) for i in range(21)]

    async def all_at_once(address):
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
            tasks = [
                asyncio.create_task(client.completions.create(model=MODEL, prompt=prompt, seed=seed, n=n))
                for prompt, seed, n in requests
            ]
            await asyncio.to_thread(until, lambda: metric(address, "daemon_waiting_prompts") >= 13)
            gate.open.set()
            return await asyncio.gather(*tasks)

    with serving(gated(decoder, gate)) as address:
        replies = asyncio.run(all_at_once(address))
    assert sum(map(len, gate.drawn)) == 21
    assert len(gate.drawn) <= 4  # the first took those who had come by then, of 8 at most
    for (prompt, seed, n), reply in zip(requests, replies, strict=True):
        want = decoder([prompt], num_samples=n, seed=seed)
        assert [choice.text for choice in reply.choices] == want.texts[0]
        assert reply.daemon["prompts"][0]["index"] == want.index[0].tolist()


def test_who_is_alone_waits_for_nobody_and_others_are_waited_for(decoder, gate, monkeypatch):
    monkeypatch.setattr(batcher_module, "WINDOW", 60.0)
    batcher = Batcher(gated(decoder, gate, 2), False, 5, lambda _: None)
    first = batcher.submit(["w1"], 1, 1)
    assert gate.entered.wait(20)
    second = batcher.submit(["w2"], 1, 2)
    gate.open.set()
    first.result(20)
    third = batcher.submit(["w3"], 1, 3)  # as a client sends its next request
    assert second.result(20).texts == decoder(["w2"], seed=2).texts
    third.result(20)
    assert gate.drawn == [["w1"], ["w2", "w3"]]
    batcher.close()


def test_past_the_queue_it_says_when_to_come_back(decoder, gate):
    with serving(gated(decoder, gate, 1), max_waiting=2) as address:
        replies, threads = [], []

        def ask():
            replies.append(post(address, {"model": MODEL, "prompt": "w1"}).status_code)

        for waiting in (0, 1, 2):
            threads.append(threading.Thread(target=ask))
            threads[-1].start()
            gate.entered.wait(20)
            until(lambda expected=waiting: metric(address, "daemon_waiting_prompts") == expected)
        refused = post(address, {"model": MODEL, "prompt": "w1"})
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (refused.json()["error"]["type"], refused.json()["error"]["code"]) == ("rate_limit_error", "queue_full")
        gate.open.set()
        for thread in threads:
            thread.join(20)
    assert replies == [200, 200, 200]


def test_what_nobody_waits_for_any_more_is_not_drawn(decoder, gate):
    with serving(gated(decoder, gate, 1), max_waiting=4) as address:
        first = threading.Thread(target=post, args=(address, {"model": MODEL, "prompt": "w1"}))
        first.start()
        gate.entered.wait(20)

        async def leave():
            async with httpx2.AsyncClient() as http:
                body = {"model": MODEL, "prompt": ["w2", "w3"]}
                task = asyncio.create_task(http.post(f"{address}/completions", json=body))
                await asyncio.to_thread(until, lambda: metric(address, "daemon_waiting_prompts") == 2)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

        asyncio.run(leave())
        until(lambda: metric(address, "daemon_waiting_prompts") == 0)  # its places are free at once
        gate.open.set()
        first.join(20)
        assert post(address, {"model": MODEL, "prompt": "w4"}).status_code == 200
        until(lambda: metric(address, 'daemon_requests_total{path="/v1/completions",status="499"}') == 1)
    assert gate.drawn == [["w1"], ["w4"]]


def test_a_reply_has_its_time(decoder, gate):
    with serving(gated(decoder, gate, 1), timeout=0.3) as address:
        reply = post(address, {"model": MODEL, "prompt": "w1"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        late = post(address, {"model": MODEL, "prompt": "w2"})
        assert late.status_code == 504
        gate.open.set()
        until(lambda: gate.drawn == [["w1"]])
        assert post(address, {"model": MODEL, "prompt": "w3"}).status_code == 200
    assert ["w2"] not in gate.drawn


def test_one_that_fails_does_not_fail_the_others(decoder):
    class Fails(Gate):
        def propose(self, prefixes, seed):
            if "w13" in prefixes:
                raise RuntimeError("w13 is a secret")
            return super().propose(prefixes, seed)

    failing = Fails(decoder.proposal)
    failing.open.set()
    batcher = Batcher(gated(decoder, failing), False, 100, lambda _: None)
    futures = [batcher.submit([f"w{i}"], 1, i) for i in range(10, 16)]
    for i, future in enumerate(futures, 10):
        if i == 13:
            with pytest.raises(RuntimeError):
                future.result(20)
        else:
            assert future.result(20).texts == decoder([f"w{i}"], seed=i).texts
    batcher.close()


def test_a_queue_that_is_closed_is_drawn_to_its_end(decoder, gate):
    batcher = Batcher(gated(decoder, gate, 2), False, 5, lambda _: None)
    futures = [batcher.submit(["w1"], 1, i) for i in range(5)]
    gate.entered.wait(20)
    assert batcher.waiting in (3, 4)
    with pytest.raises(QueueFull):
        batcher.submit(["w1"] * 3, 1, 0)
    batcher.close()
    gate.open.set()
    assert [future.result(20).texts for future in futures] == [decoder(["w1"], seed=i).texts for i in range(5)]


def test_the_log_has_no_texts(decoder, caplog, monkeypatch):
    monkeypatch.setattr(app_module.log, "propagate", True)

    class Fails(Gate):
        def propose(self, prefixes, seed):
            raise RuntimeError(f"can't draw {prefixes}")

    with (
        caplog.at_level(logging.INFO, "daemon_fast.serving"),
        serving(gated(decoder, Fails(decoder.proposal))) as address,
    ):
        reply = post(address, {"model": MODEL, "prompt": "w1 w2"})
        post(address, {"model": MODEL, "prompt": {"w1": "w2"}})
    assert reply.status_code == 500
    assert "w1" not in reply.text
    lines = [app_module._JSONLines().format(record) for record in caplog.records]
    entries = [json.loads(line) for line in lines]
    assert [entry["status"] for entry in entries] == [500, 400]
    assert entries[0]["error"] == "RuntimeError"
    assert "propose" in entries[0]["at"][0]
    assert reply.headers["x-request-id"] == entries[0]["id"]
    assert not any("w1" in line or "w2" in line for line in lines)
