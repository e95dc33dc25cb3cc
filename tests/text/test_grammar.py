"""Grammars compiled against a tokenizer: masks against brute force, what is refused and how long that takes, and what is kept."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from text_tokenizers import llama_like
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from quire import InvalidRequestError, StructuredOutput
from quire.text.grammar import GrammarCompiler, Guide
from quire.text.grammar_process import GrammarProcess
from quire.text.tokenizer import TextTokenizer

pytest.importorskip("llguidance")
VOCAB = 500  # padded beyond the tokenizer's
END = 1


@pytest.fixture(scope="module")
def compiler(made: dict[str, TextTokenizer]) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(made["byte_level"], VOCAB)
    yield compiler
    compiler.close()


def allowed(guide: Guide) -> set[int]:
    guide.fill()
    assert not guide.error
    return {i for i in range(32 * len(guide.mask)) if guide.mask[i >> 5] >> (i & 31) & 1}


FORMS = {
    "regex": StructuredOutput(regex=r"(ab|[0-9]{2,}|é+)\.?"),
    "choice": StructuredOutput(choice=["the end", "the rest", "日本", 'quo"te\\', "a\nb", "</s>"]),
    "json": StructuredOutput(json_schema={"type": "object", "properties": {"x": {"enum": ["fox", 3, None]}}, "required": ["x"]}),
    "lark": StructuredOutput(grammar='start: "(" (start | NUMBER)* ")"\nNUMBER: /[0-9]+/'),
    "special": StructuredOutput(grammar='start: "a" <|im_start|> "b"?'),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_token_is_allowed_if_the_grammar_accepts_it(compiler: GrammarCompiler, made: dict[str, TextTokenizer], form: str) -> None:
    """Brute force, every token tried by itself. Where one text alone can follow, only the tokenizer's own way to write it is allowed."""
    grammar, rng = compiler.compile(FORMS[form]), random.Random(form)
    for _ in range(4):
        guide, path = grammar.start([END]), list[int]()
        while not guide.complete and len(path) < 12:
            mask = allowed(guide)
            assert (END in mask) == guide.satisfied
            for token_id in range(made["byte_level"].vocab_size):
                if token_id == END:
                    continue
                accepted = guide._matcher.validate_tokens([token_id]) == 1
                assert token_id not in mask or accepted, (form, path, token_id)
                assert token_id in mask or not accepted or len(mask) == 1, (form, path, token_id)
            assert all(i < made["byte_level"].vocab_size for i in mask), "ids without a token are forbidden"
            path.append(rng.choice(sorted(mask - {END}) or [END]))
            if path[-1] == END:
                break
            guide.accept(path[-1])


def test_ends_are_allowed_where_the_text_may_end(compiler: GrammarCompiler, made: dict[str, TextTokenizer]) -> None:
    grammar = compiler.compile(StructuredOutput(regex="a(bb)*"))
    a, b = (made["byte_level"].encode(letter)[-1] for letter in "ab")
    for ends in ([END], [], [END, 7, VOCAB - 1]):
        guide = grammar.start(ends)
        assert not allowed(guide) & set(ends)
        guide.accept(a)
        assert allowed(guide) & {END, 7, VOCAB - 1} == set(ends) and guide.satisfied and not guide.complete
        guide.early = True
        assert not allowed(guide) & set(ends), "min_tokens"
        guide.accept(b)
        assert not guide.satisfied and allowed(guide) == {b}
    done = compiler.compile(StructuredOutput(regex="ab?")).start([END])
    done.early = True
    for token_id in (a, b):
        allowed(done)
        done.accept(token_id)
    assert done.complete and done.satisfied
    assert allowed(done) == {END}, "a grammar at its end wins over min_tokens"


def test_an_end_that_the_text_may_go_on_with_is_allowed_where_the_text_may_end(compiler: GrammarCompiler, made: dict[str, TextTokenizer]) -> None:
    a, b = (made["byte_level"].encode(letter)[-1] for letter in "ab")
    guide = compiler.compile(StructuredOutput(regex="ba*|ab")).start([END, a])
    assert allowed(guide) == {b}, "a stop token is no letter in the midst of the text"
    guide.accept(b)
    assert guide.satisfied and allowed(guide) == {END, a}
    last = compiler.compile(StructuredOutput(grammar='start: "a" <|im_start|> | <|im_start|> "b"'))
    special = made["byte_level"].id_of("<|im_start|>")
    assert special is not None
    guide = last.start([END, special])
    assert allowed(guide) == {a}
    guide.accept(a)
    assert allowed(guide) == {special}, "the special token with which a grammar ends"


