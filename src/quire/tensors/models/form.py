"""What a live model is made of at one moment, so that whatever its owner changes until the next one shows.

    make     modules, hooks, wrapped forwards, classes, configs, attributes, how weights lie    another: it is read anew (`CausalModel.take_again`)
    code     what of that decides which operators run; numbers of an owner's modules by sign    other than any that has passed: probed anew
    numbers  weights and buffers by place and version, numbers of an owner's modules            others: what was cached is forgotten

torch does not count what its fused optimizers write, nor can it what others write by code of their own, so each step of an optimizer that has one of
these weights counts. What leaves no trace: other writes that torch does not count (through `.data` or numpy, or to tensors made in inference mode),
and what is changed inside functions, hooks, objects and globals that stay the same ones.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import BuiltinFunctionType, CodeType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as of_torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from transformers import PreTrainedConfig

from quire.tensors.models.calls import OF_TORCH, PLAIN, hooks_of_all, is_foreign, is_foreign_class

_ENDS = (torch.Tensor, torch.dtype, type, CodeType, BuiltinFunctionType, *PLAIN)

Leaf = Callable[[Any], object]


class Form:
    """A live model as it is when this is made. `code` is equal for forms that run the same code, and keeps no weight or module alive."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._kinds = [(weakref.ref(module), type(module)) for module in modules]
        self._children = [(module._modules, dict(module._modules)) for module in modules]
        self._plain = [(module.__dict__, dict(module.__dict__)) for module in modules if not is_foreign(module)]
        self._parts = [part for module in modules for part in (module._parameters, module._buffers)]
        self._hooks = [hooks for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        deep = [(module.__dict__, _deep_attributes(module)) for module in modules]
        self._deep = [(state, names) for state, names in deep if names is None or names]
        kinds = dict.fromkeys(map(type, modules))
        classes = dict.fromkeys(cls for kind in kinds for cls in kind.__mro__ if cls not in (nn.Module, object))
        self._classes = [(cls, dict(vars(cls))) for cls in classes]
        configs = {id(x): x for module in modules for x in module.__dict__.values() if isinstance(x, PreTrainedConfig)}
        self._configs = [config.__dict__ for config in configs.values()]
        self._around, self._make, self._numbers = self._told_around(), self._told(_make), self._told(_number)
        self._storages = self._told(_storage)
        self.code = self._code(model)
        self._ids, self._stepped = set(self._told(id)), False
        _watch_optimizers()
        with _LOCK:
            _FORMS.add(self)

    def is_made_so(self) -> bool:
        """Whether the model is still made of what it was, whatever the values of its weights."""
        return self._is_built_so() and self._told(_make) == self._make

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return not self._stepped and self._is_built_so() and self._told(_number) == self._numbers

    def note_step(self, ids: set[int]) -> None:
        """An optimizer of parameters of these ids has stepped."""
        self._stepped = self._stepped or not self._ids.isdisjoint(ids)

    def _is_built_so(self) -> bool:
        return (
            all(module().__class__ is kind for module, kind in self._kinds)
            and all(inner == children for inner, children in self._children)
            and all(_same(state, kept) for state, kept in self._plain)
            and all(_equal(dict(vars(cls)), kept) for cls, kept in self._classes)
            and self._told_around() == self._around
        )

    def _told(self, leaf: Leaf) -> list[object]:
        told = [leaf(x) for part in self._parts for x in part.values()]
        for state, names in self._deep:
            told += [(name, _told_of(state.get(name), leaf)) for name in (state if names is None else names) if name not in OF_TORCH]
        return told + [key for hooks in self._hooks for key in hooks]  # torch uses none a second time

    def _told_around(self) -> list[object]:
        return [*of_torch._global_forward_hooks, *of_torch._global_forward_pre_hooks, *(_told_of(config, _exact) for config in self._configs)]

    def _code(self, model: nn.Module) -> tuple[object, ...]:
        told: list[object] = []
        for name, module in model.named_modules():
            told += [name, type(module), *(_exact(x) for part in (module._parameters, module._buffers) for x in part.values())]
            leaf = _sign if is_foreign(module) else _exact
            told += [(key, _told_of(value, leaf)) for key, value in module.__dict__.items() if key not in OF_TORCH]
            told += [_exact(hook) for hooks in (module._forward_pre_hooks, module._forward_hooks) for hook in hooks.values()]
        for cls, kept in self._classes:
            told += [cls, _exact(getattr(cls, "forward", None)), *(_told_of([*kept.items()], _exact) if is_foreign_class(cls) else ())]
        return (*told, *map(_exact, hooks_of_all()), *(_told_of(config, _exact) for config in self._configs))


_FORMS: weakref.WeakSet[Form] = weakref.WeakSet()
_LOCK = threading.Lock()


@cache
def _watch_optimizers() -> None:
    """Once a process, and for good: a step is seen by those forms alone that have one of its parameters."""
    register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: Optimizer, *_: object) -> None:
    ids = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    with _LOCK:
        forms = list(_FORMS)
    for form in forms:
        form.note_step(ids)


@dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """Equal for one and the same object, which it keeps alive: an address alone may be used again."""

    x: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)


def _told_of(value: Any, leaf: Leaf) -> Any:
    """`leaf` of a value, or of what a container holds, modules in it included."""
    if isinstance(value, tuple | list):
        return tuple([_told_of(item, leaf) for item in value])
    if isinstance(value, set | frozenset):
        return frozenset([_told_of(item, leaf) for item in value])
    if isinstance(value, dict):
        return tuple([(_told_of(name, leaf), _told_of(item, leaf)) for name, item in value.items()])
    if isinstance(value, nn.Module):
        return leaf(type(value)), *(_told_of(part, leaf) for part in (value._parameters, value._buffers, value._modules))
    return leaf(value)


# Leaves: what is told of a thing that holds no others.
def _number(x: Any) -> object:
    """Whatever may change."""
    if isinstance(x, torch.Tensor):
        version = 0 if x.is_inference() else x._version
        return x.untyped_storage()._cdata, x.data_ptr(), version, x.shape, x.stride(), x.dtype, type(x)
    return x if isinstance(x, PLAIN) else _Same(x)


def _storage(x: Any) -> object:
    """What keeps a tensor's storage from being another one of the same address; its memory may go."""
    return StorageWeakRef(x.untyped_storage()) if isinstance(x, torch.Tensor) else None  # type: ignore[no-untyped-call]


def _make(x: Any) -> object:
    return _sign(x) if isinstance(x, _ENDS) else _Same(x)


def _sign(x: Any) -> object:
    """Numbers as code asks of them which way to go: `if alpha:`, `if rank > 0:`."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return int(x > 0) - int(x < 0)
    return _exact(x)


def _exact(x: Any) -> object:
    if isinstance(x, torch.Tensor):
        return type(x), x.dtype, x.shape, x.stride(), x.device, x.untyped_storage().nbytes() > 0  # for what is refused elsewhere, or freed
    return x if isinstance(x, _ENDS) else getattr(x, "__code__", type(x))


def _deep_attributes(module: nn.Module) -> list[str] | None:
    """The attributes that are looked into: None for all of an owner's module, of others' what is neither plain nor a config."""
    if is_foreign(module):
        return None
    return [name for name, value in module.__dict__.items() if name not in OF_TORCH and not isinstance(value, (PreTrainedConfig, *PLAIN))]


def _same(state: dict[str, Any], kept: dict[str, Any]) -> bool:
    """Whether the attributes of a module are what they were, those aside that torch keeps."""
    return _equal(state, kept) or _equal(*([item for item in x.items() if item[0] not in OF_TORCH] for x in (state, kept)))


def _equal(a: object, b: object) -> bool:
    """Whether two containers hold the same, as C compares: there are hundreds."""
    try:
        return a == b
    except (RuntimeError, ValueError):  # a tensor or an array stands in the place of another
        return False
