"""What a response is answered from: what was said before it, what its request says, and the prompt that this comes to. Counted, too, unanswered."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from quire.server.chat import chat_calling, chat_prompt
from quire.server.errors import ServerError, refused
from quire.server.limits import MAX_MESSAGES
from quire.server.models import check_model
from quire.server.response_store import ResponseStore, Stored, store_of
from quire.server.schema_answers import answers
from quire.server.schema_chat import ChatPrompt, Message, arguments_of
from quire.server.schema_response_answers import InputTokens
from quire.server.schema_responses import InputTokensRequest, ResponsePrompt
from quire.server.serving import Serving, serving_of
from quire.server.sse import json_response
from quire.server.structure import named_as, structure_of

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


@router.post("/v1/responses/input_tokens", responses=answers(InputTokens))
async def input_tokens(request: Request, asked: InputTokensRequest) -> Response:
    """How many tokens a response would be answered from. More than there is room for are counted as well."""
    serving, owner = serving_of(request), str(request.state.namespace)
    serving.engine()
    check_model(serving, asked.model)
    messages = messages_of(asked, before_of(store_of(request), owner, asked.previous_response_id))
    if not messages and asked.instructions is None:
        raise refused("input", "must be given, or instructions, or previous_response_id")
    with named_as(FIELD_NAMES):
        chat_calling(serving, asked.chat_tools, asked.chat_tool_choice, asked.parallel_tool_calls, structure_of(asked.response_format, None))
        ids = await prompt_of(serving, asked, messages)
    return json_response({"object": "response.input_tokens", "input_tokens": len(ids)})


def before_of(store: ResponseStore, owner: str, response_id: str | None) -> Stored | None:
    """The response that this one goes on from.

    Raises:
        ServerError: it is not there, or has no answer that one could go on from.
    """
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


def messages_of(asked: ResponsePrompt, before: Stored | None) -> list[Message]:
    """What was said before and what the request says, without the instructions.

    Raises:
        ServerError: they are too many.
    """
    messages = [*(before.messages if before is not None else ()), *asked.messages()]
    if len(messages) > MAX_MESSAGES:
        raise refused("previous_response_id", f"must lead to at most {MAX_MESSAGES} messages in all")
    return messages


async def prompt_of(serving: Serving, asked: ResponsePrompt, messages: list[Message]) -> list[int]:
    """The token ids of these messages, with the request's instructions at the beginning. Raises ServerError as `chat_prompt`."""
    if asked.instructions is not None:
        messages = [Message(role="system", content=asked.instructions), *messages]
    effort = asked.reasoning.effort if asked.reasoning is not None else None
    whole = ChatPrompt(
        tools=asked.chat_tools, add_generation_prompt=None, continue_final_message=None, chat_template_kwargs=asked.chat_template_kwargs
    )
    return await chat_prompt(serving, whole, messages, effort)
