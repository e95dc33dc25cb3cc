"""The tools of one chat: which there are, whether one must be called, and how calls are told from text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quire.errors import InvalidRequestError
from quire.outputs import Completion, TokenEvent
from quire.params import SamplingParams
from quire.server.chat_template import ChatTemplate
from quire.server.errors import refused
from quire.server.schema_chat import AllowedToolChoice, NamedTool, Tool, ToolChoice, arguments_of
from quire.server.tool_formats import KNOWN, WORDS, Format, check_names
from quire.server.tool_grammar import forced, mistake, offered
from quire.server.tool_parser import ToolParser
from quire.server.tools import CallDelta, Delta, Schemas, gather
from quire.structured import StructuredOutput


@dataclass(frozen=True, slots=True)
class Calling:
    """How calls are told from text in the answers to one request.

    tools: the schemas of their arguments. structured: the grammar that holds the model to calls, None where it is free; held: which tools it was made
    of, by their places. in_special: whether words of the format are special tokens of this tokenizer, and its text must be decoded with them.
    """

    style: Format
    tools: Schemas
    structured: StructuredOutput | None
    held: Sequence[int]
    in_special: bool

    def parser(self) -> ToolParser:
        """A parser for one choice."""
        return ToolParser(self.style, self.tools)


def calling_of(
    template: ChatTemplate,
    tools: Sequence[Tool] | None,
    choice: ToolChoice | None,
    parallel_tool_calls: bool | None,
    form: StructuredOutput | None = None,
) -> Calling | None:
    """What `tools`, `tool_choice` and `parallel_tool_calls` of a request come to; None where nothing is to be called.

    `form` is the answer's, where it is given: a message then has it, or is calls.

    Raises:
        ServerError: the fields do not go together, or the model's template teaches no format of calls that is known here.
        InvalidRequestError: a tool's schema is too large, or too deep, or its name or schema is none that the format can hold a model to.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise refused("tool_choice", "must be 'none', 'auto' or left out without tools")
        if parallel_tool_calls is False:
            raise refused("parallel_tool_calls", "must be true or left out without tools")
        return None
    parallel = parallel_tool_calls is not False
    functions = [tool.function for tool in tools]
    schemas = {function.name: function.parameters for function in functions}
    if len(schemas) < len(functions):
        raise refused("tools", "must have names that differ")
    if choice == "none":
        return None
    style = template.call_format([tool.model_dump(exclude_none=True) for tool in tools])
    if style is None:
        raise refused(
            "tools", f"must be left out, or come with tool_choice 'none': this model's chat template teaches none of {KNOWN} formats of calls"
        )
    check_names(style, "tools", schemas)
    special, structured, held = template.special_token_ids, None, list(range(len(functions)))
    mode = choice
    if isinstance(choice, AllowedToolChoice):
        mode, held = choice.allowed_tools.mode, _allowed(choice, list(schemas))
        functions = [functions[i] for i in held]
        schemas = {function.name: function.parameters for function in functions}
    if isinstance(choice, NamedTool) or mode == "required":
        name = choice.function.name if isinstance(choice, NamedTool) else None
        structured = forced(style, schemas, special, name=name, parallel=parallel and name is None)
        held = held if name is None else [list(schemas).index(name)]
    elif form is not None and (form.source[0] != "json" or style == "llama3"):  # calls and answer must differ from their first character on
        why = "no JSON" if style != "llama3" else "given: this model's format of calls is JSON too"
        raise refused("tools", f"must be left out, or come with another tool_choice than 'auto', where the answer's form is {why}")
    elif form is not None or not parallel or len(held) < len(tools) or any(function.strict for function in functions):
        kept = {function.name: function.parameters if function.strict else None for function in functions}
        structured = offered(style, kept, special, parallel=parallel, form=form.source[1] if form is not None else None)
    return Calling(style, schemas, structured, held, any(word in special for word in WORDS[style]))


