"""A live model is its trainer's: between our forwards, and after the last one, nothing of ours is on it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from quire.errors import ConfigError, UnsupportedModelError
from quire.tensors.models.hook import NAME
from quire.tensors.models.load import load_model
from quire.tensors.models.model import CausalModel
from quire.tensors.models.row_by_row import RowByRow
from quire.tensors.products import ReferenceProducts
from tests.tensors.checkpoints import one_thread, tiny_model
from tests.tensors.test_models import ids, load, packed

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["llama", "gpt2", "gemma3_text", "gpt_oss", "qwen3_moe", "llama4_text", "lfm2"]
Snapshot = list[tuple[object, dict[str, Any]]]


def snapshot(model: PreTrainedModel) -> Snapshot:
    """Every module and config of the model with what it holds, one level deep."""
    configs = {id(value): value for module in model.modules() for value in vars(module).values() if isinstance(value, PreTrainedConfig)}
    owners: list[Any] = [*model.modules(), *configs.values()]
    return [(owner, {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(owner).items()}) for owner in owners]


def same(before: Snapshot, after: Snapshot) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        return a is b or (isinstance(a, (str, int, float, bool, list, tuple)) and a == b)

    return len(before) == len(after) and all(a is b and equal(x, y) for (a, x), (b, y) in zip(before, after, strict=True))


def run(model: CausalModel) -> torch.Tensor:
    return packed(model, [ids(1, 30), ids(2, 5)])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_stays_on_the_model(family: str) -> None:
    model = tiny_model(family)
    before = snapshot(model)
    served = load(model)
    assert same(before, snapshot(model))
    run(served)
    assert same(before, snapshot(model))
    served.close()
    assert same(before, snapshot(model)) and model.config._attn_implementation == "eager"


def test_generates_as_before() -> None:
    model = tiny_model("llama")
    prompt = ids(3, 6)[None]

    def generate() -> list[int]:
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8, pad_token_id=0)[0].tolist()  # type: ignore[no-any-return, operator]

    before = generate()
    served = load(model)
    run(served)
    assert generate() == before
    served.close()
    assert generate() == before


def test_a_forward_that_fails_leaves_nothing_either() -> None:
    class Failing(RowByRow):
        def attend(self, layer_idx: int, *tensors: Any) -> torch.Tensor:
            if layer_idx == 1:
                raise KeyError("no page")
            return super().attend(layer_idx, *tensors)

    model = tiny_model("llama").train()
    served = load(model)
    before = snapshot(model)
    with pytest.raises(KeyError):
        served.forward(Failing([3]), ids(1, 3), torch.arange(3), torch.arange(3))
    assert same(before, snapshot(model)) and model.training
    run(served)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trainer_goes_on_between_forwards(family: str) -> None:
    """A step of training gives the same gradients whether or not the model is served, and its new weights are seen at once."""

    def train(model: PreTrainedModel, between: Callable[[], object]) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        tokens = torch.stack([ids(7, 12), ids(8, 12)])
        mask = torch.ones_like(tokens)
        mask[1, :4] = 0
        for _ in range(2):
            between()
            model.train()
            loss = model(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss
            between()
            loss.backward()
            between()
            optimizer.step()
            optimizer.zero_grad()

    plain, live = tiny_model(family, attention_dropout=0.0), tiny_model(family, attention_dropout=0.0)
    for model in (plain, live):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # so that random numbers are not what differs
    train(plain, lambda: None)
    served = load(live)
    untrained = run(served)
    train(live, lambda: run(served))
    assert live.training
    for (name, trained), expected in zip(live.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(trained, expected), name
    fresh = load(copy.deepcopy(live))
    assert torch.equal(run(served), run(fresh)) and not torch.equal(run(served), untrained)
    assert not run(served).is_inference()


def test_training_flags_are_kept_one_by_one() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    seen: list[bool] = []

    class Watching(RowByRow):
        def attend(self, *given: Any) -> torch.Tensor:
            seen.extend(module.training for module in model.modules())
            assert model.config._attn_implementation == NAME
            return super().attend(*given)

    served = load(model)
    served.forward(Watching([2]), ids(1, 2), torch.arange(2), torch.arange(2))
    assert seen and not any(seen)
    assert [module.training for module in model.modules()] == flags


def test_autocast_around_us_changes_nothing() -> None:
    served = load(tiny_model("llama"))
    plain = run(served)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(served), plain)


def test_a_forward_wrapped_by_another_library_is_called_and_put_back() -> None:
    model = tiny_model("llama")
    projection = model.model.layers[0].mlp.down_proj
    calls: list[int] = []

    def wrapped(x: torch.Tensor) -> torch.Tensor:  # what accelerate's hooks do
        calls.append(1)
        out: torch.Tensor = type(projection).forward(projection, x)
        return out

    projection.forward = wrapped
    served = load(model)
    calls.clear()
    before = run(served)
    assert calls and projection.forward is wrapped
    projection.forward = lambda x: wrapped(x)  # and others may come later
    later = projection.forward
    run(served)
    assert projection.forward is later
    del projection.forward
    assert torch.equal(run(load(model)), before)


def test_a_subclass_of_linear_is_not_replaced() -> None:
    class Doubling(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = tiny_model("llama")
    expected = run(load(model))
    old = model.model.layers[0].mlp.down_proj
    new = Doubling(old.in_features, old.out_features, bias=False)
    new.weight.data = old.weight.data / 2
    model.model.layers[0].mlp.down_proj = new
    assert torch.equal(run(load(model)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_is_no_change(family: str) -> None:
    """Neither is a flag of training, the model's own forward, or a trainer's backward."""
    model = tiny_model(family)
    served = load(model)
    run(served)
    model.train()
    model(input_ids=ids(3, 6)[None], use_cache=False).logits.sum().backward()
    assert not served.changed


def test_a_step_of_an_optimizer_of_others_is_no_change() -> None:
    served, other = load(tiny_model("llama")), torch.nn.Linear(2, 2)
    for weight in other.parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(other.parameters(), lr=0.1, fused=True).step()
    assert not served.changed


def test_what_is_a_change() -> None:
    model = tiny_model("deepseek_v3")
    router: Any = next(module for module in model.modules() if "e_score_correction_bias" in module._buffers)
    rotary: Any = next(module for module in model.modules() if "inv_freq" in module._buffers)
    changes: list[Callable[[], object]] = [
        lambda: router.e_score_correction_bias.add_(1),
        lambda: router.register_buffer("e_score_correction_bias", router.e_score_correction_bias.clone()),
        lambda: model.lm_head.weight.detach().mul_(2),
        lambda: rotary.inv_freq.div_(2),  # which no checkpoint keeps
    ]
    for change in changes:
        served = load(model)
        assert not served.changed
        change()
        assert served.changed


def test_options_that_do_not_apply() -> None:
    model = tiny_model("llama")
    assert load(model, "float32").dtype == torch.float32
    with pytest.raises(ConfigError, match="dtype='bfloat16': a live model keeps its own"):
        load(model, "bfloat16")
    with pytest.raises(ConfigError, match="trust_remote_code=True: applies to checkpoints"):
        load_model(model, dtype="auto", trust_remote_code=True, revision=None, products=ReferenceProducts())


def test_another_device_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="on device meta"):
        load(tiny_model("llama").to("meta"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "model.layers.1.self_attn.k_proj"), ("llama", "model.norm"), ("gpt2", "transformer.h.1.mlp.c_proj")]
)
def test_a_weight_of_another_shape_is_named(family: str, name: str) -> None:
    model = tiny_model(family)
    weight = model.get_parameter(f"{name}.weight")
    model.get_submodule(name).weight = torch.nn.Parameter(weight[: len(weight) // 2].clone())
    with pytest.raises(UnsupportedModelError) as error:
        load(model)
    held, wanted = re.escape(str([len(weight) // 2, *weight.shape[1:]])), re.escape(str(list(weight.shape)))
    assert re.search(rf"other shapes than its config: {re.escape(name)}\.weight {held} where the config says {wanted}$", str(error.value))


def test_a_compiled_module_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp._compiled_call_impl = lambda x: x  # what nn.Module.compile() leaves there, without its ten seconds
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp is compiled"):
        load(model)
