"""The body of POST /v1/responses. What this server does not have is named here, and taken where it asks for nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from quire.server.limits import MAX_LABEL_CHARS, MAX_MESSAGES, MAX_TOP_LOGPROBS, check_size
from quire.server.schema import Label, Part, Sampling, StreamOptions
from quire.server.schema_chat import Message

LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16  # OpenAI's number


class Text(Part):
    """A part of a message: what was said to the model, or what it said, as its answers hold it."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None  # an answer sent back may have them; nobody reads them


class Item(Part):
    """A message. Messages of an answer may be sent back as they came."""

    type: Literal["message"] = "message"
    role: Literal["developer", "system", "user", "assistant"]
    content: str | list[Text]
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    def message(self) -> Message:
        """As the chat template takes it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Message(role=self.role, content=text)


class Reasoning(Part):
    """How much a model thinks before it answers."""

    effort: Label | None = Field(None, description="For templates that have such a variable; refused by others.")
    summary: None = None
    generate_summary: None = None


class TextForm(Part):
    """What form the text has."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(StreamOptions):
    """A stream's last event has the usage in any case."""

    include_usage: Literal[False] = False
    include_obfuscation: Literal[False] | None = None


class ResponseRequest(Sampling):
    """The body of POST /v1/responses."""

    input: str | Annotated[list[Item], Field(min_length=1), BeforeValidator(check_size(MAX_MESSAGES))]
    instructions: str | None = Field(None, description="A system message at the beginning; not carried over by previous_response_id.")
    previous_response_id: Label | None = Field(None, description="Go on where this one ended. It must be stored still.")
    store: bool | None = Field(None, description="Keep the answer for a while, in memory; so unless false.")
    background: bool | None = Field(None, description="Answer at once; the response is to be fetched, or cancelled, later.")
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31, description="As many as the context has room for where not given.")
    metadata: dict[Annotated[str, Field(max_length=64)], Label] | None = Field(None, max_length=MAX_METADATA)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = Field(None, max_length=8)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="Each token's logprob, and those of this many likeliest.")
    text: TextForm | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Extension. Values for the model's own chat template.")

    # Neutral values of what is not there. Clients send them unasked.
    n: Literal[1] | None = None
    stream_options: ResponseStreamOptions | None = None
    prompt_logprobs: None = None
    return_token_ids: Literal[False] | None = None
    tools: list[Any] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(None, ge=0)
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    conversation: None = None
    prompt: None = None
    moderation: None = None
    context_management: None = None
    prompt_cache_key: Label | None = Field(None, description="A label: equal beginnings of one key's prompts are found whatever it says.")
    prompt_cache_retention: Literal["in_memory"] | None = None
    safety_identifier: Annotated[str, Field(max_length=MAX_LABEL_CHARS)] | None = None

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, tools: list[Any] | None) -> list[Any] | None:
        if tools:
            raise ValueError("must be empty or left out: tools are for /v1/chat/completions")
        return tools

    @property
    def stored(self) -> bool:
        """Whether the answer is to be kept."""
        return self.store is not False

    @property
    def logprobs(self) -> int | None:
        """As the engine counts them."""
        return self.top_logprobs if self.top_logprobs is not None else 0 if LOGPROBS in (self.include or ()) else None

    @property
    def response_format(self) -> dict[str, Any] | None:
        """The text's form, as /v1/chat/completions writes it."""
        form = None if self.text is None else self.text.format
        if form is None or form.get("type") != "json_schema":
            return form
        return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}

    def messages(self) -> list[Message]:
        """The new ones, without the instructions."""
        return [Message(role="user", content=self.input)] if isinstance(self.input, str) else [item.message() for item in self.input]
