"""Candidates from a completions server: the protocol's variants, faults, bounds, secrets. The server is a fake one."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import contract
import fault_proxy
import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from fault_proxy import CHAT_FAULTS, CHATS_ONLY, FAULTS, KEY, FaultProxy, TinyServer

from daemon_fast import Energy, ProposalSettings, TransformersProposal, metrics
from daemon_fast.cli import main
from daemon_fast.data.collect import collect
from daemon_fast.errors import EngineError, InvalidInput, MissingPackage

pytest.importorskip("pydantic_core", reason="needs the package pydantic: pip install 'daemon-fast[server]'")
from daemon_fast.prompts import fingerprint
from daemon_fast.proposals import openai as module
from daemon_fast.proposals.base import vocabulary_fingerprint
from daemon_fast.proposals.completions import Drawn, are_copies
from daemon_fast.proposals.openai import ServerProposal

MANY = [[i, i + 1, i + 2] for i in range(2, 42)]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(module, "MAX_WAIT", 0.05)


@pytest.fixture(scope="module")
def tiny_server():
    return TinyServer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def serve(tiny_server):
    """Starts servers over the tiny model, and stops them."""
    started = []

    def start(**faults):
        started.append(FaultProxy(tiny_server, **faults).__enter__())
        return started[-1]

    yield start
    for proxy in started:
        proxy.__exit__()


@pytest.fixture
def propose(folder):
    def make(server, **options):
        return ServerProposal(server.url, folder, **{**contract.SETTINGS, **options})

    return make


def teacher(server):
    def logits(prefix, continuation):
        with torch.inference_mode():
            return server.model(torch.tensor([prefix + continuation])).logits[0, len(prefix) - 1 : -1]

    return logits


def same(a, b):
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths)


def test_it_meets_the_contract(serve, propose, tiny_server):
    server = serve()
    p = propose(server)
    contract.shapes_and_lengths_are_right(p)
    contract.log_probs_are_the_models(p, teacher(tiny_server))
    contract.a_seed_gives_the_same_candidates_again(p)
    contract.a_seed_each_gives_what_it_gives_alone(p)
    contract.score_gives_what_drawing_gave(p)
    contract.bad_prefixes_are_named(p, tiny.CONTEXT, tiny.VOCABULARY)
    many = propose(server, num_candidates=5000, max_new_tokens=1)
    contract.tokens_follow_the_distribution(many, teacher(tiny_server))
    # The reply may lack some: the rest is drawn with another seed, and is no copy.
    contract.tokens_follow_the_distribution(
        propose(serve(fewer=1700), num_candidates=5000, max_new_tokens=1), teacher(tiny_server)
    )
    many = propose(server, num_candidates=500)
    reference = TransformersProposal(
        tiny_server.model, tiny_server.tokenizer, **{**contract.SETTINGS, "num_candidates": 500}
    )
    contract.expected_metrics_agree(many, reference)


@pytest.mark.parametrize("always", [(), ("no ids",), ("chat form",)], ids=["vLLM", "text", "llama.cpp"])
@pytest.mark.parametrize("count_eos", [False, True])
def test_end_of_text_ends_a_candidate(serve, propose, always, count_eos):
    p = propose(serve(always=always), num_candidates=200, count_eos=count_eos, min_new_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c = p.propose([[5, 9]], seed=0)
    known = ~c.token_log_p.isnan().any(1)
    assert known.all() or always == ("no ids",)
    assert known.sum() > 100
    ended = 0
    for row, length in zip(c.tokens[known].tolist(), c.lengths[known].tolist(), strict=True):
        if 0 in row[:length] or length < 12:
            ended += 1
            assert row.index(0) == (length - 1 if count_eos else length)
    assert 0 < ended < known.sum()
    drawn = c.lengths if count_eos else c.lengths + (c.lengths < 12)
    assert torch.equal((c.token_log_p != 0).sum(1)[known], drawn[known])  # its log-probability is kept either way
    assert all("<eos>" not in text for text in c.texts)


def test_what_is_not_known_under_the_proposal_is_nan(serve, propose):
    server = serve()
    known = propose(server, temperature=1.0).propose([[5]], 0)
    assert torch.equal(known.token_log_q, known.token_log_p)
    for setting in ({"temperature": 0.8}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"min_new_tokens": 2}):
        c = propose(server, **{"temperature": 1.0, **setting}).propose([[5]], 0)
        assert not c.log_p.isnan().any()
        with pytest.raises(InvalidInput, match="gives no log-probabilities under the proposal"):
            _ = c.log_q


def test_settings_reach_the_server_neutral_ones_too(serve, propose):
    server = serve()
    propose(server, top_k=7, min_p=0.1, min_new_tokens=2, top_p=0.9).propose([[5]], 0)
    propose(server).propose([[5]], 0)
    for body, settings in zip(
        server.bodies,
        [
            {"top_k": 7, "min_p": 0.1, "min_tokens": 2, "top_p": 0.9},
            {"top_k": -1, "min_p": 0.0, "top_p": 1.0, "repetition_penalty": 1.0},
        ],
        strict=True,
    ):
        assert body.items() >= {**settings, "n": 6, "max_tokens": 12, "temperature": 0.8, "prompt": [5]}.items()


def test_faults_that_pass_change_nothing(serve, propose):
    calm = propose(serve()).propose(MANY, seed=1)
    for seed in (0, 1):
        server = serve(rate=0.4, seed=seed)
        c = propose(server, max_retries=20).propose(MANY, seed=1)
        assert same(c, calm)
        torch.testing.assert_close(c.token_log_p, calm.token_log_p)
        assert set(server.met) == {None, *fault_proxy.PASSING}  # each fault was met
        assert c.prefix_tokens == MANY


def test_no_prefix_is_lost_and_none_answered_twice(serve, propose):
    server = serve(rate=0.3, fewer=4)
    c = propose(server, max_retries=20).propose(MANY, seed=1)
    assert c.shape == (40, 6)
    answered = Counter()
    for key in server.requests:
        body = json.loads(key)
        answered[tuple(body["prompt"]), body["n"], body["seed"]] += 1
    # Of each prefix 6 are asked for, 4 come, and 2 more are asked for, by another seed.
    assert sorted((prompt, n) for prompt, n, _ in answered) == sorted((tuple(p), n) for p in MANY for n in (6, 2))
    assert len({seed for *_, seed in answered}) == 80
    calm = propose(serve(fewer=4)).propose(MANY, seed=1)
    assert same(c, calm)


def test_more_choices_than_asked_for_are_left(tiny_server, folder):
    def generous(path, body):
        return tiny_server(path, body if body is None else {**body, "n": body["n"] + 3})

    with FaultProxy(generous) as server:
        assert ServerProposal(server.url, folder, **contract.SETTINGS).propose(MANY, 0).shape == (40, 6)


def test_equal_prefixes_get_candidates_of_their_own(serve, propose):
    c = propose(serve()).propose([[5, 9], [5, 9]], 0)
    assert not torch.equal(c.tokens[:6], c.tokens[6:])


def test_requests_in_flight_are_bounded(serve, propose):
    for bound in (1, 3):
        server = serve(rate=1.0, faults=("delay",))
        propose(server, max_in_flight=bound).propose(MANY[:12], 0)
        assert server.most_in_flight == bound


def test_what_a_server_lacks_is_told(serve, propose):
    p = propose(serve(always=("no ids",)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        c = p.propose(contract.PREFIXES, 0)
        p.propose(contract.PREFIXES, 1)
    assert sum("no token ids" in str(w.message) for w in told) == 1
    reference = propose(serve()).propose(contract.PREFIXES, 0)
    # <unk> is no text: where it was drawn, tokens and log-probabilities can't be brought together.
    lost = torch.tensor([1 in row[:n] for row, n in zip(reference.tokens.tolist(), reference.lengths, strict=True)])
    assert torch.equal(c.token_log_p.isnan().any(1), lost)
    assert c.tokens.tolist()[0] == reference.tokens.tolist()[0] or lost[0]

    p = propose(serve(always=("no log-probs",)))
    with pytest.raises(EngineError, match="gives no log-probabilities: with log_probs = False"):
        p.propose([[5]], 0)
    with pytest.warns(UserWarning, match="Only no echo is supported"):
        assert p.score([[5]], [[6, 7]]).token_log_p.isnan().all()
    c = propose(serve(always=("no log-probs",)), log_probs=False).propose([[5]], 0)
    assert same(c, propose(serve()).propose([[5]], 0))
    assert metrics.features(metrics.parse(["sr_2"]), c).isfinite().all()
    with pytest.raises(InvalidInput, match="ent needs log-probabilities"):
        metrics.features(metrics.parse(["ent"]), c)


def test_a_server_that_refuses_unknown_fields(serve, propose):
    server = serve(always=("strict",))
    p = propose(server)
    with pytest.warns(UserWarning, match="only the fields that OpenAI defines"):
        c = p.propose([[5]], 0)
    assert same(c, propose(serve()).propose([[5]], 0))
    asked = len(server.bodies)
    p.propose([[5]], 0)
    assert len(server.bodies) == asked + 1  # it was remembered
    with pytest.raises(EngineError, match=r"400: Unrecognized request argument supplied: \w+$"):
        propose(server, top_k=5).propose([[5]], 0)


def test_a_minimum_that_the_server_ignores_is_an_error(tiny_server, folder):
    def ignorant(path, body):
        return tiny_server(path, body and {**body, "min_tokens": 0})

    with FaultProxy(ignorant) as server, pytest.raises(EngineError, match="it needs min_new_tokens = 0"):
        ServerProposal(server.url, folder, num_candidates=100, max_new_tokens=12, min_new_tokens=8).propose([[5]], 0)


@pytest.fixture(scope="module")
def good_candidates(tiny_server, folder):
    """Those of the server that does what it is asked."""
    kept = {}

    def draw(options):
        key = str(options)
        if key not in kept:
            with FaultProxy(tiny_server) as server:
                kept[key] = ServerProposal(server.url, folder, **options).propose(contract.PREFIXES, 0)
        return kept[key]

    return draw


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_server_does_is_mended_or_met_by_an_error(name, tiny_server, folder, good_candidates):
    fault = FAULTS[name]
    options = {**contract.SETTINGS, "max_retries": 2, **fault.options}

    def draw(answer):
        with FaultProxy(answer) as server, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            p = ServerProposal(server.url, folder, **options)
            first, again = p.propose(contract.PREFIXES, 0), p.propose(contract.PREFIXES, 0)
        assert same(first, again) or "takes no seed" in str(told[0].message)
        return first, [str(w.message) for w in told]

    def answer(path, body):
        return fault.spoil(tiny_server, path, body)

    if fault.error:
        with pytest.raises(EngineError, match=fault.error):
            draw(answer)
        return
    c, told = draw(answer)
    assert any(fault.told in text for text in told) if fault.told else not told
    if fault.same:
        good = good_candidates(options)
        assert same(c, good)
        assert torch.equal(c.token_log_p, good.token_log_p)
    else:
        assert c.shape == (3, 6)
        assert len({tuple(row) for row in c.tokens.tolist()}) >= 15
        for r, n in enumerate(c.lengths.tolist() if options.get("log_probs", True) else []):
            drawn = c.tokens[r, :n].tolist()
            logits = teacher(tiny_server)(contract.PREFIXES[r // 6], drawn).double()
            torch.testing.assert_close(
                c.token_log_p[r, :n].double(), logits.log_softmax(-1)[range(n), drawn], atol=1e-3, rtol=0
            )


def test_tokens_that_a_server_leaves_out(tiny_server, folder):
    """llama.cpp gives a token with part of a character's bytes and the next as one."""

    def merging(path, body):
        status, reply = tiny_server(path, body)
        for choice in reply.get("choices", []):
            entries = zip(choice.pop("token_ids"), choice["logprobs"]["token_logprobs"], strict=True)
            shown = [{"id": i, "token": tiny_server.tokenizer.decode([i]), "logprob": p} for i, p in entries]
            if choice["index"] in (0, 2):
                shown[:2] = [{**shown[1], "token": shown[0]["token"] + shown[1]["token"]}]
            choice["logprobs"] = {"content": shown}
        return status, reply

    prefixes, options = [[5, 9, 30], [3, 4, 5, 6]], {**contract.SETTINGS, "min_new_tokens": 12}
    with FaultProxy(tiny_server) as server:
        good = ServerProposal(server.url, folder, **options).propose(prefixes, 0)
    with FaultProxy(merging) as server, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        c = ServerProposal(server.url, folder, **options).propose(prefixes, 0)
    assert [str(w.message).split("/v1 ")[1].split(":")[0] for w in told] == [
        "gives no token ids of candidates with characters split between tokens",
        "lacks log-probabilities of some candidates' tokens",
    ]
    lost = torch.tensor([r % 6 in (0, 2) for r in range(12)])
    assert torch.equal(c.token_log_p.isnan().any(1), lost)
    assert torch.equal(c.tokens[~lost], good.tokens[~lost])
    assert c.texts == good.texts


