"""The slot face: every token once, the bits of a request alone, pages shared and given back, and nothing lost where a call is refused."""

from __future__ import annotations

import gc
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from quire import LLM, InvalidRequestError, OutOfPagesError, SamplingParams, Slots
from quire.errors import CacheTooSmallError, ConfigError, NonFiniteLogitsError, StepError
from quire.tensors.models.model import CausalModel
from tests.engine.conftest import Checkpoint
from tests.tensors.checkpoints import tiny_model

PROMPTS = [[3 + (i * i * 7 + n) % 150 for i in range(n)] for n in (10, 33, 1, 57)]
DRAWN = SamplingParams(temperature=0.9, top_k=40, seed=11, repetition_penalty=1.1)


Alone = Callable[..., list[int]]


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    """alone(folder, prompt, num_tokens, params, seed): of a request by itself, in an engine where nothing is shared, open for the whole file."""
    with ExitStack() as stack:
        engines: dict[str, LLM] = {}

        def answer(folder: str, prompt: list[int], num_tokens: int, params: SamplingParams, seed: int | None = None) -> list[int]:
            fields = {name: getattr(params, name) for name in ("temperature", "top_k", "repetition_penalty")}
            if folder not in engines:
                engines[folder] = stack.enter_context(LLM(folder, prefix_sharing=False, cache_bytes=2**23))
            params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=params.seed if seed is None else seed, **fields)
            return engines[folder].generate([prompt], params)[0].outputs[0].token_ids

        yield answer


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("options", [{}, {"page_size": 4, "max_tokens_per_step": 5}, {"prefix_sharing": False}])
def test_slots_are_requests_alone(checkpoint: Checkpoint, alone: Alone, family: str, options: dict[str, Any]) -> None:
    """Prefilled between the others' steps, freed and filled again."""
    folder = checkpoint(family)
    with Slots(folder, 3, **options) as slots:
        got: dict[int, list[int]] = {}
        for i, prompt in enumerate(PROMPTS):
            prefix = slots.prefill(prompt, DRAWN)
            if i == 3:
                slots.free(1)
                assert got.pop(1) == alone(folder, PROMPTS[1], 3, DRAWN)
            slot = i if i < 3 else 1
            got[slot] = [slots.insert(prefix, slot)]
            assert got[slot] == [prefix.next_token]
            for other, token in slots.generate().items():
                got[other].append(token)
            slots.check_integrity()
        assert slots.active == [0, 1, 2]
    assert got == {slot: alone(folder, PROMPTS[i], len(got[slot]), DRAWN) for slot, i in ((0, 0), (1, 3), (2, 2))}


