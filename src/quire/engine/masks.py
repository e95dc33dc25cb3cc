"""The thread that computes a step's masks while its forward runs. llguidance works without the interpreter's lock, so both go on at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import SimpleQueue

from quire.text.grammar import Guide
from quire.text.task import Task

MASK_SECONDS = 1.0  # of processor time for one mask; they take well under a millisecond


class MaskThread:
    """Fills guides' masks, in order. Started at the first use; called from the engine's thread alone.

    A guide that takes longer than MASK_SECONDS fails and its thread is left behind with it: one hostile grammar must not hold up everybody.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Task[None] | None] | None = None
        self._guides: list[Guide] = []
        self._tasks: list[Task[None]] = []

    def start(self, guides: Sequence[Guide]) -> None:
        """Begin to fill the guides' masks; nothing else may be asked of them before `wait`."""
        self._guides, self._tasks = list(guides), [Task(guide.fill) for guide in guides]
        if self._tasks:
            self._put(self._tasks)

    def wait(self) -> None:
        """Return when every mask asked for is there, or its guide has failed."""
        for i, (guide, task) in enumerate(zip(self._guides, self._tasks, strict=True)):
            if not task.wait(MASK_SECONDS):
                guide.fail(f"a mask took longer than {MASK_SECONDS:g} seconds")
                self.close()
                self._put(self._tasks[i + 1 :])
            elif task.error is not None:
                guide.fail(f"{type(task.error).__name__}: {task.error}")
        self._guides, self._tasks = [], []

    def close(self) -> None:
        """End the thread, once it is through with what it does."""
        if self._queue is not None:
            self._queue.put(None)
            self._queue = None

    def _put(self, tasks: Sequence[Task[None]]) -> None:
        if self._queue is None:
            self._queue = SimpleQueue()
            threading.Thread(target=_work, args=(self._queue,), name="quire-masks", daemon=True).start()
        for task in tasks:
            self._queue.put(task)


def _work(queue: SimpleQueue[Task[None] | None]) -> None:
    while (task := queue.get()) is not None:
        task.run()
