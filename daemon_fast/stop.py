"""Work that another thread may stop, once nobody waits for it any more."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar

__all__ = ["Stop", "Stopped", "current", "stoppable"]


class Stopped(Exception):
    """Who asked for this has left."""


class Stop:
    """Set once; what looks at it then ends, by `Stopped`."""

    def __init__(self) -> None:
        self._lock, self._event = threading.Lock(), threading.Event()
        self._actions: list[Callable[[], None]] = []

    def set(self) -> None:
        with self._lock:
            self._event.set()
            actions, self._actions = self._actions, []
        for action in actions:
            action()

    def check(self) -> None:
        """
        Raises
        ------
        Stopped
            It is set.
        """
        if self._event.is_set():
            raise Stopped

    def sleep(self, seconds: float) -> None:
        """Sleep, until it is set at the longest.

        Raises
        ------
        Stopped
        """
        self._event.wait(seconds)
        self.check()

    @contextlib.contextmanager
    def ends(self, action: Callable[[], None]) -> Iterator[None]:
        """What is done within can't look at it: `action` ends that, on the thread that sets it.

        Raises
        ------
        Stopped
            It is set already.
        """
        with self._lock:
            self.check()
            self._actions.append(action)
        try:
            yield
        finally:
            with self._lock:
                if action in self._actions:
                    self._actions.remove(action)


_current: ContextVar[Stop | None] = ContextVar("stop", default=None)


def current() -> Stop:
    """What stops the work of this thread; where nothing does, one that nobody sets."""
    return _current.get() or Stop()


@contextlib.contextmanager
def stoppable(stop: Stop) -> Iterator[None]:
    """What this thread does within is stopped by it."""
    token = _current.set(stop)
    try:
        yield
    finally:
        _current.reset(token)
