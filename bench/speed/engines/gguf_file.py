"""A checkpoint as a GGUF file for llama.cpp, written with the `gguf` package. Needs numpy and gguf, not torch.

python -m bench.speed.engines.gguf_file FOLDER QUANTIZATION      prints the file's name
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {"qwen3": gguf.MODEL_ARCH.QWEN3, "llama": gguf.MODEL_ARCH.LLAMA, "gemma3_text": gguf.MODEL_ARCH.GEMMA3}
TYPES = {"none": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # of every matrix, the embedding that is the head among them


def gguf_of(folder: Path, quantization: str) -> Path:
    """The GGUF file beside `folder`, written where there is none yet."""
    target = folder.parent / f"{folder.name}-{TYPES[quantization]}.gguf"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        try:
            _write(folder, unfinished, TYPES[quantization])
            unfinished.rename(target)
        finally:
            unfinished.unlink(missing_ok=True)
    return target


def _write(folder: Path, target: Path, type_name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES:
        sys.exit(f"model_type={config['model_type']}: written only for {', '.join(ARCHITECTURES)}")
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_vocab_size(config["vocab_size"])
    if arch == gguf.MODEL_ARCH.GEMMA3:
        writer.add_sliding_window(config["sliding_window"])
    writer.add_tokenizer_model("no_vocab")  # ids in, ids out
    kind = gguf.GGMLQuantizationType[type_name]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, weight in _tensors(folder):
        if arch == gguf.MODEL_ARCH.LLAMA and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)  # rope of pairs that lie together
        if arch == gguf.MODEL_ARCH.GEMMA3 and "norm" in name:
            weight = weight + 1  # transformers adds it in the forward
        written = names.get_name(name, try_suffixes=(".weight",))
        if weight.ndim == 1:
            writer.add_tensor(written, weight)
        else:
            writer.add_tensor(written, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope_theta(config: dict[str, Any]) -> float:
    rope = config.get("rope_parameters") or config
    return float(rope.get("full_attention", rope).get("rope_theta", 10_000.0))


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and weights, bf16 widened to fp32."""
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, dtype=np.uint8, mode="r")
        size = int(data[:8].view(np.uint64)[0])
        for name, entry in json.loads(bytes(data[8 : 8 + size])).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name}: dtype {entry['dtype']}, must be BF16")
            first, last = entry["data_offsets"]
            bits = data[8 + size + first : 8 + size + last].view(np.uint16).astype(np.uint32) << 16
            yield name, bits.view(np.float32).reshape(entry["shape"])


if __name__ == "__main__":
    print(gguf_of(Path(sys.argv[1]), sys.argv[2]))
