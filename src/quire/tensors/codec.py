"""How keys and values lie in pages: plain elements of the model's dtype, or 8-bit or 4-bit codes followed by their scales.

One token-and-head's keys, or values, are one row of bytes:

    float32, bfloat16, float16   [dim] elements
    int8                         [dim] codes, one bf16 scale                             element = code * scale
    int4                         [ceil(dim / 2)] bytes, a bf16 scale for each 32 dims     element = (nibble - 8) * scale

The even element lies in the low nibble. Both products are exact in fp32, so every kernel that reads a row reads the same numbers, in whatever order.
This is the plain torch codec and the oracle of the native one (csrc/encode.h), which gives the same bytes.

Scales are rounded to nearest in bf16, which moves the extreme by at most a quarter of a step and never its code: encoding a decoded row gives that
row again. A row (of int4: a group) with anything that is not finite gets a scale of NaN and decodes to NaN: a broken model must not look whole. One
whose largest magnitude is below 2**-100 becomes zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F

CODES: Final[dict[str, int]] = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}
"""The names of row formats, and the numbers the kernels know them by."""
_PLAIN: Final[dict[str, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GROUP = 32  # dims of int4 that share a scale
_TINY = 2.0**-100


@dataclass(frozen=True, slots=True)
class RowFormat:
    """One layer's keys or values: `name`, one of `CODES`, and the head size `dim`."""

    name: str
    dim: int

    @property
    def num_bytes(self) -> int:
        """Bytes of a row."""
        if self.name == "int8":
            return self.dim + 2
        if self.name == "int4":
            return -(-self.dim // 2) + 2 * -(-self.dim // _GROUP)
        return self.dim * _PLAIN[self.name].itemsize

    @property
    def code(self) -> int:
        """What the kernels call it."""
        return CODES[self.name]

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of a plain row, None for an encoded one."""
        return _PLAIN.get(self.name)


def row_format(codec: str | None, dtype: torch.dtype, dim: int) -> RowFormat:
    """The format of rows of `dim` elements of `dtype` under `codec`: "int8", "int4" or None."""
    return RowFormat(codec or str(dtype).removeprefix("torch."), dim)


def encode(x: torch.Tensor, row: RowFormat) -> torch.Tensor:
    """x [..., dim] of any float dtype (of its own, for a plain row) as rows [..., num_bytes] uint8."""
    if row.dtype is not None:
        return x.contiguous().view(torch.uint8)
    is_int4 = row.name == "int4"
    wide = x.float()
    if is_int4:
        wide = F.pad(wide, (0, -row.dim % _GROUP))
        wide = wide.reshape(*wide.shape[:-1], -(-row.dim // _GROUP), _GROUP)
    most, least = wide.amax(-1, keepdim=True), (-wide).amax(-1, keepdim=True)
    magnitude, finite = torch.maximum(most, least), wide.isfinite().all(-1, keepdim=True)
    scale = torch.where(most >= least, most, -least) * -0.125 if is_int4 else magnitude / torch.full_like(magnitude, 127.0)
    scale = torch.where(magnitude < _TINY, 0.0, scale).masked_fill(~finite, torch.nan).to(torch.bfloat16)
    codes = torch.round(wide / scale.float()).clamp(max=7.0 if is_int4 else 127.0)
    codes = torch.where((scale != 0) & finite, codes, 0.0)
    scales = scale.squeeze(-1) if is_int4 else scale
    return torch.cat([_pack(codes, row.dim) if is_int4 else codes.to(torch.int8).view(torch.uint8), _bytes_of(scales)], dim=-1)


def decode(rows: torch.Tensor, row: RowFormat) -> torch.Tensor:
    """Rows [..., num_bytes] uint8 as [..., dim]: of their own dtype if plain, of fp32 if encoded."""
    rows = rows.contiguous()
    if row.dtype is not None:
        return rows.view(row.dtype)
    size = row.dim if row.name == "int8" else -(-row.dim // 2)
    scales = rows[..., size:].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()  # a copy, since codes may end at an odd byte
    if row.name == "int8":
        return rows[..., :size].view(torch.int8).float() * scales
    codes = torch.stack([rows[..., :size] & 15, rows[..., :size] >> 4], dim=-1).flatten(-2)[..., : row.dim]
    return (codes.float() - 8.0) * scales.repeat_interleave(_GROUP, -1)[..., : row.dim]


def _pack(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """Codes [..., groups, 32] of -8 .. 7 as ceil(dim / 2) bytes."""
    raised = (codes + 8.0).to(torch.uint8).flatten(-2)[..., : dim + dim % 2]
    return raised[..., ::2] | raised[..., 1::2] << 4


def _bytes_of(scales: torch.Tensor) -> torch.Tensor:
    # A NaN's payload is anybody's; the kernels write this one.
    return torch.where(scales.isnan(), torch.tensor(0x7FC0, dtype=torch.int16), scales.contiguous().view(torch.int16)).view(torch.uint8)
