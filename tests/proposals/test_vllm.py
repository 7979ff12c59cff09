"""Candidates from vLLM: its tokens, log-probabilities and ends of text are the model's, as Transformers has them."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from types import SimpleNamespace

import contract
import pytest
import tiny
import torch
from test_transformers import teacher_forced

from daemon_fast import SIRDecoder, TransformersProposal, fit_energy, metrics
from daemon_fast.data.collect import collect
from daemon_fast.data.texts import read_texts, split
from daemon_fast.errors import EngineError, InvalidInput, MissingPackage, ModelUnavailable
from daemon_fast.models import DEFAULT_MODEL, dequantise
from daemon_fast.proposals.vllm import VLLMProposal

# One process and 1 GiB: two engines share this machine with the tests.
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
ENGINE = {"enforce_eager": True}

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
real_model = pytest.mark.real_model


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama, heads of 32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("tiny"), "llama, heads of 32")


@pytest.fixture(scope="module")
def llm(folder):
    return VLLMProposal.load(folder, engine_kwargs=ENGINE).llm


@pytest.fixture
def proposal(llm):
    return lambda **settings: VLLMProposal(llm, **{**contract.SETTINGS, **settings})


@pytest.fixture
def reference(model):
    return lambda **settings: TransformersProposal(model, tiny.tokenizer(), **{**contract.SETTINGS, **settings})


@needs_vllm
def test_it_meets_the_contract(proposal, reference, model):
    p, teacher = proposal(), lambda *rows: teacher_forced(model, *rows)
    contract.shapes_and_lengths_are_right(p)
    contract.log_probs_are_the_models(p, teacher)
    contract.a_seed_gives_the_same_candidates_again(p)
    contract.a_seed_each_gives_what_it_gives_alone(p)
    contract.score_gives_what_drawing_gave(p)
    contract.bad_prefixes_are_named(p, tiny.CONTEXT, tiny.VOCABULARY)
    contract.tokens_follow_the_distribution(proposal(num_candidates=2000, max_new_tokens=1), teacher)
    contract.expected_metrics_agree(proposal(num_candidates=300), reference(num_candidates=3000))


@needs_vllm
@pytest.mark.parametrize("count_eos", [False, True])
def test_it_meets_the_contract_of_answers(llm, model, count_eos, monkeypatch):
    monkeypatch.setattr(llm, "get_tokenizer", contract.chat_tokenizer)
    settings = {**contract.SETTINGS, "count_eos": count_eos}
    p, many = VLLMProposal(llm, **settings), VLLMProposal(llm, **{**settings, "num_candidates": 300})

    def teacher(*rows):
        return teacher_forced(model, *rows)

    contract.chats_are_answered(p, teacher)
    contract.answers_end(many, teacher)
    contract.responses_are_scored_to_their_end(p, teacher)


@needs_vllm
def test_settings_name_the_same_model_and_vocabulary(llm, folder, reference):
    ours = VLLMProposal(llm, **contract.SETTINGS).settings
    assert ours.model_id == folder
    assert VLLMProposal(llm, model_id=ours.model_id, **contract.SETTINGS).settings == ours
    assert ours.vocabulary == reference().settings.vocabulary


@needs_vllm
@pytest.mark.parametrize("count_eos", [False, True])
def test_end_of_text_ends_a_candidate(proposal, count_eos):
    c = proposal(num_candidates=200, count_eos=count_eos, min_new_tokens=3).propose([[5, 9]], seed=0)
    ended = 0
    for row, length in zip(c.tokens.tolist(), c.lengths.tolist(), strict=True):
        assert 0 not in row[:3]
        if 0 in row[:length] or length < 12:
            ended += 1
            end = length - 1 if count_eos else length
            assert 0 not in row[:end]
            assert row[end:] == [0] * (12 - end)
    assert 0 < ended < 200
    drawn = c.lengths if count_eos else c.lengths + (c.lengths < 12)
    assert torch.equal((c.token_log_p != 0).sum(1), drawn)  # its log-probability is kept either way
    assert all("<eos>" not in text for text in c.texts)


@needs_vllm
def test_only_the_generation_configs_tokens_end_a_text(proposal, reference, llm, monkeypatch):
    monkeypatch.setattr(llm.model_config, "try_get_generation_config", lambda: {"eos_token_id": [20, 9]})
    settings = {"num_candidates": 400, "temperature": 1.0}
    c = proposal(**settings).propose([[5, 9]], seed=0)
    for row, length in zip(c.tokens.tolist(), c.lengths.tolist(), strict=True):
        assert not {20, 9} & set(row[:length])
        assert length == 12 or row[length] in (20, 9)
    assert (c.tokens[:, 0] == 0).any()  # the tokenizer's own goes on
    want = reference(eos_token_ids=[20, 9], **settings)
    lengths = [x.double() for x in (c.lengths, want.propose([[5, 9]], seed=0).lengths)]
    error = sum(x.var() / len(x) for x in lengths).sqrt()
    assert abs(lengths[0].mean() - lengths[1].mean()) < 4 * error


@needs_vllm
@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.6}, {"min_p": 0.2}])
def test_truncation_keeps_the_tokens_that_it_keeps_elsewhere(proposal, reference, settings):
    c = proposal(num_candidates=40, **settings).propose(contract.PREFIXES, seed=0)
    rows = [(r, n) for r, n in enumerate(c.lengths.tolist()) if n]
    prefixes, drawn = [contract.PREFIXES[r // 40] for r, _ in rows], [c.tokens[r, :n].tolist() for r, n in rows]
    assert torch.isfinite(reference(**settings).score(prefixes, drawn).token_log_q).all()
    everything = proposal(num_candidates=40).propose(contract.PREFIXES, seed=0)
    first = everything.lengths > 0
    free = reference(**settings).score(
        [contract.PREFIXES[r // 40] for r in first.nonzero().flatten().tolist()], everything.tokens[first, :1].tolist()
    )
    assert not torch.isfinite(free.token_log_q).all()  # which it doesn't keep without truncation


@needs_vllm
@pytest.mark.parametrize("min_new_tokens", [0, 3, 12])
def test_log_q_is_known_at_temperature_one(proposal, reference, min_new_tokens):
    settings = {"num_candidates": 40, "temperature": 1.0, "min_new_tokens": min_new_tokens}
    c = proposal(**settings).propose(contract.PREFIXES, seed=1)
    rows = [(r, n) for r, n in enumerate(c.lengths.tolist()) if n]
    scored = reference(**settings).score(
        [contract.PREFIXES[r // 40] for r, _ in rows], [c.tokens[r, :n].tolist() for r, n in rows]
    )
    for i, (r, n) in enumerate(rows):
        torch.testing.assert_close(c.token_log_q[r, :n], scored.token_log_q[i, :n], atol=1e-3, rtol=0)
    assert torch.equal(c.token_log_q[:, min_new_tokens:], c.token_log_p[:, min_new_tokens:])


@needs_vllm
def test_log_q_is_unknown_elsewhere(proposal):
    for settings in ({}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "min_p": 0.1}):
        c = proposal(**settings).propose([[5]], seed=0)
        assert c.token_log_p.isfinite().all()
        with pytest.raises(InvalidInput, match="gives no log-probabilities under the proposal"):
            _ = c.log_q
    scored = proposal(temperature=1.0).score([[5]], [[9, 30]])
    assert torch.equal(scored.log_q, scored.log_p)


@needs_vllm
def test_candidates_are_independent(proposal):
    """vLLM numbers the seeds of one request's candidates upwards: those of two requests must not meet."""
    p = proposal(num_candidates=100, min_new_tokens=12)
    drawn = [tuple(row) for seed in (0, 1) for row in p.propose([[5, 9], [5, 9]], seed).tokens.tolist()]
    assert len(set(drawn)) == 400


