"""Promise 1: a request's tokens and logprobs have the same bits whatever happens around it. The oracle is the request alone in a fresh engine."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence

import pytest
import torch

from quire import LLM, RequestOutput, SamplingParams
from tests.engine.conftest import Checkpoint
from tests.tensors.checkpoints import VOCAB

Job = tuple[list[int], SamplingParams]
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 64, 90)


def jobs(seed: int, count: int) -> list[Job]:
    """Prompts of awkward lengths, many with a common start, sampled in every way."""
    rng = random.Random(seed)
    stem = [rng.randrange(3, VOCAB) for _ in range(80)]
    made = []
    for i in range(count):
        prompt = stem[: rng.choice([0, 0, 15, 16, 17, 48, 80])] + [rng.randrange(3, VOCAB) for _ in range(rng.choice(LENGTHS))]
        params = SamplingParams(
            max_tokens=rng.choice([1, 2, 9, 17, 33]),
            temperature=rng.choice([0.0, 0.8, 1.3]),
            top_k=rng.choice([0, 0, 40]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.02]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            seed=seed * 100 + i,
            logprobs=rng.choice([0, 3]),
            ignore_eos=rng.random() < 0.8,
        )
        made.append((prompt, params))
    return made


def bits(output: RequestOutput) -> tuple[object, ...]:
    assert output.error is None
    return tuple((c.token_ids, c.logprobs, c.top_logprobs, c.text, c.finish_reason, c.stop_reason) for c in output.outputs)


def alone(folder: str, work: Sequence[Job], **options: object) -> list[tuple[object, ...]]:
    results = []
    with LLM(folder, max_tokens_per_step=4096, prefix_sharing=False, **options) as llm:
        for prompt, params in work:
            results.append(bits(llm.generate([prompt], params)[0]))
    return results


def together(llm: LLM, work: Sequence[Job]) -> list[tuple[object, ...]]:
    outputs = llm.generate([prompt for prompt, _ in work], [params for _, params in work])
    llm.check_integrity()
    assert llm.stats()["num_held_pages"] == 0
    return [bits(output) for output in outputs]


FAMILIES = ("llama", "gemma3_text", "lfm2", "gpt_oss", "llama4_text")
NUM_JOBS = {"lfm2": 8, "gpt_oss": 8, "llama4_text": 8}  # of some, to save time: experts take several times as long


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_chunks_pages_and_hits(checkpoint: Checkpoint, family: str, dtype: torch.dtype) -> None:
    folder, work = checkpoint(family, dtype), jobs(1, NUM_JOBS.get(family, 14))
    expected = alone(folder, work)
    for page_size, budget, seed in ((16, 512, 0), (4, 7, 1), (64, 33, 2), (1, 100, 3)):
        order = list(range(len(work)))
        random.Random(seed).shuffle(order)
        with LLM(folder, max_tokens_per_step=budget, page_size=page_size) as llm:
            assert together(llm, [work[i] for i in order]) == [expected[i] for i in order], "cold"
            hits = llm.stats()["num_cached_tokens"]
            assert together(llm, work) == expected, "from the cache"
            assert llm.stats()["num_cached_tokens"] > hits


def test_one_token_a_step(checkpoint: Checkpoint) -> None:
    folder, work = checkpoint("llama"), jobs(2, 6)
    expected = alone(folder, work)
    with LLM(folder, max_tokens_per_step=1, page_size=16) as llm:
        assert together(llm, work) == expected


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_preemption(checkpoint: Checkpoint, family: str) -> None:
    folder = checkpoint(family, torch.bfloat16)
    rng = random.Random(3)
    params = [SamplingParams(max_tokens=70, temperature=1.0, seed=i, logprobs=0, ignore_eos=True) for i in range(7)]
    work = [([rng.randrange(3, VOCAB) for _ in range(rng.randint(3, 20))], p) for p in params]
    expected = alone(folder, work)
    with LLM(folder, max_tokens_per_step=40, page_size=8) as llm:
        needed = llm.info.page_bytes * len(llm.info.groups) * 16
    with LLM(folder, max_tokens_per_step=40, page_size=8, cache_bytes=needed) as llm:
        outputs = llm.generate([prompt for prompt, _ in work], [p for _, p in work])
        assert [bits(o) for o in outputs] == expected
        assert llm.stats()["num_preemptions"] > 0
        assert sum(o.receipt.num_preemptions for o in outputs) == llm.stats()["num_preemptions"]
        llm.check_integrity()


def test_neighbours_come_and_go(checkpoint: Checkpoint) -> None:
    """Requests arrive at random moments beside others that are cancelled at random moments."""
    folder, work = checkpoint("gemma3_text", torch.bfloat16), jobs(4, 10)
    expected = alone(folder, work)
    rng = random.Random(5)
    noise = SamplingParams(max_tokens=300, temperature=1.0, ignore_eos=True)
    with LLM(folder, max_tokens_per_step=48, page_size=16) as llm:
        streams, doomed = [], []
        for prompt, params in work:
            doomed.append(llm.submit(prompt[: rng.randint(1, len(prompt))] + [rng.randrange(3, VOCAB)], noise))
            streams.append(llm.submit(prompt, params))
            time.sleep(rng.random() * 0.02)
            if rng.random() < 0.7:
                doomed.pop(rng.randrange(len(doomed))).cancel()
        got = [bits(stream.wait(60)) for stream in streams]
        for stream in doomed:
            stream.cancel()
        assert got == expected
        reasons = {stream.wait(60).outputs[0].finish_reason for stream in doomed}
        assert reasons <= {"cancelled", "length"}
        llm.check_integrity()
        assert llm.stats()["num_held_pages"] == 0


def test_branches_are_requests_with_seeds_of_their_own(checkpoint: Checkpoint) -> None:
    folder, prompt = checkpoint("llama"), list(range(3, 40))
    params = SamplingParams(n=3, seed=40, max_tokens=12, temperature=1.0, logprobs=0, ignore_eos=True)
    apart = [SamplingParams(seed=40 + i, max_tokens=12, temperature=1.0, logprobs=0, ignore_eos=True) for i in range(3)]
    with LLM(folder) as llm:
        branches = llm.generate([prompt], params)[0].outputs
        single = [o.outputs[0] for o in llm.generate([prompt] * 3, apart)]
    assert [c.index for c in branches] == [0, 1, 2]
    assert [(c.token_ids, c.logprobs) for c in branches] == [(c.token_ids, c.logprobs) for c in single]
    assert len({tuple(c.token_ids) for c in branches}) == 3


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_poison(checkpoint: Checkpoint, family: str) -> None:
    """Unused slots, free pages and pages that left a window hold NaN; nothing changes."""
    folder, work = checkpoint(family, torch.bfloat16), jobs(6, 8)
    expected = alone(folder, work)
    with LLM(folder, max_tokens_per_step=64, page_size=16) as llm:
        engine = llm._built.engine
        store, pool = engine.runner.store, engine.scheduler.cache.pool
        store.pages.fill_(255)  # NaN in every dtype and for every scale
        take, release = pool.take, pool.release

        def poisoned_take(num_pages: int) -> list[int]:
            pages = take(num_pages)
            store.pages[pages] = 255
            return pages

        def poisoned_release(page_ids: Iterable[int], *, cold: bool = False) -> None:
            page_ids = list(page_ids)
            release(page_ids, cold=cold)
            free = [page_id for page_id in page_ids if pool.references(page_id) == 0 and page_id not in engine.scheduler.cache.index]
            store.pages[free] = 255

        pool.take, pool.release = poisoned_take, poisoned_release
        assert together(llm, work) == expected
        llm.reset_cache()
        assert together(llm, work) == expected


@pytest.mark.parametrize("backend", ["reference"])
def test_the_reference_backend_keeps_the_promise_too(checkpoint: Checkpoint, backend: str) -> None:
    folder, work = checkpoint("llama"), [(p[:20], SamplingParams(max_tokens=4, seed=1, logprobs=0)) for p, _ in jobs(7, 4)]
    expected = alone(folder, work, backend=backend)
    with LLM(folder, backend=backend, max_tokens_per_step=9, page_size=4) as llm:
        assert together(llm, work) == expected
        assert together(llm, work) == expected
