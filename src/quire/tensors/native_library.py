"""Loads Quire's C++ kernels, and raises where they do not load: only what needs them imports this. Nothing here imports torch.

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
