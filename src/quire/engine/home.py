"""Where an engine lives: a process, and one thread of it for an engine that its caller moves."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NoReturn, SupportsIndex, TypeVar

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


def stays_here(self: object, _: SupportsIndex) -> NoReturn:
    """The `__reduce_ex__` of what belongs to an engine, asked for by whoever copies or pickles it: two would end one engine, or miss events."""
    raise TypeError(f"a {type(self).__name__} can be neither copied nor pickled: its engine is one, and lives in its process; pass it on as it is")


class Errand(Generic[T]):
    """What one thread runs for another that waits for it, at any moment of which a Ctrl-C may come: one in the midst of a Future's or a Condition's
    Python code may leave its lock taken for ever, and the thread that runs errands waiting for it. Locks entered as they are have no such moment."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function, self._begun, self._done = function, threading.Lock(), threading.Lock()
        self._results: list[T] = []
        self._failures: list[BaseException] = []
        self._done.acquire()

    def run(self) -> None:
        """Do it, unless it has been called off."""
        if not self._begun.acquire(blocking=False):
            return
        try:
            self._results.append(self._function())
        except BaseException as error:  # belongs to whoever waits, whatever it is
            self._failures.append(error)
        self._done.release()

    def result(self) -> T:
        """Wait for it: what it returns, or raises."""
        with self._done:
            pass
        if self._failures:
            raise self._failures[0]
        return self._results[0]

    def call_off(self) -> bool:
        """False where it has begun."""
        return self._begun.acquire(blocking=False)

    def undo(self, undo: Callable[[T], object]) -> None:
        """Give `undo` what it returned, once it is done."""
        for result in self._results:
            undo(result)


class OwnThread:
    """One thread for all that is done with an engine: callers may come from any, and the forward must find torch on one of its own (promise 1)."""

    def __init__(self, name: str, begin: Callable[[], Any]) -> None:
        """`begin` is called on it first."""
        self.home = Home()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._begun = self._thread.submit(begin)
        self._open = True

    def run(self, function: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """What `function` returns or raises there. If the wait for it is broken off (Ctrl-C), `undo` is given what it returns, there too.

        Raises:
            EngineDeadError: it has been closed, or this is a process forked from its own.
        """
        self.home.check()
        if not self._open:
            raise EngineDeadError("the engine has been closed")

        def run() -> T:
            self._begun.result()
            return function()

        errand = Errand(run)
        self._thread.submit(errand.run)
        try:
            return errand.result()
        except BaseException:
            if undo is not None and not errand.call_off():
                self.run_later(lambda: errand.undo(undo))
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
