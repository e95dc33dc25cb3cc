"""Layers that run in one native call (chain.py): which do, what they give, and what a model that looks in between gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

pytest.importorskip("quire.tensors.native")

from quire import LLM, SamplingParams
from quire.tensors.models.chain import Chains
from tests.engine.conftest import Checkpoint
from tests.tensors.checkpoints import tiny_model

PROMPTS = [[3 + (i * i * 7 + 3 * i + 11 * seed) % 500 for i in range(count)] for seed, count in enumerate((1, 2, 17, 40))]
PARAMS = SamplingParams(max_tokens=4, temperature=0.0, logprobs=0, ignore_eos=True)


def chains_of(llm: LLM) -> Chains:
    lowered = llm._built.model.lowered
    assert lowered is not None
    return lowered.chains


def dissolved(llm: LLM) -> LLM:
    """The same engine, whose layers run one by one."""
    chains = chains_of(llm)
    chains._hold(False)
    chains._chains, chains.seen = [], None
    return llm


def lengths(llm: LLM) -> list[int]:
    return [len(chain.layers) for chain in chains_of(llm)._chains]


def bits(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[object]:
    outputs = [output.raise_for_error().outputs[0] for output in llm.generate(prompts, PARAMS)]
    return [(output.token_ids, output.logprobs) for output in outputs]


# Sliding and full attention take other tables of positions, layers without rope none: a chain ends there.
@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", [3]), ("qwen3", [3]), ("gemma2", [3]), ("gpt2", [3]), ("stablelm", [3]), ("gemma3_text", [2]), ("smollm3", [2])],
)
def test_layers_one_by_one_give_the_same(checkpoint: Checkpoint, family: str, expected: list[int]) -> None:
    dtype = torch.bfloat16
    with LLM(checkpoint(family, dtype)) as chained, LLM(checkpoint(family, dtype)) as plain:
        dissolved(plain)
        first = bits(plain)
        assert bits(chained) == first and bits(chained) == first
        assert lengths(chained) == expected and lengths(plain) == []


def test_other_weights_of_a_live_model_are_taken() -> None:
    model = tiny_model("llama")
    with LLM(model) as llm:
        before = bits(llm)
        assert lengths(llm) == [3]
        last = model.model.layers[2].mlp
        last.up_proj.weight = torch.nn.Parameter(last.up_proj.weight.detach() * 2)
        changed = bits(llm)
        assert lengths(llm) == [3] and changed != before
        with LLM(model) as other:
            assert bits(dissolved(other)) == changed


Look = Callable[[torch.Tensor], object]


def watched(look: Look) -> Any:
    """A model that looks at the hidden states after every layer."""
    model: Any = tiny_model("llama")

    class Watched(type(model.model)):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **others: object) -> BaseModelOutputWithPast:
            hidden = self.embed_tokens(input_ids)
            mask = create_causal_mask(self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=position_ids)
            tables = self.rotary_emb(hidden, position_ids)
            for layer in self.layers:
                hidden = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=tables)
                look(hidden)
            return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    model.model.__class__ = Watched
    return model


def test_a_model_that_looks_in_between_sees_what_is_there() -> None:
    seen: list[float] = []
    with LLM(watched(lambda hidden: seen.append(float(hidden.norm())))) as llm:
        first, norms = bits(llm), list(seen)
        seen.clear()
        llm.reset_cache()
        assert bits(llm) == first and lengths(llm) == []
        assert seen[-12:] == norms[-12:], "the last four steps of three layers"
    with LLM(watched(lambda hidden: None)) as llm:
        assert bits(llm) == first and lengths(llm) == [3]


def test_the_first_forward_may_fail_on_its_way() -> None:
    """What was seen of it is not what the next one does."""
    looks: list[None] | None = None

    def look(hidden: object) -> None:
        if looks is not None:
            looks.append(None)
            if len(looks) == 2:
                raise ValueError("broken")

    with LLM(watched(look)) as llm:
        looks = []
        failed = llm.generate(PROMPTS, PARAMS)
        assert all("broken" in str(output.error) for output in failed) and len(looks) == 2
        first = bits(llm)
        assert lengths(llm) == [3] and bits(dissolved(llm)) == first


def test_a_forward_that_fails_by_itself_leaves_chains_as_they_are() -> None:
    broken = False

    def look(hidden: object) -> None:
        if broken:
            raise ValueError("broken")

    with LLM(watched(look)) as llm:
        first = bits(llm)
        broken = True
        failed = llm.generate(PROMPTS, PARAMS)
        assert all("broken" in str(output.error) for output in failed)
        broken = False
        assert bits(llm) == first and lengths(llm) == [3]