@needs_vllm
def test_more_prompts_than_a_step_takes_in(proposal, llm):
    prefixes, step = [[5 + i % 50] * 33 for i in range(16)], llm.llm_engine.vllm_config.scheduler_config
    assert step.max_num_batched_tokens < 16 * 33 * 16
    c = proposal(num_candidates=16, max_new_tokens=2).propose(prefixes, seed=0)
    assert c.shape == (16, 16)


@needs_vllm
def test_strings_and_their_token_ids_are_the_same_prefix(proposal):
    by_text, by_ids = (proposal().propose([prefix], 0) for prefix in ("w3 w7 w28", [5, 9, 30]))
    assert torch.equal(by_text.tokens, by_ids.tokens)
    assert by_ids.prefix_texts == ["w3 w7 w28"]


@needs_vllm
def test_what_vllm_refuses_is_one_line(proposal, folder, tmp_path):
    with pytest.raises(InvalidInput, match=f"continuation 0 has token {tiny.VOCABULARY}, outside the vocabulary"):
        proposal().score([[5]], [[tiny.VOCABULARY]])
    with pytest.raises(EngineError, match="vLLM failed: ") as failure:
        proposal().score([[5]], [[9] * (tiny.CONTEXT + 1)])
    assert "\n" not in str(failure.value)
    with pytest.raises(EngineError, match="vLLM failed: n must be at most"):
        proposal(num_candidates=100_000).propose([[5]], 0)
    with pytest.raises(EngineError, match=r"vLLM can't start with model .*max_model_len") as failure:
        VLLMProposal.load(folder, engine_kwargs={**ENGINE, "max_model_len": 1000})
    assert "\n" not in str(failure.value)
    with pytest.raises(ModelUnavailable, match="no such folder"):
        VLLMProposal.load("./nowhere")
    with pytest.raises(ModelUnavailable, match=r"tokenizer '.*' can't be loaded"):
        VLLMProposal.load(str(tmp_path))
    contract.shapes_and_lengths_are_right(proposal())  # the engine goes on


