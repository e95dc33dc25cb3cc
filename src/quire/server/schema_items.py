"""The items of a response's input: messages, calls that were made and what they came to. Items of an answer may be sent back as they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from quire.server.limits import MAX_LABEL_CHARS
from quire.server.schema import Label, SentBack
from quire.server.schema_chat import FunctionCall, Message, Name, ToolCall, arguments_of


class Text(SentBack):
    """A part of a message: what was said to the model, or what it said, as its answers hold it."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None  # an answer sent back may have them; nobody reads them
    parsed: Any = Field(None, exclude=True, description="The text once more, as OpenAI's client adds it. Nobody reads it.")


def _text(content: str | list[Text]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _known(kind: Any) -> Any:
    """Of a kind of item that is not there: which there are, and not just that it is no message."""
    if kind != "message":
        raise ValueError("must be 'message', 'function_call' or 'function_call_output'")
    return kind


class Item(SentBack):
    """A message. Messages of an answer may be sent back as they came."""

    type: Annotated[Literal["message"], BeforeValidator(_known)] = "message"
    role: Literal["developer", "system", "user", "assistant"]
    content: str | list[Text]
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    def message(self) -> Message:
        """As the chat template takes it."""
        return Message(role=self.role, content=_text(self.content))


def _arguments(text: str) -> str:
    arguments_of(text)  # here, where it is known which item they are in
    return text


class FunctionCallItem(SentBack):
    """A call that was made, as an answer holds it."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARS)]
    name: Name
    arguments: Annotated[str, AfterValidator(_arguments)]
    parsed_arguments: Any = Field(None, exclude=True, description="The same once more, as OpenAI's client adds it. Nobody reads it.")
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    def call(self) -> ToolCall:
        """As a chat has it."""
        return ToolCall(id=self.call_id, function=FunctionCall(name=self.name, arguments=self.arguments))


class FunctionOutputItem(SentBack):
    """What a call came to."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARS)]
    output: str | list[Text]
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    def message(self) -> Message:
        """As the chat template takes it."""
        return Message(role="tool", content=_text(self.output), tool_call_id=self.call_id)


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    return {"function_call": "FunctionCall", "function_call_output": "FunctionOutput"}.get(kind, "Message") if isinstance(kind, str) else "Message"


AnyItem = Annotated[
    Annotated[Item, Tag("Message")] | Annotated[FunctionCallItem, Tag("FunctionCall")] | Annotated[FunctionOutputItem, Tag("FunctionOutput")],
    Discriminator(_kind),
]


def as_messages(items: Sequence[Item | FunctionCallItem | FunctionOutputItem]) -> list[Message]:
    """Items as the messages of a chat: calls belong to the message of the assistant before them, or make one."""
    found: list[Message] = []
    for item in items:
        if not isinstance(item, FunctionCallItem):
            found.append(item.message())
        elif found and found[-1].role == "assistant":
            found[-1] = found[-1].model_copy(update={"tool_calls": [*(found[-1].tool_calls or ()), item.call()]})
        else:
            found.append(Message(role="assistant", tool_calls=[item.call()]))
    return found
