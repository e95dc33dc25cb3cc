"""What cannot be served is refused when it is loaded, and the reason is in the message."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, BertLMHeadModel, LlamaForSequenceClassification, LlamaModel, T5Config, T5ForConditionalGeneration

from quire import LLM
from quire.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from quire.tensors.models.load import load_model
from quire.tensors.models.model import CausalModel
from quire.tensors.models.probe import probe
from quire.tensors.products import ReferenceProducts
from tests.tensors.checkpoints import BASE, VOCAB, make, one_thread, tiny_model
from tests.tensors.test_models import load

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = ["linear_attention", "linear_attention", "full_attention"]
FAMILIES: list[tuple[str, dict[str, Any], str]] = [
    ("falcon", {}, "falcon: no layer had called transformers' attention interface"),
    ("bloom", {"n_layer": 3, "n_head": 4}, "bloom: .*takes no position_ids"),
    ("gptj", {"n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8}, "gptj: .*never calls transformers' attention interface"),
    ("mamba", {}, "mamba: "),
    ("jamba", {}, r"jamba: model.layers.0.mamba \(JambaMambaMixer\) is a recurrent layer, whose state would leak between sequences"),
    ("minimax", {"layer_types": LINEAR, "head_dim": 16, "num_local_experts": 4}, "minimax: layers 0, 1 of 3 never call the attention interface"),
    ("gpt2", {"add_cross_attention": True}, "gpt2: has cross-attention"),
    ("doge", {}, "attention mask of its own"),
    ("diffllama", {}, "diffllama: layers 0, 1, 2 run attention more than once"),
    ("llama", {"layer_types": ["conv", "full_attention", "conv"]}, "llama: layer 0 is of kind conv but calls attention"),
    ("roberta", {"is_decoder": True}, "roberta: .* its own positions do not begin at 0"),
]


@pytest.mark.parametrize(("family", "changes", "reason"), FAMILIES, ids=[family for family, _, _ in FAMILIES])
def test_families(family: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        probe(load(tiny_model(family, **changes)))


def test_encoder_decoders_and_encoders() -> None:
    small: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    with pytest.raises(UnsupportedModelError, match="t5: is an encoder-decoder"):
        load(T5ForConditionalGeneration(T5Config(**small)))
    encoder = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    with pytest.raises(UnsupportedModelError, match=r"^bert: BertSelfAttention \(layer 0\) is not causal$"):
        load(BertLMHeadModel(encoder))


def test_an_encoder_decoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    T5Config(vocab_size=100).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match="t5: is an encoder-decoder"):
        load(str(tmp_path))


def test_models_without_a_language_head() -> None:
    config = tiny_model("llama").config
    kinds: list[Any] = [LlamaModel, LlamaForSequenceClassification]
    for kind in kinds:
        with pytest.raises(UnsupportedModelError, match="has no language model head|its forward fails"):
            load(kind(config))


def test_a_head_of_more_tokens_than_the_embedding_has() -> None:
    """A prompt with one of them would end its neighbours."""
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(64, VOCAB + 8, bias=False)
    with pytest.raises(UnsupportedModelError, match="llama: its logits are of 608 tokens, and its embedding has rows for the first 600"):
        load(model)
    model.lm_head = torch.nn.Linear(64, VOCAB - 8, bias=False)
    assert load(model).vocab_size == VOCAB - 8


@pytest.mark.parametrize("given", ["</s>", [[2]], [2, None], 2.0, True])
def test_an_end_of_sequence_that_is_no_token_id(given: object) -> None:
    """Of a generation config, which transformers takes as it is."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = given
    with pytest.raises(UnsupportedModelError, match=re.escape(f"eos_token_id={given!r} in its GenerationConfig: must be an id, or a list of ids")):
        load(model)


def test_an_end_of_sequence_that_no_vocabulary_has_is_none() -> None:
    model = tiny_model("llama", eos_token_id=[-1, 2])
    model.generation_config.eos_token_id = [2**31, 2**40, 7]
    assert load(model).eos_token_ids == {2, 7}


