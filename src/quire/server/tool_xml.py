"""Calls as Qwen3-Coder writes them: a function in a <tool_call>, in it parameters, in these values as plain text.

A value that begins on its own line ends at a line that begins with </parameter>; one that begins behind its tag ends at the next </parameter>. The
arguments come out as JSON: strings while they are written, what must be JSON when it is whole. Models forget the <tool_call> before a function at
times, and the </function> behind it: a function's name and its first parameter, or its end, make a call.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from quire.server.tool_formats import nameable
from quire.server.tool_found import Found, Held, begins
from quire.server.tool_types import STRING, Types, json_of, property_of, types_of
from quire.server.tools import Schemas

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_STREAMED: Types = STRING | {"null"}  # of these types a value is a string as soon as it cannot be null


class XmlReader:
    """Reads them; `tools` say what JSON their arguments are."""

    def __init__(self, found: Found, tools: Schemas) -> None:
        self._found, self._tools, self._held = found, tools, Held()
        self.read: Callable[[str], None] = self._read_text
        self._name, self._num_arguments, self._called = "", 0, False
        self._value: Value | None = None

    @property
    def holds(self) -> bool:
        """Whether there are characters of which it is not known yet what they are."""
        return bool(self._held.text) or self._value is not None

    def end(self) -> None:
        """No character follows: settle what is held, or the first of it."""
        if self._value is not None:
            self._value.cut(self._held.drop())
            self._value = None
        elif self._called:  # a call without its closing is a call
            self._held.drop()
        else:
            self._give_up()

    def _read_text(self, char: str) -> None:
        """Text, of which the beginning of an opening is held."""
        self._held.text += char
        if self._held.text in (_CALL, _FUNCTION):
            self._next(self._read_function if self._held.text == _CALL else self._read_name)
        while not begins(self._held.text, (_CALL, _FUNCTION)):
            self._found.say(self._held.shift())

    def _read_function(self, char: str) -> None:
        """Behind <tool_call>."""
        word = self._held.add(char)
        if word == _FUNCTION:
            self._next(self._read_name)
        elif not _FUNCTION.startswith(word):
            self._give_up()

    def _read_name(self, char: str) -> None:
        word = self._held.add(char)
        if char == ">" and self._found.is_tool(word[:-1]):
            self._name, self._num_arguments = word[:-1], 0
            self._next(self._read_inside)
        elif not nameable("qwen_xml", word) or not self._found.begins_tool(word):
            self._give_up()

    def _read_inside(self, char: str) -> None:
        """In a function, between parameters."""
        word = self._held.add(char)
        if word == _PARAMETER:
            self._next(self._read_key)
        elif word in (_FUNCTION_END, _CALL_END) and (self._called or word == _FUNCTION_END):
            self._argue("}")
            self._held.drop()
            self.read = self._read_tail if word == _FUNCTION_END else self._read_text
            self._called = word == _FUNCTION_END
        elif not begins(word, (_PARAMETER, _FUNCTION_END, _CALL_END)):
            self._give_up()

    def _read_key(self, char: str) -> None:
        word = self._held.add(char)
        if char == ">" and word != ">":
            key = word[:-1]
            self._argue(f"{', ' if self._num_arguments else ''}{json.dumps(key, ensure_ascii=False)}: ")
            self._num_arguments += 1
            self._held.drop()
            schema = self._tools.get(self._name)
            self._value = Value(self._found, types_of(property_of(schema, key), schema))
            self.read = self._read_value
        elif not nameable("qwen_xml", word):
            self._give_up()

    def _read_value(self, char: str) -> None:
        value = self._value
        assert value is not None
        if value.add(char, self._held):
            self._value = None
            self.read = self._read_inside

    def _read_tail(self, char: str) -> None:
        """Behind </function>."""
        word = self._held.add(char)
        if word == _CALL_END:
            self._held.drop()
            self.read, self._called = self._read_text, False
        elif not _CALL_END.startswith(word):
            self.read, self._called = self._read_text, False
            self._found.put_back(self._held.drop())

    def _argue(self, text: str) -> None:
        """Arguments, and with the first of them the call itself."""
        if self._called:
            self._found.argue(text)
        else:
            self._found.call(self._name, "{" + text)
            self._called = True

    def _next(self, read: Callable[[str], None]) -> None:
        self._held.next_word()
        self.read = read

    def _give_up(self) -> None:
        """What is held is of no call, or of none any more."""
        self.read = self._read_text
        if self._called:
            self._argue("}")
            self._called = False
        self._found.give_up(self._held.drop())


class Value:
    """One argument: text comes in, JSON goes out."""

    def __init__(self, found: Found, types: Types) -> None:
        self._found, self._types = found, types
        self._ends: tuple[str, ...] = ()
        self._text: list[str] = []
        self._begun, self._lead = False, False

    def add(self, char: str, held: Held) -> bool:
        """Take a character. Returns whether the value has ended with it. What may be its end is held."""
        if not self._ends:
            self._lead = char == "\n"
            self._ends = ("\n" + _PARAMETER_END,) if self._lead else ("\n" + _PARAMETER_END, _PARAMETER_END)
        held.text += char
        if held.text in self._ends:
            held.drop()
            self._found.argue('"' if self._begun else json_of("".join(self._text), self._types))
            return True
        while not begins(held.text, self._ends):
            self._take(held.shift())
        return False

    def cut(self, rest: str) -> None:
        """It was cut: its JSON remains open, as far as it was written."""
        for char in rest:
            self._take(char)
        text = "".join(self._text)
        if not self._begun and text:
            self._found.argue('"' + _inside(text) if "string" in self._types else text)

    def _take(self, char: str) -> None:
        if self._lead:  # the line's end behind the tag is not of the value
            self._lead = False
            return
        if self._begun:
            self._found.argue(_inside(char))
            return
        self._text.append(char)
        if self._types <= _STREAMED:
            text = "".join(self._text)
            self._begun = "null" not in self._types or not "null".startswith(text.strip())
            if self._begun:
                self._found.argue('"' + _inside(text))


def _inside(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
