"""How keys and values lie in pages: plain elements of the model's dtype, or 8-bit or 4-bit codes followed by their scales.

One token-and-head's keys, or values, are one row of bytes:

    float32, bfloat16, float16   [dim] elements
    int8                         [dim] codes, one scale                              element = code * scale
    int4                         [ceil(dim / 2)] bytes, a scale for each 32 dims     element = (nibble - 8) * 16 * scale

The even element lies in the low nibble. A scale is one byte, five bits of exponent e and three of mantissa m: (1 + m / 8) * 2**(e - 22), from 2**-22
to 896. Both products are exact in fp32, so every kernel that reads a row reads the same numbers, in whatever order. This is the plain torch codec and
the oracle of the native one (csrc/encode.h), which gives the same bytes.

A scale is the smallest for which no element has to be clipped, so each is decoded to within half a step of itself. What a scale is said to hold is
such that a decoded extreme, too, is more than the next smaller one holds: encoding a decoded row gives that row again. A row (of int4: a group) with
anything that is not finite has the scale 0xff and decodes to NaN: a broken model must not look whole. So does one that no scale holds, rather than
be clipped: int8 ends at magnitudes of 114,016, int4 at 106,624 and -121,408, past all of float16. What is below half the smallest step, 2**-22 (int8)
or 2**-18 (int4), becomes zero.
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
_STEP = 16.0  # scales to a step of int4: a nibble is the upper half of a code of int8
_BASE, _NO_SCALE = 105 << 3, 0xFF  # a scale's byte is the upper bits of a float without its sign, less _BASE
# How many scales the largest magnitude of int8 may come to, by the scale's mantissa: each is near 127.5, and just past it the next scale's code is
# rounded up. Of int4, where the most and the least have their own, one does for all mantissas.
_INT8_HOLDS, _INT8_MOST = (127.0, 127.375, 127.25, 127.375, 127.375, 127.0, 127.25, 127.484375), 127.484375
_INT4_MOST, _INT4_LEAST = 7.4375 * _STEP, 8.46875 * _STEP


@dataclass(frozen=True, slots=True)
class RowFormat:
    """One layer's keys or values: `name`, one of `CODES`, and the head size `dim`."""

    name: str
    dim: int

    @property
    def num_bytes(self) -> int:
        """Bytes of a row."""
        if self.name == "int8":
            return self.dim + 1
        if self.name == "int4":
            return -(-self.dim // 2) + -(-self.dim // _GROUP)
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
    scale = _smallest_int4(most, least) if is_int4 else _smallest_int8(torch.maximum(most, least))
    scale = torch.where(wide.isfinite().all(-1, keepdim=True) & (scale < _NO_SCALE), scale, _NO_SCALE)
    codes = torch.round(wide / (_floats(scale) * (_STEP if is_int4 else 1.0)))
    codes = torch.where(scale == _NO_SCALE, 0.0, codes)
    scales = (scale.squeeze(-1) if is_int4 else scale).to(torch.uint8)
    return torch.cat([_pack(codes, row.dim) if is_int4 else codes.to(torch.int8).view(torch.uint8), scales], dim=-1)


def decode(rows: torch.Tensor, row: RowFormat) -> torch.Tensor:
    """Rows [..., num_bytes] uint8 as [..., dim]: of their own dtype if plain, of fp32 if encoded."""
    rows = rows.contiguous()
    if row.dtype is not None:
        return rows.view(row.dtype)
    size = row.dim if row.name == "int8" else -(-row.dim // 2)
    scales = _floats(rows[..., size:])
    if row.name == "int8":
        return rows[..., :size].view(torch.int8).float() * scales
    codes = torch.stack([rows[..., :size] & 15, rows[..., :size] >> 4], dim=-1).flatten(-2)[..., : row.dim]
    return (codes.float() - 8.0) * (scales * _STEP).repeat_interleave(_GROUP, -1)[..., : row.dim]


def _smallest_int8(magnitude: torch.Tensor) -> torch.Tensor:
    """The byte of the smallest scale that holds a row, _NO_SCALE or more if none does."""
    byte = _rounded_up(magnitude / torch.full_like(magnitude, _INT8_MOST))
    holds = torch.tensor(_INT8_HOLDS, dtype=torch.float32)[byte & 7] * _floats(byte)
    return byte + (magnitude > holds)


def _smallest_int4(most: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    return _rounded_up(torch.maximum(most / torch.full_like(most, _INT4_MOST), least / torch.full_like(least, _INT4_LEAST)))


def _rounded_up(scale: torch.Tensor) -> torch.Tensor:
    return ((scale.view(torch.int32) + 0xFFFFF >> 20) - _BASE).clamp(min=0)


def _floats(scale: torch.Tensor) -> torch.Tensor:
    """Scales, bytes of any integer dtype, as fp32."""
    byte = scale.to(torch.int32)
    return torch.where(byte == _NO_SCALE, torch.nan, (byte + _BASE << 20).view(torch.float32))


def _pack(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """Codes [..., groups, 32] of -8 .. 7 as ceil(dim / 2) bytes."""
    raised = (codes + 8.0).to(torch.uint8).flatten(-2)[..., : dim + dim % 2]
    return raised[..., ::2] | raised[..., 1::2] << 4
