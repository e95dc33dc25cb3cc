"""Grammars of Qwen3-Coder's arguments: parameters in the order of the schema, strings as free text, the rest as JSON.

A text that `tool_xml` takes for JSON must not be one that the schema forbids. So where a string may be something else too, that must be anything of
its type; and what no lexeme can say of a free text (patterns, formats) is refused by name, not passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from quire.errors import InvalidRequestError
from quire.server.tool_formats import check_names
from quire.server.tool_types import STRING, resolved, types_of
from quire.structured import spaced

END = "\n</parameter>"
# Values begin behind their tag. Text runs to the first line that begins with its end, as the parser has it.
SHARED = [r"any_text[lazy]: /\n((.|\n)*\n)?<\/parameter>/", r"NO_END: ~/(.|\n)*\n<\/parameter>(.|\n)*/", r"KEY: /[^<>\s]+/"]
_COMBINED = ("allOf", "not", "if", "then", "else", "$dynamicRef")
_OF_OBJECTS = (
    "patternProperties", "propertyNames", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies",
    "unevaluatedProperties",
)  # fmt: skip
_OF_OTHERS = (
    *_OF_OBJECTS, "properties", "required", "additionalProperties", "items", "prefixItems", "additionalItems", "contains", "minContains",
    "maxContains", "minItems", "maxItems", "uniqueItems", "unevaluatedItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "multipleOf",
)  # fmt: skip


def argument_rules(rule: str, tool: str, schema: Mapping[str, Any] | None) -> list[str]:
    """A rule of this name for all arguments of a tool, and the rules it needs beside `SHARED`.

    Where the schema names properties, only these are written, though it may allow others.

    Raises:
        InvalidRequestError: the schema says what no grammar of this format can hold.
    """
    schema = schema or {}
    where = f"{tool}.parameters"
    _refuse_any(where, schema, (*_COMBINED, *_OF_OBJECTS, "anyOf", "oneOf", "$ref", "enum", "const"))
    if schema.get("type", "object") != "object":
        raise _refused(where, "type", "object")
    properties, required = _names(schema, "properties", dict), _names(schema, "required", list)
    others = schema.get("additionalProperties", True)
    if not properties and not required:
        if others is False:
            return [f'{rule}: ""']
        return [f'{rule}: ("<parameter=" KEY ">" {rule}_any "\\n")*', *_value_rules(f"{rule}_any", where, others, schema)]
    rules, written = [], []
    for i, name in enumerate(dict.fromkeys([*properties, *map(str, required)])):
        check_names("qwen_xml", "tools", [name])
        written.append(f'({_quoted(f"<parameter={name}>")} {rule}_{i} "\\n"){"" if name in required else "?"}')
        rules += _value_rules(f"{rule}_{i}", f"{where}.{name}", properties.get(name, others), schema)
    return [f"{rule}: {' '.join(written)}", *rules]


def _value_rules(rule: str, where: str, schema: Any, root: Mapping[str, Any]) -> list[str]:
    """A rule for one value, from behind its tag to its end, and the rules it needs."""
    if schema is False:
        raise _refused(where, "schema", "one that allows a value")
    if "string" not in types_of(schema, root):
        found = resolved(schema, root)
        shared = {word: root[word] for word in ("$defs", "definitions") if word in root}
        return [f'{rule}: "\\n" %json {spaced({**shared, **found})} {_quoted(END)}']
    literals: list[str] = []
    texts: list[tuple[int, int | None]] = []  # the least and the most of characters
    others = False
    for branch in _branches(where, schema, root):
        types = types_of(branch, root)
        values = branch.get("enum", [branch["const"]] if "const" in branch else None)
        if isinstance(values, list):
            literals += [value if isinstance(value, str) else json.dumps(value) for value in values]
        elif "string" in types:
            _refuse_any(where, branch, ("pattern", "format", *(_OF_OTHERS if types != STRING else ())))
            texts.append((_length(where, branch, "minLength") or 0, _length(where, branch, "maxLength")))
        elif types == {"null"}:
            literals.append("null")
        else:
            _refuse_any(where, branch, _OF_OTHERS)
            others = True
    if (0, None) in texts:
        return [f"{rule}: any_text"]
    if others or any(END in f"\n{literal}" for literal in literals):
        raise _refused(where, "schema", "a string, or of other types, but not both, and without the end of a parameter in it")
    names, rules = [_quoted(f"\n{literal}{END}") for literal in literals], []
    for i, (least, most) in enumerate(texts):
        text = f"{rule.upper()}_{i}"
        names.append(f"{rule}_{i}t")
        rules += [f"{rule}_{i}t[lazy]: {text} {_quoted(END)}", f"{text}: /\\n(.|\\n){{{least},{'' if most is None else most}}}/ & NO_END"]
    return [f"{rule}: {' | '.join(names)}", *rules]


def _branches(where: str, schema: Any, root: Mapping[str, Any], depth: int = 16) -> list[Mapping[str, Any]]:
    """The schemas of which a value may follow any."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        return [{}]
    _refuse_any(where, schema, _COMBINED)
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            _refuse_any(where, schema, ("type", "enum", "const", "minLength", "maxLength", "pattern", "format", *_OF_OTHERS), f"beside {word}")
            if not depth:
                raise _refused(where, word, "without endless references")
            return [branch for one in schema[word] for branch in _branches(where, one, root, depth - 1)]
    return [schema]


def _names(schema: Mapping[str, Any], word: str, kind: type) -> Any:
    found = schema.get(word)
    if found is not None and not isinstance(found, kind):
        raise _refused("parameters", word, f"a {kind.__name__}")
    return found or kind()


def _length(where: str, schema: Mapping[str, Any], word: str) -> int | None:
    length = schema.get(word)
    if length is not None and (not isinstance(length, int) or length < 0):
        raise _refused(where, word, "a whole number of characters")
    return length


def _refuse_any(where: str, schema: Mapping[str, Any], words: Iterable[str], beside: str = "") -> None:
    for word in words:
        if word in schema:
            raise _refused(where, f"{word} {beside}".strip(), "left out, as no grammar of this model's format of calls can hold a model to it")


def _refused(where: str, word: str, limit: str) -> InvalidRequestError:
    return InvalidRequestError("tools", f"{word} of {where}", limit)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
