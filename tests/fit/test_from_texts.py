"""The fit in one call: on a language model that can be listed, and from texts to an artefact."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import toy

from daemon_fast import Energy, SIRDecoder, TransformersProposal, fit_energy, metrics, reference
from daemon_fast.data import Pairs
from daemon_fast.data.collect import collect
from daemon_fast.errors import (
    DataError,
    InfeasibleTargets,
    InvalidInput,
    SeveralProblems,
    TargetsNotMet,
    UnknownMetric,
)

NAMES = ["sr_2", "tr_2"]


def pairs_of_the_toy(n=200, seed=1):
    """Continuations drawn by other probabilities than the model's: each sequence's, times 1 + its last token."""
    odds = toy.PROBABILITIES * (1 + toy.SEQUENCES[:, -1])
    drawn = torch.multinomial(odds, n, replacement=True, generator=torch.Generator().manual_seed(seed))
    return Pairs([[0]] * n, toy.SEQUENCES[drawn].tolist())


@pytest.mark.parametrize(("normalization", "draw"), [("per_prefix", "sir"), ("per_prefix", "race"), ("global", "sir")])
def test_expected_metrics_of_the_fits_own_candidates_are_those_of_the_human_texts(normalization, draw):
    pairs, proposal = pairs_of_the_toy(), toy.ToyProposal(num_candidates=12)
    options = {"ridge": 0, "normalization": normalization, "draw": draw, "batch_size": 7}
    energy = fit_energy(proposal, pairs, NAMES, num_prefixes=200, **options)
    want = metrics.features(energy.metrics, toy.as_candidates(torch.tensor(pairs.continuations), 200)).mean((0, 1))
    torch.testing.assert_close(energy.targets, want.double())
    # Drawn a second time, batch by batch and seed by seed: the same candidates.
    drawn, _ = collect(toy.ToyProposal(num_candidates=12), pairs.prefixes, None, seed=0, batch_size=7)
    decoded = SIRDecoder(energy, toy.ToyProposal(num_candidates=12)).choose(drawn)
    if normalization == "per_prefix":
        chances = decoded.weights
        if draw == "race":
            chances = torch.tensor([reference.race_probabilities(row) for row in decoded.weights.tolist()])
        expected = (chances.double()[..., None] * decoded.candidate_features.double()).sum(1).mean(0)
        torch.testing.assert_close(expected, energy.targets, atol=1e-6, rtol=0)
    assert max(map(abs, energy.diagnostics.residual)) < 1e-9
    assert (energy.normalization, energy.draw, energy.base) == (normalization, draw, "proposal")
    assert (energy.diagnostics.num_prefixes, energy.diagnostics.num_targets) == (200, 200)


def test_mu_comes_near_the_one_that_the_model_itself_needs():
    many = pairs_of_the_toy(4000)
    energy = fit_energy(toy.ToyProposal(50), many, NAMES, num_prefixes=400, num_targets=4000, ridge=0, batch_size=400)
    features = metrics.features(energy.metrics, toy.as_candidates(toy.SEQUENCES, 1))[0].double()
    tilted = toy.PROBABILITIES * torch.exp(-(features @ energy.mu))
    torch.testing.assert_close(tilted @ features / tilted.sum(), energy.targets, atol=0.01, rtol=0)
    assert energy.diagnostics.num_targets == 4000


@pytest.fixture(scope="module")
def proposal():
    settings = {"num_candidates": 6, "max_new_tokens": 8, "min_new_tokens": 8}
    return TransformersProposal(tiny.model("gpt2"), tiny.tokenizer(), **settings)


TEXTS = [tiny.text(16, seed) for seed in range(30)]


def test_texts_a_file_of_them_and_pairs_give_the_same(proposal, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    options = {"num_prefixes": 10, "prefix_tokens": 4, "ridge": 0.1}
    listed = fit_energy(proposal, TEXTS, ["sr_1", "ent"], **options)
    from_file = fit_energy(proposal, tmp_path / "texts.txt", ["sr_1", "ent"], **options)
    assert torch.equal(listed.mu, from_file.mu)
    assert listed.proposal_settings == proposal.settings
    listed.save(tmp_path / "energy.json")
    assert Energy.load(tmp_path / "energy.json").diagnostics == listed.diagnostics


def test_own_metrics_and_an_encoder(proposal):
    class Encoder:
        def encode(self, sentences, **_):
            return torch.tensor([[1.0, len(s), s.count("1")] for s in sentences])

    def ones(candidates):
        return (candidates.tokens == 3).float().sum(1)

    energy = fit_energy(proposal, TEXTS, [ones, "coh"], encoder=Encoder(), num_prefixes=10, prefix_tokens=4, ridge=0.1)
    assert energy.names == ["ones", "coh"]


def test_candidates_are_kept_and_a_fit_that_was_cut_off_goes_on(proposal, tmp_path, monkeypatch):
    options = {"num_prefixes": 10, "prefix_tokens": 4, "ridge": 0.1, "directory": tmp_path}
    propose, calls = TransformersProposal.propose, []

    def interrupted(self, prefixes, seed):
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return propose(self, prefixes, seed)

    monkeypatch.setattr(TransformersProposal, "propose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_energy(proposal, TEXTS, ["sr_1"], **options)
    resumed = fit_energy(proposal, TEXTS, ["sr_1"], **options)
    assert len(calls) == 4  # of three batches the first was there
    assert torch.equal(resumed.mu, fit_energy(proposal, TEXTS, ["sr_1"], **{**options, "directory": None}).mu)


def test_the_model_itself_can_be_what_is_tilted(proposal):
    warm = TransformersProposal(
        proposal.model, proposal.tokenizer, num_candidates=40, max_new_tokens=8, min_new_tokens=8, temperature=1.3
    )
    options = {"num_prefixes": 20, "prefix_tokens": 4, "ridge": 0.1}
    tilted = fit_energy(warm, TEXTS, ["sr_1", "ent"], base="model", **options)
    assert tilted.base == "model"
    assert not torch.equal(tilted.mu, fit_energy(warm, TEXTS, ["sr_1", "ent"], **options).mu)


def test_a_race_needs_prefixes_weights(proposal):
    with pytest.raises(InvalidInput, match="draw = 'race' is not defined for normalization = 'global'"):
        fit_energy(proposal, TEXTS, ["sr_1"], num_prefixes=10, prefix_tokens=4, normalization="global", draw="race")


def test_bad_calls(proposal):
    with pytest.raises(UnknownMetric):
        fit_energy(proposal, TEXTS, ["perplexity"], num_prefixes=10, prefix_tokens=4)
    with pytest.raises(DataError, match=r"30 of 30 texts have the 12 tokens .* that 96 pairs need"):
        fit_energy(proposal, TEXTS, ["sr_1"], prefix_tokens=4)
    with pytest.raises(InfeasibleTargets):
        fit_energy(proposal, ["w1 " * 12] * 10, ["sr_1"], num_prefixes=10, prefix_tokens=4, ridge=0)
    untold = TransformersProposal(proposal.model, None, num_candidates=2, max_new_tokens=2)
    with pytest.raises(InvalidInput, match="need a proposal with a tokenizer"):
        fit_energy(untold, TEXTS, ["sr_1"])
    counts = ("num_prefixes", "num_targets", "prefix_tokens", "batch_size", "bootstrap")
    with pytest.raises(SeveralProblems) as told:
        fit_energy(proposal, TEXTS, ["sr_1"], **dict.fromkeys(counts, 2.5))
    for name in counts:
        assert f"{name} = 2.5 must be an integer >= {0 if name == 'bootstrap' else 1}" in str(told.value)
    with pytest.raises(InvalidInput, match="num_prefixes = None must be an integer >= 1"):
        fit_energy(proposal, TEXTS, ["sr_1"], num_prefixes=None)


def test_numpys_numbers_count(proposal, tmp_path):
    counts = {"num_prefixes": 10, "num_targets": 10, "prefix_tokens": 4, "batch_size": 5, "bootstrap": 2, "seed": 3}
    want = fit_energy(proposal, TEXTS, ["sr_1"], **counts, ridge=0.5)
    given = {name: np.int64(value) for name, value in counts.items()}
    got = fit_energy(proposal, TEXTS, ["sr_1"], **given, ridge=np.float64(0.5), directory=tmp_path / "kept")
    got.save(tmp_path / "energy.json")
    assert torch.equal(Energy.load(tmp_path / "energy.json").mu, want.mu)


def test_all_problems_are_told_before_anything_is_drawn(tmp_path):
    drawn = toy.ToyProposal(1)
    with pytest.raises(SeveralProblems) as raised:
        fit_energy(
            drawn, pairs_of_the_toy(3), ["foo", "bar"], num_targets=0, ridge=-1, seed=-1, bootstrap=-1, batch_size=0,
            normalization="all", base="text", directory=tmp_path / "file" / "kept",
        )  # fmt: skip
    lines = str(raised.value).splitlines()
    for message in (
        "num_targets = 0", "batch_size = 0", "bootstrap = -1", "seed = -1", "ridge = -1", "normalization = 'all'",
        "base = 'text'", "unknown metric 'foo'", "unknown metric 'bar'",
    ):  # fmt: skip
        assert sum(message in line for line in lines) == 1, message
    with pytest.raises(SeveralProblems, match=r"(?s)num_prefixes = 3 is fewer than the 4 .*num_candidates = 1 .*"):
        fit_energy(drawn, pairs_of_the_toy(3), ["sr_1", "sr_2", "tr_1", "tr_2"], ridge=-1)
    with pytest.raises(InvalidInput, match="ridge = 'cv' needs at least 5 prefixes"):
        fit_energy(toy.ToyProposal(2), pairs_of_the_toy(3), ["sr_1"])
    assert drawn.calls == 0


def three(candidates):
    return torch.full(candidates.lengths.shape, 3.0)


def above_three(candidates):
    """3 for what the model draws, 4 for human text, which comes one a prefix."""
    return torch.full(candidates.lengths.shape, 4.0 if candidates.shape[1] == 1 else 3.0)


@pytest.mark.parametrize("by", [3e7, -1e12, 1e39])
def test_metrics_of_any_size_are_fitted_decoded_and_stored(by, tmp_path):
    """To what the same metrics give near zero, by which nothing is rounded."""

    def plain(c):
        return c.tokens.double().mean(1)

    def far(c):
        return plain(c) * by if by > 1e38 else plain(c) + by

    pairs, unit = pairs_of_the_toy(), by if by > 1e38 else 1.0
    near, large = (fit_energy(toy.ToyProposal(12), pairs, [f, "sr_2"], num_prefixes=200, ridge=0) for f in (plain, far))
    torch.testing.assert_close(large.mu * torch.tensor([unit, 1.0], dtype=torch.float64), near.mu, rtol=1e-3, atol=1e-3)
    large.save(tmp_path / "energy.json")
    again = Energy.load(tmp_path / "energy.json", [far])
    assert torch.equal(again.mu, large.mu)
    drawn, _ = collect(toy.ToyProposal(12), pairs.prefixes, None, seed=0, batch_size=4)
    chosen = [SIRDecoder(energy, toy.ToyProposal(12)).choose(drawn) for energy in (near, again)]
    torch.testing.assert_close(*(decoded.weights.double() for decoded in chosen), rtol=1e-2, atol=1e-3)
    expected = (chosen[1].weights[..., None] * chosen[1].candidate_features.double()).sum(1).mean(0)
    torch.testing.assert_close(expected[0] / unit, again.targets[0] / unit, atol=1e-3, rtol=1e-15)


def test_a_metric_that_nothing_varies_is_left_out_with_a_warning():
    pairs, proposal = pairs_of_the_toy(), toy.ToyProposal(12)
    with pytest.warns(UserWarning, match=r"left out.* same for all candidates, and for human text: three \(3\)"):
        energy = fit_energy(proposal, pairs, ["sr_2", three, "tr_2"], ridge=0)
    assert energy.names == ["sr_2", "tr_2"]
    assert energy.diagnostics.unmet == []
    assert torch.equal(energy.mu, fit_energy(proposal, pairs, ["sr_2", "tr_2"], ridge=0).mu)
    with pytest.raises(InvalidInput, match="no metric is left"), pytest.warns(UserWarning, match="three"):
        fit_energy(proposal, pairs, [three], ridge=0)


def test_a_metric_that_never_varies_and_misses_its_target_is_infeasible_or_named(tmp_path):
    pairs, proposal = pairs_of_the_toy(), toy.ToyProposal(12)
    options = {"ridge": 0, "directory": tmp_path}
    with pytest.raises(InfeasibleTargets, match=r"above_three \(3, target 4\)\. Leave out above_three.* kept in"):
        fit_energy(proposal, pairs, ["sr_2", above_three], **options)
    drawn = proposal.calls
    with pytest.warns(TargetsNotMet, match=r"above_three \(3, target 4\)"):
        energy = fit_energy(proposal, pairs, ["sr_2", above_three], **{**options, "ridge": "cv"})
    assert (energy.names, energy.diagnostics.unmet) == (["sr_2"], ["above_three"])
    assert proposal.calls == drawn  # candidates are kept and reused


def test_a_lone_surrogate_is_named_by_its_text(proposal):
    texts = [*TEXTS[:7], TEXTS[7] + " \ud835", *TEXTS[8:]]
    with pytest.raises(InvalidInput, match=r"texts\[7\] has the lone surrogate '.ud835'"):
        fit_energy(proposal, texts, ["sr_1"], num_prefixes=10, prefix_tokens=4)
    with pytest.raises(InvalidInput, match=r"texts\[2\] is a NoneType"):
        fit_energy(proposal, [*TEXTS[:2], None, *TEXTS[3:]], ["sr_1"], num_prefixes=10, prefix_tokens=4)


@pytest.mark.parametrize("draw", ["sir", "race"])
def test_spread_gives_what_is_drawn_the_second_moments_of_human_text(draw, tmp_path):
    pairs, proposal = pairs_of_the_toy(), toy.ToyProposal(num_candidates=12)
    names = ["sr_1", "nats"]
    energy = fit_energy(proposal, pairs, names, num_prefixes=200, ridge=0, draw=draw, spread=names)
    assert energy.names == ["sr_1", "nats", "sr_1^2", "sr_1*nats", "nats^2"]
    energy.save(tmp_path / "energy.json")
    energy = Energy.load(tmp_path / "energy.json")
    drawn, _ = collect(toy.ToyProposal(num_candidates=12), pairs.prefixes, None, seed=0, batch_size=4)
    decoded = SIRDecoder(energy, toy.ToyProposal(num_candidates=12)).choose(drawn)
    chances = decoded.weights.double()
    if draw == "race":
        chances = torch.tensor([reference.race_probabilities(row) for row in chances.tolist()])
    values = metrics.features(metrics.parse(names), drawn).double()
    human = metrics.features(metrics.parse(names), toy.as_candidates(torch.tensor(pairs.continuations), 200))[
        :, 0
    ].double()
    mean, scale = human.mean(0), human.std(0)

    def moments(z):
        z = z.clamp(-2.5, 2.5)
        return torch.stack([z[..., 0] ** 2, z[..., 0] * z[..., 1], z[..., 1] ** 2], -1)

    expected = (chances[..., None] * moments((values - mean) / scale)).sum(1).mean(0)
    torch.testing.assert_close(expected, moments((human - mean) / scale).mean(0), atol=1e-5, rtol=0)


def test_spread_of_what_is_not_fitted_is_refused():
    with pytest.raises(InvalidInput, match="spread has 'tr_2': it must be a metric of sr_1, nats, once"):
        fit_energy(toy.ToyProposal(num_candidates=12), pairs_of_the_toy(), ["sr_1", "nats"], spread=["tr_2"])
