"""The two formats without JSON around a call: what is written comes back, whatever it is and wherever it is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire import InvalidRequestError
from quire.server.tool_formats import Format, check_names, detect_format
from quire.server.tool_parser import ToolParser, parse
from quire.server.tools import CallDelta, Delta, Schemas, TextDelta, gather
from tests.server.test_templates import template

# As the models' own templates write earlier calls, cut to that.
QWEN = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
        {%- for name, value in call.function.arguments | items %}
            {{- '<parameter=' + name + '>\\n' }}
            {{- value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}
            {{- '\\n</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}"""
MISTRAL = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}{{- message.content or '' }}{%- else %}{{- '[INST]' + message.content + '[/INST]' }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '[TOOL_CALLS]' + call.function.name }}
        {%- if CHECKED %}
            {%- if call.id | length != 9 %}{{- raise_exception('ids have a length of 9') }}{%- endif %}
            {{- '[CALL_ID]' + call.id }}
        {%- endif %}
        {{- '[ARGS]' + call.function.arguments | tojson }}
    {%- endfor %}
{%- endfor %}"""
MISTRAL_SMALL, DEVSTRAL = MISTRAL.replace("CHECKED", "true"), MISTRAL.replace("CHECKED", "false")
END = "\n</parameter>"
WORDS = [
    "</parameter>",
    "<parameter=s>",
    "</function>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]{",
    "\n",
    " ",
    '"',
    "\\",
    "null",
    "True",
    "12",
    "é🦊",
    "<",
]
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=5).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=3,
)
KINDS: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "text": ({"type": "string"}, TEXTS),
    "number": ({"type": "number"}, st.floats(allow_nan=False, allow_infinity=False) | st.integers()),
    "count": ({"$ref": "#/$defs/count"}, st.integers()),
    "flag": ({"type": ["boolean", "null"]}, st.booleans() | st.none()),
    "list": ({"type": "array"}, st.lists(JSON, max_size=2)),
    "object": ({"allOf": [{"type": "object"}]}, st.dictionaries(TEXTS, JSON, max_size=2)),
    "maybe": ({"anyOf": [{"type": "string"}, {"type": "null"}]}, st.none() | TEXTS.filter(lambda text: text.strip() != "null")),
    "choice": ({"enum": ["a", "b c\nd"]}, st.sampled_from(["a", "b c\nd"])),
    "either": ({"oneOf": [{"const": 5}, {"type": "array"}]}, st.just(5) | st.lists(JSON, max_size=2)),
}
SCHEMA = {"type": "object", "properties": {name: schema for name, (schema, _) in KINDS.items()}, "$defs": {"count": {"type": "integer"}}}
TOOLS: Schemas = {"f": SCHEMA, "get.more-x": SCHEMA}
CALLS = st.lists(
    st.tuples(st.sampled_from(list(TOOLS)), st.fixed_dictionaries({}, optional={name: values for name, (_, values) in KINDS.items()})),
    min_size=1,
    max_size=3,
)


UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def as_written(style: Format, calls: list[tuple[str, dict[str, Any]]]) -> str:
    if style == "mistral_args":
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments, ensure_ascii=False)}" for name, arguments in calls)
    blocks = []
    for name, arguments in calls:
        values = [(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for key, value in arguments.items()]
        parameters = "".join(f"<parameter={key}>\n{value}{END}\n" for key, value in values)
        blocks.append(f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
    return "\n".join(blocks)


def in_pieces(text: str, style: Format, tools: Schemas | None, cuts: list[int]) -> list[list[Delta]]:
    parser, edges = ToolParser(style, tools, new_id=str), sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [*(parser.push(text[start:end]) for start, end in zip(edges, edges[1:], strict=False)), parser.flush()]


def found(text: str, tools: Schemas | None = TOOLS) -> tuple[str, list[tuple[str, str]]]:
    rest, calls = parse(text, "qwen_xml", tools)
    return rest, [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("style", ["mistral_args", "qwen_xml"])
@UNHURRIED
@given(calls=CALLS, cuts=st.lists(st.integers(0, 10_000), max_size=12))
def test_calls_come_back_as_they_were_written(style: Format, calls: list[tuple[str, dict[str, Any]]], cuts: list[int]) -> None:
    if style == "qwen_xml":  # all texts but those with the end of a value in them, which nothing escapes
        calls = [(n, {k: v for k, v in a.items() if not isinstance(v, str) or END not in f"\n{v}"}) for n, a in calls]
    text = as_written(style, calls)
    rest, made = gather([delta for deltas in in_pieces(text, style, TOOLS, cuts) for delta in deltas])
    assert (rest, [(call.name, json.loads(call.arguments)) for call in made]) == ("", calls)
    assert gather(ToolParser(style, TOOLS, new_id=str).push(text)) == ("", made)


@pytest.mark.parametrize("style", ["mistral_args", "qwen_xml"])
@UNHURRIED
@given(calls=CALLS, cut=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 10_000), max_size=8))
def test_what_was_cut_is_the_beginning_of_what_was_not(style: Format, calls: list[tuple[str, dict[str, Any]]], cut: int, cuts: list[int]) -> None:
    calls = [(n, {k: v for k, v in a.items() if k == "text" and END not in f"\n{v}"}) for n, a in calls]
    text = as_written(style, calls)
    text, whole = text[: cut % (len(text) + 1)], parse(text, style, TOOLS, new_id=str)[1]
    rest, made = gather([delta for deltas in in_pieces(text, style, TOOLS, cuts) for delta in deltas])
    assert (rest, made) == parse(text, style, TOOLS, new_id=str)
    if made:
        *before, last = made
        assert before == whole[: len(before)] and last.name == whole[len(before)].name
        if style == "mistral_args":
            assert whole[len(before)].arguments.startswith(last.arguments)
        else:  # what may be the end of a value is text where nothing follows
            assert whole[len(before)].arguments.startswith(last.arguments.removesuffix(_end_of_value(last.arguments)))
    assert made or rest == text


def _end_of_value(arguments: str) -> str:
    escaped = json.dumps(END)[1:-1]
    return next((escaped[:size] for size in range(len(escaped), 1, -1) if arguments.endswith(escaped[:size])), "")


@pytest.mark.parametrize(
    ("source", "style"), [(QWEN, "qwen_xml"), (MISTRAL_SMALL, "mistral_args"), (DEVSTRAL, "mistral_args")], ids=["qwen", "mistral-small", "devstral"]
)
def test_what_a_template_writes_is_read(source: str, style: Format) -> None:
    assert detect_format(source) == style
    assert detect_format(source.replace("'", '"')) == style
    arguments = {"text": 'a "b"\n\\c', "count": -3, "flag": True, "list": [1, {"x": None}], "maybe": None, "either": 5}
    if style == "qwen_xml":
        del arguments["maybe"]  # of which this template makes the word None
    calls = [{"id": i * 9, "type": "function", "function": {"name": name, "arguments": arguments}} for i, name in zip("ab", TOOLS, strict=True)]
    made = template(source)
    said = {"role": "assistant", "content": "Let me see.", "tool_calls": calls}
    prompt, text = made.render([{"role": "user", "content": "Hm?"}]), made.render([{"role": "user", "content": "Hm?"}, said])
    text = text.removeprefix(prompt).removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")
    rest, found_calls = parse(text, style, TOOLS)
    assert (rest, [(call.name, json.loads(call.arguments)) for call in found_calls]) == ("Let me see.", [(name, arguments) for name in TOOLS])
    if source == MISTRAL_SMALL:
        assert [call.id for call in found_calls] == ["a" * 9, "b" * 9]
    again = [call | {"id": one.id} for call, one in zip(calls, found_calls, strict=True)]
    assert made.render([said | {"tool_calls": again}])
    made.close()


def test_ids_of_the_model_count_once() -> None:
    text = "[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{}" * 2 + "[TOOL_CALLS]f[CALL_ID]longer_than_9[ARGS]{}[TOOL_CALLS]f[ARGS]{}"
    ids = [call.id for call in parse(text, "mistral_args")[1]]
    assert ids[0] == "a1B2c3D4e" and len(set(ids)) == 4 and all(len(one) == 9 and one.isalnum() for one in ids)


def xml(*parameters: str, name: str = "f") -> str:
    return f"<tool_call>\n<function={name}>\n{''.join(parameters)}</function>\n</tool_call>"


def par(name: str, text: str) -> str:
    return f"<parameter={name}>\n{text}\n</parameter>\n"


@pytest.mark.parametrize(
    ("text", "rest", "calls"),
    [
        (xml(), "", ["{}"]),
        (f"Hm.\n{xml(par('text', 'a'), par('count', '1'))}\n\n{xml()} So.", "Hm.So.", ['{"text": "a", "count": 1}', "{}"]),
        ("<function=f>\n<parameter=text>\na\n</parameter>\n</function>\n</tool_call>", "", ['{"text": "a"}']),
        (f"#include <functional>\n{xml()[len('<tool_call>') :]}", "#include <functional>", ["{}"]),
        ("<tool_call>\n<function=f>\n</function>\n<function=f></function></tool_call>", "", ["{}", "{}"]),
        (f"<tool_call><function=f>{par('text', 'a')}</tool_call>x", "x", ['{"text": "a"}']),
        ("<tool_call><function=f><parameter=text> a b </parameter><parameter=count> 7 </parameter></function></tool_call>", "",
         ['{"text": " a b ", "count": 7}']),
        (xml("<parameter=text>\n</parameter>", par("maybe", "")), "", ['{"text": "", "maybe": ""}']),
        (xml(par("text", "</parameter>\n <parameter=count>")), "", ['{"text": "", "count": ""}']),
        (xml(par("text", "a</parameter>\n <parameter=count>")), "", ['{"text": "a</parameter>\\n <parameter=count>"}']),
        (xml(par("count", "many"), par("flag", "1"), par("number", "NaN")), "", ['{"count": "many", "flag": "1", "number": "NaN"}']),
        (xml(par("flag", "True"), par("flag", "None"), par("count", "2.0")), "", ['{"flag": true, "flag": null, "count": 2.0}']),
        (xml(par("count", "1.5"), par("list", "{}"), par("object", '{"a":\n[1]}')), "", ['{"count": "1.5", "list": "{}", "object": {"a":\n[1]}}']),
        (xml(par("maybe", "null"), par("maybe", "nullable"), par("maybe", '"x"')), "", ['{"maybe": null, "maybe": "nullable", "maybe": "\\"x\\""}']),
        (xml(par("other", "12"), par("other", "[12]"), par("other", '"x"')), "", ['{"other": "12", "other": [12], "other": "\\"x\\""}']),
        (f"<tool_call><function=f>{par('text', 'a')}so it is</function>", "so it is</function>", ['{"text": "a"}']),
        (f"<tool_call><function=f>{par('text', 'a')}<parameter=no<", "<parameter=no<", ['{"text": "a"}']),
        ("<tool_call>\n<function=f>\nsay</function>", "<tool_call>\n<function=f>\nsay</function>", []),
        ("<tool_call>\n<function=f>\n<parameter=", "<tool_call>\n<function=f>\n<parameter=", []),
        ("<tool_call>\n<function=f>\n</tool_call>", "<tool_call>\n<function=f>\n</tool_call>", []),
        (xml(name="ff"), xml(name="ff"), []),
        ("<tool_call><tool_call><function=f></function>", "<tool_call>", ["{}"]),
        ("<tool_call><function=f><parameter=text>\nab\n</par", "", ['{"text": "ab\\n</par']),
        ("<tool_call><function=f><parameter=list>\n[1, 2", "", ['{"list": [1, 2']),
        (f"<tool_call><function=f>{par('text', 'a')}<param", "", ['{"text": "a"']),
    ],
)  # fmt: skip
def test_corners_of_the_xml(text: str, rest: str, calls: list[str]) -> None:
    assert found(text) == (rest, [("f", arguments) for arguments in calls])


def test_values_without_a_schema_are_text_unless_they_are_brackets() -> None:
    text = xml(par("a", "12"), par("b", "[12]"), par("c", "true"))
    for tools in (None, {"f": None}, {"f": {"type": "object", "properties": {"a": {"description": "It."}, "b": {"type": "any"}}}}):
        assert found(text, tools) == ("", [("f", '{"a": "12", "b": [12], "c": "true"}')])
    assert found(text, {"f": {"additionalProperties": {"type": ["integer", "boolean"]}}}) == ("", [("f", '{"a": 12, "b": "[12]", "c": true}')])


def test_references_without_end_are_no_types() -> None:
    loop: Any = {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}
    deep: Any = {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}
    for schema in (loop, deep, {"properties": {"a": {"$ref": "other.json"}}}, {"properties": 5}):
        assert found(xml(par("a", "x")), {"f": schema}) == ("", [("f", '{"a": "x"}')])


def test_strings_stream_and_the_rest_comes_when_it_is_whole() -> None:
    parser = ToolParser("qwen_xml", TOOLS, new_id=str)
    assert parser.push("Hm <tool_call>\n<function=f>\n<parameter=text") == [TextDelta("Hm")]
    assert parser.push(">\n") == [CallDelta(0, '{"text": ', "0", "f")]
    assert parser.push('a "\n') == [CallDelta(0, '"a \\"')]
    assert parser.push("b\n</") == [CallDelta(0, "\\nb")]
    assert parser.push("parameter>\n<parameter=count>\n1") == [CallDelta(0, '", "count": ')]
    assert parser.push("2\n</parameter>") == [CallDelta(0, "12")]
    assert parser.push("\n</function>") == [CallDelta(0, "}")]
    assert parser.push("\n</tool_call>!") == [TextDelta("!")]
    assert parser.flush() == []
    parser = ToolParser("mistral_args", TOOLS, new_id=str)
    assert parser.push("Hm [TOOL_CALLS]f[CALL_ID]") == [TextDelta("Hm")]
    assert parser.push('a1B2c3D4e[ARGS]{"a') == [CallDelta(0, '{"a', "a1B2c3D4e", "f")]
    assert parser.push('": 1}[TOOL') == [CallDelta(0, '": 1}')]
    assert parser.flush() == [TextDelta("[TOOL")]


@pytest.mark.parametrize(("style", "name"), [("mistral_args", "a[b"), ("mistral_args", "a b"), ("qwen_xml", "a>"), ("qwen_xml", "a\n")])
def test_names_that_cannot_be_written_are_refused(style: Format, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="tools"):
        check_names(style, "tools", ["fine", name])
    check_names("hermes", "tools", [name])
