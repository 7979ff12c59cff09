"""The page: what it holds, that it holds nothing else, and a real browser's opinion of it."""

from __future__ import annotations

import copy
import html
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from markupsafe import escape
from toy_studies import MU, collected

from daemon_fast.experiments import page
from daemon_fast.experiments.page import Cell, Chapter, Section, Table
from daemon_fast.experiments.studies import (
    STUDIES,
    ablation,
    alignment,
    convergence,
    forward_kl,
    one_metric,
    perplexity,
    tail,
    temperatures,
    transfer,
)
from daemon_fast.experiments.studies.alignment import Mauve

pytest.importorskip("matplotlib")
VOID = {"meta", "link", "br", "path", "use", "rect", "circle", "line"}


@pytest.fixture(scope="module")
def chapter():
    to_fit, held_out, pool = collected(n=60), collected(n=60, seed=5), collected(n=4, m=200, seed=7)
    drawn = {"sampling": held_out.features[:, 0], "daemon": held_out.features[:, 1]}
    curve = convergence.compute(pool, MU, [5, 10, 25, 50])
    found = {
        "alignment": alignment.compute(held_out, MU, drawn, {"daemon": Mauve(0.8125, 0.0042)}),
        "perplexity": perplexity.compute(held_out, MU, [5, 10]),
        "convergence": convergence.Convergence(4, curve, curve, curve),
        "one_metric": one_metric.compute(to_fit, held_out, "sr_2"),
        "temperatures": temperatures.compute({1.0: (to_fit, held_out)}, MU),
        "ablation": ablation.compute(to_fit, held_out),
        "forward_kl": forward_kl.compute(to_fit, held_out),
        "tail": tail.compute(held_out),
        "transfer": transfer.compute(held_out, {"wiki": MU, "news": 2 * MU}),
    }
    assert list(found) == list(STUDIES)
    sections = [(STUDIES[name].HEADING, STUDIES[name].section(result)) for name, result in found.items()]
    verdict = [sentence for _, section in sections for sentence in section.verdict]
    return Chapter("wiki", "60 prefixes", verdict, sections)


def rendered(*chapters):
    return page.render("A <title> & more", {"seed": 0}, chapters)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def tags(text):
    parser = Tags()
    parser.feed(text)
    assert parser.open == []
    return parser.seen


def test_it_begins_with_a_verdict_and_holds_every_section(chapter):
    text = rendered(chapter)
    assert text.startswith('<!doctype html>\n<html lang="en">')
    assert text.index("Verdict") < text.index("What the words mean") < text.index("1. wiki")
    assert len(chapter.verdict) == 4  # three of alignment, one of perplexity
    for sentence in chapter.verdict:
        assert text.index("Verdict") < text.index(str(escape(sentence)))
    for _, section in chapter.sections:
        for table in section.tables:
            for row in table.rows:
                assert all(f">{escape(getattr(cell, 'text', cell))}" in text for cell in row)


@pytest.mark.parametrize("left_out", [0, 3, 8])
def test_sections_are_numbered_without_gaps(chapter, left_out):
    some = [section for i, section in enumerate(chapter.sections) if i != left_out]
    text = rendered(replace(chapter, sections=some), chapter)
    numbers = re.findall(r"<h3[^>]*>(\d\.\d) ", text)
    assert numbers == [f"1.{i + 1}" for i in range(8)] + [f"2.{i + 1}" for i in range(9)]


def test_tables_and_figures_can_be_read_aloud(chapter):
    seen = tags(rendered(chapter))
    count = {name: sum(tag == name for tag, _ in seen) for name in ("table", "caption", "tr", "th", "figure", "svg")}
    tables = [table for _, section in chapter.sections for table in section.tables]
    assert count["table"] == count["caption"] == len(tables)
    heads = [attributes["scope"] for tag, attributes in seen if tag == "th"]
    assert heads.count("row") == sum(len(table.rows) for table in tables)
    assert heads.count("col") == sum(len(table.head) for table in tables)
    figures = [attributes for tag, attributes in seen if tag == "figure"]
    assert len(figures) == count["svg"] == 4  # no coherence among these metrics: no figure of the sweep
    assert all(figure["role"] == "img" and len(figure["aria-label"]) > 10 for figure in figures)


