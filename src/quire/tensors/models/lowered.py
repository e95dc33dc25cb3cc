"""Decoder layers as native programs: a layer's forward is one call into C++, attention in the step included.

    load     two short forwards ── recording.py ──> operators ── lowering.py ──> a plan ── program.py ──> a program for each kind of layer
    step     layer(hidden, ...) ──> program, which attends in `step.of_programs`; in a step without, step.attend between two halves

Products and attention are those of plain layers. What lies between them is computed a token at a time, in one order, by any number of threads, so a
token's bits depend on nothing else by construction; they are those of torch's operators but for functions such as silu, which differ in the last
bit. A layer of which this cannot be told stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quire.tensors.models.calls import decoder_layers, foreign_module, layer_ids, likeness, put_together, take_apart, taken_apart, weights_of
from quire.tensors.models.geometry import DryRun, LayerGeometry
from quire.tensors.models.hook import Running, current, running
from quire.tensors.models.lowering import lower
from quire.tensors.models.program import Program, assemble
from quire.tensors.models.recording import Recorder, Recording, Seen, UnlowerableError
from quire.tensors.models.rowplan import Plan
from quire.tensors.models.surgery import Surgery
from quire.tensors.native import DTYPE_CODES, lib
from quire.tensors.native_products import NativeProducts
from quire.tensors.packed import bytes_of

_FEW, _MORE = 3, 5  # tokens of the recorded forwards
_ROUNDINGS = 16  # of the largest value, that a layer may differ by

Record = Callable[[Recorder, int], object]


class LoweredLayers:
    """The layers of one model that are programs. `surgery`: with those in their places; `plain`: class of a layer that stayed as it is -> why.

    `code`: changes whenever the programs do.
    """

    def __init__(self, surgery: Surgery, plans: dict[nn.Module, Plan], plain: dict[str, str]) -> None:
        self.surgery, self.plain, self.num_lowered = surgery, plain, len(plans)
        self.code = hashlib.sha256(repr(list({id(plan): plan for plan in plans.values()}.values())).encode()).hexdigest()
        self._kinds: list[Any] = list({type(module) for layer in plans for module in layer.modules()})
        self._forwards = [kind.forward for kind in self._kinds]
        inside = [module for layer in plans for module in layer.modules()]
        self._parts = []
        for module in inside:
            hooks = () if module in plans else (module._forward_hooks, module._forward_pre_hooks)
            self._parts.append((module, type(module), module.__dict__, module._modules, list(module.children()), *hooks))

    def intact(self) -> bool:
        """Whether the layers are still made of the modules they were made of, none of them hooked, wrapped or patched since."""
        if [kind.forward for kind in self._kinds] != self._forwards:
            return False
        for module, kind, state, inner, children, *hooks in self._parts:  # hundreds of them, before every forward
            if type(module) is not kind or "forward" in state or (inner and list(inner.values()) != children) or any(hooks):
                return False
        return True


def lower_layers(model: PreTrainedModel, products: NativeProducts, record: Record, *, live: bool, geometry: Sequence[LayerGeometry]) -> LoweredLayers:
    """Lower what can be lowered of the decoder layers of `model`.

    record: runs the model with a recorder and so many tokens, on a `RecordingProducts` and a `RecordingStep`. geometry: of every attention layer.
    """
    plain: dict[str, str] = {}
    layers = []
    for layer in decoder_layers(model):
        foreign = foreign_module(layer) if live else None
        if foreign is not None or "forward" in layer.__dict__:
            plain[type(layer).__name__] = f"{type(foreign or layer).__name__} is its owner's code, or wrapped"
        elif len(layer_ids(layer)) != 1:
            plain[type(layer).__name__] = "its modules belong to several layers"
        else:
            layers.append(layer)
    shapes = {shape.layer_idx: replace(shape, layer_idx=0) for shape in geometry}
    kinds: dict[object, list[nn.Module]] = {}
    for layer in layers:
        kinds.setdefault((likeness(layer), *(shapes.get(layer_idx) for layer_idx in layer_ids(layer))), []).append(layer)
    recorders = [Recorder([alike[0] for alike in kinds.values()]) for _ in range(2)]
    for recorder, num_tokens in zip(recorders, (_FEW, _MORE), strict=True) if kinds else ():
        record(recorder, num_tokens)
    surgery = Surgery(model, products, live=live)
    lowered: dict[nn.Module, Plan] = {}
    for first, *others in kinds.values():
        try:
            few, more = (recorder.recordings.get(first) for recorder in recorders)
            if few is None or more is None:
                raise UnlowerableError("it is not called")
            plan = lower(few, more)
            program = assemble(plan)
            if not _agrees(_forward(plan, program, first, more, products.num_threads, live), more, surgery):
                raise UnlowerableError("its program does not give what it gives")
        except UnlowerableError as error:
            plain[type(first).__name__] = str(error)
            continue
        for layer in (first, *others):
            lowered[layer] = plan
            surgery.replace(layer, _forward(plan, program, layer, more, products.num_threads, live))
    return LoweredLayers(surgery, lowered, plain)


def _forward(plan: Plan, program: Program, layer: nn.Module, recording: Recording, num_threads: int, live: bool) -> Callable[..., Any]:
    """The forward that a layer gets. A live model's weights are looked up at every call: a trainer may have put others in their place."""
    native, middle, end = program.native, program.middle, program.end
    weights, (layer_idx,) = weights_of(layer), layer_ids(layer)
    skeleton, result, attend = recording.call.skeleton, recording.result, plan.attend
    used = [(place, *weights[number], recording.weights[number]) for place, (_, number) in enumerate(plan.weights)]
    form, first = lib.AttendForm(*_attention_of(plan)), len(plan.weights) + len(plan.inputs)
    inputs = [(number, plan.sizes[value], plan.dtypes[value]) for value, number in plan.inputs]
    outputs = [(shape, plan.dtypes[value]) for value, shape in plan.outputs]
    attended, mask = [(shape, plan.dtypes[value]) for shape, value in zip(attend.shapes, attend.values, strict=True)], attend.mask
    out_size, out_dtype = plan.sizes[attend.out], plan.dtypes[attend.out]
    addresses = [0] * len(plan.weights)
    own: list[torch.Tensor] = []  # keeps the memory of a model of our own, whose weights are looked up once
    empty = torch.empty

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors: list[torch.Tensor] = []
        if not taken_apart((args, kwargs), skeleton, tensors):
            raise RuntimeError(f"layer {layer_idx} is called with other arguments than it was lowered for")
        for place, part, name, seen in used if live or not own else ():
            weight = bytes_of(part[name])
            address = weight.data_ptr()
            if address != addresses[place]:
                _check(weight, seen, name, layer_idx)
                addresses[place] = address
            if not live:
                own.append(weight)
        given = [tensors[number].contiguous() for number, _, _ in inputs]
        num_tokens = given[0].numel() // inputs[0][1]
        for x, (_, size, dtype) in zip(given, inputs, strict=True):
            if x.numel() != num_tokens * size or x.dtype is not dtype:
                raise RuntimeError(f"layer {layer_idx}: {tuple(x.shape)} of {x.dtype} is not {size} of {dtype} for each of {num_tokens} tokens")
        results = [empty((1, num_tokens, *shape), dtype=dtype) for shape, dtype in outputs]
        where = [*addresses, *[x.data_ptr() for x in given], 0, 0, 0, 0, *[x.data_ptr() for x in results]]
        running = current()
        step = getattr(running.step, "of_programs", None)
        if step is not None:
            native.run_layer(middle, first, form, layer_idx, step.handle, num_tokens, where, num_threads)
            return put_together(result, iter(results))
        q, k, v = [empty((num_tokens, *shape), dtype=dtype) for shape, dtype in attended]
        where[first : first + 3] = q.data_ptr(), k.data_ptr(), v.data_ptr()
        native.run(0, middle, num_tokens, where, num_threads)
        with running.mode.paused():
            out = running.step.attend(layer_idx, q, k, v, mask)
        if out.numel() != num_tokens * out_size or out.dtype is not out_dtype or not out.is_contiguous():
            raise RuntimeError(f"layer {layer_idx}: attention gave {tuple(out.shape)} of {out.dtype}, not {out_size} of {out_dtype} a token")
        where[first + 3] = out.data_ptr()
        native.run(middle, end, num_tokens, where, num_threads)
        return put_together(result, iter(results))

    return forward


