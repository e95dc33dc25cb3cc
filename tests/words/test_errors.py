"""The error tree is drawn twice, in errors.py and in the docs; both drawings are the tree."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest

import quire
from quire import errors

TREE = re.compile(r"^ *[│├└─ ]*(\w+Error)\b", re.MULTILINE)


def drawn(text: str) -> list[str]:
    start = text.index("QuireError\n")
    return TREE.findall(text[start : text.index("a bug in Quire", start)])


def test_drawings_agree_and_are_complete() -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.QuireError)}
    inner = drawn(errors.__doc__ or "")
    outer = drawn((Path(__file__).parents[2] / "docs" / "errors.md").read_text())
    assert inner == outer and set(inner) == classes
    assert classes <= set(quire.__all__)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequestError("top_p", 0, "more than 0"),
        errors.ContextLengthError(9, 3, 10),
        errors.CacheTooSmallError(9, 3, 2),
        errors.OutOfPagesError(3, 2),
        errors.StepError("the model's forward failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_reach_other_processes(error: errors.QuireError) -> None:
    """One that can be pickled and not read again breaks a pool of processes, or leaves whoever waits for it waiting."""
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_halves() -> None:
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, errors.QuireError) and value is not errors.QuireError:
            assert issubclass(value, ValueError) != issubclass(value, RuntimeError), value
