"""The items of a response: a message, and calls of functions beside it. They grow as text comes, and say so in typed events."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterator
from typing import Any

from quire.outputs import Completion, TokenEvent
from quire.server.calling import Calling, cuts_call
from quire.server.schema_chat import FunctionCall, Message, ToolCall
from quire.server.token_texts import Offsets
from quire.server.tools import CallDelta, Delta, TextDelta

Body = dict[str, Any]
Event = tuple[str, Body]  # its type, and its fields


class Items:
    """The items of one response, in the order in which they began. At most the last one is open. `offsets`: where its tokens begin in its text."""

    def __init__(self, calling: Calling | None, offsets: Offsets) -> None:
        self._parser, self._offsets = calling.parser() if calling is not None else None, offsets
        self._coming: deque[tuple[int, Body]] = deque()  # tokens with logprobs whose text has not come yet, and where it begins
        self._at = 0  # characters that have come
        self._held: list[Body] = []  # logprobs of tokens whose text has not come out yet
        self._open = False
        self.items: list[Body] = []

    def push(self, made: Completion | TokenEvent, logprobs: list[Body]) -> list[Event]:
        """Take text, the last of it with a finish reason, and the logprobs of its tokens. Returns what is to be said of it."""
        events: list[Event] = []
        for text, begun in self._pieces(made, logprobs):
            self._held += begun
            events += self._told(self._parser.push(text) if self._parser is not None else [TextDelta(text)] if text else [])
        if made.finish_reason is not None and self._parser is not None:
            events += self._told(self._parser.flush())
        if made.finish_reason is not None:
            if not self.items:
                events += self._begin(_message())
            if self._open:
                events += self._end("incomplete" if self._is_cut(made) else "completed")
        return events

    def message(self) -> Message:
        """What was said, as a later turn of the chat has it."""
        calls = [
            ToolCall(id=item["call_id"], function=FunctionCall(name=item["name"], arguments=item["arguments"]))
            for item in self.items
            if item["type"] == "function_call"
        ]
        text = "".join(part["text"] for item in self.items if item["type"] == "message" for part in item["content"])
        return Message(role="assistant", content=text or None if calls else text, tool_calls=calls or None)

    def _pieces(self, made: Completion | TokenEvent, logprobs: list[Body]) -> Iterator[tuple[str, list[Body]]]:
        """The text, each piece with the logprobs of the tokens that begin at it. Cut where tokens do: those of a call are no message's."""
        if self._parser is None or not (logprobs or self._coming):
            yield made.text, logprobs
            return
        self._coming += [(self._offsets.next(token_id), told) for token_id, told in zip(made.token_ids, logprobs, strict=True)]
        text, end, begun = made.text, self._at + len(made.text), list[Body]()
        while self._coming and (self._coming[0][0] < end or made.finish_reason is not None):
            begin, told = self._coming.popleft()
            if begin > self._at:
                cut = min(begin, end) - self._at
                yield text[:cut], begun
                text, begun, self._at = text[cut:], [], self._at + cut
            begun.append(told)
        yield text, begun
        self._at = end

    def _told(self, deltas: list[Delta]) -> list[Event]:
        return [event for delta in deltas for event in (self._call(delta) if isinstance(delta, CallDelta) else self._text(delta.text))]

    def _text(self, text: str) -> list[Event]:
        events = [] if self._open and self.items[-1]["type"] == "message" else self._begin(_message())
        (part,) = self.items[-1]["content"]
        part["text"] += text
        part["logprobs"] += self._held
        said, self._held = self._held, []
        return [*events, ("response.output_text.delta", self._place(0) | {"delta": text, "logprobs": said})]

    def _call(self, delta: CallDelta) -> list[Event]:
        events: list[Event] = []
        self._held = []  # of tokens that are no text
        if delta.name is not None:
            call_id, item_id = delta.id, f"fc_{uuid.uuid4().hex}"
            events += self._begin({"id": item_id, "type": "function_call", "call_id": call_id, "name": delta.name, "arguments": ""})
        self.items[-1]["arguments"] += delta.arguments
        return [*events, ("response.function_call_arguments.delta", self._place() | {"delta": delta.arguments})]

    def _is_cut(self, made: Completion | TokenEvent) -> bool:
        last = self.items[-1]
        return made.finish_reason == "length" or (last["type"] == "function_call" and cuts_call(made, last["arguments"]))

    def _begin(self, item: Body) -> list[Event]:
        events = self._end("completed") if self._open else []
        self._open = True
        self.items.append(item | {"status": "in_progress"})
        events.append(("response.output_item.added", {"output_index": len(self.items) - 1, "item": item | {"status": "in_progress", **_empty(item)}}))
        if item["type"] == "message":
            events.append(("response.content_part.added", self._place(0) | {"part": _part()}))
        return events

    def _end(self, status: str) -> list[Event]:
        item, self._open = self.items[-1], False
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            part["logprobs"] += self._held
            self._held = []
            events = [
                ("response.output_text.done", self._place(0) | {"text": part["text"], "logprobs": part["logprobs"]}),
                ("response.content_part.done", self._place(0) | {"part": part}),
            ]
        else:
            events = [("response.function_call_arguments.done", self._place() | {"name": item["name"], "arguments": item["arguments"]})]
        return [*events, ("response.output_item.done", {"output_index": len(self.items) - 1, "item": item})]

    def _place(self, content_index: int | None = None) -> Body:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return place if content_index is None else place | {"content_index": content_index}


def _message() -> Body:
    return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "content": [_part()]}


def _part() -> Body:
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _empty(item: Body) -> Body:
    return {"content": []} if item["type"] == "message" else {}
