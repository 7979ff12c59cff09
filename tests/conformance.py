"""What the proposal makes of a model, against plain passes: right numbers, or an error of the library's own.

python tests/conformance.py           # every family, a line each
python tests/conformance.py --save    # and benchmarks/results/families.md
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import families
import torch
from torch import Tensor

from daemon_fast import TransformersProposal
from daemon_fast.errors import DaemonFastError
from daemon_fast.proposals import prompt_cache

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "families.md"
TOLERANCE = 1e-4  # of a log-probability, in float32
TEMPERATURE = 0.9
EOS = (0, 1, 2, 3)  # several, so that some candidates end early and are dropped from the batch
SETTINGS = {"num_candidates": 4, "max_new_tokens": 8, "min_new_tokens": 0, "temperature": TEMPERATURE,
            "count_eos": True}  # fmt: skip


def _tokens(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, families.VOCABULARY - 2, (length,), generator=generator).tolist()


PREFIXES = {
    "equal lengths": [[5, 9, 30], [8, 8, 6]],
    "unequal lengths": [[5, 9, 30], [7]],
    "past the window": [_tokens(12, 1), _tokens(20, 2)],
    "past the window, equal lengths": [_tokens(20, 3), _tokens(20, 4)],
}
RIGHT, WRONG, CRASH, REFUSED, CHANGED, UNBUILT = "right", "wrong", "crash", "refused", "changed", "not built"


@dataclass(frozen=True)
class Result:
    """What came of one family.

    Attributes
    ----------
    verdict : the worst of its prompts
    path : how its candidates are drawn: shared prompt, growing, ...
    error : the largest of a log-probability; None if there is none
    detail : of anything but right
    unfit : why there is no log-probability of a next token, so that it must be refused; else empty
    """

    family: str
    name: str
    verdict: str
    path: str = ""
    error: float | None = None
    detail: str = ""
    seconds: float = 0.0
    unfit: str = ""

    @property
    def good(self) -> bool:
        return self.verdict in (RIGHT, REFUSED)


def path_of(proposal: TransformersProposal) -> str:
    """How it draws candidates, by its own record."""
    if path := getattr(proposal, "path", None):
        return str(path)
    why = prompt_cache._unsuited.get(proposal.model, "unknown")
    return "shared prompt" if why is None else f"growing: {why}"


class Plain:
    """One unpadded pass of a model of its own over each row, without a cache and without code of the library."""

    def __init__(self, model: Any) -> None:
        self._model = copy.deepcopy(model).eval()
        self._keeps = False  # whether a pass leaves something behind that the next one sees

    @torch.inference_mode()
    def logits(self, row: list[int]) -> Tensor:
        """[T, V] float64"""
        model = copy.deepcopy(self._model) if self._keeps else self._model
        torch.manual_seed(0)
        return model(input_ids=torch.tensor([row]), use_cache=False).logits[0].double()

    def logits_of_prefixes(self, row: list[int]) -> Tensor:
        """[T, V] float64, each by a pass over what comes before: of a model whose logits depend on the row's length."""
        return torch.stack([self.logits(row[:n])[-1] for n in range(1, len(row) + 1)])

    def unfit(self) -> str:
        """Why it gives no log-probability of a next token; empty if it does."""
        row = _tokens(20, 7)
        try:
            self._keeps = True
            whole = self.logits(row)
            if whole.shape[0] != len(row) or not torch.isfinite(whole).all():
                return f"its logits [{', '.join(map(str, whole.shape))}] are not finite numbers for each token"
            self._keeps = not self._forgets(row, whole)
            torch.manual_seed(1)
            with torch.inference_mode():
                again = copy.deepcopy(self._model)(input_ids=torch.tensor([row]), use_cache=False).logits[0]
            if not torch.allclose(again.double(), whole, atol=1e-3):
                return "its logits depend on random numbers"
            for n in range(1, len(row)):
                if not torch.allclose(self.logits(row[:n])[-1], whole[n - 1], atol=1e-3):
                    return "its logits depend on what, or how much, follows"
        except Exception as error:
            return f"has no pass over token ids alone ({_first_line(error)})"
        return ""

    def _forgets(self, row: list[int], want: Tensor) -> bool:
        """Whether passes of one object are those of fresh ones."""
        pristine = self._model
        self._model, self._keeps = copy.deepcopy(pristine), False
        self.logits(_tokens(7, 6))
        self.logits(_tokens(26, 8))
        same = torch.equal(self.logits(row), want)
        self._model = pristine
        return same


