"""Rope's tables by position, which the model's own module computes once for all steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quire.tensors.models.calls import take_apart
from quire.tensors.models.surgery import is_rotary

_OF_POSITION = frozenset({"default", "linear", "llama3", "yarn", "proportional"})  # others change with the length of what is there
_LEAST = 512  # positions; twice as many each time they do not reach


class Tables:
    """What a rope module gives, row by row from where it was computed before: a row has the same bits in any company (see surgery.py)."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward, self._count = forward, 0
        self._tables: list[torch.Tensor] = []  # [1, count, D] each

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """x: of the dtype that tables are to have. position_ids: int64 [1, T]. Returns tables [1, T, D]."""
        at = position_ids[0]
        last = int(at.max())
        if last >= self._count:
            self._count = max(_LEAST, 1 << last.bit_length())
            self._tables = []
            take_apart(self._forward(x, torch.arange(self._count).unsqueeze(0), *args, **kwargs), self._tables)
        return tuple([table.index_select(1, at) for table in self._tables])


def is_of_position(module: nn.Module) -> bool:
    """Whether what a module gives for a position depends on nothing else."""
    kinds = getattr(module, "rope_type", None)
    return is_rotary(module) and {*(kinds.values() if isinstance(kinds, dict) else [kinds])} <= _OF_POSITION


def gives_rows(result: Any, position_ids: torch.Tensor) -> bool:
    """Whether `result` is a tuple of tables with a row for each position."""
    return isinstance(result, tuple) and all(isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[:2] == position_ids.shape for x in result)
