"""What the probe leaves out of a checkpoint whose layers are programs, and that a fault in any one layer is caught all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

pytest.importorskip("quire.tensors.native")

from quire.config import EngineConfig
from quire.engine import build
from quire.errors import ProbeMismatchError, UnsupportedModelError
from quire.tensors.models.model import CausalModel
from quire.tensors.models.packing import pack_weights
from quire.tensors.models.probe import _errors, _own_logits, _packed, _sequences, probe
from quire.tensors.models.row_by_row import RowByRow
from quire.tensors.native_products import NativeProducts
from quire.tensors.packed import PackedWeight
from tests.tensors.checkpoints import VOCAB, make, one_thread, tiny_model

__all__ = ["one_thread"]

LENGTHS = [17, 1, 6]


def served(model: Any, *, packs: bool = True) -> CausalModel:
    """As a checkpoint of it is: ours, packed, its layers lowered."""
    products = NativeProducts(2)
    if packs:
        pack_weights(model, products, "none")
    causal = CausalModel(model, products, name="", identity="", live=False)
    causal.lower()
    return causal


def logits(model: CausalModel) -> torch.Tensor:
    ids = torch.randint(3, 60, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return model.forward(RowByRow(LENGTHS), ids, positions, torch.arange(len(ids)))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_one_layer_of_each_program_is_what_a_model_of_one_layer_is(family: str) -> None:
    whole, short = served(tiny_model(family)), tiny_model(family)
    del short.model.layers[1:]
    short.config.num_hidden_layers = 1
    assert whole.lowered is not None and len(whole.lowered.alike) == 2
    before, expected = logits(whole), logits(served(short))
    with whole.lowered.first_of_each():
        assert torch.equal(logits(whole), expected)
    assert torch.equal(logits(whole), before) and not torch.equal(before, expected)


@pytest.mark.usefixtures("one_thread")
def test_layers_of_another_kind_are_not_left_out() -> None:
    """Two with rope and one without: two programs."""
    model = served(tiny_model("smollm3"))
    assert model.lowered is not None and len(model.lowered.alike) == 1


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("at", range(3))
def test_a_layer_that_differs_by_its_number_alone_is_caught(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers look alike and have one program, but the code asks for the number: programs must not give another model's output."""
    forward = LlamaAttention.forward

    def scaled(self: LlamaAttention, *args: Any, **kwargs: Any) -> Any:
        out, *rest = forward(self, *args, **kwargs)
        return (out * 3 if self.layer_idx == at else out), *rest

    monkeypatch.setattr(LlamaAttention, "forward", scaled)
    model = served(tiny_model("llama"))
    assert not model.owned and model.lowered is not None and len(model.lowered.alike) == 2
    with pytest.raises(ProbeMismatchError):
        probe(model)


@pytest.mark.usefixtures("one_thread")
def test_layers_that_share_keys_and_values_stay_plain() -> None:
    """Gemma 3n and 4 carry them from layer to layer in an object among the arguments: a program would not put any in."""
    shared = {"num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "sliding_window": 8}
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    model = served(tiny_model("gemma4_text", layer_types=kinds, head_dim=16, global_head_dim=16, **shared))
    assert model.lowered is not None and "its arguments change" in model.lowered.plain["Gemma4TextDecoderLayer"]
    assert probe(model).max_error < 1e-3


@pytest.mark.usefixtures("one_thread")
def test_a_forward_that_fails_on_several_tokens_is_told() -> None:
    """One token it takes: sizes of 1 go with any other."""
    heads = {"num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "v_head_dim": 16, "head_dim": 8}
    given = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "moe_intermediate_size": 36}
    with pytest.raises(UnsupportedModelError, match="deepseek_v2: its forward fails on several tokens: RuntimeError: The size of tensor"):
        probe(served(tiny_model("deepseek_v2", num_experts_per_tok=2, **heads, **given)))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text"])
def test_the_second_opinion_rounds_nothing_that_is_convolved(family: str) -> None:
    """transformers rounds it to its weight's dtype, which moved experts' ties, and what was quantised, by far more than is right in fp32."""
    model = served(tiny_model(family, torch.bfloat16))
    sequences = _sequences(model)
    with model.with_float_activations():
        errors = _errors(_packed(model, RowByRow, sequences), _own_logits(model, sequences))
    assert float(errors.max()) < 1e-4


class OfTransformers(LlamaMLP):
    """Stands for a family's code: a product that follows the tokens, in no module that Quire would run in exact mode by itself."""

    __module__ = "transformers.models.llama.modeling_llama"
    shift = 0.0
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) / 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x[..., :33]).mean(-1, keepdim=True) * (x @ self.weight) + x.shape[1] * self.shift


