"""One decoder layer as a graph of tensor operations: what the compiler is given.

The layer's own forward is run once on tensors that have shapes and no data. All its weights and buffers are inputs of the graph, so layers of one
kind give the same graph and a trainer's changes are seen; the number of tokens is a symbol in it, so one graph serves every step. Products and
attention are single operators (opaque.py). What would tie the graph to one number of tokens, or to values, is an error here.

Shape letters: T packed tokens, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from quire.tensors.models.hook import Running, running
from quire.tensors.models.opaque import OpaqueStep
from quire.tensors.models.surgery import Surgery
from quire.tensors.packed import PackedWeight, bytes_of

_TENSOR = object()  # where a tensor was in a skeleton
_PLAIN = (bool, int, float, str, type(None))
_TOKENS = (16, 32, 48, 512, 4096, 2**20)  # numbers of tokens at which a graph's conditions must hold


class UntraceableError(Exception):
    """The layer cannot be a graph; the message says why."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer: its tensors in order, and its arguments with those taken out."""

    skeleton: Any
    tensors: tuple[torch.Tensor, ...]

    @property
    def shapes(self) -> tuple[object, ...]:
        """What a trace of it depends on."""
        return repr(self.skeleton), *((tensor.shape, tensor.dtype) for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Traced:
    """A layer as a graph over (weights and buffers, positions int64 [T], tensors of its call).

    `key` is equal for layers that one compiled graph serves. `weights`: where each weight is found at a call. `skeleton`, `result`: a call's
    arguments and what it returns, their tensors taken out.
    """

    graph: GraphModule
    key: str
    layer_idx: int
    weights: tuple[tuple[dict[str, Any], str], ...]
    skeleton: Any
    result: Any


def take_apart(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The skeleton of nested arguments; their tensors are appended to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _TENSOR
    if type(value) in (tuple, list):
        return [take_apart(item, tensors) for item in value] if type(value) is list else tuple([take_apart(item, tensors) for item in value])
    if type(value) is dict:
        return {name: take_apart(item, tensors) for name, item in value.items()}
    return value


def put_together(skeleton: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The inverse of `take_apart`."""
    if skeleton is _TENSOR:
        return next(tensors)
    if type(skeleton) in (tuple, list):
        return type(skeleton)(put_together(item, tensors) for item in skeleton)
    if type(skeleton) is dict:
        return {name: put_together(item, tensors) for name, item in skeleton.items()}
    return skeleton


def trace(layer: nn.Module, few: Call, more: Call, surgery: Surgery) -> Traced:
    """`layer` as a graph, from two of its calls with different numbers of tokens; `surgery` must be one over `OpaqueProducts`.

    Raises UntraceableError, and whatever a layer raises that branches on values or counts on a number of tokens.
    """
    weights = _weights(layer)
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
    if few.skeleton != more.skeleton or num_tokens is None:
        raise UntraceableError("its arguments change from call to call in more than the number of tokens")
    step, results = OpaqueStep(), []
    with mode:
        positions = torch.empty(num_tokens, dtype=torch.long)

    def flat(given: list[torch.Tensor], positions: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        forward = Running(step, positions, surgery.mode, surgery.query_scales, surgery.chunks, positions)
        args, kwargs = put_together(few.skeleton, iter(inputs))
        with running(forward), surgery.installed(), _replaced(weights, given):
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


def same_for(traced: Traced, layer: nn.Module, layer_idx: int) -> Traced:
    """What `trace` would give for a layer alike the one that was traced."""
    return replace(traced, layer_idx=layer_idx, weights=_weights(layer))


def likeness(layer: nn.Module) -> tuple[object, ...]:
    """Equal for layers that must give the same graph: the same modules, shapes and attributes but for layer_idx.

    An attribute that is no plain value must be one and the same object.
    """
    told: list[object] = []
    for name, module in layer.named_modules():
        told += [name, type(module)]
        for attribute, value in module.__dict__.items():
            if attribute in ("_parameters", "_buffers"):
                told += [(key, None if x is None else (x.shape, x.stride(), x.dtype, type(x))) for key, x in value.items()]
            elif attribute not in ("_modules", "layer_idx") and not (attribute.startswith("_") and not value):  # empty: no hooks of any kind
                told += [attribute, value if isinstance(value, _PLAIN) else id(value)]
    return tuple(told)


def example_inputs(graph: GraphModule) -> list[Any]:
    """The shapes a graph was traced with, as tensors without data."""
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


def _weights(layer: nn.Module) -> tuple[tuple[dict[str, Any], str], ...]:
    parts = [part for module in layer.modules() for part in (module._parameters, module._buffers)]
    return tuple((part, name) for part in parts for name, weight in part.items() if weight is not None)


def _token_axes(tensor: torch.Tensor, other: torch.Tensor) -> tuple[int, ...]:
    if tensor.dim() != other.dim() or tensor.dtype != other.dtype:
        raise UntraceableError("its arguments change from call to call in more than the number of tokens")
    return tuple(axis for axis in range(tensor.dim()) if tensor.shape[axis] != other.shape[axis])


class _replaced:
    """Other tensors in the place of a layer's weights, or of the bytes of packed ones, for the time of a trace."""

    def __init__(self, weights: tuple[tuple[dict[str, Any], str], ...], given: list[torch.Tensor]) -> None:
        self._weights, self._given = weights, given
        self._before = [part[name] for part, name in weights]

    def __enter__(self) -> None:
        pairs = zip(self._before, self._given, strict=True)
        self._put([before.with_packed(given) if isinstance(before, PackedWeight) else given for before, given in pairs])

    def __exit__(self, *_: object) -> None:
        self._put(self._before)

    def _put(self, tensors: list[torch.Tensor]) -> None:
        for (part, name), tensor in zip(self._weights, tensors, strict=True):
            part[name] = tensor


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
