"""Tool calls in generated text, found while it streams. Pure functions of text; no model, no web. What makes a model write them is tool_grammar.py.

Three formats, by what the chat template teaches the model to write:

    hermes    any text, and in it   <tool_call>{"name": "f", "arguments": {...}}</tool_call>      (Qwen, Hermes)
    llama3    at the very start     {"name": "f", "parameters": {...}}                            (several with `;`; `<|python_tag|>` before it)
    mistral   any text, then        [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]

No text is lost: what begins like a call and goes on like something else comes out as text; but white space beside a call belongs to it. From the
first brace of its arguments on a call is a call, and its arguments stream as they are written; whether they are valid JSON the end tells
(`max_tokens` may have cut them).
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeGuard
from uuid import uuid4

Format = Literal["hermes", "llama3", "mistral"]


class Shape(NamedTuple):
    """How a format is written: before the first call, after each one with another to follow or without, and the name of its arguments."""

    opening: tuple[str, ...]
    more: tuple[str, ...] | None
    last: tuple[str, ...]
    arguments: str


SHAPES: dict[Format, Shape] = {
    "hermes": Shape(("<tool_call>",), None, ("}", "</tool_call>"), "arguments"),
    "llama3": Shape(("<|python_tag|>",), ("}", ";"), ("}",), "parameters"),
    "mistral": Shape(("[TOOL_CALLS]", "["), ("}", ","), ("}", "]"), "arguments"),
}
_JSON = frozenset('{}[]:,"+-.0123456789eEtrufalsn \t\r\n')  # all that JSON has outside of strings
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"(\w+)"\s*:\s*\{')


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of the `index`-th call, as OpenAI streams it: `id` and `name` come with the first part alone, `arguments` are fragments of JSON."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call; `arguments` is the JSON text that the model wrote."""

    id: str
    name: str
    arguments: str


Delta = TextDelta | CallDelta


def detect_format(template: str | None) -> Format | None:
    """The format that a chat template teaches, None if it is none of ours."""
    if not template:
        return None
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else "hermes"
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else "mistral"
    return "llama3" if "<|python_tag|>" in template or re.search(r'"name\\?":.*"parameters\\?":', template, re.DOTALL) else None


