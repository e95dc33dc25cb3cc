"""Families of models on a device that there is not (tests/tensors/fake_device.py). Run by test_devices.py, in a process apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from quire import LLM, SamplingParams
from tests.engine.conftest import Checkpoint
from tests.tensors.fake_device import FAKE, install

install()

PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=0)
FEW = dataclasses.replace(PARAMS, max_tokens=3)
PROMPTS = [list(range(5, 5 + count)) for count in (3, 13, 7)]
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },  # the second prompt leaves it
    "lfm2": {"num_hidden_layers": 1, "layer_types": ["conv"]},
}


def test_together_in_chunks_and_preempted_as_alone_and_as_on_the_cpu(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama", num_hidden_layers=2)
    with LLM(folder, backend="reference", page_size=4) as llm:
        expected, page_bytes = [output.outputs[0] for output in llm.generate(PROMPTS, PARAMS)], llm.info.page_bytes
    with LLM(folder, device="fake", page_size=4, max_tokens_per_step=8, max_sequences=2, cache_bytes=16 * page_bytes) as llm:
        assert (llm.info.device, llm.info.backend) == ("fake:0", "triton (interpreted)")
        assert llm.info.layers == "plain, steps of up to 8 tokens captured"
        alone = [llm.generate(prompt, PARAMS, namespace="alone")[0].outputs for prompt in PROMPTS]
        for (own,), other in zip(alone, expected, strict=True):
            assert own.token_ids == other.token_ids and own.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        running = []
        for prompt in (PROMPTS[1], PROMPTS[0]):
            running.insert(0, llm.submit(prompt, PARAMS))
            next(iter(running[0]))
        running.append(llm.submit(PROMPTS[2], PARAMS, priority=1))
        assert [one.wait(60).outputs for one in running] == alone and llm.stats()["num_preemptions"] == 1
        hit = llm.generate([*PROMPTS[1], expected[1].token_ids[0]], SamplingParams(max_tokens=5, temperature=0.0, logprobs=0, ignore_eos=True))[0]
        assert hit.receipt.cached_tokens and hit.outputs[0].logprobs == alone[1][0].logprobs[1:]
        llm.check_integrity()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    ("family", "quantization", "told"),
    [
        ("gemma3_text", "int8", "plain, steps of up to 8 tokens captured"),
        ("gpt2", "int4", "plain"),
        ("lfm2", "none", "plain, steps of up to 8 tokens captured"),
        ("mixtral", "none", "plain, no step captured (RuntimeError: nonzero: called a synchronizing operation)"),
    ],
)
def test_families(checkpoint: Checkpoint, family: str, quantization: str, told: str) -> None:
    """Windows; layer norms, and weights the other way round; a convolution; experts, of which alone steps wait more than once, to learn which tokens
    are theirs, so that no graph can hold them.

    One layer where all are alike: of several, above.
    """
    folder = checkpoint(family, **CHANGES.get(family, {"num_hidden_layers": 1}))
    with LLM(folder, backend="reference", quantization=quantization, page_size=4) as llm:
        expected = [output.outputs[0] for output in llm.generate(PROMPTS[:2], FEW)]
    options = {"page_size": 4, "quantization": quantization, "max_tokens_per_step": 8, "cache_bytes": 2**20, "enforce_eager": told == "plain"}
    with LLM(folder, device="fake", **options) as llm:
        assert llm.info.layers == told
        (own,) = llm.generate(PROMPTS[1], FEW, namespace="alone")[0].outputs
        FAKE.waits.clear()
        together = [output.outputs[0] for output in llm.generate(PROMPTS[:2], FEW)]
        assert set(FAKE.waits) == {"synchronize"} or family == "mixtral"
        assert together[1] == own
        for ours, theirs in zip(together, expected, strict=True):
            assert ours.token_ids == theirs.token_ids and ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
