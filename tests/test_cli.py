"""The command line, on a tiny model: it works, resumes, and every bad input is one line and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

from daemon_fast import Energy, TransformersProposal
from daemon_fast.cli import STUDIES, main
from daemon_fast.data.records import RESULTS
from daemon_fast.errors import LowEffectiveSampleSize, TargetsNotMet
from daemon_fast.fit.resample import RIDGES

COMMAND = [sys.executable, "-m", "daemon_fast"]
NO_HUB = {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(model, tmp_path_factory):
    """The model's own samples at temperature 1: their means are within reach of candidates at 0.97."""
    prefixes = [tiny.text(5, seed) for seed in range(100)]
    proposal = TransformersProposal.load(model, num_candidates=1, max_new_tokens=25, min_new_tokens=25)
    continued = zip(prefixes, proposal.propose(prefixes, 0).texts, strict=True)
    whole = [f"{prefix} {text}" for prefix, text in continued if len(text.split()) == 25]  # without <unk>
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in whole[:40]))
    return str(path)


@pytest.fixture(scope="module")
def other_texts(tmp_path_factory):
    """Random words, whose perplexity is far above that of any candidate."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": tiny.text(30, seed)}) for seed in range(40)))
    return str(path)


def fit_arguments(model, texts, output, *more):
    options = ["--metrics", "sr_1,tr_8,ent", "--num-prefixes", "24", "--prefix-tokens", "5", "--new-tokens", "20"]
    options += ["--num-candidates", "16", "--output", str(output), *more]
    return ["fit", "--model", model, "--data", texts, *options]


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def energy(model, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "energy.json"
    result = run(*fit_arguments(model, texts, path, "--ridge", "0.01"))
    assert result.exit_code == 0, result.output
    return path


def fails(result, message):
    """One line that holds the message, exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert result.output.rstrip().splitlines()[-1] == lines[0]
    assert message in lines[0]
    assert "Traceback" not in result.output


def test_fit_then_generate(energy, model):
    loaded = Energy.load(energy)
    assert loaded.names == ["sr_1", "tr_8", "ent"]
    assert loaded.proposal_settings.model_id == model
    result = run("generate", "--energy", energy, "--prompt", "w1 w2", "--prompt", "w3", "--num-samples", 2, "--json")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [record["prompt"] for record in records] == ["w1 w2", "w3"]
    for record in records:
        assert len(record["texts"]) == len(record["metrics"]) == 2
        assert all(15 <= len(text.split()) <= 20 for text in record["texts"])  # <unk> is no word
        assert 1 <= record["ess"] <= 16
    plain = run("generate", "--energy", energy, "--prompt", "w1 w2")
    assert plain.stdout.startswith("w1 w2")
    assert run("generate", "--energy", energy, "--prompt", "w1 w2").stdout == plain.stdout


def test_fit_prints_what_it_did(model, texts, tmp_path):
    result = run(*fit_arguments(model, texts, tmp_path / "e.json", "--ridge", "0.01", "--bootstrap", "3"))
    assert result.exit_code == 0, result.output
    for word in ("metric", "sr_1", "effective sample size", "of 16 on average", "KL(p_mu || p_theta)", "e.json"):
        assert word in result.stdout


