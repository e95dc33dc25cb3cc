"""Random lives of a whole engine, pool and disk together: requests of every kind come, fork, are preempted, fail and are cancelled, while prompts are
pinned and shared, memory comes and goes, the disk fills and rots, adapters are switched, and engines are closed and opened anew over one folder.

The oracle is another engine that has no cache: every request that ends has its bits, and one that is cancelled the first of them.
"""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from quire import SamplingParams
from quire.errors import CacheTooSmallError, InvalidRequestError, StepError
from tests.engine.by_hand import ByHand, SteppedStream, damage
from tests.engine.without_cache import MOST_TOKENS, Models, check_bits, switch
from tests.policy.oracle import SOAK
from tests.tensors.checkpoints import VOCAB, one_thread

__all__ = ["one_thread"]

MOST_DRAWN = 12
ENOUGH_STEPS = 3000
CODECS = (None, None, "int8", "int4", "k=int8,v=none", "k=none,v=int8")
# What another engine over the same folder may differ in, with pages of the same size.
OTHER_WEIGHTS = {"llama": "llama again", "llama again": "llama"}
OTHER_CODEC = {"k=int8,v=none": "k=none,v=int8", "k=none,v=int8": "k=int8,v=none"}
MODELS = ("llama", "llama", "llama again", "gemma3_text", "lfm2", "live", "live")
ADAPTERS = ("", "a", "b")
DRAWN = SamplingParams(max_tokens=MOST_DRAWN, temperature=1.0, seed=0, logprobs=2, ignore_eos=True)
KINDS = {
    "drawn": DRAWN,
    "greedy": replace(DRAWN, temperature=0.0, max_tokens=5),
    "one": replace(DRAWN, max_tokens=1, seed=7),
    "fork": replace(DRAWN, n=3, seed=20),
    "penalties": replace(DRAWN, n=2, max_tokens=4, repetition_penalty=1.3, top_k=30),
    "scored": replace(DRAWN, max_tokens=3, prompt_logprobs=1),
    "embedded": SamplingParams(max_tokens=0, pooling="mean"),
}
kinds = st.sampled_from(list(KINDS))
_rng = random.Random(12)
STEMS = [[_rng.randrange(3, VOCAB) for _ in range(MOST_TOKENS)] for _ in range(3)]
prompts = st.builds(
    lambda stem, cut, tail: STEMS[stem][:cut] + STEMS[tail % 3][tail : tail + tail % 4 + 1],
    st.integers(0, 2),
    st.sampled_from([0, 1, 3, 4, 5, 8, 15, 16, 17, 24, 33]),
    st.integers(0, 9),
)


