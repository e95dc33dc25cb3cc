"""Whole numbers that callers of the faces bring: what is none is refused by name, never rounded to one."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch

from quire.errors import InvalidRequestError

MOST_SEED = 2**64 - 1  # as `SamplingParams` has it


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether its dtype is one of integers."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def integer(field: str, value: object, limit: str = "an integer", most: int = 2**63 - 1) -> int:
    """A Python integer, or whatever stands for exactly one, from -2**63 to `most`: torch raises its own error, without a name, for larger ones.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        if isinstance(value, bool) or (isinstance(value, torch.Tensor) and not is_whole(value)):
            raise TypeError
        found = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidRequestError(field, value, limit) from None
    if not -(2**63) <= found <= most:
        raise InvalidRequestError(field, value, f"{limit}, of 64 bits")
    return found


def integers(field: str, values: object, limit: str = "integers", most: int = 2**63 - 1) -> list[int]:
    """A row of them: a list, a tensor or an array [N], or whatever gives them one by one. Raises as `integer`."""
    if isinstance(values, torch.Tensor):
        if values.dim() != 1 or not is_whole(values):
            raise InvalidRequestError(field, values, limit)
        return [int(value) for value in values.tolist()]
    if hasattr(values, "tolist"):  # numpy's
        values = values.tolist()
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Iterable):
        raise InvalidRequestError(field, values, limit)
    return [integer(field, value, limit, most) for value in values]
