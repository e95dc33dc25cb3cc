"""Who leaves a request, an id or a process behind: nothing goes on for nobody, nobody else is cancelled, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from quire import LLM, EngineDeadError, Generator, InvalidRequestError, PagedCache, SamplingParams, Slots
from quire.tensors.models.turns import turn_of
from tests.engine.conftest import Checkpoint
from tests.tensors.checkpoints import tiny_model

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)
PATIENCE_S = 20  # that a fork has, which would otherwise wait for ever


@pytest.fixture(scope="module")
def llm(checkpoint: Checkpoint) -> Any:
    with LLM(checkpoint("llama"), page_size=4, max_tokens_per_step=32) as llm:
        yield llm


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Breaks off what the main thread does, once; called on another thread."""
    main, hits = threading.get_ident(), list[bool]()

    def hit(*_: object) -> None:
        if not hits:
            hits.append(True)
            raise KeyboardInterrupt

    def press() -> None:
        while not hits:  # one that comes just before a wait is not noticed in it
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.01)

    before = signal.signal(signal.SIGINT, hit)
    yield press
    signal.signal(signal.SIGINT, before)


def test_leaving_a_stream_early_cancels(llm: LLM) -> None:
    events = llm.stream([5, 6, 7], LONG)
    next(events)
    events.close()
    assert llm.stats()["num_running"] == 0


@pytest.mark.parametrize("leave", [lambda events: events.close(), lambda events: None])
def test_a_stream_that_is_never_entered_is_cancelled_too(llm: LLM, leave: Callable[[Any], None]) -> None:
    events = llm.stream([5, 6, 7], LONG)
    leave(events)
    del events
    stats = llm.stats()
    assert stats["num_running"] + stats["num_waiting"] == 0


def test_a_stream_keeps_its_engine(checkpoint: Checkpoint) -> None:
    """Nobody else may hold it: `for event in LLM(...).stream(...)`."""
    events = [*LLM(checkpoint("llama")).stream([5, 6, 7], SamplingParams(max_tokens=40, ignore_eos=True))]
    assert events[-1].finish_reason == "length" and sum(len(event.token_ids) for event in events) == 40


