"""Grammars that hold a model to tool calls: to make them, or to make those right that it makes by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping

from quire.errors import InvalidRequestError
from quire.server.tool_formats import SHAPES, WORDS, Format
from quire.server.tool_grammar_xml import SHARED, argument_rules
from quire.server.tools import Schemas
from quire.structured import StructuredOutput

TEXT = r"TEXT: /(.|\n)*/"
TEXT_OF_NO_BRACE = r"TEXT: /\s*([^{\s](.|\n)*)?/"
TEXT_OF_NO_FUNCTION = r"TEXT: /(.|\n)*/ & ~/(.|\n)*<function=(.|\n)*/"
FUNCTION = "<function="


def forced(style: Format, tools: Schemas, special: Mapping[str, int], *, name: str | None = None, parallel: bool = False) -> StructuredOutput:
    """The grammar of a message that is a call, for `tool_choice`: of any of the tools ("required") or of the one named.

    Args:
        special: names and ids of the tokenizer's special tokens; where a format's word is one of them, it is written as that token.
        parallel: whether several calls may follow one another.

    Raises:
        InvalidRequestError: there are no tools, or none of that name, or one has a schema to which a model cannot be held in this format.
    """
    if not tools or (name is not None and name not in tools):
        raise InvalidRequestError("tool_choice", name or "required", f"one of the tools given ({', '.join(tools) or 'none'})")
    opening, chosen = _word(WORDS[style][0], special), tools if name is None else {name: tools[name]}
    if style == "qwen_xml":
        opening += f' "\\n{FUNCTION}"'
    start = _calls(style, opening, special, parallel)
    if style in ("hermes", "qwen_xml") and parallel:
        start += f' ("\\n" {start})*'
    return _grammar([f"start: {start}", *_call_rules(style, chosen, special)])


def offered(style: Format, tools: Schemas, special: Mapping[str, int], *, parallel: bool) -> StructuredOutput:
    """The grammar of a message that may be text, or hold calls, each of one of the tools and with arguments that its schema allows.

    Without `parallel` the message ends with its first call. Arguments as for `forced`.
    """
    if style == "llama3":
        return _grammar([f"start: {_calls(style, '', special, parallel)} | TEXT", TEXT_OF_NO_BRACE, *_call_rules(style, tools, special)])
    word, text = _word(WORDS[style][0], special), TEXT
    if word.startswith("<"):
        opening = f"opening: TEXT {word}"
        if style == "qwen_xml":  # its functions are calls without the word too
            opening, text = f'{opening} "\\n{FUNCTION}"', TEXT_OF_NO_FUNCTION
    else:  # the lexer takes text up to it and never beyond
        opening = f"opening[lazy]: TEXT {json.dumps(FUNCTION) if style == 'qwen_xml' else word}"
    calls = _calls(style, "opening", special, parallel)
    start = f"({calls})* TEXT" if style in ("hermes", "qwen_xml") and parallel else f"{calls} | TEXT"
    return _grammar([f"start: {start}", opening, text, *_call_rules(style, tools, special)])


def _calls(style: Format, opening: str, special: Mapping[str, int], parallel: bool) -> str:
    """A call, or the calls behind one opening, from the opening to the end."""
    if style in ("hermes", "qwen_xml"):
        before = '"\\n" ' if style == "hermes" else ""
        return f'{opening} {before}call "\\n" {_word("</tool_call>", special)}'
    if style == "mistral":
        more = '(", " call)*' if parallel else ""
        return f'{opening} "[" call {more} "]"'
    if style == "mistral_args":
        more = f"({_word('[TOOL_CALLS]', special)} call)*" if parallel else ""
        return f"{opening} call {more}"
    return 'call ("; " call)*' if parallel else "call"


def _call_rules(style: Format, tools: Schemas, special: Mapping[str, int]) -> list[str]:
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    if style == "qwen_xml":
        rules += SHARED
    for i, (tool, schema) in enumerate(tools.items()):
        arguments = f"%json {json.dumps(schema or {'type': 'object'})}"
        if style == "qwen_xml":
            rules.append(f'call_{i}: {json.dumps(f"{tool}>")} "\\n" arguments_{i} "</function>"')
            rules += argument_rules(f"arguments_{i}", tool, schema)
        elif style == "mistral_args":
            own_id = f"({_word('[CALL_ID]', special)} /[a-zA-Z0-9]{{9}}/)?" if "[CALL_ID]" in special else ""
            rules.append(f"call_{i}: {json.dumps(tool)} {own_id} {_word('[ARGS]', special)} {arguments}")
        else:
            head = f'{{"name": {json.dumps(tool)}, "{SHAPES[style].arguments}": '
            rules.append(f'call_{i}: {json.dumps(head)} {arguments} "}}"')
    return rules


def _word(word: str, special: Mapping[str, int]) -> str:
    return f"<[{special[word]}]>" if word in special else json.dumps(word)


def _grammar(rules: list[str]) -> StructuredOutput:
    return StructuredOutput(grammar="\n".join(rules))
