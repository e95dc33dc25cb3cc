"""A model loaded without Dynamo, which nothing here uses and which takes half a second to import.

transformers marks functions for `torch.compile` and prepares for tensors that lie on several machines; torch marks functions of its own when a model
is first made without memory. To make such a mark imports all of Dynamo and Inductor. But a command is one process, and the layers it compiles go
through Inductor alone (tensors/models/compiled.py). So while it loads marks mark nothing, and transformers learns that there are no other processes,
as where torch is built without them. Dynamo itself comes as soon as anything else of it is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_DYNAMO = "torch._dynamo"
_TRACED = "torch._dynamo._trace_wrapped_higher_order_op"


@contextlib.contextmanager
def without_dynamo() -> Iterator[None]:
    """Inside, what is imported and loaded gets stand-ins for Dynamo's marks, unless Dynamo is there already."""
    import torch.distributed
    from transformers.utils.import_utils import is_torch_distributed_available

    if _DYNAMO in sys.modules:
        yield
        return
    there = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    is_torch_distributed_available()  # transformers asks once and remembers
    _stand_in()
    try:
        yield
    finally:
        torch.distributed.is_available = there
        _step_aside()


class _StandIn(ModuleType):
    """`torch._dynamo` for those who only mark functions."""

    def __getattr__(self, name: str) -> Any:
        _step_aside()
        return getattr(importlib.import_module(_DYNAMO), name)


def _stand_in() -> None:
    import torch

    dynamo, traced = _StandIn(_DYNAMO), ModuleType(_TRACED)
    vars(dynamo).update(disable=_unmarked, allow_in_graph=_unmarked, assume_constant_result=_unmarked)
    vars(traced).update(TransformGetItemToIndex=_transform_get_item_to_index)
    sys.modules.update({_DYNAMO: dynamo, _TRACED: traced})
    torch._dynamo = dynamo


def _step_aside() -> None:
    import torch

    if isinstance(sys.modules.get(_DYNAMO), _StandIn):
        del sys.modules[_DYNAMO], sys.modules[_TRACED], torch._dynamo


def _unmarked(fn: Any = None, *_: Any, **__: Any) -> Any:
    """`fn` as it is, or a decorator that leaves functions so."""
    return _unmarked if fn is None else fn


def _transform_get_item_to_index() -> Any:
    """What transformers' masks enter while they are made by vmap."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()
