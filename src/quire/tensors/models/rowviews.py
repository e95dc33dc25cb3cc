"""Tensors of one token each: what is left of a recorded tensor when the axis that counts tokens is taken away.

Every tensor of a layer holds the same number of elements for each token, and outside of attention no operator mixes tokens. So an element of a
storage is element r of token t of a value, and a view of the storage is a view of that value's row, found by looking up where each of its elements
came from. Views, transpositions and copies are thereby never interpreted, only looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.lib.stride_tricks import as_strided

from quire.tensors.models.recording import Seen, UnlowerableError

Ints = np.ndarray  # of int64


@dataclass(frozen=True, slots=True)
class RowView:
    """Elements of a value's row: from `at` on, `step` to the next along each dimension of `shape`.

    `axis`: where the tensor's dimension stood that counts tokens, from the right (1: the last); 0 for a weight, which has none. `shape` has in its
    place how many of its elements each token has, mostly 1.
    """

    value: int
    at: int
    shape: tuple[int, ...]
    step: tuple[int, ...]
    axis: int

    @property
    def is_whole(self) -> bool:
        """Whether its elements lie one after the other from the first of the row."""
        return self.at == 0 and steps_apart(self.shape, self.step) == steps_apart(self.shape, contiguous(self.shape))


class Rows:
    """The storages of a recording of `num_tokens`, told as rows of values. `sizes[value]`: elements for each token, or of a weight."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.sizes: list[int] = []
        self._places: dict[int, tuple[int, Ints, bool]] = {}  # storage -> value, element -> token * size + r or -1, whether it has tokens
        self._made: dict[int, tuple[Seen, RowView]] = {}  # storage -> the tensor it was made for; placed where another looks into it, as few do
        self._weights: dict[int, tuple[int, Seen]] = {}  # storage -> value, the whole weight: looked into only where rows read it

    def value(self, shape: tuple[int, ...], axis: int) -> RowView:
        """A new value whose rows have this shape, as a view of itself."""
        self.sizes.append(prod(shape))
        return RowView(len(self.sizes) - 1, 0, shape, contiguous(shape), axis)

    def weight(self, seen: Seen) -> int:
        """A new value for a weight, which is the same for each token."""
        self.sizes.append(prod(seen.shape))
        self._weights[seen.storage] = (len(self.sizes) - 1, seen)
        return len(self.sizes) - 1

    def new(self, seen: Seen, axis: int) -> RowView:
        """A new value for a tensor of a storage of its own, as a view of itself; its rows are laid out in the order of its dimensions."""
        made = self.value(self._row_shape(seen, axis) if axis else seen.shape, axis)
        self._made[seen.storage] = (seen, made)
        self._places.pop(seen.storage, None)
        return made

    def same(self, seen: Seen, source: Seen) -> None:
        """`seen`, of a storage of its own, has the elements of `source`, in the same order."""
        value, _, has_tokens = self._place_of(source.storage)
        self._place(seen, value, self._grid(source).reshape(seen.shape), has_tokens)

    def view(self, seen: Seen) -> RowView:
        """What a tensor is of its value's row. Raises UnlowerableError where it is none."""
        made = self._made.get(seen.storage)
        if made is not None and made[0] == seen and 0 not in seen.shape:
            return made[1]
        value, _, has_tokens = self._place_of(seen.storage)
        grid = self._grid(seen)
        axis, shape = 0, seen.shape
        if has_tokens:
            tokens, grid = np.divmod(grid, self.sizes[value])
            axis = self._axis(tokens)
            shape = self._row_shape(seen, axis)
            front = len(shape) - axis
            grid = grid.reshape(*shape[:front], self.num_tokens, *shape[front:])
            if not (grid == grid[(slice(None),) * front + (slice(1),)]).all():
                raise UnlowerableError("tokens take different elements of their rows")
            grid = grid[(slice(None),) * front + (0,)]
        at = int(grid.flat[0])
        step = tuple(int(np.take(grid, 1, d).flat[0]) - at if n > 1 else 0 for d, n in enumerate(shape))
        expected = at + sum((np.arange(n) * s).reshape(-1, *(1,) * (len(shape) - d - 1)) for d, (n, s) in enumerate(zip(shape, step, strict=True)))
        if not np.array_equal(np.broadcast_to(expected, shape), grid):
            raise UnlowerableError("it has a view of a row that no strides describe")
        return RowView(value, at, shape, step, axis)

    def _place_of(self, storage: int) -> tuple[int, Ints, bool]:
        if storage not in self._places:
            if storage in self._made:
                self._place_made(*self._made[storage])
            elif storage in self._weights:
                self._place_weight(storage)
            else:
                raise UnlowerableError("it uses a second result of an operator")
        return self._places[storage]

    def _place_made(self, seen: Seen, made: RowView) -> None:
        rows, front = np.arange(prod(made.shape)), len(made.shape) - made.axis
        if made.axis:
            tokens = np.arange(self.num_tokens).reshape(-1, *(1,) * made.axis)
            rows = tokens * rows.size + rows.reshape(*made.shape[:front], 1, *made.shape[front:])
        self._place(seen, made.value, rows.reshape(seen.shape), made.axis > 0)

    def _place_weight(self, storage: int) -> None:
        value, whole = self._weights[storage]
        if whole.stride != contiguous(whole.shape):
            raise UnlowerableError("it has a weight that is not contiguous")
        self._places[storage] = (value, np.concatenate([np.full(whole.offset, -1), np.arange(self.sizes[value])]), False)

    def _row_shape(self, seen: Seen, axis: int) -> tuple[int, ...]:
        where = len(seen.shape) - axis
        if seen.shape[where] % self.num_tokens:
            raise UnlowerableError("it has tensors whose size is no multiple of the number of tokens")
        return (*seen.shape[:where], seen.shape[where] // self.num_tokens, *seen.shape[where + 1 :])

    def _axis(self, tokens: Ints) -> int:
        """Which dimension of a grid of token numbers counts them."""
        count = self.num_tokens
        for d, n in enumerate(tokens.shape):
            along = np.moveaxis(tokens, d, -1).reshape(-1, n)
            if n % count == 0 and (along == np.repeat(np.arange(count), n // count)).all():
                return len(tokens.shape) - d
        raise UnlowerableError("it has a tensor that no dimension of counts the tokens")

    def _grid(self, seen: Seen) -> Ints:
        """Where each element of a tensor is in its value."""
        places = self._place_of(seen.storage)[1]
        last = seen.offset + sum((n - 1) * s for n, s in zip(seen.shape, seen.stride, strict=True))
        if not prod(seen.shape) or last >= len(places):
            raise UnlowerableError("it has an empty tensor, or one beyond what was written")
        grid = as_strided(places[seen.offset :], seen.shape, [8 * s for s in seen.stride])
        if (grid < 0).any():
            raise UnlowerableError("it reads what was not written")
        return grid

    def _place(self, seen: Seen, value: int, grid: Ints, has_tokens: bool = True) -> None:
        places = np.full(seen.offset + 1 + sum((n - 1) * s for n, s in zip(seen.shape, seen.stride, strict=True)), -1)
        as_strided(places[seen.offset :], seen.shape, [8 * s for s in seen.stride])[...] = grid
        self._places[seen.storage] = (value, places, has_tokens)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    step = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        step[d] = step[d + 1] * shape[d + 1]
    return tuple(step)


def steps_apart(shape: tuple[int, ...], step: tuple[int, ...]) -> tuple[int, ...]:
    """The steps that matter: those of dimensions of more than one element."""
    return tuple(s for n, s in zip(shape, step, strict=True) if n > 1)


def collapsed(shape: tuple[int, ...], steps: list[tuple[int, ...]], along: int) -> tuple[tuple[int, int, int], list[tuple[int, int, int]]]:
    """The same elements in three dimensions, the last of which is the longest possible; `along`: the last so many are not joined with others."""
    sizes: list[int] = []
    joined: list[list[int]] = [[] for _ in steps]
    for d, n in enumerate(shape):
        last = d >= len(shape) - along
        if n == 1 and not last:
            continue
        if sizes and not last and all(j[-1] == step[d] * n for j, step in zip(joined, steps, strict=True)):
            sizes[-1] *= n
            for j, step in zip(joined, steps, strict=True):
                j[-1] = step[d]
            continue
        sizes.append(n)
        for j, step in zip(joined, steps, strict=True):
            j.append(step[d])
    if len(sizes) > 3:
        raise UnlowerableError("it has an operator over more than three dimensions")
    front = 3 - len(sizes)
    whole = [*(1,) * front, *sizes]
    padded = [[0] * front + j for j in joined]
    return (whole[0], whole[1], whole[2]), [(j[0], j[1], j[2]) for j in padded]


def with_dimension(view: RowView, dim: int) -> RowView:
    """A view with one more dimension, of one element."""
    axis = view.axis + 1 if view.axis and dim > len(view.shape) - view.axis else view.axis
    return replace(view, shape=(*view.shape[:dim], 1, *view.shape[dim:]), step=(*view.step[:dim], 0, *view.step[dim:]), axis=axis)
