"""A model loaded without what takes long to import and nothing here uses: more than a second of four.

transformers marks functions for `torch.compile` and prepares for tensors that lie on several machines; torch marks functions of its own when a model
is first made without memory. To make such a mark imports all of Dynamo and Inductor. But a command is one process, and the layers it compiles go
through Inductor alone (tensors/models/compiled.py). So while it loads marks mark nothing, and transformers learns that there are no other processes,
as where torch is built without them. While a model is made without memory, torch also asks of each size whether it is a symbol, and code that imports
sympy answers: of numbers the answers are known. And transformers looks through the files of all its models twice, for itself and for its
package of models: the second time is left out. What is asked of a stand-in that it has not got, the module itself comes for.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_DYNAMO = "torch._dynamo"
_TRACED = "torch._dynamo._trace_wrapped_higher_order_op"
_MODELS = "transformers.models"
_SYMBOLS = "torch.fx.experimental.symbolic_shapes"
_SAME = ("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious", "guarding_hint_or_throw", "size_hint", "statically_known_true")


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Inside, what is imported and loaded meets stand-ins, but for modules that are there already."""
    import torch.distributed
    from transformers.utils.import_utils import is_torch_distributed_available

    there = torch.distributed.is_available
    modules = [module for module in _made() if module.__name__ not in sys.modules]
    try:
        if _DYNAMO not in sys.modules:
            torch.distributed.is_available = lambda: False
            is_torch_distributed_available()  # transformers asks once and remembers
        for module in modules:
            module.come()
        yield
    finally:
        torch.distributed.is_available = there
        for module in modules:
            module.go()


def _made() -> list[_StandIn]:
    models = importlib.util.find_spec(_MODELS)
    assert models is not None
    return [
        _StandIn(_DYNAMO, disable=_unmarked, allow_in_graph=_unmarked, assume_constant_result=_unmarked),
        _StandIn(_TRACED, TransformGetItemToIndex=_transform_get_item_to_index, __path__=()),
        _StandIn(_MODELS, __spec__=models, __path__=models.submodule_search_locations),
        _StandIn("sympy", Basic=_Symbol),
        _StandIn(_SYMBOLS, __path__=(), **_of_numbers()),
    ]


class _StandIn(ModuleType):
    """Stands for a module until something is asked of it that is not in `given`."""

    def __init__(self, name: str, **given: Any) -> None:
        super().__init__(name)
        self._given = given
        vars(self).update(given)

    def come(self) -> None:
        """Take the module's place."""
        package, _, name = self.__name__.rpartition(".")
        sys.modules[self.__name__] = self
        setattr(sys.modules.get(package, self), name, self)

    def go(self) -> None:
        """Leave it, where it is still there. Whoever holds the stand-in meets the module in it from now on."""
        for name in self._given:
            vars(self).pop(name, None)
        package, _, name = self.__name__.rpartition(".")
        for holder, key in ((sys.modules, self.__name__), (vars(sys.modules.get(package, self)), name)):
            if holder.get(key) is self:
                del holder[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # such names are asked of all modules there are; this one where a part of it is imported
            raise AttributeError(name)
        self.go()
        return getattr(importlib.import_module(self.__name__), name)


class _Symbol:
    """What sympy makes; no number is one."""


def _of_numbers() -> dict[str, Any]:
    """What torch asks of sizes and conditions that may be symbols, as it is answered where they are numbers."""
    return {
        **dict.fromkeys(_SAME, lambda known, *_, **__: known),
        **dict.fromkeys(("has_guarding_hint", "has_hint"), lambda _: True),  # the latter, and size_hint, before torch 2.13
        "is_nested_int": lambda _: False,
        "sym_and": lambda *conditions: all(conditions),
        "sym_or": lambda *conditions: any(conditions),
        "sym_eq": lambda a, b: tuple(a) == tuple(b) if isinstance(a, (tuple, list)) else a == b,
    }


def _unmarked(fn: Any = None, *_: Any, **__: Any) -> Any:
    """`fn` as it is, or a decorator that leaves functions so."""
    return _unmarked if fn is None else fn


def _transform_get_item_to_index() -> Any:
    """What transformers' masks enter while they are made by vmap."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()
