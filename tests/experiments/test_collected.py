"""What studies read: parts of it, weights, and the unit of distance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_studies import LISTED, MU, P, collected, tilted

from daemon_fast import fit
from daemon_fast.errors import DataError, FitDidNotConverge, InfeasibleTargets, InvalidInput
from daemon_fast.experiments.collected import Ess, Means, NotDone, attempt
from daemon_fast.experiments.studies import ablation, alignment, forward_kl, one_metric, temperatures, transfer


def test_the_first_of_what_was_collected():
    whole = replace(collected(n=6, m=3), base_log_w=torch.arange(18.0).reshape(6, 3))
    part = whole.first(2, 4)
    assert part.features.shape == (2, 3, 3)
    assert torch.equal(part.base_log_w, whole.base_log_w[:2])
    assert torch.equal(part.human_log_p, whole.human_log_p[:4])
    assert len(whole.first(2).human) == 6
    assert whole.first(6, 6).expected(MU).tolist() == whole.expected(MU).tolist()


def test_metrics_that_are_only_reported_have_no_weight():
    whole = collected(n=2000, m=100)
    assert whole.log_w(MU).tolist() == (-(whole.features[..., :2] @ MU)).tolist()
    assert whole.expected(MU).mean(0).tolist() == pytest.approx((tilted()[0] @ LISTED).tolist(), abs=0.01)
    values = whole.expected()
    assert whole.distance(values) == whole.columns([0, 1]).distance(values[:, :2])


def test_the_model_is_tilted_by_the_candidates_of_another():
    whole = replace(collected(n=5, m=4), log_q=torch.zeros(5, 4), human_log_base=torch.zeros(5))
    other = whole.tilting_model()
    assert torch.equal(other.base_log_w, whole.log_p)
    assert torch.equal(other.human_log_base, whole.human_log_p)


def test_only_what_a_fit_cannot_reach_is_an_answer():
    def failing(error):
        def study():
            raise error("the reason")

        return study

    for error in (InfeasibleTargets, FitDidNotConverge):
        assert attempt(failing(error)) == NotDone("the reason")
    for error in (DataError, InvalidInput, OSError):
        with pytest.raises(error):
            attempt(failing(error))
    assert attempt(lambda: 3) == 3


def test_means_and_effective_sample_sizes():
    means = Means.of(torch.tensor([[1.0], [3.0]]))
    assert means.mean == [2]
    assert means.standard_error == pytest.approx([1])
    assert Ess.of(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])) == Ess(1.5, 1.0, 3)


def test_every_study_measures_distance_in_the_same_unit():
    """The standard deviation of all human text, which is given; not that of the texts of the fit."""
    to_fit, held_out = collected(n=300), collected(n=300, seed=5)

    def distances(unit):
        own, other = (replace(one, spread=unit * one.spread) for one in (to_fit, held_out))
        (at_one,) = temperatures.compute({1.0: (own, other)}, MU).rows
        return [
            other.distance(other.expected(MU)),
            at_one.reused.distance,
            transfer.compute(other, {"a": MU}).rows[0].distance,
            alignment.compute(other, MU, {"sampling": other.features[:, 0]}).of("daemon", expected=True).distance,
            ablation.compute(own, other).rows[0].distance,
            *(row.distance for row in forward_kl.compute(own, other).rows),
        ]

    single, double = distances(1.0), distances(2.0)
    assert single[1:4] == pytest.approx(single[:1] * 3)
    assert single == pytest.approx([2 * distance for distance in double])


def test_refits_are_penalised_as_the_artefact_was():
    to_fit, held_out = collected(n=300), collected(n=300, seed=5)
    whole = fit(to_fit.features[..., :2], to_fit.human[:, :2], ridge=0.2).mu
    want = held_out.distance(held_out.expected(whole))
    assert ablation.compute(to_fit, held_out, ridge=0.2).rows[0].distance == pytest.approx(want)
    (row,) = temperatures.compute({1.0: (to_fit, held_out)}, MU, ridge=0.2).rows
    assert row.refitted.distance == pytest.approx(want)
    alone = fit(to_fit.features[..., :1], to_fit.human[:, :1], ridge=0.2).mu
    assert one_metric.compute(to_fit, held_out, "sr_2", ridge=0.2).mu == pytest.approx(float(alone))


def test_the_toy_is_what_it_says():
    assert collected(n=3, m=2).spread.tolist() == pytest.approx(
        collected(n=50_000, m=1).human.std(0).tolist(), rel=0.05
    )
    assert float(P.sum()) == pytest.approx(1)
