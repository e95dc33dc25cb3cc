"""From a recorded layer to what is to be done with each token's row: small operators, products with weights, and where tokens meet.

Nothing is approximated or reordered here, and every result is rounded where torch rounded it. What is not in the tables below is refused.
Values are numbered: rows of one size and dtype each, of weights, of the call's tensors, or made by a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from quire.tensors.attention.base import Mask
from quire.tensors.models.calls import same_skeleton
from quire.tensors.models.recording import Done, Recording, Seen, UnlowerableError
from quire.tensors.models.rowplan import Attend, Convolve, Mix, Multiply, Operand, Plan, Recur, RowOp
from quire.tensors.models.rowviews import Rows, RowView, collapsed, with_dimension
from quire.tensors.native import DTYPE_CODES, lib
from quire.tensors.native_products import format_code

_ONE_BY_ONE = {"tanh": "tanh", "sigmoid": "sigmoid", "silu": "silu", "relu": "relu", "rsqrt": "rsqrt", "exp": "exp", "softplus": "softplus"}
_MEETINGS = (["attend"], ["convolve"], ["convolve_carried", "recur"])  # of a layer's tokens
_TWO = {"add": "add", "sub": "sub", "mul": "mul", "div": "div"}


def lower(few: Recording, more: Recording, *, mixes: bool = True) -> Plan:
    """The plan of a layer, or of a part in which no token meets another, recorded with two numbers of tokens; it must be the same for both.

    Raises UnlowerableError with the reason.
    """
    if not same_skeleton(few.call.skeleton, more.call.skeleton) or len(few.inputs) != len(more.inputs):
        raise UnlowerableError("its arguments change from call to call in more than the number of tokens")
    axes = [_token_axis(a, b) for a, b in zip(few.inputs, more.inputs, strict=True)]
    counts = [{seen.shape[-axis] for seen, axis in zip(recording.inputs, axes, strict=True) if axis} for recording in (few, more)]
    if any(len(found) != 1 for found in counts):
        raise UnlowerableError("its arguments change from call to call in more than the number of tokens")
    plans = [_Lowering(recording, count.pop(), axes, mixes).plan() for recording, count in zip((few, more), counts, strict=True)]
    if plans[0] != plans[1]:
        raise UnlowerableError("it does something else for another number of tokens")
    return plans[0]


def _token_axis(a: Seen, b: Seen) -> int:
    """Which dimension of an argument counts the tokens, from the right; 0 if none does, or one that is not the first of more than one element."""
    changing = [d for d, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if n != m]
    return len(a.shape) - changing[0] if len(changing) == 1 and prod(a.shape[: changing[0]]) == 1 else 0


class _Lowering:
    def __init__(self, recording: Recording, num_tokens: int, axes: list[int], mixes: bool) -> None:
        met = [done.name for done in recording.done if any(done.name in names for names in _MEETINGS)]
        if (met not in _MEETINGS) if mixes else met:
            recording.problem = recording.problem or "its tokens do not meet once, in attention, a convolution or a recurrence"
        if recording.problem:
            raise UnlowerableError(recording.problem)
        self._recording = recording
        self._rows = Rows(num_tokens)
        self._axes = axes
        self._dtypes: list[torch.dtype] = []
        self._weights: dict[int, int] = {}  # number of a weight -> its value
        self._inputs: dict[int, int] = {}
        self._steps: list[RowOp | Multiply] = []
        self._parts: list[tuple[RowOp | Multiply, ...]] = []
        self._mixes: list[Mix] = []
        self._copies: dict[int, tuple[Seen, RowView]] = {}  # storage -> what was copied to it, as it is and as the source has it

    def plan(self) -> Plan:
        for done in self._recording.done:
            handler = _HANDLERS.get(done.name)
            if handler is None:
                raise UnlowerableError(f"it calls {done.name}, for which there is no operator of rows")
            handler(self, done)
        outputs = tuple((self._whole(seen), seen.shape) for seen in self._recording.outputs)
        if len({value for value, _ in outputs}) != len(outputs):
            raise UnlowerableError("it returns a tensor twice")
        shapes = tuple((value, self._without_tokens(shape)) for value, shape in outputs)
        weights, inputs = (tuple((value, number) for number, value in found.items()) for found in (self._weights, self._inputs))
        parts = (*self._parts, tuple(self._steps))
        return Plan(parts, tuple(self._mixes), tuple(self._dtypes), tuple(self._rows.sizes), weights, inputs, shapes)

    def _without_tokens(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) < 2 or shape[:2] != (1, self._rows.num_tokens):
            raise UnlowerableError(f"it returns a tensor {shape} that does not begin with (1, tokens)")
        return shape[2:]

    # Values.

    def _view(self, seen: Seen) -> RowView:
        """A view of a value; of a weight or an argument, which gets a number when it is first met."""
        storage = seen.storage
        num_weights, num_inputs = len(self._recording.weights), len(self._recording.inputs)
        if storage < num_weights:
            self._weight(storage)
        number = storage - num_weights
        if 0 <= number < num_inputs and number not in self._inputs:
            if not self._axes[number]:
                raise UnlowerableError("it reads an argument that no dimension of counts the tokens")
            self._inputs[number] = self._rows.new(self._recording.inputs[number], self._axes[number]).value
            self._dtypes.append(self._float(seen.dtype))
        try:
            return self._rows.view(seen)
        except UnlowerableError:
            if seen.storage not in self._copies:
                raise
        copy, source = self._copies.pop(seen.storage)  # in place of which its source will not do: it is flattened, or cut otherwise
        self._work("copy", copy.dtype, self._new(copy, source.axis), (source,))
        return self._rows.view(seen)

    def _weight(self, number: int) -> int:
        if number not in self._weights:
            self._weights[number] = self._rows.weight(self._recording.weights[number])
            dtype = self._recording.weights[number].dtype
            self._dtypes.append(dtype if dtype is torch.uint8 else self._float(dtype))  # bytes are a packed weight's
        return self._weights[number]

    def _new(self, seen: Seen, axis: int) -> RowView:
        self._dtypes.append(self._float(seen.dtype))
        return self._rows.new(seen, axis)

    def _float(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in DTYPE_CODES:
            raise UnlowerableError(f"it computes in {dtype}")
        return dtype

    def _copied(self, view: RowView, dtype: torch.dtype) -> RowView:
        """The elements of a view, one after the other in a value of their own."""
        self._dtypes.append(dtype)
        out = self._rows.value(view.shape, view.axis)
        self._work("copy", dtype, out, (view,))
        return out

    def _whole(self, seen: Seen) -> int:
        """A tensor as a whole value of its dtype that a step makes."""
        view = self._view(seen)
        if prod(view.shape[: len(view.shape) - view.axis]) != 1:
            raise UnlowerableError("it has a tensor whose first dimension does not count the tokens")
        given = set(self._weights.values()) | set(self._inputs.values()) | {mix.out for mix in self._mixes}
        fine = view.is_whole and prod(view.shape) == self._rows.sizes[view.value] and self._dtypes[view.value] == seen.dtype
        return view.value if fine and view.value not in given else self._copied(view, seen.dtype).value

    def _work(self, op: str, dtype: torch.dtype, out: RowView, operands: tuple[RowView, ...], scalar: float = 0.0, *, along: int = 0) -> None:
        """`along`: how many of the last dimensions stay as they are."""
        shape, steps = collapsed(out.shape if not along else operands[0].shape, [out.step, *(x.step for x in operands)], along)
        views = [Operand(x.value, x.at, step) for x, step in zip((out, *operands), steps, strict=True)]
        self._steps.append(RowOp(op, dtype, shape, views[0], tuple(views[1:]), scalar))

    def _broadcast(self, view: RowView, shape: tuple[int, ...], axis: int) -> RowView:
        if view.axis not in (0, axis) or (axis and not view.axis and len(view.shape) >= axis and view.shape[-axis] != 1):
            raise UnlowerableError("it combines tensors that count the tokens along different dimensions")
        given, step = (1,) * (len(shape) - len(view.shape)) + view.shape, (0,) * (len(shape) - len(view.shape)) + view.step
        return replace(view, shape=shape, step=tuple(0 if n == 1 else s for n, s in zip(given, step, strict=True)), axis=axis)

    def _elementwise(self, op: str, out: Seen, *operands: Seen, scalar: float = 0.0) -> None:
        views = [self._view(seen) for seen in operands]
        axis = max(view.axis for view in views)
        result = self._new(out, axis)
        self._work(op, out.dtype, result, tuple(self._broadcast(view, result.shape, axis) for view in views), scalar)

    # Operators.

    def _binary(self, done: Done) -> None:
        a, b, *rest = done.args
        if rest and rest != [1]:
            raise UnlowerableError(f"it calls {done.name} with {rest}")
        if isinstance(a, Seen) and isinstance(b, Seen):
            self._elementwise(_TWO[done.name], done.out, a, b)
        elif isinstance(a, Seen) and isinstance(b, int | float):
            name = "add" if done.name == "sub" else done.name
            self._elementwise(f"{name}_scalar", done.out, a, scalar=float(-b if done.name == "sub" else b))
        else:
            raise UnlowerableError(f"it calls {done.name} on what is no tensor")

    def _one_by_one(self, done: Done) -> None:
        x, *others = done.args
        if others not in ([], [1], [1, 20]):  # softplus as it is by default
            raise UnlowerableError(f"it calls {done.name} with {others}")
        self._elementwise(_ONE_BY_ONE[done.name], done.out, x)

    def _neg(self, done: Done) -> None:
        self._elementwise("mul_scalar", done.out, done.args[0], scalar=-1.0)

    def _gelu(self, done: Done) -> None:
        self._elementwise("gelu_tanh" if "tanh" in done.args[1:] else "gelu", done.out, done.args[0])

    def _pow(self, done: Done) -> None:
        x, exponent = done.args
        if exponent not in (2, 3, -0.5) or not isinstance(x, Seen):
            raise UnlowerableError(f"it calls pow with {exponent}")
        if exponent == -0.5:
            return self._elementwise("rsqrt", done.out, x)
        self._elementwise("mul", done.out, x, x)
        if exponent == 3:  # as torch: rounded after either product
            square, view = self._rows.view(done.out), self._view(x)
            cube = self._new(done.out, square.axis)
            self._work("mul", done.out.dtype, cube, (square, self._broadcast(view, cube.shape, cube.axis)))

    def _copy(self, done: Done) -> None:
        source = done.args[0]
        view = self._view(source)
        if prod(source.shape) != prod(done.out.shape):
            raise UnlowerableError(f"it calls {done.name} with another shape")
        if done.out.dtype == source.dtype or done.out.dtype == torch.float32:
            self._copies[done.out.storage] = (done.out, view)
            return self._rows.same(done.out, source)
        self._work("copy", done.out.dtype, self._new(done.out, view.axis), (view,))

    def _cat(self, done: Done) -> None:
        parts, dim = done.args[0], done.args[1] if len(done.args) > 1 else 0
        views = [self._view(part) for part in parts if prod(part.shape)]
        dim %= len(done.out.shape)
        if done.name == "stack":
            views = [with_dimension(view, dim) for view in views]
        axis = max(view.axis for view in views)
        out = self._new(done.out, axis)
        if dim == len(out.shape) - axis:
            raise UnlowerableError("it joins tensors along the dimension that counts the tokens")
        at = 0
        for view in views:
            shape = (*out.shape[:dim], view.shape[dim], *out.shape[dim + 1 :])
            self._work("copy", done.out.dtype, replace(out, at=at, shape=shape), (self._broadcast(view, shape, axis),))
            at += view.shape[dim] * out.step[dim]

    def _mean(self, done: Done) -> None:
        x, dims = done.args[:2]
        view = self._view(x)
        if [d % len(x.shape) for d in dims or ()] != [len(x.shape) - 1] or view.axis == 1:
            raise UnlowerableError(f"it calls mean over {dims}")
        if view.step[-1] != 1:
            view = self._copied(view, x.dtype)
        out = self._new(done.out, view.axis - (len(x.shape) - len(done.out.shape)))
        step = out.step[: len(view.shape) - 1]
        self._work("mean", done.out.dtype, replace(out, shape=view.shape, step=(*step, 0)), (view,), along=1)

    def _layer_norm(self, done: Done) -> None:
        x, shape, weight, bias, epsilon = done.args
        if len(shape) != 1 or not isinstance(weight, Seen) or not isinstance(bias, Seen):
            raise UnlowerableError("it calls layer_norm over several dimensions, or without a weight and a bias")
        view = self._view(x)
        if view.axis < 2 or view.step[-1] != 1:
            view = self._copied(view, x.dtype)
        out = self._new(done.out, view.axis)
        operands = (view, *(self._broadcast(self._view(w), view.shape, view.axis) for w in (weight, bias)))
        self._work("layer_norm", done.out.dtype, out, operands, epsilon, along=1)

    def _product(self, done: Done) -> None:
        x, weight, bias, form = done.args
        view, out = self._view(x), done.out
        weight_value = self._whole_weight(weight)
        if form is not None:
            n, k, row, weight_format = form.n, form.k, 0, format_code(form)
        else:
            is_matmul, transposed = done.name == "matmul", weight.stride[1] != 1
            k, n = weight.shape if is_matmul else weight.shape[::-1]
            row, last = weight.stride[::-1] if transposed else weight.stride
            weight_format = int(is_matmul != transposed)
            if last != 1:
                raise UnlowerableError("it multiplies by a weight that does not lie as a product needs it")
        if view.axis < 2 or prod(view.shape[: len(view.shape) - view.axis]) != 1:
            raise UnlowerableError("it multiplies what does not lie as a product needs it")
        shape, (step,) = collapsed(view.shape, [view.step], 1)
        rows = shape[0] * shape[1]
        whole = shape[0] == 1 and (rows == 1 or rows * step[1] == self._rows.sizes[view.value])
        if not (whole and step[2] == 1 and self._dtypes[view.value] == x.dtype):
            view = self._copied(view, x.dtype)
            step = (0, k, 1)
        stride = self._rows.sizes[view.value] if rows == 1 else step[1]
        result = self._new(out, view.axis)
        bias_value = None if bias is None else self._whole_weight(bias)
        self._steps.append(Multiply(weight_format, view.value, view.at, stride, weight_value, row, bias_value, rows, n, k, result.value))

    def _whole_weight(self, seen: Seen, *, flat: bool = False) -> int:
        """The value of a weight that is used as a whole, transposed or not; `flat`: in order, whatever its shape."""
        if seen.storage < len(self._recording.weights):
            weight = self._recording.weights[seen.storage]
            one, other = (sorted(zip(x.shape, x.stride, strict=True)) for x in (seen, weight))
            whole = RowView(0, 0, seen.shape, seen.stride, 0).is_whole if flat else one == other
            if whole and (seen.offset, prod(seen.shape)) == (weight.offset, prod(weight.shape)):
                return self._weight(seen.storage)
        raise UnlowerableError("it multiplies by what is not one of its weights")

    def _attention(self, done: Done) -> None:
        *qkv, scale, window, chunk, softcap, sinks = done.args
        if sinks is not None:
            raise UnlowerableError("its attention has sinks")
        values, shapes = self._tensors(qkv)
        self._mixed(Attend(values, shapes, Mask(scale, window, chunk, softcap), self._new(done.out, 3).value))

    def _recurrence(self, done: Done) -> None:
        *given, scale, normalized, corrects = done.args
        values, shapes = self._tensors(given)
        self._mixed(Recur(values, shapes, scale, normalized, corrects, self._new(done.out, 3).value))

    def _tensors(self, given: Sequence[Seen]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Whole values of these tensors, and the shapes of their rows."""
        values = [self._whole(seen) for seen in given]
        for i, seen in enumerate(given):  # as many tensors, even where two are one
            if values[i] in values[:i]:
                values[i] = self._copied(self._view(seen), seen.dtype).value
        return tuple(values), tuple(seen.shape[1:] for seen in given)

    def _convolution(self, done: Done) -> None:
        x, weight, bias = done.args
        if weight.shape[1] > lib.most_taps:
            raise UnlowerableError(f"its convolution has a kernel of {weight.shape[1]}, where a program takes at most {lib.most_taps}")
        if any(seen is not None and seen.dtype != x.dtype for seen in (weight, bias)):
            raise UnlowerableError("its convolution's kernel is not of the rows' dtype")
        kernel, added = self._whole_weight(weight, flat=True), None if bias is None else self._whole_weight(bias, flat=True)
        self._mixed(
            Convolve((self._whole(x),), (x.shape[1:],), weight.shape[1], kernel, added, self._new(done.out, 2).value, done.name != "convolve")
        )

    def _mixed(self, mix: Mix) -> None:
        self._mixes.append(mix)
        self._parts.append(tuple(self._steps))
        self._steps = []


_Handler = Callable[[_Lowering, Any], None]
_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(_TWO, _Lowering._binary),
    **dict.fromkeys(_ONE_BY_ONE, _Lowering._one_by_one),
    **dict.fromkeys(("_to_copy", "clone"), _Lowering._copy),
    **dict.fromkeys(("cat", "stack"), _Lowering._cat),
    **dict.fromkeys(("linear", "matmul"), _Lowering._product),
    "neg": _Lowering._neg, "gelu": _Lowering._gelu, "pow": _Lowering._pow, "mean": _Lowering._mean, "native_layer_norm": _Lowering._layer_norm,
    "attend": _Lowering._attention, "recur": _Lowering._recurrence, "convolve": _Lowering._convolution, "convolve_carried": _Lowering._convolution,
}  # fmt: skip