def test_models_are_checked(serve, propose, folder):
    server = serve()
    assert propose(server).served_model == "tiny"
    assert propose(server).settings.model_id == folder
    with pytest.warns(UserWarning, match=r"does not list 'other' among its models \('tiny'\)"):
        other = propose(server, served_model="other")
    with pytest.raises(EngineError, match="model `other` does not exist"):
        other.propose([[5]], 0)
    with FaultProxy(lambda *_: (200, {"data": [{"id": "a"}, {"id": "b"}]})) as two:
        with pytest.raises(EngineError, match="serves 'a', 'b': choose one"):
            propose(two)
        assert propose(two, served_model="b").served_model == "b"


def test_an_alias_is_asked_for(tiny_server, folder):
    def answer(path, body):
        if body is None:
            return 200, {"data": [{"id": "tiny:latest", "max_model_len": 24}]}
        assert body["model"] == "tiny"
        return tiny_server(path, body)

    with FaultProxy(answer) as server:
        with pytest.warns(UserWarning, match="does not list 'tiny'"):
            p = ServerProposal(server.url, folder, served_model="tiny", **contract.SETTINGS)
        assert p.propose([[5]], 0).shape == (1, contract.SETTINGS["num_candidates"])
        with pytest.raises(InvalidInput, match="context of 24"):  # what the only model's entry says, holds of it
            p.propose([[5] * 13], 0)