def largest_error(candidates: Any, prefixes: list[list[int]], plain: Any) -> float:
    """Of any drawn token's log-probability, at temperature 1 and under the proposal; `plain` has `logits`."""
    worst = 0.0
    m = len(candidates.tokens) // len(prefixes)
    for r, length in enumerate(candidates.lengths.tolist()):
        drawn, prefix = candidates.tokens[r, :length].tolist(), prefixes[r // m]
        if length < 1 or (length < SETTINGS["max_new_tokens"] and drawn[-1] not in EOS):
            return float("inf")
        logits = plain.logits(prefix + drawn)[len(prefix) - 1 : -1]
        for got, scores in (
            (candidates.token_log_p, logits),
            (candidates.token_log_q, logits / TEMPERATURE),
        ):
            want = scores.log_softmax(-1)[torch.arange(length), torch.tensor(drawn)]
            error = float((got[r, :length].double() - want).abs().max())
            worst = max(worst, error if error == error else float("inf"))
    return worst


def snapshot(model: Any) -> dict[str, Any]:
    """Everything of a model that a call must leave alone."""
    return {
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": {n: getattr(m, "_attn_implementation", None) for n, m in _configs(model).items()},
        "training": [m.training for m in model.modules()],
        "attributes": sorted(model.__dict__),
        "classes": [type(m) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "addresses": {k: v.data_ptr() for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "values": {k: v.clone() for k, v in model.state_dict().items()},
    }


def _configs(model: Any) -> dict[str, Any]:
    return {name: m.config for name, m in model.named_modules() if hasattr(m, "config")}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs."""
    out = [k for k in before if k != "values" and before[k] != after[k]]
    values, now = before["values"], after["values"]
    if values.keys() != now.keys() or any(not torch.equal(values[k], now[k]) for k in values):
        out.append("values")
    return out


def examine(family: str, model: Any = None) -> Result:
    """Draw candidates of every kind of prompts, and compare."""
    begin = time.perf_counter()
    name = families.class_name(family) if model is None else type(model).__name__
    result = Result(family, name, UNBUILT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if model is None:
            if family in families.UNBUILT:
                return replace(result, detail=families.UNBUILT[family])
            model = families.build(family)
        plain = Plain(model)
        result = replace(result, unfit=plain.unfit())
        for what, prefixes in PREFIXES.items():
            result = _worse(result, _examine(result, model, plain, what, prefixes))
    return replace(result, seconds=time.perf_counter() - begin)


def _examine(result: Result, model: Any, plain: Plain, what: str, prefixes: list[list[int]]) -> Result:
    before = snapshot(model)
    path, error, verdict, detail = "", None, RIGHT, ""
    try:
        proposal = TransformersProposal(model, None, eos_token_ids=EOS, **SETTINGS)
        candidates = proposal.propose(prefixes, seed=0)
        path = path_of(proposal)
        if result.unfit:
            verdict, detail = WRONG, f"must be refused: {result.unfit}"
        else:
            error = largest_error(candidates, prefixes, plain)
            if error > TOLERANCE:
                verdict, detail = WRONG, f"{what}: off by {error:.1e}"
    except DaemonFastError as told:
        verdict, path, detail = REFUSED, "refused", str(told)
    except Exception as failure:
        verdict, detail = CRASH, f"{what}: {_first_line(failure)}"
    if changed := changes(before, snapshot(model)):
        verdict = CHANGED if verdict in (RIGHT, REFUSED) else verdict
        detail = f"{detail}; {what}: changed the model's {', '.join(changed)}".removeprefix("; ")
    return replace(result, verdict=verdict, path=path, error=error, detail=detail)


ORDER = (UNBUILT, RIGHT, REFUSED, CHANGED, WRONG, CRASH)


def _worse(a: Result, b: Result) -> Result:
    errors = [x.error for x in (a, b) if x.error is not None]
    worst = max(a, b, key=lambda x: ORDER.index(x.verdict))
    paths = {part for x in (a, b) if x.path for part in x.path.split("; ")}
    details = [x.detail for x in (a, b) if x.detail and x.verdict == worst.verdict]
    return replace(
        worst, error=max(errors, default=None), path="; ".join(sorted(paths)), detail="; ".join(dict.fromkeys(details))
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:160]}"


def sweep(report: Callable[[Result], None] = lambda _: None, only: list[str] | None = None) -> list[Result]:
    results = []
    for family in only or [*families.FAMILIES, *families.VARIANTS]:
        results.append(examine(family))
        report(results[-1])
    return results


def table(results: list[Result]) -> str:
    """Markdown."""
    counts = {v: sum(r.verdict == v for r in results) for v in ORDER}
    lines = [
        "# Every class of Transformers' causal-LM mapping",
        "",
        "Tiny random models of each, in float32 (`tests/families.py`). Of every drawn token the log-probability is",
        f"compared with one plain unpadded pass; right means within {TOLERANCE:g}.",
        "Written by `python tests/conformance.py --save`; `make test` checks each.",
        "",
        ", ".join(f"{n} {v}" for v, n in sorted(counts.items(), key=lambda x: -x[1]) if n) + ".",
        "",
        "| family | class | result | path | largest error | remark |",
        "| --- | --- | --- | --- | ---: | --- |",
    ]
    lines += ["| " + " | ".join(cells(r)) + " |" for r in results]
    return "\n".join(lines) + "\n"


def cells(r: Result) -> list[str]:
    """Of its row in the table."""
    error = "" if r.error is None else f"{r.error:.0e}"
    return [" ".join(x.replace("|", "/").split()) for x in (r.family, r.name, r.verdict, r.path, error, r.detail)]


def read_cells(table: str) -> list[list[str]]:
    """The first three of each row: rounding, which differs between machines, can decide the way and the error."""
    return [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines() if line.startswith("| ")]


def main() -> None:
    torch.set_num_threads(1)
    begin = time.perf_counter()
    only = [x for x in sys.argv[1:] if not x.startswith("-")]

    def line(r: Result) -> None:
        error = "" if r.error is None else f"{r.error:.0e}"
        print(f"{r.verdict:10} {r.family:24} {error:7} {r.seconds:5.1f}s {r.path[:60]} {r.detail[:150]}", flush=True)

    results = sweep(line, only or None)
    print({v: sum(r.verdict == v for r in results) for v in ORDER}, f"{time.perf_counter() - begin:.0f} s")
    if "--save" in sys.argv:
        TABLE.write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
