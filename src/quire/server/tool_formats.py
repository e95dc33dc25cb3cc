"""The formats in which models write tool calls, and which of them a chat template teaches.

    hermes        any text, and in it   <tool_call>{"name": "f", "arguments": {...}}</tool_call>        (Qwen, Hermes)
    llama3        at the very start     {"name": "f", "parameters": {...}}                              (several with `;`; `<|python_tag|>` before it)
    mistral       any text, then        [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]
    mistral_args  any text, then        [TOOL_CALLS]f[ARGS]{...}                                        (Small 3.2, Magistral, Devstral, Ministral 3)
    qwen_xml      any text, and in it   <tool_call><function=f><parameter=x>...</parameter></function></tool_call>       (Qwen3-Coder, Qwen3.5)

In `mistral_args` every call has its own [TOOL_CALLS], and some models put [CALL_ID] and an id before [ARGS]. In `qwen_xml` a value is a plain text,
or JSON where the tool's schema does not ask for a string.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple
from uuid import uuid4

from quire.errors import InvalidRequestError

Format = Literal["hermes", "llama3", "mistral", "mistral_args", "qwen_xml"]


class Shape(NamedTuple):
    """How calls that are JSON objects are written: before the first, after each with another to follow or without, and the name of its arguments."""

    opening: tuple[str, ...]
    more: tuple[str, ...] | None
    last: tuple[str, ...]
    arguments: str


SHAPES: dict[Format, Shape] = {
    "hermes": Shape(("<tool_call>",), None, ("}", "</tool_call>"), "arguments"),
    "llama3": Shape(("<|python_tag|>",), ("}", ";"), ("}",), "parameters"),
    "mistral": Shape(("[TOOL_CALLS]", "["), ("}", ","), ("}", "]"), "arguments"),
}
# What a tokenizer may have as special tokens, the one that begins a call first.
WORDS: dict[Format, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral_args": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "qwen_xml": ("<tool_call>", "</tool_call>"),
}
KNOWN = "Hermes's and Qwen's <tool_call> with JSON, Qwen3-Coder's with <function=...>, Llama 3's and Mistral's two"
# What a name cannot have in it where it is no string of JSON.
UNNAMEABLE: dict[Format, str] = {"mistral_args": "[{", "qwen_xml": "<>"}


def detect_format(template: str | None) -> Format | None:
    """The format that a chat template teaches, None if it is none of ours."""
    if not template:
        return None
    if "<tool_call>" in template:
        if "<function=" in template and "<parameter=" in template:
            return "qwen_xml"
        return None if "<function=" in template or "<arg_key>" in template else "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral_args" if "[ARGS]" in template else "mistral"
    return "llama3" if "<|python_tag|>" in template or re.search(r'"name\\?":.*"parameters\\?":', template, re.DOTALL) else None


def nameable(style: Format, name: str) -> bool:
    """Whether the format has a way to write this name."""
    unnameable = UNNAMEABLE.get(style)
    return unnameable is None or bool(name) and not any(char.isspace() or char in unnameable for char in name)


def check_names(style: Format, field: str, names: Iterable[str]) -> None:
    """Raises InvalidRequestError where a name cannot be written in this format."""
    for name in names:
        if not nameable(style, name):
            raise InvalidRequestError(field, name, f"without white space and {' and '.join(UNNAMEABLE[style])} in this model's format of calls")


def new_call_id(style: Format) -> str:
    """The id of a new call. Mistral's templates take nothing back but 9 letters and digits."""
    return uuid4().hex[:9] if style in ("mistral", "mistral_args") else f"call_{uuid4().hex[:24]}"
