"""/v1/responses: chats of which the server remembers what was said, for as long as its memory holds it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from starlette.types import Send

from quire.params import SamplingParams
from quire.server.calling import naming_tools, with_calls
from quire.server.chat import chat_calling
from quire.server.errors import refused
from quire.server.models import check_model
from quire.server.response_inputs import check_query, inputs_of
from quire.server.response_items import Body
from quire.server.response_log import EventLog
from quire.server.response_prompt import FIELD_NAMES, before_of, messages_of, prompt_of
from quire.server.response_store import ResponseStore, Stored, store_of
from quire.server.response_told import Told
from quire.server.runs import Job, Run, start_run
from quire.server.sampling import params_of
from quire.server.schema_answers import answers
from quire.server.schema_response_answers import TYPED_EVENTS, Deleted, ResponseObject
from quire.server.schema_responses import ResponseRequest
from quire.server.serving import serving_of
from quire.server.sse import EventStream, answer_at_end, json_response
from quire.server.structure import named_as, structure_names, structure_of

ENDPOINT = "responses"
PARAMETERS = ("stream", "starting_after", "include_obfuscation")
router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses", responses=answers(ResponseObject, TYPED_EVENTS))
async def create(request: Request, asked: ResponseRequest) -> Response:
    """Answer what was said last."""
    serving, store, owner = serving_of(request), store_of(request), str(request.state.namespace)
    serving.engine()
    check_model(serving, asked.model)
    _check(asked)
    before = before_of(store, owner, asked.previous_response_id)
    inputs = inputs_of(asked, before.items if before is not None else ())
    messages = messages_of(asked, before)
    with named_as(FIELD_NAMES | _structure_names(asked)):
        params = _params(asked)
        calling = chat_calling(serving, asked.chat_tools, asked.chat_tool_choice, asked.parallel_tool_calls, params.structured)
        job = Job(await prompt_of(serving, asked, messages), with_calls(params, calling))
        told = Told(asked, serving.settings.model, serving.texts, calling)
        with naming_tools(calling, "parameters"):
            run = await start_run(request, ENDPOINT, told.response_id, [job], priority=asked.priority or 0, cache_salt=asked.cache_salt)

    def keep(body: Body) -> None:
        if asked.stored:
            store.put(owner, Stored(body, inputs, [*messages, told.message()]))

    def whole(outputs: Sequence[Any]) -> Body:
        body = told.whole(outputs)
        keep(body)
        return body

    if not asked.background:
        return TypedStream(run, told.events(run, keep)) if asked.stream else await answer_at_end(request, run, whole)
    log = EventLog() if asked.stream else None
    store.put(owner, Stored(told.body, inputs, messages, run=run, log=log))
    serving.in_background(_finish(run, told, store, owner, log))
    return json_response(told.body, run.name) if log is None else TypedStream(None, log.follow(None))


@router.get("/v1/responses/{response_id}", responses=answers(ResponseObject, TYPED_EVENTS))
async def retrieve(
    request: Request,
    response_id: str,
    stream: Annotated[bool, Query(description="Its events, once more and as they come: of one made with background and stream.")] = False,
    starting_after: Annotated[int | None, Query(ge=0, description="With stream: the sequence_number of the last event that was read.")] = None,
    include_obfuscation: Literal["false"] | None = None,
) -> Response:
    """One that was stored, as it is now."""
    check_query(request, PARAMETERS)
    stored = store_of(request).get(request.state.namespace, response_id)
    if not stream:
        if starting_after is not None:
            raise refused("starting_after", "must be left out without stream=true")
        return json_response(stored.body)
    if stored.log is None:
        raise refused("stream", "must be false or left out: of this response no events are kept, as it was not made with background and stream")
    return TypedStream(None, stored.log.follow(starting_after))


@router.post("/v1/responses/{response_id}/cancel", responses=answers(ResponseObject))
async def cancel(request: Request, response_id: str) -> Response:
    """End one that runs in the background. One that has ended stays as it is."""
    store, owner = store_of(request), str(request.state.namespace)
    stored = store.get(owner, response_id)
    if not stored.background:
        raise refused("response_id", "must be of a response with background: true; others end when their connection is closed")
    if stored.run is not None:
        stored = stored.cancelled()
        store.put(owner, stored)
    return json_response(stored.body)


@router.delete("/v1/responses/{response_id}", responses=answers(Deleted))
async def delete(request: Request, response_id: str) -> Response:
    """Forget one. If it runs in the background it ends."""
    store, owner = store_of(request), str(request.state.namespace)
    store.get(owner, response_id).cancelled()
    store.drop(owner, response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


class TypedStream(EventStream):
    """A stream whose events say themselves which is the last, and what went wrong."""

    async def _speak(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _finish(run: Run, told: Told, store: ResponseStore, owner: str, log: EventLog | None) -> None:
    """See a response in the background to its end, and keep it in the place of the one that was running, if that is still there."""
    with run:
        async for event in told.events(run, lambda _: None):
            if log is not None:
                log.append(event)
    running = store.find(owner, told.response_id)
    if running is not None and running.run is run:  # neither cancelled nor forgotten
        messages = running.messages if told.body["status"] == "failed" else [*running.messages, told.message()]
        store.put(owner, Stored(told.body, running.inputs, messages, log=log))
    if log is not None:
        log.end()


def _check(asked: ResponseRequest) -> None:
    if asked.background and not asked.stored:
        raise refused("background", "must be false with store: false: there would be nothing to fetch")


def _params(asked: ResponseRequest) -> SamplingParams:
    structured = structure_of(asked.response_format, asked.structured_outputs)
    return params_of(asked, max_tokens=asked.max_output_tokens, logprobs=asked.logprobs, structured=structured)


def _structure_names(asked: ResponseRequest) -> dict[str, str]:
    """What this body calls the fields that the engine knows as `structured`."""
    if asked.structured_outputs is not None:
        return structure_names(asked)
    return {"structured.json_schema": "text.format.schema", "structured": "text.format"}
