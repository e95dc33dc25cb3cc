"""A model's forward as the calls of modules that it was seen to make, without its own Python around them.

    seen       embedding(ids) ──> rope(h, positions) ──> layer 0 ──> ... ──> layer n ──> norm ──> rows wanted ──> head
    replayed   embedding(ids) ──> rope(h, positions) ──> chain ─────────────────────────> norm ──> rows wanted ──> head

One short forward is watched, operators included: nothing but the inputs and what other calls gave may reach a call, and no operator between calls may
do more than take the rows of which logits are wanted, as far as it matters to the logits. It is then run again in this way, and must give the same
bits; as one native call where it can be (native_forward.py). A model that does anything else (scales its embedding itself, caps its logits) keeps its
own forward, and so does one whose code is its owner's or wrapped, outside of what is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quire.tensors.models.calls import changed, holding, is_foreign, is_wrapped, put_together, take_apart
from quire.tensors.models.chain import Chains
from quire.tensors.models.hook import current
from quire.tensors.models.lowered_layer import LoweredLayer
from quire.tensors.models.native_forward import NativeForward, native_forward
from quire.tensors.models.surgery import Surgery
from quire.tensors.packed import PackedWeight

_INPUTS = ("input_ids", "position_ids", "logits_to_keep")
_WANTED = 2  # among them
_FIRST_WATCHED, _MOST_WATCHED = 16, 256  # tokens of a forward that is run twice, at most: of the first one, and of later ones where all were longer


class Forward(Protocol):
    """A model's own forward with some inputs; inside of what it is given, if anything."""

    def __call__(self, watching: AbstractContextManager[None] | None = None, /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """What is called; its arguments without their tensors, and the places of these among all values: the inputs, then what calls gave.

    gives: the places of what it gives. module: the one that is called, None of the rows wanted and of a chain.
    """

    run: Callable[..., Any]
    skeleton: Any
    places: tuple[int, ...]
    gives: range
    module: nn.Module | None = None


class Replay:
    """The replayed forward of one model, once it has been seen. `layers`: its decoder layers; `chains`: those that follow one another.

    native: the whole of it as one call, of a model of our own where that can be.

    A live model's modules are called as such, with `surgery`'s changes installed, since weights, hooks and what else is its owner's may be others by
    then; of a model of our own, what they were seen to run.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], surgery: Surgery, chains: Chains, num_threads: int, *, live: bool) -> None:
        self.calls: list[ModuleCall] = []
        self.native: NativeForward | None = None
        self._num_threads, self._most_watched = num_threads, _FIRST_WATCHED
        self._surgery, self._chains, self._live = surgery, chains, live
        self._around, self._parts = holding(model, layers)
        self._kinds = [(module, type(module), type(module).forward) for module in self._around]
        self._to_watch = not any(map(is_foreign, self._around))

    def run(self, forward: Forward, inputs: dict[str, Any]) -> torch.Tensor:
        """Logits [1, R, V]: what `forward()`, the model's own with these `inputs`, gives, within what it is given."""
        programs = current().step.of_programs
        if programs is None or not self._chains.held or (self._live and not self._untouched()):
            return self._chains.run(forward)
        if self.calls:
            return self._chains.run(lambda: self._replayed(inputs), forward)
        if not self._to_watch or not self._untouched():
            return self._chains.run(forward)
        if inputs["input_ids"].numel() > self._most_watched:
            self._most_watched = min(2 * self._most_watched, _MOST_WATCHED)
            return self._chains.run(forward)
        self._to_watch = False
        watch = Watch(inputs)
        logits = self._chains.run(lambda: forward(watch.watching(self._parts, live=self._live)), forward)
        calls = watch.calls_for(logits)
        if calls and self._chains.held:
            self.calls = calls
            native = None if self._live else native_forward(calls, self._num_threads)
            if native is not None and _same_bits(native(programs, *(inputs[name].view(-1) for name in _INPUTS)), logits[0]):
                self.native = native
            elif not _same_bits(self._chains.run(lambda: self._replayed(inputs), forward), logits):
                self.calls = []
        return logits

    def _replayed(self, inputs: dict[str, Any]) -> torch.Tensor:
        values: list[Any] = [inputs.get(name) for name in _INPUTS]
        with self._surgery.installed() if self._live else nullcontext():
            for call in self.calls:
                args, kwargs = put_together(call.skeleton, iter([values[place] for place in call.places]))
                take_apart(call.run(*args, **kwargs), values)
        logits: torch.Tensor = values[-1]
        return logits

    def _untouched(self) -> bool:
        return all(type(module) is kind and kind.forward is forward and not is_wrapped(module) for module, kind, forward in self._kinds)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The calls that one forward makes of a model's parts."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the first forward would import Dynamo to be skipped by it

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values: list[Any] = [inputs.get(name) for name in _INPUTS]  # held, so that no other tensor gets the id of one of them
        self._places = {id(x): place for place, x in enumerate(self._values) if x is not None}
        self._calls: list[ModuleCall] = []
        self._within = False
        self._strange = False  # whether anything was seen that cannot be replayed
        self._begun: tuple[Any, tuple[int, ...]] | None = None  # arguments of the first layer of a chain in progress

    def calls_for(self, logits: torch.Tensor) -> list[ModuleCall]:
        """All calls, if the last one gave the logits; otherwise none."""
        return self._calls if not self._strange and self._places.get(id(logits)) == len(self._values) - 1 else []

    @contextmanager
    def watching(self, parts: Sequence[nn.Module], *, live: bool) -> Iterator[None]:
        """Inside, calls of these modules are seen."""
        with changed([(module.__dict__, "forward", self._seen(module, module.forward, live)) for module in parts]), self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._within:
            tensors: list[torch.Tensor] = []
            take_apart((args, kwargs or {}), tensors)
            places = tuple(self._places.get(id(x), -1) for x in tensors)
            rows = func is torch.ops.aten.index.Tensor and len(args[1]) == 2 and args[1][0] is None and places[1:] == (_WANTED,)
            if rows and places[0] >= len(_INPUTS):
                self._note(_rows, take_apart((tuple(tensors), {}), []), places, result)
            elif func._schema.is_mutable:
                held = {x.untyped_storage().data_ptr() for x in self._values if x is not None}
                self._strange |= any(x.untyped_storage().data_ptr() in held for x in tensors)
        return result

    def _seen(self, module: nn.Module, forward: Callable[..., Any], live: bool) -> Callable[..., Any]:
        layer = forward if isinstance(forward, LoweredLayer) else None
        chain = layer.chain if layer is not None else None

        def seen(*args: Any, **kwargs: Any) -> Any:
            if self._within:
                return forward(*args, **kwargs)
            tensors: list[torch.Tensor] = []
            skeleton = take_apart((args, kwargs), tensors)
            places = tuple(self._places.get(id(x), -1) for x in tensors)
            self._within = True
            try:
                result = forward(*args, **kwargs)
            finally:
                self._within = False
            if layer is None or chain is None:
                run = module if live else _direct(module, forward)
                self._strange |= run is None or min(places, default=0) < 0 or (layer is None and not _is_constant(skeleton))
                self._note(run or module, skeleton, places, result, module)
            elif layer.index == 0:
                self._strange |= min(places, default=0) < 0
                self._begun = skeleton, places
            elif layer.index == len(chain.layers) - 1 and self._begun is not None:
                self._note(chain, *self._begun, result)
            return result

        return seen

    def _note(self, run: Callable[..., Any], skeleton: Any, places: tuple[int, ...], result: Any, module: nn.Module | None = None) -> None:
        given: list[torch.Tensor] = []
        self._strange |= not _is_constant(take_apart(result, given))
        self._calls.append(ModuleCall(run, skeleton, places, range(len(self._values), len(self._values) + len(given)), module))
        for x in given:
            self._places[id(x)] = len(self._values)
            self._values.append(x)


def _direct(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """What a call of a module comes to where `forward` is in its place; None where it needs more than that to be in place."""
    if isinstance(forward, LoweredLayer):
        return forward
    if module._forward_hooks or module._forward_pre_hooks or list(module.children()):
        return None
    if type(module).forward is nn.Embedding.forward and type(module.weight) is PackedWeight:
        return module.weight.rows
    return forward


def _rows(states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return states[:, at]


def _is_constant(skeleton: Any) -> bool:
    """Whether nothing in it can follow the number of tokens, or be changed by what is called."""
    if type(skeleton) in (tuple, list):
        return all(map(_is_constant, skeleton))
    if type(skeleton) is dict:
        return all(map(_is_constant, skeleton.values()))
    return skeleton is None or type(skeleton) in (bool, str, object)  # object: where a tensor was


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