def test_killed_and_run_again_gives_the_same_artefact(model, texts, tmp_path, energy):
    output = tmp_path / "energy.json"
    arguments = [*COMMAND, *fit_arguments(model, texts, output, "--ridge", "0.01")]
    process = subprocess.Popen(arguments, env=NO_HUB, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "energy.json.candidates"
    deadline = time.monotonic() + 60
    while not list(folder.glob("batch-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(folder.glob("batch-*.npz"))
    assert run(*fit_arguments(model, texts, output, "--ridge", "0.01")).exit_code == 0
    assert json.loads(output.read_text()) == json.loads(energy.read_text())


def test_options_of_fit_reach_the_artefact(model, texts, tmp_path):
    options = ["--base", "model", "--normalization", "global", "--top-k", "40", "--top-p", "0.9", "--seed", "3"]
    kept = tmp_path / "elsewhere"
    result = run(*fit_arguments(model, texts, tmp_path / "e.json", "--ridge", "0.1", "--work-dir", kept, *options))
    assert result.exit_code == 0, result.output
    fitted = Energy.load(tmp_path / "e.json")
    assert (fitted.base, fitted.normalization, fitted.diagnostics.seed) == ("model", "global", 3)
    settings = fitted.proposal_settings
    assert (settings.top_k, settings.top_p, settings.temperature) == (40, 0.9, 0.97)
    assert len(list(kept.glob("batch-*.npz"))) == 6
    assert not (tmp_path / "e.json.candidates").exists()
    plain = run(*fit_arguments(model, texts, tmp_path / "p.json", "--ridge", "0.1", "--seed", "3"))
    assert plain.exit_code == 0
    assert not torch.equal(fitted.mu, Energy.load(tmp_path / "p.json").mu)


def test_ctrl_c_is_one_line_and_the_next_run_goes_on(model, texts, tmp_path, energy, monkeypatch):
    propose, calls = TransformersProposal.propose, []

    def interrupted(self, prefixes, seed):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return propose(self, prefixes, seed)

    output = tmp_path / "energy.json"
    arguments = fit_arguments(model, texts, output, "--ridge", "0.01")
    monkeypatch.setattr(TransformersProposal, "propose", interrupted)
    result = run(*arguments)
    assert result.exit_code == 130
    assert result.output.splitlines()[-1] == "interrupted; run the same command again to go on from here"
    assert "Traceback" not in result.output
    assert not output.exists()
    assert run(*arguments).exit_code == 0
    assert len(calls) == 3 + 4  # of six batches two were kept
    assert json.loads(output.read_text()) == json.loads(energy.read_text())


@pytest.mark.parametrize(
    "command", ["metrics", "generate", "doctor", "decode to -", "decode from -", "decode", "fit -"]
)
def test_only_what_resumes_says_so(energy, model, texts, tmp_path, monkeypatch, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in ("text_metrics.TextMetrics.__init__", "cli._decoder", "doctor.facts"):
        monkeypatch.setattr(f"daemon_fast.{name}", interrupted)
    monkeypatch.setattr(TransformersProposal, "propose", interrupted)
    arguments = {
        "metrics": ["metrics", texts],
        "generate": ["generate", "--energy", energy, "--prompt", "w1"],
        "doctor": ["doctor"],
        "decode to -": decode_arguments(energy, texts, "-"),
        "decode from -": decode_arguments(energy, "-", tmp_path / "out.jsonl"),
        "decode": decode_arguments(energy, texts, tmp_path / "out.jsonl"),
        "fit -": fit_arguments(model, "-", tmp_path / "e.json"),
    }[command]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=Path(texts).read_text())
    assert result.exit_code == 130, result.output
    again = "; run the same command again to go on from here" if command == "decode" else ""
    assert result.output.splitlines()[-1] == f"interrupted{again}"


def test_a_model_in_a_folder_is_found_from_every_folder(model, texts, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    shutil.copytree(model, tmp_path / "here" / "tiny")
    monkeypatch.chdir(tmp_path / "here")
    assert run(*fit_arguments("tiny", texts, "e.json", "--ridge", "0.01")).exit_code == 0
    assert Energy.load("e.json").proposal_settings.model_id == str(tmp_path / "here" / "tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "w1 w2"}\n')
    assert run(*decode_arguments("here/e.json", "in.jsonl", "out.jsonl")).exit_code == 0
    (tmp_path / "here" / "tiny").rename(tmp_path / "moved")
    again = decode_arguments("here/e.json", "in.jsonl", "again.jsonl")
    told = "here/tiny': no such folder. The artefact here/e.json names it: --model says where it is now"
    fails(run(*again), told)
    fails(run("evaluate", "--energy", "here/e.json", "--data", texts, "--output", "out"), told)
    result = run(*again, "--model", "./gone")
    fails(result, "./gone': no such folder")
    assert "artefact" not in result.output
    with pytest.warns(UserWarning, match="mu was fitted with other proposal settings"):
        assert run(*again, "--model", "moved").exit_code == 0
    (tmp_path / "moved").rename(tmp_path / "here" / "tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run(*again, "--model", "here/tiny", "--force").exit_code == 0


def test_a_file_in_the_place_of_candidates_is_known_before_a_model_is_loaded(texts, tmp_path):
    (tmp_path / "e.json.candidates").touch()
    result = run(*fit_arguments(tmp_path / "none", texts, tmp_path / "e.json"))
    assert result.exit_code == 2
    assert "e.json.candidates is no folder" in result.output
    (tmp_path / "out.jsonl.parts").touch()
    (tmp_path / "in.jsonl").write_text('{"prompt": "w1 w2"}\n')
    code, shown = without_torch(*decode_arguments("e.json", tmp_path / "in.jsonl", tmp_path / "out.jsonl"))
    assert code == 2
    assert "out.jsonl.parts is no folder" in shown


def test_fit_leaves_bad_records_out_and_says_so(model, texts, tmp_path, energy):
    lines = Path(texts).read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:3], "{", *lines[3:], '{"text": 1}']))
    with pytest.warns(UserWarning, match=r"2 records of .* are left out: bad.jsonl, line 4 is not JSON"):
        result = run(*fit_arguments(model, tmp_path / "bad.jsonl", tmp_path / "e.json", "--ridge", "0.01"))
    assert result.exit_code == 1, result.output
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads(energy.read_text())


def decode_arguments(energy, source, output, *more):
    return ["decode", str(source), str(output), "--energy", str(energy), "--field", "prompt", *more]


def test_decode_continues_a_file(energy, tmp_path):
    prompts = [{"prompt": tiny.text(1 + i % 4, i), "id": i} for i in range(70)]
    prompts[7]["prompt"], prompts[66]["prompt"] = "", tiny.text(50, 0)
    lines = [json.dumps(prompt) for prompt in prompts]
    lines[3] = lines[3][:-1]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    result = run(*decode_arguments(energy, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--num-samples", "2"))
    assert result.exit_code == 1, result.output
    assert "67 of 70 records continued" in result.stdout
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record.get("id") for record in found] == [i if i != 3 else None for i in range(70)]
    for i, problem in (
        (3, "in.jsonl, line 4 is not JSON"),
        (7, "in.jsonl, line 8: its text is empty"),
        (66, "in.jsonl, line 67: its text has 50 tokens; with max_new_tokens = 20 it exceeds"),
    ):
        assert found[i]["daemon"]["error"].startswith(problem)
        assert problem in result.stderr
    good = found[69]["daemon"]
    assert all(15 <= len(text.split()) <= 20 for text in good["texts"])  # <unk> is no word
    assert len(good["metrics"]) == 2
    assert set(good["metrics"][0]) == {"sr_1", "tr_8", "ent"}
    assert 1 <= good["ess"] <= 16


def test_decode_killed_and_run_again_gives_the_same_bytes(energy, tmp_path):
    source, whole, cut = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    source.write_text("".join(json.dumps({"prompt": tiny.text(3, i)}) + "\n" for i in range(150)))
    assert run(*decode_arguments(energy, source, whole)).exit_code == 0
    arguments = [*COMMAND, *decode_arguments(energy, source, cut)]
    process = subprocess.Popen(arguments, env=NO_HUB, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    log = tmp_path / "cut.jsonl.parts" / RESULTS
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 4 <= len(log.read_bytes().splitlines()) < 150
    assert not cut.exists()
    assert run(*decode_arguments(energy, source, cut)).exit_code == 0
    assert cut.read_bytes() == whole.read_bytes()


def test_decode_from_and_to_pipes(energy, tmp_path):
    content = "".join(json.dumps({"prompt": tiny.text(3, i), "id": i}) + "\n" for i in range(6))
    (tmp_path / "in.jsonl").write_text(content)
    assert run(*decode_arguments(energy, tmp_path / "in.jsonl", tmp_path / "out.jsonl")).exit_code == 0
    expected = (tmp_path / "out.jsonl").read_text()
    arguments = [str(argument) for argument in decode_arguments(energy, "-", "-")]
    result = CliRunner().invoke(main, arguments, input=content)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected
    assert "6 of 6 records continued" in result.stderr


def test_doctor():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("ok on cpu") == 9
    assert torch.__version__ in result.stdout


def test_help_names_every_command():
    result = run("--help")
    for command in ("fit", "generate", "evaluate", "metrics", "doctor", "demo"):
        assert command in result.output


def test_help_of_every_command():
    for command in main.commands:
        for option in ("-h", "--help"):
            result = run(command, option)
            assert result.exit_code == 0
            assert "--quiet" in result.stdout
            assert "--verbose" in result.stdout


def without_torch(*arguments):
    """The exit code and standard error of a command that must not have imported torch."""
    code = (
        "import sys, atexit; from daemon_fast.cli import main\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=NO_HUB, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == "False", done.stderr
    return done.returncode, done.stderr


def test_help_and_mistyped_names_need_no_torch(energy, texts):
    assert without_torch("--help")[0] == 0
    assert without_torch("fit", "--help")[0] == 0
    for arguments, meant in (
        (["fit", "--model", "smollm2-135m-instuct", "--data", texts], "'smollm2-135m-instuct': did you mean 'smollm2-"),
        (["fit", "--model", "nobody/nothing", "--data", texts], "nor in the hub's cache, and HF_HUB_OFFLINE is set"),
        (["decode", "none.jsonl", "o.jsonl", "--energy", energy], "none.jsonl can't be read: No such file"),
        (["decode", texts, "o.csv", "--energy", energy], "o.csv: unknown format"),
        (["decode", texts, "no/o.jsonl", "--energy", energy], "there is no folder no"),
        (["decode", texts, texts, "--energy", energy], "is there already: --force"),
    ):
        code, shown = without_torch(*arguments)
        assert code == 2
        assert meant in shown
        assert "Traceback" not in shown


def test_quiet_and_verbose(energy, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    assert "0/1" in run(*decode_arguments(energy, tmp_path / "in.jsonl", tmp_path / "a.jsonl")).stderr
    assert run(*decode_arguments(energy, tmp_path / "in.jsonl", tmp_path / "b.jsonl", "--quiet")).stderr == ""
    assert "0/1" in run(*decode_arguments(energy, tmp_path / "in.jsonl", tmp_path / "c.jsonl")).stderr
    again = decode_arguments(energy, tmp_path / "in.jsonl", tmp_path / "a.jsonl", "--verbose")
    shown = subprocess.run([*COMMAND, *again], env=NO_HUB, capture_output=True, text=True, check=False)
    assert shown.returncode == 2
    assert "Traceback" in shown.stderr
    assert "Error: " in shown.stderr.splitlines()[-1]


def test_completion_of_every_shell():
    for shell in ("bash", "zsh", "fish"):
        result = run("completion", shell)
        assert result.exit_code == 0
        assert "_DAEMON_FAST_COMPLETE" in result.stdout
    asked = {"_DAEMON_FAST_COMPLETE": "bash_complete", "COMP_WORDS": "daemon-fast dec", "COMP_CWORD": "1"}
    code = "from daemon_fast.cli import main; main(prog_name='daemon-fast')"
    shown = subprocess.run([sys.executable, "-c", code], env=NO_HUB | asked, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["plain,decode"]


def test_studies_are_named_as_they_are():
    from daemon_fast.experiments.studies import STUDIES as there

    assert tuple(there) == STUDIES


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_empty_text_file(model, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    fails(run(*fit_arguments(model, tmp_path / "empty.txt", tmp_path / "e.json")), "empty.txt holds no text")
    fails(run("metrics", tmp_path / "empty.txt"), "empty.txt holds no text")


def test_prefix_longer_than_the_context(energy):
    fails(run("generate", "--energy", energy, "--prompt", tiny.text(60, 0)), "exceeds the model's context of 64")


def test_no_usable_prefixes(model, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2\nw3 w4 w5\n")
    fails(run(*fit_arguments(model, tmp_path / "short.txt", tmp_path / "e.json")), "no usable prefixes: 0 of 2 texts")


def test_unknown_metric(model, texts, tmp_path):
    arguments = [*fit_arguments(model, texts, tmp_path / "e.json"), "--metrics", "sr_2,bleu"]
    fails(run(*arguments), "unknown metric 'bleu'; known: sr_<n>, tr_<w>, div, ent, coh")


def test_artefact_for_another_vocabulary(energy, tmp_path):
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer(words=30).save_pretrained(tmp_path)
    result = run("generate", "--energy", energy, "--prompt", "w1", "--model", tmp_path)
    fails(result, "token metrics don't carry over; fit again for this model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent(energy, model, texts, tmp_path):
    fails(run("generate", "--energy", energy, "--prompt", "w1", "--device", "cuda"), "sees no GPU")
    fails(run(*fit_arguments(model, texts, tmp_path / "e.json", "--device", "cuda:1")), "sees no GPU")


def test_unknown_device(energy):
    fails(run("generate", "--energy", energy, "--prompt", "w1", "--device", "gpu"), "device 'gpu'")


def test_unreadable_model(energy, texts, tmp_path):
    fails(run(*fit_arguments(tmp_path / "none", texts, tmp_path / "e.json")), "no such folder")
    fails(run(*fit_arguments("x.gguf", texts, tmp_path / "e.json")), "x.gguf': no such file")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    fails(run("generate", "--energy", energy, "--prompt", "w1", "--model", tmp_path / "broken"), "can't be loaded")


def test_broken_artefact(tmp_path):
    (tmp_path / "e.json").write_text('{"schema": 1')
    fails(run("generate", "--energy", tmp_path / "e.json", "--prompt", "w1"), "is not JSON")


def test_nothing_to_continue(energy):
    fails(run("generate", "--energy", energy), "Missing option '--prompt'")


def test_infeasible_targets_say_what_would_help_and_candidates_are_reused(model, other_texts, tmp_path, monkeypatch):
    output = tmp_path / "e.json"
    exact = run(*fit_arguments(model, other_texts, output, "--ridge", "0"))
    fails(exact, "out of reach of any weighting of the candidates: ent (target ")
    assert "leave out ent: the others are within reach" in exact.output
    assert f"The candidates are kept in {output}.candidates" in exact.output
    assert not output.exists()

    def drawn_again(*_):
        raise AssertionError

    monkeypatch.setattr(TransformersProposal, "propose", drawn_again)
    result = run(*fit_arguments(model, other_texts, output, "--ridge", "0", "--metrics", "sr_1,tr_8"))
    assert result.exit_code == 0, result.output
    assert Energy.load(output).names == ["sr_1", "tr_8"]
    for option, value in (("--ridge", "1"), ("--normalization", "global"), ("--base", "model")):
        changed = fit_arguments(model, other_texts, output, "--metrics", "sr_1,tr_8", "--force", option, value)
        assert run(*changed).exit_code in (0, 1)


def test_targets_that_are_not_met_are_a_warning_a_field_and_exit_code_1(model, other_texts, tmp_path):
    with pytest.warns(TargetsNotMet, match=r"ent \(target .*not even M = 1024"), pytest.warns(LowEffectiveSampleSize):
        result = run(*fit_arguments(model, other_texts, tmp_path / "e.json", "--metrics", "ent"))
    assert result.exit_code == 1, result.output
    assert Energy.load(tmp_path / "e.json").diagnostics.unmet == ["ent"]


def test_nothing_is_overwritten_without_force(model, texts, tmp_path, monkeypatch):
    output = tmp_path / "e.json"
    arguments = fit_arguments(model, texts, output, "--ridge", "0.01")
    output.write_text("mine")
    fails(run(*arguments), "e.json is there already: --force")
    assert output.read_text() == "mine"
    assert not (tmp_path / "e.json.candidates").exists()
    assert run(*arguments, "--force").exit_code == 0
    assert Energy.load(output).names == ["sr_1", "tr_8", "ent"]
    fails(run(*arguments), "e.json is there already: --force")


def test_all_problems_are_told_at_once_and_nothing_is_drawn(tmp_path, texts):
    (tmp_path / "file").touch()
    bad = {
        "--ridge": "-1", "--num-prefixes": "x", "--num-candidates": "0", "--top-p": "2", "--temperature": "0",
        "--seed": "-1", "--batch-size": "0", "--dtype": "int3", "--bootstrap": "-2", "--metrics": "foo,bar,coh",
        "--encoder": str(tmp_path / "none"), "--model": str(tmp_path / "none"), "--device": "gpu9",
        "--data": str(tmp_path / "none.jsonl"), "--output": str(tmp_path / "none" / "e.json"),
        "--work-dir": str(tmp_path / "file"),
    }  # fmt: skip
    result = run("fit", *(part for pair in bad.items() for part in pair))
    assert result.exit_code == 2
    lines = result.output.splitlines()
    for message in (
        "--ridge = '-1' must be", "'--num-prefixes': 'x'", "num_candidates = 0", "top_p = 2.0", "temperature = 0.0",
        "'--seed': -1", "'--batch-size': 0", "'--dtype': 'int3'", "bootstrap = -2", "unknown metric 'foo'",
        "unknown metric 'bar'", "none': no such folder", "device 'gpu9'", "none.jsonl can't be read",
        "there is no folder", "file is no folder",
    ):  # fmt: skip
        assert sum(line.startswith("Error: ") and message in line for line in lines) == 1, message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_encoder_is_known_before_anything_is_drawn(model, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    result = run(*fit_arguments(model, texts, tmp_path / "e.json", "--metrics", "coh", "--num-prefixes", "99"))
    assert result.exit_code == 2
    assert "Error: metric coh needs the package sentence_transformers" in result.output
    assert "Error: no usable prefixes: 40 of 40 texts" in result.output
    assert not list(tmp_path.iterdir())


def test_more_candidates_than_memory_holds_are_refused_and_bind_no_later_run(model, texts, tmp_path):
    arguments = fit_arguments(model, texts, tmp_path / "e.json", "--ridge", "0.01")
    fails(run(*arguments, "--num-candidates", "1000000000"), "num_candidates = 1000000000 of ")
    assert run(*arguments).exit_code == 0


def test_candidates_of_another_run(model, texts, tmp_path):
    output = tmp_path / "e.json"
    assert run(*fit_arguments(model, texts, output, "--ridge", "0.01")).exit_code == 0
    again = run(*fit_arguments(model, texts, output, "--ridge", "0.01", "--seed", "1", "--force"))
    fails(again, "holds candidates of another run")


def test_other_weights_in_the_same_folder_are_another_run(texts, tmp_path, monkeypatch):
    model, output, prompts = tiny.saved(tmp_path / "model"), tmp_path / "e.json", tmp_path / "in.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": tiny.text(3, i)}) + "\n" for i in range(8)))
    arguments = fit_arguments(model, texts, output, "--ridge", "0.01")
    assert run(*arguments).exit_code == 0
    interrupted = [*decode_arguments(output, prompts, tmp_path / "out.jsonl")]
    with monkeypatch.context() as patch:
        patch.setattr("daemon_fast.data.records.DecodeWork._decoded", _after_one_batch())
        assert run(*interrupted).exit_code == 130
    torch.manual_seed(7)
    tiny.FAMILIES["llama"]().save_pretrained(model)
    fails(run(*arguments, "--force"), "holds candidates of another run (weights is '")
    fails(run(*interrupted), "holds parts of another run (weights is '")
    tiny.saved(model)  # the first again
    assert run(*arguments, "--force").exit_code == 0
    assert run(*interrupted).exit_code == 0


def _after_one_batch():
    from daemon_fast.data.records import DecodeWork

    decoded, calls = DecodeWork._decoded, []

    def interrupted(self, prefixes, seed):
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decoded(self, prefixes, seed)

    return interrupted


@pytest.mark.parametrize("ridge", ["-1", "nan", "inf", "much"])
def test_a_bad_ridge_is_named_before_anything_is_drawn(model, texts, tmp_path, ridge):
    fails(run(*fit_arguments(model, texts, tmp_path / "e.json", f"--ridge={ridge}")), f"--ridge = {ridge!r} must be")
    assert not list(tmp_path.iterdir())


def test_cross_validation_is_the_default_of_fit(model, texts, tmp_path):
    result = run(*fit_arguments(model, texts, tmp_path / "e.json"))
    assert result.exit_code == 0, result.output
    fitted = Energy.load(tmp_path / "e.json")
    assert fitted.diagnostics.ridge in RIDGES
    assert f"ridge {fitted.diagnostics.ridge:g};" in result.output


@pytest.mark.parametrize("ngrams", ["0", "2,x", "-1"])
def test_bad_sizes(texts, ngrams):
    fails(run("metrics", texts, "--ngrams", ngrams), f"--ngrams = {ngrams!r} must be whole numbers >= 1")


def test_no_traceback_from_the_installed_command(tmp_path):
    result = subprocess.run(
        [*COMMAND, "metrics", str(tmp_path / "none.txt")], env=NO_HUB, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.strip() == f"Error: {tmp_path / 'none.txt'} can't be read: No such file or directory"


def test_evaluate_writes_a_report(energy, model, texts, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["evaluate", "--energy", energy, "--data", texts, "--prefix-tokens", 5, "--held-out", 10]
    arguments += ["--study", "perplexity", "--study", "tail", "--output", tmp_path / "out"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (found,) = report["domains"].values()
    assert (found["fit_prefixes"], found["target_texts"], found["held_out"]) == (24, 24, 10)
    assert found["studies"]["perplexity"]["model"] > 1
    assert found["verdict"][0] in result.output
    # What the fit drew and scored is read where the fit left it: only the held-out part is new.
    made = sorted(path.name.split("-")[0] for path in (tmp_path / "out" / "energy").iterdir() if path.is_dir())
    assert made == ["held", "human"]
    assert "1.2 The tail" in (tmp_path / "out" / "report.html").read_text()
    fails(run(*arguments), "report.json is there already")
    arguments.append("--force")
    assert run(*arguments).exit_code == 0
    fails(run(*arguments, "--study", "luck"), "'luck' is not one of 'alignment', 'perplexity'")
    fails(run(*arguments, "--held-out", 11), "holds candidates of another run (num_prefixes is 10 there, 11 here)")
    fails(run(*arguments, "--data", texts), "--data is given 2 times for 1 --energy")


def test_more_human_texts_than_prefixes_give_the_targets(model, texts, tmp_path):
    arguments = fit_arguments(model, texts, tmp_path / "energy.json", "--ridge", "0.01", "--num-targets", "40")
    assert run(*arguments).exit_code == 0
    fitted = Energy.load(tmp_path / "energy.json")
    assert (fitted.diagnostics.num_prefixes, fitted.diagnostics.num_targets) == (24, 40)
    fails(run(*fit_arguments(model, texts, tmp_path / "e.json", "--num-targets", "41")), "40 of 40 texts")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_standard_output(tmp_path):
    (tmp_path / "a.txt").write_text("a b a\n")
    arguments = [*COMMAND, "metrics", str(tmp_path / "a.txt")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(arguments, env=NO_HUB, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "Error: standard output can't be written: the disk is full"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_reader_that_has_enough(tmp_path):
    (tmp_path / "a.txt").write_text("a b a\n" * 20_000)
    arguments = [*COMMAND, "metrics", str(tmp_path / "a.txt"), "--json"]
    process = subprocess.Popen(arguments, env=NO_HUB, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("{")
    process.stdout.close()
    shown = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert "Traceback" not in shown
    assert "Exception ignored" not in shown


@pytest.mark.parametrize("module", ["click", "daemon_fast.embedded"])
def test_interrupted_before_its_imports_are_done(tmp_path, module):
    """What a Ctrl-C in the first tenth of a second meets."""
    (tmp_path / "begin.py").write_text(
        f"""
import runpy, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
runpy.run_module("daemon_fast", run_name="__main__")
"""
    )
    found = subprocess.run([sys.executable, str(tmp_path / "begin.py")], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (130, "interrupted\n")


def test_closed_streams_and_a_full_disk_are_no_tracebacks(texts):
    for command in (f"metrics {texts} >&-", f"metrics {texts} --json >&-", "metrics - <&-", f"metrics {texts} 2>&-"):
        line = f"{sys.executable} -m daemon_fast {command}"
        found = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        assert "Traceback" not in found.stderr
        assert found.returncode == (2 if "<" in command else 0)
    for command in ("--help", "--version"):
        line = f"{sys.executable} -m daemon_fast {command} > /dev/full"
        found = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        assert (found.returncode, found.stderr) == (2, "Error: standard output can't be written: the disk is full\n")


def test_text_that_the_terminal_cannot_show(texts):
    """Of any output in the encoding of an old terminal, and the name of a file that is no UTF-8."""
    found = subprocess.run(
        [*COMMAND, "metrics", texts], capture_output=True, check=False, env={**NO_HUB, "PYTHONIOENCODING": "cp437"}
    )
    assert (found.returncode, found.stderr) == (0, b"")
    show = "import sys; from daemon_fast.cli import main; main(['doctor'], standalone_mode=False)"
    show = show.replace("['doctor']", "['completion', 'bash']") + "; print('caf\\udce9 \u4e2d')"
    found = subprocess.run(
        [sys.executable, "-c", show], capture_output=True, text=True, check=False,
        env={**NO_HUB, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert found.stdout.endswith("caf\\udce9 \\u4e2d\n"), found.stderr
