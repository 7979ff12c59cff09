"""Candidates of many prefixes, saved batch by batch, so that a run can be killed anywhere and goes on from there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from daemon_fast.data.texts import Pairs
from daemon_fast.errors import DaemonFastError, InvalidInput
from daemon_fast.files import (
    MANIFEST,
    alone,
    check_same_run,
    digest,
    read_arrays,
    read_manifest,
    write_arrays,
    writing,
)
from daemon_fast.models import weights_digest
from daemon_fast.progress import progress
from daemon_fast.proposals.base import Prefix, Proposal, as_list
from daemon_fast.proposals.candidates import Candidates
from daemon_fast.seeds import batch_seed

__all__ = ["batches", "collect", "human_folder", "kept", "saved_batch_size", "scores", "weights_of"]

ARRAYS = ("tokens", "lengths", "token_log_p", "token_log_q")  # of candidates; and "ended", where it is known

BATCHES = "batch-*.npz"
SCORE_TEXTS = 64  # human texts of a batch


def collect(
    proposal: Proposal,
    prefixes: Sequence[Prefix],
    directory: str | os.PathLike[str] | None,
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
    directory: str | os.PathLike[str] | None,
    seed: int = 0,
    batch_size: int = 4,
    description: str = "candidates",
) -> Iterator[tuple[Candidates, float]]:
    """Candidates, batch by batch; those that `directory` holds from an earlier run are read instead of drawn.

    An interrupted run that is started again ends with the same candidates as one that was not interrupted.

    Parameters
    ----------
    proposal, prefixes : what to draw
    directory : made if missing; one .npz file per batch, and manifest.json. None: nothing is kept
    seed : of the whole run; each batch has its own from it
    batch_size : prefixes per batch

    Yields
    ------
    Candidates of a batch, in order; seconds that drawing them took, in whichever run.

    Raises
    ------
    InvalidInput
        No prefixes; or the directory holds candidates of another run: other prefixes, settings, weights, seed or batch
        size; or another process is writing it.
    DataError
        The directory can't be written, because the disk is full, say: the batches that are there are kept.
    """
    if len(prefixes) == 0:
        raise InvalidInput("there are no prefixes")
    groups = [prefixes[i : i + batch_size] for i in range(0, len(prefixes), batch_size)]
    work = [(some, partial(proposal.propose, some, batch_seed(seed, i))) for i, some in enumerate(groups)]
    manifest = {} if directory is None else _manifest(proposal, prefixes, seed=seed, batch_size=batch_size)
    yield from _saved(proposal, directory, manifest, work, description, "prefix")


def scores(
    proposal: Proposal, pairs: Pairs, directory: str | os.PathLike[str] | None, description: str = "human texts"
) -> Iterator[Candidates]:
    """What `proposal.score` makes of given continuations, batch by batch, kept in `directory` as `batches` are."""
    if len(pairs) == 0:
        raise InvalidInput("there are no continuations")
    groups = [pairs[i : i + SCORE_TEXTS] for i in range(0, len(pairs), SCORE_TEXTS)]
    work = [(some.prefixes, partial(proposal.score, some.prefixes, some.continuations)) for some in groups]
    known = {"continuations": digest(pairs.continuations), "batch_size": SCORE_TEXTS}
    manifest = {} if directory is None else _manifest(proposal, pairs.prefixes, **known)
    for scored, _ in _saved(proposal, directory, manifest, work, description, "text"):
        yield scored


def human_folder(directory: str | os.PathLike[str]) -> Path:
    """Where a fit that keeps its candidates in `directory` keeps the human texts that it scored."""
    return Path(directory, "human")


@contextmanager
def kept(directory: str | os.PathLike[str] | None, how: str) -> Iterator[None]:
    """Adds to an error where the candidates are that were drawn before it, and `how` they are of use."""
    try:
        yield
    except DaemonFastError as error:
        if directory is None or not any(Path(directory).glob(BATCHES)):
            raise
        raise type(error)(f"{error}. The candidates are kept in {os.fspath(directory)}: {how}") from error


def _saved(
    proposal: Proposal,
    directory: str | os.PathLike[str] | None,
    manifest: dict[str, Any],
    work: Sequence[tuple[Sequence[Prefix], Callable[[], Candidates]]],
    description: str,
    unit: str,
) -> Iterator[tuple[Candidates, float]]:
    """Batches of prefixes and what makes their candidates: read where the folder holds them, made and saved otherwise.

    A batch that is damaged is made again, to the same result.
    """
    if directory is None:
        yield from _made(proposal, None, work, description, unit)
        return
    folder = Path(directory)
    with ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # What is whole is only read, also where nothing may be written. An error of the caller's own may keep this
            # generator, and with it the lock, alive: it must not keep the same process from trying again.
            if not all(_batch(folder, i).exists() for i in range(len(work))):
                stack.enter_context(alone(folder, threads=False))
            if not any(folder.glob(BATCHES)):
                Path(folder, MANIFEST).unlink(missing_ok=True)  # a run that drew nothing binds no other
            check_same_run(folder, manifest, "candidates")
        yield from _made(proposal, folder, work, description, unit)


def _batch(folder: Path, number: int) -> Path:
    return folder / f"batch-{number:06d}.npz"


def _made(
    proposal: Proposal,
    folder: Path | None,
    work: Sequence[tuple[Sequence[Prefix], Callable[[], Candidates]]],
    description: str,
    unit: str,
) -> Iterator[tuple[Candidates, float]]:
    bar = progress(desc=description, unit=unit, total=sum(len(prefixes) for prefixes, _ in work))
    for i, (prefixes, make) in enumerate(work):
        path = None if folder is None else _batch(folder, i)
        saved = None if path is None else read_arrays(path)
        if saved is None or not {*ARRAYS, "seconds"} <= set(saved):
            begin = time.perf_counter()
            with kept(folder, "the same command goes on from there"):
                drawn = make()
            known = ARRAYS if drawn.ended is None else (*ARRAYS, "ended")
            saved = {name: getattr(drawn, name).cpu().numpy() for name in known}
            saved["seconds"] = np.array(time.perf_counter() - begin)
            if path is not None:
                with writing(path, f"the batches in {folder} are kept"):
                    write_arrays(path, saved)
        tensors = {name: torch.from_numpy(saved[name]) for name in (*ARRAYS, "ended") if name in saved}
        candidates = Candidates(**tensors, prefix_tokens=proposal.tokenize(prefixes), detokenize=proposal.detokenize)
        bar.update(len(prefixes))
        yield candidates, float(saved["seconds"])
    bar.close()


def saved_batch_size(directory: str | os.PathLike[str]) -> int | None:
    """Prefixes per batch of the candidates that `directory` holds; None where it holds none."""
    found = read_manifest(directory)
    size = found.get("batch_size") if found else None
    return size if isinstance(size, int) else None


def _manifest(proposal: Proposal, prefixes: Sequence[Prefix], **more: Any) -> dict[str, Any]:
    listed = as_list(prefixes)
    run = {**proposal.settings.to_json(), **weights_of(proposal), **more}
    return {**run, "num_prefixes": len(prefixes), "prefixes": digest(listed)}


def weights_of(proposal: Proposal) -> dict[str, str]:
    """What a manifest says of the model's weights: nothing where they are an engine's own, which tells none."""
    model = getattr(proposal, "model", None)
    return {"weights": weights_digest(model)} if isinstance(model, torch.nn.Module) else {}
