"""Random lives of a whole engine, pool and disk: whatever is done around a request, it gets the bits that an engine without a cache gives."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from quire import SamplingParams
from quire.engine.intake import Intake
from quire.errors import CacheTooSmallError, InvalidRequestError, StepError
from quire.outputs import RequestOutput, TokenEvent
from quire.tensors.models.probe import probe_again
from tests.engine.plain_engine import FOLDER, adapter, bits, expected, model_of, opened, plain_engine, shut
from tests.policy.oracle import SOAK
from tests.tensors.checkpoints import one_thread

__all__ = ["one_thread"]

MOST_TOKENS = 52
BASES = [[3 + (i * i * 7 + 3 * i + 31 * seed) % 500 for i in range(40)] for seed in range(2)]
lengths = st.one_of(st.sampled_from([40, 40, 39, 16, 1]), st.integers(1, 40))
prompts = st.builds(lambda base, n, tail: (*base[:n], *tail), st.sampled_from(BASES), lengths, st.lists(st.integers(3, 5), max_size=3))
spaces = st.sampled_from(["", "", "", "a", "a/b", "c"])
CODECS = [None, None, "int8", "int4", "k=int8,v=int4"]
Ask = tuple[tuple[int, ...], SamplingParams, str, int]
SEEN: Counter[str] = Counter()  # what these lives have come to, all together


def asking(num_new: int, n: int, seed: int, sampled: bool, scored: bool) -> SamplingParams:
    return SamplingParams(
        max_tokens=num_new, n=n if sampled else 1, seed=seed, temperature=float(sampled), logprobs=2, ignore_eos=True,
        prompt_logprobs=1 if scored else None,
    )  # fmt: skip


one_in_eight = st.sampled_from([False] * 7 + [True])
params = st.builds(asking, st.integers(1, 9), st.sampled_from([1, 1, 1, 2, 3]), st.integers(0, 2), st.booleans(), one_in_eight)
asks = st.tuples(prompts, params, spaces, st.sampled_from([0, 0, 0, 1, 2]))


@dataclass
class Asked:
    """An open request and what it has been sent."""

    prompt: tuple[int, ...]
    params: SamplingParams
    events: list[TokenEvent] = field(default_factory=list)

    @property
    def output(self) -> RequestOutput | None:
        return self.events[-1].output if self.events else None


class EngineMachine(RuleBasedStateMachine):
    """Every request that ends is compared, and integrity is checked, after every action.

    No rule asks what state the engine is in before it draws: that depends on the disk's threads, and on the clock.
    """

    @initialize(
        kind=st.sampled_from(["llama", "gemma3_text", "adapted"]),
        codec=st.sampled_from(CODECS),
        budget=st.sampled_from([5, 16, 64]),
        roominess=st.sampled_from([1.0, 1.2, 2.0, 5.0]),
        max_sequences=st.sampled_from([2, 8]),
        disk_pages=st.sampled_from([0, 25, 400]),
    )
    def start(self, kind: str, codec: str | None, budget: int, roominess: float, max_sequences: int, disk_pages: int) -> None:
        self.kind, self.codec = kind, codec
        plain = plain_engine(kind, codec)
        page_bytes, cache = plain.info.page_bytes, plain.engine.scheduler.cache
        self.page_bytes, self.num_pages = page_bytes, int(cache.pages_to_finish(MOST_TOKENS) * roominess)
        self.options: dict[str, Any] = {"kv_codec": codec, "max_tokens_per_step": budget, "max_sequences": max_sequences}
        self.options["cache_bytes"] = self.num_pages * page_bytes
        SEEN["lives"] += 1
        self.folder = Path(tempfile.mkdtemp(dir=FOLDER))
        if disk_pages and kind != "adapted":  # nothing of a live model is stored
            self.options |= {"cache_dir": str(self.folder / "store"), "cache_dir_bytes": disk_pages * (page_bytes + 4096)}
        self.names = itertools.count()
        self.open()

    def open(self) -> None:
        self.built = opened(self.kind, **self.options)
        self.engine, self.intake = self.built.engine, Intake(self.built)
        self.asked: dict[str, Asked] = {}
        self.full = self.failing = False
        if self.built.tier is not None:
            disk: Any = self.built.tier._disk
            fill = disk._fill
            disk._fill = lambda *args: self.fill(fill, *args)
        sampler: Any = self.engine.runner.sampler
        sample = sampler.sample
        sampler.sample = lambda *args: self.sample(sample, *args)

    def fill(self, fill: Callable[..., None], *args: Any) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "injected: no space left on device")
        fill(*args)

    def sample(self, sample: Callable[..., Any], *args: Any) -> Any:
        if self.failing:
            raise MemoryError("injected")
        return sample(*args)

    @property
    def adapters(self) -> tuple[object, ...]:
        if self.kind != "adapted":
            return ()
        one = adapter(self.kind)
        return (*one.active, one.disabled, *one.scaling.values())

    @rule(many=st.lists(asks, min_size=1, max_size=4))
    def submit(self, many: list[Ask]) -> None:
        for prompt, params, namespace, priority in many:
            try:
                request = self.intake.request(prompt, params, namespace, priority, f"r{next(self.names)}")
            except CacheTooSmallError:
                continue
            asked = self.asked[request.request_id] = Asked(prompt, params)
            self.engine.add(request, asked.events.append)
        self.look()

    @rule(count=st.sampled_from([1, 1, 3, 10, 200]))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.engine.has_work:
                self.engine.step()
        self.look()

    @rule()
    def fail(self) -> None:
        """Memory runs out in a step: who was in it ends, nothing of it is kept."""
        self.failing = True
        if self.engine.has_work:
            self.engine.step()
        self.failing = False
        self.look(failed=True)

    @rule(which=st.integers(0, 20))
    def cancel(self, which: int) -> None:
        self.engine.cancel(f"r{which}")
        self.look()

    @rule(prompt=prompts, namespace=spaces, ttl=st.sampled_from([None, 1e-4]))
    def pin(self, prompt: tuple[int, ...], namespace: str, ttl: float | None) -> None:
        with contextlib.suppress(InvalidRequestError):
            self.engine.keeper.pin(prompt, namespace, ttl)

    @rule()
    def unpin(self) -> None:
        for pin in self.engine.keeper.pins()[:1]:
            self.engine.keeper.unpin(pin.pin_id)

    @rule(prompt=prompts)
    def share(self, prompt: tuple[int, ...]) -> None:
        self.engine.keeper.share(prompt)

    @rule(prompt=prompts, namespace=spaces)
    def explain(self, prompt: tuple[int, ...], namespace: str) -> None:
        assert 0 <= self.engine.keeper.explain(prompt, namespace).cached_tokens <= len(prompt)

    @rule(share=st.floats(0.0, 1.0))
    def resize(self, share: float) -> None:
        with contextlib.suppress(InvalidRequestError):
            self.engine.keeper.resize(int(self.num_pages * share) * self.page_bytes)

    @rule()
    def forget(self) -> None:
        self.engine.keeper.reset()

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        """Another engine on the same folder; unless `clean`, what had not begun to be written is lost."""
        self.engine.end_all("cancelled", None)
        self.look()
        self.close(clean)
        self.open()

    @rule(how=st.sampled_from(["flip", "flip", "cut", "link", "remove", "index"]), which=st.integers(0, 99), at=st.floats(0, 1, exclude_max=True))
    def damage(self, how: str, which: int, at: float) -> None:
        store = self.folder / "store"
        files = sorted(store.glob("*index*" if how == "index" else "*.page"))
        if not files:
            return
        path = files[which % len(files)]
        with contextlib.suppress(FileNotFoundError):  # it has left meanwhile
            size = path.lstat().st_size
            if how == "remove" or path.is_symlink():
                path.unlink()
            elif how == "link":
                path.rename(self.folder / "elsewhere")
                path.symlink_to(self.folder / "elsewhere")
            elif how == "cut":
                os.truncate(path, int(at * size))
            elif size:
                with path.open("r+b") as file:
                    file.seek(int(at * size))
                    was = file.read(1)
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([was[0] ^ 1 << which % 8]))

    @rule(full=st.sampled_from([False, False, True]))
    def fill_the_disk_or_make_room(self, full: bool) -> None:
        self.full = full

    @rule(active=st.sampled_from(["a", "b"]), disabled=st.booleans(), scale=st.sampled_from([0.0, 1.0, 3.0]))
    def switch(self, active: str, disabled: bool, scale: float) -> None:
        """As `LLM` does when it finds the model another, which is to be changed while nothing is open."""
        if self.kind != "adapted":
            return
        while self.asked:
            self.step(1)
        one, model = adapter(self.kind), model_of(self.kind)
        stamp = model.weights_stamp()
        one.active, one.disabled, one.scaling[active] = [active], disabled, scale
        if model.weights_stamp() != stamp:
            self.engine.keeper.reset()
            probe_again(model)

    def look(self, failed: bool = False) -> None:
        """Compare what has ended."""
        SEEN["actions"] += 1
        for name, asked in list(self.asked.items()):
            output = asked.output
            if output is None:
                continue
            del self.asked[name]
            assert [event.output is not None for event in asked.events].count(True) == 1, "a stream ends once"
            right = expected(self.kind, self.codec, self.adapters, asked.prompt, asked.params)
            if isinstance(output.error, StepError):
                assert failed
            elif output.error is not None:
                assert isinstance(output.error, CacheTooSmallError), output.error
            elif all(one.finish_reason != "cancelled" for one in output.outputs):
                assert bits(output) == right
                SEEN["compared"] += 1
                SEEN["hits"] += output.receipt.cached_tokens > 0
                SEEN["forks"] += len(output.outputs) > 1
                SEEN["preempted"] += output.receipt.num_preemptions > 0
                SEEN["from disk"] += output.receipt.waited_for == "disk"
            for one, (token_ids, logprobs, *_) in zip(output.outputs, right, strict=True):
                assert one.token_ids == token_ids[: len(one.token_ids)] and one.logprobs == logprobs[: len(one.token_ids)]  # type: ignore[index]
                streamed = [event for event in asked.events if event.index == one.index]
                assert [token for event in streamed for token in event.token_ids] == list(one.token_ids)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "engine"):
            self.engine.keeper.check_integrity()

    def close(self, clean: bool = True) -> None:
        stats = self.engine.stats()
        SEEN["steps"] += stats["num_steps"]
        for name in ("num_fetched_pages", "num_stored_pages", "num_disk_damaged", "num_disk_evictions", "num_disk_write_errors", "num_disk_hits"):
            SEEN[name] += stats.get(name, 0)
        if self.built.tier is not None and not clean:
            self.built.tier._offered.clear()
        shut(self.built)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5_000):
            if not self.engine.has_work:
                break
            self.engine.step()
        self.look()
        assert not self.asked, "all that was asked has ended"
        self.sound()
        stats = self.engine.stats()
        assert stats["num_held_pages"] == stats["num_pinned_pages"]
        self.close()
        shutil.rmtree(self.folder)


TestEngine = pytest.mark.usefixtures("one_thread")(EngineMachine.TestCase)
TestEngine.settings = settings(
    max_examples=1000 if SOAK else 50, stateful_step_count=100 if SOAK else 40, deadline=None, suppress_health_check=list(HealthCheck)
)
