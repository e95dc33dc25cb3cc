"""What is on the disk is read where that was measured to be cheaper than computing it, and computed otherwise; tokens are the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.engine.runner import Runner
from quire.tensors.disk import DiskStore
from tests.engine.conftest import Checkpoint
from tests.engine.test_tier import DRAWN, bits

PROMPTS = [[5 + (i * i * 7 + 3 * i + seed) % 180 for i in range(49)] for seed in range(12)]
TOKENS_ON_DISK, PAGE_SIZE = 48, 4
# Seconds that a page takes to be read and a token to be computed, for some prompts each, and whether the last of them are to be read. The disk is
# a shade faster or slower than the model, not only by far: a page has four tokens.
WORLDS = {
    "fast disk": [(0.001, 1.0, 4, True)],
    "slow disk": [(1.0, 0.001, 4, False)],
    "somewhat faster disk": [(3.0, 1.0, 9, True)],
    "somewhat slower disk": [(30.0, 1.0, 4, False)],
    "model becomes slow": [(1.0, 0.001, 4, False), (1.0, 1000.0, 4, True)],
    "disk becomes slow": [(1.0, 10.0, 4, True), (1e6, 10.0, 4, False)],
}


class World:
    """A clock that only reading and computing move, by what they are said to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.page_s = self.token_s = self._now = 0.0
        self._lock = threading.Lock()
        read, run = DiskStore.read, Runner.run
        clock = SimpleNamespace(**{name: getattr(time, name) for name in dir(time) if not name.startswith("_")} | {"perf_counter": lambda: self._now})
        monkeypatch.setattr("quire.engine.tier.time", clock)
        monkeypatch.setattr("quire.engine.engine.time", clock)
        monkeypatch.setattr(DiskStore, "read", lambda *given: self._after(self.page_s, read, *given))
        monkeypatch.setattr(Runner, "run", lambda *given, **named: self._after(given[1].num_tokens * self.token_s, run, *given, **named))

    def _after(self, seconds: float, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        with self._lock:
            self._now += seconds
        return function(*given, **named)


@pytest.mark.parametrize("name", WORLDS)
def test_what_was_measured_to_be_cheaper_is_done(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder, options = checkpoint("llama"), {"page_size": PAGE_SIZE, "cache_dir": tmp_path}
    params: list[SamplingParams] = [DRAWN[0]] * len(PROMPTS)
    with LLM(folder, **options) as llm:
        computed = bits(llm.generate(PROMPTS, params))
    world, at = World(monkeypatch), 0
    with LLM(folder, **options) as llm:
        for world.page_s, world.token_s, num_prompts, to_be_read in WORLDS[name]:
            for _ in range(num_prompts):
                before = llm.stats()["num_fetched_pages"]
                (output,) = llm.generate(PROMPTS[at], params[at])
                read = output.receipt.cached_tokens == TOKENS_ON_DISK
                assert read or output.receipt.cached_tokens == 0
                assert llm.stats()["num_fetched_pages"] - before == (TOKENS_ON_DISK // PAGE_SIZE if read else 0)
                assert output.receipt.computed_tokens == len(PROMPTS[at]) + 19 - (TOKENS_ON_DISK if read else 0)
                assert bits([output]) == [computed[at]]
                at += 1
            assert read is to_be_read
        llm.check_integrity()
