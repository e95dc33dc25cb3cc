"""Loads Quire's C++ kernels, and tells the numbers by which they know things. Nothing here imports torch.

`lib` is the module `quire._native` itself. Its functions take addresses (`Tensor.data_ptr()`), sizes and strides (of attention in bytes, of the
others in elements) and check little: call them through the wrappers in this package. The environment variable QUIRE_NATIVE names another build of the
module to load in its place (a debug or sanitised one), QUIRE_ISA an instruction set to use in place of the best that can run here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any, Final

from quire.errors import ConfigError, QuireError

DTYPE_NUMBERS: Final = {"float32": 0, "bfloat16": 1, "float16": 2}
"""The dtypes the kernels read and write (csrc/kernels.h)."""
PANEL: Final = 64
"""Rows of a weight that are packed together (csrc/packed_formats.h): pieces of whole panels lie one after the other as the whole does."""
_PACKED_ELEMENTS: Final = 2  # csrc/linear_args.h: packed weights of elements, in the order of DTYPE_NUMBERS, then codes
_CODES: Final = {"int8": 5, "int4": 6}


class NativeMissingError(QuireError, ImportError):
    """The compiled module is absent or does not load. The message says how to build it."""


def _load() -> Any:
    """The module, with the instruction set that is asked for. Raises NativeMissingError, and ConfigError where that set cannot run."""
    module, name = _module(), os.environ.get("QUIRE_ISA")
    if name:
        try:
            module.set_isa(name)
        except ValueError as error:
            raise ConfigError(f"QUIRE_ISA={name}: {error}") from error
    return module


def _module() -> Any:
    path = os.environ.get("QUIRE_NATIVE")
    try:
        if not path:
            return importlib.import_module("quire._native")
        spec = importlib.util.spec_from_file_location("quire._native", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"QUIRE_NATIVE={path} is not an extension module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        raise NativeMissingError(
            f"Quire's native kernels could not be loaded ({error}). Install Quire from a wheel, or build it in place with "
            "`pip install --no-build-isolation --no-deps -e .`"
        ) from error


lib: Final[Any] = _load()


def packed_format(dtype: int, quantization: str) -> int:
    """The number of the form in which a weight of a dtype's number is packed; `quantization`: "none", "int8" or "int4"."""
    return _CODES.get(quantization) or _PACKED_ELEMENTS + dtype
