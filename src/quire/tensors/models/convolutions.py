"""Short causal convolutions, found in a model and handed to the step that is running.

A layer that mixes tokens by one calls `causal_conv1d_fn`, which its forward finds in its module, with nothing that tells sequences apart. For the
time of our forwards it gets a forward of the same code that finds ours there: nothing that others could meet is changed.

Shape letters: T packed tokens, C channels, W width of the kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn

from quire.errors import UnsupportedModelError
from quire.tensors.models.hook import current, examine, told

_NAME = "causal_conv1d_fn"


def is_convolution(module: nn.Module) -> bool:
    """Whether a module's forward calls transformers' short convolution."""
    forward = inspect.unwrap(type(module).forward)
    return isinstance(forward, FunctionType) and _NAME in forward.__code__.co_names and _NAME in forward.__globals__


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward that such a module gets."""
    own = inspect.unwrap(type(module).forward)
    assert isinstance(own, FunctionType)
    ours = FunctionType(own.__code__, {**own.__globals__, _NAME: partial(_convolution, module)}, own.__name__, own.__defaults__, own.__closure__)
    ours.__kwdefaults__ = own.__kwdefaults__
    return MethodType(ours, module)


def _convolution(
    module: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: object = None, **others: object
) -> torch.Tensor:
    """transformers' function: x [1,C,T], weight [C,W], bias [C] -> [1,C,T]. Raises UnsupportedModelError for a call it cannot serve."""
    forward, layer_idx = current(), cast(int, getattr(module, "layer_idx", None))  # None is refused by examine
    if layer_idx not in forward.chunks:
        forward.chunks[layer_idx] = examine(module, layer_idx)
    if x.shape[0] != 1:
        raise UnsupportedModelError(f"{told(module)} calls its convolution with a batch of {x.shape[0]}, not 1")
    if activation is not None:
        raise UnsupportedModelError(f"{told(module)} has an activation ({activation}) in its convolution, as recurrent layers do")
    if foreign := [name for name, given in others.items() if isinstance(given, torch.Tensor) and name != "position_ids"]:
        raise UnsupportedModelError(f"{told(module)} passes its convolution tensors that are not known here ({', '.join(foreign)})")
    rows = x[0].transpose(0, 1).contiguous()
    with forward.mode.paused():
        out = forward.step.convolve(layer_idx, rows, weight, bias)
    return out.transpose(0, 1).unsqueeze(0)
