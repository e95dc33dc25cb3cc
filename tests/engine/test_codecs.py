"""Promise 1 with quantised pages: a request's bits do not depend on chunks, page sizes, neighbours or hits, whatever the codec."""

from __future__ import annotations

import random

import pytest
import torch

from quire import LLM, SamplingParams
from quire.errors import ConfigError
from tests.engine.conftest import Checkpoint
from tests.engine.test_transparency import bits
from tests.tensors.checkpoints import VOCAB


def jobs() -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(3)
    stem = [rng.randrange(3, VOCAB) for _ in range(70)]
    prompts = [stem[:n] + [rng.randrange(3, VOCAB) for _ in range(m)] for n, m in ((70, 3), (0, 1), (33, 20), (70, 17), (16, 1))]
    return prompts, [SamplingParams(seed=i, max_tokens=20, temperature=1.0, logprobs=0, ignore_eos=True) for i in range(len(prompts))]


@pytest.mark.parametrize(
    ("codec", "family", "dtype"),
    [
        ("int8", "llama", torch.bfloat16),
        ("int4", "gemma3_text", torch.float32),
        ("k=int8,v=int4", "gemma3_text", torch.bfloat16),
        ("k=none,v=int8", "deepseek_v3", torch.float32),
        ("int4", "lfm2", torch.bfloat16),  # what convolutions keep stays as it is
    ],
)
def test_bits_do_not_move(checkpoint: Checkpoint, codec: str, family: str, dtype: torch.dtype) -> None:
    """Alone first, then together at several budgets and page sizes, cold and from cached pages."""
    folder, (prompts, params) = checkpoint(family, dtype), jobs()
    with LLM(folder, kv_codec=codec, max_tokens_per_step=4096, prefix_sharing=False) as llm:
        assert llm.info.kv_codec == codec
        expected = [bits(llm.generate([p], s)[0]) for p, s in zip(prompts, params, strict=True)]
    with LLM(folder) as llm:
        plain = [bits(o) for o in llm.generate(prompts, params)]
    assert expected != plain, "a codec that changes nothing is not in use"
    for budget, page_size in ((4096, 16), (7, 16), (64, 5)):
        with LLM(folder, kv_codec=codec, max_tokens_per_step=budget, page_size=page_size) as llm:
            for state in ("cold", "cached"):
                hits = llm.stats()["num_cached_tokens"]
                assert [bits(o) for o in llm.generate(prompts, params)] == expected, (budget, page_size, state)
            assert llm.stats()["num_cached_tokens"] - hits >= 64
            llm.check_integrity()


def test_the_reference_backend_keeps_the_promise_too(checkpoint: Checkpoint) -> None:
    folder, params = checkpoint("llama"), SamplingParams(max_tokens=4, seed=1, logprobs=0)
    prompts = [p[:30] for p in jobs()[0]]
    results = []
    for budget in (4096, 9):
        with LLM(folder, backend="reference", kv_codec="k=int4,v=int8", max_tokens_per_step=budget, page_size=8) as llm:
            results += [[bits(o) for o in llm.generate(prompts, params)] for _ in range(2)]
    assert all(r == results[0] for r in results)


def test_true_bytes(checkpoint: Checkpoint) -> None:
    """2 KV heads of 16 in 3 layers: rows of 32 bytes in bf16, of 17 in int8, of 9 in int4."""
    folder, sizes = checkpoint("llama", torch.bfloat16), {}
    for codec in (None, "int8", "int4", "v=int4,k=int8"):
        with LLM(folder, kv_codec=codec, cache_bytes=2**20) as llm:
            info = llm.info
            sizes[codec] = llm.stats()["bytes_per_token"]
            assert info.page_bytes == 16 * sizes[codec] and info.cache_bytes == info.num_pages * info.page_bytes <= 2**20
    assert sizes == {None: 6 * 64, "int8": 6 * 34, "int4": 6 * 18, "v=int4,k=int8": 3 * 52}


@pytest.mark.parametrize("codec", ["int2", "", "none", "k=int8", "k=int8,v=fp8", "k=int8,v=int4,k=int4", "int8,int4", 8, True])
def test_wrong_codecs_are_named(codec: object) -> None:
    with pytest.raises(ConfigError, match=r"kv_codec=.*: must be None, int8, int4, or one for each"):
        LLM("/nowhere", kv_codec=codec)
