"""A tensor that is what its storage was made for is seen without looking its elements up, and is seen as if they had been."""

from __future__ import annotations

import pytest
import torch

from quire.tensors.models.recording import Seen, UnlowerableError
from quire.tensors.models.rowviews import Rows, contiguous


def seen(storage: int, *shape: int) -> Seen:
    return Seen(storage, 0, shape, contiguous(shape), torch.float32)


@pytest.mark.parametrize(("shape", "axis"), [((1, 5, 8), 2), ((1, 2, 5, 4), 2), ((1, 5, 2, 4), 3), ((5, 3), 2), ((1, 10, 4), 2), ((1, 1, 5), 1)])
def test_as_if_looked_up(shape: tuple[int, ...], axis: int) -> None:
    rows = Rows(5)
    made = rows.new(seen(0, *shape), axis)
    assert rows.view(seen(0, *shape)) == made
    rows.same(seen(1, *shape), seen(0, *shape))
    found = rows.view(seen(1, *shape))
    assert (found.value, found.at, found.shape, found.axis, found.is_whole) == (made.value, 0, made.shape, axis, True)
    assert [a for a, n in zip(found.step, found.shape, strict=True) if n > 1] == [a for a, n in zip(made.step, made.shape, strict=True) if n > 1]


def test_an_empty_tensor_is_refused() -> None:
    rows = Rows(5)
    rows.new(seen(0, 1, 5, 0), 2)
    with pytest.raises(UnlowerableError, match="empty"):
        rows.view(seen(0, 1, 5, 0))