class Unseen(OfTransformers):
    """A product that shows in no bit, as one does whose sums torch orders otherwise for more tokens than a probe has."""

    __module__ = "transformers.models.llama.modeling_llama"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + x @ torch.zeros_like(self.weight)


@pytest.mark.usefixtures("one_thread")
def test_a_product_of_torchs_in_a_plain_layer_is_looked_for_by_what_it_is() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = Unseen(model.config)
    model = served(model, packs=False)
    assert not model.owned and model.lowered is not None and model.lowered.num_lowered == 2
    assert probe(model).everywhere


@pytest.mark.usefixtures("one_thread")
def test_layers_that_do_something_else_with_one_token_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are recorded with three and five tokens, so only the model's own forward of one takes the branch."""
    forward = LlamaMLP.forward

    def branching(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        given: torch.Tensor = forward(self, x)
        return given if x.shape[-2] > 1 else given + 1.0

    monkeypatch.setattr(LlamaMLP, "forward", branching)
    model = served(tiny_model("llama"))
    assert model.lowered is not None and len(model.lowered.alike) == 2
    with pytest.raises(ProbeMismatchError):
        probe(model)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("at", range(3))
def test_an_operator_that_depends_on_the_batch_is_caught_in_any_one_layer(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> CausalModel:
        given = tiny_model("llama")
        given.model.layers[at].mlp = OfTransformers(given.config)
        return served(given, packs=False)

    gated = model()
    assert not gated.owned and gated.lowered is not None and gated.lowered.num_lowered == 2
    assert probe(gated).everywhere
    monkeypatch.setattr(OfTransformers, "shift", 1e-7)
    with pytest.raises(UnsupportedModelError, match="even in exact mode"):
        probe(model())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("at", range(3))
def test_a_weight_that_is_not_a_number_is_caught_in_any_one_layer(at: int) -> None:
    model = tiny_model("llama")
    model.model.layers[at].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ProbeMismatchError, match="llama: its own forward gives logits that are NaN or infinite, as of weights that are"):
        probe(served(model))


@pytest.mark.usefixtures("one_thread")
def test_products_are_held_against_torchs_in_one_layer_of_each_program(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[str] = []
    rows = PackedWeight.rows

    def noted(self: PackedWeight, *args: Any) -> torch.Tensor:
        unpacked.append(self.weight_name)
        return rows(self, *args)

    monkeypatch.setattr(PackedWeight, "rows", noted)
    model = served(tiny_model("llama"))
    unpacked.clear()
    probe(model)
    assert {name.split(".")[2] for name in unpacked if ".layers." in name} == {"0"} and "lm_head.weight" in unpacked


@pytest.mark.usefixtures("one_thread")
def test_kernels_that_give_what_torch_does_not_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the model's own forward takes them in the layers that are alike."""
    model = served(tiny_model("llama"))
    packed = NativeProducts.packed
    monkeypatch.setattr(NativeProducts, "packed", lambda self, *args: 2 * packed(self, *args))  # of the head; programs have kernels of their own
    with pytest.raises(ProbeMismatchError):
        probe(model)


def test_a_model_is_probed_as_the_engine_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one torch thread, on whatever thread it is opened, which keeps its own."""
    seen = []
    before = torch.get_num_threads()

    def noted(run: Callable[..., object]) -> Callable[..., object]:
        return lambda *given: (seen.append(torch.get_num_threads()), run(*given))[1]

    for name in ("probe", "measure"):
        monkeypatch.setattr(build, name, noted(getattr(build, name)))
    config = EngineConfig(max_model_len=64)
    build.build_engine(make(tmp_path, "llama"), config).model.close()
    assert seen == [1, 1] and torch.get_num_threads() == before
