"""What became of each of the last requests, as Chrome trace events: open the file in Perfetto. Only the key that sent a request may read it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from quire.outputs import RequestOutput
from quire.server.schema_answers import Answer, answers

MAX_TRACES = 64  # of one key
MAX_KEYS = 1024
MAX_TOKENS = 4096  # whose times are kept, of one request

Event = dict[str, Any]
router = APIRouter()


class TraceEvent(BaseModel):
    """As the Chrome trace event format has it."""

    name: str
    ph: Literal["X", "M"]
    pid: int
    tid: int | None = None
    ts: int | None = None
    dur: int | None = None
    args: dict[str, Any]


class TraceFile(Answer):
    """A file for Perfetto."""

    traceEvents: list[TraceEvent]
    displayTimeUnit: Literal["ms"]


@dataclass(frozen=True, slots=True)
class Trace:
    """One request that has ended: times on the wall clock, in seconds. `token_times_s` are when its tokens were sent on."""

    request_id: str
    endpoint: str
    ended_s: float
    spans: dict[str, float]
    token_times_s: tuple[float, ...]
    facts: dict[str, Any]

    def events(self, lane: int, chunks: Sequence[tuple[float, int]]) -> list[Event]:
        """Chrome trace events on two lanes, the request's and its tokens'. `chunks` are (wall time, tokens) of the steps of its prefill."""
        at = self.ended_s - sum(self.spans.values())
        name = {"name": "thread_name", "ph": "M", "pid": 1, "tid": lane, "args": {"name": self.request_id}}
        events = [name, _span(self.endpoint, lane, at, sum(self.spans.values()), self.facts)]
        for part, seconds in self.spans.items():
            events.append(_span(part, lane, at, seconds, {}))
            at += seconds
        prefill_end = at - self.spans["decode"]
        ends = [*(began for began, _ in chunks[1:]), prefill_end]
        for (began, num_tokens), end in zip(chunks, ends, strict=False):
            events.append(_span("chunk", lane, began, end - began, {"tokens": num_tokens}))
        times = self.token_times_s
        if times:
            events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": lane + 1, "args": {"name": f"{self.request_id} tokens sent"}})
        for before, now in zip((prefill_end, *times), times, strict=False):
            events.append(_span("token", lane + 1, min(before, now), now - before, {}))
        return events


def _span(name: str, lane: int, start_s: float, seconds: float, args: dict[str, Any]) -> Event:
    return {"name": name, "ph": "X", "pid": 1, "tid": lane, "ts": round(start_s * 1e6), "dur": max(0, round(seconds * 1e6)), "args": args}


class Traces:
    """The last MAX_TRACES requests of each of the last MAX_KEYS keys. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: OrderedDict[str, OrderedDict[str, Trace]] = OrderedDict()

    def finished(self, key_id: str, endpoint: str, output: RequestOutput, token_times_s: Sequence[float] = ()) -> None:
        """Keep a request that has just ended. `token_times_s` are on the clock of `time.perf_counter`."""
        receipt, to_wall = output.receipt, _to_wall()
        spans = {"queued": receipt.queued_s, "prefill": receipt.prefill_s, "decode": receipt.decode_s}
        facts = {
            "prompt_tokens": receipt.prompt_tokens,
            "cached_tokens": receipt.cached_tokens,
            "computed_tokens": receipt.computed_tokens,
            "generated_tokens": output.receipt.drawn_tokens,
            "preemptions": receipt.num_preemptions,
            "waited_for": receipt.waited_for,
            "finish_reasons": [one.finish_reason for one in output.outputs],
        }
        times = tuple(at + to_wall for at in token_times_s[:MAX_TOKENS])
        trace = Trace(output.request_id, endpoint, time.time(), spans, times, facts)
        with self._lock:
            ring = self._keys.setdefault(key_id, OrderedDict())
            self._keys.move_to_end(key_id)
            ring[trace.request_id] = trace
            ring.move_to_end(trace.request_id)
            if len(ring) > MAX_TRACES:
                ring.popitem(last=False)
            if len(self._keys) > MAX_KEYS:
                self._keys.popitem(last=False)

    def of(self, key_id: str) -> list[Trace]:
        """A key's traces, oldest first."""
        with self._lock:
            return list(self._keys.get(key_id, {}).values())


def _to_wall() -> float:
    return time.time() - time.perf_counter()


def _as_json(request: Request, traces: Sequence[Trace]) -> dict[str, Any]:
    llm, to_wall = request.app.state.serving.llm, _to_wall()
    events: list[Event] = [{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "quire"}}]
    for i, trace in enumerate(traces):
        chunks = llm.step_log.chunks(trace.request_id) if llm is not None else []
        events += trace.events(2 * i + 1, [(began + to_wall, num_tokens) for began, num_tokens in chunks])
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _own(request: Request) -> list[Trace]:
    traces: Traces = request.app.state.serving.metrics.traces
    return traces.of(request.state.key_id)


@router.get("/traces", responses=answers(TraceFile))
def all_traces(request: Request) -> JSONResponse:
    """The last requests of this key, in the Chrome trace event format."""
    return JSONResponse(_as_json(request, _own(request)))


@router.get("/traces/{request_id}", responses=answers(TraceFile))
def one_trace(request: Request, request_id: str) -> JSONResponse:
    """One of them. Of others' requests nobody learns even that they exist."""
    found = [trace for trace in _own(request) if trace.request_id == request_id]
    if not found:
        raise HTTPException(404, f"no trace of {request_id!r} is kept for this key; the last {MAX_TRACES} requests are")
    return JSONResponse(_as_json(request, found))
