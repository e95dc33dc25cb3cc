"""Benches are run by hand and seldom: what they take from the engine is still there."""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path

import pytest
from bench.speed import checkpoints

import bench

COMMANDS = sorted(path.stem for path in Path(bench.__file__).parent.glob("*.py") if not path.stem.startswith("__"))


@pytest.mark.parametrize("name", [*COMMANDS, "speed.__main__"])
def test_a_bench_can_be_loaded(name: str) -> None:
    importlib.import_module(f"bench.{name}")


# What each would have measured for an hour first, or have gone on without: of no number, of another kind, into a folder that is not there.
REFUSED = {
    "bench": ("--layers 0", "--long -1", "--batches 4 0", "--new 0", "--only nothing"),
    "bench.accelerator": ("--layers 0", "--batches 1 0", "--prompt 0", "--new 1", "--cache nowhere", "--device nowhere"),
    "bench.layers": ("--dtypes bf16", "--kinds program", "--layers 0", "--threads 0", "--repeats nan"),
    "bench.linear": ("--rows 0", "--seconds 0", "--shapes 0", "--threads -1"),
    "bench.planning": ("--sequences 0", "--steps 0", "--repeats 0"),
    "bench.scaling": ("--out nowhere", "--batches 0", "--contexts -5", "--contexts 40960", "--new 0", "--new 1", "--repeat 0"),
    "bench.serving": ("--json nowhere/at.json", "--rates 0", "--seconds inf", "--seconds 0.01", "--scale -1", "--streams 0", "--peer vllm=python"),
    "bench.speed": (
        "--json nowhere/at.json",
        "--json .",
        "--layers 0",
        "--scale 0",
        "--repeat 0",
        "--threads 0",
        "--timeout no",
        "--peer quire=python",
    ),
    "bench.start": ("--layers 0", "--scale nan", "--repeat 1.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bench_refuses_what_it_could_not_measure_or_keep(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module({"bench": "bench.__main__", "bench.speed": "bench.speed.__main__"}.get(name, name)).main
    for typed in REFUSED[name]:
        monkeypatch.setattr(sys, "argv", ["bench", *typed.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr().err
        assert ended.value.code == 2 and f"{name}: error: argument {typed.split()[0]}" in told, f"{typed}: {told}"


@pytest.mark.parametrize("name", ["bench.serving", "bench.speed.__main__", "bench.start"])
def test_a_bench_that_starts_others_ends_them_when_it_is_told_to_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise InterruptedError

    module, told = importlib.import_module(name), list[int]()
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setattr(signal, "signal", lambda number, _: told.append(number))
    for where in (module, checkpoints):
        monkeypatch.setattr(where, "checkpoint", stop, raising=False)
    with pytest.raises(InterruptedError):
        module.main()
    assert told == [signal.SIGTERM]
