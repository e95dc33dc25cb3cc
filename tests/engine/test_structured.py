"""Structured output in the engine: what comes out has the form asked for, alone, in company, forked, preempted; what is refused harms nobody."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from quire import LLM, Completion, EngineDeadError, InvalidRequestError, RequestFailedError, SamplingParams, StructuredOutput
from quire.engine import masks
from quire.text.grammar import Guide
from quire.text.grammar_process import GrammarProcess
from tests.engine.conftest import Checkpoint
from tests.tensors.checkpoints import tiny_model

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["fox", "dog", 7, None]},
        "at": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": -5, "maximum": 99}},
            "required": ["x"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["kind", "at", "tags", "ok"],
    "additionalProperties": False,
}
NUMBERS = StructuredOutput(regex=r"[0-9]{2,6}(\.[0-9]{1,3})?")
LARK = StructuredOutput(grammar='start: "(" (start | WORD){0,2} ")"\nWORD: /[a-z]{1,4}/')


def fits(value: Any, schema: Any) -> bool:
    """Whether a value is valid; as much of JSON schema as the tests here use."""
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match schema.get("type"):
        case "object":
            fields = schema.get("properties", {})
            return (
                isinstance(value, dict)
                and set(schema.get("required", ())) <= set(value) <= set(fields)
                and all(fits(value[k], fields[k]) for k in value)
            )
        case "array":
            return (
                isinstance(value, list)
                and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 99)
                and all(fits(x, schema["items"]) for x in value)
            )
        case "string":
            return isinstance(value, str) and len(value) <= schema.get("maxLength", 10**6)
        case "integer" | "number" as kind:
            whole = kind == "number" or float(value).is_integer() if number else False
            return number and whole and schema.get("minimum", value) <= value <= schema.get("maximum", value)
        case kind:
            return {"boolean": isinstance(value, bool), "null": value is None}[kind]


def checked(out: Completion, structured: StructuredOutput) -> bool:
    """Whether it ended by itself, and then has the form; otherwise `max_tokens` cut it."""
    assert out.finish_reason in ("stop", "length")
    if out.finish_reason == "length":
        return False
    kind, source = structured.source
    if structured.choice is not None:
        assert out.text in structured.choice
    elif kind == "regex":
        assert re.fullmatch(source, out.text)
    elif kind == "json":
        value = json.loads(out.text)
        assert isinstance(value, dict) if structured.json_object else fits(value, json.loads(source)), out.text
    return True


@pytest.fixture(scope="module")
def llm(checkpoint: Checkpoint) -> Iterator[LLM]:
    with LLM(checkpoint("llama"), page_size=4, max_tokens_per_step=64) as llm:
        yield llm


FORMS = [StructuredOutput(json_schema=SCHEMA), NUMBERS, StructuredOutput(choice=["red", "green", "blue"]), LARK, StructuredOutput(json_object=True)]


@pytest.mark.parametrize("form", FORMS, ids=["schema", "regex", "choice", "lark", "object"])
def test_outputs_have_the_form(llm: LLM, form: StructuredOutput) -> None:
    params = [SamplingParams(max_tokens=200, temperature=t, seed=7, n=4, structured=form) for t in (0.0, 0.8, 1.5)]
    outputs = [out for output in llm.generate([[5, 6, 7]] * 3, params) for out in output.outputs]
    assert len(outputs) == 12 and sum(checked(out, form) for out in outputs) >= 3
    if form is LARK:
        for out in outputs:
            assert out.finish_reason == "length" or re.fullmatch(r"[()a-z]+", out.text) and out.text.count("(") == out.text.count(")")
    llm.check_integrity()


def test_alone_and_in_company_the_same_bits(checkpoint: Checkpoint) -> None:
    work: list[SamplingParams] = []
    for i, form in enumerate([None, *FORMS, None, NUMBERS]):
        work.append(SamplingParams(max_tokens=24, temperature=0.9 * (i % 3 > 0), seed=i, logprobs=2, n=1 + i % 2, structured=form))
    prompts = [[5, 6, 7, 8][: 1 + i % 4] for i in range(len(work))]

    def bits(llm: LLM, which: list[int]) -> list[Any]:
        outputs = llm.generate([prompts[i] for i in which], [work[i] for i in which])
        return [[(c.token_ids, c.logprobs, c.top_logprobs, c.text, c.finish_reason) for c in output.outputs] for output in outputs]

    with LLM(checkpoint("llama"), prefix_sharing=False) as llm:
        alone = [bits(llm, [i])[0] for i in range(len(work))]
    with LLM(checkpoint("llama"), page_size=4, max_tokens_per_step=7) as llm:
        assert bits(llm, list(range(len(work)))) == alone
    with LLM(checkpoint("llama"), backend="reference") as llm:
        assert [[c[0] for c in output] for output in bits(llm, list(range(len(work))))] == [[c[0] for c in output] for output in alone]
    with LLM(checkpoint("llama"), page_size=4, cache_bytes=16 * llm.info.bytes_per_token * 4) as small:
        assert bits(small, list(range(len(work)))) == alone
        assert small.stats()["num_preemptions"] > 0
        small.check_integrity()


def test_a_text_that_is_complete_stops_whatever_else_was_asked(llm: LLM) -> None:
    def run(**params: Any) -> Completion:
        return llm.generate("the quick", SamplingParams(**{"temperature": 0.0, "max_tokens": 9, **params}))[0].outputs[0]

    exact = StructuredOutput(regex="ab{3}")
    for params in ({}, {"ignore_eos": True}, {"min_tokens": 8}, {"max_tokens": 4}):
        out = run(structured=exact, **params)
        assert (out.text, out.finish_reason, out.stop_reason) == ("abbb", "stop", None)
    out = run(structured=exact, max_tokens=3)
    assert (out.text, out.finish_reason) == ("abb", "length")
    endless = StructuredOutput(regex="a+")
    assert run(structured=endless, ignore_eos=True).text == "a" * 9
    assert run(structured=endless, logit_bias={2: 1000.0}).token_ids[1:] == [2], "end-of-sequence where the text may end, no sooner"
    assert run(structured=endless, logit_bias={2: 1000.0}, min_tokens=5).token_ids[5:] == [2]
    stop = run(structured=exact).token_ids[0]
    with_stop = [run(structured=StructuredOutput(regex="ab|ca*"), stop_token_ids=[stop], seed=i, temperature=2.0) for i in range(4)]
    assert {(out.text, out.finish_reason) for out in with_stop} == {("c", "stop")}, "no stop token where the text may not end"
    out = run(structured=StructuredOutput(regex="a+b"), stop="aa", logit_bias={stop: 1000.0})
    assert (out.text, out.finish_reason, out.stop_reason) == ("", "stop", "aa")
    events = list(llm.stream("the quick", SamplingParams(temperature=0.0, structured=exact)))
    assert "".join(event.text for event in events) == "abbb" and events[-1].finish_reason == "stop"


def test_what_nothing_can_follow_ends_or_fails_alone(llm: LLM) -> None:
    form = StructuredOutput(regex="(ab*)?")
    letter = llm.generate("x", SamplingParams(structured=StructuredOutput(regex="a")))[0].outputs[0].token_ids[0]
    out = llm.generate("x", SamplingParams(structured=form, allowed_token_ids=[letter], ignore_eos=True, temperature=0.0))[0].outputs[0]
    assert (out.text, out.finish_reason) == ("a", "stop"), "complete, and no end can be drawn"
    stuck, fine = llm.generate(
        ["x", "x"],
        [SamplingParams(structured=StructuredOutput(regex="ab"), allowed_token_ids=[letter]), SamplingParams(structured=NUMBERS, max_tokens=20)],
    )
    assert isinstance(stuck.error, RequestFailedError) and "structured" in str(stuck.error)
    assert fine.error is None and checked(fine.outputs[0], NUMBERS)


def test_an_end_that_is_not_drawn_is_told_as_it_is(llm: LLM) -> None:
    """Its last character may be half of one, for all a stream can tell: only at the end is it the stop string."""
    assert llm.tokenizer is not None
    own = llm.tokenizer.convert_tokens_to_ids(["\u00ef", "\u00bf", "\u00bd"])  # bytes of U+FFFD in a ByteLevel vocabulary
    held = StructuredOutput(regex="\ufffda?")
    *_, last = llm.stream([5], SamplingParams(allowed_token_ids=own, structured=held, stop="\ufffd", ignore_eos=True))
    assert last.output is not None
    [one] = last.output.outputs
    assert (last.finish_reason, last.stop_reason) == (one.finish_reason, one.stop_reason) == ("stop", "\ufffd")


def test_a_grammar_that_is_tried_when_the_engine_is_closed(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said to be closed, not that the grammar is wrong, and no process is left behind, nor started later."""
    llm, errors = LLM(checkpoint("llama")), list[BaseException]()
    ask, asked, grammars = GrammarProcess._ask, threading.Event(), llm._built.grammars

    def slowly(*given: Any) -> str | None:
        asked.set()
        while not grammars._closed:
            time.sleep(0.01)
        return ask(*given)

    def submit() -> None:
        try:
            llm.submit([5], SamplingParams(structured=NUMBERS))
        except Exception as error:
            errors.append(error)

    monkeypatch.setattr(GrammarProcess, "_ask", slowly)
    thread = threading.Thread(target=submit)
    thread.start()
    assert asked.wait(60)
    llm.close()
    thread.join()
    submit()
    assert [type(error) for error in errors] == [EngineDeadError] * 2 and grammars._process is not None and grammars._process._process is None


