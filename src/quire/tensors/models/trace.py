"""One decoder layer as a graph of tensor operations: what the compiler is given.

The layer's own forward is run once on tensors that have shapes and no data. All its weights and buffers are inputs of the graph, so layers of one
kind give the same graph and a trainer's changes are seen; the number of tokens is a symbol in it, so one graph serves every step. Products and
attention are single operators (opaque.py). What would tie the graph to one number of tokens, or to values, is an error here.

Shape letters: T packed tokens, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from quire.tensors.models.calls import Call, Weights, changed, put_together, same_skeleton, take_apart, weights_of
from quire.tensors.models.hook import Running, running
from quire.tensors.models.opaque import OpaqueStep
from quire.tensors.models.surgery import Surgery
from quire.tensors.packed import PackedWeight, bytes_of

_TOKENS = (16, 32, 48, 512, 4096, 2**20)  # numbers of tokens at which a graph's conditions must hold


class UntraceableError(Exception):
    """The layer cannot be a graph; the message says why."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A layer as a graph over (weights and buffers, positions int64 [T], tensors of its call).

    `key` is equal for layers that one compiled graph serves. `weights`: where each weight is found at a call. `skeleton`, `result`: a call's
    arguments and what it returns, their tensors taken out.
    """

    graph: GraphModule
    key: str
    layer_idx: int
    weights: Weights
    skeleton: Any
    result: Any


def trace(layer: nn.Module, few: Call, more: Call, surgery: Surgery) -> Traced:
    """`layer` as a graph, from two of its calls with different numbers of tokens; `surgery` must be one over `OpaqueProducts`.

    Raises UntraceableError, and whatever a layer raises that branches on values or counts on a number of tokens.
    """
    weights = weights_of(layer)
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, static_shapes=False)

    def fake(tensor: torch.Tensor, axes: tuple[int, ...] = ()) -> torch.Tensor:
        # All axes that count tokens have one size, and DUCK gives equal sizes one symbol.
        sizes = [DimDynamic.DUCK if axis in axes else DimDynamic.STATIC for axis in range(tensor.dim())]
        return mode.from_tensor(tensor.detach(), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    # Contiguous ones, not the calls' own: a slice of one batch may have any stride in that axis, which would be one more symbol.
    pairs = zip(few.tensors, more.tensors, strict=True)
    inputs = [fake(torch.empty(tensor.shape, dtype=tensor.dtype), _token_axes(tensor, other)) for tensor, other in pairs]
    num_tokens: Any = next((size for tensor in inputs for size in tensor.shape if isinstance(size, torch.SymInt)), None)
    if not same_skeleton(few.skeleton, more.skeleton) or num_tokens is None:
        raise UntraceableError("its arguments change from call to call in more than the number of tokens")
    step, results = OpaqueStep(), []
    with mode:
        positions = torch.empty(num_tokens, dtype=torch.long)

    def flat(given: list[torch.Tensor], positions: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        forward = Running(step, positions, surgery.mode, surgery.query_scales, surgery.chunks, positions)
        args, kwargs = put_together(few.skeleton, iter(inputs))
        replaced = [(part, name, _in_place_of(part[name], x)) for (part, name), x in zip(weights, given, strict=True)]
        with running(forward), surgery.installed(), changed(replaced):
            outputs: list[torch.Tensor] = []
            results.append(take_apart(layer.forward(*args, **kwargs), outputs))
        return outputs

    fakes = [fake(bytes_of(part[name])) for part, name in weights]
    with torch.inference_mode(False), torch.no_grad(), enable_python_dispatcher(), mode:
        graph = make_fx(flat)(fakes, positions, inputs)
    if len(step.layers) != 1:
        raise UntraceableError(f"it calls attention {len(step.layers)} times")
    _check(graph, env, num_tokens)
    return Traced(graph, _key(graph), step.layers[0], weights, few.skeleton, results[-1])


def example_inputs(graph: GraphModule) -> list[Any]:
    """The shapes a graph was traced with, as tensors without data."""
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


def _token_axes(tensor: torch.Tensor, other: torch.Tensor) -> tuple[int, ...]:
    if tensor.dim() != other.dim() or tensor.dtype != other.dtype:
        raise UntraceableError("its arguments change from call to call in more than the number of tokens")
    return tuple(axis for axis in range(tensor.dim()) if tensor.shape[axis] != other.shape[axis])


def _in_place_of(weight: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The weight a trace sees: the given tensor, or a packed weight with these bytes."""
    return weight.with_packed(given) if isinstance(weight, PackedWeight) else given


def _check(graph: GraphModule, env: ShapeEnv, num_tokens: Any) -> None:
    symbol = num_tokens.node.expr
    if not symbol.is_Symbol:
        raise UntraceableError(f"it works for {num_tokens} tokens only")
    for guard in env.guards:
        if not all(guard.expr.subs(symbol, count) == True for count in _TOKENS):  # noqa: E712  (of sympy's own kind)
            raise UntraceableError(f"it takes another way when not {guard.expr}, for {symbol} tokens")
    constants = [node.target for node in graph.graph.nodes if node.op == "get_attr"]
    if constants:
        raise UntraceableError(f"it reads tensors that are neither weights nor buffers ({constants[0]}: {getattr(graph, str(constants[0]), None)})")


def _key(graph: GraphModule) -> str:
    return "\n".join([graph.code, *(f"{x.dtype} {tuple(x.shape)} {x.stride()}" for x in example_inputs(graph))])
