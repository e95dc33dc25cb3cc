"""The engine's thread: streams, cancellation, threads and loops that submit, a loop that dies."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from typing import Any

import pytest

from quire import LLM, EngineDeadError, InvalidRequestError, QueueFullError, SamplingParams, TokenEvent
from quire.engine.stream import RequestStream
from quire.outputs import Receipt, RequestOutput
from quire.request import Request
from tests.engine.conftest import Checkpoint
from tests.tensors.checkpoints import VOCAB

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoint: Checkpoint) -> Any:
    with LLM(checkpoint("llama"), page_size=4, max_tokens_per_step=32) as llm:
        yield llm


def settle(llm: LLM) -> None:
    """Returns when what was said to the engine so far has been done."""
    llm.check_integrity()


def test_cancel_gives_pages_back_before_the_next_step(llm: LLM) -> None:
    stream = llm.submit([5, 6, 7], LONG)
    next(iter(stream))
    assert llm.stats()["num_held_pages"] > 0
    stream.cancel()
    assert llm.stats()["num_held_pages"] == 0, "the message after the cancel already sees them back"
    output = stream.wait(10)
    assert output.outputs[0].finish_reason == "cancelled" and output.error is None
    assert output.outputs[0].token_ids, "what was generated is not lost"
    stream.cancel()
    llm.cancel("no such request")
    settle(llm)


def test_a_loop_is_woken_once_a_step_and_not_once_a_token(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate([[5, 6, 7 + i] for i in range(8)], GREEDY)
    before, calls = llm.stats()["num_steps"], 0

    async def one(i: int) -> list[int]:
        return [t async for event in llm.submit([5, 6, 7 + i], GREEDY) for t in event.token_ids]

    async def all_at_once() -> list[list[int]]:
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def counted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return call(*args)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        return await asyncio.gather(*(one(i) for i in range(8)))

    assert asyncio.run(all_at_once()) == [output.outputs[0].token_ids for output in expected]
    assert 0 < calls <= llm.stats()["num_steps"] - before


def test_async_and_threads_at_once(llm: LLM) -> None:
    expected = llm.generate([[5, 6, 7 + i] for i in range(8)], GREEDY)

    async def one(i: int) -> list[int]:
        return [t async for event in llm.submit([5, 6, 7 + i], GREEDY) for t in event.token_ids]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(one(i) for i in range(8)))

    results: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: llm.generate([[5, 6, 7 + i]], GREEDY)[0]})) for i in range(8)]
    for thread in threads:
        thread.start()
    from_loop = asyncio.run(all_of_them())
    for thread in threads:
        thread.join(60)
    for i, output in enumerate(expected):
        assert from_loop[i] == output.outputs[0].token_ids == results[i].outputs[0].token_ids


def test_a_loop_that_is_gone_does_not_hurt(llm: LLM) -> None:
    async def leave() -> None:
        stream = llm.submit([5, 6, 7], LONG)
        async for _ in stream:
            return

    asyncio.run(leave())
    assert len(llm.generate([[9, 9]], GREEDY)[0].outputs[0].token_ids) == 10
    for stream in list(gc.get_objects()):
        if isinstance(stream, RequestStream):
            stream.cancel()


def test_a_slow_reader_blocks_nothing_and_loses_nothing(llm: LLM) -> None:
    slow = llm.submit([5, 6, 7], SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, logprobs=2))
    assert len(llm.generate([[8, 8]], GREEDY)[0].outputs[0].token_ids) == 10
    deadline = time.monotonic() + 60
    while llm.stats()["num_running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    events = list(slow)
    assert len(events) == 1, "unread events were merged"
    (event,) = events
    assert event.output is not None and event.token_ids == event.output.outputs[0].token_ids
    assert event.text == event.output.outputs[0].text
    assert event.logprobs is not None and len(event.logprobs) == len(event.top_logprobs or ()) == 60


def test_every_stream_ends_once_under_a_storm(llm: LLM) -> None:
    rng = random.Random(1)
    streams = []
    for _ in range(120):
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 40))]
        streams.append(llm.submit(prompt, SamplingParams(max_tokens=rng.randint(1, 60), temperature=1.0)))
        if rng.random() < 0.6:
            rng.choice(streams).cancel()
        if rng.random() < 0.1:
            llm.check_integrity()
    for stream in streams:
        outputs = [event.output for event in stream if event.output is not None]
        assert len(outputs) == 1 and outputs[0].outputs[0].finish_reason in ("stop", "length", "cancelled")
    llm.check_integrity()
    stats = llm.stats()
    assert stats["num_held_pages"] == stats["num_running"] == stats["num_waiting"] == 0
    assert stats["num_free_pages"] + stats["num_cached_pages"] == stats["num_pages"]


def test_a_full_queue_refuses(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), max_sequences=1, max_waiting=2) as llm:
        streams = [llm.submit([5, 6], LONG) for _ in range(3)]
        with pytest.raises(QueueFullError, match="3 requests"):
            llm.submit([5, 6], LONG)
        for stream in streams:
            stream.cancel()
            stream.wait(10)
        assert llm.generate([[5, 6]], GREEDY)[0].error is None


def test_more_at_once_than_may_ever_be_open_is_refused_before_any_runs(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), max_sequences=2, max_waiting=3) as llm:
        assert len(llm.generate([[5, 6]] * 5, GREEDY)) == 5
        steps = llm.stats()["num_steps"]
        with pytest.raises(InvalidRequestError, match="at most 5 at once"):
            llm.generate([[5, 6]] * 6, GREEDY)
        assert llm.stats()["num_steps"] == steps and llm.stats()["num_waiting"] == 0


def test_a_dead_engine_fails_everything_at_once(checkpoint: Checkpoint) -> None:
    llm = LLM(checkpoint("llama"))
    streams = [llm.submit([5, 6, 7 + i], LONG) for i in range(3)]
    next(iter(streams[0]))

    def broken() -> None:
        raise RuntimeError("injected")

    llm._built.engine.step = broken
    for stream in streams:
        output = stream.wait(10)
        assert isinstance(output.error, EngineDeadError) and "injected" in str(output.error)
    for call in (lambda: llm.generate([[5]], GREEDY), llm.stats, llm.check_integrity, llm.reset_cache):
        with pytest.raises(EngineDeadError, match="injected"):
            call()
    llm.close()


def test_a_message_that_kills_the_loop_leaves_nobody_waiting(checkpoint: Checkpoint) -> None:
    """Those in the mail behind it, and the request whose own message it was."""
    llm = LLM(checkpoint("llama"))
    add, asked, go = llm._built.engine.add, threading.Event(), threading.Event()

    def add_or_die(request: Request, sink: Any) -> None:
        if request.request_id == "killer":
            raise RuntimeError("injected")
        add(request, sink)

    llm._built.engine.add = add_or_die

    def hold() -> None:
        asked.set()
        go.wait(10)

    holder = threading.Thread(target=lambda: llm._worker.call(hold))
    holder.start()
    assert asked.wait(10)
    streams = [llm.submit([5, 6], LONG, request_id=name) for name in ("before", "killer", "behind")]
    errors: list[BaseException] = []

    def stats() -> None:
        try:
            llm.stats()
        except EngineDeadError as error:
            errors.append(error)

    caller = threading.Thread(target=stats)
    caller.start()
    go.set()
    for stream in streams:
        output = stream.wait(10)
        assert isinstance(output.error, EngineDeadError) and "injected" in str(output.error)
        assert output.prompt_token_ids == [5, 6]
    for thread in (holder, caller):
        thread.join(10)
        assert not thread.is_alive()
    llm.close()


def test_an_engine_that_cannot_end_its_requests_leaves_nobody_waiting(checkpoint: Checkpoint) -> None:
    llm = LLM(checkpoint("llama"))
    streams = [llm.submit([5, 6, 7 + i], LONG) for i in range(3)]
    next(iter(streams[0]))

    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    llm._built.engine._end_request = broken
    llm._built.engine.step = broken
    for stream in streams:
        assert isinstance(stream.wait(10).error, EngineDeadError)
    llm.close()


def test_an_ended_stream_may_be_read_again(llm: LLM) -> None:
    stream = llm.submit([5, 6, 7], GREEDY)
    assert [token for event in stream for token in event.token_ids]
    assert list(stream) == []
    output = stream.wait()
    assert stream.wait() is output

    async def again() -> list[TokenEvent]:
        return [event async for event in stream]

    assert asyncio.run(again()) == []


def test_whoever_reads_or_waits_for_one_stream_comes_to_its_end(llm: LLM) -> None:
    """`result` drops what a reader that is busy has not read, and of two readers one takes the last event: the other waited for ever."""

    async def read(stream: RequestStream, busy_s: float) -> list[int]:
        ids: list[int] = []
        async for event in stream:
            ids += event.token_ids
            await asyncio.sleep(busy_s)
        return ids

    async def all_of_them() -> None:
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        streams = [llm.submit([3, 4, 5], params) for _ in range(3)]
        ends = [stream.result() for stream in streams for _ in range(2)]
        readers = [read(streams[0], 0.0), read(streams[0], 0.0), read(streams[1], 0.1)]
        done = await asyncio.wait_for(asyncio.gather(*ends, *readers, asyncio.to_thread(streams[2].wait)), 30)
        assert all(len(output.outputs[0].token_ids) == 20 for output in [*done[:6], done[-1]])
        assert len(done[6]) + len(done[7]) <= 20 and len(done[8]) <= 20

    asyncio.run(all_of_them())


def test_close_ends_open_streams_and_refuses_later_calls(checkpoint: Checkpoint) -> None:
    llm = LLM(checkpoint("llama"))
    stream = llm.submit([5, 6, 7], LONG)
    llm.close()
    llm.close()
    assert stream.wait(10).outputs[0].finish_reason == "cancelled"
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate([[5]], GREEDY)
    assert not [t for t in threading.enumerate() if t.name == "quire-engine" and not t.daemon]


def test_merging_keeps_branches_apart() -> None:
    stream = RequestStream("r", lambda _: None)
    for event in (TokenEvent("r", 0, "a", [1]), TokenEvent("r", 1, "x", [9]), TokenEvent("r", 0, "b", [2], finish_reason="length")):
        stream.put(event)
    assert [(e.index, e.text, e.token_ids, e.finish_reason) for e in stream._events] == [(1, "x", [9], None), (0, "ab", [1, 2], "length")]


def test_a_stream_that_nobody_reads_has_its_last_event_alone() -> None:
    woken: list[object] = []
    stream = RequestStream("r", lambda _: None, woken.append, read=False)
    for token in range(5):
        stream.put(TokenEvent("r", 0, text="ab", token_ids=[token]))
    assert stream.take() == []
    output = RequestOutput("r", None, [1], [], Receipt())
    stream.put(TokenEvent("r", 0, token_ids=[5], output=output))
    assert stream.wait() is output and not woken


@pytest.mark.parametrize("params", [{}, {"n": 2}, {"stop": ["x"]}, {"min_tokens": 1, "stop": ["e", "o"]}, {"best_of": 3}])
def test_text_is_the_same_whether_its_events_are_read(llm: LLM, params: dict[str, Any]) -> None:
    """Nobody waits for the text of tokens that are not read, and several are decoded together."""
    for count in (1, 2, 15, 16, 17, 33, 50):
        sampling = SamplingParams(max_tokens=count, seed=count, ignore_eos=True, **params)
        whole = llm.generate([[5, 6, 7]], sampling)[0].outputs
        assert llm.submit([5, 6, 7], sampling).wait().outputs == whole
        if "best_of" not in params:
            parts = ["" for _ in whole]
            for event in llm.stream([5, 6, 7], sampling):
                parts[event.index] += event.text
            assert parts == [one.text for one in whole]


def test_an_idle_engine_uses_no_processor(llm: LLM) -> None:
    settle(llm)
    thread = next(t for t in threading.enumerate() if t.name == "quire-engine")

    def used() -> list[str]:
        with open(f"/proc/self/task/{thread.native_id}/stat") as file:
            return file.read().split()[13:15]

    def idle() -> bool:
        before = used()
        time.sleep(0.3)
        return used() == before

    assert any(idle() for _ in range(5)), "one look of the idle engine, or the end of what was before, may fall into some of these"