def test_refusals_are_raised_before_anything_is_queued(llm: LLM) -> None:
    before = llm.stats()
    for bad in ({"regex": "(a"}, {"grammar": "start: nothing"}, {"json_schema": {"enum": []}}, {"json_schema": {"$ref": "#"}}):
        for call in (llm.generate, llm.submit, llm.stream):
            with pytest.raises(InvalidRequestError, match="structured"):
                call("the quick", SamplingParams(structured=StructuredOutput(**bad)))  # type: ignore[operator]
    with pytest.raises(InvalidRequestError, match="structured"):
        llm.generate(["fine", "bad"], [SamplingParams(), SamplingParams(structured=StructuredOutput(regex="(a"))])
    with pytest.raises(InvalidRequestError, match="structured"):
        SamplingParams(structured="json")  # type: ignore[arg-type]
    assert llm.stats() == before, "nothing ran"
    assert checked(llm.generate("the quick", SamplingParams(structured=NUMBERS, max_tokens=20))[0].outputs[0], NUMBERS)


def test_a_model_without_tokenizer_refuses() -> None:
    with LLM(tiny_model("llama")) as llm, pytest.raises(InvalidRequestError, match="structured.*without a tokenizer"):
        llm.generate([[5, 6]], SamplingParams(structured=NUMBERS))


