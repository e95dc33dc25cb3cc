"""What callers may bring by mistake: refused by name, and nothing else is touched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from quire import LLM, ConfigError, EngineConfig, InvalidRequestError, SamplingParams, StructuredOutput
from tests.engine.conftest import Checkpoint

HUGE, UNTOLD = 10**400, 10**5000  # more than a float holds; more digits than Python writes
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


class Unseen:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def told(value: object) -> str:
    return value if isinstance(value, str) and value else type(value).__name__  # not every number has a repr


@pytest.fixture(scope="module")
def llm(checkpoint: Checkpoint) -> Any:
    with LLM(checkpoint("llama"), page_size=4, max_tokens_per_step=32) as llm:
        yield llm


PARAMS: list[tuple[str, Any]] = [
    *((name, value) for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty") for value in (HUGE, -HUGE, float("nan"))),
    *((name, value) for name in ("max_tokens", "top_k", "seed", "n", "logprobs") for value in (HUGE, UNTOLD, Unseen())),
    ("logit_bias", {1: HUGE}),
    ("logit_bias", {1: None}),
    ("logit_bias", {"1": 1.0}),
    ("logit_bias", 5),
    *((name, value) for name in ("stop_token_ids", "allowed_token_ids") for value in (5, [UNTOLD], np.array([1, 2]), [None])),
    ("allowed_token_ids", iter(())),
    ("stop", 5),
    ("stop", [None]),
    ("pooling", np.array([1, 2])),
    ("structured", Unseen()),
]


@pytest.mark.parametrize(("field", "value"), PARAMS, ids=told)
def test_params_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field and field in str(caught.value) and caught.value.limit


@pytest.mark.parametrize("choice", [[None], ["a", None], ["a", 5], 5])
def test_choices_are_refused_by_name(choice: Any) -> None:
    with pytest.raises(InvalidRequestError, match="structured.choice"):
        StructuredOutput(choice=choice)


@pytest.mark.parametrize(
    "field", ["dtype", "quantization", "backend", "cache_layout", "kv_codec", "page_size", "cache_bytes", "preallocate", "compile", "enforce_eager"]
)
@pytest.mark.parametrize("value", [np.array([1, 2]), UNTOLD, Unseen()], ids=told)
def test_options_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field}="):
        EngineConfig(**{field: value})


def test_options_that_contradict_each_other_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="enforce_eager=True: must be False with compile=True"):
        EngineConfig(compile=True, enforce_eager=True)


def test_a_pool_that_memory_does_not_hold_is_not_preallocated(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"preallocate=True: the pool of \d+ bytes must be at most 0 \(cache_bytes\)"):
        LLM(checkpoint("llama"), cache_bytes=2**20, preallocate=True, reserve_bytes=2**49)


def test_a_pool_that_no_system_has_is_refused_by_name(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="cache_bytes"):
        LLM(checkpoint("llama"), cache_bytes=2**50)


def test_iterators_are_read_once_and_kept() -> None:
    params = SamplingParams(stop=iter(["a", "b"]), stop_token_ids=iter([1, 2]), allowed_token_ids=iter([3]))  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids, params.allowed_token_ids) == (("a", "b"), (1, 2), (3,))


CALLS: list[tuple[str, Callable[[LLM], Any]]] = [
    *(("prompts", lambda llm, given=given: llm.generate(given)) for given in (None, 5, (i for i in ()), {"a": 1}, {1, 2})),
    ("prompts", lambda llm: llm.generate({0: 5, 1: 6})),
    *(("prompt", lambda llm, given=given: llm.submit(given)) for given in ({5: 6}, {5, 6})),
    ("prompts", lambda llm: llm.generate(llm.tokenizer("ab"))),
    *(("prompt", lambda llm, given=given: llm.generate(given)) for given in (b"ab", bytearray(b"ab"), [b"ab"], [None], [5, "a"], [[UNTOLD]])),
    ("params", lambda llm: llm.generate([5], 5)),
    ("params", lambda llm: llm.generate([5], [5])),
    *(("params", lambda llm, given=given: llm.stream([5], given)) for given in ("x", 5, {"max_tokens": 5})),
    ("pooling", lambda llm: llm.embed([5, 6, 7], pooling=None)),
    *(("request_id", lambda llm, given=given: llm.submit([5], GREEDY, request_id=given)) for given in (5, [1], "", np.array([1]))),
    *(("request_id", lambda llm, given=given: llm.cancel(given)) for given in (["x"], None, {})),
    *(("priority", lambda llm, given=given: llm.submit([5], GREEDY, priority=given)) for given in (UNTOLD, "1", None)),
    ("namespace", lambda llm: llm.submit([5], GREEDY, namespace=UNTOLD)),
    *(("ttl", lambda llm, given=given: llm.pin([5, 6, 7], ttl=given)) for given in (HUGE, UNTOLD, 0, float("nan"), float("inf"), "1")),
    *(("pin", lambda llm, given=given: llm.unpin(given)) for given in ([1], "x", None, 10**6)),
    *(("page_id", lambda llm, given=given: llm.page(given)) for given in ("x", None, 1.5, True)),
    ("cache_bytes", lambda llm: llm.resize_cache("1")),
    *(("timeout_s", lambda llm, given=given: llm.submit([5], GREEDY).wait(given)) for given in ("x", HUGE, float("nan"))),
]


@pytest.mark.parametrize(("field", "call"), CALLS, ids=told)
def test_calls_are_refused_by_name_and_touch_nothing(llm: LLM, field: str, call: Callable[[LLM], Any]) -> None:
    expected = llm.generate([5, 6, 7], GREEDY)[0].outputs
    stream = llm.submit([5, 6, 7], GREEDY)
    with pytest.raises(InvalidRequestError) as caught:
        call(llm)
    assert caught.value.field == field and caught.value.limit
    assert stream.wait(10).outputs == expected and llm.failure is None
    llm.reset_cache()  # which nobody's pages stand in the way of
    llm.check_integrity()
    assert llm.pins() == []


def test_names_that_nobody_gave_are_nobodys(llm: LLM) -> None:
    streams = [llm.submit([5, 6], GREEDY, request_id=f"request-{i}") for i in range(4)]
    assert llm.generate([[5, 6]] * 4, GREEDY)[0].error is None
    assert all(stream.wait(10).error is None for stream in streams)


@pytest.mark.parametrize("change", [{10**6: 1.0}, {-5: 1.0}, {"x": 1.0}, {7: None}, {9: 1000.0}])
def test_a_bias_changed_behind_the_engines_back_changes_no_request(llm: LLM, change: dict[Any, Any]) -> None:
    expected = llm.generate([5, 6, 7], SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logit_bias={7: 2.0}))[0].outputs
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logit_bias={7: 2.0})
    asked, go = threading.Event(), threading.Event()
    holder = threading.Thread(target=lambda: llm._worker.call(lambda: asked.set() or go.wait(10)))
    holder.start()
    assert asked.wait(10)
    stream = llm.submit([5, 6, 7], params)
    params.logit_bias.update(change)  # type: ignore[union-attr]
    go.set()
    assert stream.wait(10).outputs == expected
    holder.join(10)


@pytest.mark.parametrize("options", [{}, {"cache_layout": "stacked", "max_sequences": 8, "max_model_len": 64}])
def test_a_pinned_prompt_is_kept_whole_however_short(checkpoint: Checkpoint, options: dict[str, Any]) -> None:
    with LLM(checkpoint("llama"), **options) as llm:
        for length in (1, 9, 40):
            prompt = list(range(3, 3 + length))
            assert llm.pin(prompt).num_tokens == length
            assert llm.explain([*prompt, 99]).cached_tokens == length
