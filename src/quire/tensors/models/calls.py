"""What is looked for in modules and may be changed on them for a while, and calls of them taken apart: what all that serves a model begins with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as of_torch
from transformers.modeling_layers import GradientCheckpointingLayer

_TENSOR = object()  # where a tensor was in a skeleton
_ABSENT = object()
PLAIN = (bool, int, float, str, type(None))
OF_TORCH = frozenset(nn.Module().__dict__)  # our forwards run in eval mode, so the training flag says nothing

Weights = tuple[tuple[dict[str, Any], str], ...]
# An object's __dict__, a name in it, its value for a while. Hundreds are made and undone in a forward: nn.Module.__setattr__ would take longer.
Change = tuple[dict[str, Any], str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer: its tensors in order, and its arguments with those taken out."""

    skeleton: Any
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call with these arguments."""
        tensors: list[torch.Tensor] = []
        skeleton = take_apart((args, kwargs), tensors)
        return cls(skeleton, tuple(tensor.detach() for tensor in tensors))

    @property
    def shapes(self) -> tuple[object, ...]:
        """What a trace of it depends on."""
        return repr(self.skeleton), *((tensor.shape, tensor.dtype) for tensor in self.tensors)


def take_apart(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The skeleton of nested arguments; their tensors are appended to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _TENSOR
    if type(value) in (tuple, list):
        return type(value)([take_apart(item, tensors) for item in value])
    if type(value) is dict:
        return {name: take_apart(item, tensors) for name, item in value.items()}
    return value


def take_apart_as(skeleton: Any, value: Any, tensors: list[torch.Tensor]) -> bool:
    """`take_apart` where the skeleton is known, without making it anew: False where the value has another one, with some tensors appended."""
    if skeleton is _TENSOR:
        tensors.append(value)
        return isinstance(value, torch.Tensor)
    kind = type(skeleton)
    if kind is tuple or kind is list:
        if type(value) is not kind or len(value) != len(skeleton):
            return False
        return all(take_apart_as(expected, item, tensors) for item, expected in zip(value, skeleton, strict=True))
    if kind is dict:
        if type(value) is not dict or list(value) != list(skeleton):
            return False
        return all(take_apart_as(expected, value[name], tensors) for name, expected in skeleton.items())
    return value is skeleton or (not isinstance(value, torch.Tensor) and bool(value == skeleton))


def same_skeleton(a: Any, b: Any) -> bool:
    """Whether two skeletons say the same: plain values that are equal, and for the rest the same objects.

    An object of a model's own may hold tensors or carry them from layer to layer, as Gemma 3n's keys and values that several layers share do; that
    it is equal to another would say nothing.
    """
    if type(a) is not type(b):
        return False
    if type(a) in (tuple, list):
        return len(a) == len(b) and all(map(same_skeleton, a, b))
    if type(a) is dict:
        return list(a) == list(b) and all(same_skeleton(value, b[name]) for name, value in a.items())
    return a is b or (isinstance(a, PLAIN) and bool(a == b))


def put_together(skeleton: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The inverse of `take_apart`."""
    if skeleton is _TENSOR:
        return next(tensors)
    if type(skeleton) in (tuple, list):
        return type(skeleton)(put_together(item, tensors) for item in skeleton)
    if type(skeleton) is dict:
        return {name: put_together(item, tensors) for name, item in skeleton.items()}
    return skeleton


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost of the layers that transformers marks as repeated ones and that hold attention, in order."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside or not isinstance(module, GradientCheckpointingLayer):
            continue
        inside.update(id(inner) for inner in module.modules())
        if layer_ids(module):
            found.append(module)
    return found


def holding(model: nn.Module, layers: Sequence[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules of `model` that hold some of `layers`, and the outermost of those that hold none: what the former call."""
    inside = {id(layer) for layer in layers}
    around: list[nn.Module] = []
    parts: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        if id(module) not in inside and any(id(inner) in inside for inner in module.modules()):
            around.append(module)
            for child in module.children():
                visit(child)
        else:
            parts[id(module)] = module

    visit(model)
    return around, list(parts.values())


@contextmanager
def changed(changes: Sequence[Change]) -> Iterator[None]:
    """Inside, everything is as `changes` say; outside, also after an exception, as it was before."""
    before: list[Any] = []
    try:
        for state, name, value in changes:
            before.append(state.get(name, _ABSENT))
            state[name] = value
        yield
    finally:
        for (state, name, _), value in zip(changes, before, strict=False):  # fewer were changed if the change itself failed
            if value is _ABSENT:
                state.pop(name, None)
            else:
                state[name] = value


def layer_ids(layer: nn.Module) -> set[int]:
    """Every layer_idx that a layer's modules have."""
    found = {getattr(inner, "layer_idx", None) for inner in layer.modules()}
    return {layer_idx for layer_idx in found if isinstance(layer_idx, int)}


def foreign_module(layer: nn.Module) -> nn.Module | None:
    """A module in `layer` that is its owner's code, or hooked or wrapped: what it computes may change without a trace."""
    return next((module for module in layer.modules() if is_foreign(module) or (module is not layer and is_wrapped(module))), None)


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is of its owner's own code."""
    return is_foreign_class(type(module))


def is_foreign_class(cls: type) -> bool:
    """Whether a class is neither torch's nor transformers'."""
    return cls.__module__.split(".")[0] not in ("torch", "transformers")


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module, whosever it is, has another's code around its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ or hooks_of_all())


def hooks_of_all() -> list[object]:
    """The hooks that run around the forward of every module there is."""
    return [*of_torch._global_forward_hooks.values(), *of_torch._global_forward_pre_hooks.values()]


def likeness(layer: nn.Module) -> tuple[object, ...]:
    """Equal for layers that must do the same: the same modules, shapes and attributes but for layer_idx.

    An attribute that is no plain value must be one and the same object.
    """
    told: list[object] = []
    for name, module in layer.named_modules():
        told += [name, type(module)]
        for attribute, value in module.__dict__.items():
            if attribute in ("_parameters", "_buffers"):
                told += [(key, None if x is None else (x.shape, x.stride(), x.dtype, type(x))) for key, x in value.items()]
            elif attribute not in ("_modules", "layer_idx") and not (attribute.startswith("_") and not value):  # empty: no hooks of any kind
                told += [attribute, value if isinstance(value, PLAIN) else id(value)]
    return tuple(told)


def weights_of(layer: nn.Module) -> Weights:
    """Where a layer's parameters and buffers are found at a call: a dictionary and a name in it, each."""
    parts = [part for module in layer.modules() for part in (module._parameters, module._buffers)]
    return tuple((part, name) for part in parts for name, weight in part.items() if weight is not None)