@pytest.fixture
def slept(monkeypatch):
    """Seconds that were waited, which take none."""
    seconds = []
    monkeypatch.setattr(module.stop.Stop, "sleep", lambda self, s: seconds.append(s))
    return seconds


@pytest.mark.parametrize("as_date", [False, True])
@pytest.mark.parametrize("wait", [3, 90, 590])
def test_a_server_says_when_to_ask_again(tiny_server, folder, slept, wait, as_date):
    busy = [True]

    def answer(path, body):
        if body is not None and busy.pop() if busy else False:
            return (
                429,
                {"error": {"message": "slow down"}},
                {"Retry_After": formatdate(time.time() + wait, usegmt=True) if as_date else wait},
            )
        return tiny_server(path, body)

    with FaultProxy(answer) as server:
        ServerProposal(server.url, folder, **contract.SETTINGS).propose([[5]], 0)
    assert slept == [pytest.approx(wait, abs=2 if as_date else 0)]


@pytest.mark.parametrize(
    "header",
    ["86400", "601", "inf", formatdate(time.time() + 7 * 86400, usegmt=True)],
    ids=["day", "over", "inf", "date"],
)
def test_a_wait_that_is_too_long_is_told(tiny_server, folder, slept, header):
    def answer(path, body):
        return (
            tiny_server(path, body) if body is None else (503, {"error": {"message": "down"}}, {"Retry_After": header})
        )

    with FaultProxy(answer) as server:
        p = ServerProposal(server.url, folder, **contract.SETTINGS)
        with pytest.raises(EngineError, match=r"503: down; it wants to be asked again in .* seconds, and 600 at most"):
            p.propose([[5]], 0)
    assert slept == []