def test_the_glossary_knows_the_words():
    words = re.findall(r"<dt>(.*?)</dt>", rendered())
    for word in (
        "p_theta", "p_mu", "mu", "log Z", "ESS", "nats", "div", "sr_n", "tr_w", "ent", "coh", "distance", "noise floor",
        "MAUVE",
    ):  # fmt: skip
        assert any(word in entry.split(", ") for entry in words), word


def test_it_is_the_same_each_time_and_loads_nothing(chapter):
    text = rendered(chapter)
    assert text == rendered(copy.deepcopy(chapter))
    links = re.findall(r"""(?:href|src|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "<script" not in text


def test_text_is_escaped(chapter):
    odd = Table(["<i>"], [["<b>"], [Cell("<u>", "a < b")]], "<s>")
    text = rendered(Chapter("<em>", "<p>", ["<v>"], [("<h>", Section("<q>", [odd], notes=["<n>"]))]))
    assert "A &lt;title&gt; &amp; more" in text
    for word in ("em", "p", "h", "q", "i", "b", "u", "s", "n", "v"):
        assert f"&lt;{word}&gt;" in text
    tags(text)


def test_a_flag_stands_beside_its_figure():
    for cell, flag in (
        (page.perplexity_cell(0.99), "means nothing: below 1"),
        (page.perplexity_cell(5.0, 1.99), "means nothing: log Z of an ESS of 2.0"),
        (page.ess_cell(1.2), "next to no choice"),
    ):
        text = rendered(Chapter("d", "", [], [("h", Section("", [Table([""], [["row", cell]], "")]))]))
        assert f'<td>{cell.text} <em class="flag">{flag}</em></td>' in text
    assert not page.perplexity_cell(1.01).flag
    assert not page.perplexity_cell(5.0, 2.0).flag
    assert not page.ess_cell(2.0).flag


def test_a_table_in_a_terminal():
    table = Table(["", "x"], [["one", "1.5"], ["two", Cell("10", "few")]], "")
    assert table.text().splitlines() == ["            x", "one       1.5", "two  10 (few)"]
    assert str(Cell("3", marked=True)) == "3*"
    assert table.text(transposed=True).splitlines() == ["   one       two", "x  1.5  10 (few)"]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def opened(path):
    """The page as a browser leaves it, and what it says on the console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the report in")
def test_a_browser_opens_it_without_an_error(chapter, tmp_path):
    (tmp_path / "report.html").write_text(rendered(chapter), encoding="utf-8")
    text, console = opened(tmp_path / "report.html")
    assert "1.9 Transfer" in text
    assert console == []
    (tmp_path / "bad.html").write_text("<script>console.error('seen')</script>")
    assert any("seen" in line for line in opened(tmp_path / "bad.html")[1])


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the report in")
@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_sticks_out_of_the_page(chapter, tmp_path, width):
    """Tables and figures scroll by themselves. In a frame, as a browser's own window has a least width."""

    def widths(text):
        frame = f'<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{html.escape(text)}"></iframe>'
        script = (
            "onload = () => { const page = document.querySelector('iframe').contentDocument.documentElement;"
            "document.body.append(`${page.clientWidth} ${page.scrollWidth} of the page`); }"
        )
        (tmp_path / "frame.html").write_text(f"<meta charset=utf-8>{frame}<script>{script}</script>", encoding="utf-8")
        return [int(x) for x in re.search(r"(\d+) (\d+) of the page", opened(tmp_path / "frame.html")[0]).groups()]

    seen, needed = widths(rendered(chapter))
    assert width - 20 <= seen <= width  # the rest is a scroll bar
    assert needed <= seen
    assert widths('<!doctype html><p style="width: 2000px">wide')[1] >= 2000
