"""The engine with attention and products in Triton's interpreter, which takes milliseconds a program: the same promises, and the reference's tokens.

Pools are small, since the interpreter copies all of a tensor's storage at each call.
"""

from __future__ import annotations

import pytest

from quire import LLM, ConfigError, SamplingParams
from quire.engine.kernels import choose_kernels
from tests.engine.conftest import Checkpoint

pytest.importorskip("triton", reason="Triton is not installed")

from quire.tensors.attention.triton import TritonAttention
from quire.tensors.triton_products import TritonProducts
from tests.tensors import quick_interpreter

quick_interpreter.install()
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=0)
PROMPTS = [list(range(5, 5 + count)) for count in (3, 21, 9)]


def test_everything_but_the_sampler_is_in_triton() -> None:
    kernels, otherwise = choose_kernels("triton", 1), choose_kernels("auto", 1)
    assert type(kernels.attention) is TritonAttention and type(kernels.products) is TritonProducts
    assert kernels.sampler == otherwise.sampler and not kernels.programs


def test_together_in_chunks_and_preempted_as_alone_and_as_the_reference(checkpoint: Checkpoint) -> None:
    """Of several layers, other families, and weights as they are, tests/engine/devices_families.py says so."""
    folder, quantization = checkpoint("llama", num_hidden_layers=1), "int4"
    with LLM(folder, backend="triton", page_size=4, quantization=quantization, cache_bytes=2**20) as llm:
        assert llm.info.backend == "triton (interpreted)" and llm.info.layers == "plain"
        alone = [llm.generate(prompt, PARAMS)[0].outputs for prompt in PROMPTS]
        page_bytes = llm.info.page_bytes
    with LLM(
        folder, backend="triton", page_size=4, quantization=quantization, max_tokens_per_step=8, max_sequences=2, cache_bytes=24 * page_bytes
    ) as llm:
        together = llm.generate(PROMPTS, PARAMS)
        assert [output.outputs for output in together] == alone
        running = [llm.submit(prompt, PARAMS) for prompt in PROMPTS[:2]]
        for one in running:
            next(iter(one))
        running.append(llm.submit(PROMPTS[2], PARAMS, priority=1))
        assert [one.wait(60).outputs for one in running] == alone and llm.stats()["num_preemptions"] == 1
        again = llm.generate([*PROMPTS[1], 7], PARAMS)[0]
        assert again.receipt.cached_tokens and again.error is None
        llm.check_integrity()
    with LLM(folder, backend="reference", quantization=quantization) as llm:
        for output, (own,) in zip(llm.generate(PROMPTS, PARAMS), alone, strict=True):
            assert output.outputs[0].token_ids == own.token_ids
            assert output.outputs[0].logprobs == pytest.approx(own.logprobs, abs=1e-4)


def test_what_it_cannot_do_is_refused_by_name(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="kv_codec='int8': must be None with backend='triton'"):
        LLM(checkpoint("llama"), backend="triton", kv_codec="int8")
    monkeypatch.setattr("quire.tensors.attention.triton.INTERPRETED", False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        LLM(checkpoint("llama"), backend="triton")
