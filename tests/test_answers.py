"""From prompts and responses to answers, end to end on tiny chat models: fit, generate, decode, evaluate."""

from __future__ import annotations

import json
import warnings

import pytest
import tiny
import torch
from click.testing import CliRunner

from daemon_fast import Energy, SIRDecoder, TransformersProposal, fit_energy, metrics
from daemon_fast.cli import main
from daemon_fast.data.exchanges import pair
from daemon_fast.errors import InvalidInput
from daemon_fast.experiments.run import STUDIES, Domain, Sizes, evaluate
from daemon_fast.experiments.studies import alignment
from daemon_fast.integrations.generate import generate
from daemon_fast.prompts import fingerprint, user

MOST = 12
NAMES = "sr_1,tr_8,nats,length,ended"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One that ends a text every ten tokens or so."""
    path, made = tmp_path_factory.mktemp("model"), tiny.model()
    torch.manual_seed(1)
    torch.nn.init.normal_(made.lm_head.weight, std=0.25)
    made.save_pretrained(path)
    tiny.chat_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def exchanges(model):
    """The model's own answers at a lower temperature."""
    prompts = [tiny.text(1 + seed % 4, seed) for seed in range(120)]
    proposal = TransformersProposal.load(
        model, num_candidates=1, max_new_tokens=40, min_new_tokens=0, temperature=0.9
    )  # fmt: skip
    answers = proposal.propose([user(prompt) for prompt in prompts], 0)
    return [(prompt, text) for prompt, text in zip(prompts, answers.texts, strict=True) if "unk" not in text]


