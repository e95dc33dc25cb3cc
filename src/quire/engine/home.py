"""Where an engine lives: a process, and one thread of it for an engine that its caller moves."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from quire.errors import EngineDeadError

T = TypeVar("T")


class Home:
    """The process that an engine was made in. Its threads are not in one that is forked from it, where waiting for them would never end."""

    def __init__(self) -> None:
        self._process_id = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is that process."""
        return os.getpid() == self._process_id

    def check(self) -> None:
        """Raise EngineDeadError in any other process."""
        if not self.is_here:
            raise EngineDeadError(f"the engine lives in process {self._process_id}, not in {os.getpid()}, forked from it: make another one here")


class OwnThread:
    """One thread for all that is done with an engine: callers may come from any, and the forward must find torch on one of its own (promise 1)."""

    def __init__(self, name: str, begin: Callable[[], Any]) -> None:
        """`begin` is called on it first."""
        self.home = Home()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=begin)
        self._open = True

    def run(self, function: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """What `function` returns or raises there. If the wait for it is broken off (Ctrl-C), `undo` is given what it returns, there too.

        Raises:
            EngineDeadError: it has been closed, or this is a process forked from its own.
        """
        self.home.check()
        if not self._open:
            raise EngineDeadError("the engine has been closed")
        future = self._thread.submit(function)
        try:
            return future.result()
        except BaseException:
            if undo is not None and not future.cancel():
                self.run_later(lambda: _undo(future, undo))
            raise

    def run_later(self, function: Callable[[], object]) -> None:
        """`run`, from where nothing may be waited for or raised; not at all where the engine is no more."""
        if self._open and self.home.is_here:
            self._thread.submit(function)

    def close(self) -> None:
        """End it, once it is through with what it was given. May be called twice."""
        self._open = False
        if self.home.is_here:
            self._thread.shutdown()


def _undo(future: Future[T], undo: Callable[[T], object]) -> None:
    if future.exception() is None:
        undo(future.result())