@pytest.mark.parametrize("family", ["llama", "granitemoehybrid"])
def test_logits_that_are_not_numbers_are_told_by_slot(checkpoint: Checkpoint, alone: Alone, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its caller can free that one and go on with the others, whose states have not moved on; and a prompt behind which there are none leaves
    nothing in the cache."""
    folder = checkpoint(family)
    expected = alone(folder, PROMPTS[0], 4, DRAWN)
    original = CausalModel.forward

    def poisoned(self: CausalModel, step: Any, ids: torch.Tensor, positions: torch.Tensor, logits_at: torch.Tensor, *more: Any) -> torch.Tensor:
        logits = original(self, step, ids, positions, logits_at, *more).clone()
        logits[ids[logits_at] == 599] = float("nan")
        return logits

    with Slots(folder, 3) as slots:
        got = [slots.insert(slots.prefill(PROMPTS[0], DRAWN), 0)]
        slots.insert(slots.prefill(PROMPTS[1], SamplingParams(allowed_token_ids=[599])), 2)
        monkeypatch.setattr(CausalModel, "forward", poisoned)
        for _ in range(2):
            with pytest.raises(NonFiniteLogitsError, match=r"^slot 2: .*NaN"):
                slots.generate()
        slots.free(2)
        got += [slots.generate()[0] for _ in range(3)]
        assert got == expected
        with pytest.raises(NonFiniteLogitsError, match=r"^the prompt: .*NaN"):
            slots.prefill([*PROMPTS[3], 599])
        slots.check_integrity()
        monkeypatch.undo()
        assert slots._engine.built.engine.keeper.explain((*PROMPTS[3], 599, 7), "").cached_tokens == 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_one_prefix_in_many_slots_shares_its_pages(checkpoint: Checkpoint, alone: Alone, family: str) -> None:
    folder = checkpoint(family)
    with Slots(folder, 4, page_size=16) as slots:
        cache = slots._engine.built.engine.scheduler.cache
        prefix = slots.prefill(PROMPTS[3], DRAWN)
        held = cache.pool.num_held
        got = slots.bulk_insert(prefix, [3, 0, 2], seeds=torch.tensor([1, 2, 3]))
        assert cache.pool.num_held == held + 3 * len(cache.groups), "57 tokens are 3 whole pages, shared, and a part, copied"
        more = [slots.generate() for _ in range(9)]
        slots.check_integrity()
        for slot, seed in ((3, 1), (0, 2), (2, 3)):
            assert [got[slot]] + [step[slot] for step in more] == alone(folder, PROMPTS[3], 10, DRAWN, seed)
            slots.free(slot)
        assert cache.pool.num_held == held, "the prefix still holds its own"
        del prefix
        gc.collect()
        slots.check_integrity()  # behind the release in the thread's queue
        assert cache.pool.num_held == 0


def test_a_random_life_keeps_the_cache_sound(checkpoint: Checkpoint) -> None:
    """Prefixes made, dropped and put into slots that are freed in any order, in a pool that runs out; tokens are those of greedy requests."""
    folder, rng = checkpoint("gemma3_text"), random.Random(5)
    with LLM(folder, page_size=4) as llm:
        whole = {i: llm.generate([p], SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))[0].outputs[0] for i, p in enumerate(PROMPTS)}
        page_bytes = llm.info.page_bytes
    with Slots(folder, 4, page_size=4, cache_bytes=page_bytes * 90) as slots:
        prefixes: list[tuple[int, Any]] = []
        got: dict[int, tuple[int, list[int]]] = {}
        refused = 0
        for _ in range(300):
            action = rng.choice(["prefill", "insert", "generate", "generate", "free", "drop"])
            try:
                if action == "prefill":
                    i = rng.randrange(4)
                    prefixes.append((i, slots.prefill(PROMPTS[i])))
                elif action == "insert" and prefixes and len(got) < 4:
                    i, prefix = rng.choice(prefixes)
                    free = rng.choice([slot for slot in range(4) if slot not in got])
                    got[free] = (i, [slots.insert(prefix, free)])
                elif action == "generate" and all(len(tokens) < 30 for _, tokens in got.values()):
                    for slot, token in slots.generate().items():
                        got[slot][1].append(token)
                elif action == "free" and got:
                    slot = rng.choice(list(got))
                    slots.free(slot)
                    i, tokens = got.pop(slot)
                    assert tokens == whole[i].token_ids[: len(tokens)]
                elif action == "drop" and prefixes:
                    prefixes.pop(rng.randrange(len(prefixes)))
            except OutOfPagesError:
                refused += 1
            slots.check_integrity()
        assert refused > 3


def test_a_refused_step_can_be_made_again(checkpoint: Checkpoint, alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("llama")
    with LLM(folder, page_size=4) as llm:
        page_bytes = llm.info.page_bytes
    expected = [alone(folder, prompt, 6, SamplingParams(temperature=0.0)) for prompt in PROMPTS[:2]]
    with Slots(folder, 3, page_size=4, cache_bytes=page_bytes * 14) as slots:
        got = [[slots.insert(slots.prefill(prompt), i)] for i, prompt in enumerate(PROMPTS[:2])]
        slots.insert(slots.prefill(PROMPTS[1]), 2)
        forward, fails = CausalModel.forward, [True]

        def failing(self: CausalModel, *args: Any) -> torch.Tensor:
            if fails[0]:
                raise RuntimeError("injected")
            return forward(self, *args)

        monkeypatch.setattr(CausalModel, "forward", failing)
        with pytest.raises(StepError, match="injected"):
            slots.generate()
        with pytest.raises(StepError, match="injected"):
            slots.prefill([5, 6, 7])
        fails[0] = False
        refused = False
        while len(got[0]) < 6:
            try:
                for slot, token in slots.generate().items():
                    if slot < 2:
                        got[slot].append(token)
            except OutOfPagesError as error:
                assert not refused and error.pages_needed > error.num_available
                refused = True
                slots.free(2)
            slots.check_integrity()
        assert refused and got == expected


def broken_off(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the first forward of the call runs, which goes on once the caller has been interrupted."""
    caller, interrupted, forward = threading.main_thread().ident, threading.Event(), CausalModel.forward
    assert caller is not None

    def interrupting(self: CausalModel, *args: Any) -> torch.Tensor:
        if not interrupted.is_set():
            interrupted.wait(0.2)  # a signal that comes just before the caller's wait begins is heeded only when that ends
            signal.pthread_kill(caller, signal.SIGINT)
            assert interrupted.wait(60)
        return forward(self, *args)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a script is told to ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(CausalModel, "forward", interrupting)
            with pytest.raises(KeyboardInterrupt):
                call()
            interrupted.set()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_call_that_is_broken_off_loses_no_token_and_no_page(
    checkpoint: Checkpoint, alone: Alone, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(family)
    with Slots(folder, 3, page_size=4, max_tokens_per_step=16) as slots:
        got = [[slots.insert(slots.prefill(prompt, DRAWN), i)] for i, prompt in enumerate(PROMPTS[:2])]
        slots.check_integrity()
        gc.collect()  # of the prefixes, so that slots alone hold pages
        cache = slots._engine.built.engine.scheduler.cache
        for i in range(9):
            if i % 3 == 1:
                broken_off(slots.generate, monkeypatch)
            if i == 4:
                got.append([slots.insert(slots.prefill(PROMPTS[3], DRAWN), 2)])  # beside two whose tokens wait to be taken
            for slot, token in slots.generate().items():
                got[slot].append(token)
            slots.check_integrity()
        assert got == [alone(folder, PROMPTS[n], len(tokens), DRAWN) for n, tokens in zip((0, 1, 3), got, strict=True)]
        for slot in range(3):
            slots.free(slot)
        broken_off(lambda: slots.prefill([9, *PROMPTS[3]]), monkeypatch)
        gc.collect()
        slots.check_integrity()
        assert cache.pool.num_held == 0, "what nobody was given is let go"


def test_mistakes_are_named_and_change_nothing(checkpoint: Checkpoint) -> None:
    for option in ("max_waiting", "prompt_lookup_num_tokens"):
        with pytest.raises(InvalidRequestError, match=option):
            Slots(checkpoint("llama"), 2, **{option: 3})
    with pytest.raises(ConfigError, match="'no_such'; options are"):
        Slots(checkpoint("llama"), 2, no_such=3)
    with Slots(checkpoint("llama"), 2, page_size=4, cache_bytes=2**15) as slots:
        prefix = slots.prefill([5, 6, 7])
        for field, value in (("max_tokens", 5), ("stop", "x"), ("n", 2), ("logprobs", 1), ("ignore_eos", True), ("return_logits", True)):
            with pytest.raises(InvalidRequestError, match=f"{field}=.*left out"):
                slots.prefill([5, 6], SamplingParams(**{field: value}))
        for bad in ([], [-1], [10**6], [5.5], "56", [True], None, torch.tensor([5.0]), torch.tensor([[5]])):
            with pytest.raises(InvalidRequestError, match="prompt"):
                slots.prefill(bad)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="params"):
            slots.prefill([5, 6], {"temperature": 0.0})  # type: ignore[arg-type]
        for none in (0.5, True, "0", [0]):
            with pytest.raises(InvalidRequestError, match="slot=.*an integer"):
                slots.insert(prefix, none)  # type: ignore[arg-type]
            with pytest.raises(InvalidRequestError, match="slot=.*an integer"):
                slots.free(none)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="prefix=None"):
            slots.insert(None, 0)  # type: ignore[arg-type]
        with pytest.raises(CacheTooSmallError):
            slots.prefill([5] * 400)
        for taken in ([2], [0, 0], [-1]):
            with pytest.raises(InvalidRequestError, match="slots="):
                slots.bulk_insert(prefix, taken)
        with pytest.raises(InvalidRequestError, match="seeds"):
            slots.bulk_insert(prefix, [0, 1], seeds=[1])
        for seed in (-1, 2**64, 1.5):
            with pytest.raises(InvalidRequestError, match="seeds?="):
                slots.bulk_insert(prefix, [0], seeds=[seed])  # type: ignore[list-item]
        with Slots(checkpoint("llama"), 1) as others, pytest.raises(InvalidRequestError, match="these slots' own"):
            others.insert(prefix, 0)
        with pytest.raises(InvalidRequestError, match="slot=0"):
            slots.free(0)
        assert slots.generate() == {} and slots.active == []
        slots.check_integrity()


def test_new_weights_are_refused_while_anything_is_held() -> None:
    model = tiny_model("llama")
    with Slots(model, 2, page_size=4) as slots:
        prefix = slots.prefill(PROMPTS[1])
        before = [slots.insert(prefix, 0), slots.generate()[0]]
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(-1.0)
        held = "model=.*while sequences are held"
        with pytest.raises(InvalidRequestError, match=held):
            slots.generate()
        with pytest.raises(InvalidRequestError, match=held):
            slots.insert(prefix, 1)
        with pytest.raises(InvalidRequestError, match=held):
            slots.prefill(PROMPTS[0])
        slots.free(0)
        del prefix
        gc.collect()
        slots.check_integrity()
        after = [slots.insert(slots.prefill(PROMPTS[1]), 0), slots.generate()[0]]
        assert after != before and slots.active == [0]


def test_a_slot_ends_with_the_context(checkpoint: Checkpoint) -> None:
    with Slots(checkpoint("llama"), 1, max_model_len=12) as slots:
        slots.insert(slots.prefill([5] * 10), 0)
        slots.generate()
        with pytest.raises(InvalidRequestError, match="context of 12"):
            slots.generate()
        slots.free(0)
        slots.check_integrity()
