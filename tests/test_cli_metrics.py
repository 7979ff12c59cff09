"""`daemon-fast metrics`: rows, means, filters, and what is said of bad input."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import pytest
import tiny
from click.testing import CliRunner

from daemon_fast.cli import main


def run(*arguments):
    return CliRunner().invoke(main, ["metrics", *map(str, arguments)])


def rows(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def fails(result, message):
    """One line that holds the message, exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert [line for line in result.output.splitlines() if line.startswith("Error: ") and message in line]
    assert "Traceback" not in result.output


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [
        '{"text": "a b a b a", "id": 3, "n": 1.5}', "", '{"text": "", "id": "e"}', "{", '{"text": "\\ud835", "id": 4}',
        '{"text": "x y z w", "more": {"é": [null]}}',
    ]  # fmt: skip
    path.write_text("\n".join(lines))
    return path


def test_means_and_distinct_ngrams(tmp_path):
    (tmp_path / "a.txt").write_text("a b a b a\n\n" + "x " * 30 + "\n")
    result = run(tmp_path / "a.txt", "--ngrams", "2,31", "--windows", "2")
    assert result.exit_code == 0, result.output
    assert "2 texts, 0 empty, 0 unusable" in result.stdout
    shown = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()[1:]}
    assert shown["sr_2"] == [f"{50 * (0.5 + 28 / 29):.3f}", "±", f"{50 * (28 / 29 - 0.5):.3f}"]
    assert shown["tr_2"][0] == f"{50 * (0.6 + 29 / 30):.3f}"
    assert shown["distinct_2"] == [f"{100 * 3 / 33:.3f}", "3", "of", "33"]  # ab, ba, xx
    assert shown["distinct_31"] == ["-", "0", "of", "0"]


def test_a_row_for_each_record(jsonl):
    result = run(jsonl, "--json", "--ngrams", "2", "--windows", "2")
    assert result.exit_code == 1, result.output
    found = rows(result)
    assert found[0] == {"source": "in.jsonl", "line": 1, "id": 3, "sr_2": 0.5, "tr_2": pytest.approx(0.6)}
    assert found[1] == {"source": "in.jsonl", "line": 3, "id": "e", "empty": True, "sr_2": None, "tr_2": None}
    assert [(row["line"], row["error"][:12]) for row in found[2:4]] == [(4, "is not JSON:"), (5, "has half a s")]
    assert found[4] == {"source": "in.jsonl", "line": 6, "sr_2": 0, "tr_2": 0}
    assert "in.jsonl, line 4 is not JSON" in result.stderr
    assert [row.get("id") for row in rows(run(jsonl, "--json", "--id-field", "n"))] == [1.5, None, None, None, None]


def test_rows_go_to_a_file(jsonl, tmp_path):
    output = tmp_path / "out.jsonl"
    result = run(jsonl, "--json", "--gopher", "--output", output)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert output.read_text(encoding="utf-8") == run(jsonl, "--json", "--gopher").stdout
    assert json.loads(output.read_text().splitlines()[0])["top_2_gram"] == 2 * 3 / 9
    fails(run(jsonl, "--json", "--output", output), "out.jsonl is there already")
    assert run(jsonl, "--json", "--gopher", "--output", output, "--force").exit_code == 1
    assert output.read_text(encoding="utf-8") == run(jsonl, "--json", "--gopher").stdout
    fails(run(jsonl, "--json", "--output", tmp_path / "none" / "o.jsonl"), "can't be written")


def test_filter_writes_the_records_that_pass(jsonl, tmp_path):
    result = run(jsonl, "--filter", "sr_2 <= 0.2 and top_2_gram < 0.5")
    assert result.exit_code == 1
    assert rows(result) == [{"text": "x y z w", "more": {"é": [None]}}]
    assert "1 of 5 records pass (2 texts, 1 empty, 2 unusable)" in result.stderr
    assert "in.jsonl, line 5 has half a surrogate" in result.stderr
    result = run(jsonl, "--filter", "tr_2 > 0.5", "--output", tmp_path / "out.jsonl")
    assert result.stdout == ""
    assert (tmp_path / "out.jsonl").read_text() == '{"text": "a b a b a", "id": 3, "n": 1.5}\n'
    assert rows(run(jsonl, "--filter", "sr_2 > 2")) == []
    (tmp_path / "odd.jsonl").write_text('{"text":"a",  "n": 1.50, "e": "\\u00e9"}\n')  # as it was read, to the byte
    assert run(tmp_path / "odd.jsonl", "--filter", "sr_2 == 0").stdout == (tmp_path / "odd.jsonl").read_text()


