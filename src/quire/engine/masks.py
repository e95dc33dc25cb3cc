"""The thread that computes a step's masks while its forward runs. llguidance works without the interpreter's lock, so both go on at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import SimpleQueue

from quire.text.grammar import Guide

MASK_SECONDS = 1.0  # for one mask; they take well under a millisecond


class _Job:
    """One guide's mask, wanted for this step."""

    def __init__(self, guide: Guide) -> None:
        self.guide, self.done, self._claim = guide, threading.Event(), threading.Lock()

    def run(self) -> None:
        if not self._claim.acquire(blocking=False):  # a thread that was left behind came back and has it
            return
        try:
            self.guide.fill()
        except Exception as error:
            self.guide.fail(f"{type(error).__name__}: {error}")
        self.done.set()


class MaskThread:
    """Fills guides' masks, in order. Started at the first use; called from the engine's thread alone.

    A guide that takes longer than MASK_SECONDS fails and its thread is left behind with it: one hostile grammar must not hold up everybody.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Job | None] | None = None
        self._jobs: list[_Job] = []

    def start(self, guides: Sequence[Guide]) -> None:
        """Begin to fill the guides' masks; nothing else may be asked of them before `wait`."""
        self._jobs = [_Job(guide) for guide in guides]
        if self._jobs:
            self._put(self._jobs)

    def wait(self) -> None:
        """Return when every mask asked for is there, or its guide has failed."""
        for i, job in enumerate(self._jobs):
            if not job.done.wait(MASK_SECONDS):
                job.guide.fail(f"a mask took longer than {MASK_SECONDS:g} seconds")
                self.close()
                self._put(self._jobs[i + 1 :])
        self._jobs = []

    def close(self) -> None:
        """End the thread, once it is through with what it does."""
        if self._queue is not None:
            self._queue.put(None)
            self._queue = None

    def _put(self, jobs: Sequence[_Job]) -> None:
        if self._queue is None:
            self._queue = SimpleQueue()
            threading.Thread(target=_work, args=(self._queue,), name="quire-masks", daemon=True).start()
        for job in jobs:
            self._queue.put(job)


def _work(queue: SimpleQueue[_Job | None]) -> None:
    while (job := queue.get()) is not None:
        job.run()
