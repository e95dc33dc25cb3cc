"""Lowered layers that follow one another run in one native call, the first one's: what lies between two layers of a model costs Python most, since
weights have passed through the caches in between.

    before   layer 0 ──> h1 ──> layer 1 ──> h2 ──> layer 2 ──> h3        three native calls
    after    layer 0 ──> PASSED ──> layer 1 ──> PASSED ──> layer 2 ──> h3    one, in layer 0; the others see that they are called as they were

That they do follow one another is seen in a forward: each is given what the one before gave, and for the rest the same objects. A model that does
anything else with the hidden states between two layers meets an object which nothing can be done with: its forward fails, and is run again without
chains from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from quire.tensors.native import lib

if TYPE_CHECKING:
    from quire.tensors.models.lowered_layer import LoweredLayer

T = TypeVar("T")


class _Passed:
    """Stands for hidden states that are in native memory alone. It has nothing that code could use."""


PASSED = _Passed()


class Chain:
    """Layers that one native call runs. `hidden`: the place of the hidden states among a call's arguments; `hidden_at`: among a layer's inputs.

    native: quire._native.Layers. begun: whether a forward has got as far as the first one. at: the one that is to be called next; 0 before it and
    after the last.
    """

    def __init__(self, layers: Sequence[LoweredLayer], hidden: int, hidden_at: int) -> None:
        self.layers, self.at, self.begun = layers, 0, False
        self._hidden, self._hidden_at = hidden, hidden_at
        self._arguments: list[Any] = []  # of the call that began it
        self._result: torch.Tensor | None = None
        self.native = lib.Layers()
        for index, layer in enumerate(layers):
            layer.add_to(self.native, index)
            layer.chain, layer.index = self, index

    def begin(self, arguments: list[Any], step: Any, num_tokens: int, inputs: list[int], result: torch.Tensor, num_threads: int) -> None:
        """Run all layers, as the first one is called with `arguments`; see `LoweredLayer`.

        step: a `ProgramStep`. inputs: addresses of the first layer's inputs, `num_tokens` contiguous rows each. result: takes what the last layer
        gives. Raises RuntimeError where a table, a length or a weight is not as it must be; then no layer counts as run.
        """
        self.look_up()
        self.native.run(step.handle, num_tokens, inputs, self._hidden_at, [result.data_ptr()], num_threads)
        arguments[self._hidden] = PASSED
        self._arguments, self._result, self.at, self.begun = arguments, result, 1, True

    def look_up(self) -> None:
        """Find the layers' weights, where they may have been changed."""
        for layer in self.layers:
            layer.look_up()

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the last layer gives where the first is called with these arguments. Raises as `begin`."""
        self.layers[0](*args, **kwargs)
        return self._end()

    def pass_on(self, arguments: list[Any]) -> torch.Tensor | _Passed:
        """What the next layer gives. Raises RuntimeError where it is not called as when this was made a chain."""
        if len(arguments) != len(self._arguments) or not all(map(is_, arguments, self._arguments)):
            raise RuntimeError("a layer of a chain is not called with what the one before it gave, and for the rest as that one")
        self.at += 1
        return PASSED if self.at < len(self.layers) else self._end()

    def _end(self) -> torch.Tensor:
        result, self._arguments, self._result, self.at = self._result, [], None, 0
        assert result is not None
        return result


@dataclass(frozen=True, slots=True)
class LayerCall:
    """A call of a layer in a forward without chains: arguments by position, then by name; names and number of the former; the one tensor it gave."""

    layer: LoweredLayer
    arguments: list[Any]
    form: tuple[int, tuple[str, ...]]
    tensors: list[torch.Tensor]
    result: torch.Tensor | None


class Chains:
    """The chains of one model. `seen`: calls of the forward in progress, where it is watched."""

    def __init__(self) -> None:
        self.seen: list[LayerCall] | None = []
        self._chains: list[Chain] = []

    @property
    def held(self) -> bool:
        """Whether there are any."""
        return bool(self._chains)

    def run(self, forward: Callable[[], T], plain: Callable[[], T] | None = None) -> T:
        """forward(), of a model that may hold these; without them, and by `plain` if given, where it cannot do with them."""
        for chain in self._chains:
            chain.at, chain.begun = 0, False
        if self.seen:  # of a forward that failed
            self.seen = []
        try:
            result = forward()
        except Exception:
            if not any(chain.begun for chain in self._chains):
                raise
            self._hold(False)
            try:
                result = (plain or forward)()
            except Exception:
                self._hold(True)  # it was not for them
                raise
            self._chains = []
        if self.seen:
            self._learn(self.seen)
            self.seen = None
        return result

    def _learn(self, seen: list[LayerCall]) -> None:
        first = 0
        for end in range(1, len(seen) + 1):
            if end < len(seen) and _follows(seen[first], seen[end - 1], seen[end]):
                continue
            if end - first > 1:
                (hidden,) = _differing(seen[first], seen[first + 1])
                self._chains.append(Chain([call.layer for call in seen[first:end]], hidden, _input(seen[first], hidden)))
            first = end

    def _hold(self, held: bool) -> None:
        for chain in self._chains:
            for layer in chain.layers:
                layer.chain = chain if held else None


def _differing(a: LayerCall, b: LayerCall) -> list[int]:
    return [i for i, (x, y) in enumerate(zip(a.arguments, b.arguments, strict=True)) if x is not y]


def _input(call: LayerCall, argument: int) -> int:
    """Which of its layer's inputs an argument is; -1 where it is none, or several."""
    numbers = [number for number, x in enumerate(call.tensors) if x is call.arguments[argument]]
    return call.layer.place_of(numbers[0]) if len(numbers) == 1 else -1


def _follows(first: LayerCall, before: LayerCall, after: LayerCall) -> bool:
    """Whether `after` can be in a chain that begins with `first` and has got as far as `before`."""
    if before.form != after.form or not first.layer.takes_and_gives_as(after.layer):
        return False
    hidden = _differing(before, after)
    if len(hidden) != 1 or before.result is None or after.arguments[hidden[0]] is not before.result:
        return False
    return (before is first or hidden == _differing(first, before)) and _input(first, hidden[0]) >= 0
