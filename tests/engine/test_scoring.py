"""Logprobs of prompts, scaled logprobs and returned logits, against the model's own forward and against what was drawn."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams
from quire.errors import InvalidRequestError
from quire.outputs import RequestOutput
from tests.engine.conftest import Checkpoint

rng = random.Random(3)
PROMPTS = [[rng.randrange(3, 180) for _ in range(n)] for n in (2, 17, 60, 201)]


def scores(output: RequestOutput) -> list[float]:
    assert output.error is None and output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    return [logprob for logprob in output.prompt_logprobs[1:] if logprob is not None]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_prompt_is_scored_as_the_model_itself_would(checkpoint: Checkpoint, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    with LLM(checkpoint(family), max_tokens_per_step=50) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=2))
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            with torch.no_grad():
                expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), dim=-1)
            assert scores(output) == pytest.approx([float(expected[i, token]) for i, token in enumerate(prompt[1:])], abs=1e-4)
            assert output.prompt_top_logprobs is not None and output.prompt_top_logprobs[0] is None
            for i, top in enumerate(output.prompt_top_logprobs[1:]):
                assert top is not None and top[0].logprob == pytest.approx(float(expected[i].max()), abs=1e-4) and len(top) == 2
        llm.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_was_drawn_is_scored_with_the_same_bits(checkpoint: Checkpoint, dtype: torch.dtype, temperature: float) -> None:
    """Drawn in company from cached pages, then scored alone, in chunks of another size."""
    params = [SamplingParams(max_tokens=20, temperature=temperature, seed=i, logprobs=0, scaled_logprobs=True, ignore_eos=True) for i in range(4)]
    score = SamplingParams(max_tokens=0, temperature=temperature, prompt_logprobs=0, scaled_logprobs=True)
    with LLM(checkpoint(dtype=dtype)) as llm, LLM(checkpoint(dtype=dtype), max_tokens_per_step=7, page_size=4) as other:
        llm.generate(PROMPTS, params)
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
            drawn = output.outputs[0]
            (scored,) = other.generate([prompt + drawn.token_ids], score)
            assert scores(scored)[-20:] == drawn.logprobs
            assert scored.outputs[0].token_ids == [] and scored.outputs[0].finish_reason == "length"
        other.check_integrity()


def test_scores_survive_preemption(checkpoint: Checkpoint) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0, prompt_logprobs=1, ignore_eos=True)
    prompts = [[3 + (i * i * (7 + seed)) % 170 for i in range(60)] for seed in range(4)]
    with LLM(checkpoint(), page_size=4) as llm:
        alone, page_bytes = llm.generate(prompts, params), llm.info.page_bytes
    with LLM(checkpoint(), page_size=4, cache_bytes=page_bytes * 60, max_tokens_per_step=32) as llm:
        tight = llm.generate(prompts, params)
        assert llm.stats()["num_preemptions"] > 0
        assert [(one.prompt_logprobs, one.prompt_top_logprobs) for one in tight] == [(one.prompt_logprobs, one.prompt_top_logprobs) for one in alone]
        assert [one.outputs for one in tight] == [one.outputs for one in alone]
        llm.check_integrity()


def test_a_scored_prompt_has_sisters_like_any_other(checkpoint: Checkpoint) -> None:
    params = SamplingParams(max_tokens=6, seed=5, n=3, logprobs=1)
    with LLM(checkpoint()) as llm:
        plain, scored = llm.generate(PROMPTS[2], params)[0], llm.generate(PROMPTS[2], dataclasses.replace(params, prompt_logprobs=0))[0]
        assert scored.outputs == plain.outputs and len(scores(scored)) == 59
        again = llm.generate(PROMPTS[2], dataclasses.replace(params, prompt_logprobs=0))[0]
        assert again.receipt.cached_tokens == 0 and again.prompt_logprobs == scored.prompt_logprobs


def test_returned_logits_are_the_models(checkpoint: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32).eval()
    params = SamplingParams(max_tokens=8, seed=1, n=2, return_logits=True, logit_bias={7: 3.0}, ignore_eos=True)
    with LLM(checkpoint()) as llm:
        (output,) = llm.generate([PROMPTS[1]], params)
        for one in output.outputs:
            with torch.no_grad():
                full = model(torch.tensor([PROMPTS[1] + one.token_ids])).logits[0, len(PROMPTS[1]) - 1 : -1]
            assert one.logits.shape == full.shape and one.logits.dtype == torch.float32 and not one.logits.is_inference()
            torch.testing.assert_close(one.logits, full, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_scored_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        SamplingParams(max_tokens=0)
    with LLM(checkpoint()) as llm, pytest.raises(InvalidRequestError, match="at least 2 tokens"):
        llm.generate([[5]], SamplingParams(max_tokens=0, prompt_logprobs=0))
