"""Grammars that hold a model to tool calls: to make them, or to make those right that it makes by itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from quire.errors import InvalidRequestError
from quire.server.tool_formats import SHAPES, WORDS, Format
from quire.server.tool_grammar_xml import SHARED, argument_rules
from quire.server.tools import Schemas
from quire.structured import StructuredOutput, spaced

TEXT = r"TEXT: /(.|\n)*/"
TEXT_OF_NO_BRACE = r"TEXT: /\s*([^{\s](.|\n)*)?/"
TEXT_OF_NO_FUNCTION = r"TEXT: /(.|\n)*/ & ~/(.|\n)*<function=(.|\n)*/"
FUNCTION = "<function="
ANSWER = "answer"
# Where the compiler finds a mistake, what it says, and the lines of the grammar that it shows behind that.
_MISTAKE = re.compile(r"\bat (\d+)\(\d+\): (.+?)(?= \d+ \| |$)")
_RULE_OF_TOOL = re.compile(r"(?:call|arguments)_(\d+)")


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
    chosen = tools if name is None else {name: tools[name]}
    return _grammar([f"start: {_only_calls(style, special, parallel)}", *_call_rules(style, chosen, special)])


def offered(style: Format, tools: Schemas, special: Mapping[str, int], *, parallel: bool, form: str | None = None) -> StructuredOutput:
    """The grammar of a message that may be text, or hold calls, each of one of the tools and with arguments that its schema allows.

    Without `parallel` the message ends with its first call. With a `form`, which is a JSON schema as text, it is calls and nothing else, or has that;
    the format must not be one whose calls begin as JSON does. Arguments as for `forced`.
    """
    if form is not None:
        start, answer = _only_calls(style, special, parallel), f"{ANSWER}: %json {spaced(json.loads(form))}"
        return _grammar([f"start: {start} | {ANSWER}", answer, *_call_rules(style, tools, special)])
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


def mistake(structured: StructuredOutput, message: str) -> tuple[int | None, str] | None:
    """In which tool's rules, None for the answer's, a compiler's message about one of these grammars finds a mistake, and what it says of it.

    None where it names no place, or one that is nobody's. The number is the tool's place among those that the grammar was made of.
    """
    found = _MISTAKE.search(message)
    lines = (structured.grammar or "").split("\n")
    if found is None or not 0 < int(found[1]) <= len(lines):
        return None
    rule = lines[int(found[1]) - 1]
    tool = _RULE_OF_TOOL.match(rule)
    return (int(tool[1]), found[2]) if tool is not None else (None, found[2]) if rule.startswith(f"{ANSWER}:") else None


def _only_calls(style: Format, special: Mapping[str, int], parallel: bool) -> str:
    """A message that is a call, or several one behind another."""
    opening = _word(WORDS[style][0], special)
    if style == "qwen_xml":
        opening += f' "\\n{FUNCTION}"'
    calls = _calls(style, opening, special, parallel)
    return f'{calls} ("\\n" {calls})*' if style in ("hermes", "qwen_xml") and parallel else calls


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
        try:
            arguments = f"%json {spaced(_of_an_object(schema or {}))}"
        except InvalidRequestError as error:
            raise InvalidRequestError("tools", f"{error.value} of {tool}", error.limit) from None
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


def _of_an_object(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema, for objects alone: where it leaves the type open a model could write a number, which no parser takes for arguments."""
    if schema.get("type", "object") == "object":
        return {**schema, "type": "object"}
    also = schema.get("allOf")
    return {**schema, "type": "object", "allOf": [*(also if isinstance(also, list) else ()), {"type": schema["type"]}]}


def _word(word: str, special: Mapping[str, int]) -> str:
    return f"<[{special[word]}]>" if word in special else json.dumps(word)


def _grammar(rules: list[str]) -> StructuredOutput:
    return StructuredOutput(grammar="\n".join(rules))
