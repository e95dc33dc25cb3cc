"""The engine with its attention in Triton's interpreter, which takes milliseconds a tile: the same promises, and the tokens of the reference."""

from __future__ import annotations

import pytest

from quire import LLM, ConfigError, SamplingParams
from tests.engine.conftest import Checkpoint

pytest.importorskip("triton", reason="Triton is not installed")

PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=0)
PROMPTS = [list(range(5, 5 + count)) for count in (3, 21, 9)]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_together_in_chunks_and_preempted_as_alone_and_as_the_reference(checkpoint: Checkpoint, family: str) -> None:
    folder = checkpoint(family)
    with LLM(folder, backend="triton", page_size=4) as llm:
        assert llm.info.backend.startswith("triton (interpreted)")
        alone = [llm.generate(prompt, PARAMS)[0].outputs for prompt in PROMPTS]
        page_bytes = llm.info.page_bytes
    with LLM(folder, backend="triton", page_size=4, max_tokens_per_step=8, cache_bytes=24 * page_bytes) as llm:
        together = llm.generate(PROMPTS, PARAMS)
        assert [output.outputs for output in together] == alone
        again = llm.generate([*PROMPTS[1], 7], PARAMS)[0]
        assert again.receipt.cached_tokens and again.error is None
        llm.check_integrity()
    with LLM(folder, backend="reference") as llm:
        for output, (own,) in zip(llm.generate(PROMPTS, PARAMS), alone, strict=True):
            assert output.outputs[0].token_ids == own.token_ids
            assert output.outputs[0].logprobs == pytest.approx(own.logprobs, abs=1e-4)


def test_what_it_cannot_do_is_refused_by_name(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="kv_codec='int8': must be None with backend='triton'"):
        LLM(checkpoint("llama"), backend="triton", kv_codec="int8")
    monkeypatch.setattr("quire.tensors.attention.triton.INTERPRETED", False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        LLM(checkpoint("llama"), backend="triton")