class EngineMachine(RuleBasedStateMachine):
    """`after_every_action` follows every action; every end of a stream is compared where it is seen."""

    models: Models
    seen: Counter[str] = Counter()

    namespaces = st.sampled_from([None, None, "a", "b", "a/c"])
    hows = st.sampled_from(["flip", "cut", "exchange", "link", "remove"])
    options = st.fixed_dictionaries(
        {
            "page_size": st.sampled_from([1, 4, 4, 4, 5, 16]),
            "max_tokens_per_step": st.sampled_from([1, 5, 16, 64]),
            "max_sequences": st.sampled_from([1, 3, 16]),
            "kv_codec": st.sampled_from(CODECS),
            "roominess": st.sampled_from([1.0, 1.2, 2.0, 5.0]),
        }
    )

    @initialize(name=st.sampled_from(MODELS), options=options, room=st.sampled_from([12, 2**30]))
    def start(self, name: str, options: dict[str, Any], room: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.room, self.adapter = room, ""
        self.streams: list[tuple[SteppedStream, list[int], SamplingParams, str]] = []
        self.history = [STEMS[0][:20]]
        self.asked: list[tuple[list[int], SamplingParams, str | None]] = []
        self.open(name, options)

    def open(self, name: str, options: dict[str, Any]) -> None:
        given = dict(options)
        page_bytes, num_pages = self.models.sizes(name, given["kv_codec"], given["page_size"])
        given["cache_bytes"] = page_bytes * int(num_pages * given.pop("roominess"))
        if name != "live":
            given |= {"cache_dir": self.folder / "pages", "cache_dir_bytes": self.room * (page_bytes + 4096 + 100)}
        self.name, self.codec = name, given["kv_codec"]
        self.hand = ByHand(self.models.loaded(name, "engine"), self.models.source(name, "engine"), max_model_len=MOST_TOKENS, **given)
        self.llm = self.hand.llm
        if name == "live":
            switch(self.models.source(name, "engine"), self.adapter)

    # -- actions --------------------------------------------------------------------------------------------------------------------------

    @rule(prompt=prompts, kind=kinds, namespace=namespaces, priority=st.sampled_from([0, 0, 0, 1, -1]), copies=st.integers(1, 2))
    def submit(self, prompt: list[int], kind: str, namespace: str | None, priority: int, copies: int) -> None:
        for _ in range(copies):
            self._submit(prompt, KINDS[kind], namespace, priority)

    @rule(data=st.data(), rest=prompts, kind=kinds, namespace=namespaces)
    def submit_the_next_turn(self, data: st.DataObject, rest: list[int], kind: str, namespace: str | None) -> None:
        """An earlier prompt with its answer, and something new."""
        self._submit(data.draw(st.sampled_from(self.history)) + rest[-3:], KINDS[kind], namespace, 0)

    def _submit(self, prompt: list[int], params: SamplingParams, namespace: str | None, priority: int) -> None:
        prompt = prompt[: MOST_TOKENS - MOST_DRAWN]
        self.asked = [*self.asked[-5:], (prompt, params, namespace)]
        with contextlib.suppress(CacheTooSmallError):  # in a pool that was made smaller, or has pins
            stream = self.llm.submit(prompt, params, namespace=namespace, priority=priority)
            self.streams.append((stream, prompt, params, self.adapter))
            if stream.output is not None:
                assert isinstance(stream.output.error, CacheTooSmallError)
                self.streams.pop()

    @rule(num_steps=st.sampled_from([1, 2, 3, 10, 40]))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._step()

    def _step(self) -> None:
        armed = self.hand.failing
        self.hand.step()
        self.llm.check_integrity()
        self.collect(failed=armed and not self.hand.failing)

    def _finish(self) -> None:
        for _ in range(ENOUGH_STEPS):
            if not self.streams:
                return
            self._step()
        raise AssertionError("a request does not end")

    @rule()
    def fail_a_step(self) -> None:
        self.hand.failing = True
        self._step()
        self.hand.failing = False

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.streams[data.draw(st.integers(0, len(self.streams) - 1))][0].cancel()
        self.collect()

    @rule(data=st.data(), namespace=namespaces, ttl=st.sampled_from([None, 1.0]))
    def pin(self, data: st.DataObject, namespace: str | None, ttl: float | None) -> None:
        with contextlib.suppress(InvalidRequestError, CacheTooSmallError):  # more than may be pinned
            self.llm.pin(data.draw(st.one_of(prompts, st.sampled_from(self.history))), namespace=namespace, ttl=ttl)
            self.seen["pins"] += 1
        self.collect()

    @rule(data=st.data(), seconds=st.sampled_from([0.0, 0.6]))
    def unpin_or_wait(self, data: st.DataObject, seconds: float) -> None:
        self.hand.time += seconds
        if self.llm.pins() and not seconds:
            self.llm.unpin(data.draw(st.sampled_from(self.llm.pins())))

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        self.llm.share(data.draw(st.one_of(prompts, st.sampled_from(self.history))))

    @rule(data=st.data(), namespace=namespaces)
    def look(self, data: st.DataObject, namespace: str | None) -> None:
        """Asking changes nothing, and what is said to be cached is what an equal request is given."""
        prompt = data.draw(st.one_of(prompts, st.sampled_from(self.history)))
        before = self.llm.explain(prompt, namespace=namespace)
        assert 0 <= before.cached_tokens < len(prompt) or not prompt
        self.llm.cache_map()
        assert self.llm.explain(prompt, namespace=namespace) == before

    @rule(share=st.sampled_from([0.4, 0.7, 1.0]))
    def resize(self, share: float) -> None:
        with contextlib.suppress(InvalidRequestError):  # less than what is open may need
            self.llm.resize_cache(int(self.llm.info.cache_bytes * share))

    @rule(spare=st.sampled_from([-20_000, -1, 0, 30_000, 2**60]))
    def others_take_memory(self, spare: int) -> None:
        self.hand.spare_bytes = spare

    @rule()
    def forget(self) -> None:
        self.llm.reset_cache()

    @precondition(lambda self: self.name == "live")
    @rule(adapter=st.sampled_from(ADAPTERS))
    def switch_adapter(self, adapter: str) -> None:
        """With nothing open, as is asked of whoever changes a live model; then what was asked before is asked again."""
        self._finish()
        self.seen["switches"] += adapter != self.adapter
        self.adapter = adapter
        switch(self.models.source("live", "engine"), adapter)
        self._ask_again()

    @rule(reads=st.integers(0, 3), writes=st.integers(0, 6), full=st.sampled_from([False, False, True]), pays=st.sampled_from([True, True, False]))
    def move_the_disk(self, reads: int, writes: int, full: bool, pays: bool) -> None:
        """Some of what is on its way arrives; from now on the disk is full or not, and reading is dearer than computing or not."""
        for _ in range(reads):
            self.hand.reader.move()
        for _ in range(writes):
            self.hand.writer.move()
        self.hand.full = full
        self.hand.costs.reading = pays

    @rule(how=hows, seed=st.integers(0, 1000))
    def damage(self, how: str, seed: int) -> None:
        damage(self.folder / "pages", how, random.Random(seed))

    @rule(name=st.sampled_from(MODELS), options=options, lose_index=st.booleans())
    def restart(self, name: str, options: dict[str, Any], lose_index: bool) -> None:
        """Whatever is open is cancelled; an engine of any model opens over the same folder."""
        self._restart(name, options, lose_index)

    @rule(
        options=options,
        change=st.sampled_from(["nothing", "nothing", "weights", "codec"]),
        damages=st.lists(hows, max_size=6),
        seed=st.integers(0, 1000),
    )
    def restart_and_ask_again(self, options: dict[str, Any], change: str, damages: list[str], seed: int) -> None:
        """The folder may have been damaged meanwhile; the next engine is asked what the last has answered, and may be another model's."""
        self._finish()
        name = OTHER_WEIGHTS.get(self.name, self.name) if change == "weights" else self.name
        codec = OTHER_CODEC.get(self.codec or "", self.codec) if change == "codec" else self.codec
        self._restart(name, {**options, "kv_codec": codec, "page_size": self.llm.info.page_size}, False)
        for i, how in enumerate(damages):
            damage(self.folder / "pages", how, random.Random(seed + i))
        self._ask_again()

    def _ask_again(self) -> None:
        for prompt, params, namespace in self.asked[-3:]:
            self._submit(prompt, params, namespace, 0)
        self.step(4)

    def _restart(self, name: str, options: dict[str, Any], lose_index: bool) -> None:
        self.close()
        if lose_index:
            (self.folder / "pages" / "index.sqlite").unlink(missing_ok=True)
        self.open(name, options)

    # -- what must hold -------------------------------------------------------------------------------------------------------------------

    @invariant()
    def after_every_action(self) -> None:
        self.seen["actions"] += 1
        self.llm.check_integrity()
        if not self.streams and not self.hand.busy:
            stats = self.llm.stats()
            assert stats["num_held_pages"] == stats["num_pinned_pages"] and not stats["num_running"] and not stats["num_waiting"]

    def collect(self, failed: bool = False) -> None:
        """Compare what has ended. `failed`: whether the last step did."""
        still_open = []
        for stream, prompt, params, adapter in self.streams:
            output = stream.output
            if output is None:
                still_open.append((stream, prompt, params, adapter))
                continue
            if output.error is not None:
                assert failed and isinstance(output.error, StepError), output.error
                continue
            self.seen["ends"] += 1
            each = [replace(params, n=1, seed=None if params.seed is None else params.seed + i) for i in range(len(output.outputs))]
            check_bits(output, [self.models.answer(self.name, self.codec, adapter, prompt, one) for one in each])
            self.history = [*self.history[-5:], (prompt + output.outputs[0].token_ids)[: MOST_TOKENS - 1]]
        self.streams = still_open

    def close(self) -> None:
        stats = self.llm.stats()
        self.seen.update(
            {
                name: stats.get(name, 0)
                for name in (
                    "num_cached_tokens",
                    "num_preemptions",
                    "num_fetched_pages",
                    "num_stored_pages",
                    "num_disk_reads",
                    "num_disk_pages",
                    "num_disk_damaged",
                )
            }
        )
        self.seen["num_full"] += stats.get("num_disk_write_errors", 0)
        self.hand.close()
        self.collect()
        assert not self.streams

    def teardown(self) -> None:
        if not hasattr(self, "hand"):
            return
        self.hand.failing = False
        self._finish()
        self.close()
        shutil.rmtree(self.folder)


@pytest.fixture
def models(tmp_path: Path, one_thread: None) -> Iterator[Models]:
    log, level = logging.getLogger("quire"), logging.getLogger("quire").level
    log.setLevel(logging.CRITICAL + 1)  # every page that is damaged, and every step that fails, has a line
    yield Models(tmp_path)
    log.setLevel(level)


def test_any_life_of_a_whole_engine(models: Models) -> None:
    EngineMachine.models, EngineMachine.seen = models, Counter()
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        EngineMachine,
        settings=settings(
            max_examples=2200 if SOAK else 25, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
        ),
    )
    print(dict(EngineMachine.seen))
    rare = ("num_preemptions", "num_fetched_pages", "num_disk_damaged", "num_full", "switches", "pins") if SOAK else ()
    for what in ("num_cached_tokens", "ends", *rare):
        assert EngineMachine.seen[what] > 0, f"{what}: nothing of it was tried"
