"""Random checkpoints of a shape, in folders as users have them: config, bf16 safetensors, and a tokenizer, which some engines insist on."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.speed.shapes import Shape

FORMAT = 1  # of what is written; another number makes all folders anew


def config_fields(shape: Shape) -> dict[str, Any]:
    """A shape as transformers' config of its model type takes it. No token ends a text: lengths are exact in every engine."""
    fields: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if shape.full_every:
        kinds = ["sliding_attention", "full_attention"]
        fields |= {"sliding_window": shape.window, "query_pre_attn_scalar": shape.head_dim}
        fields["layer_types"] = [kinds[(i + 1) % shape.full_every == 0] for i in range(shape.layers)]
    if shape.mixer is not None:
        kinds = [shape.mixer.kind, shape.mixer.attention]
        fields |= dict(shape.mixer.fields) | {"layer_types": [kinds[i in shape.attends] for i in range(shape.layers)]}
    return fields


def checkpoint(shape: Shape, cache: Path | None = None, device: str = "cpu") -> Path:
    """The folder of a random checkpoint of `shape` under `cache` (a folder of the system's temporary one), written where there is none yet.

    `device` draws its weights: on the CPU torch draws them one by one, some minutes of billions.
    """
    cache = cache or Path(tempfile.gettempdir()) / "quire-bench"
    digest = hashlib.sha256(f"{FORMAT} {asdict(shape)}".encode()).hexdigest()[:8]
    folder = cache / f"{shape.name}-{digest}"
    if not folder.is_dir():
        unfinished = cache / f".{folder.name}-{os.getpid()}"
        unfinished.mkdir(parents=True)
        try:
            _write(shape, unfinished, device)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write(shape: Shape, folder: Path, device: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CONFIG_MAPPING[shape.model_type](**config_fields(shape))
        with torch.device(device):
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    _tokenizer(shape.vocab).save_pretrained(folder)


def _tokenizer(vocab: int) -> Any:
    """A byte a token, as many more words as the vocabulary has room for, and one merge, without which some readers refuse the file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"w{i}" for i in range(vocab - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("w", "0")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", clean_up_tokenization_spaces=False)
