"""The artefact: round trip, and every corruption ends in a clear error."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon_fast import Energy, ProposalSettings, fit, metrics
from daemon_fast.errors import ArtefactError, InvalidInput


def artefact(names=("sr_2", "tr_8", "ent")) -> Energy:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 10, len(names), generator=generator)
    result = fit(features, features[:, 0].mean(0), names=names, bootstrap=5)
    return result.energy(metrics.parse(names, "all-minilm-l6-v2"), ProposalSettings("toy", "3-toy"), seed=7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("energy") / "energy.json"
    artefact().save(path)
    return path


def test_round_trip(saved):
    energy, again = artefact(), Energy.load(saved)
    assert torch.equal(again.mu, energy.mu)
    assert torch.equal(again.targets, energy.targets)
    assert again.names == energy.names
    assert again.proposal_settings == energy.proposal_settings
    assert (again.normalization, again.base) == (energy.normalization, energy.base)
    assert again.diagnostics == energy.diagnostics
    assert again.diagnostics.seed == 7


def test_the_encoder_of_coh_is_stored_by_name(tmp_path):
    artefact(("sr_2", "coh")).save(tmp_path / "e.json")
    assert Energy.load(tmp_path / "e.json").metrics[1].spec == {"name": "coh", "encoder": "all-minilm-l6-v2"}


def test_own_metrics_are_found_by_name(tmp_path):
    length = metrics.FunctionMetric(lambda c: c.lengths, names="length")
    energy = Energy([length], torch.ones(1).double(), torch.ones(1).double(), ProposalSettings("m", "v"))
    energy.save(tmp_path / "e.json")
    assert Energy.load(tmp_path / "e.json", metrics=[length]).metrics == [length]


def test_plain_functions_are_found_by_their_names(tmp_path):
    def length(candidates):
        return candidates.lengths.float()

    energy = Energy(metrics.parse([length]), torch.ones(1).double(), torch.ones(1).double(), ProposalSettings("m", "v"))
    energy.save(tmp_path / "e.json")
    assert Energy.load(tmp_path / "e.json", metrics=[length]).names == ["length"]
    with pytest.raises(ArtefactError, match=r"metrics\[0\]: unknown metric 'length'.*metrics="):
        Energy.load(tmp_path / "e.json")


def test_coefficients_must_match_the_metrics():
    with pytest.raises(InvalidInput, match="mu must be 1 finite numbers"):
        Energy(metrics.parse(["sr_2"]), torch.ones(2), torch.ones(1), ProposalSettings("m", "v"))
    with pytest.raises(InvalidInput, match="targets must be 1 finite numbers"):
        Energy(metrics.parse(["sr_2"]), torch.ones(1), torch.full((1,), math.nan), ProposalSettings("m", "v"))


@pytest.mark.parametrize("field", ["normalization", "draw", "base"])
def test_a_choice_that_there_is_not_is_named(field):
    one = torch.ones(1).double()
    for bad in ("Model", "Race", "", None, 1):
        with pytest.raises(InvalidInput, match=f"{field} = {bad!r} must be one of "):
            Energy(metrics.parse(["sr_2"]), one, one, ProposalSettings("m", "v"), **{field: bad})


def test_coefficients_of_any_real_type_are_float64():
    want = torch.tensor([2.0], dtype=torch.float64)
    for mu in (torch.tensor([2.0]), torch.tensor([2]), torch.tensor([2.0]).half(), np.array([2]), [2.0]):
        energy = Energy(metrics.parse(["sr_2"]), mu, mu, ProposalSettings("m", "v"))
        assert torch.equal(energy.mu, want)
        assert torch.equal(energy.targets, want)
    for bad in (None, "2", torch.tensor([2j]), ["2"]):
        with pytest.raises(InvalidInput, match=r"targets is .*real numbers"):
            Energy(metrics.parse(["sr_2"]), want, bad, ProposalSettings("m", "v"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], 1, "schema is 1; this version reads schema 2"),
        (["mu"], [1.0, 2.0], "mu has 2 numbers for 3 metrics"),
        (["mu", 1], math.nan, "mu must be a list of finite numbers"),
        (["mu", 1], "3", "mu must be a list of finite numbers"),
        (["targets"], None, "targets must be a list of finite numbers, got None"),
        (["metrics", 0, "name"], "sr_x", r"metrics\[0\]: unknown metric 'sr_x'"),
        (["metrics", 0], 5, r"metrics\[0\] must be an object with a name, got 5"),
        (["metrics", 0, "n"], 5, r"field 'metrics\[0\].n' is unknown"),
        (["metrics"], [], "metrics is empty"),
        (["columns", 0], "sr_3", "columns is .* but metrics give"),
        (["normalization"], "none", "normalization must be one of per_prefix, global, got 'none'"),
        (["base"], 1, "base must be one of proposal, model, got 1"),
        (["proposal_settings", "temperature"], 0, "proposal_settings.temperature = 0 must be positive"),
        (["proposal_settings", "top_p"], True, "proposal_settings.top_p must be a finite number, got True"),
        (["proposal_settings", "num_candidates"], 2.5, "proposal_settings.num_candidates must be an integer, got 2.5"),
        (["proposal_settings", "beam"], 4, "field 'proposal_settings.beam' is unknown"),
        (["proposal_settings"], "x", "proposal_settings must be an object, got 'x'"),
        (["diagnostics", "ess_min"], math.inf, "diagnostics.ess_min must be a finite number, got inf"),
        (["diagnostics", "confidence_interval"], [[1.0]], "diagnostics.confidence_interval must be two lists"),
        (["extra"], 1, "field 'extra' is unknown"),
    ],
)
def test_the_wrong_field_is_named(saved, tmp_path, path, value, message):
    document = json.loads(saved.read_text())
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (tmp_path / "e.json").write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match=message):
        Energy.load(tmp_path / "e.json")


def test_missing_fields_are_named(saved, tmp_path):
    document = json.loads(saved.read_text())
    for section in ("", "proposal_settings", "diagnostics"):
        for name in document[section] if section else document:
            if name in ("draw", "unmet", "chat_template"):
                continue  # artefacts of earlier versions lack them
            broken = copy.deepcopy(document)
            del (broken[section] if section else broken)[name]
            (tmp_path / "e.json").write_text(json.dumps(broken))
            with pytest.raises(ArtefactError, match=rf"field {section + '.' if section else ''}{name} is missing"):
                Energy.load(tmp_path / "e.json")


def test_an_artefact_that_names_no_rule_draws_by_sir(saved, tmp_path):
    document = json.loads(saved.read_text())
    for draw in ("race", "sir"):
        (tmp_path / "e.json").write_text(json.dumps({**document, "draw": draw}))
        assert Energy.load(tmp_path / "e.json").draw == draw
    (tmp_path / "e.json").write_text(json.dumps({**document, "draw": "best"}))
    with pytest.raises(ArtefactError, match="draw must be one of race, sir, got 'best'"):
        Energy.load(tmp_path / "e.json")
    del document["draw"]
    (tmp_path / "e.json").write_text(json.dumps(document))
    assert Energy.load(tmp_path / "e.json").draw == "sir"


def test_unreadable_files(tmp_path):
    with pytest.raises(ArtefactError, match="can't be read: No such file"):
        Energy.load(tmp_path / "none.json")
    with pytest.raises(ArtefactError, match="can't be read: Is a directory"):
        Energy.load(tmp_path)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@given(data=st.data())
@settings(max_examples=500)
def test_any_replaced_value_loads_unharmed_or_is_an_artefact_error(saved, data):
    document = json.loads(saved.read_text())
    path = data.draw(st.sampled_from(sorted(places(document), key=str)))
    junk = data.draw(JUNK)
    if path:
        at = document
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = junk
    else:
        document = junk
    check_text(saved, json.dumps(document).encode())


@given(cut=st.integers(0, 2500), flips=st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), max_size=3))
@settings(max_examples=500)
def test_truncated_and_flipped_bytes(saved, cut, flips):
    raw = bytearray(saved.read_bytes())
    for at, byte in flips:
        raw[at % len(raw)] = byte
    check_text(saved, bytes(raw[: len(raw) - cut]) if cut else bytes(raw))


def check_text(saved, raw):
    target = saved.with_name("fuzzed.json")
    target.write_bytes(raw)
    try:
        energy = Energy.load(target)
    except ArtefactError:  # a ValueError; anything else fails the test
        return
    # What loads is usable: finite, of matching sizes, with valid settings.
    assert energy.mu.shape == energy.targets.shape == (len(energy.names),)
    assert energy.mu.isfinite().all()


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"schema": 1e999}', "NaN", "1" * 5000])
def test_odd_documents(tmp_path, text):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(ArtefactError):
        Energy.load(tmp_path / "e.json")
