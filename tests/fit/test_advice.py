"""What is said where targets are out of reach, against the candidates that a longer draw really gives."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import toy
from test_fit import margin_by_linear_programming

from daemon_fast import fit, metrics
from daemon_fast.errors import InfeasibleTargets
from daemon_fast.fit.advice import MOST, advice, candidates_needed, leave_out
from daemon_fast.fit.dual import Problem
from daemon_fast.fit.samples import Block, InMemory

F64 = torch.float64


def problem_of(features, targets, normalization="per_prefix"):
    names = tuple(f"metric {k}" for k in range(features.shape[2]))
    return Problem.standardised(InMemory(Block(features)), targets, normalization, names, 0.0)


@pytest.mark.parametrize("seed", range(12))
def test_what_to_leave_out_is_the_fewest_metrics_by_linear_programming(seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(12, 6, 4, generator=generator, dtype=F64)
    targets = features.mean((0, 1)) + torch.randn(4, generator=generator, dtype=F64)
    if margin_by_linear_programming(features, targets) > -1e-4:
        targets[seed % 4] += 3

    def margin_without(some):
        kept = [k for k in range(4) if k not in some]
        return margin_by_linear_programming(features[..., kept], targets[kept])

    found = [int(name.split()[1]) for name in leave_out(problem_of(features, targets))]
    sizes = [size for size in range(1, 4) if any(margin_without(some) > 1e-4 for some in combinations(range(4), size))]
    if not sizes:
        assert len(found) in (0, 3)
        return
    assert len(found) == sizes[0]
    assert margin_without(found) > -1e-4


def test_metrics_that_only_all_together_fail_leave_one_out():
    features = torch.randn(20, 4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    features = torch.cat([features, features.sum(2, keepdim=True)], 2)  # the third is the sum of the others
    targets = torch.tensor([0.2, 0.2, 1.0], dtype=F64)
    assert len(leave_out(problem_of(features, targets))) == 1
    with pytest.raises(
        InfeasibleTargets, match=r"jointly .*N = 20 prefixes and M = 4 .*leave out metric \d: the others"
    ):
        fit(features, targets)


def largest_of(values, probabilities, of):
    """Expected largest of so many draws from a law that is listed."""
    order = values.argsort()
    cumulative = probabilities[order].cumsum(0)
    return float(values[order] @ (cumulative**of - torch.cat([torch.zeros(1, dtype=F64), cumulative[:-1]]) ** of))


@pytest.mark.parametrize("target", [0.65, 0.68, 0.71, 0.73])
def test_how_many_candidates_it_takes_is_what_the_listed_law_says(target):
    drawn = toy.ToyProposal(4).propose(["x"] * 400, seed=0)
    one = metrics.parse(["tr_2"])
    features = metrics.features(one, drawn)
    law = metrics.features(one, toy.as_candidates(toy.SEQUENCES, 1))[0, :, 0].double()
    needed = next(m for m in range(1, 1000) if largest_of(law, toy.PROBABILITIES, m) >= target)
    found = candidates_needed(problem_of(features, torch.tensor([target], dtype=F64)), torch.ones(1, dtype=F64))
    reach = float(features.amax(1).mean())
    assert reach < target  # it is out of reach of these
    assert found is not None
    assert abs(found - needed) <= max(1, 0.15 * needed)


def test_no_number_of_candidates_is_named_where_none_goes_as_far():
    features = torch.rand(20, 5, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    one = torch.ones(1, dtype=F64)
    assert candidates_needed(problem_of(features, 1.1 * one), one) is None
    with pytest.raises(InfeasibleTargets, match=f"not even M = {5 * MOST} is expected to be enough"):
        fit(features, 1.1 * one)
    assert candidates_needed(problem_of(features, 1.1 * one, "global"), one) is None


def test_noise_of_few_human_texts_is_named_where_it_may_be_all():
    features = torch.rand(8, 5, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    reach = float(features.amax(1).mean())
    noisy = reach + 0.05 + 0.4 * torch.tensor([-1.0, 1.0], dtype=F64).repeat(4)[:, None]
    problem = problem_of(features, noisy.mean(0))
    gap, spread = float(noisy.mean()) - reach, float(noisy.std())
    assert 0 < gap < 2 * spread / 8**0.5
    assert f"about {int((2 * spread / gap) ** 2) + 1} tell" in advice(problem, noisy)
    sure = reach + 0.05 + 0.001 * torch.tensor([-1.0, 1.0], dtype=F64).repeat(4)[:, None]
    assert "human texts" not in advice(problem_of(features, sure.mean(0)), sure)