@pytest.mark.parametrize("header", ["", "soon", "0", "-5", "nan", formatdate(0, usegmt=True), "Wed, 99 Oct 2020"])
def test_what_says_no_time_to_come_leaves_the_waits_that_grow(tiny_server, folder, slept, header):
    def answer(path, body):
        return (
            tiny_server(path, body) if body is None else (503, {"error": {"message": "down"}}, {"Retry_After": header})
        )

    with FaultProxy(answer) as server:
        p = ServerProposal(server.url, folder, max_retries=2, **contract.SETTINGS)
        with pytest.raises(EngineError, match="in 3 attempts: 503: down"):
            p.propose([[5]], 0)
    assert len(slept) == 2
    assert max(slept) <= module.MAX_WAIT


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ({"object": "error", "message": "model overloaded", "code": 503}, "in 2 attempts: model overloaded"),
        (
            {"object": "error", "message": "too hot", "type": "BadRequestError", "code": 400},
            "answers an error: too hot",
        ),
        ({"object": "error", "message": f"key {KEY} is bad", "code": 401}, r"answers 401: key \*\*\* is bad"),
        ({"message": "still loading"}, "in 2 attempts: the reply has no choices, but says: still loading"),
        ({"detail": "still loading"}, "in 2 attempts: the reply has no choices, but says: still loading"),
    ],
)
def test_an_error_under_status_200_keeps_its_message(tiny_server, folder, slept, reply, said):
    with FaultProxy(lambda path, body: tiny_server(path, body) if body is None else (200, reply)) as server:
        p = ServerProposal(server.url, folder, max_retries=1, **contract.SETTINGS)
        with pytest.raises(EngineError, match=said):
            p.propose([[5]], 0)
    with FaultProxy(lambda path, body: (200, reply)) as server, pytest.raises(EngineError, match="does not tell which"):
        ServerProposal(server.url, folder, **contract.SETTINGS)


@pytest.mark.parametrize(
    ("prefixes", "continuations", "said"),
    [
        ([], [], "there are 0 prefixes and 0 continuations"),
        ([[5]], [], "there are 1 prefixes and 0 continuations"),
        ([[5]], [[6], [7]], "there are 1 prefixes and 2 continuations"),
        ([[]], [[6]], "prefix 0 is empty: it has no log-probability"),
        ([[5], [6]], [[6], []], "continuation 1 is empty: it has no log-probability"),
        ([[5]], [[62]], "continuation 0 has token 62, outside the vocabulary of 62"),
        ([[-1]], [[6]], "prefix 0 has token -1, outside the vocabulary of 62"),
        ([[5]], [[6.5]], "continuation 0 has 6.5 at position 0: a token id is an integer"),
    ],
)
def test_what_can_not_be_scored_is_named(serve, propose, prefixes, continuations, said):
    with pytest.raises(InvalidInput, match=said):
        propose(serve()).score(prefixes, continuations)


@pytest.mark.parametrize(
    ("log_p", "outcome"), [(0.5, "gives 0.5 as a log-probability"), (None, "lack log-probabilities")]
)
def test_scores_that_are_none_are_told(tiny_server, folder, log_p, outcome):
    def answer(path, body):
        status, reply = tiny_server(path, body)
        if body is not None and body.get("echo"):
            reply["choices"][0]["logprobs"]["token_logprobs"][-1] = log_p
        return status, reply

    with FaultProxy(answer) as server:
        p = ServerProposal(server.url, folder, **contract.SETTINGS)
        if log_p is not None:
            with pytest.raises(EngineError, match=outcome):
                p.score([[5], [6]], [[6, 7], [8]])
        else:
            with pytest.warns(UserWarning, match=outcome):
                scored = p.score([[5], [6]], [[6, 7], [8]])
            assert scored.token_log_p[0].isnan().tolist() == [False, True]


