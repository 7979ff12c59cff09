"""Decoding and fitting on a real Ray cluster of several processes, some of which are killed."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import tiny
import torch

from daemon_fast import Energy, fit, metrics
from daemon_fast.errors import DataError, InfeasibleTargets, InvalidInput
from daemon_fast.metrics import FunctionMetric
from daemon_fast.proposals.load import EngineSpec

ray = pytest.importorskip("ray", reason="needs ray: pip install 'daemon-fast[ray]'")
pyarrow = pytest.importorskip("pyarrow")

from daemon_fast.integrations import ray as cluster  # noqa: E402 (it needs ray)

NAMES = ["sr_1", "tr_8", "ent"]
DRAWN = {"prefix_tokens": 5, "new_tokens": 12, "num_candidates": 8, "batch_size": 4}


@pytest.fixture(scope="module", autouse=True)
def workers():
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return EngineSpec(model_id=tiny.saved(tmp_path_factory.mktemp("model")))


def pid_metric():
    """Tells which process measured: pids lie below 2^24, which float32 holds."""

    def pid(candidates):
        return torch.full(candidates.lengths.shape, float(os.getpid()))

    return FunctionMetric(pid)


def dataset(texts):
    return ray.data.from_items([{"text": text} for text in texts], override_num_blocks=8)


@pytest.fixture(scope="module")
def texts(engine):
    """60 of 20 tokens: the model's own at temperature 1, so that its metrics are within reach."""
    prefixes = [tiny.text(5, i) for i in range(60)]
    drawn = engine.proposal(num_candidates=1, max_new_tokens=15, min_new_tokens=15).propose(prefixes, 0)
    return [f"{prefix} {text}" for prefix, text in zip(prefixes, drawn.texts, strict=True)]


@pytest.fixture(scope="module")
def measured(engine, texts):
    return cluster.measure(
        dataset(texts), NAMES, engine, compute=ray.data.ActorPoolStrategy(size=2), **DRAWN
    ).materialize()


def measured_here(texts, engine, names=NAMES, base="proposal", seed=0):
    """What `cluster.measure` gives, by its actor's own code, but in this process: to start actors takes seconds."""
    settings = {"num_candidates": 8, "max_new_tokens": 12, "min_new_tokens": 12, "temperature": 0.97}
    actor = cluster._Measure(metrics.parse(names), engine, settings, "text", 5, base, seed)
    parts = [texts[i : i + 20] for i in range(0, len(texts), 20)]
    tables = [actor(pyarrow.table({"text": part, cluster.ROW: [i] * len(part)})) for i, part in enumerate(parts)]
    return ray.data.from_arrow(tables)


@pytest.fixture(scope="module")
def measured_for_the_model(engine, texts):
    return measured_here(texts, engine, base="model")


def in_one_process(measured):
    """Features, human values and base log-weights of all rows as tensors."""
    rows = measured.take_all()
    features, human, base = ([row[name] for row in rows] for name in ("features", "human", "base_log_w"))
    base_log_w = None if base[0] is None else torch.tensor(base, dtype=torch.float64)
    return torch.tensor(features), torch.tensor(human), base_log_w


def test_every_row_is_decoded_once_though_a_worker_is_killed(engine):
    custom = pid_metric()
    energy = Energy(
        metrics=[*metrics.parse(["sr_1"]), custom],
        mu=torch.tensor([2.0, 0.0], dtype=torch.float64),
        targets=torch.tensor([0.1, 0.0], dtype=torch.float64),
        proposal_settings=engine.settings(num_candidates=8, max_new_tokens=24),
    )
    prompts = [{"text": tiny.text(4, i), "id": i} for i in range(300)]
    prompts[7]["text"], prompts[11]["text"] = "", None
    decoded = cluster.decode(
        ray.data.from_items(prompts, override_num_blocks=30),
        energy,
        engine,
        num_samples=2,
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_size=4,
    )
    rows, killed = [], None
    for batch in decoded.iter_batches(batch_size=8, batch_format="pyarrow"):
        rows += batch.to_pylist()
        if killed is None:
            killed = next(int(m["pid"]) for row in rows for m in row["daemon"]["metrics"] or [])
            os.kill(killed, signal.SIGKILL)
    assert sorted(row["id"] for row in rows) == list(range(300))
    by_id = {row["id"]: row["daemon"] for row in rows}
    assert by_id[7]["error"].startswith("its text is empty")
    assert by_id[11]["error"] == "has no string field 'text'"
    good = [result for result in by_id.values() if result["error"] is None]
    assert len(good) == 298
    assert all(len(result["texts"]) == len(result["metrics"]) == 2 and 1 <= result["ess"] <= 8 for result in good)
    pids = {int(m["pid"]) for result in good for m in result["metrics"]}
    assert killed in pids
    assert len(pids) >= 3  # two workers, and the one that took the killed one's place


