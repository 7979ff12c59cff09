"""The decoder, on a language model whose every sequence can be listed."""

from __future__ import annotations

import dataclasses
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import toy
from scipy import stats

from daemon_fast import Energy, ProposalSettings, SIRDecoder, metrics, ops, reference
from daemon_fast.errors import ArtefactError, InvalidInput, LowEffectiveSampleSize

MU = torch.tensor([2.0, -1.5], dtype=torch.float64)
METRICS = metrics.parse(["sr_2", "tr_2"])


def energy(proposal, mu=MU, base="proposal", draw="sir"):
    return Energy(METRICS, mu, torch.zeros(2), proposal.settings, base=base, draw=draw)


def exact():
    """[81] p_mu, and [81, 2] features, by enumeration."""
    features = metrics.features(METRICS, toy.as_candidates(toy.SEQUENCES, 1))[0].double()
    tilted = toy.PROBABILITIES * torch.exp(-(features @ MU))
    return tilted / tilted.sum(), features


def test_draws_agree_with_exact_enumeration():
    proposal = toy.ToyProposal(num_candidates=200)
    decoded = SIRDecoder(energy(proposal), proposal, batch_size=500)(["x"] * 4000, seed=1)
    chosen = torch.tensor([rows[0] for rows in decoded.tokens])
    which = (chosen * torch.tensor([27, 9, 3, 1])).sum(1)
    counts = np.bincount(which.numpy(), minlength=81)
    p_mu, _ = exact()
    assert stats.chisquare(counts, p_mu.numpy() * 4000).pvalue > 1e-3
    assert stats.chisquare(counts, toy.PROBABILITIES.numpy() * 4000).pvalue < 1e-9  # and not with the model


