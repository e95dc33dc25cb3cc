"""A replayed forward in one native call, where it is made of nothing but an embedding, rope, one chain of layers, norms and a head.

    replay   embedding(ids) ──> rope(h, positions) ──> chain ──> norm ──> rows wanted ──> head
    here     ids, positions, rows wanted ──> logits (csrc/forward.h)

What comes behind the layers is a program of rows as they are, and is run for the rows wanted alone. Rope's tables are the module's own rows: a row
has the same bits in any company (see surgery.py), so a block of positions is computed once, and the blocks last used are kept. Of a model of our own
only: a live one's modules may be others at the next call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quire.tensors.models.calls import is_foreign, put_together, take_apart, weights_of
from quire.tensors.models.chain import Chain
from quire.tensors.models.geometry import NoProducts
from quire.tensors.models.lowering import lower
from quire.tensors.models.program import assemble
from quire.tensors.models.recording import Recorder, Recording, RecordingProducts, UnlowerableError
from quire.tensors.models.rowplan import Work
from quire.tensors.models.surgery import Surgery, is_rotary
from quire.tensors.native import DTYPE_CODES, lib
from quire.tensors.native_products import format_code
from quire.tensors.packed import bytes_of, form_of

if TYPE_CHECKING:
    from quire.tensors.models.replay import Call

_FEW, _MORE = 3, 5  # rows of the recorded calls
_OF_POSITION = frozenset({"default", "linear", "llama3", "yarn", "proportional"})  # others change with the length of what is there
_PLAIN_ROWS = 0  # csrc/linear_args.h
_NEARLY = frozenset({"layer_norm", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid"})  # differ from torch's in the last bit


class NativeForward:
    """The forward. `native`: quire._native.Forward; `ropes`: calls of rope; `hidden`: a row as the embedding gives it; `weights`: whose memory it
    reads; `logits`: how many, and of what dtype."""

    def __init__(
        self,
        native: Any,
        ropes: Sequence[Call],
        hidden: torch.Tensor,
        weights: Sequence[torch.Tensor],
        logits: tuple[int, torch.dtype],
        num_threads: int,
    ) -> None:
        self._native, self._ropes, self._hidden, self._weights, self._num_threads = native, ropes, hidden, weights, num_threads
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


def tables_of(ropes: Sequence[Call], hidden: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """What rope gives for positions int64 [T]: tables [1, T, D], contiguous. `hidden`: of the dtype that they are to have."""
    tables: list[torch.Tensor] = []
    with torch.inference_mode():
        for call in ropes:
            args, kwargs = put_together(call.skeleton, iter([hidden, positions.unsqueeze(0)]))
            take_apart(call.run(*args, **kwargs), tables)
        return [table.contiguous() for table in tables]


def native_forward(calls: Sequence[Call], num_threads: int) -> NativeForward | None:
    """The forward that makes these calls; None where they are others than it can be made of.

    The first three values are ids, positions and the rows wanted; others are what calls gave, as `Call` tells.
    """
    ids, positions, wanted = range(3)
    at = next((number for number, call in enumerate(calls) if isinstance(call.run, Chain)), 0)
    if not at:
        return None
    (first, *ropes), layers, tail = calls[:at], calls[at], calls[at + 1 :]
    chain = layers.run
    assert isinstance(chain, Chain)
    embedding, (hidden, *others) = first.module, first.gives
    if not isinstance(embedding, nn.Embedding) or type(embedding).forward is not nn.Embedding.forward or embedding.max_norm is not None:
        return None
    if first.places != (ids,) or others:
        return None
    if not all(is_of_position(call.module) and call.places == (hidden, positions) for call in ropes):
        return None
    tables = [place for call in ropes for place in call.gives]
    places = [layers.places[number] for number in chain.layers[0].inputs]
    if any(place != hidden and place not in tables for place in places):
        return None
    modules = []
    (given,) = layers.gives
    for call in tail:
        if call.places != ((given, wanted) if call.module is None else (given,)) or len(call.gives) != 1:
            return None
        (given,) = call.gives
        modules += [] if call.module is None else [call.module]
    if len(modules) != len(tail) - 1:  # the rows wanted, once
        return None
    return _made(embedding, ropes, chain, [-1 if place == hidden else tables.index(place) for place in places], nn.Sequential(*modules), num_threads)


def _made(
    embedding: nn.Embedding, ropes: Sequence[Call], chain: Chain, inputs: list[int], tail: nn.Sequential, num_threads: int
) -> NativeForward | None:
    weight = embedding.weight
    form = form_of(weight)
    if weight.dtype not in DTYPE_CODES or not (form is not None or weight.is_contiguous()):
        return None
    hidden = torch.empty(1, 1, weight.shape[1], dtype=weight.dtype)
    one = tables_of(ropes, hidden, torch.zeros(1, dtype=torch.long))
    if any(table.dim() != 3 or table.shape[:2] != (1, 1) for table in one):
        return None
    try:
        plan = lower(*(_recorded(tail, hidden, count) for count in (_FEW, _MORE)), attends=False)
        program = assemble(plan)
    except UnlowerableError:
        return None
    if any(isinstance(work, Work) and work.op in _NEARLY for work in plan.after):  # a step that runs the modules themselves gives the same bits
        return None
    if [number for _, number in plan.inputs] != [0] or len(plan.outputs) != 1 or len(plan.outputs[0][1]) != 1:
        return None
    found = weights_of(tail)
    weights = [bytes_of(part[name]) for part, name in (found[number] for _, number in plan.weights)]
    chain.look_up()
    try:
        native = lib.Forward(
            bytes_of(weight).data_ptr(),
            _PLAIN_ROWS if form is None else format_code(form),
            *weight.shape,
            DTYPE_CODES[weight.dtype],
            [table.numel() * table.itemsize for table in one],
            chain.native,
            inputs,
            program.native,
            [x.data_ptr() for x in weights],
        )
    except ValueError:  # rows of one do not fit another
        return None
    ((value, (num_logits,)),) = plan.outputs
    return NativeForward(native, ropes, hidden, [bytes_of(weight), *weights], (num_logits, plan.dtypes[value]), num_threads)


def _recorded(tail: nn.Sequential, hidden: torch.Tensor, count: int) -> Recording:
    recorder = Recorder([tail])
    surgery = Surgery(tail, RecordingProducts(recorder, NoProducts()), live=False, whole_vectors=False)
    with surgery.installed(), recorder.watching():
        tail(torch.linspace(-1, 1, count * hidden.shape[2]).view(1, count, -1).to(hidden.dtype))
    return recorder.recordings[tail]


def is_of_position(module: nn.Module | None) -> bool:
    """Whether what a module gives for a position depends on nothing else."""
    if module is None or not is_rotary(module) or is_foreign(module):
        return False
    kinds = getattr(module, "rope_type", None)
    return {*(kinds.values() if isinstance(kinds, dict) else [kinds])} <= _OF_POSITION
