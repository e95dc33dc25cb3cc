"""The bodies of POST /v1/responses and its input_tokens. What this server does not have is named here, and taken where it asks for nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from quire.server.limits import MAX_LABEL_CHARS, MAX_MESSAGES, MAX_TOOLS, MAX_TOP_LOGPROBS, check_size
from quire.server.schema import AnyObject, Asked, Label, NamedSchema, Part, ResponseFormat, Sampling, StreamOptions
from quire.server.schema_chat import AllowedToolChoice, AllowedTools, Function, Message, Name, NamedFunction, NamedTool, Tool, ToolChoice
from quire.server.schema_items import AnyItem, as_messages

LOGPROBS = "message.output_text.logprobs"
Included = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
MAX_METADATA = 16  # OpenAI's number


class FunctionTool(Part):
    """A function that may be called, without the object that /v1/chat/completions wraps it in."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: AnyObject | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        """As a chat has it."""
        return Tool(type="function", function=Function(**self.model_dump(exclude={"type"})))


class NamedFunctionTool(Part):
    """A function by its name; alone, the one that must be called."""

    type: Literal["function"]
    name: Name

    def named(self) -> NamedTool:
        """As a chat has it."""
        return NamedTool(type="function", function=NamedFunction(name=self.name))


class AllowedFunctionTools(Part):
    """Of all tools, those that may be called now, or of which one must be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunctionTool], Field(min_length=1, max_length=MAX_TOOLS)]


class Reasoning(Part):
    """How much a model thinks before it answers."""

    effort: Label | None = Field(None, description="For templates that have such a variable; refused by others.")
    summary: None = None
    generate_summary: None = None


class TextFormat(Part):
    """OpenAI's `response_format` once more, with the schema's fields beside the type."""

    type: Literal["text", "json_object", "json_schema"]
    name: Label | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.type == "json_schema") != (self.name is not None) or (self.schema_ is not None and self.name is None):
            raise ValueError("must have a name, and may have a schema, with the type json_schema and with no other")
        return self


class TextForm(Part):
    """What form the text has."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(StreamOptions):
    """A stream's last event has the usage in any case."""

    include_usage: Literal[False] = False


Input = str | Annotated[list[AnyItem], Field(min_length=1), BeforeValidator(check_size(MAX_MESSAGES))]


class ResponsePrompt(Asked):
    """What a response is answered from, and what becomes of its prompt."""

    input: Input | None = None
    instructions: str | None = Field(None, description="A system message at the beginning; not carried over by previous_response_id.")
    previous_response_id: Label | None = Field(None, description="Go on where this one ended. It must be stored still.")
    text: TextForm | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = Field(default=None, description="Functions; there are no other tools.")
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | AllowedFunctionTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: AnyObject | None = Field(None, description="Extension. Values for the model's own chat template.")
    truncation: Literal["disabled"] | None = None
    conversation: None = None

    @property
    def chat_tools(self) -> list[Tool] | None:
        """The functions, as a chat has them."""
        return [tool.tool() for tool in self.tools] if self.tools else None

    @property
    def chat_tool_choice(self) -> ToolChoice | None:
        """Which must be called, or may be, as a chat says it."""
        match self.tool_choice:
            case NamedFunctionTool() as tool:
                return tool.named()
            case AllowedFunctionTools() as some:
                return AllowedToolChoice(type=some.type, allowed_tools=AllowedTools(mode=some.mode, tools=[tool.named() for tool in some.tools]))
            case choice:
                return choice

    @property
    def response_format(self) -> ResponseFormat | None:
        """The text's form, as /v1/chat/completions writes it."""
        form = None if self.text is None else self.text.format
        if form is None or form.name is None:
            return None if form is None else ResponseFormat(type=form.type)
        return ResponseFormat(type=form.type, json_schema=NamedSchema(name=form.name, schema=form.schema_))

    def messages(self) -> list[Message]:
        """The new ones, without the instructions."""
        return [Message(role="user", content=self.input)] if isinstance(self.input, str) else as_messages(self.input or ())


class InputTokensRequest(ResponsePrompt):
    """The body of POST /v1/responses/input_tokens."""

    model: Annotated[str, Field(max_length=MAX_LABEL_CHARS)] | None = Field(default=None, description="The served model's name; it may be left out.")
    personality: None = None


class ResponseRequest(ResponsePrompt, Sampling):
    """The body of POST /v1/responses."""

    input: Input
    store: bool | None = Field(None, description="Keep the answer for a while, in memory; so unless false.")
    background: bool | None = Field(None, description="Go on whether or not anybody listens. The response is to be fetched, or cancelled, later.")
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31, description="As many as there is room for where not given.")
    metadata: dict[Annotated[str, Field(max_length=64)], Label] | None = Field(None, max_length=MAX_METADATA)
    include: list[Included] | None = Field(None, max_length=8)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="Each token's logprob, and those of this many likeliest.")

    # Neutral values of what is not there. Clients send them unasked.
    n: Literal[1] | None = None
    stream_options: ResponseStreamOptions | None = None
    prompt_logprobs: None = None
    return_token_ids: Literal[False] | None = None
    max_tool_calls: None = Field(None, description="It bounds calls of tools that the server itself runs, and there are none.")
    service_tier: Literal["auto", "default"] | None = None
    prompt: None = None
    moderation: None = None
    context_management: None = None
    prompt_cache_key: Label | None = Field(None, description="A label: equal beginnings of one key's prompts are found whatever it says.")
    prompt_cache_retention: Literal["in_memory"] | None = None
    safety_identifier: Annotated[str, Field(max_length=MAX_LABEL_CHARS)] | None = None

    @property
    def stored(self) -> bool:
        """Whether the answer is to be kept."""
        return self.store is not False

    @property
    def logprobs(self) -> int | None:
        """As the engine counts them."""
        return self.top_logprobs if self.top_logprobs is not None else 0 if LOGPROBS in (self.include or ()) else None
