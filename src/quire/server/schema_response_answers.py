"""What answers of /v1/responses hold, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from quire.server.schema_answers import REF, Answer, CachedTokens, ChatToken

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(Answer):
    """A part of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatToken]


class OutputMessage(Answer):
    """What the model said."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Status
    content: list[OutputText]


class OutputCall(Answer):
    """A call the model made, its arguments as JSON text."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Status


class ResponseError(Answer):
    """Why there is no answer."""

    code: str
    message: str


class IncompleteDetails(Answer):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"]


class InputDetails(CachedTokens):
    """Prompt tokens that were not computed again, and those that were."""

    cache_write_tokens: int


class OutputDetails(Answer):
    """Of what was said, what was thought."""

    reasoning_tokens: int


class ResponseUsage(Answer):
    """What a response cost."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ReasoningTold(Answer):
    """As it was asked for."""

    effort: str | None
    summary: None


class TextTold(Answer):
    """As it was asked for."""

    format: dict[str, Any]


class ResponseObject(Answer):
    """A response as it is now."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None = None
    status: Status | Literal["failed", "cancelled"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputMessage | OutputCall]
    usage: ResponseUsage | None
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningTold
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: TextTold
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None


class ResponseEvent(BaseModel):
    """An event of a stream. The last one's type says what became of the response."""

    type: str
    sequence_number: int
    response: ResponseObject | None = None
    item: OutputMessage | OutputCall | None = None
    part: OutputText | None = None
    logprobs: list[ChatToken] | None = None
    item_id: str | None = None
    output_index: int | None = None
    content_index: int | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None
    name: str | None = None


class Deleted(Answer):
    """The answer of DELETE."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputText(Answer):
    """A part of a message, as it was sent."""

    type: Literal["input_text"]
    text: str


class InputMessage(Answer):
    """A message of a response's input, or of an answer before it."""

    id: str
    type: Literal["message"]
    role: Literal["developer", "system", "user", "assistant"]
    status: Status
    content: list[InputText | OutputText]
    phase: Literal["commentary", "final_answer"] | None = None


class CallOutput(Answer):
    """What a call came to."""

    id: str
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText | OutputText]
    status: Status


class InputTokens(Answer):
    """How many tokens a response would be answered from."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class InputItems(Answer):
    """A page of what a response was made from."""

    object: Literal["list"]
    data: list[InputMessage | OutputCall | CallOutput]
    first_id: str | None
    last_id: str | None
    has_more: bool


TYPED_EVENTS = {
    "type": "object",
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": {"$ref": REF.format(model=ResponseEvent.__name__)}},
    },
    "required": ["event", "data"],
}
