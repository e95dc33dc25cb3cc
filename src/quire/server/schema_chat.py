"""A chat as clients send it, and as templates want it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from quire.server.errors import refused
from quire.server.limits import MAX_LABEL_CHARS, MAX_MESSAGES, MAX_N, MAX_TOOLS, MAX_TOP_LOGPROBS
from quire.server.schema import AnyObject, Asked, Label, Part, ResponseFormat, Sampling, SentBack

Name = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARS)]


class TextPart(SentBack):
    """A part of a message's content. There are no other kinds: models here read text."""

    type: Literal["text"]
    text: str


class Prediction(Part):
    """What much of the answer is thought to repeat, such as a file before an edit."""

    type: Literal["content"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class FunctionCall(SentBack):
    """What was called, its arguments a JSON object written out."""

    name: Name
    arguments: str
    parsed_arguments: Any = Field(default=None, description="The same once more, as OpenAI's client adds it. Nobody reads it.")


class ToolCall(SentBack):
    """A call an assistant made."""

    id: Label | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(SentBack):
    """One message. Fields of OpenAI's answers are taken where they come back empty: no template says what they hold."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Label | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_N)] | None = None
    tool_call_id: Label | None = None
    reasoning_content: str | None = None
    refusal: Annotated[str, Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    parsed: Any = Field(default=None, description="The content once more, as OpenAI's client adds it. Nobody reads it.")


class Function(Part):
    """A function that may be called."""

    name: Name
    description: str | None = None
    parameters: AnyObject | None = None
    strict: bool | None = None


class Tool(Part):
    """A tool: always a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    """A function by its name."""

    name: Name


class NamedTool(Part):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Part):
    """Some of the tools, of which any may be called, or one must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolChoice(Part):
    """Of all tools, which the prompt still has, those that may be called now."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatPrompt(Asked):
    """What becomes a prompt."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = Field(default=None, description="Extension. Begin the assistant's message; true unless continued.")
    continue_final_message: bool | None = Field(default=None, description="Extension. Go on within the last message.")
    chat_template_kwargs: AnyObject | None = Field(default=None, description="Extension. Values for the model's own chat template.")


class ChatRequest(ChatPrompt, Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Messages
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="As many as there is room for where not given.")
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="The same under its newer name.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = Field(default=None, description="Tokens it has right come several a step; no other is drawn for it.")
    reasoning_effort: Label | None = Field(default=None, description="For templates that have such a variable; refused by others.")
    metadata: dict[str, Label] | None = Field(default=None, max_length=16, description="Labels. Nothing depends on them.")
    store: Literal[False] | None = Field(default=None, description="Nothing is stored.")
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    prompt_cache_key: Label | None = Field(default=None, description="A label: equal beginnings of one key's prompts are found whatever it says.")
    safety_identifier: Label | None = Field(default=None, description="A label. Nothing depends on it.")

    # Neutral values of what is not there. Clients that write out every field send them unasked.
    verbosity: Literal["medium"] | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    audio: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None


def as_template_messages(messages: Sequence[Message], *, knows_developer: bool) -> list[dict[str, Any]]:
    """Messages in the form that transformers' templates are written for: content is text, arguments are objects.

    Raises:
        ServerError: a message has neither content nor calls, or arguments that are no JSON object.
    """
    return [_as_template_message(i, message, knows_developer) for i, message in enumerate(messages)]


def _as_template_message(i: int, message: Message, knows_developer: bool) -> dict[str, Any]:
    if message.content is None and not message.tool_calls:
        raise refused(f"messages.{i}.content", "must be text, or a list of parts of text")
    text = message.content
    if isinstance(text, list):
        text = "\n".join(part.text for part in text)
    made = {
        "thinking": message.reasoning_content,  # gpt-oss's name for it: transformers gives templates both
        "role": "system" if message.role == "developer" and not knows_developer else message.role,
        "content": text,
        "name": message.name,
        "reasoning_content": message.reasoning_content,
        "tool_call_id": message.tool_call_id,
        "tool_calls": [_as_template_call(i, j, call) for j, call in enumerate(message.tool_calls)] if message.tool_calls else None,
    }
    return {name: value for name, value in made.items() if value is not None}


def arguments_of(text: str) -> dict[str, Any]:
    """A call's arguments.

    Raises:
        ValueError: they are none.
    """
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError("must be a JSON object written out as a string")
    return arguments


def _as_template_call(i: int, j: int, call: ToolCall) -> dict[str, Any]:
    try:
        arguments = arguments_of(call.function.arguments)
    except ValueError as error:
        raise refused(f"messages.{i}.tool_calls.{j}.function.arguments", str(error)) from error
    id_ = {} if call.id is None else {"id": call.id}  # templates ask whether it is there
    return {**id_, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
