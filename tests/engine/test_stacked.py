"""One slot of the whole context for each sequence: the same engine, commit and kernels, and the same bits."""

from __future__ import annotations

import pytest

from quire import LLM
from quire.errors import ConfigError
from tests.engine.conftest import Checkpoint
from tests.engine.test_transparency import alone, jobs, together


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("sharing", [True, False])
def test_slots_give_the_same_bits_as_pages(checkpoint: Checkpoint, family: str, sharing: bool) -> None:
    folder, work = checkpoint(family), jobs(3, 12)
    expected = alone(folder, work)
    for max_sequences, budget in ((4, 512), (2, 16)):
        with LLM(folder, cache_layout="stacked", max_sequences=max_sequences, max_tokens_per_step=budget, prefix_sharing=sharing) as llm:
            assert llm.info.page_size == llm.info.context_len
            assert llm.info.num_pages % max_sequences == 0
            assert together(llm, work) == expected
            assert together(llm, work) == expected
            assert (llm.stats()["num_cached_tokens"] > 0) == (sharing and family == "llama") or family != "llama"


def test_slots_that_memory_has_no_room_for_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="cache_layout='stacked': 60000 slots of .* must be fewer"):
        LLM(checkpoint("llama", max_position_embeddings=2**20), cache_layout="stacked", max_sequences=60_000)
    with pytest.raises(ConfigError, match="cache_layout='left': must be one of paged, stacked"):
        LLM(checkpoint("llama"), cache_layout="left")
