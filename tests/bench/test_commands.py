"""Benches are run by hand and seldom: what they take from the engine is still there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import bench

COMMANDS = sorted(path.stem for path in Path(bench.__file__).parent.glob("*.py") if not path.stem.startswith("__"))


@pytest.mark.parametrize("name", [*COMMANDS, "speed.__main__"])
def test_a_bench_can_be_loaded(name: str) -> None:
    importlib.import_module(f"bench.{name}")