class ToolParser:
    """Splits one stream of text into text and calls. However the stream is cut into pushes, the deltas come to the same.

    Args:
        style: the format.
        names: the tools there are; a call of any other is text. None takes every name.
        new_id: makes the id of the call of an index.
    """

    def __init__(self, style: Format, names: Collection[str] | None = None, new_id: Callable[[int], str] | None = None) -> None:
        self._style, self._shape, self._names = style, SHAPES[style], names
        self._new_id = new_id or (lambda _: f"call_{uuid4().hex[:24]}")
        self._read: Callable[[str], None] = self._read_start if style == "llama3" else self._read_text
        self._held, self._num_calls = "", 0
        self._depth, self._in_string, self._escaped = 0, False, False
        self._out: list[Delta] = []
        self._todo: deque[str] = deque()
        self._white, self._after_call = "", False  # white space that may be beside a call; whether a call came last

    def push(self, text: str) -> list[Delta]:
        """What is now certain."""
        self._todo.extend(text)
        while self._todo:
            self._read(self._todo.popleft())
        out, self._out = self._out, []
        return [trimmed for delta in out if (trimmed := self._trimmed(delta))]

    def flush(self) -> list[Delta]:
        """The rest, at the end of the stream."""
        out: list[Delta] = []
        while self._held:
            if self._read == self._read_tail:  # a call without its closing is a call
                self._held = ""
                break
            self._give_up()
            out += self.push("")
        if self._white and not self._num_calls:  # a message without calls is left as it is
            out.append(TextDelta(self._white))
        return out

    def _trimmed(self, delta: Delta) -> Delta | None:
        """The delta without white space beside calls; what may yet turn out to be that is held."""
        if isinstance(delta, CallDelta):
            self._white, self._after_call = "", True
            return delta
        text = self._white + delta.text
        if self._after_call:
            text = text.lstrip()
        said = text.rstrip()
        self._white = text[len(said) :]
        if not said:
            return None
        self._after_call = False
        return TextDelta(said)

    def _read_text(self, char: str) -> None:
        """Text, of which the beginning of an opening is held."""
        self._held += char
        opening = self._shape.opening[0]
        if self._held == opening:
            self._read = self._read_opening
        while self._held and not opening.startswith(self._held):
            self._say(self._held[0])
            self._held = self._held[1:]

    def _read_plain(self, char: str) -> None:
        self._say(char)

    def _read_start(self, char: str) -> None:
        """The start of a message that may be a call as a whole."""
        self._held += char
        text, opening = self._held.lstrip(), self._shape.opening[0]
        if text == "{":
            self._begin_head()
        elif text == opening:
            self._read = self._read_opening
        elif not opening.startswith(text):
            self._give_up()

    def _read_opening(self, char: str) -> None:
        """Behind an opening's first word: the rest of it, and a brace."""
        self._held += char
        found = _match(self._held.lstrip(), (*self._shape.opening, "{"))
        if found is True:
            self._begin_head()
        elif found is None:
            self._give_up()

    def _read_more(self, char: str) -> None:
        """Behind a separator: a brace."""
        self._held += char
        if char == "{":
            self._begin_head()
        elif not char.isspace():
            self._give_up()

    def _begin_head(self) -> None:
        self._read, self._head = self._read_head, len(self._held) - 1
        self._depth, self._in_string, self._escaped = 1, False, False

    def _read_head(self, char: str) -> None:
        """A call's object up to its arguments, or all of it where the name does not come first."""
        self._held += char
        if not self._in_string and char not in _JSON:  # or a text of nothing but beginnings would be read once for each of them
            self._give_up()
            return
        self._follow(char)
        if char == "{" and self._depth == 2 and not self._in_string:
            match = _HEAD.fullmatch(self._held, self._head)
            name = _load(match[1]) if match else None
            if match and match[2] == self._shape.arguments and self._is_tool(name):
                self._call(name, "{")
                self._held, self._depth, self._read = "", 1, self._read_arguments
        elif self._depth <= 0:
            value = _load(self._held[self._head :])
            arguments = value.get(self._shape.arguments) if isinstance(value, dict) else None
            if isinstance(arguments, dict) and isinstance(value, dict) and self._is_tool(value.get("name")):
                self._call(value["name"], json.dumps(arguments, ensure_ascii=False))
                self._held, self._read = "}", self._read_tail
                self._settle_tail()
            else:
                self._give_up()

    def _read_arguments(self, char: str) -> None:
        self._follow(char)
        last = self._out[-1] if self._out else None
        if isinstance(last, CallDelta):
            self._out[-1] = CallDelta(last.index, last.arguments + char, last.id, last.name)
        else:
            self._out.append(CallDelta(self._num_calls - 1, char))
        if self._depth <= 0:
            self._read = self._read_tail

    def _read_tail(self, char: str) -> None:
        """What closes a call and, in some formats, leads to another."""
        self._held += char
        self._settle_tail()

    def _settle_tail(self) -> None:
        more = _match(self._held, self._shape.more) if self._shape.more else None
        last = _match(self._held, self._shape.last)
        if more:
            self._held, self._read = "", self._read_more
        elif last and more is None:
            self._held, self._read = "", self._after_last()
        elif more is None and last is None:
            rest = self._held
            if self._style == "llama3" and rest.lstrip().startswith("}"):
                rest = rest.lstrip()[1:]
            self._held, self._read = "", self._after_last()
            self._todo.extendleft(reversed(rest))

    def _after_last(self) -> Callable[[str], None]:
        return self._read_plain if self._style == "llama3" else self._read_text

    def _give_up(self) -> None:
        """What is held is no call: its first character is text, and what follows may be anything."""
        held, self._held = self._held, ""
        self._read = self._after_last()
        self._say(held[0])
        self._todo.extendleft(reversed(held[1:]))

    def _follow(self, char: str) -> None:
        """Keep count of JSON's brackets."""
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        else:
            self._depth += (char in "{[") - (char in "}]")

    def _is_tool(self, name: object) -> TypeGuard[str]:
        return isinstance(name, str) and bool(name) and (self._names is None or name in self._names)

    def _call(self, name: str, arguments: str) -> None:
        self._out.append(CallDelta(self._num_calls, arguments, self._new_id(self._num_calls), name))
        self._num_calls += 1

    def _say(self, text: str) -> None:
        if self._out and isinstance(self._out[-1], TextDelta):
            self._out[-1] = TextDelta(self._out[-1].text + text)
        else:
            self._out.append(TextDelta(text))


def parse(text: str, style: Format, names: Collection[str] | None = None, new_id: Callable[[int], str] | None = None) -> tuple[str, list[ToolCall]]:
    """A whole message's text outside of calls, and its calls."""
    parser = ToolParser(style, names, new_id)
    return gather([*parser.push(text), *parser.flush()])


def gather(deltas: Sequence[Delta]) -> tuple[str, list[ToolCall]]:
    """What deltas come to together."""
    calls: list[ToolCall] = []
    for delta in deltas:
        if isinstance(delta, CallDelta) and delta.name is not None:
            calls.append(ToolCall(delta.id or "", delta.name, delta.arguments))
        elif isinstance(delta, CallDelta):
            last = calls[delta.index]
            calls[delta.index] = ToolCall(last.id, last.name, last.arguments + delta.arguments)
    return "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)), calls


def _match(text: str, words: Sequence[str]) -> bool | None:
    """Whether text is exactly these words with white space before any: True, None if it is not and cannot become it, False while it may."""
    for word in words:
        text = text.lstrip()
        if not text.startswith(word):
            return False if word.startswith(text) else None
        text = text[len(word) :]
    return None if text else True


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
