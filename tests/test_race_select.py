"""race_select against the plain-Python definition, and the law of what a race chooses."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from strategies import Tilt, check_selection, tilts

import daemon_fast
from daemon_fast import reference

F64 = torch.float64


@given(tilts(), st.integers(0, 2**32 - 1))
@settings(max_examples=300)
def test_equals_the_definition(tilt, seed):
    uniforms = torch.from_numpy(np.random.default_rng(seed).random(tilt.features.shape[:2]))
    check_selection("race_select", tilt, uniforms)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("M", [1, 2, 31, 32, 33, 64, 65, 1024, 1025, 4097, 20_000])
def test_every_size_on_every_device(device, M, dtype):
    generator = torch.Generator().manual_seed(M)
    features = torch.randn(3, M, 4, generator=generator, dtype=F64).to(dtype)
    base = torch.randn(3, M, generator=generator).masked_fill(torch.rand(3, M, generator=generator) < 0.3, -math.inf)
    base[:, 0] = 0
    uniforms = torch.rand(3, M, generator=generator, dtype=F64)
    for given_base in (None, base, base.double()):
        tilt = Tilt(features, torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=F64), given_base)
        check_selection("race_select", tilt, uniforms, device)


def test_ties_zeros_and_candidates_that_cannot_win(device):
    """Of equal arrivals the lowest index wins; a uniform of 0 arrives before all others, but for a weight of zero."""
    minus = -math.inf
    log_w = torch.tensor([[0.0, 0.0, 0.0], [minus, 0.0, 0.0], [minus, -9.0, 0.0], [-9.0, 0.0, 0.0]], dtype=F64)
    uniforms = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.75, 0.75], [0.0, 0.0, 1e-300], [0.0, 0.0, 0.5]], dtype=F64)
    features, mu = torch.zeros(4, 3, 1, dtype=F64, device=device), torch.zeros(1, dtype=F64, device=device)
    out = daemon_fast.race_select(features, mu, uniforms.to(device), log_w.to(device))
    assert out.index.tolist() == [1, 1, 1, 0]


def test_several_draws_are_races_of_their_own(device):
    features, mu = torch.randn(4, 25, 3, dtype=F64, device=device), torch.randn(3, dtype=F64, device=device)
    uniforms = torch.rand(4, 7, 25, dtype=F64, device=device)
    many = daemon_fast.race_select(features, mu, uniforms)
    assert many.index.shape == (4, 7)
    for s in range(7):
        one = daemon_fast.race_select(features, mu, uniforms[:, s].contiguous())
        assert torch.equal(one.index, many.index[:, s])
    plain = daemon_fast.sir_select(features, mu, uniforms[..., 0].contiguous())
    for a, b in zip(many[1:], plain[1:], strict=True):
        assert torch.equal(a, b)


WEIGHTS = ([1.0], [0.3, 0.3], [5.0, 1.0, 0.2], [1.0, 0.0, 1e-3, 0.5], [0.9**j for j in range(25)], [2.0] * 7)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_selection_probabilities_by_integration(weights):
    """p_i is the integral over its arrival of the chance that all others come later."""
    r = np.array(weights) / max(weights)
    for i, got in enumerate(reference.race_probabilities(weights)):
        later = lambda t, i=i: r[i] * np.prod(1 - np.delete(r, i) * t)  # noqa: E731
        want, _ = integrate.quad(later, 0, 1, epsabs=1e-13, epsrel=1e-12)
        assert got == pytest.approx(want, abs=1e-12)
    assert sum(reference.race_probabilities(weights)) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_selection_probabilities_by_simulation(weights):
    draws, m = 1_000_000, len(weights)
    uniforms = torch.rand(1, draws, m, dtype=F64, generator=torch.Generator().manual_seed(m))
    log_w = torch.tensor(weights, dtype=F64).log()[None]
    out = daemon_fast.race_select(torch.zeros(1, m, 0), torch.zeros(0, dtype=F64), uniforms, log_w)
    counts = np.bincount(out.index[0].numpy(), minlength=m)
    expected = draws * np.array(reference.race_probabilities(weights))
    assert counts[expected == 0].sum() == 0
    if m > 1:
        assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def laws_of_the_chosen(p, w, M):
    """[classes] law of what SIR and the race choose of M candidates drawn from p, by enumeration of how many of the
    candidates are of each class; all of a class have one weight."""
    sir, race = np.zeros(len(p)), np.zeros(len(p))
    for drawn in itertools.combinations_with_replacement(range(len(p)), M):
        counts = np.bincount(drawn, minlength=len(p))
        chance = stats.multinomial.pmf(counts, M, p)
        sir += chance * counts * w / (counts @ w)
        won = reference.race_probabilities([w[c] for c in drawn])
        np.add.at(race, list(drawn), chance * np.array(won))
    return sir, race


DIVERGENCES = {
    "total variation": lambda q, p: 0.5 * np.abs(q - p).sum(),
    "KL": lambda q, p: (q * np.log(q / p)).sum(),
    "reverse KL": lambda q, p: (p * np.log(p / q)).sum(),
    "chi-square": lambda q, p: ((q - p) ** 2 / p).sum(),
}


@pytest.mark.parametrize("mu", [-3.0, 10.0])
def test_never_farther_from_the_target_than_sir(mu):
    """On the language model that can be listed, tilted by sr_2: the 81 sequences fall into three classes."""
    sr_2 = daemon_fast.repetition(toy.SEQUENCES, ngrams=[2], windows=[])[:, 0].numpy()
    values = np.unique(sr_2)
    p = np.array([toy.PROBABILITIES.numpy()[sr_2 == value].sum() for value in values])
    w = np.exp(-mu * values.astype(np.float64))
    target = p * w / (p @ w)
    far = {}
    for M in range(1, 17):
        sir, race = laws_of_the_chosen(p, w, M)
        assert race.sum() == pytest.approx(1, abs=1e-12)
        for name, divergence in DIVERGENCES.items():
            assert divergence(race, target) <= divergence(sir, target) + 1e-12, (name, M)
        far[M] = DIVERGENCES["total variation"](sir, target), DIVERGENCES["total variation"](race, target)
    assert far[1][0] == pytest.approx(far[1][1])
    assert far[16][1] < 0.1 * far[16][0]  # the one squares where the other halves


def test_same_result_for_any_number_of_threads(threads):
    features, mu = torch.randn(2000, 25, 9), torch.randn(9, dtype=F64)
    uniforms = torch.rand(2000, 25, dtype=F64)
    threads(1)
    one = daemon_fast.race_select(features, mu, uniforms)
    threads(3)
    for a, b in zip(daemon_fast.race_select(features, mu, uniforms), one, strict=True):
        assert torch.equal(a, b)


def test_opcheck(device):
    op = torch.ops.daemon_fast.race_select.default
    features, mu = torch.randn(3, 5, 2, device=device), torch.randn(2, dtype=F64, device=device)
    base, uniforms = torch.randn(3, 5, device=device), torch.rand(3, 4, 5, dtype=F64, device=device)
    torch.library.opcheck(op, (features, mu, uniforms[:, 0]))
    torch.library.opcheck(op, (features.double(), mu, uniforms, base))


FEATURES, MU, UNIFORMS = torch.zeros(3, 2, 1), torch.ones(1, dtype=F64), torch.full((3, 2), 0.5, dtype=F64)


def test_bad_rows_are_named():
    features, base = FEATURES.clone(), torch.zeros(3, 2)
    base[2] = -math.inf
    with pytest.raises(RuntimeError, match="race_select: all 2 log-weights of row 2 are -inf"):
        daemon_fast.race_select(features, MU, UNIFORMS, base)
    for bad, minus in ((math.nan, math.nan), (math.inf, -math.inf)):
        features[1, 1, 0] = minus
        with pytest.raises(RuntimeError, match=f"race_select: log-weight of row 1, candidate 1 is {bad}"):
            daemon_fast.race_select(features, MU, UNIFORMS, base)
    for bad in (1.0, -0.1, math.nan):
        with pytest.raises(RuntimeError, match=rf"race_select: uniforms of row 2 hold {bad:g}, .* not in \[0, 1\)"):
            daemon_fast.race_select(FEATURES, MU, torch.tensor([[0, 0.5], [0.9, 0], [0, bad]], dtype=F64))


@pytest.mark.parametrize("place", ["cpu", "meta"])  # on meta it is the fake kernel that says so
@pytest.mark.parametrize(
    ("uniforms", "message"),
    [
        (UNIFORMS[:, 0], r"race_select: uniforms must have shape \[G, M\] or \[G, S, M\], got \[3\]"),
        (UNIFORMS[None, None], r"uniforms must have shape \[G, M\] or \[G, S, M\], got \[1, 1, 3, 2\]"),
        (UNIFORMS.float(), "uniforms must be float64, got float32"),
        (UNIFORMS[:2], r"uniforms must have features.shape\[0\] = 3 at dimension 0, got shape \[2, 2\]"),
        (UNIFORMS[:, :1], r"uniforms must have features.shape\[1\] = 2 at dimension 1, got shape \[3, 1\]"),
        (UNIFORMS[:, :, None], r"uniforms must have features.shape\[1\] = 2 at dimension 2, got shape \[3, 2, 1\]"),
    ],
)
def test_a_wrong_shape_or_dtype_is_named(uniforms, message, place):
    with pytest.raises(RuntimeError, match=message):
        daemon_fast.race_select(FEATURES.to(place), MU.to(place), uniforms.to(place))