def test_a_layer_whose_kind_and_window_disagree() -> None:
    """Too long a window for the probe to notice, so the two are compared."""
    model = tiny_model("gemma3_text", sliding_window=1000)
    model.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(UnsupportedModelError, match="layer 0 is of kind sliding_attention but passes a window of 0"):
        load(model)


def test_a_convolution_with_a_forward_put_around_it() -> None:
    model = tiny_model("lfm2")
    convolution = model.model.layers[0].conv
    convolution.forward = lambda *args, own=convolution.forward, **kwargs: own(*args, **kwargs) / 2
    with pytest.raises(UnsupportedModelError, match=r"^lfm2: layers 0 of 3 never call .* a convolution by transformers' own forward \(.* wrapped\)"):
        load(model)


def test_a_window_that_only_masks_have() -> None:
    """PhiMoE's attention is not told of it. One that is as long as the context is none, nor is one that a config only carries along."""
    phimoe = {"num_local_experts": 4, "num_hidden_layers": 1}
    with pytest.raises(UnsupportedModelError, match="phimoe: its masks have a window of 1000, of which its layers do not tell attention"):
        load(tiny_model("phimoe", sliding_window=1000, **phimoe))
    for family, window, changes in (("phimoe", 2048, phimoe), ("llama", 1000, {})):
        assert not any(layer.window for layer in load(tiny_model(family, sliding_window=window, **changes)).layers)


def test_attention_inputs_that_no_backend_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    original: Any = modeling_llama.LlamaAttention.forward
    for extra, reason in (
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"indices": torch.zeros(1)}, "picked by an indexer"),
        ({"mystery": torch.zeros(1)}, "not known here.*mystery"),
        ({"is_causal": False}, "not causal"),
    ):
        monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", lambda self, *a, extra=extra, **kw: original(self, *a, **kw, **extra))
        with pytest.raises(UnsupportedModelError, match=reason):
            load(tiny_model("llama"))


@pytest.mark.parametrize("source", ["/nonexistent/model", "./not-here", "a/b/c", "", " "])
def test_paths_that_are_not_there_ask_no_network(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ModelNotFoundError, match=repr(source)):
        load(source)


def test_any_trouble_with_the_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub\nand a long explanation")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(ModelNotFoundError, match=r"^'owner/name': no local folder of that name, and the hub gave none: no route to the hub$"):
        load("owner/name")


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        load(str(tmp_path))
    file = tmp_path / "config.json"
    file.write_text("not json")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        load(str(file))
    with pytest.raises(UnsupportedModelError, match="is not JSON"):
        load(str(tmp_path))
    file.write_text('{"model_type": "from-the-future"}')
    with pytest.raises(UnsupportedModelError, match=r"config\.json cannot be read"):
        load(str(tmp_path))