def test_output_is_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "猫 é"}, ensure_ascii=False), encoding="utf-8")
    command = [sys.executable, "-c", "from daemon_fast.cli import main; main()", "metrics", tmp_path / "a.jsonl"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    found = subprocess.run([*command, "--filter", "sr_2 < 1"], env=environment, capture_output=True, check=True)
    assert found.stdout.decode("utf-8") == '{"text": "猫 é"}\n'


def test_characters_and_the_warning_about_text_without_spaces(tmp_path):
    (tmp_path / "a.txt").write_text("今天很好。" * 6 + "\na few words\n", encoding="utf-8")
    result = run(tmp_path / "a.txt")
    assert "warning: 1 of 2 texts have more than 12 characters a word" in result.stderr
    assert "--unit character" in result.stderr
    result = run(tmp_path / "a.txt", "--unit", "character", "--json", "--ngrams", "5", "--windows", "1")
    assert "warning" not in result.stderr
    assert rows(result)[0]["sr_5"] == pytest.approx(1 - 5 / 26)


def test_tokens(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "a.txt").write_text("w1 w2 w1 w2\n<eos> w3 <eos>\n<eos>\n")
    found = rows(run(tmp_path / "a.txt", "--tokenizer", tmp_path, "--json", "--ngrams", "1", "--windows", "1"))
    assert [row["sr_1"] for row in found] == [0.5, 0.0, None]
    assert found[2]["empty"] is True


def test_help_names_the_metrics():
    shown = " ".join(run("--help").output.split())
    for word in ("sr_n", "tr_w", "distinct_n", "top_2_gram", "duplicated_5_n_grams", "dup_line_frac", "empty"):
        assert word in shown


def test_bad_options(jsonl, tmp_path):
    fails(run(jsonl, "--filter", "sr_2 > 0.2", "--json"), "--json and --filter both say what is written")
    fails(run(jsonl, "--output", tmp_path / "o"), "needs --json or --filter")
    fails(run(jsonl, "--unit", "character", "--tokenizer", "x"), "both say what is counted")
    fails(run(jsonl, "--filter", "bleu > 1"), "unknown metric 'bleu'; known: sr_<n>, tr_<w>, dup_para_frac")
    fails(run(jsonl, "--filter", "sr_2 >"), "expected a number at position 7, found its end")
    fails(run(jsonl, "--ngrams", "", "--windows", ""), "no metrics")
    several = run(jsonl, "--ngrams", "x", "--windows", "0", "--filter", "(sr_2 > 1")
    for message in ("--ngrams = 'x' must", "--windows = '0' must", "expected ')' at position 10"):
        fails(several, message)
    for name in ("bleu", "rouge"):
        fails(run(jsonl, "--filter", "bleu > 1 or rouge < 2"), f"unknown metric '{name}'")
    for sizes in ("0", "a", "2,2", "99999999999", "-1", "1.5"):
        fails(
            run(jsonl, "--ngrams", sizes), f"--ngrams = '{sizes}' must be whole numbers >= 1 and below 10^9, each once"
        )


def test_files_without_a_text(tmp_path):
    for content in ("", "\n\n"):
        (tmp_path / "a.jsonl").write_text(content)
        for options in ((), ("--json",), ("--filter", "sr_2 < 1")):
            fails(run(tmp_path / "a.jsonl", *options), "a.jsonl holds no text")
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": 5}\n')
    fails(run(tmp_path / "a.jsonl"), "a.jsonl holds no text: a.jsonl, line 2 has no string field 'text'")
    result = run(tmp_path / "a.jsonl", "--json", "--ngrams", "2", "--windows", "")
    assert result.exit_code == 1
    assert [row.get("empty") for row in rows(result)] == [True, None]
    fails(run(tmp_path / "none.jsonl"), "none.jsonl can't be read")


@pytest.mark.parametrize("what", [["--json"], ["--filter", "sr_2 <= 1"]])
def test_an_output_is_packed_as_its_name_says(jsonl, tmp_path, what):
    expected = run(jsonl, *what).stdout
    assert run(jsonl, *what, "--output", "-").stdout == expected
    assert not os.path.exists("-")
    assert run(jsonl, *what, "--output", tmp_path / "o.jsonl.gz").exit_code == 1
    assert gzip.decompress((tmp_path / "o.jsonl.gz").read_bytes()).decode() == expected
    pyarrow = pytest.importorskip("pyarrow")
    assert run(jsonl, *what, "--output", tmp_path / "o.ndjson.ZST").exit_code == 1
    with pyarrow.input_stream(str(tmp_path / "o.ndjson.ZST"), compression="zstd") as packed:
        assert packed.read().decode() == expected


@pytest.mark.parametrize("name", ["o.csv", "o.parquet", "o.txt", "o", "o.jsonl.bz2", "o.json"])
def test_an_output_of_unknown_format_is_refused_before_the_work(tmp_path, name):
    result = run(tmp_path / "none.jsonl", "--json", "--output", tmp_path / name, "--tokenizer", "no/such")
    fails(result, f"{name}: unknown format. Known by name: .jsonl, .ndjson (these also with .gz or .zst), or -")
    assert not list(tmp_path.iterdir())


def test_arguments_are_utf_8_where_the_locale_is_not(tmp_path):
    (tmp_path / "caf\u00e9.jsonl").write_text('{"t\u00e9": "a a", "n\u00e9": 7}\n', encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-m", "daemon_fast", "metrics", "caf\u00e9.jsonl", "--json", "--ngrams", "2"]
    command += ["--windows", "", "--field", "t\u00e9", "--id-field", "n\u00e9"]
    found = subprocess.run(command, env=ascii_only, cwd=tmp_path, capture_output=True, check=False)
    assert (found.returncode, found.stderr) == (0, b"")
    assert json.loads(found.stdout.decode()) == {"source": "caf\u00e9.jsonl", "line": 1, "id": 7, "sr_2": 0.0}
