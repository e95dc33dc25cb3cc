"""/v1/responses: chats of which the server remembers what was said, for as long as its memory holds it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Send

from quire.params import SamplingParams
from quire.server.calling import naming_tools, with_calls
from quire.server.chat import chat_calling, chat_prompt
from quire.server.errors import ServerError, refused
from quire.server.limits import MAX_MESSAGES
from quire.server.models import check_model
from quire.server.response_inputs import inputs_of
from quire.server.response_items import Body
from quire.server.response_store import ResponseStore, Stored, store_of
from quire.server.response_told import Told
from quire.server.runs import Job, Run, start_run
from quire.server.sampling import params_of
from quire.server.schema_answers import answers
from quire.server.schema_chat import ChatPrompt, Message, arguments_of
from quire.server.schema_response_answers import TYPED_EVENTS, Deleted, ResponseObject
from quire.server.schema_responses import ResponseRequest
from quire.server.serving import Serving, serving_of
from quire.server.sse import EventStream, answer_at_end, json_response
from quire.server.structure import named_as, structure_names, structure_of

ENDPOINT = "responses"
# Of fields that /v1/chat/completions, whose parts do the work, and the engine call otherwise.
FIELD_NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "reasoning_effort": "reasoning.effort",
}
router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses", responses=answers(ResponseObject, TYPED_EVENTS))
async def create(request: Request, asked: ResponseRequest) -> Response:
    """Answer what was said last."""
    serving, store, owner = serving_of(request), store_of(request), str(request.state.namespace)
    serving.engine()
    check_model(serving, asked.model)
    _check(asked)
    before = _before(store, owner, asked.previous_response_id)
    inputs = inputs_of(asked, before.items if before is not None else ())
    messages = [*(before.messages if before is not None else ()), *asked.messages()]
    if len(messages) > MAX_MESSAGES:
        raise refused("previous_response_id", f"must lead to at most {MAX_MESSAGES} messages in all")
    with named_as(FIELD_NAMES | _structure_names(asked)):
        params = _params(asked)
        calling = chat_calling(serving, asked.chat_tools, asked.chat_tool_choice, asked.parallel_tool_calls, params.structured)
        job = Job(await _prompt(serving, asked, messages), with_calls(params, calling))
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

    if asked.background:
        store.put(owner, Stored(told.body, inputs, messages, run))
        answer = json_response(told.body, run.name)
        serving.in_background(_finish(run, told, store, owner, whole))
        return answer
    return TypedStream(run, told.events(run, keep)) if asked.stream else await answer_at_end(request, run, whole)


@router.get("/v1/responses/{response_id}", responses=answers(ResponseObject))
async def retrieve(request: Request, response_id: str) -> Response:
    """One that was stored, as it is now."""
    for name, value in request.query_params.items():
        if value not in ("", "false"):
            raise refused(name, "must be left out: a stored response is given back whole")
    return json_response(store_of(request).get(request.state.namespace, response_id).body)


@router.post("/v1/responses/{response_id}/cancel", responses=answers(ResponseObject))
async def cancel(request: Request, response_id: str) -> Response:
    """End one that runs in the background. One that has ended stays as it is."""
    store, owner = store_of(request), str(request.state.namespace)
    stored = store.get(owner, response_id)
    if not stored.background:
        raise refused("response_id", "must be of a response with background: true; others end when their connection is closed")
    if stored.run is not None:
        stored.run.cancel()
        stored = Stored(stored.body | {"status": "cancelled"}, stored.inputs, stored.messages)
        store.put(owner, stored)
    return json_response(stored.body)


@router.delete("/v1/responses/{response_id}", responses=answers(Deleted))
async def delete(request: Request, response_id: str) -> Response:
    """Forget one. If it runs in the background it ends."""
    store, owner = store_of(request), str(request.state.namespace)
    stored = store.get(owner, response_id)
    if stored.run is not None:
        stored.run.cancel()
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


async def _finish(run: Run, told: Told, store: ResponseStore, owner: str, whole: Callable[[Sequence[Any]], Body]) -> None:
    """See a response in the background to its end; `whole` keeps it, in the place of the one that was running."""
    with run:
        try:
            outputs = await run.outputs()
        except Exception as error:
            running = store.find(owner, told.response_id)
            if running is not None and running.run is run:  # neither cancelled nor forgotten
                store.put(owner, Stored(told.failed(error), running.inputs, running.messages))
            return
    running = store.find(owner, told.response_id)
    if running is not None and running.run is run:
        whole(outputs)


def _check(asked: ResponseRequest) -> None:
    if asked.background and asked.stream:
        raise refused("background", "must be false with stream: a response in the background is fetched when it has ended")
    if asked.background and not asked.stored:
        raise refused("background", "must be false with store: false: there would be nothing to fetch")


def _before(store: ResponseStore, owner: str, response_id: str | None) -> Stored | None:
    """The response that this one goes on from."""
    if response_id is None:
        return None
    stored = store.find(owner, response_id)
    if stored is None:
        message = "previous_response_id: there is no such response, or no more"
        raise ServerError(400, message, param="previous_response_id", code="previous_response_not_found")
    if stored.status not in ("completed", "incomplete"):
        raise refused("previous_response_id", f"must be of a response that was answered (it is {stored.status})")
    for call in stored.messages[-1].tool_calls or ():
        try:
            arguments_of(call.function.arguments)
        except ValueError as error:
            what = f"must be of a response whose calls are whole (the arguments of {call.id} are no JSON object)"
            raise refused("previous_response_id", what) from error
    return stored


async def _prompt(serving: Serving, asked: ResponseRequest, messages: list[Message]) -> list[int]:
    if asked.instructions is not None:
        messages = [Message(role="system", content=asked.instructions), *messages]
    effort = asked.reasoning.effort if asked.reasoning is not None else None
    whole = ChatPrompt(
        tools=asked.chat_tools, add_generation_prompt=None, continue_final_message=None, chat_template_kwargs=asked.chat_template_kwargs
    )
    return await chat_prompt(serving, whole, messages, effort)


def _params(asked: ResponseRequest) -> SamplingParams:
    structured = structure_of(asked.response_format, asked.structured_outputs)
    return params_of(asked, max_tokens=asked.max_output_tokens, logprobs=asked.logprobs, structured=structured)


def _structure_names(asked: ResponseRequest) -> dict[str, str]:
    """What this body calls the fields that the engine knows as `structured`."""
    if asked.structured_outputs is not None:
        return structure_names(asked)
    return {"structured.json_schema": "text.format.schema", "structured": "text.format"}
