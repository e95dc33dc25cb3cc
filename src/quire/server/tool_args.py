"""Calls as Mistral's newer models write them: [TOOL_CALLS], a name, an id perhaps, [ARGS], and arguments as JSON."""

from __future__ import annotations

import re
from collections.abc import Callable

from quire.server.tool_formats import nameable
from quire.server.tool_found import Found, Held, begins
from quire.server.tool_json import Brackets

_OPENING = "[TOOL_CALLS]"
_ID, _ARGS = "[CALL_ID]", "[ARGS]"
_MAX_ID = 64  # no id is so long
_OWN_ID = re.compile(r"[a-zA-Z0-9]{9}")


class ArgsReader:
    """Reads them. Words that a model leaves out are not missed, as long as there is a name and a brace."""

    def __init__(self, found: Found) -> None:
        self._found, self._held = found, Held()
        self.read: Callable[[str], None] = self._read_text
        self._name, self._id, self._brackets = "", "", Brackets()
        self._words: tuple[str, ...] = ()  # of which one may come next

    @property
    def holds(self) -> bool:
        """Whether there are characters of which it is not known yet what they are."""
        return bool(self._held.text)

    def end(self) -> None:
        """No character follows: what is held is no call."""
        self._give_up()

    def _read_text(self, char: str) -> None:
        """Text, of which the beginning of an opening is held."""
        self._held.text += char
        if self._held.text == _OPENING:
            self._name = self._id = ""
            self._expect(self._read_name, _ID, _ARGS, "{")
        while not _OPENING.startswith(self._held.text):
            self._found.say(self._held.shift())

    def _read_name(self, char: str) -> None:
        if char in "[{" or self._name and char.isspace():
            if self._found.is_tool(self._name):
                self._held.next_word()
                self.read = self._read_word
                self._read_word(char)
            else:
                self._give_up(char)
            return
        self._name = self._held.add(char)
        if self._name and not (nameable("mistral_args", self._name) and self._found.begins_tool(self._name)):
            self._give_up()

    def _read_word(self, char: str) -> None:
        """Behind the name or the id: one of the words that may be there, or the brace."""
        word = self._held.add(char)
        if word == _ID:
            self._expect(self._read_id, _ARGS, "{")
        elif word == _ARGS:
            self._expect(self._read_word, "{")
        elif word == "{":
            self._found.call(self._name, "{", self._id if _OWN_ID.fullmatch(self._id) else None)
            self._held.drop()
            self._brackets, self.read = Brackets(), self._read_arguments
        elif not begins(word, self._words):
            self._give_up()

    def _read_id(self, char: str) -> None:
        if char in "[{" or self._id and char.isspace():
            self._held.next_word()
            self.read = self._read_word
            self._read_word(char)
            return
        self._id = self._held.add(char)
        if len(self._id) > _MAX_ID:
            self._give_up()

    def _read_arguments(self, char: str) -> None:
        self._brackets.follow(char)
        self._found.argue(char)
        if self._brackets.depth <= 0:
            self.read = self._read_text

    def _expect(self, read: Callable[[str], None], *words: str) -> None:
        self._held.next_word()
        self.read, self._words = read, words

    def _give_up(self, char: str = "") -> None:
        self.read = self._read_text
        self._found.give_up(self._held.drop() + char)