def test_the_error_of_the_draw_shrinks_like_one_over_m():
    p_mu, features = exact()
    truth = p_mu @ features
    sizes, samples, bias = [2, 4, 8, 16, 32], 2_000_000, []
    drawn = torch.multinomial(toy.PROBABILITIES, samples, replacement=True, generator=torch.Generator().manual_seed(5))
    for m in sizes:
        proposal = toy.ToyProposal(m)
        candidates = toy.as_candidates(toy.SEQUENCES[drawn], samples // m)
        decoded = SIRDecoder(energy(proposal), proposal).choose(candidates)
        # What the draw gives on average, exactly: no noise but that of the candidates.
        expected = (decoded.weights.double()[..., None] * decoded.candidate_features.double()).sum(1).mean(0)
        bias.append(float((expected - truth).norm()))
    slope = np.polyfit(np.log(sizes), np.log(bias), 1)[0]
    assert -1.2 < slope < -0.8


def test_the_artefacts_rule_draws():
    """Of the same candidates each rule chooses by its own law, and each of several samples by numbers of its own."""
    proposal, rows = toy.ToyProposal(num_candidates=5), toy.SEQUENCES[[0, 1, 3, 30, 40]]
    candidates = toy.as_candidates(rows.repeat(100, 1), 100)
    for draw, law in (("sir", lambda w: w), ("race", reference.race_probabilities)):
        decoded = SIRDecoder(energy(proposal, draw=draw), proposal).choose(candidates, num_samples=200, seed=7)
        chances = np.array(law(decoded.weights[0].double().tolist()))
        counts = np.bincount(decoded.index.flatten().numpy(), minlength=5)
        assert stats.chisquare(counts, chances / chances.sum() * 20_000).pvalue > 1e-3
        other = chances**1.1
        assert stats.chisquare(counts, other / other.sum() * 20_000).pvalue < 1e-3  # it can tell laws apart
        again = SIRDecoder(energy(proposal, draw=draw), proposal).choose(candidates, num_samples=200, seed=7)
        assert torch.equal(again.index, decoded.index)


@pytest.mark.parametrize("draw", ["sir", "race"])
def test_what_chooses_is_independent_of_what_drew(draw):
    """One seed for both: by mu = 0 and M = 2 the chosen first token has the model's own distribution."""
    zero, counts = torch.zeros(2, dtype=torch.float64), np.zeros(81)

    class FromUniforms(toy.ToyProposal):
        """By inverse CDF from float64 uniforms of the seed, as `TransformersProposal` draws its tokens."""

        def propose(self, prefixes, seed):
            uniforms = torch.rand(len(prefixes) * 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            drawn = torch.searchsorted(toy.PROBABILITIES.cumsum(0), uniforms).clamp_max(80)
            return toy.as_candidates(toy.SEQUENCES[drawn], len(prefixes))

    proposal = FromUniforms(num_candidates=2)
    decoder = SIRDecoder(energy(proposal, zero, draw=draw), proposal)
    for seed in range(40):
        tokens = decoder.choose(proposal.propose(["x"] * 100, seed), seed=seed).tokens
        which = (torch.tensor(tokens)[:, 0] * torch.tensor([27, 9, 3, 1])).sum(1)
        counts += np.bincount(which.numpy(), minlength=81)
    assert stats.chisquare(counts, toy.PROBABILITIES.numpy() * 4000).pvalue > 1e-3


def test_without_replacement_a_race_goes_on():
    """The first S to arrive: the first has the race's law, and with S = M all are drawn."""
    proposal, rows = toy.ToyProposal(num_candidates=5), toy.SEQUENCES[[0, 1, 3, 30, 40]]
    candidates = toy.as_candidates(rows.repeat(20_000, 1), 20_000)
    decoder = SIRDecoder(energy(proposal, draw="race"), proposal)
    index = decoder.choose(candidates, num_samples=5, replacement=False).index
    assert torch.equal(index.sort(1).values, torch.arange(5).expand(20_000, 5))
    weights = decoder.choose(candidates).weights[0].double()
    chances = np.array(reference.race_probabilities(weights.tolist()))
    assert stats.chisquare(np.bincount(index[:, 0].numpy(), minlength=5), 20_000 * chances).pvalue > 1e-3
    uniforms = np.random.default_rng(0).random((200_000, 5))
    second = np.bincount((uniforms / weights.numpy()).argsort(1)[:, 1], minlength=5) / 200_000
    assert stats.chisquare(np.bincount(index[:, 1].numpy(), minlength=5), 20_000 * second).pvalue > 1e-3


def test_log_z_estimates_the_partition_function():
    _, features = exact()
    z = float((toy.PROBABILITIES * torch.exp(-(features @ MU))).sum())
    proposal = toy.ToyProposal(num_candidates=5000)
    decoded = SIRDecoder(energy(proposal), proposal)(["x"] * 4)
    np.testing.assert_allclose(decoded.log_z.exp().numpy(), z, rtol=0.05)


def test_output_is_consistent():
    proposal = toy.ToyProposal(num_candidates=25)
    decoded = SIRDecoder(energy(proposal), proposal, batch_size=2)(["a", "b", [1, 2]], num_samples=4, seed=3)
    assert decoded.index.shape == (3, 4)
    assert proposal.calls == 2
    for i in range(3):
        for s in range(4):
            row = i * 25 + int(decoded.index[i, s])
            assert decoded.tokens[i][s] == decoded.candidates.tokens[row].tolist()
            assert decoded.texts[i][s] == decoded.candidates.texts[row]
            assert torch.equal(decoded.features[i, s], decoded.candidate_features[i, decoded.index[i, s]])
    torch.testing.assert_close(decoded.weights.sum(1), torch.ones(3))
    assert set(decoded.seconds) == {"propose", "metrics", "select"}
    assert all(value >= 0 for value in decoded.seconds.values())


def test_a_seed_gives_the_same_again():
    proposal = toy.ToyProposal(num_candidates=10)
    decoder = SIRDecoder(energy(proposal), proposal, batch_size=2)
    first, again, other = (decoder(["a"] * 20, seed=seed) for seed in (1, 1, 2))
    assert first.tokens == again.tokens
    assert first.tokens != other.tokens


def test_a_single_string_is_one_prefix():
    proposal = toy.ToyProposal(num_candidates=10)
    assert len(SIRDecoder(energy(proposal), proposal)("abc").texts) == 1


def test_base_model_corrects_for_the_proposal():
    # Candidates of uniform q, tilted by mu = 0 with base log p - log q: the draw follows p.
    proposal = toy.ToyProposal(num_candidates=2000)
    uniform = torch.randint(81, (100 * 2000,), generator=torch.Generator().manual_seed(0))
    candidates = toy.as_candidates(toy.SEQUENCES[uniform], 100)
    object.__setattr__(candidates, "token_log_q", torch.full_like(candidates.token_log_p, -np.log(3)))
    decoder = SIRDecoder(energy(proposal, torch.zeros(2, dtype=torch.float64), base="model"), proposal)
    decoded = decoder.choose(candidates)
    which = (candidates.tokens * torch.tensor([27, 9, 3, 1])).sum(1).reshape(100, 2000)
    mass = torch.zeros(100, 81).scatter_add_(1, which, decoded.weights).mean(0)
    torch.testing.assert_close(mass.double(), toy.PROBABILITIES, rtol=0, atol=0.004)


def test_low_ess_warns_and_says_what_to_do():
    proposal = toy.ToyProposal(num_candidates=25)
    decoder = SIRDecoder(energy(proposal, torch.tensor([0.0, 200.0], dtype=torch.float64)), proposal)
    candidates = toy.as_candidates(torch.tensor([[0, 1, 2, 0]] + [[0, 0, 0, 0]] * 24), 1)
    with pytest.warns(LowEffectiveSampleSize, match=r"1 of 1 prefixes .* below 2 of 25 .*Draw more candidates"):
        decoder.choose(candidates)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SIRDecoder(energy(proposal), proposal)(["x"] * 5)


def test_more_draws_than_memory_holds_are_refused():
    proposal = toy.ToyProposal(num_candidates=4)
    with pytest.raises(InvalidInput, match=r"num_samples = 1000000000000 of 1 prefixes takes at least .* lower num_s"):
        SIRDecoder(energy(proposal), proposal)("x", num_samples=10**12)


def test_another_vocabulary_is_an_error_and_other_settings_a_warning():
    proposal = toy.ToyProposal(num_candidates=25)
    fitted = energy(proposal)
    proposal.settings = ProposalSettings(**{**proposal.settings.to_json(), "num_candidates": 5})
    with pytest.warns(UserWarning, match="num_candidates 25 -> 5"):
        SIRDecoder(fitted, proposal)
    proposal.settings = ProposalSettings("other", "4-other")
    with pytest.raises(ArtefactError, match=r"of toy \(3-toy\), the proposal's is that of other \(4-other\)"):
        SIRDecoder(fitted, proposal)


def test_bad_calls():
    proposal = toy.ToyProposal(num_candidates=5)
    decoder = SIRDecoder(energy(proposal), proposal)
    with pytest.raises(InvalidInput, match="there are no prefixes"):
        decoder([])
    with pytest.raises(InvalidInput, match="num_samples = 0 must be >= 1"):
        decoder("a", num_samples=0)
    with pytest.raises(InvalidInput, match="batch_size = 0"):
        SIRDecoder(energy(proposal), proposal, batch_size=0)
    for bad in (2.0, None, True, "2", np.bool_(True), np.float64(2)):
        with pytest.raises(InvalidInput, match=r"batch_size = .* must be an integer >= 1"):
            SIRDecoder(energy(proposal), proposal, batch_size=bad)
        for decode in (decoder, partial(decoder.choose, proposal.propose(["a"], 0))):
            with pytest.raises(InvalidInput, match=r"num_samples = .* must be an integer >= 1"):
                decode(*(["a"] if decode is decoder else []), num_samples=bad)


def test_numpy_integers_count():
    proposal = toy.ToyProposal(num_candidates=5)
    want = SIRDecoder(energy(proposal), proposal, batch_size=2)(["a", "b"], num_samples=3, seed=4)
    got = SIRDecoder(energy(proposal), proposal, batch_size=np.int64(2))(
        ["a", "b"], num_samples=np.int32(3), seed=np.int64(4)
    )
    assert got.texts == want.texts


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_prefix_without_weights_is_the_same_error_on_every_device(device, bad):
    proposal = toy.ToyProposal(num_candidates=4)
    candidates = proposal.propose(["x"] * 3, 0)
    log_p = candidates.token_log_p.clone()
    log_p[4:8, 0] = bad  # all candidates of prefix 1
    moved = {name: getattr(candidates, name).to(device) for name in ("tokens", "lengths", "token_log_q")}
    candidates = dataclasses.replace(candidates, token_log_p=log_p.to(device), **moved)
    with pytest.raises(InvalidInput, match="base log-weights of prefix 1"):
        SIRDecoder(energy(proposal, base="model"), proposal).choose(candidates)


def test_a_row_that_a_gpu_marks_as_undrawable_is_an_error(monkeypatch):
    # A CUDA operator can't raise for what it finds on the device: it answers index -1 and NaN.
    proposal = toy.ToyProposal(num_candidates=4)
    real = ops.sir_select

    def marked(*arguments):
        selection = real(*arguments)
        selection.index[1] = -1
        return selection

    monkeypatch.setattr(ops, "sir_select", marked)
    with pytest.raises(InvalidInput, match="prefix 1 has no candidate to draw"):
        SIRDecoder(energy(proposal), proposal)(["x"] * 3)


@pytest.mark.parametrize("draw", ["sir", "race"])
def test_several_draws_have_the_law_of_one_and_a_mean_that_varies_less(draw):
    size, samples, texts = 8, 4, 20_000
    drawn = torch.multinomial(toy.PROBABILITIES, size, replacement=True, generator=torch.Generator().manual_seed(2))
    proposal = toy.ToyProposal(num_candidates=size)
    decoder = SIRDecoder(energy(proposal, draw=draw), proposal)
    candidates = toy.as_candidates(toy.SEQUENCES[drawn].repeat(texts, 1), texts)
    decoded = decoder.choose(candidates, num_samples=samples)
    weights = decoded.weights[0].double()
    chances = np.array(reference.race_probabilities(weights.tolist())) if draw == "race" else weights.numpy()
    for column in decoded.index.T:  # each by itself
        counts = np.bincount(column.numpy(), minlength=size)
        assert stats.chisquare(counts[chances > 0], texts * chances[chances > 0]).pvalue > 1e-3
    energies = (decoded.candidate_features.double() @ MU).gather(1, decoded.index)
    alone = float(chances @ (decoded.candidate_features[0].double() @ MU).numpy() ** 2)
    alone -= float(chances @ (decoded.candidate_features[0].double() @ MU).numpy()) ** 2
    assert float(energies.mean(1).var()) < alone / samples / 2
    # What one candidate is drawn more or less often than S times its chance, is less than one.
    often = torch.stack([(decoded.index == j).sum(1) for j in range(size)], 1).numpy()
    assert (abs(often - samples * chances) < 1).all()


def test_without_replacement_draws_are_those_of_successive_sampling():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    proposal = toy.ToyProposal(num_candidates=4)
    rows = toy.SEQUENCES[[0, 1, 3, 30]]
    features = metrics.features(METRICS, toy.as_candidates(rows, 1))[0].double()
    base = weights.log() + features @ MU  # so that the weights are those above
    candidates = toy.as_candidates(rows.repeat(20_000, 1), 20_000)
    log_p = torch.zeros_like(candidates.token_log_p)
    log_p[:, 0] = base.repeat(20_000)
    candidates = dataclasses.replace(candidates, token_log_p=log_p, token_log_q=torch.zeros_like(log_p))
    decoded = SIRDecoder(energy(proposal, base="model"), proposal).choose(
        candidates, num_samples=2, seed=0, replacement=False
    )
    np.testing.assert_allclose(decoded.weights[0].numpy(), weights, atol=1e-6)
    first, second = decoded.index.T
    assert (first != second).all()
    pairs = np.bincount((first * 4 + second).numpy(), minlength=16).reshape(4, 4)
    off = ~np.eye(4, dtype=bool)
    expected = (weights[:, None] * weights / (1 - weights[:, None])).numpy()
    assert stats.chisquare(pairs[off], 20_000 * expected[off]).pvalue > 1e-3


def test_without_replacement_there_must_be_enough():
    proposal = toy.ToyProposal(num_candidates=3)
    decoder = SIRDecoder(energy(proposal), proposal)
    rows = decoder(["x"] * 5, num_samples=3, replacement=False).index
    assert torch.equal(rows.sort(1).values, torch.arange(3).expand(5, 3))
    with pytest.raises(InvalidInput, match="num_samples = 4 without replacement: prefix 0 has 3 candidates"):
        decoder(["x"] * 5, num_samples=4, replacement=False)
