"""Forks, namespaces, pins, explanations and a smaller pool, through the public API."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.errors import InvalidRequestError
from quire.outputs import RequestOutput
from quire.text.tokenizer import TextTokenizer
from tests.engine.conftest import Checkpoint
from tests.tensors.test_device import taken
from tests.text.text_tokenizers import PythonBytes

PROMPT = [5 + (i * i * 7 + 3 * i) % 180 for i in range(37)]
DRAWN = SamplingParams(max_tokens=12, temperature=1.0, seed=40, logprobs=0, ignore_eos=True)


def bits(output: RequestOutput) -> list[tuple[list[int], list[float]]]:
    return [(one.token_ids, one.logprobs or []) for one in output.outputs]


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_n_branches_are_n_requests(checkpoint: Checkpoint, family: str, sharing: bool) -> None:
    with LLM(checkpoint(family), page_size=4, max_tokens_per_step=9, prefix_sharing=sharing) as llm:
        (together,) = llm.generate(PROMPT, dataclasses.replace(DRAWN, n=5))
        computed = llm.stats()["num_computed_tokens"]
        llm.check_integrity()
    with LLM(checkpoint(family), prefix_sharing=False) as llm:
        apart = [llm.generate(PROMPT, dataclasses.replace(DRAWN, seed=40 + i))[0] for i in range(5)]
    assert bits(together) == [bits(one)[0] for one in apart]
    assert len({one.token_ids[0] for one in together.outputs}) > 1
    assert computed <= len(PROMPT) + 5 * 11 + (0 if family == "llama" else 5 * 8)  # where layers differ in geometry, parts of pages are computed


def test_the_best_of_several_by_their_logprobs(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama")) as llm:
        (many,) = llm.generate(PROMPT, dataclasses.replace(DRAWN, n=6))
        (best,) = llm.generate(PROMPT, dataclasses.replace(DRAWN, n=2, best_of=6, logprobs=None))
        with pytest.raises(InvalidRequestError, match="best_of=6: must be None when streaming"):
            llm.stream(PROMPT, dataclasses.replace(DRAWN, best_of=6))
        events = list(llm.submit(PROMPT, dataclasses.replace(DRAWN, n=2, best_of=6)))
    with pytest.raises(InvalidRequestError, match="best_of=1: must be an integer from 2"):
        SamplingParams(n=2, best_of=1)
    ranked = sorted(many.outputs, key=lambda one: -sum(one.logprobs or []))
    assert [one.token_ids for one in best.outputs] == [one.token_ids for one in ranked[:2]]
    assert [one.index for one in best.outputs] == [0, 1] and best.outputs[0].logprobs is None
    assert best.outputs[0].cumulative_logprob == pytest.approx(sum(ranked[0].logprobs or []))
    assert len(events) == 1 and events[0].output is not None and events[0].output.outputs[0].token_ids == ranked[0].token_ids
    assert (events[0].index, events[0].text, events[0].token_ids) == (0, ranked[0].text, ranked[0].token_ids)


@pytest.mark.parametrize("max_sequences", [1, 8])
@pytest.mark.parametrize("own", [{"prefix_sharing": False}, {"prompt_logprobs": 0}])
def test_sisters_apart_from_others_compute_their_prompt_once(checkpoint: Checkpoint, own: dict[str, Any], max_sequences: int) -> None:
    """Though one ends before the others start: at its first token, or as there is no room for two. What they shared is forgotten with the last."""
    options = {name: value for name, value in own.items() if name == "prefix_sharing"}
    with LLM(checkpoint("llama"), page_size=4, max_sequences=max_sequences, **options) as llm:
        all_long = dataclasses.replace(DRAWN, n=3, prompt_logprobs=own.get("prompt_logprobs"))
        first = llm.generate(PROMPT, dataclasses.replace(all_long, n=1))[0].outputs[0].token_ids[0]
        for params in (all_long, dataclasses.replace(all_long, stop_token_ids=[first])):
            before = llm.stats()["num_computed_tokens"]
            (output,) = llm.generate(PROMPT, params)
            drawn = sum(len(one.token_ids) for one in output.outputs)
            assert llm.stats()["num_computed_tokens"] - before == output.receipt.computed_tokens <= len(PROMPT) + drawn
            llm.check_integrity()
        assert output.outputs[0].token_ids == [first] and len(output.outputs[1].token_ids) == DRAWN.max_tokens
        assert llm.stats()["num_cached_pages"] == 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_sisters_count_the_pages_they_share_once(checkpoint: Checkpoint, family: str) -> None:
    with LLM(checkpoint(family), page_size=4) as llm:
        params = dataclasses.replace(DRAWN, n=5, max_tokens=9)
        stream = llm.submit(PROMPT * 2, params)
        alone = llm.generate(PROMPT * 2, dataclasses.replace(params, n=1), namespace="b")[0].receipt.peak_cache_bytes
        together = stream.wait().receipt.peak_cache_bytes
        assert alone < together <= alone + 5 * len(llm.info.groups) * (9 // 4 + 2) * llm.info.page_bytes
    with LLM(checkpoint(family), page_size=4, cache_bytes=alone + llm.info.page_bytes * len(llm.info.groups) * 3) as llm:
        receipt = llm.generate(PROMPT * 2, params)[0].receipt
        assert receipt.num_preemptions and receipt.peak_cache_bytes <= llm.info.cache_bytes


def test_sisters_end_together_when_cancelled_early(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), max_tokens_per_step=4) as llm:
        stream = llm.submit(PROMPT * 3, dataclasses.replace(DRAWN, n=3))
        stream.cancel()
        output = stream.wait(30)
        assert [one.finish_reason for one in output.outputs] == ["cancelled"] * 3
        llm.check_integrity()
        assert llm.stats()["num_held_pages"] == 0


def test_namespaces_and_what_they_share(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), page_size=4) as llm:

        def cached(namespace: str | None, prompt: list[int] = PROMPT) -> int:
            return llm.generate(prompt, DRAWN, namespace=namespace)[0].receipt.cached_tokens

        assert (cached("a"), cached("b"), cached(None)) == (0, 0, 0)
        assert cached("a") == cached("b") == cached(None) == cached("") == len(PROMPT) - 1
        system = [9, 8, 7] * 5
        assert llm.share(system) == 12
        assert (cached("a", system + PROMPT), cached("b", system + PROMPT), cached("b", system + PROMPT)) == (0, 12, len(system + PROMPT) - 1)
        for wrong in (5, "x" * 257, "\ud800"):
            with pytest.raises(InvalidRequestError, match="namespace="):
                llm.submit(PROMPT, namespace=wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="priority="):
            llm.submit(PROMPT, priority=1.5)  # type: ignore[arg-type]


def test_receipts_say_what_was_missed_and_explain_foresees_it(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), page_size=4) as llm:
        (first,) = llm.generate(PROMPT, DRAWN)
        assert (first.receipt.miss_index, first.receipt.miss_reason) == (0, "never seen")
        other = [*PROMPT[:22], 4, *PROMPT[23:]]
        told = llm.explain(other)
        (second,) = llm.generate(other, DRAWN)
        assert told.cached_tokens == told.miss_index == second.receipt.cached_tokens == second.receipt.miss_index == 22
        assert told.miss_text == second.receipt.miss_text == llm.tokenizer.decode([4])
        assert told.reason == second.receipt.miss_reason == "never seen"
        (third,) = llm.generate(PROMPT, DRAWN)
        assert third.receipt.miss_index is third.receipt.miss_reason is third.receipt.miss_text is None
        assert llm.explain(PROMPT, namespace="b").reason == "other namespace"
        assert third.receipt.staged_tokens == third.receipt.computed_tokens == 1 + 11 and third.receipt.rejected_tokens == 0


def test_a_receipt_says_what_it_waited_for(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), max_sequences=1) as llm:
        outputs = llm.generate([PROMPT, PROMPT[::-1]], DRAWN)
        assert [output.receipt.waited_for for output in outputs] == [None, "sequences"]
        assert outputs[1].receipt.queued_s > outputs[0].receipt.queued_s


def test_nothing_is_kept_for_others_where_nothing_is_shared(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), prefix_sharing=False) as llm:
        for call in ("pin", "share"):
            with pytest.raises(InvalidRequestError, match=f"{call}=.*left out with prefix_sharing=False"):
                getattr(llm, call)(PROMPT)


def test_pins(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), page_size=4, cache_bytes=2**20) as llm:
        pin = llm.pin(PROMPT, namespace="a")
        assert llm.pins() == [pin] and pin.num_tokens == len(PROMPT) and llm.stats()["num_pinned_pages"] == pin.num_pages == 10
        for i in range(30):
            llm.generate([3 + (i + j * j) % 90 for j in range(200)], SamplingParams(max_tokens=1))
        assert llm.generate(PROMPT, DRAWN, namespace="a")[0].receipt.cached_tokens == len(PROMPT) - 1
        with pytest.raises(InvalidRequestError, match="pin=True: must be a pin"):
            llm.unpin(pin.pin_id == 1)
        llm.unpin(pin)
        with pytest.raises(InvalidRequestError, match="must be a pin that has been neither unpinned nor expired"):
            llm.unpin(pin)
        llm.pin(PROMPT, ttl=0.05)
        time.sleep(0.06)
        assert llm.pins() == [] and llm.stats()["num_held_pages"] == 0
        llm.pin(PROMPT, ttl=0.05)
        time.sleep(0.5)  # nothing happens meanwhile: the engine lets it go by itself
        assert llm.stats()["num_pinned_pages"] == llm.cache_map().counts()["pinned"] == 0
        with pytest.raises(InvalidRequestError, match="ttl=0: must be a number of seconds above 0"):
            llm.pin(PROMPT, ttl=0)
        llm.pin(PROMPT)
        llm.reset_cache()
        assert llm.pins() == []
        llm.check_integrity()


def test_the_pool_gives_memory_back_and_takes_it_again(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), page_size=4, cache_bytes=2**20) as llm:
        cold = llm.generate(PROMPT, DRAWN)
        whole = llm.stats()["num_pages"]
        small = llm.resize_cache(2**17)
        assert small == llm.stats()["cache_bytes"] <= 2**17 and llm.stats()["num_pages"] < whole // 7 and llm.stats()["num_retired_pages"] > 0
        with pytest.raises(InvalidRequestError, match=r"pages, the whole cache but for what is pinned or given back"):
            llm.generate([7] * 200, SamplingParams(max_tokens=50))
        assert bits(llm.generate(PROMPT, DRAWN)[0]) == bits(cold[0])
        assert llm.resize_cache(2**20) > 2**20 - llm.info.page_bytes
        assert llm.stats()["num_pages"] == whole
        with pytest.raises(InvalidRequestError, match="cache_bytes=1: must be from"):
            llm.resize_cache(1)
        assert bits(llm.generate([PROMPT], DRAWN)[0]) == bits(cold[0])
        llm.check_integrity()


def test_a_pool_taken_at_load_is_there_before_anything_is_asked(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), cache_bytes=2**27) as llm:
        assert not all(taken(llm._built.engine.keeper._store.pages))
        cold = llm.generate(PROMPT, DRAWN)
    with LLM(checkpoint("llama"), cache_bytes=2**27, preallocate=True) as llm:
        assert all(taken(llm._built.engine.keeper._store.pages))
        assert bits(llm.generate(PROMPT, DRAWN)[0]) == bits(cold[0])


def test_priorities_go_first(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), max_sequences=1) as llm:
        long = llm.submit(PROMPT, dataclasses.replace(DRAWN, max_tokens=200))
        next(iter(long))
        low = llm.submit(PROMPT[::-1], DRAWN, priority=-1)
        high = llm.submit(PROMPT[::-1], DRAWN, priority=1)
        high_output, low_output = high.wait(60), low.wait(60)
        assert bits(high_output) == bits(low_output)
        assert high_output.receipt.queued_s < low_output.receipt.queued_s
        assert long.wait(60).receipt.num_preemptions == 1, "the only place was taken by the higher priority"


def test_an_id_that_the_tokenizer_does_not_know_is_explained_too(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's vocabulary may be padded; a tokenizer in Python raises for such an id, and that once ended the engine."""
    tokenizer = TextTokenizer(PythonBytes())
    monkeypatch.setattr("quire.engine.build.load_tokenizer", lambda *_, **__: tokenizer)
    with LLM(checkpoint("llama"), page_size=4) as llm:
        (output,) = llm.generate([[599, 5, 6]], SamplingParams(max_tokens=2))
        assert output.error is None and output.receipt.miss_text == llm.explain([598, 5]).miss_text == ""
        assert llm.explain([65, 5]).miss_text == "A"
