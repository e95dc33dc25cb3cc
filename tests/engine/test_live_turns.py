"""Several engines over one live model, at once: each has the bits it has alone, and the model is left as it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import quire
from quire import LLM, PagedCache, SamplingParams, Slots
from quire.outputs import RequestOutput
from tests.tensors.checkpoints import tiny_model

PROMPTS = [[3 + (i * i * 7 + n) % 150 for i in range(n)] for n in (10, 37, 5)]
DRAWN = SamplingParams(max_tokens=12, temperature=1.0, seed=5, logprobs=0, ignore_eos=True)
ROUNDS = 6


def bits(outputs: list[RequestOutput]) -> list[tuple[list[int], list[float] | None]]:
    return [(one.token_ids, one.logprobs) for output in outputs for one in output.raise_for_error().outputs]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_engines_over_one_live_model_take_turns(family: str) -> None:
    model = tiny_model(family)
    before = [{name: value for name, value in module.__dict__.items() if not name.startswith("_")} for module in model.modules()]
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        own = model(tokens).logits
    with LLM(model) as llm:
        alone = bits(llm.generate(PROMPTS, DRAWN))
        greedy = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))[0].outputs[0].token_ids
    slots, pages = Slots(model, 1), PagedCache(model, 4, 16)
    plain = pages.forward(tokens, page_table=torch.arange(4)[None], cache_lens=[0])

    def serve(page_size: int) -> bool:
        with LLM(model, page_size=page_size, max_tokens_per_step=16) as llm:
            return all(bits(llm.generate(PROMPTS, DRAWN)) == alone for _ in range(ROUNDS))

    def fill_slots() -> bool:
        for _ in range(ROUNDS):
            got = [slots.insert(slots.prefill(PROMPTS[0]), 0), *(slots.generate()[0] for _ in range(3))]
            slots.free(0)
            if got != greedy:
                return False
        return True

    def fill_pages() -> bool:
        return all(torch.equal(pages.forward(tokens, page_table=torch.arange(4)[None], cache_lens=[0]), plain) for _ in range(3 * ROUNDS))

    def once() -> bool:
        return quire.generate(model, tokens, max_generated_tokens=4, temperature=0.0)[0][0, -4:].tolist() == greedy

    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(serve, 4), pool.submit(serve, 5), pool.submit(fill_slots), pool.submit(fill_pages), pool.submit(once)]
        assert [one.result() for one in running] == [True] * 5
    slots.close()
    pages.close()
    after = [{name: value for name, value in module.__dict__.items() if not name.startswith("_")} for module in model.modules()]
    assert after == before
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, own)


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}])
@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_an_owner_who_runs_it_meanwhile_is_told(family: str, options: dict[str, bool]) -> None:
    """On a thread of their own, while its layers are ours; a convolution has no attention that would tell."""
    model, told, tokens = tiny_model(family), [""], torch.tensor([PROMPTS[0]])

    def meanwhile(*_: object) -> None:
        if not told:  # once is enough, and their own forward would come here, too
            told.append("")
            with ThreadPoolExecutor(1) as thread:
                told.append(repr(thread.submit(model, tokens).exception()))

    norm = model.model.norm if family == "llama" else model.model.embedding_norm
    with norm.register_forward_pre_hook(meanwhile), LLM(model, **options) as llm:
        told.clear()
        assert llm.generate([PROMPTS[0]], DRAWN)[0].error is None
    assert "run a live model between requests" in told[1]
