"""A model's weights, packed once at load (packed.py): linear layers, GPT-2's Conv1D, and the head, also where it is the embedding as well.

For a model of our own alone; a live one's owner goes on with it. Weights go one by one and what was is let go at once, so that memory never holds
two copies of more than one. A weight that other kinds of modules have too stays as it is, and so do the experts that are one parameter of three
dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quire.errors import UnsupportedModelError
from quire.tensors.ahead import ALIGNMENT, take
from quire.tensors.attention.base import PackingProducts
from quire.tensors.device import CPU, Device
from quire.tensors.foreseen import StoredWeight
from quire.tensors.host import give_back
from quire.tensors.memory import FileMappings
from quire.tensors.models.facts import output_embeddings
from quire.tensors.models.surgery import is_plain
from quire.tensors.packed import PackedLayout, PackedWeight


@dataclass(slots=True)
class _Weight:
    """A weight that may be packed: its full name, the dicts that hold it, and whether it is [K, N]."""

    tensor: torch.Tensor
    name: str
    transposed: bool
    holders: list[dict[str, torch.Tensor | None]] = field(default_factory=list)
    packs: bool = False  # a linear layer is among them
    foreign: bool = False  # so is something else than linear layers and embeddings

    def layout(self, quantization: str) -> PackedLayout:
        n, k = self.tensor.shape[::-1] if self.transposed else self.tensor.shape
        return PackedLayout(n, k, self.tensor.dtype, quantization)


def pack_weights(model: PreTrainedModel, products: PackingProducts, quantization: str, device: Device = CPU) -> None:
    """Replace the weights of `model`, which must be ours and on the CPU, by packed ones on the device. It keeps what is not packed.

    Raises UnsupportedModelError if `quantization` is asked for and there is nothing to quantise.
    """
    weights = _weights(model)
    if quantization != "none" and not weights:
        raise UnsupportedModelError(f"{model.config.model_type}: quantization={quantization!r}: none of its weights is a linear layer's")
    head = output_embeddings(model)
    layouts = [weight.layout(_quantization_of(weight, head, quantization)) for weight in weights]
    sizes = [products.packed_bytes(layout) for layout in layouts]
    mappings = FileMappings()
    stored = [_stored(weight, layout, products, mappings) for weight, layout in zip(weights, layouts, strict=True)]
    made = take([known for known in stored if known is not None])
    num_bytes = sum(-(-size // ALIGNMENT) * ALIGNMENT for size, known in zip(sizes, stored, strict=True) if known not in made.places)
    space = device.room_for_weights(num_bytes)
    offset = 0
    for layout, size, known in zip(layouts, sizes, stored, strict=True):
        weight = weights.pop(0)  # no list is to hold its memory any longer
        if size == 0:
            continue
        plain = weight.tensor.detach()
        if known is not None and known in made.places:
            assert made.memory is not None
            place = made.places[known]
            out, taken = torch.frombuffer(made.memory, dtype=torch.uint8, count=size, offset=place.start), len(place)
        else:
            out = space[offset : offset + size]
            there = plain.to(device.where)  # where it is packed, and no other copy is left of it
            taken = products.pack(there.t() if weight.transposed else there, layout, out)
            offset += -(-taken // ALIGNMENT) * ALIGNMENT
        packed = PackedWeight(out, layout, products.rows, weight.name, weight.transposed, taken)
        for holder in weight.holders:
            holder["weight"] = packed
        _let_go(plain, mappings)
    device.give_back(space[offset:])  # threads that pack side by side leave gaps at first


def _quantization_of(weight: _Weight, head: nn.Module | None, quantization: str) -> str:
    # Of int4's divergence four tenths were the head's when that was looked at (2026-11-21): it is worth a second nibble.
    if quantization == "int4" and head is not None and weight.tensor is head._parameters.get("weight"):
        return "int8"
    return quantization


def _weights(model: PreTrainedModel) -> list[_Weight]:
    """The weights that can be packed, in the model's order."""
    found: dict[int, _Weight] = {}
    for prefix, module in model.named_modules():
        embedding = isinstance(module, nn.Embedding) and module.max_norm is None
        served = is_plain(module, nn.Linear) or is_plain(module, Conv1D) or embedding
        for name, tensor in module._parameters.items():
            if tensor is None:
                continue
            known = found.setdefault(id(tensor), _Weight(tensor, f"{prefix}.{name}", isinstance(module, Conv1D)))
            if served and name == "weight" and known.transposed == isinstance(module, Conv1D):
                known.holders.append(module._parameters)
                known.packs = known.packs or not embedding
            else:
                known.foreign = True
    return [weight for weight in found.values() if weight.packs and not weight.foreign and weight.tensor.numel()]


def move_rest(model: PreTrainedModel, device: Device) -> None:
    """Move what is not packed to the device, each tensor once."""
    found: dict[int, list[tuple[dict[str, Any], str]]] = {}
    parts: list[dict[str, Any]] = [part for module in model.modules() for part in (module._parameters, module._buffers)]
    for part in parts:
        for name, tensor in part.items():
            if tensor is not None and type(tensor) is not PackedWeight and tensor.device != device.where:
                found.setdefault(id(tensor), []).append((part, name))
    for holders in found.values():
        part, name = holders[0]
        is_parameter, there = isinstance(part[name], nn.Parameter), part[name].detach().to(device.where)
        moved = nn.Parameter(there, requires_grad=False) if is_parameter else there
        for part, name in holders:
            part[name] = moved


def _stored(weight: _Weight, layout: PackedLayout, products: PackingProducts, mappings: FileMappings) -> tuple[str, StoredWeight] | None:
    """What a weight is in a mapped file, if it lies there as [N, K], and the form it is to be packed in."""
    plain, form = weight.tensor, products.packed_format(layout)
    held = mappings.holding(plain.data_ptr(), plain.nbytes)
    if form is None or held is None or weight.transposed or not plain.is_contiguous():
        return None
    return held.file, StoredWeight(held.offset + plain.data_ptr() - held.first, layout.n, layout.k, *form)


def _let_go(plain: torch.Tensor, mappings: FileMappings) -> None:
    """Nobody reads `plain` again. If it is part of a mapped file, which is held as a whole, its pages leave memory now."""
    if mappings.holding(plain.data_ptr(), plain.nbytes) is not None:
        give_back(plain.data_ptr(), plain.nbytes)
