"""One slot of the whole context for each sequence: the same engine, commit and kernels, and the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams
from quire.errors import ConfigError
from tests.engine.conftest import Checkpoint
from tests.engine.test_transparency import alone, jobs, together


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_slots_give_the_same_bits_as_pages(checkpoint: Checkpoint, family: str) -> None:
    folder, work = checkpoint(family), jobs(3, 12)
    expected = alone(folder, work)
    for sharing, (max_sequences, budget) in itertools.product((True, False), ((4, 512), (2, 16))):
        with LLM(folder, cache_layout="stacked", max_sequences=max_sequences, max_tokens_per_step=budget, prefix_sharing=sharing) as llm:
            assert llm.info.page_size == llm.info.context_len
            assert llm.info.num_pages % max_sequences == 0
            assert together(llm, work) == expected
            assert together(llm, work) == expected
            if family == "llama":  # with several kinds of layers a part of a page is no hit
                assert (llm.stats()["num_cached_tokens"] > 0) == sharing


def test_a_hit_that_there_is_no_room_to_copy_is_not_foreseen(checkpoint: Checkpoint) -> None:
    prompt, params = [7, 5, 9, 11, 3], SamplingParams(max_tokens=2)
    with LLM(checkpoint("llama"), cache_layout="stacked", max_sequences=1) as llm:
        for _ in range(2):
            told, output = llm.explain(prompt), llm.generate(prompt, params)[0]
            assert told.cached_tokens == output.receipt.cached_tokens == 0 and told.fits


def test_slots_that_memory_has_no_room_for_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="cache_layout='stacked': 60000 slots of .* must be fewer"):
        LLM(checkpoint("llama", max_position_embeddings=2**20), cache_layout="stacked", max_sequences=60_000)
    with pytest.raises(ConfigError, match="cache_layout='left': must be one of paged, stacked"):
        LLM(checkpoint("llama"), cache_layout="left")


def test_slots_are_one_tensor(checkpoint: Checkpoint) -> None:
    """A slot holds the very keys and values that transformers computes."""
    folder, prompt = checkpoint("llama"), [7, 5, 9, 11, 3, 8, 100, 42]
    with LLM(folder, cache_layout="stacked", max_sequences=3, max_model_len=64) as llm:
        stream = llm.submit(prompt, SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True))
        next(iter(stream))
        seen = llm.stacked()
        ((request_id, index), (slot, length)), *others = seen.slots.items()
        assert (request_id, index, others) == (stream.request_id, 0, []) and length >= len(prompt)
        keys, values = seen.keys[:, slot, :, : len(prompt)].clone(), seen.values[:, slot, :, : len(prompt)].clone()
        stream.cancel()
        assert seen.keys.shape[1] == 3 and seen.keys.shape[3] == 64
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cache = model(torch.tensor([prompt]), use_cache=True).past_key_values
    torch.testing.assert_close(keys, torch.stack([layer.keys[0] for layer in cache.layers]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(values, torch.stack([layer.values[0] for layer in cache.layers]), atol=1e-5, rtol=1e-4)
    for options in ({}, {"cache_layout": "stacked", "kv_codec": "int8"}):
        with LLM(folder, max_model_len=64, **options) as llm, pytest.raises(ConfigError, match="cache_layout="):
            llm.stacked()
