"""Decoder layers as compiled code: each traced once, each distinct graph compiled once, nothing compiled again.

    load     one layer of each kind ── trace.py ──> a graph;  equal graphs ──> one call of torch's Inductor, or of its cache on disk
    step     layer(hidden, ...) ──> compiled(weights, positions, hidden, ...) ──> products, attention: opaque.py, as they always run

There is no guard and no second trace: the number of tokens is a symbol in the code, and all that differs from layer to layer is an argument. So what
the code was made for is checked here or refused: a layer's other arguments are the same in every step, and its code branches on no value.

Promise 1 among compiled runs: kernels and attention are those of every run; generated loops run over whole rows, and where one runs over a whole
tensor its length is a multiple of GRANULE: the packed tokens are padded to that. The probe asks the compiled form for its bits (probe.py).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers import PreTrainedModel

from quire.errors import ConfigError, UnsupportedModelError
from quire.tensors.models.calls import Call, decoder_layers, foreign_module, layer_ids, likeness, put_together, take_apart_as, weights_of
from quire.tensors.models.geometry import LayerGeometry, NoAttention
from quire.tensors.models.hook import current
from quire.tensors.models.opaque import OpaqueProducts
from quire.tensors.models.surgery import Surgery
from quire.tensors.models.trace import Traced, UntraceableError, example_inputs, trace
from quire.tensors.packed import bytes_of

GRANULE = 16  # tokens a step is padded to: floats in the longest vector
_FEW, _MORE = 2 * GRANULE, 3 * GRANULE

Compiled = Callable[..., Any]
RunTokens = Callable[[NoAttention, int], object]


def compile_layers(model: PreTrainedModel, surgery: Surgery, run: RunTokens, *, live: bool, geometry: Sequence[LayerGeometry]) -> str:
    """Compile the decoder layers of `model` and have `surgery` put the compiled forms in their place.

    Returns a name of the code, which changes whenever its output's bits may: with the graphs and with the C++ compiler.

    run: runs the model, uncompiled, with a step and so many tokens. geometry: of every attention layer.

    Raises:
        ConfigError: this machine has no C++ compiler.
        UnsupportedModelError: the model cannot be compiled, with the reason.
    """
    compiler = _compiler()
    layers = decoder_layers(model)
    if not layers:
        raise UnsupportedModelError(f"{model.config.model_type}: compile=True: it has no layers that transformers marks as decoder layers")
    if live:
        for layer in layers:
            _refuse_foreign(model, layer)
    opaque = Surgery(model, OpaqueProducts(), live=live)
    few, more = _record(layers, lambda: run(NoAttention(), _FEW)), _record(layers, lambda: run(NoAttention(), _MORE))
    shapes = {shape.layer_idx: replace(shape, layer_idx=0) for shape in geometry}
    compiled: dict[str, Compiled] = {}
    traced: list[Traced] = []
    known: dict[object, Traced] = {}
    for layer in layers:
        try:
            layer_idx = _layer_idx(layer)
            if len(few[layer]) != 1 or len(more[layer]) != 1:
                raise UntraceableError(f"it is called {len(few[layer])} times in a forward")
            kind = (likeness(layer), few[layer][0].shapes, more[layer][0].shapes, shapes.get(layer_idx), opaque.query_scales.get(layer_idx))
            if kind not in known:
                known[kind] = trace(layer, few[layer][0], more[layer][0], opaque)
                if known[kind].layer_idx != layer_idx:
                    raise UntraceableError(f"its attention is that of layer {known[kind].layer_idx}")
            one = replace(known[kind], layer_idx=layer_idx, weights=weights_of(layer))
            if one.key not in compiled:
                compiled[one.key] = _compile(one)
        except Exception as error:  # a model's own code, torch's tracer and its compiler may raise anything
            what = f"{model.config.model_type}: compile=True: {type(layer).__name__} cannot be compiled"
            raise UnsupportedModelError(f"{what}: {_why(error)}") from error
        traced.append(one)
    if sorted(one.layer_idx for one in traced) != sorted(shapes):
        raise UnsupportedModelError(f"{model.config.model_type}: compile=True: some attention is outside its decoder layers")
    for layer, one in zip(layers, traced, strict=True):
        surgery.replace(layer, _forward(one, compiled[one.key]))
    return hashlib.sha256("\n".join([compiler, *compiled]).encode()).hexdigest()


def _layer_idx(layer: nn.Module) -> int:
    found = layer_ids(layer)
    if len(found) != 1:
        raise UntraceableError(f"its modules belong to layers {sorted(found)}")
    return found.pop()


def _refuse_foreign(model: PreTrainedModel, layer: nn.Module) -> None:
    """A live model's own Python is read once, when it is traced: adapters that are switched on and off, or hooks, would be seen no more."""
    module = foreign_module(layer)
    if module is not None:
        raise UnsupportedModelError(
            f"{model.config.model_type}: compile=True: {type(module).__name__} in a layer of this live model is its owner's code, or wrapped:"
            " it may change what it computes, and a compiled layer would not see that"
        )


def _record(layers: Sequence[nn.Module], run: Callable[[], object]) -> dict[nn.Module, list[Call]]:
    """The calls that `run` makes of each layer."""
    calls: dict[nn.Module, list[Call]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[layer].append(Call.of(args, kwargs))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _compile(traced: Traced) -> Compiled:
    """Inductor's code for a graph. torch keeps it on disk (TORCHINDUCTOR_CACHE_DIR) and takes it from there the next time."""
    from torch._inductor import config, standalone_compile

    # One thread: what is left between products is small, and the kernels' own threads would wait for these. No pool of compiling processes either.
    with config.patch({"cpp.threads": 1, "compile_threads": 1}), torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about torch
        artifact: Compiled = standalone_compile(traced.graph, example_inputs(traced.graph), dynamic_shapes="from_graph")
    return artifact


def _forward(traced: Traced, compiled: Compiled) -> Callable[..., Any]:
    """The forward that a layer gets. Weights are read at every call: a trainer may have put others in their place."""
    weights, layer_idx, skeleton, result = traced.weights, traced.layer_idx, traced.skeleton, traced.result

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors: list[torch.Tensor] = []
        if not take_apart_as(skeleton, (args, kwargs), tensors):
            raise RuntimeError(f"layer {layer_idx} is called with other arguments than it was compiled for")
        step = current()
        step.layer_idx = layer_idx
        given = [bytes_of(part[name]) for part, name in weights]
        return put_together(result, iter(compiled(*given, step.padded, *(x.contiguous() for x in tensors))))

    return forward


def _compiler() -> str:
    """The C++ compiler's name and version."""
    from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler

    try:
        return get_compiler_version_info(get_cpp_compiler())
    except Exception as error:
        raise ConfigError("compile=True: needs a C++ compiler on this machine, g++ or the one that CXX names; none was found") from error


def _why(error: Exception) -> str:
    if isinstance(error, UntraceableError):
        return str(error)
    if isinstance(error, GuardOnDataDependentSymNode | DataDependentOutputException):
        return "its code depends on the values it computes, as that of experts does, each of which gets the tokens that chose it"
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
