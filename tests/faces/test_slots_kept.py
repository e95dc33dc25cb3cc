"""What slots leave in the cache where something has failed: nothing that is wrong, and nothing that is held."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quire import LLM, InvalidRequestError, Prefix, SamplingParams, Slots
from quire.errors import NonFiniteLogitsError
from quire.tensors.models.model import CausalModel
from quire.tensors.store import PageStore
from tests.engine.conftest import Checkpoint

PROMPT = [3 + (i * i * 7 + 33) % 150 for i in range(33)]
DRAWN = SamplingParams(temperature=0.9, top_k=40, seed=11, repetition_penalty=1.1)


def test_a_slot_freed_behind_nan_logits_leaves_nothing_in_the_cache(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a prompt leaves nothing; what others computed before it, its prefix, stays. One that is freed in good health is hit."""
    with Slots(checkpoint("llama"), 2, page_size=4) as slots:
        explain, prefix = slots._engine.built.engine.keeper.explain, slots.prefill([3], DRAWN)
        drawn = {slot: [slots.insert(prefix, slot, seed=slot)] for slot in (0, 1)}
        for _ in range(20):
            for slot, token in slots.generate().items():
                drawn[slot].append(token)
        with monkeypatch.context() as patch:
            patch.setattr(
                CausalModel, "forward", lambda *given, forward=CausalModel.forward: forward(*given).mul(torch.tensor([[1.0], [float("nan")]]))
            )
            with pytest.raises(NonFiniteLogitsError, match=r"^slot 1: "):
                slots.generate()
        for slot in (0, 1):
            slots.free(slot)
        found = [explain((3, *drawn[slot]), "").cached_tokens - 1 for slot in (0, 1)]
        assert found[1] < 4 < 16 <= found[0], f"{found}, of which the first few may be what both drew"
        slots.check_integrity()


def test_a_copy_that_fails_leaves_no_page_that_was_to_be_copied(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt that continues part of a page, and of a slot: nothing is held, and nobody hits what was never written."""
    folder = checkpoint("llama")
    with LLM(folder, prefix_sharing=False) as llm:
        answers = llm.generate([[*PROMPT[:24], token] for token in (5, 6)], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    expected = [answer.outputs[0].token_ids[0] for answer in answers]
    with Slots(folder, 2, page_size=16) as slots:
        prefix, pool = slots.prefill(PROMPT), slots._engine.built.engine.scheduler.cache.pool
        held = pool.num_held
        with monkeypatch.context() as patch:
            patch.setattr(PageStore, "copy_pages", lambda *_: 1 // 0)
            for call in (lambda: slots.prefill([*PROMPT[:24], 5]), lambda: slots.insert(prefix, 0)):
                with pytest.raises(ZeroDivisionError):
                    call()
                slots.check_integrity()
                assert pool.num_held == held and not slots.active
        assert [slots.prefill([*PROMPT[:24], token]).next_token for token in (5, 6)] == expected
        assert slots.insert(prefix, 0) == prefix.next_token


def test_threads_take_turns(checkpoint: Checkpoint) -> None:
    """Of those who want one slot one has it, and of those who move it on each has tokens of its own; pages of two in one slot never came back."""
    with Slots(checkpoint("llama"), 4, page_size=4, cache_bytes=2**20) as slots, ThreadPoolExecutor(4) as threads:

        def inserted(prefix: Prefix) -> bool:
            try:
                slots.insert(prefix, 0)
            except InvalidRequestError:
                return False
            return True

        prefix = slots.prefill([3, 4, 5, 6, 7])
        for _ in range(5):
            assert sum(threads.map(inserted, [prefix] * 8)) == 1
            slots.free(0)
        first = slots.insert(prefix, 1)
        alone = [first, *(slots.generate()[1] for _ in range(40))]
        slots.free(1)
        slots.insert(prefix, 1)
        moved = threads.map(lambda _: slots.generate()[1], range(40))
        assert sorted([first, *moved]) == sorted(alone) and slots._slots[1].sequence.tokens[5:] == alone
        slots.free(1)
        del prefix
        gc.collect()
        slots.check_integrity()
        assert not slots._engine._cache.pool.num_held
