"""Gopher's repetition rules on Wikipedia texts, from strings to verdicts, against datatrove's `GopherRepetitionFilter`.

One process, one thread, medians of interleaved calls, other texts in each. On datatrove's own words both must give the
same verdict of each text, and the fractions be those of its own functions, to the last digit.
Needs: pip install datatrove spacy. Run: python benchmarks/gopher_repetition.py [--save]
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any

import torch
from common import finish, interleaved, table
from tqdm import tqdm

from daemon_fast.data import read_texts
from daemon_fast.gopher import DUPLICATED, GOPHER_THRESHOLDS, TOP, gopher_repetition, gopher_violations

TEXTS, ROUNDS = 10_000, 40


def verdicts(texts: list[str], words: list[list[str]] | None = None) -> list[str | bool]:
    """As the filter has them: True, or the first rule that a text breaks."""
    names = [*GOPHER_THRESHOLDS, True]
    broken = torch.nn.functional.pad(gopher_violations(gopher_repetition(texts, words)), (0, 1), value=True)
    return [names[i] for i in broken.int().argmax(1).tolist()]


def theirs_of(datatrove: Any, text: str, words: list[str]) -> list[float]:
    """The fractions, by the functions of which the filter is made."""
    found = []
    for parts in (re.split(r"\n{2,}", text.strip()), re.split(r"\n+", text)):
        duplicates, characters = datatrove.find_duplicates(parts)
        found += [duplicates / len(parts), characters / len(text)]
    for n in TOP:
        ngrams = datatrove.get_n_grams(words, n)
        found.append(datatrove.find_top_duplicate(ngrams) / len(text) if ngrams else 0.0)
    return found + [datatrove.find_all_duplicate(words, n) / len(text) for n in DUPLICATED]


def main() -> None:
    torch.set_num_threads(1)
    datatrove = importlib.import_module("datatrove.pipeline.filters.gopher_repetition_filter")
    document = importlib.import_module("datatrove.data").Document
    judge = datatrove.GopherRepetitionFilter()

    def theirs(texts: list[str]) -> list[Any]:
        found = [judge.filter(document(text=text, id="")) for text in texts]
        return [result is True or result[1] for result in found]

    texts = list(read_texts("wikipedia"))[:TEXTS]
    part = len(texts) // ROUNDS
    rounds = [texts[i * part : (i + 1) * part] for i in range(ROUNDS)]
    expected = [verdict for some in tqdm(rounds, desc="datatrove") for verdict in theirs(some)]
    own_words = [datatrove.split_into_words(text, "eng") for text in tqdm(texts, desc="spaCy")]
    assert verdicts(texts, own_words) == expected
    fractions = [theirs_of(datatrove, text, row) for text, row in zip(texts, own_words, strict=True)]
    assert gopher_repetition(texts, own_words).tolist() == fractions
    ours = verdicts(texts)
    differing = sum((a is True) != (b is True) for a, b in zip(ours, expected, strict=True))

    def left(some: list[str]) -> list[bool]:
        return gopher_violations(gopher_repetition(some)).any(1).tolist()

    seconds = interleaved(
        {
            "datatrove": lambda i: theirs(rounds[i % ROUNDS]),
            "its words alone, by spaCy": lambda i: [
                datatrove.split_into_words(text, "eng") for text in rounds[i % ROUNDS]
            ],
            "ours, all texts": lambda _: left(texts),
            "ours": lambda i: left(rounds[i % ROUNDS]),
        },
        rounds=ROUNDS,
    )
    micro = {name: 1e6 * value / (len(texts) if "all" in name else part) for name, value in seconds.items()}
    rows = [[name, value, micro["datatrove"] / value] for name, value in micro.items()]
    size = sum(map(len, texts)) / len(texts)
    report = (
        f"# Gopher's repetition rules, strings to verdicts, {len(texts):,} Wikipedia texts ({size:.0f} characters)\n\n"
        + table(["", "µs a text", "datatrove / it"], rows)
        + f"\n\nVerdicts on datatrove's words: the same for all texts. On our words (`\\w+|[^\\w\\s]`) {differing} of "
        f"{len(texts):,} differ; datatrove leaves out {sum(v is not True for v in expected)}, ours "
        f"{sum(v is not True for v in ours)}.\n\ndatatrove {_version('datatrove')}, spaCy {_version('spacy')}"
    )
    finish("gopher_repetition", report, {"µs a text": micro, "verdicts that differ": differing})


def _version(package: str) -> str:
    return importlib.metadata.version(package)


if __name__ == "__main__":
    main()
