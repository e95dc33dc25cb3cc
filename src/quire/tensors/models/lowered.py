"""Decoder layers as native programs: their forwards are calls into C++, attention in the step included.

    load     two short forwards ── recording.py ──> operators ── lowering.py ──> a plan ── program.py ──> a program for each kind of layer
    step     layer(hidden, ...) ──> lowered_layer.py: its program, which attends in `step.of_programs`; in a step without, step.attend between two
             parts, as layers with a state always do. Layers that follow one another are one native call (chain.py)

Products and attention are those of plain layers. What lies between them is computed a token at a time, in one order, by any number of threads, so a
token's bits depend on nothing else by construction; they are those of torch's operators but for functions such as silu, which differ in the last
bit. A layer of which this cannot be told stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quire.tensors.models.calls import decoder_layers, foreign_module, hooks_of_all, is_wrapped, layer_ids, likeness, put_together, take_apart
from quire.tensors.models.chain import Chains
from quire.tensors.models.geometry import DryRun, LayerGeometry
from quire.tensors.models.hook import Running, running
from quire.tensors.models.lowered_layer import LoweredLayer
from quire.tensors.models.lowering import lower
from quire.tensors.models.program import assemble
from quire.tensors.models.recording import Recording, UnlowerableError
from quire.tensors.models.replay import Replay
from quire.tensors.models.rowplan import Plan
from quire.tensors.models.surgery import Surgery
from quire.tensors.native_products import NativeProducts

_FEW, _MORE = 3, 5  # tokens of the recorded forwards
_ROUNDINGS = 16  # of the largest value, that a layer may differ by

Record = Callable[[Sequence[nn.Module], int], dict[nn.Module, Recording]]


class LoweredLayers:
    """The layers of one model that are programs. `surgery`: with those in their places; `plain`: class of a layer that stayed as it is -> why.

    `code`: changes whenever the programs do. `chains`: those that follow one another. `alike`: those that have another one's program.
    `replay`: the model's forward around them.
    """

    def __init__(
        self,
        surgery: Surgery,
        plans: dict[nn.Module, Plan],
        plain: dict[str, str],
        chains: Chains,
        alike: dict[nn.Module, LoweredLayer],
        replay: Replay,
    ) -> None:
        self.surgery, self.plain, self.num_lowered, self.chains, self.alike, self.replay = surgery, plain, len(plans), chains, alike, replay
        self.code = hashlib.sha256(repr(list({id(plan): plan for plan in plans.values()}.values())).encode()).hexdigest()
        inside = [module for layer in plans for module in layer.modules()]
        self._kinds: list[Any] = list({type(module) for module in inside})
        self._forwards = [kind.forward for kind in self._kinds]
        self._parts = []
        for module in inside:
            hooks = () if module in plans else (module._forward_hooks, module._forward_pre_hooks)
            self._parts.append((module, type(module), module.__dict__, module._modules, list(module.children()), *hooks))

    @contextmanager
    def first_of_each(self) -> Iterator[None]:
        """Inside, those `alike` give what they get, where they can and in steps that attend by themselves, so that each program runs once."""
        for layer in self.alike.values():
            layer.passing = layer.passes
        try:
            yield
        finally:
            for layer in self.alike.values():
                layer.passing = False

    def intact(self) -> bool:
        """Whether the layers are still made of the modules they were made of, none of them hooked, wrapped or patched since."""
        if [kind.forward for kind in self._kinds] != self._forwards or hooks_of_all():
            return False
        for module, kind, state, inner, children, *hooks in self._parts:  # hundreds of them, before every forward
            if type(module) is not kind or "forward" in state or (inner and list(inner.values()) != children) or any(hooks):
                return False
        return True


def lower_layers(model: PreTrainedModel, products: NativeProducts, record: Record, *, live: bool, geometry: Sequence[LayerGeometry]) -> LoweredLayers:
    """Lower what can be lowered of the decoder layers of `model`.

    record: runs the model with so many tokens and gives a recording of each of these layers that is called. geometry: of every attention layer.
    """
    plain: dict[str, str] = {}
    layers, candidates = decoder_layers(model), []
    for layer in layers:
        foreign = foreign_module(layer) if live else None
        if foreign is not None or "forward" in layer.__dict__:
            plain[type(layer).__name__] = f"{type(foreign or layer).__name__} is its owner's code, or wrapped"
        elif len(layer_ids(layer)) != 1:
            plain[type(layer).__name__] = "its modules belong to several layers"
        else:
            candidates.append(layer)
    shapes = {shape.layer_idx: replace(shape, layer_idx=0) for shape in geometry}
    kinds: dict[object, list[nn.Module]] = {}
    for layer in candidates:
        kinds.setdefault((likeness(layer), *(shapes.get(layer_idx) for layer_idx in layer_ids(layer))), []).append(layer)
    firsts = [first for first, *_ in kinds.values()]
    recordings = [record(firsts, num_tokens) for num_tokens in (_FEW, _MORE)] if firsts else []
    surgery = Surgery(model, products, live=live)
    lowered: dict[nn.Module, Plan] = {}
    alike: dict[nn.Module, LoweredLayer] = {}
    chains = Chains()
    for first, *others in kinds.values():
        try:
            few, more = (recorded.get(first) for recorded in recordings)
            if few is None or more is None:
                raise UnlowerableError("it is not called")
            plan = lower(few, more)
            program = assemble(plan)
            if not _agrees(LoweredLayer(plan, program, first, more, products.num_threads, live=live), more, surgery):
                raise UnlowerableError("its program does not give what it gives")
        except UnlowerableError as error:
            plain[type(first).__name__] = str(error)
            continue
        for layer in (first, *others):
            lowered[layer] = plan
            held = None if is_wrapped(layer) else chains  # a hook is to see the layer's tensors
            forward = LoweredLayer(plan, program, layer, more, products.num_threads, live=live, chains=held)
            surgery.replace(layer, forward)
            if layer is not first:
                alike[layer] = forward
    replay = Replay(model, layers, surgery, chains, products.num_threads, live=live)
    return LoweredLayers(surgery, lowered, plain, chains, alike, replay)


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