def test_other_log_probs_are_an_error():
    llm = SimpleNamespace(model_config=SimpleNamespace(logprobs_mode="processed_logprobs"))
    with pytest.raises(InvalidInput, match="the engine has logprobs_mode = 'processed_logprobs'"):
        VLLMProposal(llm)


def test_without_vllm_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingPackage, match="pip install vllm"):
        VLLMProposal.load()


SETTINGS = {"num_candidates": 10, "max_new_tokens": 24, "min_new_tokens": 24, "temperature": 0.97}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def smollm(cache):
    """The default model in Transformers, straight from its GGUF file, and in vLLM."""
    ours = VLLMProposal.load(engine_kwargs={**ENGINE, "max_model_len": 256}, **SETTINGS)
    return ours, TransformersProposal.load(device="cpu", **SETTINGS)


@pytest.fixture(scope="module")
def pairs(smollm):
    return split(read_texts("wikipedia"), smollm[1].tokenizer, 16, 24, 12, seed=0)


@pytest.fixture(scope="module")
def fitted(smollm, pairs, tmp_path_factory):
    drawn = tmp_path_factory.mktemp("drawn")
    return fit_energy(smollm[0], pairs, ["tr_8", "ent"], ridge=0, batch_size=6, directory=drawn), drawn


@needs_vllm
@real_model
def test_settings_agree_between_engines(smollm):
    ours, theirs = smollm
    assert ours.llm.model_config.model == dequantise(DEFAULT_MODEL)
    assert ours.settings == theirs.settings


@needs_vllm
@real_model
def test_log_probs_agree_between_engines(smollm, pairs):
    ours, theirs = smollm
    c = ours.propose(pairs.prefixes[:4], seed=0)
    prefixes = [prefix for prefix in pairs.prefixes[:4] for _ in range(10)]
    by_us, by_them = (p.score(prefixes, c.tokens.tolist()).token_log_p for p in smollm)
    torch.testing.assert_close(c.token_log_p, by_them, atol=1e-3, rtol=0)
    torch.testing.assert_close(by_us, by_them, atol=1e-3, rtol=0)
    text = "Ünïcode, 123 and <|im_end|>\n\tmore"
    chat = [{"role": "user", "content": text}]
    assert ours.tokenize([text, chat]) == theirs.tokenize([text, chat])
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert ours.detokenize(c.tokens.tolist()) == theirs.detokenize(c.tokens.tolist())


@needs_vllm
@real_model
def test_expected_metrics_agree_between_engines(smollm, pairs):
    values = []
    for p in smollm:
        c = p.propose(pairs.prefixes[:4], seed=3)
        values.append(metrics.features(metrics.parse(["sr_2", "tr_8", "ent"]), c).double())
    # Each prefix's own mean, the same in both engines: [4, 10, 3] each.
    difference = (values[0].mean(1) - values[1].mean(1)).mean(0)
    error = sum(v.var(1) / v.shape[1] for v in values).mean(0).div(4).sqrt()
    assert (difference.abs() < 4 * error).all()


@needs_vllm
@real_model
def test_fit_and_decode(smollm, pairs, fitted):
    ours, theirs = smollm
    energy, _ = fitted
    assert max(map(abs, energy.diagnostics.residual)) < 1e-6
    assert energy.proposal_settings == ours.settings
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an artefact of one engine is at home in the other
        for p in (ours, theirs):
            decoded = SIRDecoder(energy, p)(pairs.prefixes[:2], seed=0)
            assert all(texts[0].strip() for texts in decoded.texts)
            assert ((decoded.ess >= 1) & (decoded.ess <= 10)).all()


@needs_vllm
@real_model
def test_an_interrupted_run_goes_on(smollm, pairs, fitted):
    _, drawn = fitted
    whole, _ = collect(smollm[0], pairs.prefixes, drawn, seed=0, batch_size=6)
    (drawn / "batch-000001.npz").unlink()
    again, _ = collect(smollm[0], pairs.prefixes, drawn, seed=0, batch_size=6)
    assert torch.equal(again.tokens, whole.tokens)
    torch.testing.assert_close(again.token_log_p, whole.token_log_p, atol=1e-4, rtol=0)
