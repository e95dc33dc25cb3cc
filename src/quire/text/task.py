"""A function on another thread, bounded by the processor time it takes: on a busy machine, or one that slept, what is late has done no wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

PATIENCE = 30  # times its bound on the wall, for what waits instead of computing

Result = TypeVar("Result")


class Task(Generic[Result]):
    """One call of a function. `run` it on one thread, `wait` for it on another; afterwards `error` says what it raised, else `result` is there."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._done, self._claim = threading.Event(), threading.Lock()
        self._clock: int | None = None  # of the thread that runs it
        self._began = 0.0
        self.error: BaseException | None = None
        self.result: Result

    def run(self) -> None:
        """Call the function, unless another thread has: one that was left behind may come back."""
        if not self._claim.acquire(blocking=False):
            return
        if hasattr(time, "pthread_getcpuclockid"):  # not on macOS: there it is only the wall's time that can be read from elsewhere
            clock = time.pthread_getcpuclockid(threading.get_ident())
            self._began, self._clock = time.clock_gettime(clock), clock
        try:
            self.result = self._function()
        except BaseException as error:  # a panic in Rust is no Exception
            self.error = error
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """True once it is done; False when it has taken `seconds` of its thread's processor time, or the wait PATIENCE times as long.

        Waits in parts, so that a machine that was suspended meanwhile counts as one part of the wait.
        """
        part = seconds / 4
        for i in range(1, 4 * PATIENCE + 1):
            if self._done.wait(part):
                return True
            if self._taken(i * part) >= seconds:
                break
        return self._done.is_set()

    def _taken(self, waited: float) -> float:
        if not hasattr(time, "pthread_getcpuclockid"):
            return waited
        return 0.0 if self._clock is None else time.clock_gettime(self._clock) - self._began
