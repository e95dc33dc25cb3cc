"""Triton's interpreter without what it does anew at each call to the same end, which is a third of the time that small tiles of attention take.

It patches Triton's language for each function that is entered, a millisecond, and takes the patches off again behind each launch; here they are put
on once and stay: what compiles for devices does so in a process of its own (test_triton_device.py). And it writes a table of dtypes for each value.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any


@functools.cache
def install() -> None:
    """For good, in this process."""
    from triton import language
    from triton.runtime import interpreter

    patch, scopes = interpreter._patch_lang, {}

    def patch_once(function: Any) -> Any:
        modules = tuple(id(module) for module in function.__globals__.values() if inspect.ismodule(module))
        if modules not in scopes:
            scopes[modules] = patch(function)
        return SimpleNamespace(restore=lambda: None)

    find, found = interpreter._get_np_dtype, {}

    def found_once(dtype: Any) -> Any:
        if type(dtype) is not language.dtype:  # of pointers and blocks, which are no keys
            return find(dtype)
        if dtype.name not in found:
            found[dtype.name] = find(dtype)
        return found[dtype.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, found_once