def test_a_space_that_the_tokenizer_drops_at_a_start_is_in_the_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)} | {"▁": 259, "y": 260}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "spaced")
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    with LLM(folder) as spaced:
        assert spaced.generate([[1]], SamplingParams(structured=StructuredOutput(choice=[" y"]), max_tokens=9))[0].outputs[0].text == " y"


def test_a_mask_that_does_not_come_fails_its_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fill, slow = Guide.fill, SamplingParams(structured=StructuredOutput(regex="slow[0-9]*"), max_tokens=20)

    def stuck(guide: Guide) -> None:
        began = time.thread_time()
        while guide.early and time.thread_time() < began + 1.0:
            pass
        fill(guide)

    monkeypatch.setattr(Guide, "fill", stuck)
    monkeypatch.setattr(masks, "MASK_SECONDS", 0.2)
    late = SamplingParams(structured=slow.structured, max_tokens=20, min_tokens=1)
    good = SamplingParams(structured=NUMBERS, max_tokens=20)
    outputs = llm.generate([[5, 6]] * 5, [good, late, good, late, good])
    assert [output.error is None for output in outputs] == [True, False, True, False, True]
    assert isinstance(outputs[1].error, RequestFailedError) and "longer than" in str(outputs[1].error)
    assert all(checked(outputs[i].outputs[0], NUMBERS) for i in (0, 2, 4))
    llm.check_integrity()
    assert llm.stats()["num_held_pages"] == 0


def test_cancelled_requests_drop_their_guides(llm: LLM) -> None:
    streams = [llm.submit([5, 6], SamplingParams(structured=StructuredOutput(json_object=True), max_tokens=500, n=3)) for _ in range(6)]
    for stream in streams:
        stream.cancel()
    assert all(stream.wait() for stream in streams)
    assert llm.stats()["num_held_pages"] == 0


SCALARS = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "maxLength": 2}, {"type": "integer", "minimum": 0, "maximum": 9}]),
    st.lists(st.sampled_from(["a", "bc", 1, -2, True, None]), min_size=1, max_size=3, unique_by=repr).map(lambda values: {"enum": values}),
)


def _grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.lists(st.sampled_from(["a", "b", "long name", 'quo"te']), max_size=3, unique=True)
    objects = names.flatmap(lambda keys: st.tuples(*[inner] * len(keys)).map(lambda each: dict(zip(keys, each, strict=True)))).map(
        lambda fields: {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    )
    arrays = inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2})
    return st.one_of(objects, arrays, st.lists(inner, min_size=1, max_size=2).map(lambda each: {"anyOf": each}))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=st.recursive(SCALARS, _grown, max_leaves=5), seed=st.integers(0, 2**32))
def test_any_schema_is_met_or_cut_short(llm: LLM, schema: Any, seed: int) -> None:
    form = StructuredOutput(json_schema=schema)
    for out in llm.generate([[5, 6, 7]], SamplingParams(structured=form, max_tokens=60, seed=seed, n=2))[0].outputs:
        checked(out, form)
