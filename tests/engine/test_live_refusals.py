"""What an open engine cannot take of a live model's owner is refused, by name and each time, until it is undone."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from quire import LLM, SamplingParams
from quire.errors import InvalidRequestError, UnsupportedModelError
from quire.faces.slots import Slots
from tests.engine.test_live_changes import Change, a_number, another_hook, epsilon, frequencies
from tests.engine.test_own_modules import PARAMS, PROMPTS, SERVED, H, Own, bits
from tests.tensors.checkpoints import tiny_model


def compiled(model: Any) -> None:
    model.model.layers[0].mlp._compiled_call_impl = lambda x: x  # what nn.Module.compile() leaves there, without its ten seconds


def shorter(model: Any) -> None:
    del model.model.layers[1]


def freed(model: Any) -> None:
    """As FSDP lets a shard's weights go."""
    model.model.layers[0].mlp.up_proj.weight.untyped_storage().resize_(0)


REFUSED: dict[str, Callable[[Any], object]] = {
    "its dtype, .* is another: open it anew": lambda model: model.to(torch.bfloat16),
    "layers 1 of 2 never call the attention interface": shorter,
    "layers.0.mlp is compiled": compiled,
    "the memory of model.layers.0.mlp.up_proj.weight has been freed": freed,
    "layers.0.mlp.gate_proj.weight is on device meta; this engine's is cpu": lambda model: model.model.layers[0].mlp.to("meta"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_an_open_engine_cannot_take_is_refused_each_time(why: str) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    with LLM(model, page_size=16, cache_bytes=2**24) as llm:
        REFUSED[why](model)
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match=why):
                llm.generate(PROMPTS, PARAMS)


def test_a_context_made_shorter_than_what_is_served_is_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    with LLM(model, page_size=16, cache_bytes=2**24) as llm, LLM(model, page_size=16, cache_bytes=2**24, max_model_len=100) as shorter:
        model.config.max_position_embeddings = 1000
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match="^llama: its config has a context of 1000 tokens, and 2048 are served: open it anew"):
                llm.generate(PROMPTS, PARAMS)
        assert all(output.error is None for output in shorter.generate(PROMPTS, PARAMS)), "no more than 100 are served of it"
        model.config.max_position_embeddings = 2048
        assert all(output.error is None for output in llm.generate(PROMPTS, PARAMS))


@pytest.mark.parametrize("config", ["config", "generation_config"])
def test_ends_set_later_in_a_config_end_sequences_or_are_refused(config: str) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    with LLM(model, page_size=16, cache_bytes=2**24) as llm:
        greedy = SamplingParams(max_tokens=6, temperature=0.0)
        before = llm.generate(PROMPTS[-1], greedy)[0].outputs[0]
        place = next(i for i in range(1, 6) if before.token_ids[i] not in before.token_ids[:i])
        getattr(model, config).eos_token_id = [2, before.token_ids[place]]
        after = llm.generate(PROMPTS[-1], greedy)[0].outputs[0]
        assert (after.token_ids, after.finish_reason) == (before.token_ids[: place + 1], "stop") and before.finish_reason == "length"
    with LLM(model, page_size=16, cache_bytes=2**24) as llm:
        model.generation_config.eos_token_id = "</s>"  # type: ignore[union-attr]
        with pytest.raises(UnsupportedModelError, match="eos_token_id='</s>'"):
            llm.generate(PROMPTS, PARAMS)


def test_an_engine_goes_on_with_programs_after_a_refusal() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    with LLM(model, page_size=16, cache_bytes=2**24) as llm:
        before, head = bits(llm, PROMPTS), model.lm_head
        model.lm_head = nn.Linear(H, 500, bias=False)
        with pytest.raises(UnsupportedModelError, match="its vocabulary"):
            llm.generate(PROMPTS, PARAMS)
        model.lm_head = head
        assert bits(llm, PROMPTS) == before
        lowered = llm._built.model.lowered
        assert lowered is not None and lowered.num_lowered == 2


def test_a_number_that_switches_on_what_is_not_served_is_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    own: Any = Own(lambda x, w, w3: torch.nn.functional.conv1d(x.mT, w[:, :, None]).mT if own.alpha else x)
    own.alpha = 0.0
    model.model.layers[0].mlp = own
    with LLM(model, page_size=16, cache_bytes=2**24) as llm:
        bits(llm, PROMPTS)
        own.alpha = 0.5
        with pytest.raises(UnsupportedModelError, match="Own calls convolution"):
            llm.generate(PROMPTS, PARAMS)


def test_what_is_put_around_a_convolution_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros at first show in no bit, and later nobody asks."""
    forward = Lfm2ShortConv.forward

    @functools.wraps(forward)
    def steered(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) + self.steering

    monkeypatch.setattr(Lfm2ShortConv, "forward", steered)
    model: Any = tiny_model("lfm2")
    for i in (0, 2):
        model.model.layers[i].conv.steering = nn.Parameter(torch.zeros(H))
    with pytest.raises(UnsupportedModelError, match="layers 0, 2 of 3 never call .* a convolution by transformers' own forward .* wrapped"):
        LLM(model)


@pytest.mark.parametrize("change", [epsilon, another_hook, a_number, frequencies])
def test_held_sequences_refuse_a_change_between_two_steps(change: Change) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    changing = change(model)
    next(changing)
    slots = Slots(model, 2, page_size=16, cache_bytes=2**24)
    slots.insert(slots.prefill(PROMPTS[-1]), 0)
    slots.generate()
    next(changing, None)
    with pytest.raises(InvalidRequestError, match="other weights"):
        slots.generate()


def test_forms_do_not_outlive_what_they_tell_of() -> None:
    """A verdict that is kept keeps no weight."""
    model = tiny_model("llama", num_hidden_layers=2)
    with LLM(model, page_size=16, cache_bytes=2**24) as llm:
        gone = []
        mlp = model.model.layers[0].mlp
        for name in ("@", "mm", "inner"):
            model.model.layers[0].mlp = Own(SERVED[name])
            gone.append(weakref.ref(model.model.layers[0].mlp.w))
            bits(llm, PROMPTS[:1])
        model.model.layers[0].mlp = mlp
        bits(llm, PROMPTS[:1])
        gc.collect()
        assert [ref() for ref in gone] == [None, None, None]
