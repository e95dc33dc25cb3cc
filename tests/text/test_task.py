"""How long a task may take is its own processor time, not the wall's."""

from __future__ import annotations

import threading
import time

import pytest

from quire.text import task as tasks
from quire.text.task import Task

needs_clock = pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="the system tells no other thread's processor time")


def started(task: Task[int]) -> Task[int]:
    threading.Thread(target=task.run, daemon=True).start()
    return task


def busy(seconds: float) -> int:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass
    return 7


def idle(seconds: float) -> int:
    time.sleep(seconds)
    return 7


@needs_clock
def test_what_is_late_without_having_computed_is_waited_for() -> None:
    """As on a machine whose processors are busy with other work."""
    task = started(Task(lambda: idle(0.5)))
    assert task.wait(0.2) and task.result == 7 and task.error is None


@needs_clock
def test_a_thread_that_has_worked_before_starts_anew() -> None:
    first, second = Task(lambda: busy(0.3)), Task(lambda: idle(0.3))

    def run() -> None:
        first.run()
        second.run()

    threading.Thread(target=run, daemon=True).start()
    assert first.wait(10.0) and second.wait(0.2)


def test_what_computes_too_long_is_left() -> None:
    assert not started(Task(lambda: busy(2.0))).wait(0.2)


def test_what_waits_for_ever_is_left_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PATIENCE", 2)
    assert not started(Task(lambda: idle(60.0))).wait(0.05)


def test_what_it_raises_is_kept_and_it_runs_once() -> None:
    calls: list[int] = []

    def fails() -> int:
        calls.append(1)
        raise KeyError("so")

    task = Task(fails)
    task.run()
    task.run()
    assert task.wait(1.0) and isinstance(task.error, KeyError) and len(calls) == 1
