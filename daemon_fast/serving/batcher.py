"""Requests that wait together are drawn together: a bounded queue, and the threads that draw from it. No HTTP here."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from daemon_fast.decode import Decoded, SIRDecoder
from daemon_fast.errors import InvalidInput
from daemon_fast.proposals.base import Prefix
from daemon_fast.proposals.candidates import Candidates
from daemon_fast.seeds import batch_seed
from daemon_fast.stop import Stop, Stopped, stoppable

__all__ = ["Batcher", "QueueFull"]

# Seconds that the first of a batch waits for others, where the engine draws one batch at a time, and others have been
# there since the last one began: who is alone doesn't wait.
WINDOW = 0.005


class QueueFull(Exception):
    """There is no room to wait.

    Attributes
    ----------
    retry_after : seconds after which there should be
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests wait already: try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(eq=False)
class _Job:
    """One request: its prompts, and their candidates as they come."""

    num_samples: int
    seed: int
    parts: list[Candidates | None]
    future: Future[Decoded] = field(default_factory=Future)
    submitted: float = field(default_factory=time.perf_counter)
    begun: float | None = None


@dataclass(frozen=True)
class _Prompt:
    job: _Job
    number: int  # among its job's
    prefix: Prefix


class Batcher:
    """Decodes requests from several threads at once, on threads of its own.

    What a request gets is what `SIRDecoder(energy, proposal, batch_size=1)(prompts, num_samples=..., seed=...)` gives,
    whoever shares its batch, as far as the engine rounds the same way in batches of other sizes.

    Parameters
    ----------
    decoder : SIRDecoder
        Its batch_size bounds how many prompts are drawn at a time.
    one_by_one : bool
        Whether each prompt is drawn in a call of its own, batch_size of them side by side: for a server, which makes
        its own batches of what comes. Else one call at a time draws up to batch_size prompts.
    max_waiting : int
        Prompts that may wait.
    on_batch : callable
        Called with the number of prompts of each batch.
    """

    def __init__(
        self, decoder: SIRDecoder, one_by_one: bool, max_waiting: int, on_batch: Callable[[int], None]
    ) -> None:
        self._decoder, self._max_waiting, self._on_batch = decoder, max_waiting, on_batch
        self._size = 1 if one_by_one else decoder.batch_size
        self._waiting: deque[_Prompt] = deque()
        self._drawn: dict[Stop, list[_Prompt]] = {}  # what is drawn now, and what stops it
        self._last = 0  # prompts of the batch before
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 1.0  # that a batch took lately
        # Daemons: a process that was told twice to end doesn't wait for what they draw.
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name=f"draws {i}")
            for i in range(decoder.batch_size if one_by_one else 1)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Prompts in the queue."""
        return len(self._waiting)

    def submit(self, prompts: Sequence[Prefix], num_samples: int, seed: int) -> Future[Decoded]:
        """Queue a request. If its future is cancelled, those of its prompts that still wait are never drawn, and a
        batch is stopped of which nobody waits for anything.

        In a batch that it shares it is drawn to the end: without its rows a step takes little less time, and on CUDA
        would have to be captured again.

        Raises
        ------
        QueueFull
        InvalidInput
            More prompts than may ever wait.
        """
        if len(prompts) > self._max_waiting:
            raise InvalidInput(f"prompt has {len(prompts)} prompts; at most {self._max_waiting} may wait")
        job = _Job(num_samples, seed, [None] * len(prompts))
        with self._changed:
            if len(self._waiting) + len(prompts) > self._max_waiting:
                batches = 1 + len(self._waiting) / (self._size * len(self._threads))
                raise QueueFull(min(60, math.ceil(self._seconds * batches)))
            self._waiting += [_Prompt(job, i, prefix) for i, prefix in enumerate(prompts)]
            self._changed.notify(len(prompts))  # not all: of 64 threads that wake, 63 would find nothing
        job.future.add_done_callback(self._forget)
        return job.future

    def close(self) -> None:
        """Draw what waits, then end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _forget(self, future: Future[Decoded]) -> None:
        """Give back the places of a request that has ended before all of it was drawn; stop what nobody waits for."""
        with self._changed:
            if any(prompt.job.future is future for prompt in self._waiting):
                self._waiting = deque(prompt for prompt in self._waiting if prompt.job.future is not future)
            left = [stop for stop, own in self._drawn.items() if all(prompt.job.future.done() for prompt in own)]
        for stop in left:
            stop.set()

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            stop, batch = taken
            begin = time.perf_counter()
            for prompt in batch:
                prompt.job.begun = prompt.job.begun or begin
            self._on_batch(len(batch))
            with contextlib.suppress(Stopped), stoppable(stop):
                self._draw(batch)
                self._seconds = 0.5 * (self._seconds + time.perf_counter() - begin)
            with self._changed:
                del self._drawn[stop]

    def _take(self) -> tuple[Stop, list[_Prompt]] | None:
        """The prompts of the next batch, and what stops it; None when all is done."""
        with self._changed:
            several = self._size > 1 and (self._last > 1 or len(self._waiting) > 0)
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if several:
                    self._changed.wait_for(lambda: len(self._waiting) >= self._size or self._closed, WINDOW)
                if self._waiting:
                    self._last = min(self._size, len(self._waiting))
                    stop, batch = Stop(), [self._waiting.popleft() for _ in range(self._last)]
                    self._drawn[stop] = batch
                    return stop, batch
                if self._closed:
                    return None
                # Those for whom it waited have left.

    def _draw(self, batch: list[_Prompt]) -> None:
        seeds = [batch_seed(prompt.job.seed, prompt.number) for prompt in batch]
        try:
            candidates = self._decoder.proposal.propose([prompt.prefix for prompt in batch], seeds)
        except Stopped:
            raise
        except Exception as error:
            if len(batch) == 1:
                _settle(batch[0].job, error)
            else:  # what fails for one must not fail for all
                for prompt in batch:
                    if not prompt.job.future.done():
                        self._draw([prompt])
            return
        whole = []
        with self._changed:  # other threads draw other prompts of a job
            for i, prompt in enumerate(batch):
                prompt.job.parts[prompt.number] = candidates.of_prefix(i)
                if all(part is not None for part in prompt.job.parts):
                    whole.append(prompt.job)
        for job in whole:
            self._choose(job)

    def _choose(self, job: _Job) -> None:
        parts = [part for part in job.parts if part is not None]
        drawn = time.perf_counter()
        try:
            decoded = self._decoder.choose(Candidates.concatenate(parts), num_samples=job.num_samples, seed=job.seed)
        except Exception as error:
            _settle(job, error)
            return
        begun = job.begun or drawn
        decoded.seconds.update(wait=begun - job.submitted, propose=drawn - begun)
        _settle(job, decoded)


def _settle(job: _Job, outcome: Decoded | Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # who asked has left
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