HOSTILE = {
    "invalid regex": StructuredOutput(regex="(a"),
    "look-around": StructuredOutput(regex="(?=a)b"),
    "nested regex": StructuredOutput(regex="(" * 5000 + "a" + ")" * 5000),
    "broken Lark": StructuredOutput(grammar="start: /a"),
    "unknown rule": StructuredOutput(grammar="start: nothing"),
    "unknown special token": StructuredOutput(grammar="start: <|nothing|>"),
    "nested Lark": StructuredOutput(grammar="start: " + "(" * 30000 + '"a"' + ")" * 30000),
    "a chain that overflows the stack": StructuredOutput(grammar="start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(5000)) + 'r5000: "a"'),
    "contradiction": StructuredOutput(json_schema={"type": "integer", "minimum": 5, "maximum": 3}),
    "false": StructuredOutput(json_schema=False),
    "endless": StructuredOutput(json_schema={"$ref": "#"}),
    "no such type": StructuredOutput(json_schema={"type": "foo"}),
    "unsupported": StructuredOutput(json_schema={"not": {"type": "string"}}),
    "elsewhere": StructuredOutput(json_schema={"$ref": "http://localhost/schema"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_and_the_next_is_compiled(compiler: GrammarCompiler, name: str) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequestError) as error:
            compiler.compile(HOSTILE[name])
        assert error.value.field == "structured" and len(str(error.value)) < 700
    compiler.compile(StructuredOutput(regex=f"a{{{len(name)}}}"))


@pytest.mark.parametrize("schema", [True, {"type": "object"}, '{"x-guidance": {"whitespace_flexible": true}}'])
def test_white_space_in_json_has_an_end(compiler: GrammarCompiler, made: dict[str, TextTokenizer], schema: Any) -> None:
    guide = compiler.compile(StructuredOutput(json_schema=schema)).start([END])
    opening, space = made["byte_level"].id_of("{"), made["byte_level"].id_of("Ġ")
    assert opening is not None and space is not None and guide._matcher.validate_tokens([opening, *[space] * 50]) == 1 + 40


def test_what_compiles_for_ever_is_given_up_in_time(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.compile(FORMS["regex"])
    process = GrammarProcess(compiler._vocab_size, [], 1.0)
    monkeypatch.setattr(compiler, "_process", process)
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(InvalidRequestError, match="longer than 1 seconds"):
        compiler.compile(StructuredOutput(json_schema={"type": "integer", "multipleOf": 99999999}))
    assert 1.0 <= resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 10.0
    compiler.compile(StructuredOutput(regex="after the bomb"))
    process.close()


def test_equal_grammars_are_compiled_once(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiler.compile(StructuredOutput(json_schema={"type": "integer"}))
    assert compiler.compile(StructuredOutput(json_schema='{"type": "integer"}')) is made
    calls: list[object] = []
    make = compiler._make
    monkeypatch.setattr(compiler, "_make", lambda asked: calls.append(asked) or make(asked))
    threads = [threading.Thread(target=compiler.compile, args=(StructuredOutput(regex="once"),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    monkeypatch.setattr("quire.text.grammar.MAX_GRAMMARS", 2)
    for i in range(4):
        compiler.compile(StructuredOutput(regex=f"kept {i}"))
    assert len(compiler._made) == 2


def test_tokenizers_of_other_kinds(made: dict[str, TextTokenizer]) -> None:
    with pytest.raises(InvalidRequestError, match="without a tokenizer"):
        GrammarCompiler(None, 10).compile(FORMS["regex"])
    slow = GrammarCompiler(made["python_bytes"], 300)
    with pytest.raises(InvalidRequestError, match="cannot read this model's tokenizer"):
        slow.compile(FORMS["regex"])
    odd = Tokenizer(models.BPE(vocab={"<0x61>": 0, "<0x100>": 1, "</s>": 2}, merges=[], byte_fallback=True))  # on which llguidance panics
    odd.decoder = decoders.ByteFallback()
    with pytest.raises(InvalidRequestError, match="cannot read this model's tokenizer"):
        GrammarCompiler(TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=odd, eos_token="</s>")), 3).compile(FORMS["regex"])
    compiler = GrammarCompiler(made["llama_like"], 310)
    guide = compiler.compile(StructuredOutput(regex="thé 日")).start([2])
    while not guide.complete:
        guide.accept(max(allowed(guide) - {2}))
    compiler.close()


def test_an_added_token_that_decodes_to_another_text_is_no_part_of_one() -> None:
    hf = llama_like()
    hf.add_tokens([AddedToken("é日", normalized=True), AddedToken("日é", normalized=False)])
    tokenizer = TextTokenizer(hf)
    spaced, plain = hf.convert_tokens_to_ids(["é日", "日é"])
    assert tokenizer.decode([plain, spaced, plain], False) == "日é é日日é"
    compiler = GrammarCompiler(tokenizer, len(hf))
    guide = compiler.compile(StructuredOutput(regex="(é日|日é)+")).start([2])
    assert {spaced, plain} & allowed(guide) == {plain}
    guide = compiler.compile(StructuredOutput(choice=["é日"])).start([2])
    text = ""
    while not guide.complete:
        token_id = max(allowed(guide) - {2})
        guide.accept(token_id)
        text += tokenizer.decode([token_id], False)
    assert text == "é日"
    compiler.close()


def test_without_llguidance_it_says_what_to_install(made: dict[str, TextTokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(InvalidRequestError, match=r"pip install 'quire\[structured\]'"):
        GrammarCompiler(made["byte_level"], VOCAB).compile(FORMS["regex"])


def test_a_process_with_more_descriptors_than_select_knows_compiles(made: dict[str, TextTokenizer]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] != resource.RLIM_INFINITY and limits[1] < 2048:
        pytest.skip("the system allows no more descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, limits[1]))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    compiler = GrammarCompiler(made["byte_level"], VOCAB)
    try:
        assert compiler.compile(StructuredOutput(regex="[ab]{3}")) is not None
    finally:
        compiler.close()
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_checking_process_ends_with_its_input(compiler: GrammarCompiler) -> None:
    compiler.compile(StructuredOutput(regex="alive"))
    assert compiler._process is not None
    process = compiler._process._process
    assert isinstance(process, subprocess.Popen) and process.stdin is not None
    process.stdin.close()
    assert process.wait(20.0) == 0
    compiler.compile(StructuredOutput(regex="alive again"))


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("structured", {}),
        ("structured", {"regex": "a", "json_object": True}),
        ("structured.json_object", {"json_object": 1}),
        ("structured.choice", {"choice": []}),
        ("structured.choice", {"choice": [""]}),
        ("structured.choice", {"choice": "yes"}),
        ("structured.choice", {"choice": [str(i) for i in range(2000)]}),
        ("structured.choice", {"choice": ["\ud800"]}),
        ("structured.regex", {"regex": ""}),
        ("structured.regex", {"regex": "a" * 2**15}),
        ("structured.regex", {"regex": 5}),
        ("structured.grammar", {"grammar": "a" * 2**18}),
        ("structured.json_schema", {"json_schema": "{"}),
        ("structured.json_schema", {"json_schema": "3"}),
        ("structured.json_schema", {"json_schema": {"minimum": float("nan")}}),
        ("structured.json_schema", {"json_schema": {"minimum": object()}}),
        ("structured.json_schema", {"json_schema": '{"items":' * 10_000 + "{}" + "}" * 10_000}),
        ("structured.json_schema", {"json_schema": '{"items":' * 65 + "{}" + "}" * 65}),
        ("structured.json_schema", {"json_schema": {"description": "a" * 2**18}}),
        # What llguidance takes and does not keep to.
        ("structured.json_schema", {"json_schema": {"items": {"const": 2**53 + 1}}}),
        ("structured.json_schema", {"json_schema": {"enum": [{"a": [10**30]}]}}),
        ("structured.json_schema", {"json_schema": {"type": "integer", "maximum": 2**53 + 3}}),
        ("structured.json_schema", {"json_schema": {"type": "integer", "minimum": 2**63}}),
        ("structured.json_schema", {"json_schema": {"type": "object", "minProperties": 2}}),
        ("structured.json_schema", {"json_schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}}),
        ("structured.json_schema", {"json_schema": {"type": "number", "minimum": -2.5, "exclusiveMaximum": -2}}),
    ],
)
def test_sizes_and_types_are_checked_when_it_is_made(field: str, given: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError) as error:
        StructuredOutput(**given)  # type: ignore[arg-type]
    assert error.value.field == field


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1, "default": 10**30},
        {"type": "integer", "maximum": 2**64 - 1, "exclusiveMinimum": 2**53},
        {"type": "object", "required": ["a"], "minProperties": 2, "properties": {"minimum": {"const": 2**60}}},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "number", "exclusiveMinimum": 0, "minimum": 0.25, "maximum": 0.5},
        {"type": "number", "exclusiveMinimum": -0.5, "maximum": 0},
    ],
)
def test_bounds_that_are_kept_to_are_taken(schema: dict[str, object]) -> None:
    assert json.loads(StructuredOutput(json_schema=schema).source[1]).items() >= schema.items()


def test_a_name_has_one_spelling(compiler: GrammarCompiler, made: dict[str, TextTokenizer]) -> None:
    def taken(schema: Any, text: str) -> bool:
        ids = [made["byte_level"].encode(char)[-1] for char in text]
        return compiler.compile(StructuredOutput(json_schema=schema)).start([END])._matcher.validate_tokens(ids) == len(ids)

    assert taken({"properties": {"a": {"type": "integer"}}}, '{"a":1,"b\\t":"x"}')
    assert not taken({"properties": {"a": {"type": "integer"}}}, '{"a":1,"\\u0061":"x"}'), "a again, with any value"
    assert not taken({"patternProperties": {"^a": {"type": "integer"}}}, '{"\\u0061":"x"}')
    assert taken({"const": "\x01"}, '"\\u0001"'), "what has no other"


def test_a_schema_may_be_as_deep_as_the_limit() -> None:
    StructuredOutput(json_schema='{"items":' * 63 + "{}" + "}" * 63)
