"""Grammars of the formats without JSON around a call: what they let through is what the schema allows, read as it was meant."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quire import InvalidRequestError
from quire.server.tool_grammar import forced, offered
from quire.server.tool_parser import parse
from tests.server.test_tool_formats import par, xml
from tests.server.test_tools import AS_TOKENS, allows

TEXT = {"type": "string"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"path": TEXT, "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}}, "mode": {"enum": ["r", "w+"]}},
    "required": ["path", "mode"],
    "$defs": {"line": {"type": "integer", "minimum": 1}},
}


def holds(schema: Any, *parameters: str, special: dict[str, int] | None = None) -> bool:
    written_whole, complete = allows(forced("qwen_xml", {"f": schema}, special or {}), xml(*parameters), special or {})
    assert written_whole == complete
    return complete


def value_of(schema: Any, text: str) -> Any:
    """What becomes of a value that the grammar lets through; an AssertionError if it does not."""
    tool = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    assert holds(tool, par("a", text))
    rest, (call,) = parse(xml(par("a", text)), "qwen_xml", {"f": tool})
    assert not rest
    return json.loads(call.arguments)["a"]


@pytest.mark.parametrize("special", [{}, AS_TOKENS], ids=["text", "tokens"])
def test_parameters_come_in_order_and_those_required_all(special: dict[str, int]) -> None:
    path, lines, mode = par("path", "a b\n</parameter> c".replace("\n</", " </")), par("lines", "[1, 2]"), par("mode", "w+")
    assert holds(SCHEMA, path, lines, mode, special=special)
    assert holds(SCHEMA, path, mode, special=special)
    assert holds(SCHEMA, par("path", ""), mode, special=special) and holds(SCHEMA, "<parameter=path>\n</parameter>\n", mode, special=special)
    for wrong in ((path,), (mode, path), (path, path, mode), (path, par("lines", "[0]"), mode), (path, par("lines", "1"), mode), ()):
        assert not holds(SCHEMA, *wrong, special=special), wrong
    assert not holds(SCHEMA, path, par("mode", "a"), special=special)
    assert not holds(SCHEMA, path, mode, par("other", "1"), special=special)


def test_a_free_text_ends_where_the_parser_ends_it() -> None:
    for text in ("x\n</parameter>\n", "</parameter>\nx", "\n</parameter>"):
        assert not holds({"properties": {"a": TEXT}}, par("a", text)), text
    for text in ("", "\n", "\n\n", "</parameter", "x</parameter>", "</function>\n</tool_call>", "é🦊\n <parameter=a>"):
        assert value_of(TEXT, text) == text


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer", "maximum": 20}, {"12": 12}, ["21", "x", "1.5"]),
        ({"type": "boolean"}, {"true": True}, ["True", "1"]),
        ({"type": ["integer", "null"]}, {"null": None, "3": 3}, ["None"]),
        ({"type": "object", "additionalProperties": TEXT}, {'{"b": "\\n</parameter>"}': {"b": "\n</parameter>"}}, ['{"b": 1}']),
        ({"type": "string", "minLength": 2, "maxLength": 3}, {"ab": "ab", "🦊\né": "🦊\né"}, ["a", "abcd", "a\n</parameter>"]),
        ({"anyOf": [TEXT, {"type": "null"}]}, {"null": None, "nullx": "nullx", "5": "5"}, []),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}, {"a": "a", "null": None}, ["c", "ab"]),
        ({"anyOf": [{"type": "string", "minLength": 6}, {"type": "null"}]}, {"abcdef": "abcdef", "null": None}, ["abc"]),
        ({"oneOf": [TEXT, {"type": "integer"}]}, {"5": 5, "five": "five"}, []),
        ({"type": ["string", "number"]}, {"5.5": 5.5, "five": "five"}, []),
        ({"const": "a\nb"}, {"a\nb": "a\nb"}, ["a"]),
        ({"enum": ["a", 1, None]}, {"a": "a", "1": 1, "null": None}, ["2"]),
        ({}, {"x": "x", '{"a": 1}': {"a": 1}}, []),
        ({"description": "Any."}, {"x": "x"}, []),
    ],
    ids=str,
)  # fmt: skip
def test_values(schema: Any, good: dict[str, Any], bad: list[str]) -> None:
    for text, value in good.items():
        made = value_of(schema, text)
        assert made == value and type(made) is type(value)
    for text in bad:
        assert not holds({"properties": {"a": schema}}, par("a", text)), text


def test_tools_whose_schema_names_no_property() -> None:
    for schema in (None, {}, {"type": "object"}, {"additionalProperties": TEXT}):
        assert holds(schema) and holds(schema, par("a", "1"), par("b-c", "x\ny")) and not holds(schema, par("a b", ""))
    whole = {"additionalProperties": {"type": "integer"}}
    assert holds(whole, par("a", "1")) and not holds(whole, par("a", "x"))
    assert holds({"type": "object", "properties": {}, "additionalProperties": False}) and not holds({"additionalProperties": False}, par("a", "1"))
    assert holds({"required": ["a"]}, par("a", "x")) and not holds({"required": ["a"]})


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"anyOf": [{"required": ["a"]}]}, "anyOf of f.parameters"),
        ({"minProperties": 1}, "minProperties"),
        ({"patternProperties": {"a": TEXT}}, "patternProperties"),
        ({"$ref": "#/$defs/a"}, "ref"),
        ({"type": "array"}, "type of f.parameters"),
        ({"properties": []}, "properties"),
        ({"properties": {"a>b": TEXT}}, "a>b"),
        ({"properties": {"a": {"type": "string", "pattern": "a+"}}}, "pattern of f.parameters.a"),
        ({"properties": {"a": {"type": "string", "format": "date"}}}, "format of f.parameters.a"),
        ({"properties": {"a": {"anyOf": [TEXT, {"type": "integer", "minimum": 1}]}}}, "minimum of f.parameters.a"),
        ({"properties": {"a": {"type": ["string", "integer"], "minimum": 1}}}, "minimum of f.parameters.a"),
        ({"properties": {"a": {"anyOf": [{"enum": ["a"]}, {"type": "integer"}]}}}, "schema of f.parameters.a"),
        ({"properties": {"a": {"type": "string", "anyOf": [TEXT]}}}, "type beside anyOf"),
        ({"properties": {"a": {"allOf": [TEXT]}}}, "allOf of f.parameters.a"),
        ({"properties": {"a": {"const": "x\n</parameter>"}}}, "schema of f.parameters.a"),
        ({"properties": {"a": {"type": "string", "minLength": "2"}}}, "minLength of f.parameters.a"),
        ({"properties": {"a": False}}, "schema of f.parameters.a"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "endless"),
    ],
    ids=str,
)  # fmt: skip
def test_what_no_grammar_holds_is_refused_by_name(schema: Any, word: str) -> None:
    with pytest.raises(InvalidRequestError, match="tools") as caught:
        forced("qwen_xml", {"g": None, "f": schema}, {})
    assert word in str(caught.value)
    assert forced("qwen_xml", {"g": None, "f": schema}, {}, name="g"), "only the tools that may be called count"


def test_what_the_compiler_would_not_keep_to_is_refused_by_its_tool() -> None:
    tools: dict[str, Any] = {"g": None, "f": {"properties": {"share": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}}}}
    with pytest.raises(InvalidRequestError, match="tools='exclusiveMinimum 0 of f'"):
        forced("hermes", tools, {})


@pytest.mark.parametrize("special", [{}, AS_TOKENS], ids=["text", "tokens"])
def test_a_function_without_its_tool_call_is_held_to_or_not_written(special: dict[str, int]) -> None:
    tools: Any = {"f": {"properties": {"n": {"type": "integer"}}}}
    for parallel in (False, True):
        grammar = offered("qwen_xml", tools, special, parallel=parallel)
        bare = xml(par("n", "1")).removeprefix("<tool_call>\n")
        assert allows(grammar, f"Hm. {bare}", special) == ((not special,) * 2)
        assert allows(grammar, f"Hm. {bare}".replace("1", "x"), special) == (False, False)
        assert allows(grammar, "#include <functional>", special) == (True, True)


def test_a_model_that_knows_ids_may_write_one() -> None:
    tools: Any = {"f": {"type": "object"}}
    for grammar in (forced("mistral_args", tools, AS_TOKENS), offered("mistral_args", tools, AS_TOKENS, parallel=True)):
        assert allows(grammar, "[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{}", AS_TOKENS) == (True, True)
        assert allows(grammar, "[TOOL_CALLS]f[CALL_ID]a1B2[ARGS]{}", AS_TOKENS) == (False, False)
    assert not allows(forced("mistral_args", tools, {}), "[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{}", {})[0]
    assert not allows(forced("mistral_args", tools, AS_TOKENS), "[TOOL_CALLS]f{}", AS_TOKENS)[0]


def test_white_space_in_json_has_an_end() -> None:
    """A model that is not sure what comes next would go on with it until its tokens are spent."""
    numbers, form = (
        {"type": "object", "properties": {"a": {"type": "array"}}, "required": ["a"]},
        '{"$ref": "#/$defs/a", "$defs": {"a": {"type": "array"}}}',
    )
    grammars = [
        (forced("qwen_xml", {"f": numbers}, {}), lambda space: xml(par("a", f"[{space}1]"))),
        (forced("mistral_args", {"f": numbers}, {}), lambda space: f'[TOOL_CALLS]f[ARGS]{{"a": [{space}1]}}'),
        (offered("hermes", {"f": numbers}, {}, parallel=False, form=form), lambda space: f"[{space}1]"),
    ]
    for grammar, text in grammars:
        assert allows(grammar, text(" \n" * 20), {})[1]
        assert not allows(grammar, text(" \n" * 20 + " "), {})[0]
