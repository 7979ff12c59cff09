"""Decoding and fitting on a real Ray cluster of several processes, some of which are killed."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest
import tiny
import torch

from daemon_fast import Energy, fit, metrics, reference
from daemon_fast.errors import DataError, InfeasibleTargets, InvalidInput
from daemon_fast.metrics import FunctionMetric
from daemon_fast.prompts import fingerprint
from daemon_fast.proposals.load import EngineSpec

ray = pytest.importorskip("ray", reason="needs ray: pip install 'daemon-fast[ray]'")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

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
    actor = cluster._Measure(metrics.parse(names), engine, settings, cluster._Texts("text", 5), base, seed)
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
    with pytest.raises(DataError, match="no text has as many tokens"):
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


# ---- chats ----------------------------------------------------------------------------------------------------------

ANSWERS = ["length", "ended", "nats"]


@pytest.fixture(scope="module")
def chat_engine(tmp_path_factory):
    return EngineSpec(model_id=tiny.saved(tmp_path_factory.mktemp("chats"), chats=True))


def chat_of(i):
    """Of two turns where i is odd, with the response behind it; and its tokens up to there, by hand."""
    words = tiny.text(3, i)
    messages = [{"role": "user", "content": "w8 w9"}, {"role": "assistant", "content": "w1"}] if i % 2 else []
    messages += [{"role": "user", "content": words}, {"role": "assistant", "content": "w7"}]
    user, assistant, eos = tiny.tokenizer()("w58 w59 <eos>")["input_ids"]
    before = [user, 10, 11, eos, assistant, 3, eos] if i % 2 else []
    return messages, [*before, user, *tiny.tokenizer()(words)["input_ids"], eos, assistant]


def prompt_metric():
    """Tells of which prompt a candidate is: below 2^24, which float32 holds."""

    def prompt(candidates):
        sums = [sum(t * (i + 1) for i, t in enumerate(prefix)) for prefix in candidates.prefix_tokens]
        return torch.tensor(sums).repeat_interleave(candidates.shape[1]).float()

    return FunctionMetric(prompt)


def number_of(prompt):
    return sum(t * (i + 1) for i, t in enumerate(prompt))


def test_chats_in_parquet_are_answered(chat_engine, tmp_path):
    energy = Energy(
        metrics=[*metrics.parse(["length"]), prompt_metric()],
        mu=torch.tensor([-1.0, 0.0], dtype=torch.float64),
        targets=torch.tensor([1.0, 0.0], dtype=torch.float64),
        proposal_settings=chat_engine.settings(num_candidates=8, max_new_tokens=12, min_new_tokens=0),
        chat_template=fingerprint(tiny.chat_tokenizer()),
    )
    rows = [{"id": i, "messages": chat_of(i)[0]} for i in range(20)]
    rows[3]["messages"], rows[4]["messages"] = None, []
    rows[5]["messages"][0] = {"role": None, "content": "w1"}
    rows[6]["messages"][0]["name"] = "w2"  # so that Parquet gives the others a null
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chats.parquet")
    read = ray.data.read_parquet(str(tmp_path / "chats.parquet"), override_num_blocks=3)
    decoded = cluster.decode(read, energy, chat_engine, field="messages", num_samples=2, batch_size=4)
    found = {row["id"]: row["daemon"] for row in decoded.take_all()}
    assert sorted(found) == list(range(20))
    errors = {i: result["error"] for i, result in found.items() if result["error"]}
    assert errors[3] == errors[4] == "has no string field 'messages'"
    assert errors[5] == "can't be used: 'messages', message 0 has role = None: it must be a string, such as 'user'"
    assert len(errors) == 3
    for i in found.keys() - errors:
        assert [m["prompt"] for m in found[i]["metrics"]] == [number_of(chat_of(i)[1])] * 2
    actor = cluster._Decode(energy, chat_engine, "text", 1, 0, 4)
    texts = pyarrow.table({"text": [f"w{i}" for i in range(3)], cluster.ROW: [0, 1, 2]})  # each a user's message
    for row in actor(texts).to_pylist():
        prompt = tiny.tokenizer()(f"w58 {row['text']} <eos> w59")["input_ids"]
        assert row["daemon"]["metrics"][0]["prompt"] == number_of(prompt)


def exchanges(n):
    """Chats and responses of every length up to beyond 12 tokens."""
    responses = [tiny.text(i % 15, 100 + i) for i in range(n)]
    return [
        {"messages": [*chat_of(i)[0][:-1], {"role": "assistant", "content": response}]}
        for i, response in enumerate(responses)
    ], responses


def test_prompts_and_responses_are_measured(chat_engine, tmp_path):
    rows, responses = exchanges(40)
    bad = [None, [], [{"role": "user", "content": "w1"}], [{"role": "assistant", "content": "w1"}]]
    bad += [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w1 <eos>"}]]
    bad += [[{"role": "pirate", "content": "w1"}, {"role": "assistant", "content": "w1"}]]
    bad += [[{"role": "user", "content": "w1 " * 60}, {"role": "assistant", "content": "w1"}]]  # beyond the context
    table = pyarrow.Table.from_pylist([*rows, *({"messages": messages} for messages in bad)])
    parquet.write_table(table, tmp_path / "pairs.parquet")
    read = ray.data.read_parquet(str(tmp_path / "pairs.parquet"), override_num_blocks=4)
    options = {"prompt_field": "messages", "new_tokens": 12, "num_candidates": 8, "batch_size": 6, "base": "model"}
    own = prompt_metric()
    measured = cluster.measure(read, [*ANSWERS, own], chat_engine, **options).materialize()
    features, human, base_log_w = in_one_process(measured)
    assert features.shape == (40, 8, 4)
    assert base_log_w.isfinite().all()
    model, found = tiny.model(), {row[3]: row[:3] for row in human.tolist()}
    for i, response in enumerate(responses):
        prompt, row = chat_of(i)[1], [*tiny.tokenizer()(response)["input_ids"], 0][:12]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1].double()
        log_p = logits.log_softmax(-1)[range(len(row)), row]
        ended = row[-1] == 0
        length = len(row) - ended
        nats = reference.nats(log_p[: max(1, length)].tolist())
        want = [reference.length(row[:length]), float(ended), nats]
        assert found[number_of(prompt)] == pytest.approx(want, abs=1e-4)
    assert torch.equal(features[..., 3], human[:, 3:].expand(-1, 8))  # the same prompts
    assert 0 < features[..., 1].mean() < 1
    alone = measured_pairs(chat_engine, rows, ("messages", None, None))
    energy = cluster.fit(ray.data.from_arrow(alone), ridge=0.1)
    assert energy.names == ANSWERS
    assert energy.chat_template == fingerprint(tiny.chat_tokenizer())
    settings = {"num_candidates": 8, "max_new_tokens": 12, "min_new_tokens": 0}
    assert energy.proposal_settings == chat_engine.settings(**settings)


def measured_pairs(engine, rows, fields, min_new_tokens=0):
    """By the actor's own code, in this process."""
    settings = {"num_candidates": 8, "max_new_tokens": 12, "min_new_tokens": min_new_tokens}
    actor = cluster._Measure(metrics.parse(ANSWERS), engine, settings, cluster._Exchanges(*fields), "proposal", 0)
    table = pyarrow.Table.from_pylist(rows)
    return actor(table.append_column(cluster.ROW, pyarrow.array(range(len(table)))))


