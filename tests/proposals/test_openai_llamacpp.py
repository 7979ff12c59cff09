"""Candidates from a real llama.cpp server, in this process, over the embedded model.

Its activations are rounded to 8 bits: log-probabilities of ordinary text differ from ours by 0.05 nats a token, rarely
by more than 0.4. Prefixes are ordinary text, since special tokens one after another are off by more.
"""

from __future__ import annotations

import warnings

import contract
import pytest
import torch
from fault_proxy import CHATS_ONLY, FaultProxy, forward

from daemon_fast import Energy, SIRDecoder, TransformersProposal, fit_energy
from daemon_fast.errors import EngineError
from daemon_fast.models import DEFAULT_MODEL, load_language_model, locate

pytest.importorskip("pydantic_core", reason="needs the package pydantic: pip install 'daemon-fast[server]'")
pytest.importorskip("xllamacpp", reason="needs the package xllamacpp, which holds a llama.cpp: pip install xllamacpp")
import xllamacpp

from daemon_fast.proposals.openai import ServerProposal

SLOTS, CONTEXT = 25, 256
TEXTS = ("The Roman Empire was", "She opened the door and", "In mathematics, a prime number is")
OFF = {"atol": 1.0, "mean": 0.1}


@pytest.fixture(scope="module")
def url():
    options = xllamacpp.CommonParams()
    options.model.path = locate(DEFAULT_MODEL)
    options.n_parallel, options.n_ctx = SLOTS, SLOTS * CONTEXT
    options.port, options.hostnames, options.warmup, options.verbosity = 0, ["127.0.0.1"], False, 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(options)
    yield f"{server.listening_address}/v1"
    del server


@pytest.fixture(scope="module")
def model():
    return load_language_model()


