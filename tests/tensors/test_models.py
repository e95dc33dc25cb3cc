"""Every family, from a folder: close to what transformers computes, and bit-identical however the batch is packed."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quire.errors import ModelError, ProbeMismatchError, UnsupportedModelError
from quire.tensors.attention.base import Mask
from quire.tensors.models.facts import ordinary_tokens
from quire.tensors.models.load import load_model
from quire.tensors.models.model import CausalModel
from quire.tensors.models.probe import TOLERANCE, probe
from quire.tensors.models.row_by_row import RowByRow
from quire.tensors.products import ReferenceProducts
from tests.tensors.checkpoints import BASE, FAMILIES, VOCAB, make, one_thread, tiny_model

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "shared_expert_intermediate_size": 36}
LONG = 70  # tokens of the longest sequence: past every window, chunk and vector of the tiny families


def load(source: object, dtype: str = "auto") -> CausalModel:
    return load_model(source, dtype=dtype, trust_remote_code=False, revision=None, products=ReferenceProducts())  # type: ignore[arg-type]


def packed(model: CausalModel, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [len, V] of fresh sequences, in one forward."""
    lengths = [len(ids) for ids in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return list(torch.split(model.forward(RowByRow(lengths), torch.cat(sequences), positions, torch.arange(sum(lengths))), lengths))


def ids(seed: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_transformers(family: str, tmp_path: Path) -> None:
    folder = make(tmp_path, family)
    model = load(folder)
    report = probe(model)
    assert report.max_error < 1e-4
    sequences = [ids(1, 40), ids(2, 1), ids(3, 9)]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train(False)
    for got, sequence in zip(packed(model, sequences), sequences, strict=True):
        with torch.no_grad():
            own = theirs(input_ids=sequence[None], use_cache=False).logits[0]
        assert (got - own).abs().max() < 1e-4 * own.std()
    assert model.dtype == torch.float32 and model.vocab_size == VOCAB and model.context_len == 2048
    assert model.eos_token_ids == {2} and not model.live
    assert model.weight_bytes >= sum(weight.numel() * 4 for weight in theirs.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_batch(family: str, dtype: torch.dtype) -> None:
    model = load(tiny_model(family, dtype))
    model.everywhere = family in {"lfm2", "qwen3_5_text", "granitemoehybrid"}  # which call silu as a function, as the probe finds
    text = ids(1, LONG)
    (alone,) = packed(model, [text])
    rng = random.Random(family)
    lengths = range(1, LONG) if family == "llama" and dtype == torch.float32 else (1, 2, 3, 7, 16, 33)
    for length in lengths:
        assert torch.equal(packed(model, [text[:length]])[0], alone[:length]), length
    for trial in range(3):
        others = [ids(rng.randrange(1000), rng.choice([1, 2, 7, 16, 30])) for _ in range(rng.randint(1, 4))]
        place = rng.randint(0, len(others))
        length = rng.choice([1, 13, 29, LONG])
        assert torch.equal(packed(model, [*others[:place], text[:length], *others[place:]])[place], alone[:length]), trial


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_bits_at_wider_layers(family: str, dtype: torch.dtype) -> None:
    """Wide enough for torch's own products to change with the number of rows."""
    wide = {"n_embd": 200, "n_inner": 1100} if family == "gpt2" else {"hidden_size": 200, "intermediate_size": 1100, "head_dim": 24}
    model = load(tiny_model(family, dtype, num_hidden_layers=2, **wide))
    text = ids(4, 40)
    (alone,) = packed(model, [text])
    for length in (1, 2, 3, 17, 39):
        assert torch.equal(packed(model, [text[:length]])[0], alone[:length])
    assert torch.equal(packed(model, [ids(5, 3), text])[1], alone)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_only_where_asked(family: str) -> None:
    """gemma2 caps its logits with a tanh over all of them: a row must not see how many others were asked for."""
    model = load(tiny_model(family, torch.bfloat16))
    text = ids(1, 20)
    (everywhere,) = packed(model, [text])
    for places in ([19], [0, 19], [7, 3, 3], [], list(range(20))):
        got = model.forward(RowByRow([20]), text, torch.arange(20), torch.tensor(places, dtype=torch.long))
        assert got.shape == (len(places), VOCAB) and got.is_contiguous()
        assert torch.equal(got, everywhere[places])


def test_a_text_model_within_a_composite_one() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = {**BASE, **FAMILIES["gemma3_text"], "eos_token_id": [2, 7]}
    kind: Any = CONFIG_MAPPING["gemma3"]
    config = kind(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=5, eos_token_id=[2, 9])
    composite: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model = load(composite)
    assert probe(model).max_error < 1e-4
    assert model.context_len == 2048 and model.eos_token_ids == {2, 7, 9} and [layer.window for layer in model.layers] == [24, 24, 0]
    assert {config._attn_implementation for config in (composite.config, *vars(composite.config).values()) if hasattr(config, "model_type")} == {
        "sdpa"
    }


def test_ids_that_a_config_lists_are_not_ordinary() -> None:
    kind: Any = CONFIG_MAPPING["llama"]
    config = kind(pad_token_id=0, bos_token_id=1, eos_token_id=[2, 7], image_token_index=None, indicator_token_ids=(3, 600))
    assert ordinary_tokens(config, 10) == [4, 5, 6, 8, 9]


def test_a_composite_model_that_hands_down_which_logits_are_wanted() -> None:
    """As far as its attention, which has no use for it."""
    vision = {
        "hidden_size": 32,
        "mlp_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "output_channels": 16,
    }
    kind: Any = CONFIG_MAPPING["got_ocr2"]
    config = kind(text_config={**BASE, "model_type": "qwen2"}, vision_config=vision, image_token_id=5)
    composite: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model = load(composite)
    assert probe(model).max_error < 1e-4
    text = ids(1, 20)
    assert torch.equal(model.forward(RowByRow([20]), text, torch.arange(20), torch.tensor([3, 19])), packed(model, [text])[0][[3, 19]])


def test_geometry() -> None:
    def geometry(family: str) -> list[tuple[int, ...]]:
        return [(g.layer_idx, g.num_kv_heads, g.k_dim, g.v_dim, g.window, g.chunk) for g in load(tiny_model(family)).layers]

    assert geometry("llama") == [(i, 2, 16, 16, 0, 0) for i in range(3)]
    assert geometry("gemma3_text") == [(0, 2, 16, 16, 24, 0), (1, 2, 16, 16, 24, 0), (2, 2, 16, 16, 0, 0)]
    assert geometry("deepseek_v3") == [(i, 4, 20, 24, 0, 0) for i in range(2)]
    assert geometry("llama4_text") == [(0, 2, 16, 16, 0, 20), (1, 2, 16, 16, 0, 0)]


def test_attention_is_told_everything() -> None:
    masks: dict[int, Mask] = {}

    class Spy(RowByRow):
        def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
            masks[layer_idx] = mask
            assert all(x.is_contiguous() and x.shape[0] == 5 for x in (q, k, v))
            return super().attend(layer_idx, q, k, v, mask)

    def run(family: str) -> None:
        masks.clear()
        load(tiny_model(family)).forward(Spy([5]), ids(1, 5), torch.arange(5), torch.tensor([4]))

    run("granite")
    assert {mask.scale for mask in masks.values()} == {0.2}
    run("gemma2")
    assert {mask.softcap for mask in masks.values()} == {5.0} and {mask.window for mask in masks.values()} == {0, 24}
    run("gpt_oss")
    assert all(mask.sinks is not None and mask.sinks.shape == (4,) and mask.sinks.dtype == torch.float32 for mask in masks.values())


def test_the_probe_leaves_torchs_random_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    probe(load(make(tmp_path, "llama")))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_probe_sees_tokens_that_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    kind = type(mlp)
    # What a short convolution or a recurrent state does: a token takes a little from the one before it, whoever that belongs to.
    monkeypatch.setattr(mlp, "forward", lambda x: kind.forward(mlp, x + 0.2 * torch.roll(x, 1, dims=1) * (torch.arange(x.shape[1]) > 0)[:, None]))
    with pytest.raises(ProbeMismatchError, match="llama: packed with others"):
        probe(load(model))


def test_the_probe_sees_a_wrong_window() -> None:
    model = tiny_model("mistral")
    for layer in model.model.layers:
        layer.self_attn.config = type(model.config)(**{**model.config.to_dict(), "sliding_window": 20})
    with pytest.raises(ProbeMismatchError):
        probe(load(model))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_probe_sees_a_wrong_scale(dtype: torch.dtype) -> None:
    class Doubled(RowByRow):
        def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
            return super().attend(layer_idx, q * 2, k, v, mask)

    with pytest.raises(ProbeMismatchError):
        probe(load(tiny_model("llama", dtype)), Doubled)


def test_a_model_whose_bits_depend_on_the_batch_runs_in_exact_mode_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    weight = torch.randn(64, 64) / 8

    def gated(x: torch.Tensor) -> torch.Tensor:  # a product and a gate in no module that owns weights
        return torch.sigmoid(x[..., :33]).mean(-1, keepdim=True) * (x @ weight)

    monkeypatch.setattr(mlp, "forward", gated)
    served = load(model)
    assert probe(served).everywhere
    text = ids(6, 40)
    (alone,) = packed(served, [text])
    for length in (1, 2, 3, 7, 39):
        assert torch.equal(packed(served, [text[:length]])[0], alone[:length])

    monkeypatch.setattr(mlp, "forward", lambda x: gated(x) + x.shape[1] * 1e-7)
    with pytest.raises(UnsupportedModelError, match="even in exact mode"):
        probe(load(model))


@pytest.mark.parametrize(("family", "changes"), [("qwen2_moe", EXPERTS), ("ministral3", {})], ids=["gate of one element", "scale of positions"])
def test_functions_of_a_few_elements_a_token(family: str, changes: dict[str, Any]) -> None:
    """In transformers' own code, in modules without weights of their own: the last bit of few elements depends on where a vector ends."""
    model = load(tiny_model(family, **changes))
    assert probe(model).everywhere
    text = ids(1, LONG)
    (alone,) = packed(model, [text])
    for length in range(1, LONG, 3):  # ends in every lane of a vector of 16; of padding to 8 elements 16 of these told for the gate, 5 for the scale
        assert torch.equal(packed(model, [text[:length]])[0], alone[:length]), length


def test_a_function_that_exact_mode_does_not_know_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    mlp = type(model.model.layers[0].mlp)
    monkeypatch.setattr(mlp, "forward", lambda self, x: torch.logaddexp(x[..., :33], x[..., 31:]).mean(-1, keepdim=True) * x)
    with pytest.raises(UnsupportedModelError, match="LlamaMLP calls logaddexp"):
        probe(load(model))


def test_experts_chosen_by_a_rounding_do_not_fail_the_probe() -> None:
    """This gpt-oss picks other experts for some tokens when bf16 rounds otherwise; in fp32 it agrees."""
    report = probe(load(tiny_model("gpt_oss", torch.bfloat16, num_hidden_layers=3)))
    assert report.max_error < report.tolerance == TOLERANCE[torch.float32]


def test_nan_weights_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError):
        probe(load(model))


def test_identity(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "llama")
    first = load(folder).identity
    assert load(folder).identity == first
    assert load(folder, "bfloat16").identity != first
    assert load(make(tmp_path / "b", "llama", seed=1)).identity != first
    live = tiny_model("llama")
    assert load(live).identity != load(live).identity


def test_a_closed_model_says_so() -> None:
    model = load(tiny_model("llama"))
    model.close()
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model.forward(RowByRow([1]), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))


def test_models_loaded_on_several_threads_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them overlapping would leave transformers unable to tie weights, in this process for good."""
    monkeypatch.setattr(PreTrainedModel, "tie_weights", own := PreTrainedModel.tie_weights)  # put back whatever happens
    tied = make(tmp_path / "tied", "gemma3_text")
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load, [tied] * 12))
    assert PreTrainedModel.tie_weights is own
    for one in loaded:
        model = one.transformers_model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
