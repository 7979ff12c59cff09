"""The evaluation from end to end on a tiny model: every study, resuming, and what it says of bad input."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tiny
import torch

from daemon_fast import Energy, TransformersProposal, fit_energy
from daemon_fast.data.texts import read_texts, split
from daemon_fast.errors import DataError, InvalidInput
from daemon_fast.experiments import run as evaluate
from daemon_fast.experiments.run import Domain, Sizes

pytest.importorskip("matplotlib")
NAMES = ["sr_2", "tr_8", "ent"]
SIZES = Sizes(held_out=12, pool_prefixes=2, pool_candidates=40, sweep_prefixes=6)


@pytest.fixture(scope="module", autouse=True)
def no_clustering():
    """MAUVE's clusterings take most of the time; they have a test of their own."""
    before = evaluate._mauve_scores
    evaluate._mauve_scores = lambda human, others: {"x": [float(np.abs(human.mean(0) - others.mean()).mean())] * 2}
    yield before
    evaluate._mauve_scores = before


def test_mauve_tells_clouds_apart(no_clustering, monkeypatch):
    pytest.importorskip("mauve")
    monkeypatch.setattr(evaluate, "DRAWS", 2)
    rng = np.random.default_rng(0)
    cloud, same = rng.normal(size=(2, 100, 8)).astype(np.float32)
    near, far, mixed = (no_clustering(cloud, x)["x"] for x in (same[None], same[None] + 5, np.stack([same, same + 5])))
    assert len(near) == 2
    assert min(near) > 0.8 > 0.1 > max(far)
    assert mixed == [near[0], far[1]]  # each seed takes the next draw


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model, its tokenizer, and two domains whose "human" texts are samples of the model at two temperatures."""
    folder = tmp_path_factory.mktemp("data")
    model, tokenizer = tiny.model("gpt2"), tiny.tokenizer()
    domains = []
    for name, temperature in (("cool", 0.7), ("warm", 0.85)):
        prefixes = [[2 + (7 * i + j) % tiny.WORDS for j in range(4)] for i in range(40)]
        human = TransformersProposal(
            model, tokenizer, num_candidates=1, max_new_tokens=16, min_new_tokens=16, temperature=temperature
        ).propose(prefixes, seed=3)
        rows = [p + t for p, t in zip(prefixes, human.tokens.tolist(), strict=True)]
        path = folder / f"{name}.txt"
        path.write_text("\n".join(tokenizer.batch_decode(rows)) + "\n")
        proposal = TransformersProposal(
            model, tokenizer, model_id="tiny", num_candidates=20, max_new_tokens=16, min_new_tokens=16, temperature=0.9
        )
        pairs = split(read_texts(path), tokenizer, 4, 16, 20, 0)
        fitted = fit_energy(proposal, pairs, NAMES, num_prefixes=16, ridge=1e-3)
        domains.append(Domain(name, str(path), fitted))
    return domains, model, tokenizer


def run(setting, output, **options):
    domains, model, tokenizer = setting
    options = {"sizes": SIZES, "prefix_tokens": 4, "featurizer": "model", **options}
    return evaluate.evaluate(options.pop("domains", domains), output, model, tokenizer, **options)


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, run(setting, folder)


def test_every_study_is_there(finished):
    folder, report = finished
    for name in ("cool", "warm"):
        domain = report["domains"][name]
        assert set(evaluate.STUDIES) - {"one_metric", "transfer"} <= set(domain)  # sr_4 was not fitted
        assert domain["prefixes"] == {"fit": 16, "targets": 20, "held_out": 12, "pool": 2}
        assert domain["ridge"] == 1e-3  # the artefact's, which refits take over
        table = {row["method"]: row for row in domain["alignment"]}
        assert set(table) == {
            "human", "sampling", "daemon", "sampling, expected", "daemon, expected", *evaluate.baselines.BASELINES
        }  # fmt: skip
        assert table["human"]["names"] == [*NAMES, "div"]
        assert table["greedy"]["mean"][0] > table["sampling"]["mean"][0]  # it repeats itself
        assert table["daemon"]["distance"] < table["greedy"]["distance"]
        swept = [row["temperature"] for row in domain["temperatures"] if row["method"] == "sampling"]
        assert swept == [0.8, 0.85, 0.9, 0.95, 1.0]  # 0.9 is the artefact's own: nothing is drawn again for it
        assert not (folder / name / "temperature-0.9-fit").exists()
    assert len(report["transfer"]) == 4
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    page = (folder / "report.html").read_text()
    assert "Transfer" in page
    assert page.count("; ridge 0.001.") == 2


def test_human_text_of_the_table_is_what_the_fit_did_not_see(setting, finished):
    domains, _, tokenizer = setting
    texts = evaluate.read_texts(domains[0].data)
    pairs = evaluate.split(texts, tokenizer, 4, 16, None, 0)[20:32]
    tokens = torch.tensor(pairs.continuations)
    want = evaluate.metrics_module.ops.repetition(tokens, torch.full((12,), 16), [2], [8]).double().mean(0)
    row = finished[1]["domains"]["cool"]["alignment"][0]
    assert row["mean"][:2] == pytest.approx(want.tolist(), abs=1e-6)


def test_killed_anywhere_it_ends_with_the_same_report(setting, finished, tmp_path, monkeypatch):
    whole = (finished[0] / "report.html").read_bytes(), (finished[0] / "report.json").read_bytes()
    calls = {"left": 0}

    def dying(function):
        def wrapped(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] < 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(TransformersProposal, "propose", dying(TransformersProposal.propose))
    monkeypatch.setattr(evaluate.baselines, "decode", dying(evaluate.baselines.decode))
    monkeypatch.setattr(TransformersProposal, "score", dying(TransformersProposal.score))
    runs = 0
    while True:
        calls["left"], runs = 9, runs + 1
        try:
            run(setting, tmp_path)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "report.json").exists()
    assert runs > 5
    assert ((tmp_path / "report.html").read_bytes(), (tmp_path / "report.json").read_bytes()) == whole


def test_one_study_alone(setting, tmp_path):
    report = run(setting, tmp_path, domains=setting[0][:1], wanted=["tail"])
    (domain,) = report["domains"].values()
    assert set(domain) & set(evaluate.STUDIES) == {"tail"}
    assert "transfer" not in report
    assert not list(tmp_path.glob("cool/baseline*"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"wanted": ["luck"]}, InvalidInput, "unknown study 'luck'"),
        ({"featurizer": "bert"}, InvalidInput, "featurizer = 'bert' must be"),
        ({"domains": []}, InvalidInput, "different names"),
        ({"prefix_tokens": 30}, DataError, "no usable prefixes"),
    ],
)
def test_bad_input_is_named(setting, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run(setting, tmp_path, **change)


def test_nothing_held_out_is_an_error(setting, tmp_path):
    domain = setting[0][0]
    diagnostics = evaluate.replace(domain.energy.diagnostics, num_targets=40)
    used_up = Domain("cool", domain.data, evaluate.replace(domain.energy, diagnostics=diagnostics))
    with pytest.raises(DataError, match=re.escape("cool: 40 texts are long enough, and the fit took 40")):
        run(setting, tmp_path, domains=[used_up])


def test_another_models_artefact_is_refused(setting, tmp_path):
    domain = setting[0][0]
    settings = evaluate.replace(domain.energy.proposal_settings, vocabulary="other")
    other = Domain("cool", domain.data, evaluate.replace(domain.energy, proposal_settings=settings))
    assert isinstance(other.energy, Energy)
    with pytest.raises(InvalidInput, match="another vocabulary"):
        run(setting, tmp_path, domains=[other])
