"""The engine's requests behind one HTTP request: submitted together, read together, and cancelled together when the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fastapi import Request
from starlette.types import Receive

from quire.engine.stream import RequestStream, interleaved
from quire.outputs import Receipt, RequestOutput, TokenEvent
from quire.params import SamplingParams
from quire.server.errors import ServerError, as_server_error
from quire.server.keys import salted
from quire.server.limits import MAX_THREADED_CHARS
from quire.server.serving import Serving, serving_of

if TYPE_CHECKING:
    from quire.engine.llm import LLM  # brings torch: a server listens before that

T = TypeVar("T")


class Job(NamedTuple):
    """One prompt for the engine."""

    prompt: str | list[int]
    params: SamplingParams


class End(NamedTuple):
    """What one prompt came to."""

    receipt: Receipt
    finish_reasons: tuple[str, ...]
    code: str | None


class ClientLeft(Exception):
    """Nobody is there any more to be answered."""


class Run:
    """As a context manager: leaving it cancels what has not ended."""

    def __init__(self, serving: Serving, endpoint: str, name: str, key_id: str) -> None:
        self.name = name
        self._serving, self._endpoint, self._key_id = serving, endpoint, key_id
        self._streams: list[RequestStream] = []
        self._open: set[int] = set()
        self._began_s = time.perf_counter()
        self._times_s: list[list[float]] = []  # when tokens of each job were sent on
        self._ends: list[End] = []
        self.over = asyncio.Event()  # nothing of it runs any more; what was cancelled ends a little later

    async def submit(self, llm: LLM, jobs: Sequence[Job], namespace: str, priority: int) -> None:
        """Submit all, or none.

        Raises:
            InvalidRequestError, QueueFullError, EngineDeadError: one was refused; none runs.
        """
        llm.check_room(len(jobs))
        self._serving.runs.add(self)
        try:
            for i, job in enumerate(jobs):
                stream = await _submit(llm, job, namespace, priority, f"{self.name}-{i}" if i else self.name)
                self._serving.metrics.started(self._endpoint)
                self._streams.append(stream)
                self._times_s.append([])
                self._open.add(i)
        except BaseException:
            self.__exit__()
            raise

    async def events(self) -> AsyncGenerator[tuple[int, TokenEvent], None]:
        """(place of the job, event) of all jobs as they come, interleaved.

        Raises:
            ServerError: one failed or was cancelled.
        """
        last_s: dict[tuple[int, int], float] = {}
        async for i, event in interleaved(self._streams):
            self._note_times(last_s, i, event)
            if event.output is not None:
                self._ended(i, event.output)
            elif event.finish_reason in ("cancelled", "error"):
                continue  # of one of its sequences: the last event, which has the output, says what befell the request
            yield i, event

    async def outputs(self) -> list[RequestOutput]:
        """The outputs of all jobs, in order, once all have ended.

        Raises:
            ServerError: one failed or was cancelled.
        """
        outputs = []
        for i, stream in enumerate(self._streams):
            output = await stream.result()
            if any(completion.token_ids for completion in output.outputs):
                self._serving.metrics.first_token(output.receipt.queued_s + output.receipt.prefill_s)
            self._ended(i, output)
            outputs.append(output)
        return outputs

    def cancel(self) -> None:
        """Ask the engine to end what has not; it gives the pages back before its next step."""
        for i in self._open:
            self._streams[i].cancel()

    def facts(self) -> dict[str, Any]:
        """What it came to so far, without a text: for the log."""
        told: dict[str, Any] = {
            "prompt_tokens": sum(end.receipt.prompt_tokens for end in self._ends),
            "reused_tokens": sum(end.receipt.cached_tokens for end in self._ends),
            "generated_tokens": sum(end.receipt.drawn_tokens for end in self._ends),
            "queued_ms": round(1000 * max((end.receipt.queued_s for end in self._ends), default=0.0), 1),
            "finish": sorted({reason for end in self._ends for reason in end.finish_reasons}),
        }
        codes = [end.code for end in self._ends if end.code is not None]
        return told | ({"code": codes[0]} if codes else {})

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, error: BaseException | None = None, trace: TracebackType | None = None) -> None:
        self.cancel()
        for i in self._open:
            self._serving.in_background(self._note_cancelled(i))
        self._serving.note_end(self)

    def _ended(self, i: int, output: RequestOutput) -> None:
        self._open.discard(i)
        self._note_output(i, output)
        if output.error is not None:
            raise output.error
        if any(completion.finish_reason == "cancelled" for completion in output.outputs):
            raise ServerError(503, "the server is shutting down", code="shutting_down")

    async def _note_cancelled(self, i: int) -> None:
        self._note_output(i, await self._streams[i].result())

    def _note_output(self, i: int, output: RequestOutput) -> None:
        self._serving.metrics.finished(self._endpoint, output, key_id=self._key_id, token_times_s=self._times_s[i])
        code = None if output.error is None else as_server_error(output.error).code
        self._ends.append(End(output.receipt, tuple(str(one.finish_reason) for one in output.outputs), code))
        if len(self._ends) == len(self._streams):
            self.over.set()

    def _note_times(self, last_s: dict[tuple[int, int], float], i: int, event: TokenEvent) -> None:
        if not event.token_ids:
            return
        now, key = time.perf_counter(), (i, event.index)
        self._times_s[i] += [now] * len(event.token_ids)
        if key in last_s:
            for _ in event.token_ids:  # events that were merged are as many tokens, evenly
                self._serving.metrics.between_tokens((now - last_s[key]) / len(event.token_ids))
        elif event.index == 0:
            self._serving.metrics.first_token(now - self._began_s)
        last_s[key] = now


async def start_run(request: Request, endpoint: str, name: str, jobs: Sequence[Job], *, priority: int, cache_salt: str | None) -> Run:
    """Submit the jobs of a request, in the namespace of the caller."""
    serving = serving_of(request)
    run = Run(serving, endpoint, name, request.state.key_id)
    await run.submit(serving.engine(), jobs, salted(request.state.namespace, cache_salt), priority)
    request.state.run = run  # for the log
    return run


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` returns, or raises; when the client leaves first, it is cancelled at once.

    Raises:
        ClientLeft: it did.
    """
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientLeft
        return doing.result()
    finally:
        for task in (doing, watching):
            if not task.done():
                task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _submit(llm: LLM, job: Job, namespace: str, priority: int, request_id: str) -> RequestStream:
    def submit() -> RequestStream:
        return llm.submit(job.prompt, job.params, namespace=namespace, priority=priority, request_id=request_id)

    length = len(job.prompt) + len(job.params.prediction or ())
    if length <= MAX_THREADED_CHARS and job.params.structured is None:  # a grammar may take seconds to compile
        return submit()
    return await asyncio.to_thread(submit)