def test_an_id_is_one_open_request_s_alone(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama")) as llm:
        first = llm.submit([5, 6, 7], SamplingParams(max_tokens=100, ignore_eos=True), request_id="x")
        with pytest.raises(InvalidRequestError, match="request_id='x': must be one that no open request has"):
            llm.submit([5, 6, 7], request_id="x")
        assert first.wait(60).error is None
        assert llm.submit([5, 6, 7], SamplingParams(max_tokens=1), request_id="x").wait(60).error is None


@pytest.mark.parametrize("how", ["cancelled", "error"])
def test_half_a_character_that_is_left_is_no_stop_string(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """It comes out as U+FFFD, and with more to come it might have become a whole one; what was broken off must not say that it is complete."""
    with LLM(checkpoint("llama")) as llm:
        half = llm._built.engine.tokenizer.hf.convert_tokens_to_ids("\u00f0")  # type: ignore[union-attr]  # byte F0 in a ByteLevel vocabulary
        sampler, calls = llm._built.engine.runner.sampler, list[int]()
        sample = sampler.sample

        def leave(logits: Any, rows: Any) -> Any:
            calls.append(len(rows))
            if len(calls) == 2 and how == "error":
                raise RuntimeError("injected")
            if len(calls) == 2:
                llm.cancel("left")
            return sample(logits, rows)

        monkeypatch.setattr(sampler, "sample", leave)
        params = SamplingParams(max_tokens=100, allowed_token_ids=[half], stop="\ufffd")
        [one] = llm.submit([5, 6, 7], params, request_id="left").wait(60).outputs
        assert (one.finish_reason, one.stop_reason, set(one.text)) == (how, None, {"\ufffd"})


def test_a_stream_that_has_ended_cancels_nobody_else(llm: LLM) -> None:
    first = llm.submit([5, 6, 7], SamplingParams(max_tokens=1), request_id="x")
    first.wait(60)
    second = llm.submit([5, 6, 7], GREEDY, request_id="x")
    first.cancel()
    assert second.wait(60).outputs[0].finish_reason == "length"
    third = llm.submit([5, 6, 7], LONG, request_id="x")
    llm.cancel("x")
    assert third.wait(60).outputs[0].finish_reason == "cancelled"


def fork(child: Callable[[], None]) -> None:
    """Run `child` in a fork of this process; AssertionError unless it returns."""
    process_id = os.fork()
    if process_id == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE_S)
            child()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(process_id, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_is_told_that_its_engine_is_elsewhere(llm: LLM, checkpoint: Checkpoint) -> None:
    """Its threads are, too: whoever waits for them would wait for ever."""
    open_stream = llm.submit([5, 6, 7], LONG)
    next(iter(open_stream))
    slots, pages = Slots(checkpoint("llama"), 1), PagedCache(tiny_model("llama"), 2, 4)
    prefix = slots.prefill([5, 6, 7])

    async def first() -> Any:
        return await anext(aiter(open_stream))

    calls: list[Callable[[], Any]] = [
        lambda: llm.generate([[5, 6, 7]], GREEDY),
        lambda: llm.submit([5, 6, 7], GREEDY),
        llm.stats,
        llm.check_integrity,
        lambda: slots.prefill([5]),
        lambda: slots.insert(prefix, 0),
        lambda: pages.copy_page(0, 1),
        open_stream.wait,
        lambda: next(iter(open_stream)),
        lambda: asyncio.run(first()),
        lambda: asyncio.run(open_stream.result()),
    ]

    def child() -> None:
        for call in calls:
            with pytest.raises(EngineDeadError, match=f"lives in process {os.getppid()}, not in {os.getpid()}"):
                call()
        open_stream.cancel()
        llm.cancel("x")
        for engine in (llm, slots, pages):
            engine.close()

    fork(child)
    assert slots.insert(prefix, 0) == prefix.next_token
    assert llm.stats()["num_running"] == 1, "what a fork closes or cancels is its own"
    open_stream.cancel()
    assert llm.generate([[5, 6, 7]], GREEDY)[0].error is None
    llm.check_integrity()
    slots.close()
    pages.close()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_belongs_to_an_engine_is_not_copied(llm: LLM, checkpoint: Checkpoint, again: Callable[[object], object]) -> None:
    """The first of two to go would end the engine of both, and of one stream's events each would have some, and wait for the last one for ever."""
    stream = llm.submit([5, 6, 7], SamplingParams(max_tokens=1))
    with Slots(checkpoint("llama"), 1) as slots, PagedCache(checkpoint("llama"), 2, 4) as pages:
        for one in (llm, stream, slots, slots.prefill([5, 6, 7]), pages, Generator(llm)):
            with pytest.raises(TypeError, match=f"^a {type(one).__name__} can be neither copied nor pickled"):
                again(one)
    stream.wait(60)
    assert llm.generate([[5, 6, 7]], GREEDY)[0].error is None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_in_the_midst_of_a_forward_leaves_both_the_model_as_it_was() -> None:
    model, begun = tiny_model("llama"), threading.Event()

    def in_a_forward(*_: object) -> None:
        if threading.current_thread().name == "quire-engine" and not begun.is_set():
            begun.set()
            time.sleep(0.2)

    def child() -> None:
        assert model.config._attn_implementation == "eager" and not any("forward" in module.__dict__ for module in model.modules())
        assert turn_of(model).acquire(blocking=False)  # type: ignore[attr-defined]

    model.model.layers[0].mlp.register_forward_hook(in_a_forward)
    with LLM(model, cache_bytes=2**22) as llm:
        stream = llm.submit([5, 6, 7], LONG)
        assert begun.wait(PATIENCE_S)
        fork(child)
        stream.cancel()


def test_a_caller_has_no_lock_that_a_ctrl_c_could_leave_taken(checkpoint: Checkpoint) -> None:
    """One that comes in the Python code of a Condition does, now and then; then the engine waits for that lock, and everybody for the engine."""
    entered: list[object] = []

    def seen(frame: FrameType, event: str, arg: object) -> None:
        if frame.f_code is threading.Condition.__enter__.__code__:
            entered.append(frame.f_back and frame.f_back.f_code)

    llm = LLM(checkpoint("llama"))
    before = sys.gettrace()
    sys.settrace(seen)
    try:
        llm.generate([[5, 6, 7], [8]], GREEDY)
        assert [*llm.stream([5, 6], GREEDY)][-1].finish_reason
        with pytest.raises(TimeoutError):
            llm.submit([5, 6, 7], LONG, request_id="x").wait(0.01)
        llm.cancel("x")
        llm.stats()
        llm.close()
    finally:
        sys.settrace(before)
    assert not entered


def test_what_is_closed_says_so(checkpoint: Checkpoint) -> None:
    slots, pages = Slots(checkpoint("llama"), 1), PagedCache(tiny_model("llama"), 2, 4)
    prefix = slots.prefill([5, 6, 7])
    slots.close()
    pages.close()
    for call in (lambda: slots.prefill([5]), lambda: slots.insert(prefix, 0), slots.check_integrity, lambda: pages.copy_page(0, 1)):
        with pytest.raises(EngineDeadError, match="has been closed"):
            call()
    for model in (checkpoint("llama"), tiny_model("llama")):
        llm = LLM(model)
        llm.close()
        for look in (lambda llm=llm: llm.model, lambda llm=llm: Generator(llm)):
            with pytest.raises(EngineDeadError, match="is closed"):
                look()


def test_a_close_that_is_broken_off_is_gone_on_with(checkpoint: Checkpoint, tmp_path: Path, ctrl_c: Callable[[], None]) -> None:
    """Ctrl-C while it waits for a step: the next one, at the latest the interpreter's exit, waits for that step and does all the rest."""
    llm, begun, gate, over = LLM(checkpoint("llama"), cache_dir=tmp_path), threading.Event(), threading.Event(), []
    worker, tier = llm._worker, llm._built.tier

    def step() -> None:
        begun.set()
        while not worker._stopping:
            time.sleep(0.001)
        ctrl_c()
        gate.wait(PATIENCE_S)
        over.append("step")

    llm._built.engine.step = step  # type: ignore[method-assign]
    stream = llm.submit([5, 6, 7], LONG)
    assert begun.wait(PATIENCE_S)
    with pytest.raises(KeyboardInterrupt):
        llm.close()
    assert tier is not None and tier._disk.usable and not over
    threading.Timer(0.1, gate.set).start()
    llm.close()
    assert over and not tier._disk.usable and stream.wait(PATIENCE_S).outputs[0].finish_reason == "cancelled"


@pytest.mark.parametrize("cached", [True, False])
def test_a_pin_that_is_broken_off_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch, ctrl_c: Callable[[], None], cached: bool) -> None:
    """Ctrl-C while it waits for the engine, or for its prompt to be computed."""
    prompt, engine, begun, gate = [9 + i + cached for i in range(300)], llm._built.engine, threading.Event(), threading.Event()
    add = engine.add

    def busy() -> None:
        begun.set()
        while not llm._worker._mail:
            time.sleep(0.001)
        ctrl_c()
        gate.wait(PATIENCE_S)

    def add_and_wait(*given: Any) -> None:
        add(*given)
        ctrl_c()
        gate.wait(PATIENCE_S)

    if cached:
        llm.generate([prompt], GREEDY)
        threading.Thread(target=llm._worker.call, args=(busy,)).start()
        assert begun.wait(PATIENCE_S)
    else:
        monkeypatch.setattr(engine, "add", add_and_wait)
    with pytest.raises(KeyboardInterrupt):
        llm.pin(prompt)
    gate.set()
    stats = llm.stats()
    assert stats["num_waiting"] + stats["num_running"] == 0 and llm.pins() == []
