"""Grammars that hold a model to tool calls: to make them, or to make those right that it makes by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quire.errors import InvalidRequestError
from quire.server.tools import SHAPES, Format
from quire.structured import StructuredOutput

Schemas = Mapping[str, Mapping[str, Any] | None]  # of each tool's arguments; None is any object
TEXT = r"TEXT: /(.|\n)*/"
TEXT_OF_NO_BRACE = r"TEXT: /\s*([^{\s](.|\n)*)?/"


def forced(style: Format, tools: Schemas, special: Mapping[str, int], *, name: str | None = None, parallel: bool = False) -> StructuredOutput:
    """The grammar of a message that is a call, for `tool_choice`: of any of the tools ("required") or of the one named.

    Args:
        special: names and ids of the tokenizer's special tokens; where a format's word is one of them, it is written as that token.
        parallel: whether several calls may follow one another.

    Raises:
        InvalidRequestError: there are no tools, or none of that name.
    """
    if not tools or (name is not None and name not in tools):
        raise InvalidRequestError("tool_choice", name or "required", f"one of the tools given ({', '.join(tools) or 'none'})")
    opening, chosen = _word(SHAPES[style].opening[0], special), tools if name is None else {name: tools[name]}
    start = _calls(style, opening, special, parallel)
    if style == "hermes" and parallel:
        start += f' ("\\n" {_calls(style, opening, special, parallel)})*'
    return _grammar([f"start: {start}", *_call_rules(style, chosen)])


def offered(style: Format, tools: Schemas, special: Mapping[str, int], *, parallel: bool) -> StructuredOutput:
    """The grammar of a message that may be text, or hold calls, each of one of the tools and with arguments that its schema allows.

    Without `parallel` the message ends with its first call. Arguments as for `forced`.
    """
    if style == "llama3":
        return _grammar([f"start: {_calls(style, '', special, parallel)} | TEXT", TEXT_OF_NO_BRACE, *_call_rules(style, tools)])
    word = _word(SHAPES[style].opening[0], special)
    # Where the opening is no token of its own, the lexer takes text up to it and never beyond.
    opening = f"opening: TEXT {word}" if word.startswith("<") else f"opening[lazy]: TEXT {word}"
    calls = _calls(style, "opening", special, parallel)
    start = f"({calls})* TEXT" if style == "hermes" and parallel else f"{calls} | TEXT"
    return _grammar([f"start: {start}", opening, TEXT, *_call_rules(style, tools)])


def _calls(style: Format, opening: str, special: Mapping[str, int], parallel: bool) -> str:
    """A call, or the calls behind one opening, from the opening to the end."""
    if style == "hermes":
        return f'{opening} "\\n" call "\\n" {_word("</tool_call>", special)}'
    if style == "mistral":
        more = '(", " call)*' if parallel else ""
        return f'{opening} "[" call {more} "]"'
    return 'call ("; " call)*' if parallel else "call"


def _call_rules(style: Format, tools: Schemas) -> list[str]:
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, (tool, schema) in enumerate(tools.items()):
        head = f'{{"name": {json.dumps(tool)}, "{SHAPES[style].arguments}": '
        rules.append(f'call_{i}: {json.dumps(head)} %json {json.dumps(schema or {"type": "object"})} "}}"')
    return rules


def _word(word: str, special: Mapping[str, int]) -> str:
    return f"<[{special[word]}]>" if word in special else json.dumps(word)


def _grammar(rules: list[str]) -> StructuredOutput:
    return StructuredOutput(grammar="\n".join(rules))
