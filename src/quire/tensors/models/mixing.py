"""Ways in which tokens mix that are no attention, found in a model and handed to the step that is running: short causal convolutions, and behind them
recurrences, those of gated delta nets and of Mamba 2.

A layer that mixes so calls functions that its forward finds in its module, with nothing that tells sequences apart. For the time of our forwards it
gets a forward of the same code that finds ours there: nothing that others could meet is changed.

Shape letters: T packed tokens, C channels, W width of the kernel, Hk/Hv heads of keys and of values, Dk/Dv their sizes; of Mamba 2 H heads of size P,
G groups of states of N.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from quire.errors import UnsupportedModelError
from quire.tensors.attention.carried import Recurrence
from quire.tensors.models.exact import in_whole_vectors
from quire.tensors.models.hook import Running, current, examine, told

_CONVOLUTION, _DELTA_RULE, _MAMBA2 = "causal_conv1d_fn", "torch_chunk_gated_delta_rule", "mamba2_chunk_scan"


def convolves(module: nn.Module) -> bool:
    """Whether a module's forward calls transformers' short convolution."""
    return _calls(module, _CONVOLUTION)


def recurs(module: nn.Module) -> bool:
    """Whether it calls a recurrence that we have, behind it."""
    return convolves(module) and (_calls(module, _DELTA_RULE) or _calls(module, _MAMBA2))


def _calls(module: nn.Module, name: str) -> bool:
    forward = _own(module)
    return isinstance(forward, FunctionType) and name in forward.__code__.co_names and name in forward.__globals__


def _own(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module's class, without what transformers and torch put around it; with anybody else's, whose effect would be lost."""
    found: Callable[..., Any] = inspect.unwrap(type(module).forward, stop=lambda outer: not _of_a_library(outer))
    return found


def _of_a_library(function: Callable[..., Any]) -> bool:
    return getattr(function, "__globals__", {}).get("__name__", "").split(".")[0] in ("torch", "transformers")


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward that such a module gets."""
    own = _own(module)
    assert isinstance(own, FunctionType)
    ours: dict[str, Callable[..., Any]] = {
        _CONVOLUTION: partial(_convolution, module, recurs(module)),
        _DELTA_RULE: partial(_gated_delta_rule, module),
        _MAMBA2: partial(_mamba2_scan, module),
    }
    forward = FunctionType(own.__code__, own.__globals__ | ours, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return MethodType(forward, module)


def _convolution(
    module: nn.Module,
    carried: bool,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **others: object,
) -> torch.Tensor:
    """transformers' function: x [1,C,T], weight [C,W], bias [C] -> [1,C,T]. Raises UnsupportedModelError for a call it cannot serve.

    carried: a recurrence comes behind it. Then all is of the weight's dtype, as there; without one, rows lie in pages, and are of theirs, with the
    numbers that the weight's has.
    """
    forward, layer_idx = _running(module, x.shape[0], others)
    rows = x[0].transpose(0, 1).to(weight.dtype).to(weight.dtype if carried else x.dtype).contiguous()
    with forward.mode.paused():
        out = (forward.step.convolve_carried if carried else forward.step.convolve)(layer_idx, rows, weight, bias)
    out = out.to(weight.dtype)
    if activation is not None:
        out = _curve(forward, ACT2FN[activation], out)
    return out.to(x.dtype).transpose(0, 1).unsqueeze(0)


def _gated_delta_rule(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """transformers' function: query, key [1,T,Hk,Dk], value [1,T,Hv,Dv], g and beta [1,T,Hv] -> ([1,T,Hv,Dv], None). Raises as `_convolution`."""
    q, k, v = (x[0].contiguous() for x in (query, key, value))
    decay, scale = _curve(current(), torch.exp, g[0].float().contiguous()), key.shape[-1] ** -0.5
    given = Recurrence(q, k, v, decay, beta[0].float().contiguous(), scale, normalized=use_qk_l2norm_in_kernel, corrects=True)
    return _recur(module, given, query.shape[0], others), None


def _mamba2_scan(
    module: nn.Module,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **others: object,
) -> torch.Tensor:
    """transformers' function: hidden_states [1,T,H,P], dt [1,T,H], A, D and dt_bias [H], B and C [1,T,G,N] -> fp32 [1,T,H,P].

    Raises as `_convolution`.
    """
    step = dt[0].contiguous() if dt_bias is None else dt[0] + dt_bias.to(dt.dtype)
    step = _curve(current(), functional.softplus, step) if dt_softplus else step
    step = (step if dt_softplus and tuple(dt_limit) == (0.0, math.inf) else step.clamp(*dt_limit)).float()
    decay = _curve(current(), torch.exp, A.float() * step)
    q, k, v = (x[0].float().contiguous() for x in (C, B, hidden_states))
    out = _recur(module, Recurrence(q, k, v, decay, step, 1.0, normalized=False, corrects=False), dt.shape[0], others)
    return out if D is None else out + D[:, None] * v


def _recur(module: nn.Module, given: Recurrence, batch: int, others: dict[str, object]) -> torch.Tensor:
    forward, layer_idx = _running(module, batch, others)
    with forward.mode.paused():
        return forward.step.recur(layer_idx, given).unsqueeze(0)


def _curve(forward: Running, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """function(x), elementwise, in whole vectors where that matters."""
    return in_whole_vectors(function, x) if forward.mode.whole_vectors else function(x)


def _running(module: nn.Module, batch: int, others: dict[str, object]) -> tuple[Running, int]:
    """The forward in progress and the module's layer_idx."""
    forward, layer_idx = current(), cast(int, getattr(module, "layer_idx", None))  # None is refused by examine
    if layer_idx not in forward.chunks:
        forward.chunks[layer_idx] = examine(module, layer_idx)
    if batch != 1:
        raise UnsupportedModelError(f"{told(module)} mixes a batch of {batch}, not 1")
    if foreign := [name for name, given in others.items() if isinstance(given, torch.Tensor) and name != "position_ids"]:
        raise UnsupportedModelError(f"{told(module)} mixes tokens by tensors that are not known here ({', '.join(foreign)})")
    return forward, layer_idx