@pytest.mark.parametrize(("normalization", "draw"), [("per_prefix", "sir"), ("per_prefix", "race"), ("global", "sir")])
@pytest.mark.parametrize("base", ["proposal", "model"])
def test_the_fit_over_blocks_is_the_fit_of_one_tensor(request, engine, base, normalization, draw):
    measured = request.getfixturevalue("measured" if base == "proposal" else "measured_for_the_model")
    assert len(measured.to_arrow_refs()) > 2
    features, human, base_log_w = in_one_process(measured)
    assert (base_log_w is None) == (base == "proposal")
    assert features.shape == (60, 8, 3)
    alone = fit(features, human, base_log_w, normalization=normalization, draw=draw, names=NAMES)
    together = cluster.fit(measured, normalization=normalization, draw=draw)
    torch.testing.assert_close(together.mu, alone.mu, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(together.targets, alone.targets, atol=1e-9, rtol=0)
    found = together.diagnostics
    assert (found.ess_mean, found.kl) == pytest.approx((alone.ess_mean, alone.kl), abs=1e-9)
    assert (together.names, together.base, together.normalization) == (NAMES, base, normalization)
    assert together.draw == draw
    settings = {"num_candidates": 8, "max_new_tokens": 12, "min_new_tokens": 12, "temperature": 0.97}
    assert together.proposal_settings == engine.settings(**settings)


def test_measured_rows_can_be_kept_in_files(measured, tmp_path):
    measured.write_parquet(str(tmp_path))
    again = cluster.fit(ray.data.read_parquet(str(tmp_path)))
    torch.testing.assert_close(again.mu, cluster.fit(measured).mu, atol=1e-9, rtol=1e-9)


def test_a_reduction_survives_a_worker_that_is_killed(measured, tmp_path):
    marker = tmp_path / "killed"

    def total(block):
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return block.features.double().sum()

    found = cluster.RaySamples(measured).map(total)
    assert marker.exists()
    assert float(sum(found)) == pytest.approx(float(in_one_process(measured)[0].double().sum()), abs=1e-9)


def test_measuring_survives_a_worker_that_is_killed(engine, texts, tmp_path):
    marker = tmp_path / "killed"

    def dies_once(candidates):
        if not marker.exists() and 9 in candidates.tokens:
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return candidates.tokens.double().mean(1)

    custom = FunctionMetric(dies_once)
    rows = cluster.measure(
        dataset(texts), ["sr_1", custom], engine, compute=ray.data.ActorPoolStrategy(size=2), **DRAWN
    ).materialize()
    assert marker.exists()
    assert rows.count() == 60
    # Each text is there once: its own mean token is among the human values.
    human = in_one_process(rows)[1][:, 1].sort().values
    tokens = [[int(word[1:]) + 2 for word in text.split()[5:17]] for text in texts]
    expected = torch.tensor(tokens).double().mean(1).float().sort().values
    torch.testing.assert_close(human, expected)
    assert cluster.fit(rows, ridge=0.1, metrics=[custom]).names == ["sr_1", "dies_once"]


def test_short_texts_are_left_out(engine):
    mixed = [tiny.text(20 if i % 3 else 4, i) for i in range(30)] + [None]
    assert measured_here(mixed, engine).count() == 20
    with pytest.raises(DataError, match="no text of the dataset has as many tokens"):
        cluster.fit(measured_here(["w1 w2"] * 5, engine))


def test_rows_of_two_runs_are_refused(engine, texts, measured):
    other = measured_here(texts[:20], engine, seed=1)
    with pytest.raises(InvalidInput, match="rows of 2 runs"):
        cluster.fit(measured.union(other))


def test_targets_out_of_reach_are_the_same_error(engine):
    words = ["w1 " * 20] * 12  # nobody's candidates repeat so much
    with pytest.raises(InfeasibleTargets, match="tr_8"):
        cluster.fit(measured_here(words, engine, ["sr_1", "tr_8"]))


def test_an_empty_block_and_a_column_of_the_results_name():
    """Ray may hand over a block without rows; two columns of one name could not be written at the end."""
    actor = object.__new__(cluster._Decode)
    actor._field = "text"
    actor._work = SimpleNamespace(result_type=lambda: pyarrow.struct([("error", pyarrow.string())]))
    empty = pyarrow.table(
        {"text": pyarrow.array([], pyarrow.string()), cluster.ROW: pyarrow.array([], pyarrow.int64())}
    )
    assert actor(empty).column_names == ["text", "daemon"]
    with pytest.raises(InvalidInput, match="the rows have a column 'daemon' already"):
        actor(pyarrow.table({"text": ["a"], "daemon": [1], cluster.ROW: [0]}))
