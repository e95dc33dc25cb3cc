"""The numbers by which Quire's C++ kernels know things. Here the kernels are not loaded, nor is torch."""

from __future__ import annotations

from typing import Final

DTYPE_NUMBERS: Final = {"float32": 0, "bfloat16": 1, "float16": 2}
"""The dtypes the kernels read and write (csrc/kernels.h)."""
PANEL: Final = 64
"""Rows of a weight that are packed together (csrc/packed_formats.h): pieces of whole panels lie one after the other as the whole does."""
_PACKED_ELEMENTS: Final = 2  # csrc/linear_args.h: packed weights of elements, in the order of DTYPE_NUMBERS, then codes
_CODES: Final = {"int8": 5, "int4": 6}


def packed_format(dtype: int, quantization: str) -> int:
    """The number of the form in which a weight of a dtype's number is packed; `quantization`: "none", "int8" or "int4"."""
    return _CODES.get(quantization) or _PACKED_ELEMENTS + dtype
