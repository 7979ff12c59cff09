"""Candidates of many prefixes, saved batch by batch, so that a run can be killed anywhere and goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from daemon_fast.candidates import Candidates
from daemon_fast.data import Pairs
from daemon_fast.errors import InvalidInput, writing
from daemon_fast.proposals import Prefix, Proposal

__all__ = ["batch_seed", "batches", "collect", "human_folder", "saved_batch_size", "scores"]

SCORE_TEXTS = 64  # human texts of a batch


def batch_seed(seed: int, batch: int) -> int:
    """An independent seed for each batch of a run, from 0 to 2^63 - 1."""
    return int(np.random.SeedSequence([seed, batch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def collect(
    proposal: Proposal,
    prefixes: Sequence[Prefix],
    directory: str | os.PathLike[str],
    seed: int = 0,
    batch_size: int = 4,
    description: str = "candidates",
) -> tuple[Candidates, float]:
    """Candidates of all prefixes, and the seconds that drawing them took, earlier runs included: see `batches`."""
    parts, seconds = zip(*batches(proposal, prefixes, directory, seed, batch_size, description), strict=True)
    return Candidates.concatenate(parts), sum(seconds)


def batches(
    proposal: Proposal,
    prefixes: Sequence[Prefix],
    directory: str | os.PathLike[str],
    seed: int = 0,
    batch_size: int = 4,
    description: str = "candidates",
) -> Iterator[tuple[Candidates, float]]:
    """Candidates, batch by batch; those that `directory` holds from an earlier run are read instead of drawn.

    An interrupted run that is started again ends with the same candidates as one that was not interrupted.

    Parameters
    ----------
    proposal, prefixes : what to draw
    directory : made if missing; one .npz file per batch, and manifest.json
    seed : of the whole run; each batch has its own from it
    batch_size : prefixes per batch

    Yields
    ------
    Candidates of a batch, in order; seconds that drawing them took, in whichever run.

    Raises
    ------
    InvalidInput
        No prefixes; or the directory holds candidates of another run: other prefixes, settings, seed or batch size.
    DataError
        The directory can't be written, because the disk is full, say: the batches that are there are kept.
    """
    if len(prefixes) == 0:
        raise InvalidInput("there are no prefixes")
    groups = [prefixes[i : i + batch_size] for i in range(0, len(prefixes), batch_size)]
    work = [(some, partial(proposal.propose, some, batch_seed(seed, i))) for i, some in enumerate(groups)]
    manifest = _manifest(proposal, prefixes, seed=seed, batch_size=batch_size)
    yield from _kept(proposal, Path(directory), manifest, work, description)


def scores(
    proposal: Proposal, pairs: Pairs, directory: str | os.PathLike[str], description: str = "human texts"
) -> Iterator[Candidates]:
    """What `proposal.score` makes of given continuations, batch by batch, kept in `directory` as `batches` are."""
    if len(pairs) == 0:
        raise InvalidInput("there are no continuations")
    groups = [pairs[i : i + SCORE_TEXTS] for i in range(0, len(pairs), SCORE_TEXTS)]
    work = [(some.prefixes, partial(proposal.score, some.prefixes, some.continuations)) for some in groups]
    manifest = _manifest(proposal, pairs.prefixes, continuations=_digest(pairs.continuations), batch_size=SCORE_TEXTS)
    for scored, _ in _kept(proposal, Path(directory), manifest, work, description):
        yield scored


def human_folder(directory: str | os.PathLike[str]) -> Path:
    """Where a fit that keeps its candidates in `directory` keeps the human texts that it scored."""
    return Path(directory, "human")


def _kept(
    proposal: Proposal,
    folder: Path,
    manifest: dict[str, Any],
    work: Sequence[tuple[Sequence[Prefix], Callable[[], Candidates]]],
    description: str,
) -> Iterator[tuple[Candidates, float]]:
    """Batches of prefixes and what makes their candidates: read where `folder` holds them, made and saved otherwise."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _check_manifest(folder / "manifest.json", manifest)
    for i, (prefixes, make) in enumerate(tqdm(work, desc=description, unit="batch")):
        path = folder / f"batch-{i:06d}.npz"
        if (saved := _load(path)) is None:
            begin = time.perf_counter()
            drawn = make()
            saved = {
                "tokens": drawn.tokens.cpu().numpy(),
                "lengths": drawn.lengths.cpu().numpy(),
                "token_log_p": drawn.token_log_p.cpu().numpy(),
                "token_log_q": drawn.token_log_q.cpu().numpy(),
                "seconds": np.array(time.perf_counter() - begin),
            }
            with writing(path, f"the batches in {folder} are kept"):
                _save(path, saved)
        seconds = float(saved.pop("seconds"))
        tensors = {name: torch.from_numpy(array) for name, array in saved.items()}
        yield Candidates(**tensors, prefix_tokens=proposal.tokenize(prefixes), detokenize=proposal.detokenize), seconds


def saved_batch_size(directory: str | os.PathLike[str]) -> int | None:
    """Prefixes per batch of the candidates that `directory` holds; None where it holds none."""
    found = _read_manifest(Path(directory, "manifest.json"))
    size = found.get("batch_size") if found else None
    return size if isinstance(size, int) else None


def _manifest(proposal: Proposal, prefixes: Sequence[Prefix], **more: Any) -> dict[str, Any]:
    listed = [prefix if isinstance(prefix, str) else list(map(int, prefix)) for prefix in prefixes]
    return {**proposal.settings.to_json(), **more, "num_prefixes": len(prefixes), "prefixes": _digest(listed)}


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    found = _read_manifest(path)
    if found is None and any(path.parent.glob("batch-*.npz")):
        raise InvalidInput(f"{path.parent} holds batches but no readable {path.name}: delete it or choose another")
    if found is None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
        return
    for name, value in manifest.items():
        if found.get(name) != value:
            raise InvalidInput(
                f"{path.parent} holds candidates of another run ({name} is {found.get(name)!r} there, {value!r} here): "
                "choose another directory, or delete this one"
            )


def _load(path: Path) -> dict[str, np.ndarray[Any, Any]] | None:
    """A saved batch, or None if it is missing or damaged (it is then drawn again, to the same result)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("tokens", "lengths", "token_log_p", "token_log_q", "seconds")}
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None


def _save(path: Path, arrays: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)
