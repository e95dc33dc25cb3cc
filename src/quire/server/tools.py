"""Tool calls and text, as they are told apart in what a model has written: the parts in which they stream, and what these come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Schemas = Mapping[str, Mapping[str, Any] | None]  # of each tool's arguments; None is any object


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
    """A whole call; `arguments` is JSON text, as the model wrote it where its format has it so."""

    id: str
    name: str
    arguments: str


Delta = TextDelta | CallDelta


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
