"""Quire's C++ kernels, `lib` (native_library.py), and the dtypes and instruction sets they have."""

from __future__ import annotations

import sys
from typing import Any, Final

import torch

from quire.tensors import native_library, native_numbers

DTYPE_CODES: Final[dict[torch.dtype, int]] = {getattr(torch, name): number for name, number in native_numbers.DTYPE_NUMBERS.items()}
"""The dtypes the kernels read and write, and the numbers they know them by."""
lib: Final[Any] = native_library.lib


def isas() -> list[str]:
    """Instruction sets that were compiled and can run here, slowest first."""
    return list(lib.isas())


def isa() -> str:
    """The instruction set in use."""
    return str(lib.isa())


def set_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process; a test's tool. Raises ValueError if it cannot run here."""
    lib.set_isa(name)


def loaded_from() -> str:
    """The file the kernels were loaded from."""
    return str(getattr(lib, "__file__", None) or sys.modules["quire._native"].__file__)