def test_seeds_of_numpy_draw_the_same(serve, propose):
    p = propose(serve())
    assert same(p.propose([[5]], np.int64(2**62)), p.propose([[5]], 2**62))
    with pytest.raises(InvalidInput, match=r"seed = 1\.0 must be an integer"):
        p.propose([[5]], 1.0)


def test_another_vocabulary_is_an_error(tiny_server, folder):
    def other(path, body):
        status, reply = tiny_server(path, body)
        for choice in reply.get("choices", []):
            choice["text"] = choice["text"].replace("w", "v")
        return status, reply

    with FaultProxy(other) as server, pytest.raises(EngineError, match=r"is not the model that the server serves$"):
        ServerProposal(server.url, folder, **contract.SETTINGS).propose(contract.PREFIXES, 0)


def test_permanent_errors_come_at_once(serve, propose):
    server = serve()
    p = propose(server)
    p.served_model = "gone"
    with pytest.raises(EngineError, match=r"answers 404: The model `gone` does not exist\.$"):
        p.propose([[5]], 0)
    assert len(server.bodies) == 1


def test_retries_end(serve, propose):
    server = serve(rate=1.0, faults=("503",))
    with pytest.raises(EngineError, match="gave no answer in 3 attempts: 503: engine is busy"):
        propose(server, max_retries=2).propose([[5]], 0)
    assert len(server.bodies) == 3
    url = server.url
    server._server.server_close()
    with pytest.raises(EngineError, match=f"{url} gave no answer in 2 attempts"):
        propose(server, max_retries=1)


def test_a_reply_that_takes_too_long_is_asked_for_again(serve, propose):
    server = serve(rate=1.0, faults=("delay",), delay=1.0)
    with pytest.raises(EngineError, match="in 2 attempts"):
        propose(server, timeout=0.2, max_retries=1).propose([[5]], 0)
    assert len(server.bodies) == 2


def test_a_connection_that_was_closed_while_idle_costs_no_attempt(tiny_server, folder):
    """Servers keep a connection for some seconds, and close it without a word."""
    asked = []

    def answer(connection):
        with connection, connection.makefile("rb") as file:
            method, path, _ = file.readline().decode().split()
            length = 0
            while (line := file.readline().strip()) != b"":
                name, _, value = line.partition(b": ")
                length = int(value) if name.lower() == b"content-length" else length
            asked.append(method)
            body = json.loads(file.read(length)) if length else None
            data = json.dumps(tiny_server(path, body)[1]).encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))

    def serve(listening):
        with contextlib.suppress(OSError):
            while True:
                answer(listening.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        p = ServerProposal(url, folder, max_retries=0, **contract.SETTINGS)
        with FaultProxy(tiny_server) as server:
            calm = ServerProposal(server.url, folder, **contract.SETTINGS)
            for seed in range(3):
                assert same(p.propose([[5]], seed), calm.propose([[5]], seed))
    assert asked == ["GET", "POST", "POST", "POST"]


def test_a_proxy_that_the_environment_names(tiny_server, folder, monkeypatch):
    paths = []

    def through(path, body):
        paths.append(path)
        return tiny_server(path.removeprefix("http://served.example:81"), body)

    with FaultProxy(through) as proxy, FaultProxy(tiny_server) as server:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        p = ServerProposal("http://served.example:81/v1", folder, **contract.SETTINGS)
        calm = ServerProposal(server.url, folder, **contract.SETTINGS)  # no_proxy has its address
        assert same(p.propose([[5]], 0), calm.propose([[5]], 0))
        assert paths == [f"http://served.example:81/v1/{path}" for path in ("models", "completions")]
        monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
        with pytest.raises(InvalidInput, match="behind a proxy of the kind socks5: it must be http"):
            ServerProposal("http://served.example:81/v1", folder, **contract.SETTINGS)


@pytest.mark.parametrize("behind_proxy", [False, True])
def test_a_server_that_moves_its_paths_is_followed(tiny_server, folder, monkeypatch, behind_proxy):
    with FaultProxy(None) as server:
        url = "http://served.example:81/v1" if behind_proxy else server.url
        if behind_proxy:
            monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))

        def moving(path, body):
            told = path.removeprefix("http://served.example:81")
            if not told.endswith("/"):
                return (
                    308,
                    {},
                    {"Location": f"{told}/" if told.endswith("models") else f"{url.removesuffix('/v1')}{told}/"},
                )
            return tiny_server(told.removesuffix("/"), body)

        server.answer = moving
        with FaultProxy(tiny_server) as calm:
            want = ServerProposal(calm.url, folder, **contract.SETTINGS).propose([[5]], 0)
        assert same(ServerProposal(url, folder, **contract.SETTINGS).propose([[5]], 0), want)
        server.answer = lambda path, body: (307, {}, {"Location": path})
        with pytest.raises(EngineError, match="307: it has moved to"):
            ServerProposal(url, folder, **contract.SETTINGS)