def _attention_of(plan: Plan) -> tuple[int | float, ...]:
    """What `AttendForm` is made of (csrc/step.h)."""
    attend, mask = plan.attend, plan.attend.mask
    return DTYPE_CODES[plan.dtypes[attend.values[0]]], attend.shapes[0][0], mask.window, mask.chunk, mask.scale, mask.softcap


def _check(weight: torch.Tensor, seen: Seen, name: str, layer_idx: int) -> None:
    """A weight that another tensor has been put in the place of must be one like it."""
    alike = weight.shape == seen.shape and weight.stride() == seen.stride and weight.dtype == seen.dtype and weight.is_cpu
    if not alike or type(weight) not in (nn.Parameter, torch.Tensor):
        now = f"{type(weight).__name__} {tuple(weight.shape)} {weight.dtype}"
        raise RuntimeError(f"{name} of layer {layer_idx} is now {now}, which it was not lowered for: open the model anew")


def _agrees(forward: Callable[..., Any], recording: Recording, surgery: Surgery) -> bool:
    """Whether a program gives what the layer itself gave: a fault would be of the size of the values, roundings are far below."""
    positions = torch.arange(_MORE)
    args, kwargs = put_together(recording.call.skeleton, iter(recording.call.tensors))
    got: list[torch.Tensor] = []
    with running(Running(DryRun(), positions, surgery.mode, {}, {}, positions)):
        take_apart(forward(*args, **kwargs), got)
    for a, b in zip(got, recording.results, strict=True):
        allowed = _ROUNDINGS * torch.finfo(b.dtype).eps * float(b.abs().max())
        if a.shape != b.shape or a.dtype != b.dtype or not float((a.float() - b.float()).abs().max()) <= allowed:
            return False
    return True
