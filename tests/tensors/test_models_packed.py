"""A model whose weights are packed at load: the bits of the same model with plain weights; quantised, close to it; its own forward still runs."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quire.errors import ConfigError, ProbeMismatchError, UnsupportedModelError
from quire.tensors.host import room
from quire.tensors.models.load import load_model
from quire.tensors.models.model import CausalModel
from quire.tensors.models.packing import pack_weights
from quire.tensors.models.probe import probe
from quire.tensors.packed import PackedWeight
from quire.tensors.products import ReferenceProducts
from tests.tensors.checkpoints import make, one_thread, tiny_model
from tests.tensors.test_models import ids, packed

pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.tensors.native_products import NativeProducts

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def load(folder: str, quantization: str = "none", products: NativeProducts | ReferenceProducts | None = None) -> CausalModel:
    products = products or NativeProducts(2)
    return load_model(folder, dtype="auto", trust_remote_code=False, revision=None, products=products, quantization=quantization)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gpt_oss", "phi3", "gpt2", "mixtral", "deepseek_v3", "llama4_text"])
def test_the_bits_of_plain_weights(family: str, tmp_path: Path) -> None:
    dtype = torch.float32 if family in ("gpt_oss", "llama4_text") else torch.bfloat16
    folder = make(tmp_path, family, dtype)
    model = load(folder)
    probe(model)
    plain = CausalModel(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), NativeProducts(1), name=folder, identity="", live=False)
    plain.everywhere = model.everywhere
    sequences = [ids(1, 40), ids(2, 1), ids(3, 9)]
    for got, expected in zip(packed(model, sequences), packed(plain, sequences), strict=True):
        assert torch.equal(got, expected)
    kinds = [module for module in model.transformers_model.modules() if type(module) in (nn.Linear, Conv1D)]
    assert kinds and all(isinstance(module._parameters["weight"], PackedWeight) for module in kinds)
    assert model.weight_bytes >= 0.7 * plain.weight_bytes


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral", "gemma3_text"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_is_close(family: str, quantization: str, tmp_path: Path) -> None:
    folder = make(tmp_path, family, hidden_size=128, n_embd=128)
    plain, model = load(folder), load(folder, quantization)
    report = probe(model)
    assert report.max_error < 1e-3 and model.identity != plain.identity
    sequence = ids(1, 30)
    got, expected = (packed(x, [sequence])[0].log_softmax(-1) for x in (model, plain))
    divergence = (expected.exp() * (expected - got)).sum(-1).mean()
    told = (expected.exp() * (expected + math.log(expected.shape[-1]))).sum(-1).mean()  # what a model that knows nothing diverges by
    assert 0 < divergence < {"int8": 0.02, "int4": 0.3 * told}[quantization]
    reference = load(folder, quantization, ReferenceProducts())
    probe(reference)
    assert (packed(reference, [sequence])[0] - packed(model, [sequence])[0]).abs().max() < 1e-2


def test_an_embedding_that_is_the_head_is_packed_once(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama", tie_word_embeddings=True)
    model = load(folder).transformers_model
    head = model.lm_head._parameters["weight"]
    assert isinstance(head, PackedWeight) and model.model.embed_tokens._parameters["weight"] is head
    untied = load(make(tmp_path, "llama")).transformers_model
    assert type(untied.model.embed_tokens.weight) is nn.Parameter


def test_the_model_runs_by_itself(tmp_path: Path) -> None:
    folder = make(tmp_path, "gpt2")
    model = load(folder).transformers_model
    own = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        sequence = ids(1, 9)[None]
        assert torch.allclose(model(sequence).logits, own(sequence).logits, atol=1e-3)
    with pytest.raises(RuntimeError, match=r"transformer\.h\.0\.attn\.c_attn\.weight is packed"):
        model.transformer.h[0].attn.c_attn.weight + 1


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/proc/self/smaps").exists(), reason="Linux tells what memory is made of")
def test_weights_lie_where_huge_pages_may_be() -> None:
    """In memory of this process alone: what is shared, even if with nobody, has huge pages on few systems."""
    memory, flags = room(1 << 22), None
    address = memory.fill_(1).data_ptr()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if last:
            here = int(first, 16) <= address < int(last, 16)
        elif here and first == "VmFlags:":
            flags = line.split()[1:]
    assert flags is not None and "hg" in flags and "sh" not in flags


def test_a_weight_with_other_readers_stays(tmp_path: Path) -> None:
    model = tiny_model("llama")
    other = nn.Module()
    other.weight = model.model.layers[0].mlp.up_proj.weight
    model.other = other
    pack_weights(model, NativeProducts(1), "none")
    assert type(other.weight) is nn.Parameter and model.model.layers[0].mlp.up_proj.weight is other.weight
    assert isinstance(model.model.layers[1].mlp.up_proj._parameters["weight"], PackedWeight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_router_that_converts_its_weight_at_every_call(dtype: torch.dtype, tmp_path: Path) -> None:
    """LongCat's, and then torch would multiply by it: the product is found and served."""
    heads = {
        "num_key_value_heads": 4,
        "num_layers": 2,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "v_head_dim": 16,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
    }
    experts = {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 36, "ffn_hidden_size": 100}
    model = load(make(tmp_path, "longcat_flash", dtype, qk_rope_head_dim=8, qk_nope_head_dim=16, **heads, **experts))
    assert probe(model).everywhere
    text = ids(1, 40)
    (alone,) = packed(model, [text])
    for length in (1, 2, 3, 17, 39):
        assert torch.equal(packed(model, [text[:length]])[0], alone[:length])


def test_weights_in_double_are_refused_before_they_are_packed(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama", torch.float64)
    with pytest.raises(UnsupportedModelError, match=r"llama: its weights are torch\.float64; served are torch\.float32"):
        load(folder)
    assert load_model(folder, dtype="float32", trust_remote_code=False, revision=None, products=NativeProducts(1)).dtype == torch.float32


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization='int8': a live model's weights are its owner's"):
        load_model(tiny_model("llama"), dtype="auto", trust_remote_code=False, revision=None, products=NativeProducts(1), quantization="int8")
    bare = tiny_model("llama")
    for module in bare.modules():
        if isinstance(module, nn.Linear):
            module.forward = module.forward
            module.__class__ = type("Own", (nn.Linear,), {"forward": lambda self, x: x})
    with pytest.raises(UnsupportedModelError, match="quantization='int4': none of its weights is a linear layer's"):
        pack_weights(bare, NativeProducts(1), "int4")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_an_element_that_no_code_stands_for_is_refused(tmp_path: Path, quantization: str) -> None:
    """Its span's scale is NaN; the codes alone are numbers, of which the probe would find nothing wrong."""
    for element in (math.nan, math.inf, -math.inf):
        model = tiny_model("llama", torch.bfloat16)
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = element
        model.save_pretrained(tmp_path / str(element))
        with pytest.raises(ProbeMismatchError, match="its own forward gives logits that are NaN or infinite"):
            probe(load(str(tmp_path / str(element)), quantization=quantization))