def test_a_server_that_has_moved_elsewhere_is_followed_without_the_key(tiny_server, folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    with FaultProxy(tiny_server) as elsewhere, FaultProxy(None) as server:
        there = elsewhere.url.removesuffix("/v1")
        server.answer = lambda path, body: (307, {}, {"Location": f"{there}{path}"})
        ServerProposal(server.url, folder, **contract.SETTINGS).propose([[5]], 0)
        assert server.credentials == {"Bearer sk-1"}
        assert elsewhere.credentials == {None}


@pytest.mark.parametrize("key", ["sk-1\n", "sk-\u201c1"])
def test_a_key_that_no_header_can_hold(tiny_server, folder, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with FaultProxy(tiny_server) as server, pytest.raises(InvalidInput, match="OPENAI_API_KEY holds a line break"):
        ServerProposal(server.url, folder, **contract.SETTINGS)


@pytest.mark.parametrize(("url", "said"), [
    ("http://localhost:8000/v1?key=1", "must end with its path"), ("http://me:word#x@localhost/v1", "no address"),
])  # fmt: skip
def test_a_password_in_a_bad_address_is_not_told(folder, url, said):
    with pytest.raises(InvalidInput, match=said) as told:
        ServerProposal(url, folder, **contract.SETTINGS)
    assert "word" not in str(told.value)


def test_a_compressed_reply_and_another_status_of_success(tiny_server, folder):
    with FaultProxy(tiny_server) as calm:
        want = ServerProposal(calm.url, folder, **contract.SETTINGS).propose([[5]], 0)

    class Compressing(BaseHTTPRequestHandler):
        def answer(self, body):
            data = gzip.compress(json.dumps(tiny_server(self.path, body)[1]).encode())
            self.send_response(201 if body else 200)
            for name, value in (("Content-Encoding", "gzip"), ("Content-Length", str(len(data)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.answer(None)

        def do_POST(self):
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Compressing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        assert same(ServerProposal(url, folder, **contract.SETTINGS).propose([[5]], 0), want)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_has_connections_of_its_own(tiny_server, folder):
    """On its parent's, each would read the other's replies."""
    with FaultProxy(tiny_server) as server:
        p = ServerProposal(server.url, folder, **contract.SETTINGS)
        p.propose([[5]], 0)
        before = p._connections._pools
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                p._connections.send("GET", "/models")
                os.write(writing, b"own" if p._connections._pools is not before else b"shared")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reading, 10) == b"own"
        assert p._connections._pools is before


def test_a_name_and_a_password_in_the_address(tiny_server, folder):
    with FaultProxy(tiny_server) as server:
        p = ServerProposal(server.url.replace("//", "//me:pa%40ss@"), folder, **contract.SETTINGS)
        p.propose([[5]], 0)
        assert server.credentials == {"Basic bWU6cGFAc3M="}  # me:pa@ss
        assert p.base_url == server.url  # which errors tell


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "http://", "ftp://localhost/v1", "http://localhost:port/v1", None, 5]
)
def test_an_address_that_is_none(url, folder):
    with pytest.raises(InvalidInput, match="base_url = "):
        ServerProposal(url, folder)


def test_the_key_is_nowhere(serve, propose, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    told = []
    p = propose(serve(always=("401",)))
    with pytest.raises(EngineError, match=r"401: Incorrect API key provided: \*\*\*\. Try another\.$") as caught:
        p.propose([[5]], 0)
    error = caught.value
    told += [repr(error), repr(error.__cause__), repr(p), repr(p.settings)]
    p = propose(serve(rate=0.5), max_retries=20)
    collect(p, MANY[:4], tmp_path)
    told += [file.read_bytes().decode("latin-1") for file in tmp_path.iterdir()]
    told += [caplog.text, *(str(record.__dict__) for record in caplog.records)]
    assert not any(KEY in text for text in told)


@pytest.fixture
def heeds_interrupts():
    """What a script starts with & ignores SIGINT, and so would pytest."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupted_run_goes_on(serve, propose, tmp_path):
    whole, _ = collect(propose(serve()), MANY[:12], tmp_path / "whole", batch_size=4)
    server = serve(faults=("delay",), delay=5.0)
    p = propose(server)

    def interrupt():
        while len(server.bodies) < 6:
            time.sleep(0.005)
        server.rate = 1.0
        while not server.met["delay"]:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        collect(p, MANY[:12], tmp_path / "interrupted", batch_size=4)
    assert time.monotonic() - begin < 3  # the request in flight, of 5 s, is not waited for
    saved = len(list((tmp_path / "interrupted").glob("batch-*.npz")))
    assert 1 <= saved < 3
    server.rate = 0.0
    resumed, _ = collect(p, MANY[:12], tmp_path / "interrupted", batch_size=4)
    assert same(resumed, whole)


def test_the_missing_package_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "pydantic_core", None)
    with pytest.raises(MissingPackage, match=r"pip install 'daemon-fast\[server\]'"):
        ServerProposal("http://127.0.0.1:1/v1", folder)


@pytest.mark.parametrize("bad", [{"timeout": "60"}, {"timeout": 0}, {"max_in_flight": 1.5}, {"max_retries": True}])
def test_arguments_of_another_type_are_refused(bad):
    with pytest.raises(InvalidInput, match=r"= .* must be "):
        ServerProposal("http://localhost:1/v1", "no model is loaded before", **bad)


# ---- chats ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_server():
    return TinyServer(contract.chat_tokenizer())


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    contract.chat_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def serve_chats(chat_server):
    """Starts servers that do something else than the good one, and stops them."""
    started = []

    def start(spoil=None):
        answer = chat_server if spoil is None else lambda path, body: spoil(chat_server, path, body)
        started.append(FaultProxy(answer).__enter__())
        return started[-1]

    yield start
    for proxy in started:
        proxy.__exit__()


@pytest.fixture
def answer(chat_folder):
    def make(server, **options):
        return ServerProposal(server.url, chat_folder, **{**contract.SETTINGS, "max_retries": 1, **options})

    return make


@pytest.mark.parametrize("count_eos", [False, True])
def test_it_meets_the_contract_of_answers(serve_chats, answer, chat_server, count_eos):
    server = serve_chats()
    p, many = answer(server, count_eos=count_eos), answer(server, count_eos=count_eos, num_candidates=300)
    contract.chats_are_answered(p, teacher(chat_server))
    assert all(isinstance(body["prompt"], list) for body in server.bodies)
    contract.answers_end(many, teacher(chat_server))
    contract.responses_are_scored_to_their_end(p, teacher(chat_server))


@pytest.mark.filterwarnings("ignore:.*own template")
@pytest.mark.parametrize("count_eos", [False, True])
def test_a_server_that_only_chats_answers_chats(serve_chats, answer, chat_server, count_eos):
    p = answer(serve_chats(CHATS_ONLY), count_eos=count_eos, num_candidates=300)
    contract.answers_end(p, teacher(chat_server), contract.CHATS)


@pytest.mark.filterwarnings("ignore:.*own template")
@pytest.mark.parametrize("prompts", [contract.RENDERED, contract.CHATS], ids=["ids", "messages"])
def test_a_server_that_draws_on_behind_an_answer(chat_server, answer, prompts):
    """A model's configuration may lack the token by which its template ends an answer."""
    draws_on = TinyServer(contract.chat_tokenizer(), eos=[0])
    only_chats = prompts is contract.CHATS
    with FaultProxy(functools.partial(CHATS_ONLY, draws_on) if only_chats else draws_on) as server:
        contract.answers_end(answer(server, num_candidates=300), teacher(chat_server), prompts)


@pytest.mark.parametrize("name", CHAT_FAULTS)
def test_what_a_server_does_with_chats_is_mended_or_met_by_an_error(name, serve_chats, answer, chat_server, recwarn):
    fault = CHAT_FAULTS[name]
    p = answer(serve_chats(fault.spoil))
    if fault.error:
        with pytest.raises(EngineError, match=fault.error):
            p.propose(contract.CHATS, 0)
        return
    c, again = p.propose(contract.CHATS, 0), p.propose(contract.CHATS, 0)
    assert same(c, again)
    told = [str(w.message) for w in recwarn if w.category is UserWarning]
    assert sum(fault.told in text for text in told) == 1 if fault.told else not told
    good = answer(serve_chats()).propose(contract.CHATS, 0)
    assert c.prefix_tokens == good.prefix_tokens == contract.RENDERED
    assert same(c, good) or not fault.same
    for r, (n, ended) in enumerate(zip(c.lengths.tolist(), c.ended.tolist(), strict=True)):
        row = c.tokens[r, : n + ended].tolist()
        want = teacher(chat_server)(contract.RENDERED[r // 6], row).double().log_softmax(-1)[range(len(row)), row]
        torch.testing.assert_close(c.token_log_p[r, : len(row)].double(), want, atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore:.*own template")
def test_what_only_chats_is_remembered_and_continues_no_text(serve_chats, answer):
    server = serve_chats(CHATS_ONLY)
    p = answer(server)
    p.propose(contract.CHATS, 0)
    asked = len(server.bodies)
    p.propose(contract.CHATS, 1)
    assert len(server.bodies) == asked + 2
    assert [body["messages"] for body in server.bodies[-2:]] in (contract.CHATS, contract.CHATS[::-1])
    for prefix in ("w1", [3], contract.RENDERED[0]):
        with pytest.raises(EngineError, match="/v1/completions to continue a text or token ids"):
            p.propose([contract.CHATS[0], prefix], 0)
    with pytest.warns(UserWarning, match=r"given texts have no log-probabilities: .*404: Not Found"):
        scored = p.score(contract.RENDERED, [[5, contract.END], [contract.END]])
    assert scored.token_log_p.isnan().all()
    assert (scored.ended.tolist(), scored.lengths.tolist()) == ([True, True], [1, 0])


@pytest.mark.filterwarnings("ignore:.*own template", "ignore:.*tokenizes them itself")
def test_a_server_of_texts_is_sent_chats_as_messages_and_texts_as_texts(serve_chats, answer):
    server = serve_chats(fault_proxy.own_text)
    c = answer(server).propose([*contract.CHATS, "w3 w7"], 0)
    assert same(c, answer(serve_chats()).propose([*contract.CHATS, "w3 w7"], 0))
    assert {type(body.get("prompt")) for body in server.bodies if "messages" not in body} == {list, str}
    assert sum("messages" in body for body in server.bodies) == 2


@pytest.mark.filterwarnings("ignore:.*own template", "ignore:.*tokenized again")
def test_an_end_that_a_server_does_not_tell_has_no_log_probability(serve_chats, answer):
    told = answer(serve_chats(fault_proxy.message(fault_proxy.without_end)), num_candidates=300)
    with pytest.warns(UserWarning, match="lacks log-probabilities of some candidates' tokens"):
        c = told.propose(contract.CHATS, 0)
    good = answer(serve_chats(), num_candidates=300).propose(contract.CHATS, 0)
    read = torch.tensor([1 not in row for row in good.tokens.tolist()])  # <unk> is no text
    assert torch.equal(c.ended, good.ended)
    assert torch.equal(c.lengths[read], good.lengths[read])
    assert torch.equal(c.log_p.flatten()[read].isnan(), good.ended[read])
    assert ((c.lengths == 0) & read).any()
    assert metrics.features(metrics.parse(["length", "ended", "sr_1"]), c).isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "log_p", "ended", "copies"),
    [
        ([5, contract.END], None, True, False),  # an answer may be all but certain
        ([5, contract.END], [-0.01, torch.nan], True, False),
        ([5] * 30, None, True, True),
        ([5] * 12, None, False, True),
        ([5, contract.END], [-2.0, torch.nan], True, True),
        ([5, contract.END], [-0.01, -0.02], True, False),
    ],
)
def test_equal_answers_are_copies_only_where_chance_has_no_room(tokens, log_p, ended, copies):
    drawn = [Drawn(tokens, log_p, len(tokens) - ended, ended, None, False, False)] * 25
    settings = ProposalSettings("tiny", "", num_candidates=25)
    assert are_copies(drawn, settings, tiny.VOCABULARY) == copies


@pytest.fixture
def chat_energy(chat_folder, tmp_path):
    vocabulary, path = vocabulary_fingerprint(contract.chat_tokenizer()), tmp_path / "energy.json"
    Energy(
        metrics=metrics.parse(["length", "ended"]),
        mu=torch.tensor([0.5, 0.0], dtype=torch.float64),
        targets=torch.tensor([1.0, 0.5], dtype=torch.float64),
        proposal_settings=ProposalSettings(chat_folder, vocabulary, **contract.SETTINGS),
        chat_template=fingerprint(contract.chat_tokenizer()),
    ).save(path)
    return str(path)


@pytest.mark.parametrize("spoil", [None, CHATS_ONLY], ids=["completions", "chats"])
def test_the_command_line_sends_chats(serve_chats, chat_energy, tmp_path, spoil):
    server = serve_chats(spoil)
    options = ["--energy", chat_energy, "--engine", server.url]
    result = CliRunner().invoke(main, ["generate", "--message", "w1 w2", "--json", *options])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout.splitlines()[-1])["texts"]) == 1
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [{"messages": chat} for chat in contract.CHATS]
    records[0]["messages"] = [*contract.CHATS[0], {"role": "assistant", "content": "w9"}]  # left out
    records += [{"messages": "w1 w2"}, {"messages": [{"role": "system", "content": "w1"}]}]
    source.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    result = CliRunner().invoke(main, ["decode", str(source), str(output), "--prompt-field", "messages", *options])
    assert result.exit_code == 1, result.output  # of one record
    found = [json.loads(line)["daemon"] for line in output.read_text().splitlines()]
    assert [len(one.get("texts", ())) for one in found] == [1, 1, 1, 0]
    assert "the chat template refuses messages of the roles system: no system message" in found[3]["error"]
    if spoil is None:
        assert {tuple(body["prompt"]) for body in server.bodies} == set(map(tuple, contract.RENDERED))
    else:
        sent = [body["messages"] for body in server.bodies if "messages" in body]
        assert all(chat in contract.CHATS for chat in sent)
        assert all(chat in sent for chat in contract.CHATS)
