"""What a decoder layer does, written down while it runs: its operators in order, and which memory each of them reads and writes.

Nothing is traced: a layer runs as ever, on real tensors, and torch tells of every operator on its way to a kernel. Views are not operators here; a
tensor is where it lies in its storage. Weights and the arguments of the call are known by their storages, so whatever else is read shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quire.tensors.attention.base import Mask, Products
from quire.tensors.attention.carried import Recurrence
from quire.tensors.models.calls import Call, take_apart, weights_of
from quire.tensors.models.geometry import DryRun
from quire.tensors.packed import bytes_of, form_of


class UnlowerableError(Exception):
    """The layer cannot be a program; the message says why."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor as an operator met it. Storages are numbered: weights, then the call's tensors, then results as they come."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Done:
    """An operator that ran: its arguments, tensors as `Seen`, and its first result. "linear", "matmul", "attend" and "convolve" are Quire's own."""

    name: str
    args: tuple[Any, ...]
    out: Seen


@dataclass(slots=True)
class Recording:
    """One call of one layer. `problem`: why it cannot be told as a list of operators. `result`: what it returns, tensors taken out."""

    call: Call
    weights: tuple[Seen, ...] = ()
    inputs: tuple[Seen, ...] = ()
    done: list[Done] = field(default_factory=list)
    outputs: tuple[Seen, ...] = ()
    result: Any = None
    problem: str | None = None
    results: list[torch.Tensor] = field(default_factory=list)
    _storages: dict[int, int] = field(default_factory=dict)
    _alive: list[torch.Tensor] = field(default_factory=list)  # so that no address is used again

    def begin(self, layer: nn.Module) -> None:
        """Number the layer's weights and the tensors of its call."""
        self.weights = tuple(self._made(bytes_of(part[name])) for part, name in weights_of(layer))
        self.inputs = tuple(self._made(tensor) for tensor in self.call.tensors)

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Write down an operator of torch's that ran."""
        outs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if not outs:
            self._refuse(f"{func} depends on the values it computes, as experts do, each of which gets the tokens that chose it")
        elif func._schema.is_mutable:
            self._refuse(f"{func} writes in place")
        elif any(_address(x) not in self._storages for x in outs):
            given = tuple(self._frozen(arg) for arg in (*args, *(value for name, value in kwargs.items() if name not in _SAID_BY_RESULT)))
            self.done.append(Done(func.overloadpacket.__name__, given, self._made(outs[0])))

    def own(self, name: str, args: tuple[Any, ...], out: torch.Tensor) -> None:
        """Write down an operator of Quire's."""
        given = tuple(self._frozen(arg) for arg in args)
        self.done.append(Done(name, given, self._made(out)))

    def end(self, output: Any) -> None:
        """The call is over."""
        self.result = take_apart(output, self.results)
        self.outputs = tuple(self._frozen(x) for x in self.results)

    def _refuse(self, why: str) -> None:
        self.problem = self.problem or why

    def _made(self, x: torch.Tensor) -> Seen:
        address = _address(x)
        if address in self._storages and x.numel():
            self._refuse("two of its tensors share memory")
        self._storages.setdefault(address, len(self._storages))
        self._alive.append(x)
        return self._seen(x)

    def _seen(self, x: torch.Tensor) -> Seen:
        return Seen(self._storages[_address(x)], int(x.storage_offset()), tuple(x.shape), x.stride(), x.dtype)

    def _frozen(self, arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            if _address(arg) in self._storages:
                return self._seen(arg)
            self._refuse("it reads a tensor that is neither its own nor given to it")
            return None
        return tuple(self._frozen(item) for item in arg) if isinstance(arg, list | tuple) else arg


_SAID_BY_RESULT = {"dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking"}


def _address(x: torch.Tensor) -> int:
    """What tells storages apart; all packed weights are in one, each by itself."""
    return x.data_ptr() if x.dtype is torch.uint8 else x.untyped_storage().data_ptr()


class EnoughError(Exception):
    """Every layer that was to be recorded has been; the forward need not go on."""


class Recorder(TorchDispatchMode):
    """Records a call of each of `layers`. `recordings` [layer]: of those that were called.

    Products and attention are whole operators to it: run the model with a `RecordingProducts` and a `RecordingStep`.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recordings: dict[nn.Module, Recording] = {}
        self._layers = layers
        self._current: Recording | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._current is None:
            return func(*args, **kwargs)
        with self:  # under inference_mode, what is made of smaller operators arrives whole
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        out = func(*args, **kwargs)
        self._current.note(func, args, kwargs, out)
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a forward of the model is recorded, and ends as soon as every layer has been; its hooks are gone afterwards."""
        hooks = [layer.register_forward_pre_hook(self._begin, with_kwargs=True) for layer in self._layers]
        hooks += [layer.register_forward_hook(self._end, prepend=True) for layer in self._layers]  # the owner's run behind a program
        try:
            yield
        except EnoughError:
            pass
        finally:
            if self._current is not None:  # the layer raised
                self._current = None
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            for hook in hooks:
                hook.remove()

    def whole(self, name: str, args: tuple[Any, ...], run: Any) -> torch.Tensor:
        """What `run` gives, as one operator."""
        recording, self._current = self._current, None
        try:
            out: torch.Tensor = run()
        finally:
            self._current = recording
        if recording is not None:
            recording.own(name, args, out)
        return out

    def _begin(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording = Recording(Call.of(args, kwargs))
        recording.begin(layer)
        if layer in self.recordings:
            recording.problem = "it is called more than once in a forward"
        self.recordings[layer] = self._current = recording
        # Only now: on its way past a mode, each operator of the model would cost some ten microseconds.
        self.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recording, self._current = self._current, None
        assert recording is not None
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        recording.end(output)
        if len(self.recordings) == len(self._layers):
            raise EnoughError


class RecordingProducts:
    """`Products` that are computed by others and written down as one operator each."""

    def __init__(self, recorder: Recorder, products: Products) -> None:
        self._recorder, self._products = recorder, products

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See `Products.linear`."""
        return self._recorder.whole("linear", (x, bytes_of(weight), bias, form_of(weight)), lambda: self._products.linear(x, weight, bias))

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See `Products.matmul`."""
        return self._recorder.whole("matmul", (x, bytes_of(weight), bias, form_of(weight)), lambda: self._products.matmul(x, weight, bias))


class RecordingStep:
    """An `AttentionStep` that writes its calls down. Each token is a sequence of its own: a query gets its value."""

    of_programs = None

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._own = recorder, DryRun()

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        """q [T,Hq,Dk], k [T,Hkv,Dk], v [T,Hkv,Dv] -> [T,Hq,Dv]."""
        args = (q, k, v, mask.scale, mask.window, mask.chunk, mask.softcap, mask.sinks)
        return self._recorder.whole("attend", args, lambda: self._own.attend(layer_idx, q, k, v, mask))

    def convolve(self, layer_idx: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T,C], weight [C,W], bias [C] -> [T,C]."""
        return self._recorder.whole("convolve", (x, weight, bias), lambda: self._own.convolve(layer_idx, x, weight, bias))

    def convolve_carried(self, layer_idx: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `convolve`; no program carries a state."""
        return self._recorder.whole("convolve_carried", (x, weight, bias), lambda: self._own.convolve_carried(layer_idx, x, weight, bias))

    def recur(self, layer_idx: int, given: Recurrence) -> torch.Tensor:
        """v [T,Hv,Dv] -> [T,Hv,Dv]; no program recurs."""
        return self._recorder.whole("recur", tuple(given), lambda: self._own.recur(layer_idx, given))
