"""The decoder, on a language model whose every sequence can be listed."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import tiny
import torch
import toy
from scipy import stats

from daemon_fast import Energy, ProposalSettings, SIRDecoder, TransformersProposal, metrics, ops
from daemon_fast.errors import ArtefactError, InvalidInput, LowEffectiveSampleSize

MU = torch.tensor([2.0, -1.5], dtype=torch.float64)
METRICS = metrics.parse(["sr_2", "tr_2"])


def energy(proposal, mu=MU, base="proposal"):
    return Energy(METRICS, mu, torch.zeros(2), proposal.settings, base=base)


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


# ---- without replacement, adaptive numbers of candidates, giving up -------------------------------------------------


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
    decoded = SIRDecoder(energy(proposal, base="model"), proposal).choose(candidates, 2, seed=0, replacement=False)
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


STRONG = 3 * MU


def expected_metrics(m, n=40_000, **options):
    """[2] error of the expected metrics, and the mean number of candidates."""
    features = metrics.features(METRICS, toy.as_candidates(toy.SEQUENCES, 1))[0].double()
    tilted = toy.PROBABILITIES * torch.exp(-(features @ STRONG))
    truth = tilted @ features / tilted.sum()
    proposal = toy.ToyProposal(m)
    decoded = SIRDecoder(energy(proposal, STRONG), proposal, batch_size=n, **options)(["x"] * n, seed=1)
    got = (decoded.weights.double()[..., None] * decoded.candidate_features.double()).sum(1).mean(0)
    drawn = decoded.candidates.num_drawn
    return float((got - truth).norm()), m if drawn is None else float(drawn.double().mean()), decoded


@pytest.mark.filterwarnings("ignore::daemon_fast.errors.LowEffectiveSampleSize")
def test_more_candidates_are_drawn_where_the_effective_sample_size_is_low():
    few, _, _ = expected_metrics(4)
    many, _, _ = expected_metrics(16)
    adaptive, mean, decoded = expected_metrics(4, target_ess=3, max_candidates=16)
    drawn = decoded.candidates.num_drawn
    assert {4, 8, 12} <= set(drawn.tolist()) <= {4, 8, 12, 16}
    assert 6 < mean < 8
    assert ((decoded.ess >= 3 - 1e-5) | (drawn == 16)).all()
    absent = torch.arange(decoded.weights.shape[1]) >= drawn[:, None]
    assert (decoded.weights[absent] == 0).all()
    assert not absent.gather(1, decoded.index).any()
    # The bias, as the docstring has it.
    assert mean == pytest.approx(6.8, abs=0.1)
    eight, _, _ = expected_metrics(8)
    got = {"adaptive": adaptive, "4": few, "8": eight}
    assert got == {
        "adaptive": pytest.approx(math.hypot(0.028, 0.015), abs=0.0015),
        "4": pytest.approx(math.hypot(0.032, 0.013), abs=0.0015),
        "8": pytest.approx(math.hypot(0.013, 0.007), abs=0.0015),
    }
    assert many < eight
    # log Z is a mean over those drawn, not over those that make up the number
    log_w = -(decoded.candidate_features.double() @ STRONG)
    log_w = log_w.masked_fill(absent, -torch.inf)
    torch.testing.assert_close(decoded.log_z.double(), log_w.logsumexp(1) - drawn.log(), atol=1e-5, rtol=1e-5)


def test_enough_at_once_draws_no_more():
    proposal = toy.ToyProposal(10)
    decoded = SIRDecoder(energy(proposal), proposal, target_ess=1, max_candidates=40)(["x"] * 3)
    assert proposal.calls == 1
    assert torch.equal(decoded.tokens and decoded.candidates.num_drawn, torch.tensor([10, 10, 10]))
    plain = SIRDecoder(energy(proposal), proposal)(["x"] * 3)
    assert torch.equal(plain.candidates.tokens, decoded.candidates.tokens)
    assert torch.equal(plain.index, decoded.index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_ess": 3}, "given together"),
        ({"max_candidates": 30}, "given together"),
        ({"target_ess": 0.5, "max_candidates": 30}, "target_ess = 0.5 must be from 1 to max_candidates = 30"),
        ({"target_ess": 31, "max_candidates": 30}, "target_ess = 31 must be"),
        ({"target_ess": 3, "max_candidates": 9}, "max_candidates = 9 must be >= the proposal's num_candidates = 10"),
        ({"give_up_below": 0.1}, "give_up_below = 0.1 must be from 0 to below 1 / num_candidates = 0.1"),
        ({"give_up_below": -1}, "give_up_below = -1 must be"),
    ],
)
def test_options_are_checked(options, message):
    proposal = toy.ToyProposal(10)
    with pytest.raises(InvalidInput, match=message):
        SIRDecoder(energy(proposal), proposal, **options)


def looping(**settings):
    """A tiny model whose candidates repeat themselves a lot, some more than others."""
    settings = {"num_candidates": 12, "max_new_tokens": 48, "min_new_tokens": 8, "temperature": 0.5, **settings}
    eos = list(range(12, 24))  # some end early, and leave no doubt of their weight
    return TransformersProposal(tiny.model("gpt2"), tiny.tokenizer(), eos_token_ids=eos, **settings)


def test_candidates_that_can_not_win_are_given_up():
    proposal, share = looping(), 1e-3
    fitted = Energy(METRICS, torch.tensor([200.0, 150.0], dtype=torch.float64), torch.zeros(2), proposal.settings)
    prefixes = [[5, 9, 30], [7], [8, 8]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LowEffectiveSampleSize)
        whole = SIRDecoder(fitted, proposal)(prefixes, num_samples=50)
        early = SIRDecoder(fitted, proposal, give_up_below=share)(prefixes, num_samples=50)
    given_up = early.candidates.excluded.reshape(early.weights.shape)
    assert 3 <= given_up.sum() < given_up.numel()
    assert (early.candidates.lengths.reshape(given_up.shape)[given_up] < 48).all()
    assert (early.weights[given_up] == 0).all()
    # Those given up would have had less than the share, as promised; the others are what they are without.
    assert (whole.weights[given_up] < share).all()
    kept = ~given_up.flatten()
    assert torch.equal(early.candidates.tokens[kept], whole.candidates.tokens[kept])
    change = (early.weights - whole.weights).abs().sum(1) / 2
    assert (change < 12 * share).all()


def test_giving_up_needs_bounds():
    proposal = looping(max_new_tokens=20, min_new_tokens=20)

    def own(candidates):
        return candidates.lengths.float()

    for fitted, message in (
        (Energy(metrics.parse([own]), torch.ones(1).double(), torch.zeros(1), proposal.settings), "own has no bounds"),
        (energy(proposal, base="model"), "base = 'model': its log-weights have no bounds"),
    ):
        with pytest.raises(InvalidInput, match=message):
            SIRDecoder(fitted, proposal, give_up_below=0.01)(["w1 w2"])
