"""Metrics as objects, against the definitions."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
import toy

from daemon_fast import Candidates, metrics, ops, reference
from daemon_fast.errors import ArtefactError, InvalidInput, UnknownMetric


class HashEncoder:
    """Deterministic embeddings; counts what it embeds."""

    def __init__(self):
        self.seen = []

    def encode(self, sentences, **kwargs):
        self.seen += sentences
        return np.array([[len(s), s.count("1"), s.count("2") + 1.0] for s in sentences])


def candidates(n=3, m=4, t=12, seed=0, empty=None):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (n * m,), generator=generator)
    if empty is not None:
        lengths[empty] = 0
    return Candidates(
        tokens=torch.randint(0, 4, (n * m, t), generator=generator),
        lengths=lengths,
        token_log_p=-torch.rand(n * m, t, generator=generator),
        token_log_q=-torch.rand(n * m, t, generator=generator),
        prefix_tokens=[[i, 1, 2] for i in range(n)],
        detokenize=lambda rows: [" ".join(map(str, row)) for row in rows],
    )


def rows_of(c):
    return [row[:n] for row, n in zip(c.tokens.tolist(), c.lengths.tolist(), strict=True)]


def test_every_built_in_metric_equals_its_definition():
    c, encoder = candidates(), HashEncoder()
    got = metrics.features(metrics.parse(["sr_2", "tr_8", "div", "ent", "coh", "sr_5"], encoder), c)
    assert got.shape == (3, 4, 6)
    assert got.dtype == torch.float32
    for r, row in enumerate(rows_of(c)):
        prefix, text = encoder.encode([c.prefix_texts[r // 4], c.texts[r]])
        expected = [
            reference.sequence_repetition(row, 2),
            reference.token_repetition(row, 8),
            reference.diversity(row),
            reference.information(c.token_log_p[r, : len(row)].double().tolist()),
            reference.coherence(prefix.tolist(), text.tolist()),
            reference.sequence_repetition(row, 5),
        ]
        np.testing.assert_allclose(got[r // 4, r % 4].double().numpy(), expected, rtol=1e-6)


def test_repetition_metrics_share_one_kernel_call(monkeypatch):
    calls = []
    real = ops.repetition
    monkeypatch.setattr(ops, "repetition", lambda *args: calls.append(args[2:]) or real(*args))
    metrics.features(metrics.parse(["sr_2", "sr_4", "tr_16", "div", "tr_8"]), candidates())
    assert calls == [([2, 3, 4], [8, 16])]


def test_a_prefix_is_embedded_once():
    encoder = HashEncoder()
    metric = metrics.Coherence(encoder)
    c = candidates()
    metrics.features([metric], c)
    metrics.features([metric], candidates(seed=1))  # other continuations of the same prefixes
    for prefix in c.prefix_texts:
        assert encoder.seen.count(prefix) == 1
    assert len(encoder.seen) == 3 + 2 * 12


def test_own_metrics_by_subclass_and_by_callable():
    class Length(metrics.Metric):
        name = "length"

        def evaluate(self, candidates):
            return candidates.lengths

    def first_token(candidates):
        return candidates.tokens[:, 0]

    both = metrics.FunctionMetric(lambda c: torch.stack([c.lengths, -c.lengths], 1), names=("up", "down"))
    parsed = metrics.parse([Length(), "sr_2", first_token, both])
    c = candidates()
    got = metrics.features(parsed, c).flatten(0, 1)
    assert metrics.column_names(parsed) == ["length", "sr_2", "first_token", "up", "down"]
    assert torch.equal(got[:, 0], c.lengths.double())
    assert torch.equal(got[:, 2], c.tokens[:, 0].double())
    assert torch.equal(got[:, 3], -got[:, 4])


def test_the_end_of_text_token_is_not_part_of_ent():
    # token_log_p may hold an end-of-text token behind the length.
    c = candidates(n=1, m=1, t=3)
    c.lengths[0] = 2
    got = metrics.features([metrics.Information()], c).item()
    assert got == pytest.approx(float(torch.exp(-c.token_log_p[0, :2].mean())), rel=1e-6)


@pytest.mark.parametrize("name", ["sr_", "sr_2x", "SR_2", "tr_1.5", "perplexity", "", "sr_-1", "sr_9999999999"])
def test_unknown_names(name):
    with pytest.raises(UnknownMetric, match=r"known: sr_<n>, tr_<w>, div, ent, coh"):
        metrics.parse([name])


def test_bad_lists_of_metrics():
    with pytest.raises(InvalidInput, match="n of sr_n = 0 must be >= 1"):
        metrics.parse(["sr_0"])
    with pytest.raises(InvalidInput, match="no metrics given"):
        metrics.parse([])
    with pytest.raises(InvalidInput, match="given twice: sr_2"):
        metrics.parse(["sr_2", "ent", "sr_2"])
    with pytest.raises(InvalidInput, match="coh needs a sentence encoder"):
        metrics.parse(["coh"])


def test_an_empty_continuation_has_every_metric():
    c, names = candidates(empty=5), ["sr_2", "tr_8", "div", "ent", "nats", "coh", "length"]
    encoder = HashEncoder()
    found = dict(zip(names, metrics.features(metrics.parse(names, encoder), c)[1, 1].tolist(), strict=True))
    of_end = [c.token_log_p[5, 0].item()]  # its end-of-text token, all that was drawn
    want = {"sr_2": 0, "tr_8": 0, "div": 1, "coh": 0, "length": 0}
    want |= {"ent": reference.information(of_end), "nats": reference.nats(of_end)}
    assert found == pytest.approx(want)
    assert "" not in encoder.seen


def test_length_and_ended():
    c, ended = candidates(empty=2), torch.arange(12) % 3 == 0
    values = metrics.features(metrics.parse(["length", "ended"]), dataclasses.replace(c, ended=ended)).reshape(12, 2)
    assert values[:, 0].tolist() == pytest.approx([reference.length(row) for row in rows_of(c)])
    assert torch.equal(values[:, 1], ended.float())
    with pytest.raises(
        InvalidInput, match="metric ended needs to know how candidates ended, which the engine does not"
    ):
        metrics.features(metrics.parse(["ended"]), c)


def test_bad_results_of_own_metrics_are_named():
    with pytest.raises(InvalidInput, match=r"metric wide returned shape \[12, 2\] for 12 candidates and 1 column"):
        metrics.features([metrics.FunctionMetric(lambda c: torch.zeros(12, 2), names="wide")], candidates())
    values = torch.zeros(12)
    values[7] = torch.nan
    with pytest.raises(InvalidInput, match=r"metric odd is \[nan\] for candidate 7: it must be finite"):
        metrics.features([metrics.FunctionMetric(lambda c: values, names="odd")], candidates())


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda r: None, "metric own returned None: it must be a tensor of real numbers"),
        (lambda r: ["a"] * r, r"metric own returned \['a', 'a', .*: it must be a tensor of real numbers"),
        (lambda r: torch.ones(r, dtype=torch.complex64), "metric own returned a tensor of strided complex64 on cpu"),
        (lambda r: np.ones(r) * 1j, "metric own returned a tensor of strided complex128 on cpu"),
        (lambda r: torch.ones(r).to_sparse(), "metric own returned a tensor of sparse_coo float32 on cpu"),
        (lambda r: torch.ones(r, device="meta"), "metric own returned a tensor of strided float32 on meta"),
        (lambda r: torch.full((r,), torch.inf), r"metric own is \[inf\] for candidate 0"),
        (lambda r: 1.0, r"metric own returned shape \[\] for 12 candidates"),
    ],
)
def test_what_is_no_value_of_a_metric_is_named(returned, said):
    with pytest.raises(InvalidInput, match=said):
        metrics.features([metrics.FunctionMetric(lambda c: returned(12), names="own")], candidates())


LARGE = {
    "float64": lambda c: 3e7 + c.tokens.double().mean(1),
    "int64": lambda c: 2**40 + c.lengths,
    "numpy": lambda c: 3e7 + c.tokens.double().mean(1).numpy(),
    "numpy, backwards": lambda c: (3e7 + c.tokens.double().mean(1).numpy())[::-1],
    "list": lambda c: (1e39 * c.lengths.double()).tolist(),
}


@pytest.mark.parametrize("kind", LARGE)
def test_own_metrics_keep_what_float32_would_lose(kind):
    c = candidates()
    got = metrics.features(metrics.parse([metrics.FunctionMetric(LARGE[kind], names="own"), "sr_2"]), c)
    assert got[..., 0].flatten().tolist() == [float(x) for x in LARGE[kind](c)]
    assert torch.equal(got[..., 1].float(), metrics.features(metrics.parse(["sr_2"]), c)[..., 0])


class Scaled:
    def __init__(self, by):
        self.by = by

    def __call__(self, c):
        return self.by * c.lengths.float()


def scaled(c, by):
    return by * c.lengths.float()


def test_whatever_can_be_called_is_a_metric_and_has_a_name():
    c = candidates()
    own = [functools.partial(scaled, by=2), Scaled(3), Scaled(4).__call__]
    parsed = metrics.parse(own)
    assert metrics.column_names(parsed) == ["scaled", "Scaled", "__call__"]
    assert torch.equal(metrics.features(parsed, c).flatten(0, 1), c.lengths[:, None] * torch.tensor([2.0, 3.0, 4.0]))
    specs = [metric.spec for metric in parsed]
    assert [metric.spec for metric in metrics.from_specs(specs, own)] == specs


@pytest.mark.parametrize("bad", [None, 5, metrics.Nats, ["sr_2"]])
def test_what_is_no_metric_is_named(bad):
    with pytest.raises(InvalidInput, match="must be a name, a Metric or a function of candidates"):
        metrics.parse(["sr_2", bad])
    with pytest.raises(InvalidInput, match="must be a name, a Metric or a function of candidates"):
        metrics.from_specs([], [bad])
    for names in (5, [3], [None]):
        with pytest.raises(InvalidInput, match=r"names = .* must be a list of strings"):
            metrics.FunctionMetric(len, names=names)
    for size in (2.0, True, None, "2", 0):
        for kind, said in ((metrics.SequenceRepetition, "n of sr_n"), (metrics.TokenRepetition, "w of tr_w")):
            with pytest.raises(InvalidInput, match=f"{said} = {size!r} must be"):
                kind(size)
    for whole in (None, 5, "sr_2"):
        with pytest.raises(InvalidInput, match=f"metrics = {whole!r} must be a list"):
            metrics.parse(whole)


def test_specs_round_trip():
    parsed = metrics.parse(["sr_2", "tr_8", "div", "ent", "coh"], "all-minilm-l6-v2")
    again = metrics.from_specs([metric.spec for metric in parsed])
    assert [metric.spec for metric in again] == [metric.spec for metric in parsed]


def test_nats_is_the_log_of_ent():
    candidates = toy.as_candidates(toy.SEQUENCES, 1)
    ent, nats = metrics.features(metrics.parse(["ent", "nats"]), candidates)[0].unbind(1)
    torch.testing.assert_close(nats.exp(), ent)
    expected = [reference.nats(row) for row in toy.token_probabilities(toy.SEQUENCES).log().tolist()]
    np.testing.assert_allclose(nats, expected, rtol=1e-6)


def test_a_tilt_without_bound_is_named():
    class Surprise(metrics.Metric):
        name, bounds = "surprise", (-math.inf, 3.0)

        def evaluate(self, candidates):
            return -candidates.lengths.float()

    listed = [*metrics.parse(["sr_2", "ent", "nats", len]), Surprise()]
    for sign, names in ((-1.0, ["ent"]), (1.0, ["surprise"])):
        mu = dict.fromkeys(metrics.column_names(listed), sign)
        assert metrics.unbounded_tilts(listed, mu) == names


def test_spread_is_of_clipped_deviations_in_human_units():
    drawn = toy.as_candidates(toy.SEQUENCES[:6], 2)
    spread = metrics.Spread(["sr_1", "nats"], [0.5, 1.0], [0.1, 0.5])
    found = metrics.features([spread, *metrics.parse(["nats", "sr_1"])], drawn)
    assert metrics.column_names([spread]) == ["sr_1^2", "sr_1*nats", "nats^2"]
    for row in found.reshape(6, 5).tolist():
        nats, sr = row[3:]
        z = [max(-2.5, min(2.5, (sr - 0.5) / 0.1)), max(-2.5, min(2.5, (nats - 1.0) / 0.5))]
        assert row[:3] == pytest.approx([z[0] * z[0], z[0] * z[1], z[1] * z[1]], abs=1e-5)
    again = metrics.from_specs([metric.spec for metric in (spread, *metrics.parse(["nats", "sr_1"]))])
    assert torch.equal(metrics.features(again, drawn), found)
    with pytest.raises(InvalidInput, match="spread is of 'nats', which is not among the metrics"):
        metrics.features([spread, *metrics.parse(["sr_1"])], drawn)
    with pytest.raises(InvalidInput, match="scale > 0"):
        metrics.Spread(["sr_1"], [0.5], [0.0])
    with pytest.raises(ArtefactError, match=r"metrics\[0\]"):
        metrics.from_specs([{"name": "spread", "of": ["sr_1"]}])
