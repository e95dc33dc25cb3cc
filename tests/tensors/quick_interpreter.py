"""Triton's interpreter without what it does anew at each call to the same end, which is most of the time that small tiles take.

It patches Triton's language for each function that is entered, a millisecond, and takes the patches off again behind each launch; here they are put
on once and stay: what compiles for devices does so in a process of its own (test_triton_device.py). It writes a table of dtypes for each value, and
for each shape tuples of types. And it computes integers a second time, in 64 bits, for an assertion that is left out in its only mode, without debug.
The values are computed as they were, by the same operators: no bit of a result is another.
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
    assert not interpreter.interpreter_builder.options.debug
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    _keep_shapes(language.core)
    _pass_what_is_alike(language.core, interpreter.TritonSemantic)


def _keep_shapes(core: Any) -> None:
    """One tuple for all types and one for all tensors of a shape: they change in the compiler alone."""
    new_block, new_tensor = core.block_type.__init__, core.tensor.__init__
    blocks: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    tensors: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[item.value if isinstance(item, core.constexpr) else item for item in shape])
        if key not in blocks:
            new_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty, (self.shape, self.numel, self.name) = element_ty, blocks[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in tensors:
            new_tensor(self, handle, type)
            tensors[key] = self.shape, self.numel
        self.handle, self.type, self.dtype, (self.shape, self.numel) = handle, type, type.scalar, tensors[key]

    core.block_type.__init__, core.tensor.__init__ = block, tensor


def _pass_what_is_alike(core: Any, semantic: Any) -> None:
    """Two tensors of one shape are not broadcast, and a dtype equals itself."""
    broadcast, equal = semantic.broadcast_impl_value, core.dtype.__eq__

    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
        mine, other = lhs.type, rhs.type
        alike = mine.shape.values == other.shape.values if mine.is_block() and other.is_block() else mine.is_block() == other.is_block()
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_others
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
