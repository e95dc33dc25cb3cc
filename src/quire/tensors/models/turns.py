"""Several engines may serve one live model, each on a thread of its own: they change it for the time of a forward, and look at it, in turns."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

Turn = AbstractContextManager[Any]


class TakesTurns(Protocol):
    """What has the turn of the model it serves."""

    turn: Turn


P = ParamSpec("P")
R = TypeVar("R")
Taker = TypeVar("Taker", bound=TakesTurns)

_turns: WeakKeyDictionary[nn.Module, Turn] = WeakKeyDictionary()
_making = threading.RLock()
_forking = ExitStack()


def turn_of(model: nn.Module) -> Turn:
    """The one turn of a model; a thread that has it may take it again. Inside, the model is as its owner made it, but for one's own changes."""
    with _making:
        return _turns.setdefault(model, threading.RLock())


def in_turn(method: Callable[Concatenate[Taker, P], R]) -> Callable[Concatenate[Taker, P], R]:
    """A method all of which is one turn."""

    @wraps(method)
    def taking(self: Taker, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.turn:
            return method(self, *args, **kwargs)

    return taking


# A fork waits for the forwards that run: in its process their threads are not there to put the model back as it was, and to let go of its turn.
def _before_fork() -> None:
    _making.acquire()
    for turn in list(_turns.values()):
        _forking.enter_context(turn)


def _after_fork() -> None:
    _forking.close()
    _making.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
