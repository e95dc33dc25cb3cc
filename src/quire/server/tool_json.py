"""Calls that are JSON objects: Hermes's and Qwen's, Llama 3's, and Mistral's older ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from quire.server.tool_formats import Shape
from quire.server.tool_found import Found

_JSON = frozenset('{}[]:,"+-.0123456789eEtrufalsn \t\r\n')  # all that JSON has outside of strings
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"(\w+)"\s*:\s*\{')


class Brackets:
    """Keeps count of JSON's brackets, from behind the first of them."""

    def __init__(self) -> None:
        self.depth, self.in_string, self._escaped = 1, False, False

    def follow(self, char: str) -> None:
        """The next character."""
        if self.in_string:
            self.in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self.in_string = True
        else:
            self.depth += (char in "{[") - (char in "}]")


class JsonReader:
    """Reads calls of a shape: anywhere in a text, or only at its start."""

    def __init__(self, found: Found, shape: Shape, *, anywhere: bool) -> None:
        self._found, self._shape, self._anywhere = found, shape, anywhere
        self.read: Callable[[str], None] = self._read_text if anywhere else self._read_start
        self._held, self._head, self._brackets = "", 0, Brackets()

    @property
    def holds(self) -> bool:
        """Whether there are characters of which it is not known yet what they are."""
        return bool(self._held)

    def end(self) -> None:
        """No character follows: settle what is held, or the first of it."""
        if self.read == self._read_tail:  # a call without its closing is a call
            self._held = ""
        else:
            self._give_up()

    def _read_text(self, char: str) -> None:
        """Text, of which the beginning of an opening is held."""
        self._held += char
        opening = self._shape.opening[0]
        if self._held == opening:
            self.read = self._read_opening
        while self._held and not opening.startswith(self._held):
            self._found.say(self._held[0])
            self._held = self._held[1:]

    def _read_plain(self, char: str) -> None:
        self._found.say(char)

    def _read_start(self, char: str) -> None:
        """The start of a message that may be a call as a whole."""
        self._held += char
        text, opening = self._held.lstrip(), self._shape.opening[0]
        if text == "{":
            self._begin_head()
        elif text == opening:
            self.read = self._read_opening
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
        self.read, self._head, self._brackets = self._read_head, len(self._held) - 1, Brackets()

    def _read_head(self, char: str) -> None:
        """A call's object up to its arguments, or all of it where the name does not come first."""
        self._held += char
        brackets = self._brackets
        if not brackets.in_string and char not in _JSON:  # or a text of nothing but beginnings would be read once for each of them
            self._give_up()
            return
        brackets.follow(char)
        if char == "{" and brackets.depth == 2 and not brackets.in_string:
            match = _HEAD.fullmatch(self._held, self._head)
            name = _load(match[1]) if match else None
            if match and match[2] == self._shape.arguments and self._is_tool(name):
                self._found.call(name, "{")
                self._held, self._brackets, self.read = "", Brackets(), self._read_arguments
        elif brackets.depth <= 0:
            value = _load(self._held[self._head :])
            arguments = value.get(self._shape.arguments) if isinstance(value, dict) else None
            if isinstance(arguments, dict) and isinstance(value, dict) and self._is_tool(value.get("name")):
                self._found.call(value["name"], json.dumps(arguments, ensure_ascii=False))
                self._held, self.read = "}", self._read_tail
                self._settle_tail()
            else:
                self._give_up()

    def _read_arguments(self, char: str) -> None:
        self._brackets.follow(char)
        self._found.argue(char)
        if self._brackets.depth <= 0:
            self.read = self._read_tail

    def _read_tail(self, char: str) -> None:
        """What closes a call and, in some formats, leads to another."""
        self._held += char
        self._settle_tail()

    def _settle_tail(self) -> None:
        more = _match(self._held, self._shape.more) if self._shape.more else None
        last = _match(self._held, self._shape.last)
        if more:
            self._held, self.read = "", self._read_more
        elif last and more is None:
            self._held, self.read = "", self._after_last()
        elif more is None and last is None:
            rest = self._held
            if not self._anywhere and rest.lstrip().startswith("}"):
                rest = rest.lstrip()[1:]
            self._held, self.read = "", self._after_last()
            self._found.put_back(rest)

    def _after_last(self) -> Callable[[str], None]:
        return self._read_text if self._anywhere else self._read_plain

    def _give_up(self) -> None:
        held, self._held = self._held, ""
        self.read = self._after_last()
        self._found.give_up(held)

    def _is_tool(self, name: object) -> TypeGuard[str]:
        return isinstance(name, str) and self._found.is_tool(name)


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
