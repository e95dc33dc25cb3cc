"""What packing will ask for, told from the headers of a checkpoint's files: which weights, and the form each is packed in.

A guess that packing checks: what it does not ask for was made for nothing, what was not foreseen it packs itself. Nothing here imports torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.tensors.native_numbers import DTYPE_NUMBERS, packed_format

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
MOST_HEADER_BYTES = 10**8  # as safetensors has it


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight [n, k], one row after another, at a byte of a file; `dtype` and `format`: the kernels' numbers of its elements and its packed form."""

    offset: int
    n: int
    k: int
    dtype: int
    format: int


def foreseen(folder: Path, dtype: str, quantization: str) -> list[tuple[Path, list[StoredWeight]]]:
    """The weights of the checkpoint in `folder`, by file and as they lie there, that will be packed as they are: what has another dtype than the one
    served is converted first, and experts are put together. Raises what a folder raises that holds no such checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    served = dtype if dtype != "auto" else config.get("dtype", config.get("torch_dtype"))
    headers = {path: _header(path) for path in _files(folder)}
    untied = any(name.startswith("lm_head") for header in headers.values() for name in header)
    found = []
    for path, header in headers.items():
        weights = []
        for name, entry in header.items():
            embeds = "embed" in name or "wte" in name
            if len(entry["shape"]) == 2 and DTYPES.get(entry["dtype"]) == served and "expert" not in name and not (untied and embeds):
                number = DTYPE_NUMBERS[served]
                is_head = name.startswith("lm_head") or embeds
                form = packed_format(number, "int8" if quantization == "int4" and is_head else quantization)
                n, k = entry["shape"]
                weights.append(StoredWeight(entry["begins"], n, k, number, form))
        found.append((path, sorted(weights, key=lambda weight: weight.offset)))
    return found


def _files(folder: Path) -> list[Path]:
    """Those that transformers reads."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return [folder / name for name in sorted({Path(name).name for name in index["weight_map"].values()})]


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """A file's tensors by name, and where in the file each `begins`."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes > MOST_HEADER_BYTES:
            raise ValueError(f"{path}: is no safetensors file")
        header: dict[str, dict[str, Any]] = json.loads(file.read(num_bytes))
    header.pop("__metadata__", None)
    return {name: entry | {"begins": 8 + num_bytes + entry["data_offsets"][0]} for name, entry in header.items()}