@pytest.fixture(scope="module")
def prefixes(model):
    return [model[1](text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def teacher(model):
    def logits(prefix, continuation):
        with torch.inference_mode():
            return model[0](torch.tensor([prefix + continuation])).logits[0, len(prefix) - 1 : -1]

    return logits


@pytest.fixture
def propose(url, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def make(**settings):
        return ServerProposal(url, DEFAULT_MODEL, **{**contract.SETTINGS, **settings})

    return make


@pytest.mark.filterwarnings("ignore:.*characters split between tokens", "ignore:.*these are NaN")
def test_it_meets_the_contract(propose, model, teacher, prefixes):
    p = propose()
    assert p.served_model == locate(DEFAULT_MODEL)
    contract.shapes_and_lengths_are_right(p)
    contract.log_probs_are_the_models(p, teacher, **OFF, prefixes=prefixes, known=0.9)
    contract.a_seed_gives_the_same_candidates_again(p)
    contract.bad_prefixes_are_named(p, CONTEXT, len(model[1]))
    many = propose(num_candidates=300, max_new_tokens=1)  # more than there are slots
    contract.tokens_follow_the_distribution(many, teacher, prefixes[0])
    reference = TransformersProposal(*model, **{**contract.SETTINGS, "num_candidates": 50})
    contract.expected_metrics_agree(propose(num_candidates=50), reference, prefixes[0])


def test_given_texts_have_no_log_probs(propose):
    with pytest.warns(UserWarning, match="given texts have no log-probabilities"):
        assert propose().score([[504, 30], [7]], [[28, 253], [30]]).token_log_p.isnan().all()


def test_end_of_text_ends_a_candidate(propose, model):
    end = model[1].eos_token_id
    prefix = model[1]("<|im_start|>user\nYes or no?<|im_end|>\n<|im_start|>assistant\nYes.")["input_ids"]
    for count_eos in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            c = propose(num_candidates=25, count_eos=count_eos).propose([prefix], 0)
        rows = c.tokens.tolist()
        ended = [r for r, row in enumerate(rows) if end in row]
        assert len(ended) > 5
        for r in ended:
            assert rows[r].index(end) == int(c.lengths[r]) - count_eos
            assert c.token_log_p[r, rows[r].index(end)] != 0
        assert end not in {token for r in range(25) if r not in ended for token in rows[r]}


def test_a_minimum_length(propose, model):
    prefix = model[1]("<|im_start|>user\nYes or no?<|im_end|>\n<|im_start|>assistant\nYes.")["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c = propose(num_candidates=25, min_new_tokens=12).propose([prefix], 0)
    whole = ~c.token_log_p.isnan().any(1)
    assert (c.lengths[whole] == 12).all()
    assert whole.sum() > 20
    with pytest.raises(EngineError, match="though min_tokens = 6 was asked for: it needs min_new_tokens = 0"):
        propose(num_candidates=25, min_new_tokens=6).propose([prefix], 0)


CHATS = [
    [{"role": "user", "content": "Yes or no?"}],
    [
        {"role": "system", "content": "You answer with one word."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy?"},
    ],
]


@pytest.mark.filterwarnings("ignore:.*characters split between tokens", "ignore:.*these are NaN")
def test_a_server_that_only_chats(url, propose, model, teacher):
    """Its chat endpoint, behind a proxy that hides the other: its own template is the tokenizer's, here."""
    end = model[1].eos_token_id
    rendered = [
        model[1](model[1].apply_chat_template(chat, tokenize=False, add_generation_prompt=True))["input_ids"]
        for chat in CHATS
    ]
    with FaultProxy(lambda path, body: CHATS_ONLY(forward(url), path, body)) as server:
        p = ServerProposal(server.url, DEFAULT_MODEL, **{**contract.SETTINGS, "temperature": 1.0, "max_new_tokens": 8})
        with pytest.warns(UserWarning, match="puts chats in its own template"):
            c = p.propose(CHATS, 0)
        p = ServerProposal(server.url, DEFAULT_MODEL, num_candidates=300, max_new_tokens=1, min_new_tokens=0)
        first = p.propose(CHATS[:1], 1)
    assert c.prefix_tokens == rendered
    by_ids = propose(temperature=1.0, max_new_tokens=8).propose(CHATS, 0)  # of the same server, with completions
    assert by_ids.prefix_tokens == rendered
    errors, ended = [], 0
    for candidates in (c, by_ids):
        for r in (~candidates.log_p.flatten().isnan()).nonzero()[:, 0].tolist():
            n = int(candidates.lengths[r] + candidates.ended[r])
            row = candidates.tokens[r, :n].tolist()
            assert (row[-1] == end) == bool(candidates.ended[r])
            ended += row[-1] == end
            logits = teacher(rendered[r // 6], row).double()
            errors += (logits.log_softmax(-1)[range(n), row] - candidates.token_log_p[r, :n]).abs().tolist()
    assert ended > 0
    assert max(errors) < OFF["atol"]
    assert sum(errors) / len(errors) < OFF["mean"]
    q = torch.softmax(teacher(rendered[0], [0])[0].double(), -1)
    counts = torch.bincount(first.tokens[:, 0], minlength=len(q)) / 300
    assert float((counts - q).abs().max()) < 5 * float((q * (1 - q) / 300).sqrt().max())


@pytest.mark.filterwarnings("ignore:.*characters split between tokens", "ignore:.*these are NaN")
def test_a_fit_and_a_decoder(propose, tmp_path):
    p = propose(num_candidates=10, max_new_tokens=8, min_new_tokens=8, temperature=1.0)
    with pytest.warns(UserWarning, match="given texts have no log-probabilities"):
        energy = fit_energy(p, "wikipedia", ["sr_1"], num_prefixes=4, num_targets=200, prefix_tokens=8, ridge=0.1)
    energy.save(tmp_path / "energy.json")
    decoded = SIRDecoder(Energy.load(tmp_path / "energy.json"), p)(["The Roman Empire was"], num_samples=3)
    assert energy.mu.isfinite().all()
    assert (decoded.ess > 1).all()
    assert len(decoded.texts[0]) == 3
    assert all(len(text) > 10 for text in decoded.texts[0])
