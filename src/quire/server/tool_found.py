"""What the readers of all formats share: characters to read, and text and calls that were found in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace

from quire.server.tools import CallDelta, Delta, Schemas, TextDelta


class Found:
    """Takes text and calls from a reader, in order, and gives them out as deltas, without the white space beside calls.

    Attributes:
        todo: characters that are yet to be read.
        num_calls: how many calls have begun.

    Args:
        tools: the tools there are; a call of any other is text. None takes every name.
        new_id: makes the id of the call of an index.
    """

    def __init__(self, tools: Schemas | None, new_id: Callable[[int], str]) -> None:
        self.todo: deque[str] = deque()
        self.num_calls = 0
        self._tools, self._new_id = tools, new_id
        self._ids: set[str] = set()
        self._out: list[tuple[Delta, list[str]]] = []  # deltas, and the pieces of their text
        self._white, self._after_call = "", False  # white space that may be beside a call; whether a call came last

    def is_tool(self, name: str) -> bool:
        """Whether there is a tool of this name."""
        return bool(name) and (self._tools is None or name in self._tools)

    def begins_tool(self, text: str) -> bool:
        """Whether a tool's name may begin like this."""
        return self._tools is None or any(name.startswith(text) for name in self._tools)

    def say(self, text: str) -> None:
        """Text was found."""
        if not self._out or not isinstance(self._out[-1][0], TextDelta):
            self._out.append((TextDelta(""), []))
        self._out[-1][1].append(text)

    def call(self, name: str, arguments: str, own_id: str | None = None) -> None:
        """A call begins, with the first of its arguments. `own_id` is the model's for it, and counts if no other call has it."""
        call_id = own_id if own_id is not None and own_id not in self._ids else self._new_id(self.num_calls)
        self._ids.add(call_id)
        self._out.append((CallDelta(self.num_calls, "", call_id, name), [arguments]))
        self.num_calls += 1

    def argue(self, text: str) -> None:
        """The last call's arguments go on."""
        if not self._out or not isinstance(self._out[-1][0], CallDelta):
            self._out.append((CallDelta(self.num_calls - 1, ""), []))
        self._out[-1][1].append(text)

    def put_back(self, text: str) -> None:
        """This is to be read once more."""
        self.todo.extendleft(reversed(text))

    def give_up(self, held: str) -> None:
        """What was held is no call: its first character is text, and what follows may be anything."""
        self.say(held[0])
        self.put_back(held[1:])

    def take(self) -> list[Delta]:
        """What has become certain since the last time."""
        out, self._out = self._out, []
        return [trimmed for delta, pieces in out if (trimmed := self._trimmed(delta, "".join(pieces)))]

    def rest(self) -> list[Delta]:
        """At the very end: a message without calls is left as it is."""
        return [TextDelta(self._white)] if self._white and not self.num_calls else []

    def _trimmed(self, delta: Delta, text: str) -> Delta | None:
        """The delta with its text, but without white space beside calls; what may yet turn out to be that is held."""
        if isinstance(delta, CallDelta):
            self._white, self._after_call = "", True
            return replace(delta, arguments=text)
        text = self._white + text
        if self._after_call:
            text = text.lstrip()
        said = text.rstrip()
        self._white = text[len(said) :]
        if not said:
            return None
        self._after_call = False
        return TextDelta(said)


class Held:
    """Characters that were read and may yet be a call's or text. The last of them, from `at` on, are the word that is being read."""

    def __init__(self) -> None:
        self.text, self.at = "", 0

    def add(self, char: str) -> str:
        """Take a character. Returns the word so far; white space before a word is not of it."""
        if self.at == len(self.text) and char.isspace():
            self.at += 1
        self.text += char
        return self.text[self.at :]

    def next_word(self) -> None:
        """The word has ended."""
        self.at = len(self.text)

    def drop(self) -> str:
        """Hold nothing any more. Returns what was held."""
        held, self.text, self.at = self.text, "", 0
        return held

    def shift(self) -> str:
        """Hold the first character no more. Returns it. For text that is one word."""
        first, self.text = self.text[0], self.text[1:]
        return first


def begins(text: str, words: Collection[str]) -> bool:
    """Whether any of the words begins like this."""
    return any(word.startswith(text) for word in words)