def _allowed(choice: AllowedToolChoice, names: Sequence[str]) -> list[int]:
    """The places of the tools that may be called. Raises InvalidRequestError where one was not given."""
    allowed = {tool.function.name for tool in choice.allowed_tools.tools}
    if not allowed <= set(names):
        raise InvalidRequestError("tool_choice", min(allowed - set(names)), f"of the tools given ({', '.join(names)})")
    return [i for i, name in enumerate(names) if name in allowed]


def with_calls(params: SamplingParams, calling: Calling | None) -> SamplingParams:
    """The params of a request with tools: held to calls where it must be, and decoded with the words that calls are told by."""
    if calling is None:
        return params
    return replace(params, structured=calling.structured, skip_special_tokens=params.skip_special_tokens and not calling.in_special)


@contextlib.contextmanager
def naming_tools(calling: Calling | None, parameters: str) -> Iterator[None]:
    """Inside, where a request is submitted, a grammar of calls that cannot be is told as the tool's, or as the answer's, whose schema it is in.

    `parameters` says where a tool has its schema, such as "function.parameters".
    """
    try:
        yield
    except InvalidRequestError as error:
        if calling is None or calling.structured is None or error.value is not calling.structured:
            raise
        found = mistake(calling.structured, error.limit)
        if found is None:
            raise InvalidRequestError("tools", error.value, error.limit) from error
        place, what = found
        if place is None:
            raise InvalidRequestError("structured", error.value, f"a form that some text has and that can be compiled ({what})") from error
        where = f"tools.{calling.held[place]}.{parameters}"
        raise InvalidRequestError(where, error.value, f"a schema that some arguments keep to and that can be compiled ({what})") from error


def message_of(calling: Calling | None, completion: Completion) -> dict[str, Any]:
    """A whole answer as OpenAI writes a message."""
    if calling is None:
        return {"role": "assistant", "content": completion.text, "refusal": None}
    parser = calling.parser()
    text, calls = gather([*parser.push(completion.text), *parser.flush()])
    message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
    if calls:
        message["tool_calls"] = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls]
    return message


def finish_reason_of(made: Completion | TokenEvent, arguments: str | None) -> str | None:
    """Why a message ended, as OpenAI says it; `arguments` are those of its last call. A call that something the caller asked for cut is none."""
    if made.finish_reason != "stop" or arguments is None:
        return made.finish_reason
    return "stop" if cuts_call(made, arguments) else "tool_calls"


def cuts_call(made: Completion | TokenEvent, arguments: str) -> bool:
    """Whether `max_tokens` or a stop string or token ended a message within its last call, of which these are the arguments."""
    try:
        arguments_of(arguments or "{")  # one of which nothing is written yet is not whole
    except ValueError:
        return made.finish_reason == "length" or made.stop_reason is not None
    return False


class StreamedMessage:
    """One choice of a stream: events in, OpenAI's deltas out. `arguments`: those of its last call so far, None where it has made none."""

    def __init__(self, calling: Calling) -> None:
        self._parser = calling.parser()
        self.arguments: str | None = None

    def deltas(self, news: TokenEvent) -> list[Delta]:
        """What is certain with this event, the last one included."""
        found = self._parser.push(news.text)
        if news.finish_reason is not None:
            found += self._parser.flush()
        for delta in found:
            if isinstance(delta, CallDelta):
                self.arguments = (self.arguments or "" if delta.name is None else "") + delta.arguments
        return found


def delta_of(found: Sequence[Delta]) -> dict[str, Any]:
    """Deltas of one event as one of OpenAI's."""
    text = "".join(delta.text for delta in found if not isinstance(delta, CallDelta))
    told: dict[str, Any] = {"content": text} if text else {}
    calls = [_call_delta(delta) for delta in found if isinstance(delta, CallDelta)]
    return told | ({"tool_calls": calls} if calls else {})


def _call_delta(delta: CallDelta) -> dict[str, Any]:
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": delta.arguments}}
