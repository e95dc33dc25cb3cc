"""Gives the engine its thread. Everything that touches the engine runs there, between steps; callers only leave messages.

An idle worker sleeps. A worker whose loop has failed fails every open request at once, and every later call; nothing waits for ever.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from quire.engine.engine import Engine
from quire.engine.home import Errand, Home
from quire.engine.state import RequestState
from quire.engine.stream import RequestStream, Waiter, wake
from quire.errors import EngineDeadError, InvalidRequestError, QueueFullError
from quire.outputs import FinishReason, TokenEvent
from quire.request import Request

T = TypeVar("T")
log = logging.getLogger("quire")


class Worker:
    """One engine on one thread. Thread-safe."""

    def __init__(self, engine: Engine, *, max_open: int) -> None:
        self.home = Home()
        self._engine = engine
        self._max_open = max_open
        self._open: dict[str, Callable[[EngineDeadError], None]] = {}  # how to end a request that the engine itself does not
        self._mail: deque[Callable[[], None]] = deque()
        self._lock = threading.RLock()  # callers enter it as it is, not through the Condition: see `Errand`
        self._wake = threading.Condition(self._lock)
        self._readers: list[Waiter] = []  # who wait for what this turn has brought; the engine's thread alone
        self._stopping = False
        self._alive = threading.Lock()  # taken until the thread ends
        self._alive.acquire()
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> RequestStream:
        """Queue a checked request; its events come on the stream returned.

        Raises:
            InvalidRequestError: an open request has its id.
            QueueFullError: too many requests are open already.
            EngineDeadError: the engine has ended, or lives in the process from which this one was forked.
        """
        self.home.check()  # before the lock, which somebody may have held at the fork
        stream = RequestStream(request.request_id, lambda request_id: self._cancel(request_id, lose), self._readers.append, read=request.read)

        def sink(event: TokenEvent) -> None:
            if event.output is not None:
                with self._lock:
                    self._open.pop(request.request_id, None)
            stream.put(event)

        def lose(error: EngineDeadError) -> None:
            state = RequestState(request, sink, error=error)
            sink(TokenEvent(request.request_id, 0, finish_reason="error", output=state.output(0, lambda token_id: None)))

        with self._lock:
            self._refuse_if_dead()
            if request.request_id in self._open:
                raise InvalidRequestError("request_id", request.request_id, "one that no open request has")
            if len(self._open) >= self._max_open:
                raise QueueFullError(f"{len(self._open)} requests are open, the most there may be (max_waiting + max_sequences)")
            self._open[request.request_id] = lose
            self._mail.append(lambda: self._engine.add(request, sink))
            self._wake.notify()
        return stream

    def check_room(self, num_requests: int) -> None:
        """Refuse, by InvalidRequestError, more requests at once than may ever be open."""
        if num_requests > self._max_open:
            raise InvalidRequestError("prompt", f"{num_requests} prompts", f"at most {self._max_open} at once (max_waiting + max_sequences)")

    def cancel(self, request_id: str) -> None:
        """End a request before the next step. Harmless when it has ended, or the engine has.

        Raises:
            InvalidRequestError: `request_id` is not a string.
        """
        if not isinstance(request_id, str):  # it would end the loop
            raise InvalidRequestError("request_id", request_id, "a string")
        self._cancel(request_id)

    def _cancel(self, request_id: str, whose: Callable[[EngineDeadError], None] | None = None) -> None:
        """End the open request of this id; with `whose` only if it is the one that is lost so: another may have taken the id since."""
        if not self.home.is_here:
            return
        with self._lock:
            is_open = whose is None or self._open.get(request_id) is whose
            if is_open and not self._stopping and self._death is None:
                self._mail.append(lambda: self._engine.cancel(request_id))
                self._wake.notify()

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread between two steps and return what it returns, or raise what it raises. Also raises as `submit`.

        If the wait for it is broken off (Ctrl-C) before it has begun, it is not run.
        """
        self.home.check()
        errand = Errand(function)
        with self._lock:
            self._refuse_if_dead()
            self._mail.append(errand.run)
            self._wake.notify()
        try:
            return errand.result()
        except BaseException:
            errand.call_off()
            raise

    def stop(self) -> None:
        """Cancel what is open and end the thread; returns when it has ended."""
        with self._lock:
            self._stopping = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            with self._alive:  # a join that Ctrl-C breaks off takes the thread for ended from then on (Python 3.11 and 3.12)
                pass
            self._thread.join()

    @property
    def death(self) -> BaseException | None:
        """What ended the loop, None while nothing has."""
        return self._death

    def _refuse_if_dead(self) -> None:
        if self._death is not None:
            raise EngineDeadError(f"the engine has failed: {type(self._death).__name__}: {self._death}") from self._death
        if self._stopping:
            raise EngineDeadError("the engine has been closed")

    def _run(self) -> None:
        try:
            self._engine.runner.device.take_thread()
            while self._turn():
                pass
            self._drain("cancelled", None)
        except BaseException as death:  # whatever ends the loop must reach those who wait
            log.critical("the engine has failed", exc_info=death, extra={"event": "engine_died"})
            with self._lock:
                self._death = death
            error = EngineDeadError(f"the engine has failed: {type(death).__name__}: {death}")
            error.__cause__ = death
            self._drain("error", error)
        finally:
            self._alive.release()

    def _turn(self) -> bool:
        """Read the mail, then one step. False when it is time to end."""
        with self._lock:
            while not (self._mail or self._stopping or self._engine.has_work):
                if not self._wake.wait(self._engine.keeper.idle_s):
                    break  # an idle engine too lets pins go, and gives memory back when others need it
            if self._stopping:
                return False
            num_messages = len(self._mail)
        for _ in range(num_messages):  # one by one: what a message that ends the loop leaves in the mail is still answered
            self._mail.popleft()()
        self._wake_readers()
        self._engine.step()
        self._wake_readers()
        return True

    def _wake_readers(self) -> None:
        if self._readers:
            wake(self._readers)
            self._readers.clear()

    def _drain(self, reason: FinishReason, error: EngineDeadError | None) -> None:
        while self._mail:  # requests left in the mail are added, so that they end like all others; nothing comes after those
            with contextlib.suppress(Exception):
                self._mail.popleft()()
        try:
            self._engine.end_all(reason, error)
        except Exception as second:  # what ended the loop may have left the engine so that it cannot even end its requests
            log.critical("the engine could not end its requests", exc_info=second, extra={"event": "engine_died"})
        for lose in list(self._open.values()):
            lose(error or EngineDeadError("the engine has been closed"))
        self._wake_readers()
