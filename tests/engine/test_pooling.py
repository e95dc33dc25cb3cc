"""Embeddings: what transformers' own hidden states come to, with bits that depend on the prompt alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams
from quire.errors import CacheTooSmallError, InvalidRequestError
from quire.params import Pooling
from tests.engine.conftest import Checkpoint

PROMPTS = [[5 + (i * i * 7 + 3 * i + n) % 180 for i in range(n)] for n in (1, 7, 40, 90)]
BOTH: tuple[Pooling, Pooling] = ("mean", "last")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_close_to_transformers(checkpoint: Checkpoint, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32)
    with LLM(checkpoint(family), max_tokens_per_step=24) as llm:
        for pooling in BOTH:
            found = llm.embed(PROMPTS, pooling=pooling, normalize=False)
            for prompt, vector in zip(PROMPTS, found, strict=True):
                with torch.no_grad():
                    states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].double()
                wanted = states.mean(0) if pooling == "mean" else states[-1]
                assert vector.dtype == torch.float32 and torch.allclose(vector.double(), wanted, atol=2e-5)
        assert torch.allclose(llm.embed(PROMPTS).norm(dim=1), torch.ones(len(PROMPTS)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_depend_on_the_prompt_alone(checkpoint: Checkpoint, dtype: str) -> None:
    with LLM(checkpoint("gemma3_text"), dtype=dtype, prefix_sharing=False) as llm:
        alone = {pooling: [llm.embed(prompt, pooling=pooling) for prompt in PROMPTS] for pooling in BOTH}
    with LLM(checkpoint("gemma3_text"), dtype=dtype, max_tokens_per_step=16, page_size=4, max_sequences=3) as llm:
        params = SamplingParams(max_tokens=12, pooling="mean", seed=1, logprobs=0, prompt_logprobs=0)
        for _ in range(2):  # the second time there is something to hit
            streams = [llm.submit(prompt, SamplingParams(max_tokens=0, pooling=pooling)) for prompt in PROMPTS for pooling in BOTH]
            others = [llm.submit(prompt, params) for prompt in PROMPTS]
            found = [stream.wait().raise_for_error() for stream in streams]
            for i, prompt in enumerate(PROMPTS):
                for j, pooling in enumerate(BOTH):
                    output = found[2 * i + j]
                    assert output.embedding.equal(llm.embed(prompt, pooling=pooling, normalize=False)[0])
                    assert (output.embedding / output.embedding.norm()).allclose(alone[pooling][i][0], atol=1e-6)
                    assert llm.embed(prompt, pooling=pooling).equal(alone[pooling][i])
                    assert output.outputs[0].token_ids == [] and output.outputs[0].finish_reason == "length"
                also = others[i].wait().raise_for_error()
                assert also.embedding.equal(found[2 * i].embedding) and len(also.outputs[0].token_ids) == 12
                assert also.prompt_logprobs is not None and len(also.prompt_logprobs) == len(prompt)
        assert found[-1].receipt.cached_tokens > 0 and found[-2].receipt.cached_tokens == 0, "the last token's state may follow a hit, a mean may not"
        llm.check_integrity()


@pytest.mark.parametrize("n", [2, 3])
def test_no_row_of_logits_is_anothers_beside_prompts_that_draw_nothing_and_several(checkpoint: Checkpoint, n: int) -> None:
    """As many rows too few, of prompts that are pooled alone, as too many, of one for n sequences: their number says nothing."""
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0)
    asked = [SamplingParams(max_tokens=0, pooling="mean")] * (n - 1) + [params, replace(params, n=n), params]
    prompts = [[20 + i, 7, 30 + i] for i in range(len(asked))]
    with LLM(checkpoint("llama"), prefix_sharing=False) as llm:
        alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, asked, strict=True)]
        together = llm._worker.call(lambda: [llm.submit(prompt, one) for prompt, one in zip(prompts, asked, strict=True)])  # in one step
        for wanted, stream in zip(alone, together, strict=True):
            assert stream.wait(60).raise_for_error().outputs == wanted.outputs


def test_the_same_after_a_preemption(checkpoint: Checkpoint) -> None:
    params = SamplingParams(max_tokens=40, pooling="mean", temperature=0.0, ignore_eos=True)
    with LLM(checkpoint("llama"), page_size=4) as llm:
        wanted = [llm.generate(prompt, params)[0] for prompt in PROMPTS]
        enough = 160 * llm.info.bytes_per_token
    with LLM(checkpoint("llama"), page_size=4, max_tokens_per_step=16, cache_bytes=enough) as llm:
        found = llm.generate(PROMPTS, params)
        assert llm.stats()["num_preemptions"] > 0
    for one, other in zip(wanted, found, strict=True):
        assert one.embedding.equal(other.embedding) and one.outputs[0].token_ids == other.outputs[0].token_ids


@pytest.mark.parametrize("pooling", BOTH)
def test_a_prompt_is_scored_and_pooled_wherever_steps_cut_it(checkpoint: Checkpoint, pooling: Pooling) -> None:
    """The last token is scored in the step before its own, where that is one of one token."""
    params = SamplingParams(max_tokens=0, pooling=pooling, prompt_logprobs=0)
    answers = []
    for budget in (512, 13, 1):  # 40 is 3 x 13 and one more
        with LLM(checkpoint("llama"), max_tokens_per_step=budget) as llm:
            answers.append(llm.generate(PROMPTS[2], params)[0].raise_for_error())
    for answer in answers:
        assert answer.embedding is not None and answer.embedding.equal(answers[0].embedding)
        assert answer.prompt_logprobs == answers[0].prompt_logprobs and answer.outputs[0].finish_reason == "length"


def test_every_token_is_computed_where_no_layer_sees_all(checkpoint: Checkpoint) -> None:
    """At the beginning of a chunk nothing before it is seen, and all of it is a hit without a page: not where each token is scored or in a mean."""
    every = {"layer_types": ["chunked_attention"] * 2, "no_rope_layers": [1, 1], "attention_chunk_size": 16}
    params = SamplingParams(max_tokens=0, pooling="mean", prompt_logprobs=0)
    answers = []
    for sharing in (True, False):
        with LLM(checkpoint("llama4_text", **every), page_size=8, prefix_sharing=sharing) as llm:
            answers.append([output.raise_for_error() for output in llm.generate(PROMPTS[1:], params)])
    for one, other in zip(*answers, strict=True):
        assert one.embedding.equal(other.embedding) and one.prompt_logprobs == other.prompt_logprobs is not None


def test_what_is_refused(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama")) as llm:
        with pytest.raises(InvalidRequestError, match="pooling='max'"):
            llm.embed("the", pooling="max")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="prompt"):
            llm.embed([[]])
        assert llm.embed([]).shape == (0, llm.info.hidden_size)
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        SamplingParams(max_tokens=0)


@pytest.mark.parametrize("pooling", BOTH)
def test_a_prompt_of_a_page_and_a_token_takes_two_pages(checkpoint: Checkpoint, pooling: Pooling) -> None:
    """All tokens are computed, the last too: where one page is all there is, the request is refused before it can stop the engine."""
    with LLM(checkpoint("llama"), page_size=4) as llm:
        page_bytes = llm.info.page_bytes
    with LLM(checkpoint("llama"), page_size=4, cache_bytes=page_bytes) as llm:
        assert llm.embed([3, 4, 5, 6], pooling=pooling).shape[0] == 1
        with pytest.raises(CacheTooSmallError):
            llm.embed([3, 4, 5, 6, 7], pooling=pooling)
        assert llm.embed([3, 4, 5], pooling=pooling).shape[0] == 1 and llm.failure is None
