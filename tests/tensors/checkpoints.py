"""Tiny random models and checkpoints for the tests, made on the spot from transformers configs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 600  # not a multiple of a vector of 64, like the width of the MLP below: what is exact only at round sizes shows
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 36}
_FEW = {"num_hidden_layers": 2}  # of experts, which take longest: one layer of each kind; several of a kind are in the other families
_WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": 24},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 24, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16, "layer_types": _WINDOWS},
    "gpt_oss": {**_FEW, "head_dim": 16, "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "stablelm": {},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 2048, "n_inner": 100},
    "mixtral": {**_FEW, "num_local_experts": 4},
    "qwen3_moe": {**_FEW, "head_dim": 16, "num_experts": 4, **_EXPERTS},
    "deepseek_v3": {
        **_FEW, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 24, **_EXPERTS,
    },
    "cohere": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "cohere2": {"sliding_window": 24, "layer_types": _WINDOWS},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"], "head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 100, "mamba_n_heads": 8,
        "mamba_d_head": 16, "mamba_d_state": 24, "mamba_n_groups": 2, "mamba_chunk_size": 16,
    },
    "llama4_text": {
        **_FEW, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 100, "attention_chunk_size": 20,
        "no_rope_layers": [1, 0], "layer_types": ["chunked_attention", "full_attention"], "floor_scale": 8,
    },
}  # fmt: skip


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of `family` with random weights, scaled up so that logits differ from token to token. torch's random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CONFIG_MAPPING[family](**{**BASE, **FAMILIES.get(family, {}), **changes})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "sinks" in name or (weight.dim() > 1 and weight.std() < 1e-3):
                    torch.nn.init.normal_(weight, std=0.2)
                elif weight.dim() > 1:
                    tied = getattr(config, "tie_word_embeddings", False)
                    weight.mul_(2 if tied and "embed" in name else 10 if tied else 6)
        model.train(False).to(dtype)
    return model


def make(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> str:
    """Write a checkpoint of `family` to `folder`, without a tokenizer, and return the folder's name."""
    tiny_model(family, dtype, seed, **changes).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes with one thread, as it does in the engine: elementwise functions are exact only then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
