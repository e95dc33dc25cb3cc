"""A replayed forward in one native call, where it is made of nothing but an embedding, rope, layers, norms and a head.

    replay   embedding(ids) ──> rope(h, positions) ──> chain ──> layer ──> chain ──> norm ──> rows wanted ──> head
    here     ids, positions, rows wanted ──> logits (csrc/forward.h)

What comes behind the layers is a program of rows as they are, and is run for the rows wanted alone; what an embedding does with the rows that it took
is one, too (Gemma's scales them). Rope's tables are the module's own rows: a row has the same bits in any company (see surgery.py), so a block of
positions is computed once, and the blocks last used are kept. Of a model of our own only: a live one's modules may be others at the next call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from quire.tensors.models.calls import is_foreign, put_together, take_apart, weights_of
from quire.tensors.models.chain import Chain
from quire.tensors.models.geometry import NoProducts
from quire.tensors.models.lowered_layer import LoweredLayer
from quire.tensors.models.lowering import lower
from quire.tensors.models.program import Program, assemble
from quire.tensors.models.recording import Recorder, Recording, RecordingProducts, UnlowerableError
from quire.tensors.models.rowplan import RowOp
from quire.tensors.models.surgery import Surgery, is_rotary
from quire.tensors.native import DTYPE_CODES, lib
from quire.tensors.native_products import format_code
from quire.tensors.packed import bytes_of, form_of

if TYPE_CHECKING:
    from quire.tensors.models.replay import ModuleCall

Stage = tuple[Chain | LoweredLayer, list[int]]  # layers, and what each of their inputs is: -1 the hidden states, else the number of a table

_FEW, _MORE = 3, 5  # rows of the recorded calls
_OF_POSITION = frozenset({"default", "linear", "llama3", "yarn", "proportional"})  # others change with the length of what is there
_PLAIN_ROWS = 0  # csrc/linear_args.h
_NEARLY = frozenset({"layer_norm", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "exp", "softplus"})  # differ from torch's in the last bit


class NativeForward:
    """The forward. `native`: quire._native.Forward; `ropes`: calls of rope; `hidden`: a row as the embedding gives it; `held`: what it reads and
    runs, which must outlive it; `logits`: how many, and of what dtype."""

    def __init__(
        self,
        native: Any,
        ropes: Sequence[ModuleCall],
        hidden: torch.Tensor,
        held: Sequence[object],
        logits: tuple[int, torch.dtype],
        num_threads: int,
    ) -> None:
        self._native, self._ropes, self._hidden, self._held, self._num_threads = native, ropes, hidden, held, num_threads
        self._num_logits, self._dtype = logits

    def __call__(self, step: Any, input_ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] behind the tokens `wanted` int64 [R] of a `ProgramStep`; input_ids and positions int64 [T].

        Raises IndexError for an id or a token wanted that is out of range, RuntimeError where a table or a length is.
        """
        num_tokens, num_rows = positions.shape[0], wanted.shape[0]
        logits = torch.empty(num_rows, self._num_logits, dtype=self._dtype)
        tables = self._tables(positions) if num_tokens > lib.table_blocks else []
        given = [x.data_ptr() for x in tables]
        ids, at, rows, out = input_ids.data_ptr(), positions.data_ptr(), wanted.data_ptr(), logits.data_ptr()
        while (block := self._native.run(step.handle, ids, at, given, rows, num_rows, out, self._num_threads)) is not None:
            first = block * lib.table_positions
            computed = self._tables(torch.arange(first, first + lib.table_positions))
            self._native.keep(block, [x.data_ptr() for x in computed])
        return logits

    def _tables(self, positions: torch.Tensor) -> list[torch.Tensor]:
        return tables_of(self._ropes, self._hidden, positions)


