"""Loads Quire's C++ kernels.

`lib` is the module `quire._native` itself. Its functions take addresses (`Tensor.data_ptr()`), sizes and strides (of attention in bytes, of the
others in elements) and check little: call them through the wrappers in this package. The environment variable QUIRE_NATIVE names another build of the
module to load in its place (a debug or sanitised one).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any, Final

import torch

from quire.errors import QuireError

DTYPE_CODES: Final[dict[torch.dtype, int]] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes the kernels read and write, and the numbers they know them by."""


class NativeMissingError(QuireError, ImportError):
    """The compiled module is absent or does not load. The message says how to build it."""


def _load() -> Any:
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
debug: Final[bool] = lib.debug
"""Whether this build checks page ids, lengths and offsets on every call."""


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
