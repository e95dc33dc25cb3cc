"""Whatever a live model's owner changes between two requests: an open engine gives what one opened on the changed model gives, alone and together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from quire import LLM, SamplingParams
from quire.tensors.models.exact import VECTOR
from tests.engine.test_own_modules import PROMPTS, H, alone, anew, bits
from tests.tensors.checkpoints import tiny_model

# What lies before the last layer's attention, so that cached pages would tell.
Change = Callable[[Any], Iterator[None]]  # makes a model what it is to be at first, and then, when asked to go on, changes it
RANDOM = [torch.randn(H, H, generator=torch.Generator().manual_seed(seed)) / 8 for seed in range(3)]


def drawn(llm: LLM, hits: bool | None = None) -> list[object]:
    """What follows the prompts, which are taken from the cache where they are in it. `hits`: whether the last of them must be."""
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=3, temperature=0.0, logprobs=0, ignore_eos=True))
    assert hits is None or hits == (outputs[-1].receipt.cached_tokens > 0)
    return [(output.raise_for_error().outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


def in_place(model: Any) -> Iterator[None]:
    yield
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(RANDOM[0])


def a_fused_optimizer(model: Any) -> Iterator[None]:
    """Whose writes torch does not count."""
    yield
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    weight.grad, version = RANDOM[0].clone(), weight._version
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()
    weight.grad = None
    assert weight._version == version


def another_parameter(model: Any) -> Iterator[None]:
    yield
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(RANDOM[0].clone())


def loaded(model: Any) -> Iterator[None]:
    yield
    model.load_state_dict(tiny_model("llama", seed=1, num_hidden_layers=2).state_dict())


def loaded_by_assignment(model: Any) -> Iterator[None]:
    yield
    model.load_state_dict(tiny_model("llama", seed=1, num_hidden_layers=2).state_dict(), assign=True)


def at_the_same_address(model: Any) -> Iterator[None]:
    """As a trainer lets an engine's weights go to have room, and puts others in their place."""
    weight, memory = model.model.embed_tokens.weight, bytearray(600 * H * 4)  # the allocator's, which gives the same once more
    random = torch.randn(2, 600, H, generator=torch.Generator().manual_seed(5))
    weight.data = torch.frombuffer(memory, dtype=torch.float32).view(600, H).copy_(random[0])
    yield
    before = weight.data_ptr(), weight._version
    weight.data = torch.empty(0)
    weight.data = torch.frombuffer(memory, dtype=torch.float32).view(600, H).copy_(random[1])
    assert (weight.data_ptr(), weight._version) == before


def turned(model: Any) -> Iterator[None]:
    """The same memory, read the other way."""
    yield
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.detach().t())


def epsilon(model: Any) -> Iterator[None]:
    yield
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def scaling(model: Any) -> Iterator[None]:
    yield
    model.model.layers[0].self_attn.scaling *= 3


def activation(model: Any) -> Iterator[None]:
    yield
    model.model.layers[0].mlp.act_fn = nn.GELU()


def frequencies(model: Any) -> Iterator[None]:
    yield
    model.model.rotary_emb.inv_freq /= 4


def layers_swapped(model: Any) -> Iterator[None]:
    yield
    mlps = [layer.mlp for layer in model.model.layers]
    for layer, mlp in zip(model.model.layers, mlps[::-1], strict=True):
        layer.mlp = mlp


