"""Tool calls in text: found in every format, streamed, split anywhere, and never at the cost of text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire import InvalidRequestError, StructuredOutput
from quire.server.tool_formats import Format, detect_format
from quire.server.tool_grammar import forced, offered
from quire.server.tool_parser import ToolParser, parse
from quire.server.tools import CallDelta, TextDelta, gather

STYLES: tuple[Format, ...] = ("hermes", "llama3", "mistral", "mistral_args", "qwen_xml")
A, B = '{"city": "Oslo \\"}{ é", "days": [1, {"x": 2}]}', "{}"


def found(text: str, style: Format, tools: Any = None) -> tuple[str, list[tuple[str, str]]]:
    rest, calls = parse(text, style, tools, new_id=str)
    assert [call.id for call in calls] == [str(i) for i in range(len(calls))]
    return rest, [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize(
    ("style", "text", "rest", "calls"),
    [
        ("hermes", f'<tool_call>\n{{"name": "f", "arguments": {A}}}\n</tool_call>', "", [("f", A)]),
        ("hermes", f'Hm.<tool_call>{{"name":"f","arguments":{A}}}</tool_call>\n<tool_call>{{"name":"g","arguments":{B}}}</tool_call>.', "Hm..",
         [("f", A), ("g", B)]),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        ("hermes", "<tool_call>no</tool_call>", "<tool_call>no</tool_call>", []),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>', '<tool_call>{"name": 5, "arguments": {}}</tool_call>', []),
        ("hermes", '<tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>', "<tool_call>", [("f", "{}")]),
        ("hermes", "a < b <tool <tool_call", "a < b <tool <tool_call", []),
        ("llama3", f'{{"name": "f", "parameters": {A}}}', "", [("f", A)]),
        ("llama3", f' <|python_tag|>{{"name": "f", "parameters": {A}}}; {{"name": "g", "parameters": {B}}}', "", [("f", A), ("g", B)]),
        ("llama3", '{"name": "f", "parameters": {}} and so on', "and so on", [("f", "{}")]),
        ("llama3", 'So: {"name": "f", "parameters": {}}', 'So: {"name": "f", "parameters": {}}', []),
        ("llama3", '{"name": "Bob", "age": 5}', '{"name": "Bob", "age": 5}', []),
        ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ("mistral", f'[TOOL_CALLS] [{{"name": "f", "arguments": {A}}}, {{"name": "g", "arguments": {B}}}]', "", [("f", A), ("g", B)]),
        ("mistral", 'Text [TOOL_CALLS][{"name": "f", "arguments": {}}] more', "Textmore", [("f", "{}")]),
        ("mistral", "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
        ("mistral_args", f"[TOOL_CALLS]f[ARGS]{A}", "", [("f", A)]),
        ("mistral_args", f"Hm. [TOOL_CALLS]f[ARGS]{A}[TOOL_CALLS] g [ARGS] {B} and", "Hm.and", [("f", A), ("g", B)]),
        ("mistral_args", f"[TOOL_CALLS]f[CALL_ID]no_id[ARGS]{A}\n[TOOL_CALLS]g{B}", "", [("f", A), ("g", B)]),
        ("mistral_args", '[TOOL_CALLS]f[ARGS]{"a": "[TOOL_CALLS]f[ARGS]{', "", [("f", '{"a": "[TOOL_CALLS]f[ARGS]{')]),
        ("mistral_args", "[TOOL_CALLS]f[ARGS]", "[TOOL_CALLS]f[ARGS]", []),
        ("mistral_args", "[TOOL_CALLS]f[ARGS][CALL_ID]1{}", "[TOOL_CALLS]f[ARGS][CALL_ID]1{}", []),
        ("mistral_args", "[TOOL_CALLS]f g{}", "[TOOL_CALLS]f g{}", []),
        ("mistral_args", "[TOOL_CALLS][TOOL_CALLS]f[ARGS]{}", "[TOOL_CALLS]", [("f", "{}")]),
        ("mistral_args", '[TOOL_CALLS][{"name": "f"}]', '[TOOL_CALLS][{"name": "f"}]', []),
    ],
)  # fmt: skip
def test_calls_are_found(style: Format, text: str, rest: str, calls: list[tuple[str, str]]) -> None:
    assert found(text, style) == (rest, calls)


@pytest.mark.parametrize("style", STYLES)
def test_only_tools_that_there_are(style: Format) -> None:
    text = written(style)
    assert found(text, style, {"f": {"properties": {"n": {"type": "integer"}}}}) == ("", [("f", '{"n": 12}')])
    assert found(text, style, {"g": None, "ff": None}) == (text, [])


def test_a_call_streams_from_its_first_brace_on() -> None:
    parser = ToolParser("hermes", new_id=str)
    assert parser.push('Hm <tool_call>{"name": "f", "arguments": ') == [TextDelta("Hm")]
    assert parser.push("{") == [CallDelta(0, "{", "0", "f")]
    assert parser.push('"a": ') == [CallDelta(0, '"a": ')]
    assert parser.push("1}}</tool") == [CallDelta(0, "1}")]
    assert parser.push("_call>!") == [TextDelta("!")]
    assert parser.flush() == []


PIECES = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[", "]", ",", ";", "<|python_tag|>",
    '{"name": "f", "arguments": ', '{"name": "f", "parameters": ',
    "{", "}", '"', "\\", '{"a": [1, "}"]}', '"name"', '"arguments": ', ": ", " ", "\n", "text", "é", "<", "tool_call>",
    "f[ARGS]{", "f", "[CALL_ID]", "a1B2c3D4e", "[ARGS]", "[TOOL_CALLS]f[ARGS]{",
    "<function=f>", "<function=", "<tool_call>\n<function=f>\n", "</function>", "</function>\n</tool_call>", "<parameter=", "</parameter>",
    "\n</parameter>\n", "<parameter=s>\n", "<parameter=n>\n12", "<parameter=m>\nnul", "<parameter=any>", "null", "True",
]  # fmt: skip
PIECE_TOOLS: dict[str, Any] = {
    "f": {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "m": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
}


@given(style=st.sampled_from(STYLES), pieces=st.lists(st.sampled_from(PIECES), max_size=14), data=st.data())
def test_any_split_gives_the_same_and_only_white_space_is_lost(style: Format, pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    whole = parse(text, style, PIECE_TOOLS, new_id=str)
    parser, deltas, at = ToolParser(style, PIECE_TOOLS, new_id=str), [], 0
    while at < len(text):
        size = data.draw(st.integers(1, len(text) - at))
        deltas += parser.push(text[at : at + size])
        at += size
    assert gather([*deltas, *parser.flush()]) == whole
    rest, calls = whole
    if not calls:
        assert rest == text
    words = iter(text)
    assert all(char in words for char in rest), "text comes out in order"
    for call in calls:
        assert call.name == "f"
        if style != "qwen_xml":
            assert call.arguments in text or json.loads(call.arguments) is not None
        elif call is not calls[-1]:  # only the last one may have been cut
            assert isinstance(json.loads(call.arguments), dict)


@pytest.mark.parametrize("style", STYLES)
def test_long_text_of_openings_takes_linear_time_or_near(style: Format) -> None:
    for text in (
        "<tool_call>{", "[TOOL_CALLS][{", '<tool_call>{"', "<tool_call>[TOOL_CALLS]{", "[TOOL_CALLS]f[CALL_ID]1", "[TOOL_CALLS]f[CALL_ID]1 ",
        "<function=f>", "<tool_call><function=f><parameter=", "<function=f>\n<parameter=a",
    ):  # fmt: skip
        assert parse(text * 5000, style)[0] == text * 5000


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (None, None),
        ("{{ messages }}", None),
        ("<tool_call>\\n{'name': ...}\\n</tool_call>", "hermes"),
        ("<tool_call><function=f>", None),
        ("{{ '<seed:tool_call>\\n<function=' + name + '>\\n<parameter=' + key + '>' }}", None),
        ("{{ '<tool_call>' + name + '<arg_key>' }}", None),
        ("[AVAILABLE_TOOLS] ... [TOOL_CALLS]", "mistral"),
        ("{{ '[TOOL_CALLS] [' }}{% for call in message.tool_calls %}", "mistral"),
        ('Respond in the format {"name": function name, "parameters": dictionary}', "llama3"),
        ("<|python_tag|>", "llama3"),
    ],
)
def test_the_template_tells_the_format(template: str | None, style: Format | None) -> None:
    assert detect_format(template) == style


TOOLS: dict[str, Any] = {
    "f": {
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/n"}},
        "required": ["n"],
        "additionalProperties": False,
        "$defs": {"n": {"type": "integer"}},
    },
    'odd "name"': None,
}


CALL = '{"name": "%s", "%s": {"n": 12}}'
NO_TOKENS: dict[str, int] = {}
AS_TOKENS = {"<tool_call>": 250, "</tool_call>": 251, "[TOOL_CALLS]": 252, "[ARGS]": 253, "[CALL_ID]": 254}  # bytes that UTF-8 has not


def as_ids(text: str, special: dict[str, int]) -> list[int]:
    ids = list(text.encode())
    for word, token_id in special.items():
        at = text.find(word)
        while at >= 0:
            ids[at : at + len(word)] = [token_id] + [-1] * (len(word) - 1)
            at = text.find(word, at + 1)
    return [token_id for token_id in ids if token_id >= 0]


def written(style: Format, count: int = 1, name: str = "f") -> str:
    call = CALL % (name, "parameters" if style == "llama3" else "arguments")
    if style == "qwen_xml":
        call = f"<function={name}>\n<parameter=n>\n12\n</parameter>\n</function>"
    if style == "mistral":
        return f"[TOOL_CALLS][{', '.join([call] * count)}]"
    if style == "mistral_args":
        return f'[TOOL_CALLS]{name}[ARGS]{{"n": 12}}' * count
    return "; ".join([call] * count) if style == "llama3" else "\n".join([f"<tool_call>\n{call}\n</tool_call>"] * count)


def allows(structured: StructuredOutput, text: str, special: dict[str, int]) -> tuple[bool, bool]:
    """Whether a text may be written, to its last token, and whether it may end there."""
    llguidance = pytest.importorskip("llguidance")
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), structured.source[1], log_level=0)
    assert not matcher.get_error()
    ids = as_ids(text, special)
    written_whole = matcher.try_consume_tokens(ids) == len(ids)
    return written_whole, written_whole and matcher.is_accepting()


@pytest.mark.parametrize("special", [NO_TOKENS, AS_TOKENS], ids=["text", "tokens"])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_a_forced_call_is_a_call(style: Format, parallel: bool, special: dict[str, int]) -> None:
    text, two = written(style), written(style, 2)
    for name in (None, "f"):
        grammar = forced(style, TOOLS, special, name=name, parallel=parallel)
        assert allows(grammar, text, special) == (True, True)
        assert allows(grammar, two, special) == (parallel, parallel)
        assert allows(grammar, "Hm. " + text, special) == (False, False)
        assert allows(grammar, text.replace("12", '"12"'), special) == (False, False)
        assert allows(grammar, written(style, name="g"), special) == (False, False)
    assert found(text, style, TOOLS) == ("", [("f", '{"n": 12}')])
    assert found(two, style, TOOLS) == ("", [("f", '{"n": 12}')] * 2)


@pytest.mark.parametrize("special", [NO_TOKENS, AS_TOKENS], ids=["text", "tokens"])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_an_offered_call_is_right_if_it_is_made(style: Format, parallel: bool, special: dict[str, int]) -> None:
    grammar = offered(style, TOOLS, special, parallel=parallel)
    text, two = written(style), written(style, 2)
    assert allows(grammar, "Just <text> [for] you.\n", special) == (True, True)
    assert allows(grammar, text, special) == (True, True)
    assert allows(grammar, two, special) == (parallel, parallel)
    assert allows(grammar, text.replace("12", '"12"'), special) == (False, False)
    assert allows(grammar, written(style, name="g"), special) == (False, False)
    if style != "llama3":  # which calls at the start of a message or never
        assert allows(grammar, "Hm. " + text, special) == (True, True)
        assert found("Hm. " + text, style, TOOLS) == ("Hm.", [("f", '{"n": 12}')])
    if style in ("hermes", "qwen_xml"):
        assert allows(grammar, text + " Done.", special) == (parallel, parallel)


@pytest.mark.parametrize("special", [NO_TOKENS, AS_TOKENS], ids=["text", "tokens"])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("style", [style for style in STYLES if style != "llama3"])
def test_with_a_form_it_is_calls_alone_or_the_form(style: Format, parallel: bool, special: dict[str, int]) -> None:
    grammar = offered(style, TOOLS, special, parallel=parallel, form='{"type": "object",\n "required": ["a"]}')
    text, two = written(style), written(style, 2)
    assert allows(grammar, text, special) == (True, True) and allows(grammar, two, special) == (parallel, parallel)
    assert allows(grammar, '{"a": 1}', special) == (True, True)
    for wrong in ('{"b": 1}', "Hm. " + text, "Just text.", text + '{"a": 1}', '{"a": 1}' + text, written(style, name="g")):
        assert not allows(grammar, wrong, special)[1], wrong


@pytest.mark.parametrize(
    "schema", [{"properties": {"a": {"type": "integer"}}}, {"type": ["object", "null"]}, {"anyOf": [{}]}, {"enum": [{"a": 1}, 5]}]
)
@pytest.mark.parametrize("style", [style for style in STYLES if style != "qwen_xml"])
def test_arguments_are_an_object_whatever_the_schema_leaves_open(style: Format, schema: dict[str, Any]) -> None:
    text = written(style)
    arguments = text[text.rindex("{") : text.index("}") + 1]
    for grammar in (forced(style, {"f": schema}, {}), offered(style, {"f": schema}, {}, parallel=False)):
        assert allows(grammar, text.replace(arguments, '{"a": 1}'), {}) == (True, True)
        for wrong in ("5", "null", '"x"', "[]"):
            assert not allows(grammar, text.replace(arguments, wrong), {})[1], wrong


def test_a_tool_that_is_not_there_is_refused() -> None:
    for tools, name in (({}, None), (TOOLS, "g")):
        with pytest.raises(InvalidRequestError, match="tool_choice"):
            forced("hermes", tools, {}, name=name)
