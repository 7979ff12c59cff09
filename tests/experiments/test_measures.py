"""Distance to human, and perplexity of human text under p_mu on a model that can be listed."""

from __future__ import annotations

import math

import pytest
import torch
import toy

from daemon_fast import Energy, SIRDecoder, metrics
from daemon_fast.errors import InvalidInput
from daemon_fast.experiments.measures import (
    distance_to_human,
    human_perplexity,
    noise_floor,
    relative_rmse,
    weighted_mean,
)

MU = torch.tensor([2.0, -1.5], dtype=torch.float64)
METRICS = metrics.parse(["sr_2", "tr_2"])


def test_distance_by_hand():
    human = torch.tensor([[1.0, 10.0], [3.0, 30.0]])  # means 2 and 20, deviations sqrt(2) and sqrt(200)
    method = torch.tensor([[4.0, 20.0]])
    assert distance_to_human(method, human) == pytest.approx(math.sqrt((2 / math.sqrt(2)) ** 2 / 2))
    assert distance_to_human(method, human, torch.tensor([1.0, 1.0])) == pytest.approx(math.sqrt(2))
    assert relative_rmse(method, human) == pytest.approx(math.sqrt(1.0 / 2))
    with pytest.raises(InvalidInput, match="metric 0 does not vary over the human texts"):
        distance_to_human(method, torch.ones(3, 2))


def test_noise_floor_is_the_distance_of_a_perfect_method():
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(400):
        human = torch.randn(50, 8, generator=generator)
        squares.append(distance_to_human(torch.zeros(1, 8), human) ** 2)
    assert math.sqrt(sum(squares) / 400) == pytest.approx(noise_floor(50), rel=0.05)


def test_weighted_mean():
    features, weights = torch.randn(3, 4, 2), torch.softmax(torch.randn(3, 4), 1)
    torch.testing.assert_close(weighted_mean(features, weights), torch.einsum("nmk,nm->nk", features, weights).double())


@pytest.mark.parametrize("base", ["proposal", "model"])
def test_perplexity_of_text_from_p_mu_itself(base):
    """Text from p_mu has cross-entropy H(p_mu) under p_mu, lower than under the model by KL(p_mu || p)."""
    features = metrics.features(METRICS, toy.as_candidates(toy.SEQUENCES, 1))[0].double()
    tilted = toy.PROBABILITIES * torch.exp(-(features @ MU))
    p_mu = tilted / tilted.sum()
    entropy = -float(p_mu @ p_mu.log()) / toy.LENGTH
    kl = float(p_mu @ (p_mu / toy.PROBABILITIES).log()) / toy.LENGTH

    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(p_mu, 4000, replacement=True, generator=generator)
    human = toy.as_candidates(toy.SEQUENCES[drawn], 4000)
    proposal = toy.ToyProposal(num_candidates=400)
    energy = Energy(METRICS, MU, torch.zeros(2), proposal.settings, base=base)
    decoded = SIRDecoder(energy, proposal, batch_size=4000)(["x"] * 4000)
    result = human_perplexity(energy, human, energy.features(human), decoded)

    assert math.log(result.tilted) == pytest.approx(entropy, abs=0.02)
    assert result.gain == pytest.approx(kl, abs=4 * result.gain_error)
    assert math.log(result.base / result.tilted) == pytest.approx(result.gain, rel=1e-6)
    assert result.model == pytest.approx(result.base)
    assert 0 < result.gain_error < kl / 5
