"""What all doors share: the engine, or why there is none, who is being served, and whether anybody still may be."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from fastapi import Request

from quire.server.chat_template import ChatTemplate
from quire.server.errors import ServerError, without_paths
from quire.server.logs import tell
from quire.server.metrics import Metrics
from quire.server.settings import ServerSettings
from quire.server.token_texts import TokenTexts

if TYPE_CHECKING:
    from quire.engine.llm import LLM
    from quire.server.runs import Run


class Serving:
    """One server's state. Its own methods are for the event loop, but for `load`, which blocks and is given a thread.

    Attributes:
        llm: the engine, None while it loads. texts, template: what its tokenizer says, None while it loads or where there is none.
        closing: set when the server has been told to end; endless streams end then.
        runs: the requests that are being answered.
    """

    def __init__(self, settings: ServerSettings, load: Callable[[], LLM]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.llm: LLM | None = None
        self.texts: TokenTexts | None = None
        self.template: ChatTemplate | None = None
        self.closing = asyncio.Event()
        self.runs: set[Run] = set()
        self.started_s = time.monotonic()
        self.load_error: BaseException | None = None
        self._load = load
        self._idle = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def failure(self) -> str | None:
        """Why there is no engine, or none any more; None while it loads and while it runs."""
        error = self.load_error or (self.llm.failure if self.llm is not None else None)
        return None if error is None else without_paths(f"{type(error).__name__}: {error}")

    def load(self) -> None:
        """Load the model. Raises nothing: see `load_error`."""
        try:
            llm = self._load()
            if llm.tokenizer is not None:
                self.texts = TokenTexts(llm.tokenizer)
                self.template = ChatTemplate(llm.tokenizer) if llm.tokenizer.chat_template else None
                llm.prepare_structured()  # which holds up everybody's tokens, where it is done later
            self.llm = llm
        except BaseException as error:  # told in /health, and by whoever started the thread
            self.load_error = error

    def engine(self) -> LLM:
        """The engine, for a request that wants it now.

        Raises:
            ServerError: 503 while loading, after a failure, and while the server ends.
        """
        if self.closing.is_set():
            raise shutting_down()
        failure = self.failure
        if failure is not None:
            raise ServerError(503, f"there is no engine: {failure}", code="engine_dead")
        if self.llm is None:
            raise ServerError(503, "the model is being loaded", code="loading")
        return self.llm

    def note_end(self, run: Run) -> None:
        """A request has been answered, or its client has left."""
        self.runs.discard(run)
        if not self.runs:
            self._idle.set()

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside everything else; a task that nobody holds may be collected before it ends."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, give those that run `grace_s` seconds to end in, then cancel them."""
        began_s, before = time.monotonic(), len(self.runs)
        if before:
            tell("draining", f"ending: {before} requests have {grace_s:g} s", {"requests": before, "grace_s": grace_s})
        self.closing.set()
        self._idle.clear()
        if self.runs:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)
        cut = len(self.runs)
        for run in list(self.runs):
            run.cancel()
        if self.load_error is None:
            facts = {"ended": before - cut, "cut": cut, "seconds": round(time.monotonic() - began_s, 1)}
            tell("drained", f"ended: {before - cut} requests to their end, {cut} cut", facts)

    async def settle(self, most_s: float) -> None:
        """Let what runs in the background end: what was cut is counted and logged then."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=most_s)

    def close(self) -> None:
        """End the engine and what belongs to it. Blocks."""
        if self.template is not None:
            self.template.close()
        if self.llm is not None:
            self.llm.close()


def shutting_down() -> ServerError:
    """The answer to a request that came, or was still coming, when the server began to end."""
    return ServerError(503, "the server is shutting down", code="shutting_down", headers={"connection": "close"})


def serving_of(request: Request) -> Serving:
    """The server's state, from a request to it."""
    serving = request.app.state.serving
    assert isinstance(serving, Serving)
    return serving


def start_loading(serving: Serving, done: Callable[[], None]) -> threading.Thread:
    """Load on a thread of its own and call `done` on it afterwards."""

    def run() -> None:
        serving.load()
        done()

    thread = threading.Thread(target=run, name="quire-load", daemon=True)
    thread.start()
    return thread