@pytest.fixture(scope="module")
def data(exchanges, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    records = [{"prompt": prompt, "response": response, "id": i} for i, (prompt, response) in enumerate(exchanges)]
    chats = [
        {"messages": [*user(p), {"role": "assistant", "content": r}], "id": i} for i, (p, r) in enumerate(exchanges)
    ]
    for name, rows in (("pairs", records), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def fit_arguments(model, output, *more):
    options = ["--metrics", NAMES, "--num-prefixes", 30, "--new-tokens", MOST, "--num-candidates", 16, "--ridge", 0.01]
    return ["fit", "--model", model, "--output", output, "--temperature", 1.0, *options, *more]


@pytest.fixture(scope="module")
def energy(model, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "energy.json"
    result = run(*fit_arguments(model, path, "--data", data / "pairs.jsonl", "--prompt-field", "prompt"))
    assert result.exit_code == 0, result.output
    return path


def test_both_forms_fit_the_same(energy, model, data, tmp_path):
    loaded = Energy.load(energy)
    assert loaded.names == NAMES.split(",")
    assert (loaded.proposal_settings.min_new_tokens, loaded.proposal_settings.max_new_tokens) == (0, MOST)
    assert loaded.chat_template == fingerprint(tiny.chat_tokenizer())
    chats = tmp_path / "chats.json"
    result = run(*fit_arguments(model, chats, "--data", data / "chats.jsonl", "--prompt-field", "messages"))
    assert result.exit_code == 0, result.output
    assert torch.equal(Energy.load(chats).mu, loaded.mu)
    texts = tmp_path / "texts.json"
    more = ["--data", data / "pairs.jsonl", "--prompt-field", "prompt", "--response-field", "response", "--no-chat"]
    assert run(*fit_arguments(model, texts, *more)).exit_code in (0, 1)  # answers to chats are far from continuations
    assert Energy.load(texts).chat_template is None
    assert not torch.equal(Energy.load(texts).mu, loaded.mu)


def test_the_fit_in_python_is_the_same(energy, model, exchanges):
    loaded = Energy.load(energy)
    proposal = TransformersProposal.load(model, **loaded.proposal_settings.sampling())
    fitted = fit_energy(proposal, exchanges, NAMES.split(","), num_prefixes=30, ridge=0.01)
    assert torch.equal(fitted.mu, loaded.mu)
    assert fitted.chat_template == loaded.chat_template
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = fit_energy(proposal, exchanges, num_prefixes=30, ridge=0.5, encoder=_Letters())
    assert set(default.names) <= set(metrics.OF_RESPONSES)
    assert {"length", "ended"} <= set(default.names)


class _Letters:
    def encode(self, texts, **_):
        return torch.tensor([[1.0, len(text), text.count("1"), text.count("w")] for text in texts]).numpy()


def test_what_is_expected_is_what_people_wrote(energy, model, exchanges):
    """Enumerated from the fit's own candidates: their weighted means are the human ones, lengths included."""
    loaded = Energy.load(energy)
    proposal = TransformersProposal.load(model, **loaded.proposal_settings.sampling())
    pairs = pair(exchanges, proposal.tokenizer, MOST, limit=30)
    human = torch.tensor([min(len(row) - (row[-1] == 0), MOST) for row in pairs.continuations]).double()
    assert float(loaded.targets[3]) == pytest.approx(float(human.log1p().mean()), abs=1e-6)
    ended = sum(row[-1] == 0 for row in pairs.continuations) / 30
    assert float(loaded.targets[4]) == pytest.approx(ended)
    assert 0 < ended < 1


def test_ends_that_the_proposal_does_not_have_are_named(model, exchanges):
    proposal = TransformersProposal.load(
        model, num_candidates=4, max_new_tokens=40, min_new_tokens=0, eos_token_ids=[7]
    )
    with pytest.raises(InvalidInput, match=r"responses end with '<eos>', token 0, .* eos_token_ids are \[7\]"):
        fit_energy(proposal, exchanges, ["sr_1"], num_prefixes=8)


def test_prompts_too_long_for_the_model_are_left_out(model, exchanges, data, energy, tmp_path):
    """They cost no run: another prompt takes their place."""
    long = [(tiny.text(60, seed), "w1") for seed in range(20)]
    proposal = TransformersProposal.load(model, num_candidates=4, max_new_tokens=8, min_new_tokens=0)
    with pytest.warns(UserWarning, match=r"exchanges are left out: the prompt of exchange \d+ has 63 tokens"):
        fitted = fit_energy(proposal, [*long, *exchanges[:30]], ["tr_8"], num_prefixes=20, ridge=0.5)
    assert fitted.diagnostics.num_prefixes == 20
    records = [{"prompt": prompt, "response": response} for prompt, response in [*long, *exchanges]]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["--data", tmp_path / "long.jsonl", "--prompt-field", "prompt"]
    result = run(*fit_arguments(model, tmp_path / "e.json", *arguments))
    assert result.exit_code == 1, result.output
    found = Energy.load(tmp_path / "e.json").diagnostics
    assert (found.num_prefixes, found.unmet) == (30, [])  # so it is the records left out that the exit code tells of
    assert found.ess_mean > 2


def test_tables_are_lists_of_records(model, exchanges):
    pyarrow = pytest.importorskip("pyarrow")
    records = [{"prompt": prompt, "response": response} for prompt, response in exchanges[:30]]
    proposal = TransformersProposal.load(model, num_candidates=4, max_new_tokens=8, min_new_tokens=0)
    options = {"metrics": ["tr_8"], "num_prefixes": 10, "ridge": 0.5}
    want = fit_energy(proposal, records, **options).mu
    for human in (pyarrow.Table.from_pylist(records), iter(records)):
        assert torch.equal(fit_energy(proposal, human, **options).mu, want)
    for human in (5, records[0]):
        with pytest.raises(InvalidInput, match=r"human is a (int|dict): it must be a list of texts, or of prompts"):
            fit_energy(proposal, human, **options)


def test_generate_ends_where_answers_do():
    """Also if the generation config lacks the token by which the chat template ends them."""
    model, tokenizer = tiny.model(), tiny.chat_tokenizer()
    fitted = TransformersProposal(model, tokenizer, num_candidates=30, max_new_tokens=20, min_new_tokens=0)
    zero = torch.zeros(1, dtype=torch.float64)
    energy = Energy(metrics.parse(["length"]), zero, zero, fitted.settings, chat_template=fingerprint(tokenizer))
    ids = torch.tensor(fitted.tokenize([user("w1 w2")]))
    model.generation_config.eos_token_id = 7
    ends = {}
    for given in (None, tokenizer):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = model.generate(
                ids, custom_generate=generate, energy=energy, processing_class=given, max_new_tokens=20, seed=1,
                pad_token_id=1, return_dict_in_generate=True,
            )  # fmt: skip
        candidates = out.decoded.candidates
        ends[given is None] = {
            row[n]
            for row, n, end in zip(
                candidates.tokens.tolist(), candidates.lengths.tolist(), candidates.ended, strict=True
            )
            if end
        }
    assert ends[True] <= {7}
    assert 0 in ends[False] <= {0, 7}


def test_wrong_arguments_are_named(model, data, tmp_path):
    out = tmp_path / "e.json"
    for more, message in (
        (["--data", data / "pairs.jsonl", "--response-field", "response"], "'response' needs --prompt-field"),
        (
            ["--data", data / "pairs.jsonl", "--prompt-field", "question"],
            "has no prompt: no field 'question', but prompt, resp",
        ),
        (
            ["--data", data / "pairs.jsonl", "--prompt-field", "prompt", "--min-new-tokens", 13],
            "min_new_tokens = 13 mu",
        ),
    ):
        result = run(*fit_arguments(model, out, *more))
        assert result.exit_code == 2
        assert message in result.output
    result = run(*fit_arguments(model, out, "--data", data / "chats.jsonl"))
    assert "has no string field 'text', but messages" in result.output


def test_generate_answers(energy):
    answer = run("generate", "--energy", energy, "--message", "w1 w2")
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == run("generate", "--energy", energy, "--prompt", "w1 w2").stdout
    assert "w1 w2" not in answer.stdout.split("\n")[0][:5]
    result = run("generate", "--energy", energy, "--prompt", "w5", "--message", "w1 w2", "--json")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["w5", "w1 w2"]
    assert "Missing option '--prompt' or '--message'" in run("generate", "--energy", energy).output


def test_decode_answers_records(energy, data, tmp_path):
    """Prompts and chats, whose own answers are left out, give the same texts."""
    found = {}
    for name, field in (("pairs", "prompt"), ("chats", "messages")):
        out = tmp_path / f"{name}.jsonl"
        result = run("decode", data / f"{name}.jsonl", out, "--energy", energy, "--prompt-field", field)
        assert result.exit_code == 0, result.output
        found[name] = [json.loads(line)["daemon"] for line in out.read_text().splitlines()]
    assert found["pairs"] == found["chats"]
    assert len({len(one["texts"][0].split()) for one in found["pairs"]}) > 3
    lines = [{"messages": []}, {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": "w1"}]}]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("decode", tmp_path / "bad.jsonl", "-", "--energy", energy, "--field", "messages")
    assert result.exit_code == 1
    assert "line 1 has no string field 'messages'" in result.stderr
    assert "line 2 can't be used: 'messages', message 0 has a content of type NoneType" in result.stderr
    assert len(json.loads(result.stdout.splitlines()[2])["daemon"]["texts"]) == 1


def test_parquet_keeps_chats(energy, data, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    rows = [json.loads(line) for line in (data / "chats.jsonl").read_text().splitlines()][:5]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "in.parquet")
    arguments = ["--energy", energy, "--field", "messages"]
    assert run("decode", tmp_path / "in.parquet", tmp_path / "out.parquet", *arguments).exit_code == 0
    found = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["messages"] for row in found] == [row["messages"] for row in rows]
    assert all(len(row["daemon"]["texts"]) == 1 for row in found)


# ---- the report -----------------------------------------------------------------------------------------------------


def test_every_study_of_answers(energy, data, model, tmp_path):
    pytest.importorskip("matplotlib")
    from daemon_fast.models import load_language_model

    loaded = Energy.load(energy)
    language_model, tokenizer = load_language_model(model)
    domain = Domain("answers", str(data / "pairs.jsonl"), loaded, prompt_field="prompt")
    wanted = [name for name in STUDIES if name != "transfer"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MAUVE, whose encoder is not here
        report = evaluate(
            [domain], tmp_path / "out", language_model, tokenizer, wanted=wanted, featurizer="model",
            sizes=Sizes(held_out=20, pool_prefixes=2, pool_candidates=20, sweep_prefixes=10),
        )  # fmt: skip
    found = report.domains["answers"].studies["alignment"]
    assert sum(some.human for some in found.lengths) == 20
    for who in ("human", "sampling", "daemon"):
        assert sum(some.share[who] for some in found.lengths) == pytest.approx(1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "By length" in page
    assert "0 to 12 tokens" in page


def test_length_bins_by_hand():
    """Two prefixes of two candidates: shares and distances counted here."""
    human = torch.tensor([[0.0, 1.0], [4.0, 3.0]])
    features = torch.tensor([[[1.0, 1.0], [2.0, 3.0]], [[6.0, 1.0], [5.0, 3.0]]])
    from types import SimpleNamespace

    collected = SimpleNamespace(
        human_tokens=torch.tensor([2, 9]), lengths=torch.tensor([[2, 9], [1, 8]]), human=human, features=features,
        fitted_names=["sr_2", "length"], spread=torch.tensor([2.0, 1.0]),
    )  # fmt: skip
    even = torch.full((2, 2), 0.5, dtype=torch.float64)
    bins = alignment._by_length(
        collected, {"sampling": even, "daemon": torch.tensor([[1.0, 0.0], [0.25, 0.75]]).double()}
    )
    assert [(b.low, b.high, b.human) for b in bins] == [(0, 2, 1), (3, 8, 0), (9, 9, 1)]
    first, last = bins[0], bins[-1]
    assert first.share == {"human": 0.5, "sampling": 0.5, "daemon": 0.625}
    assert first.distance == pytest.approx({"sampling": (0.5 * 1 + 0.5 * 6) / 2, "daemon": (0.8 * 1 + 0.2 * 6) / 2})
    assert last.share == {"human": 0.5, "sampling": 0.25, "daemon": 0.0}
    assert last.distance == {"sampling": pytest.approx(abs(2 - 4) / 2), "daemon": None}
    assert bins[1].distance == {"sampling": None, "daemon": None}  # no human text is as long


def test_a_decoder_of_answers(energy, model):
    loaded = Energy.load(energy)
    decoder = SIRDecoder(loaded, TransformersProposal.load(model, **loaded.proposal_settings.sampling()))
    decoded = decoder([user("w1 w2"), [{"role": "system", "content": "w4"}, *user("w5")]], num_samples=3, seed=1)
    assert decoded.candidates.ended is not None
    assert [len(texts) for texts in decoded.texts] == [3, 3]
    assert len(decoded.features) == 2
