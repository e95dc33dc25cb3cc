"""Stop strings in a stream of text: where they end it, and what must be held until they are ruled out.

The match that completes first ends the text; of several that complete at the same character the longest does. Which match starts first
does not count: with the stops "bc" and "abcd", "abc" ends at "bc", because a sequence must stop as soon as a stop string is there, and
so the result is the same however the text is cut into pushes. Strings are compared by code point, case and form as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from quire.errors import InvalidRequestError


class StopResult(NamedTuple):
    """Text that is now certain to be output, and the stop string that ended it, None while none has."""

    text: str
    stop: str | None


class StopMatcher:
    """Watches the text of one sequence for its stop strings.

    Held back is the longest end of the text that begins a stop string, never more. The cost is linear in the text, whatever the stop
    strings are.

    Args:
        stops: the stop strings, possibly none.
        include_stop_in_output: leave the stop string at the end of the text instead of cutting it.

    Raises:
        InvalidRequestError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str], include_stop_in_output: bool = False) -> None:
        if "" in stops:
            raise InvalidRequestError("stop", "", "a string that is not empty, or several")
        self._automaton = _automaton(tuple(stops)) if stops else None
        self._include = include_stop_in_output
        self._node = 0
        self._stop: str | None = None

    def push(self, text: str, *, may_stop: bool = True) -> StopResult:
        """Takes the next text and returns what is now certain, with the stop string that ended it, if one did.

        After a match every push returns no text and the same stop string.

        Args:
            may_stop: False while fewer than `min_tokens` tokens were generated. A stop string that completes in this push is then
                ordinary text, and none of it counts towards a later match. One that began here and completes in a later push counts.
        """
        automaton = self._automaton
        if automaton is None:
            return StopResult(text, None)
        if self._stop is not None:
            return StopResult("", self._stop)
        node, held_node = self._node, self._node
        children, fail, longest_stop = automaton.children, automaton.fail, automaton.longest_stop
        for index, char in enumerate(text):
            while node and char not in children[node]:
                node = fail[node]
            node = children[node].get(char, 0)
            stop = longest_stop[node]
            if stop is None:
                continue
            if not may_stop:
                node = 0
                continue
            self._stop, self._node = stop, 0
            num_certain = automaton.depth[held_node] + index + 1 - (0 if self._include else len(stop))
            return StopResult(automaton.join(held_node, text, num_certain), stop)
        self._node = node
        num_certain = automaton.depth[held_node] + len(text) - automaton.depth[node]
        return StopResult(automaton.join(held_node, text, num_certain), None)

    def flush(self) -> str:
        """Returns the text still held when the sequence ends without a stop string; '' after a match."""
        node, self._node = self._node, 0
        return "" if self._automaton is None else self._automaton.join(node, "", self._automaton.depth[node])


class _Automaton:
    """Aho-Corasick: a node is the longest end of the text that begins a stop string, node 0 the empty one.

    A node's text is `spelled_by[node][: depth[node]]`, so that held text needs no copy of its own.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.spelled_by = [""]
        self.longest_stop: list[str | None] = [None]  # that the node's text ends with
        for stop in stops:
            node = 0
            for depth, char in enumerate(stop, start=1):
                child = self.children[node].get(char)
                if child is None:
                    child = len(self.depth)
                    self.children[node][char] = child
                    self.children.append({})
                    self.depth.append(depth)
                    self.spelled_by.append(stop)
                    self.longest_stop.append(None)
                node = child
            self.longest_stop[node] = stop
        self.fail = [0] * len(self.depth)  # the longest node that is a proper end of the node
        queue = list(self.children[0].values())
        for node in queue:  # breadth first: shorter nodes are done before longer ones look at them
            for char, child in self.children[node].items():
                queue.append(child)
                other = self.fail[node]
                while other and char not in self.children[other]:
                    other = self.fail[other]
                self.fail[child] = self.children[other].get(char, 0)
                if self.longest_stop[child] is None:
                    self.longest_stop[child] = self.longest_stop[self.fail[child]]

    def join(self, held_node: int, text: str, num_chars: int) -> str:
        """The first `num_chars` characters of the held text followed by `text`."""
        num_held = self.depth[held_node]
        return self.spelled_by[held_node][: min(num_held, num_chars)] + text[: max(0, num_chars - num_held)]


@lru_cache(maxsize=32)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    """One automaton for all sequences of a request, and for all requests with the same stop strings: it never changes once built."""
    return _Automaton(stops)