def test_only_safetensors(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"no \.safetensors file but pytorch_model\.bin"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9", "which is a pointer of Git LFS"),
        ("model.safetensors", b"", r"\(model\.safetensors\)$"),
        ("model.safetensors.index.json", b"{", r"\(model\.safetensors\.index\.json\)$"),
    ],
)
def test_which_file_of_weights_is_damaged_is_told(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    if name.endswith(".json"):
        (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=f"transformers cannot load it: .*{told}"):
        load(folder)


def test_what_transformers_says_in_two_lines_or_one_word_is_told_whole(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, told in (
        ({"rms_norm_eps": "1e-5"}, "its config.json cannot be read: Validation error for field 'rms_norm_eps': .*float"),
        ({"hidden_act": "soft"}, "transformers cannot load it: KeyError: 'soft'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UnsupportedModelError, match=told):
            load(folder)


def test_quantized_in_a_way_that_transformers_leaves_out(tmp_path: Path) -> None:
    """Its codes would be taken for weights, without their scales."""
    folder = make(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}))
    with pytest.raises(UnsupportedModelError, match=r"\(llama\): its weights are quantized by 'modelopt', which transformers does not know"):
        load(folder)


def test_a_type_of_which_there_is_no_causal_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"\(llava\): transformers has no causal language model of this type"):
        load(str(tmp_path))


def test_another_head_over_layers_whose_own_is_tied(tmp_path: Path) -> None:
    """Nothing is missing, so it would be served as what it is not."""
    LlamaForSequenceClassification(tiny_model("llama", tie_word_embeddings=True).config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"is a LlamaForSequenceClassification, whose head \(score\.weight\) is no language model's"):
        load(str(tmp_path))


def test_a_checkpoint_that_lacks_weights(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("family", "surplus", "told"),
    [
        ("llama", ["model.layers.3.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"], "2 weights .*, such as model.layers.3.mlp.up_proj"),
        ("llama", ["model.layers.0.self_attn.q_proj.bias"], "1 weights .*, such as model.layers.0.self_attn.q_proj.bias"),
        ("gpt2", ["transformer.h.3.ln_1.weight"], "1 weights .*, such as transformer.h.3.ln_1"),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.layers.0.norm.weight", "visual.blocks.0.norm1.weight", "score.weight"], None),
    ],
)
def test_weights_of_layers_that_no_part_takes_are_told(family: str, surplus: list[str], told: str | None, tmp_path: Path) -> None:
    folder = make(tmp_path, family)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {name: torch.ones(8) for name in surplus}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(folder)
    assert len(caught) == (told is not None), [str(one.message) for one in caught]
    assert told is None or re.search(f"{family}.*layers have {told}", str(caught[0].message)), str(caught[0].message)


def test_a_checkpoint_of_another_shape(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(UnsupportedModelError, match=r"mlp\.down_proj\.weight \[64, 100\] where the config says \[64, 96\], .*, and 6 more$"):
        load(folder)


def test_code_in_a_checkpoint_does_not_run_unasked(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    for model_type in ("not-in-transformers", "llama"):
        (folder / "config.json").write_text(json.dumps({**BASE, "model_type": model_type, "auto_map": auto_map}))
        with pytest.raises(UnsupportedModelError, match=r"trust_remote_code=True|no \.safetensors"):
            load(str(folder))
        assert not ran.exists()


def test_code_in_a_checkpoint_runs_when_asked(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **own}))
    with pytest.raises(UnsupportedModelError, match="trust_remote_code=True"):
        load(folder)

    def trusted() -> CausalModel:
        return load_model(folder, dtype="auto", trust_remote_code=True, revision=None, products=ReferenceProducts())

    model = trusted()
    assert type(model.transformers_model).__name__ == "OwnModel" and probe(model).max_error < 1e-4
    assert trusted().identity == model.identity
    with (tmp_path / "own.py").open("a") as file:
        file.write("\n\nMEANING = 42\n")
    assert trusted().identity != model.identity, "other code may give other keys, so no page of the old one is its own"


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_in_a_folder_is_refused_by_name(whole: bool, tmp_path: Path) -> None:
    """Whether transformers would apply it depends on whether peft is installed: nothing is to be served that may lack what it came with."""
    if whole:
        make(tmp_path, "llama")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/nowhere"}')
    with pytest.raises(UnsupportedModelError, match=r"has an adapter \(adapter_config\.json\), and a checkpoint is served without any: merge it"):
        load(str(tmp_path))


def test_an_adapters_wrapper_is_refused_with_what_to_give() -> None:
    class Wrapper(torch.nn.Module):  # as peft's own is: no PreTrainedModel, and it knows what it wraps
        def get_base_model(self) -> torch.nn.Module:
            return tiny_model("llama")

    with pytest.raises(ConfigError, match=r"model=Wrapper: must be .*; of a model that peft wraps, give get_base_model\(\)"):
        LLM(Wrapper())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model=int: must be a hub id, a local folder or a transformers PreTrainedModel$"):
        LLM(3)  # type: ignore[arg-type]


def test_options_that_do_not_apply(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama")
    with pytest.raises(ConfigError, match="revision='main'"):
        load_model(folder, dtype="auto", trust_remote_code=False, revision="main", products=ReferenceProducts())
    with pytest.raises(ConfigError, match="must be a hub id, a local folder or a transformers PreTrainedModel"):
        load(torch.nn.Linear(2, 2))
