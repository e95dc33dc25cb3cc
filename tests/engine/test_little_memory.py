"""Twenty clients in memory for little more than one of them: all are served, with the bits that each has alone, and little is computed twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import quire
from quire import LLM, RequestOutput, SamplingParams
from tests.engine.conftest import Checkpoint
from tests.engine.test_transparency import bits

NUM_CLIENTS, NEW_TOKENS = 20, 40
DEMO = Path(quire.__file__).parent / "demo_model"
PROMPTS = [[5 + (i * i * (seed + 3) + 7 * seed) % 500 for i in range(24 + 2 * seed)] for seed in range(NUM_CLIENTS)]
DRAWN = [SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, seed=seed, logprobs=1, ignore_eos=True) for seed in range(NUM_CLIENTS)]
MOST_TOKENS = len(PROMPTS[-1]) + NEW_TOKENS
MOST_PREEMPTIONS = 6
ENOUGH_S = 120  # one that waits for ever is an error, not a test that hangs


@pytest.mark.parametrize(("family", "sharing"), [("demo", True), ("gemma3_text", False)])
def test_memory_for_little_more_than_one_serves_twenty(checkpoint: Checkpoint, family: str, sharing: bool) -> None:
    folder = DEMO if family == "demo" else checkpoint(family, torch.bfloat16)
    options = {"page_size": 4, "max_model_len": MOST_TOKENS, "prefix_sharing": sharing, "num_threads": 1}
    with LLM(folder, **options) as llm:
        cache = llm._built.engine.scheduler.cache
        cache_bytes = int(1.2 * cache.pages_to_finish(MOST_TOKENS - 1)) * llm.info.page_bytes
        alone = [bits(llm.generate([prompt], params)[0]) for prompt, params in zip(PROMPTS, DRAWN, strict=True)]
    with LLM(folder, **options, cache_bytes=cache_bytes, max_tokens_per_step=32) as llm, ThreadPoolExecutor(NUM_CLIENTS) as clients:

        def ask(client: int) -> RequestOutput:
            return llm.submit(PROMPTS[client], DRAWN[client]).wait(ENOUGH_S)

        outputs = list(clients.map(ask, range(NUM_CLIENTS)))
        llm.check_integrity()
        stats = llm.stats()
        assert stats["num_held_pages"] == stats["num_waiting"] == stats["num_running"] == 0
    assert [bits(output) for output in outputs] == alone
    needed = [len(prompt) + NEW_TOKENS - 1 for prompt in PROMPTS]
    receipts = [output.receipt for output in outputs]
    assert any(receipt.num_preemptions for receipt in receipts), "memory was not short"
    assert sum(receipt.computed_tokens for receipt in receipts) <= (1.5 if sharing else 2.5) * sum(needed), "computed again and again"
    for receipt, alone_tokens in zip(receipts, needed, strict=True):
        assert receipt.num_preemptions <= MOST_PREEMPTIONS
        assert alone_tokens <= receipt.computed_tokens + receipt.cached_tokens <= 4 * alone_tokens