def test_fields_of_prompts_and_responses(chat_engine, engine):
    rows = [{"id": i, "meta": {"q": f"w{i}", "a": "w5 w6"}, "completion": "w1"} for i in range(4)]
    template = fingerprint(tiny.chat_tokenizer())
    for options, length, known in (
        (("meta.q", "meta.a", None), 2, template),
        (("meta.q", "meta.a", False), 2, None),
        (("meta.q", None, True), 1, template),
    ):
        found = measured_pairs(chat_engine, rows, options).to_pylist()
        assert [row["human"][0] for row in found] == pytest.approx([reference.length([0] * length)] * 4)
        assert json.loads(found[0]["run"])["chat_template"] == known
    assert len(measured_pairs(chat_engine, rows, ("meta.q", "meta.a", None), min_new_tokens=3)) == 0
    with pytest.raises(InvalidInput, match=r"field = 'q': the rows have completion, id, meta"):
        measured_pairs(chat_engine, rows, ("q", None, None))
    with pytest.raises(InvalidInput, match=r"is a chat, and the tokenizer .* has no chat template"):
        measured_pairs(engine, exchanges(4)[0], ("messages", None, None))
    with pytest.raises(InvalidInput, match=r"is a chat, and the tokenizer .* has no chat template"):
        measured_pairs(engine, rows, ("meta.q", "meta.a", True))
    with pytest.raises(InvalidInput, match="response_field = 'a' needs a prompt_field"):
        cluster.measure(dataset(["w1"]), ANSWERS, engine, response_field="a")
