"""The report: what it holds, that it holds nothing else, and a real browser's opinion of it."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from test_studies import MU, collected

from daemon_fast.experiments import studies
from daemon_fast.experiments.measures import noise_floor

pytest.importorskip("matplotlib")
from daemon_fast.experiments.report import SECTIONS, write_report

VOID = {"meta", "link", "br", "path", "use", "rect", "circle", "line"}


@pytest.fixture(scope="module")
def report():
    to_fit, held_out, pool = collected(n=60), collected(n=60, seed=5), collected(n=4, m=200, seed=7)
    spread = to_fit.human.double().std(0)
    methods = {"sampling": held_out.features[:, 0], "daemon": held_out.expected(MU)}
    table = studies.alignment(held_out, methods, spread)
    table[1]["mauve"] = {"value": 0.8125, "error": 0.0042}
    domain = {
        "names": held_out.names,
        "prefixes": {"fit": 60, "held_out": 60},
        "mu": MU.tolist(),
        "noise_floor": noise_floor(60),
        "ess": {"mean": 31.4, "min": 20.0, "candidates": 50},
        "alignment": table,
        "perplexity": studies.perplexity(held_out, MU, [5, 10]),
        "convergence": {
            "per_prefix": studies.convergence(pool, MU, [5, 10, 25, 50]),
            "global": {"rows": [], "infeasible": "metric sr_2 is out of reach"},
        },
        "one_metric": studies.one_metric(to_fit, held_out, "sr_2"),
        "temperatures": [
            *studies.temperatures({1.0: (to_fit, held_out)}, MU),
            {"temperature": 0.8, "method": "refitted", "infeasible": True},
        ],
        "ablation": studies.ablation(to_fit, held_out),
        "forward_kl": studies.forward_kl(to_fit, held_out),
        "tail": studies.tail_quality(held_out),
    }
    assert set(SECTIONS) <= set(domain)
    transfer = studies.transfer({"wiki": held_out}, {"wiki": MU}, {"wiki": spread})
    return {
        "title": "A <title> & more",
        "command": "daemon-fast evaluate",
        "settings": {"seed": 0},
        "domains": {"wiki": domain},
        "transfer": transfer,
    }


def written(report, tmp_path, name="report.html"):
    write_report(report, tmp_path / name)
    return (tmp_path / name).read_text(encoding="utf-8")


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_every_study_has_its_section_and_its_numbers(report, tmp_path):
    page = written(report, tmp_path)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    headings = re.findall(r"<h[23]>(\d)\. ", page)
    assert headings == [str(i) for i in range(1, 10)]
    assert tags.seen.count("svg") == 3  # no diversity or coherence among these metrics: no figure of the sweep
    domain = report["domains"]["wiki"]
    for text in (
        "31.4 of 50",
        "0.812 ± 0.004",
        f"{100 * domain['alignment'][0]['mean'][0]:.2f} ± ",
        f"{domain['perplexity']['model']:.3f}",
        f"{domain['ablation'][1]['shift'][0]:+.3f}",
        f"{domain['tail'][0]['from']:.2f} to",
        "metric sr_2 is out of reach",
        "out of reach</td>",
        f"{report['transfer'][0]['distance']:.3f}",
    ):
        assert text in page
    nearest = [row["method"] for row in domain["alignment"][1:] if row["nearest"]]
    assert nearest
    assert page.count("<td class=mark>") == 2 + len(domain["names"])  # the nearest, and the metrics left out


def test_it_is_the_same_each_time_and_loads_nothing(report, tmp_path):
    page = written(report, tmp_path)
    assert page == written(copy.deepcopy(report), tmp_path, "again.html")
    links = re.findall(r"""(?:href|src|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "<script" not in page


def test_what_is_missing_is_left_out(report, tmp_path):
    for missing in SECTIONS:
        domain = {key: value for key, value in report["domains"]["wiki"].items() if key != missing}
        page = written({**report, "domains": {"wiki": domain}}, tmp_path)
        assert len(re.findall(r"<h3>\d\. ", page)) == len(SECTIONS) - 1
    assert "<h2>" not in written({"title": "empty"}, tmp_path)


def test_text_is_escaped(report, tmp_path):
    page = written({**report, "domains": {"<b>&": report["domains"]["wiki"]}}, tmp_path)
    assert "<h2>&lt;b&gt;&amp;</h2>" in page
    assert "A &lt;title&gt; &amp; more" in page


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def opened(path):
    """The page as a browser leaves it, and what it says on the console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run([BROWSER, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the report in")
def test_a_browser_opens_it_without_an_error(report, tmp_path):
    written(report, tmp_path)
    page, console = opened(tmp_path / "report.html")
    assert "9. Transfer" in page
    assert console == []
    (tmp_path / "bad.html").write_text("<script>console.error('seen')</script>")
    assert any("seen" in line for line in opened(tmp_path / "bad.html")[1])


def test_tensors_are_not_needed(report):
    def plain(value):
        if isinstance(value, dict):
            return all(map(plain, value.values()))
        if isinstance(value, list):
            return all(map(plain, value))
        return not isinstance(value, torch.Tensor)

    assert plain(report)
