"""A decoder layer's forward as its native program."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn

from quire.tensors.attention.carried import Recurrence
from quire.tensors.models.calls import layer_ids, put_together, take_apart_as, weights_of
from quire.tensors.models.chain import PASSED, Chain, Chains, LayerCall
from quire.tensors.models.hook import current
from quire.tensors.models.program import Program
from quire.tensors.models.recording import Recording, Seen
from quire.tensors.models.rowplan import Attend, Convolve, Mix, Plan, Recur
from quire.tensors.native import DTYPE_CODES, lib
from quire.tensors.packed import bytes_of


class LoweredLayer:
    """What a layer gets as its forward. A live model's weights are looked up at every call: a trainer may have put others in their place.

    `chain`, `index`: the chain it is in, and where (see chain.py). `native`: quire._native.Layers of it alone. `passes`: whether it can give what it
    gets, as if not there; while `passing` it does so in steps that attend by themselves. Raises RuntimeError where it is called, or its weights are,
    otherwise than when it was lowered.
    """

    def __init__(
        self, plan: Plan, program: Program, layer: nn.Module, recording: Recording, num_threads: int, *, live: bool, chains: Chains | None = None
    ) -> None:
        self.chain: Chain | None = None
        self.index = 0
        self.passing = False
        self._chains, self._live, self._num_threads = chains, live, num_threads
        self._program, self._mixes = program, plan.mixes
        (self._layer_idx,) = layer_ids(layer)
        self._skeleton, self._result = recording.call.skeleton, recording.result
        weights = weights_of(layer)
        self._used = [(place, *weights[number], recording.weights[number]) for place, (_, number) in enumerate(plan.weights)]
        self._inputs = [(number, plan.sizes[value], plan.dtypes[value]) for value, number in plan.inputs]
        self._outputs = [(shape, plan.dtypes[value]) for value, shape in plan.outputs]
        self._mixed = [[(shape, plan.dtypes[value]) for shape, value in zip(mix.shapes, mix.values, strict=True)] for mix in plan.mixes]
        self._gives = [(plan.sizes[mix.out], plan.dtypes[mix.out]) for mix in plan.mixes]
        # The call's tensors that are as the one that it gives.
        self._alike = [number for number, size, dtype in self._inputs if [(size, dtype)] == [(prod(s), d) for s, d in self._outputs]]
        self.passes = len(self._alike) == 1
        self._places = {value: place for place, (value, _) in enumerate(plan.weights)}
        self._addresses = [0] * len(plan.weights)
        self._held: list[torch.Tensor] = []  # keeps the memory of a model of our own, whose weights are looked up once
        self._natives: list[tuple[Any, int]] = []
        self.native: Any = None
        if len(plan.mixes) == 1:  # what carries a state is computed in parts, and its tokens meet where the step keeps states
            self._form = self._form_of(plan.mixes[0], DTYPE_CODES[plan.dtypes[plan.mixes[0].values[0]]])
            self.native = lib.Layers()
            self.add_to(self.native, 0)

    def add_to(self, native: Any, index: int) -> None:
        """Make it the next one, number `index`, of `native`, a quire._native.Layers."""
        native.add(self._program.native, self._program.ends[0], len(self._addresses), len(self._inputs), self._form, self._layer_idx)
        self._natives.append((native, index))
        if all(self._addresses):
            native.set_weights(index, self._addresses)

    @property
    def inputs(self) -> list[int]:
        """The numbers of the call's tensors that it takes, in order."""
        return [number for number, _, _ in self._inputs]

    def place_of(self, number: int) -> int:
        """Where the call's tensor `number` is among the inputs, -1 where it is none."""
        return next((place for place, (given, _, _) in enumerate(self._inputs) if given == number), -1)

    def takes_and_gives_as(self, other: LoweredLayer) -> bool:
        """Whether it can come before `other` in a chain."""
        same = (self._skeleton, self._inputs, self._outputs) == (other._skeleton, other._inputs, other._outputs)
        return same and bool(self._alike)

    def look_up(self) -> None:
        """Find the weights, if they may have been changed."""
        if self._held:
            return
        changed = False
        for place, part, name, seen in self._used:
            weight = bytes_of(part[name])
            address = weight.data_ptr()
            if address != self._addresses[place]:
                _check(weight, seen, name, self._layer_idx)
                self._addresses[place], changed = address, True
            if not self._live:
                self._held.append(weight)
        if changed:
            for native, index in self._natives:
                native.set_weights(index, self._addresses)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        chain = self.chain
        if chain is not None and chain.at == self.index > 0:
            passed: Any = chain.pass_on([*args, *kwargs.values()])
            return put_together(self._result, iter([passed]))
        step = current().step.of_programs
        tensors: list[torch.Tensor] = []
        if not take_apart_as(self._skeleton, (args, kwargs), tensors):
            raise RuntimeError(f"layer {self._layer_idx} is called with other arguments than it was lowered for")
        given, num_tokens = self._given(tensors)
        if self.passing and step is None:
            return put_together(self._result, iter([tensors[self._alike[0]]]))
        results = [torch.empty((1, num_tokens, *shape), dtype=dtype) for shape, dtype in self._outputs]
        inputs = [x.data_ptr() for x in given]
        if step is None or self.native is None:
            self._run_in_parts(num_tokens, inputs, results)
        elif chain is not None and self.index == 0:
            chain.begin([*args, *kwargs.values()], step, num_tokens, inputs, results[0], self._num_threads)
            passed = PASSED
            return put_together(self._result, iter([passed]))
        else:
            self.look_up()
            self.native.run(step.handle, num_tokens, inputs, 0, [x.data_ptr() for x in results], self._num_threads)
            if self._chains is not None and self._chains.seen is not None:
                form, result = (len(args), tuple(kwargs)), results[0] if len(results) == 1 else None
                self._chains.seen.append(LayerCall(self, [*args, *kwargs.values()], form, tensors, result))
        return put_together(self._result, iter(results))

    def _given(self, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
        """Inputs, as a program takes them, out of a call's tensors; and for how many tokens they are."""
        given = [tensors[number].contiguous() for number, _, _ in self._inputs]
        num_tokens = given[0].numel() // self._inputs[0][1]
        for x, (_, size, dtype) in zip(given, self._inputs, strict=True):
            if x.numel() != num_tokens * size or x.dtype is not dtype:
                raise RuntimeError(f"layer {self._layer_idx}: {tuple(x.shape)} of {x.dtype} is not {size} of {dtype} for each of {num_tokens} tokens")
        return given, num_tokens

    def _run_in_parts(self, num_tokens: int, inputs: list[int], results: list[torch.Tensor]) -> None:
        """Where tokens meet in the step itself."""
        self.look_up()
        mode, begin = current().mode, 0
        mixed = [[torch.empty((num_tokens, *shape), dtype=dtype) for shape, dtype in tensors] for tensors in self._mixed]
        where, places, held = [*self._addresses, *inputs], [], []
        for tensors in mixed:
            where += [x.data_ptr() for x in tensors]
            places.append(len(where))
            where.append(0)
        where += [x.data_ptr() for x in results]
        for mix, tensors, place, end, (size, dtype) in zip(self._mixes, mixed, places, self._program.ends, self._gives, strict=False):
            self._program.native.run(begin, end, num_tokens, where, self._num_threads)
            with mode.paused():
                out = self._met(mix, tensors)
            if out.numel() != num_tokens * size or out.dtype is not dtype or not out.is_contiguous():
                what = type(mix).__name__.lower()
                raise RuntimeError(f"layer {self._layer_idx}: {what} gave {tuple(out.shape)} of {out.dtype}, not {size} of {dtype} a token")
            where[place], begin = out.data_ptr(), end
            held.append(out)
        self._program.native.run(begin, self._program.ends[-1], num_tokens, where, self._num_threads)

    def _met(self, mix: Mix, given: list[torch.Tensor]) -> torch.Tensor:
        """What the running step makes of these tensors."""
        step = current().step
        if isinstance(mix, Attend):
            q, k, v = given
            return step.attend(self._layer_idx, q, k, v, mix.mask)
        if isinstance(mix, Recur):
            q, k, v, decay, beta = given
            return step.recur(self._layer_idx, Recurrence(q, k, v, decay, beta, mix.scale, mix.normalized, mix.corrects))
        weight, bias = (None if value is None else self._weight(self._places[value]) for value in (mix.weight, mix.bias))
        assert weight is not None
        return (step.convolve_carried if mix.carried else step.convolve)(self._layer_idx, given[0], weight.view(-1, mix.width), bias)

    def _weight(self, place: int) -> torch.Tensor:
        _, part, name, _ = self._used[place]
        return bytes_of(part[name])

    def _form_of(self, mix: Mix, dtype: int) -> Any:
        """What the native layer is told of how its tokens meet."""
        if isinstance(mix, Attend):
            mask = mix.mask
            return lib.AttendForm(dtype, mix.shapes[0][0], mask.window, mask.chunk, mask.scale, mask.softcap)
        assert isinstance(mix, Convolve)
        return lib.ConvolveForm(dtype, mix.width, self._places[mix.weight], -1 if mix.bias is None else self._places[mix.bias])


def _check(weight: torch.Tensor, seen: Seen, name: str, layer_idx: int) -> None:
    """A weight that another tensor has been put in the place of must be one like it."""
    alike = weight.shape == seen.shape and weight.stride() == seen.stride and weight.dtype == seen.dtype and weight.is_cpu
    if not alike or type(weight) not in (nn.Parameter, torch.Tensor):
        now = f"{type(weight).__name__} {tuple(weight.shape)} {weight.dtype}"
        raise RuntimeError(f"{name} of layer {layer_idx} is now {now}, which it was not lowered for: open the model anew")
