"""An engine whose every move is the test's: no thread of its own, a disk that moves when told to, memory and time as they are said to be.

What `LLM` promises is asked through `LLM` itself; only its thread, and the threads of the tier below it, are replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from quire import LLM, RequestOutput
from quire.engine.engine import Engine
from quire.engine.home import Home
from quire.engine.stream import RequestStream
from quire.request import Request
from quire.tensors.models.model import CausalModel
from quire.tensors.models.workspace import measure

measured = cache(measure)  # takes more than all else that is done to open a model anew


class SteppedWorker:
    """`Worker` on the caller's thread: a message is done at once, and a step when `turn` is called, or somebody waits."""

    death = None

    def __init__(self, engine: Engine, *, max_open: int) -> None:
        self.engine, self.turn, self.home = engine, engine.step, Home()

    def submit(self, request: Request) -> SteppedStream:
        stream = SteppedStream(request.request_id, self)
        self.engine.add(request, stream.put)
        return stream

    def check_room(self, num_requests: int) -> None:
        pass

    def cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)

    def call(self, function: Callable[[], Any]) -> Any:
        return function()

    def stop(self) -> None:
        self.engine.end_all("cancelled", None)


class SteppedStream(RequestStream):
    """`put_after_the_end`: what must not happen."""

    def __init__(self, request_id: str, worker: SteppedWorker) -> None:
        super().__init__(request_id, worker.cancel)
        self._worker = worker
        self.num_ends = 0

    @property
    def output(self) -> RequestOutput | None:
        return self._output

    def put(self, event: Any) -> None:
        assert not self.num_ends, "a stream goes on behind its end"
        self.num_ends += event.output is not None
        super().put(event)

    def wait(self, timeout_s: float | None = None) -> RequestOutput:
        for _ in range(3000):
            if self._output is not None:
                return self._output
            self._worker.turn()
        raise AssertionError(f"request {self.request_id} does not end")


class Hands:
    """An executor that does a job when `move` is called; the queue is in the test's hands."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.append((future, function, args))
        return future

    def move(self) -> None:
        """Do the oldest job, if there is one."""
        if self._jobs:
            future, function, args = self._jobs.popleft()
            future.set_result(function(*args))

    def shutdown(self) -> None:
        while self._jobs:
            self.move()


class ToldCosts:
    """`Costs` that do not depend on the clock: reading pays when it is said to."""

    reading = True

    def note_read(self, *_: float) -> None:
        pass

    def note_step(self, *_: float) -> None:
        pass

    def reading_pays(self, *_: int) -> bool:
        return self.reading


class ByHand:
    """An `LLM` of a model that stays open for others, and the world around it.

    Attributes: `time` of the clock by which pins end; `spare_bytes` of memory beyond the reserve; `full`: whether the disk is;
    `failing`: whether the next step that draws fails; `reader`, `writer`: the disk's hands; `costs` of the disk and the model.
    """

    def __init__(self, model: CausalModel, source: Any, **options: Any) -> None:
        self.time, self.spare_bytes = 0.0, 2**60
        self.full = self.failing = False
        self.reader, self.writer, self.costs = Hands(), Hands(), ToldCosts()
        patches = {"llm.Worker": SteppedWorker, "build.open_model": lambda *_: model, "build.measure": measured}
        with contextlib.ExitStack() as stack:
            for name, given in patches.items():
                stack.enter_context(patch(f"quire.engine.{name}", given))
            self.llm = LLM(source, reserve_bytes=1, **options)
        engine = self.engine
        self.cache, self.tier = engine.scheduler.cache, self.llm._built.tier
        engine.keeper._pins._clock = lambda: self.time
        sample = engine.runner.sampler.sample
        engine.runner.sampler.sample = lambda *given: self._sample(sample, *given)
        if self.tier is not None:
            for threads in (self.tier._reader, self.tier._writer):
                threads.shutdown()
            self.tier._reader, self.tier._writer = self.reader, self.writer
            self.tier.wait = self._move_both
            self.tier.costs = self.costs
            fill = self.tier._disk._fill
            self.tier._disk._fill = lambda *given: self._fill(fill, *given)

    @property
    def engine(self) -> Engine:
        return self.llm._built.engine

    @property
    def busy(self) -> bool:
        """Whether pages are on their way to or from the disk."""
        return self.tier is not None and self.tier.busy

    def step(self) -> None:
        """One step of the engine, which looks at the memory there is before it."""
        self.engine.keeper._next_look_s = 0.0
        with patch("quire.engine.keeper.available_bytes", lambda: 1 + self.spare_bytes):
            self.llm._worker.turn()

    def close(self) -> None:
        self.llm.close()

    def _move_both(self) -> None:
        self.reader.move()
        self.writer.move()

    def _sample(self, sample: Callable[..., Any], *given: Any) -> Any:
        if self.failing:
            self.failing = False
            raise MemoryError("injected")
        return sample(*given)

    def _fill(self, fill: Callable[..., Any], folder: Any, temp: str, *given: Any) -> None:
        fill(folder, temp, *given)
        if self.full:
            fd = folder.open(temp, os.O_WRONLY)
            os.truncate(fd, 100)
            os.close(fd)
            raise OSError(errno.ENOSPC, "injected")


def damage(folder: Path, how: str, rng: random.Random) -> bool:
    """Do something to a page file of the folder; whether there is one."""
    pages = sorted(path for path in folder.glob("*.page") if path.is_file() and not path.is_symlink())
    if not pages:
        return False
    path, other = rng.choice(pages), rng.choice(pages)
    if how == "flip":
        raw = bytearray(path.read_bytes() or b"\0")  # it may have been cut to nothing before
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
    elif how == "cut":
        os.truncate(path, rng.randrange(path.stat().st_size or 1))
    elif how == "exchange":
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
    elif how == "link":
        path.rename(path.with_suffix(".elsewhere"))
        path.symlink_to(path.with_suffix(".elsewhere"))
    else:
        path.unlink()
    return True