def steering(vector: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda module, args, out: out + vector


def another_hook(model: Any) -> Iterator[None]:
    hook = model.model.layers[0].mlp.register_forward_hook(steering(RANDOM[0][0]))
    yield
    hook.remove()
    model.model.layers[0].mlp.register_forward_hook(steering(RANDOM[1][0]))


def scaled_forward(mlp: nn.Module, scale: float) -> Callable[..., torch.Tensor]:
    return lambda x: type(mlp).forward(mlp, x) * scale  # type: ignore[no-any-return, operator]


def another_wrapper(model: Any) -> Iterator[None]:
    mlp = model.model.layers[0].mlp
    mlp.forward = scaled_forward(mlp, 0.5)
    yield
    mlp.forward = scaled_forward(mlp, 2.0)


def a_wrapper_of_what_multiplies(model: Any) -> Iterator[None]:
    norm = model.model.layers[0].post_attention_layernorm
    yield
    norm.forward = lambda x: type(norm).forward(norm, x) @ RANDOM[0]


def a_class(model: Any) -> Iterator[None]:
    mlp = model.model.layers[0].mlp

    class Patched(type(mlp)):  # type: ignore[misc]
        pass

    Patched.__module__ = type(mlp).__module__
    for layer in model.model.layers:
        layer.mlp.__class__ = Patched
    yield
    Patched.forward = lambda self, x: self.down_proj(self.up_proj(x))


def a_parametrization(model: Any) -> Iterator[None]:
    class Halved(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    yield
    parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", Halved())


class LowRank(nn.Module):
    """As adapters wrap a layer."""

    on = True

    def __init__(self, base: nn.Linear, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.base, self.scale, self.names = base, -1.0, ["first"]
        self.unseen = [nn.Linear(base.in_features, 3, bias=False)]  # not registered, so that no optimizer sees it
        self.unseen[0].weight.data = torch.randn(3, base.in_features, generator=random)
        self.b = nn.Parameter(torch.randn(base.out_features, 3, generator=random) / 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x)
        return out + (self.unseen[0](x) @ self.b.T) * self.scale if self.on and "first" in self.names else out


def adapt(model: Any, seed: int = 0) -> LowRank:
    adapter = LowRank(model.model.layers[0].mlp.up_proj, seed)
    model.model.layers[0].mlp.up_proj = adapter
    return adapter


def an_adapter(model: Any) -> Iterator[None]:
    yield
    adapt(model)


def an_adapter_taken_out(model: Any) -> Iterator[None]:
    adapter = adapt(model)
    yield
    model.model.layers[0].mlp.up_proj = adapter.base


def another_adapter(model: Any) -> Iterator[None]:
    adapter = adapt(model)
    yield
    model.model.layers[0].mlp.up_proj = adapter.base
    adapt(model, seed=1)


def a_number(model: Any) -> Iterator[None]:
    adapter = adapt(model)
    yield
    adapter.scale = -2.0  # which has the hash of -1


def a_name(model: Any) -> Iterator[None]:
    adapter = adapt(model)
    yield
    adapter.names.clear()


def a_flag_of_a_class(model: Any) -> Iterator[None]:
    class Mine(LowRank):
        pass

    adapt(model).__class__ = Mine
    yield
    Mine.on = False


def a_tensor_of_a_class(model: Any) -> Iterator[None]:
    class Mine(LowRank):
        signs = torch.ones(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.signs[0]

    adapt(model).__class__ = Mine
    yield
    Mine.signs = torch.full((2,), -1.0)


def a_tensor_beside_the_training_flag(model: Any) -> Iterator[None]:
    layer = model.model.layers[0]
    layer.statistics = torch.zeros(2)
    yield
    model.train()
    layer.statistics, layer.self_attn.scaling = torch.ones(2), 0.5


def a_module_nobody_registered(model: Any) -> Iterator[None]:
    adapter = adapt(model)
    yield
    with torch.no_grad():
        adapter.unseen[0].weight.mul_(-1)


CHANGES: list[Change] = [
    in_place, a_fused_optimizer, another_parameter, loaded, loaded_by_assignment, at_the_same_address, turned, epsilon, scaling, activation,
    frequencies, layers_swapped, another_hook, another_wrapper, a_wrapper_of_what_multiplies, a_class, a_parametrization, an_adapter,
    an_adapter_taken_out, another_adapter, a_number, a_name, a_flag_of_a_class, a_tensor_of_a_class,
    a_tensor_beside_the_training_flag, a_module_nobody_registered,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_an_open_engine_gives_what_a_fresh_one_does(change: Change) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    changing = change(model)
    next(changing)
    with LLM(model, page_size=16, cache_bytes=2**24) as llm:
        before, drawn_before = bits(llm, PROMPTS), drawn(llm)
        assert bits(llm, PROMPTS) == before and drawn(llm) == drawn_before
        next(changing, None)
        drawn_now = drawn(llm)
        fresh: list[list[object]] = []  # whose prompt logprobs leave nothing in its cache
        assert alone(llm) == bits(llm, PROMPTS) == anew(model, lambda other: fresh.append(drawn(other, hits=False))) != before
        assert drawn(llm, hits=True) == drawn_now == fresh[0] != drawn_before


def test_a_hook_of_a_layer_runs_once_and_sees_its_tensors() -> None:
    """That it runs once is what the probe asks."""
    model, seen = tiny_model("llama", num_hidden_layers=2), []

    def steered(layer: object, args: object, out: torch.Tensor) -> torch.Tensor:
        seen.append(out)
        return out + 0.5

    for layer in model.model.layers:
        layer.register_forward_hook(steered if layer is model.model.layers[0] else lambda layer, args, out: seen.append(out))
    with LLM(model, cache_bytes=2**24) as llm:
        assert llm.info.layers == "2 of 2 as programs"
        drawn(llm)
    assert all(isinstance(out, torch.Tensor) for out in seen)


def test_a_hook_of_all_modules_runs_once_for_each_and_may_steer() -> None:
    """torch calls it for every module there is: of a model that is opened with it, and of one that has been open before."""
    model, seen = tiny_model("llama", num_hidden_layers=2), list[nn.Module]()

    def steered(module: nn.Module, args: object, out: Any) -> torch.Tensor | None:
        seen.append(module)
        return out + 0.5 if module is model.model.layers[0] else None

    with LLM(model, cache_bytes=2**24) as llm:
        before, hook = drawn(llm), nn.modules.module.register_module_forward_hook(steered)
        try:
            with LLM(model, cache_bytes=2**24) as fresh:
                assert drawn(llm) == drawn(fresh) != before
                seen.clear()
                fresh.generate([[5, 6, 7]], SamplingParams(max_tokens=1))
                assert all(seen.count(module) == 1 for module in model.modules() if not isinstance(module, nn.ModuleList))
        finally:
            hook.remove()
        assert drawn(llm) == before


def test_a_softcap_put_into_the_config_later() -> None:
    """Its tanh runs over all rows of logits at once, so from then on there are as many as whole vectors have."""
    model = tiny_model("gemma2", num_hidden_layers=3, final_logit_softcapping=None, vocab_size=601)
    with LLM(model, page_size=16, cache_bytes=2**24) as llm:
        before = bits(llm, PROMPTS)
        model.config.final_logit_softcapping = 30.0
        assert alone(llm) == bits(llm, PROMPTS) == anew(model) != before
        assert llm._built.model._logits_multiple == VECTOR


@pytest.mark.parametrize("late", ["hook", "wrapped"])
def test_what_a_closure_switches_on_leaves_no_trace_and_is_exact_all_the_same(late: str) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    mlp, state = model.model.layers[0].mlp, {"on": False}
    if late == "hook":
        mlp.register_forward_hook(lambda module, args, out: out + torch.bmm(out, RANDOM[0][None]) if state["on"] else out)
    else:
        mlp.forward = lambda x: type(mlp).forward(mlp, torch.bmm(x, RANDOM[0][None]) if state["on"] else x)
    with LLM(model, page_size=16, cache_bytes=2**24) as llm:
        before = bits(llm, PROMPTS)
        state["on"] = True
        llm.reset_cache()
        assert alone(llm) == bits(llm, PROMPTS) == anew(model) != before