def tables_of(ropes: Sequence[ModuleCall], hidden: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """What rope gives for positions int64 [T]: tables [1, T, D], contiguous. `hidden`: of the dtype that they are to have."""
    tables: list[torch.Tensor] = []
    with torch.inference_mode():
        for call in ropes:
            args, kwargs = put_together(call.skeleton, iter([hidden, positions.unsqueeze(0)]))
            take_apart(call.run(*args, **kwargs), tables)
        return [table.contiguous() for table in tables]


def native_forward(calls: Sequence[ModuleCall], num_threads: int) -> NativeForward | None:
    """The forward that makes these calls; None where they are others than it can be made of.

    The first three values are ids, positions and the rows wanted; others are what calls gave, as `ModuleCall` tells.
    """
    ids, positions, wanted = range(3)
    places = [number for number, call in enumerate(calls) if isinstance(call.run, Chain | LoweredLayer)]
    if not places or not places[0]:
        return None
    (first, *ropes), layers, tail = calls[: places[0]], calls[places[0] : places[-1] + 1], calls[places[-1] + 1 :]
    embedding, (hidden, *others) = first.module, first.gives
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None or is_foreign(embedding) or first.places != (ids,) or others:
        return None
    if not all(is_of_position(call.module) and call.places == (hidden, positions) for call in ropes):
        return None
    stages, given = _stages(layers, hidden, [place for call in ropes for place in call.gives])
    modules = []
    for call in tail:
        if call.places != ((given, wanted) if call.module is None else (given,)) or len(call.gives) != 1:
            return None
        (given,) = call.gives
        modules += [] if call.module is None else [call.module]
    if not stages or len(modules) != len(tail) - 1:  # the rows wanted, once
        return None
    try:
        return _made(embedding, ropes, stages, nn.Sequential(*modules), num_threads)
    except (UnlowerableError, ValueError):  # rows of one do not fit another
        return None


def _stages(layers: Sequence[ModuleCall], hidden: int, tables: Sequence[int]) -> tuple[list[Stage], int]:
    """The stages of these calls, and the place of what the last one gives; no stages where they are anything else."""
    stages: list[Stage] = []
    for call in layers:
        run = call.run
        if not isinstance(run, Chain | LoweredLayer) or run.native is None:
            return [], hidden
        taken = [call.places[number] for number in (run.layers[0] if isinstance(run, Chain) else run).inputs]
        if len(call.gives) != 1 or any(place != hidden and place not in tables for place in taken):
            return [], hidden
        stages.append((run, [-1 if place == hidden else tables.index(place) for place in taken]))
        (hidden,) = call.gives
    return stages, hidden


def _made(
    embedding: nn.Embedding, ropes: Sequence[ModuleCall], stages: Sequence[Stage], tail: nn.Sequential, num_threads: int
) -> NativeForward | None:
    weight = embedding.weight
    form = form_of(weight)
    if weight.dtype not in DTYPE_CODES or not (form is not None or weight.is_contiguous()):
        return None
    hidden = torch.empty(1, 1, weight.shape[1], dtype=weight.dtype)
    one = tables_of(ropes, hidden, torch.zeros(1, dtype=torch.long))
    if any(table.dim() != 3 or table.shape[:2] != (1, 1) for table in one):
        return None
    plain = type(embedding).forward is nn.Embedding.forward
    scaled, behind = None if plain else _part(_Behind(embedding), hidden), _part(tail, hidden)
    for run, _ in stages:
        run.look_up()
    native = lib.Forward(
        bytes_of(weight).data_ptr(),
        _PLAIN_ROWS if form is None else format_code(form),
        *weight.shape,
        DTYPE_CODES[weight.dtype],
        None if scaled is None else scaled.given,
        [table.numel() * table.itemsize for table in one],
        [(run.native, inputs) for run, inputs in stages],
        behind.given,
    )
    return NativeForward(native, ropes, hidden, [bytes_of(weight), scaled, behind, stages], behind.gives, num_threads)


class _Part(NamedTuple):
    """A module that rows go through as a program, its weights, and what it gives: how many elements, of what dtype."""

    program: Program
    weights: list[torch.Tensor]
    gives: tuple[int, torch.dtype]

    @property
    def given(self) -> tuple[Any, list[int]]:
        """What quire._native.Forward takes of it."""
        return self.program.native, [weight.data_ptr() for weight in self.weights]


def _part(module: nn.Module, hidden: torch.Tensor) -> _Part:
    """Raises UnlowerableError where it cannot be that, bit for bit."""
    plan = lower(*(_recorded(module, hidden, count) for count in (_FEW, _MORE)), mixes=False)
    if any(isinstance(work, RowOp) and work.op in _NEARLY for work in plan.parts[0]):  # a step that runs the modules themselves gives the same bits
        raise UnlowerableError("rows of it are not torch's, bit for bit")
    if [number for _, number in plan.inputs] != [0] or len(plan.outputs) != 1 or len(plan.outputs[0][1]) != 1:
        raise UnlowerableError("it takes or gives something else than rows")
    found = weights_of(module)
    ((value, (size,)),) = plan.outputs
    return _Part(assemble(plan), [bytes_of(part[name]) for part, name in (found[number] for _, number in plan.weights)], (size, plan.dtypes[value]))


def _recorded(module: nn.Module, hidden: torch.Tensor, count: int) -> Recording:
    recorder = Recorder([module])
    surgery = Surgery(module, RecordingProducts(recorder, NoProducts()), live=False, whole_vectors=False)
    with surgery.installed(), recorder.watching():
        module(torch.linspace(-1, 1, count * hidden.shape[2]).view(1, count, -1).to(hidden.dtype))
    return recorder.recordings[module]


class _Behind(nn.Module):
    """What an embedding does with the rows that it has taken."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding, self._ids = embedding, torch.zeros(1, 1, dtype=torch.long)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        with _Taken(self._ids, self.embedding.weight, rows) as taken:
            out: torch.Tensor = self.embedding(self._ids)
        if taken.count != 1:
            raise UnlowerableError("it does not take rows of its weight once")
        return out


class _Taken(TorchFunctionMode):
    """While on, `rows` are what is taken of a weight by these ids, which nothing else is done with."""

    def __init__(self, ids: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> None:
        super().__init__()
        self.count = 0
        self._ids, self._weight, self._rows = ids, weight, rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.embedding:
            return func(*args, **(kwargs or {}))
        if len(args) < 2 or args[0] is not self._ids or args[1] is not self._weight:
            raise UnlowerableError("it takes rows in a way of its own")
        self.count += 1
        return self._rows


def is_of_position(module: nn.Module | None) -> bool:
    """Whether what a module gives for a position depends on nothing else."""
    if module is None or not is_rotary(module) or is_foreign(module):
        return False
    kinds = getattr(module, "rope_type", None)
    return {*(kinds.values() if isinstance(kinds, dict) else [kinds])} <= _OF_POSITION
