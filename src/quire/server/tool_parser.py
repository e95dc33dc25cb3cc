"""Tool calls in generated text, found while it streams. Pure functions of text; no model, no web. What makes a model write them is tool_grammar.py.

No text is lost: what begins like a call and goes on like something else comes out as text; but white space beside a call belongs to it. From the
beginning of its arguments on a call is a call, and they stream as they are written; whether they are valid JSON the end tells (`max_tokens` may have
cut them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from quire.server.tool_args import ArgsReader
from quire.server.tool_formats import SHAPES, Format, new_call_id
from quire.server.tool_found import Found
from quire.server.tool_json import JsonReader
from quire.server.tool_xml import XmlReader
from quire.server.tools import Delta, Schemas, ToolCall, gather


class Reader(Protocol):
    """Reads one format, character by character, and tells a `Found` what it finds."""

    @property
    def holds(self) -> bool:
        """Whether there are characters of which it is not known yet what they are."""

    def read(self, char: str) -> None:
        """The next character."""

    def end(self) -> None:
        """No character follows: settle what is held, or the first of it."""


class ToolParser:
    """Splits one stream of text into text and calls. However the stream is cut into pushes, the deltas come to the same.

    Args:
        style: the format.
        tools: the tools there are; a call of any other is text. None takes every name.
        new_id: makes the id of the call of an index.
    """

    def __init__(self, style: Format, tools: Schemas | None = None, new_id: Callable[[int], str] | None = None) -> None:
        self._found = Found(tools, new_id or (lambda _: new_call_id(style)))
        self._reader = _reader(style, self._found, tools or {})

    def push(self, text: str) -> list[Delta]:
        """What is now certain."""
        todo = self._found.todo
        todo.extend(text)
        while todo:
            self._reader.read(todo.popleft())
        return self._found.take()

    def flush(self) -> list[Delta]:
        """The rest, at the end of the stream."""
        out: list[Delta] = []
        while self._reader.holds:
            self._reader.end()
            out += self.push("")
        return out + self._found.rest()


def parse(text: str, style: Format, tools: Schemas | None = None, new_id: Callable[[int], str] | None = None) -> tuple[str, list[ToolCall]]:
    """A whole message's text outside of calls, and its calls."""
    parser = ToolParser(style, tools, new_id)
    return gather([*parser.push(text), *parser.flush()])


def _reader(style: Format, found: Found, tools: Schemas) -> Reader:
    if style == "qwen_xml":
        return XmlReader(found, tools)
    return ArgsReader(found) if style == "mistral_args" else JsonReader(found, SHAPES[style], anywhere=style != "llama3")
