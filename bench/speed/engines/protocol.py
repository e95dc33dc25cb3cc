"""What an engine's process gets and gives, for scripts that run in the engine's own environment: standard library only.

    python -m bench.speed.engines.NAME JOB.json      one JSON line, the last one of its output

JOB.json: {"folder", "prompts": [[id, ...], ...], "new": [tokens, ...], "n", "shared", "max_concurrent", "max_len", "quantization", "threads", "seed"}
the line: {"version", "seconds", "first_token_s": [...] or null, "tokens_out", "load_s", "memory": {...}, "counters": {...}}
or        {"absent": reason}   not installed, or it cannot do this at all        {"failed": reason}   it tried

An engine's script gives `main` a function `load(task)` and the modules that it needs. `load` returns an `Engine`, whose `run(prompts, new, n)` does
all it is given and returns a `Done`. `run` is called on a short prompt of its own and then on the workload; only the second call is timed.

memory, in bytes: "base" resident when all modules are imported, "load_peak" the most until the model is loaded, "loaded" resident when the workload
starts, "peak" the most while it ran. peak - base is weights, cache and what steps take; pages of mapped files that were touched count.
"""

from __future__ import annotations

import gc
import importlib
import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Absent(Exception):
    """This engine cannot do this here; the message says why."""


@dataclass(frozen=True)
class Task:
    """JOB.json. `shared`: the first tokens that all prompts have in common, known to engines whose user has to say so."""

    folder: str
    prompts: list[list[int]]
    new: list[int]
    n: int
    shared: int
    max_concurrent: int
    max_len: int
    quantization: str
    threads: int
    seed: int


@dataclass
class Done:
    """What a run gave: tokens asked for that came, seconds from its start to the first token of each prompt (None: not told), counters."""

    tokens_out: int
    first_token_s: list[float] | None = None
    counters: dict[str, Any] = field(default_factory=dict)


Run = Callable[[list[list[int]], list[int], int], Done]


@dataclass(frozen=True)
class Engine:
    """A loaded engine. `before`: called between the warm-up and the workload, to forget what the first left in caches."""

    version: str
    run: Run
    before: Callable[[], None] = lambda: None


def main(load: Callable[[Task], Engine], *modules: str) -> None:
    """Import what is named, read the job, load, warm up, run, print."""
    try:
        for module in modules:
            importlib.import_module(module)
        result = _measure(load, Task(**json.loads(Path(sys.argv[1]).read_text())))
    except (Absent, ImportError) as error:
        result = {"absent": f"{type(error).__name__}: {error}" if isinstance(error, ImportError) else str(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {error}"[:500]}
    print("\n" + json.dumps(result), flush=True)


def _measure(load: Callable[[Task], Engine], task: Task) -> dict[str, Any]:
    start = time.perf_counter()
    base = status_bytes("VmRSS")
    engine = load(task)
    load_s, load_peak = time.perf_counter() - start, status_bytes("VmHWM")
    dice = random.Random(1)
    engine.run([[dice.randrange(256, 512) for _ in range(8)]], [2], task.n)
    engine.before()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew: memory of loading is told apart
    loaded, start = status_bytes("VmRSS"), time.perf_counter()
    done = engine.run(task.prompts, task.new, task.n)
    seconds = time.perf_counter() - start
    return {
        "version": engine.version,
        "seconds": seconds,
        "first_token_s": done.first_token_s,
        "tokens_out": done.tokens_out,
        "load_s": load_s,
        "memory": {"base": base, "load_peak": load_peak, "loaded": loaded, "peak": status_bytes("VmHWM")},
        "counters": done.counters,
    }


def status_bytes(key: str) -> int:
    """A size out of this process's status as Linux tells it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise Absent(f"/proc/self/status has no {key}: memory cannot be told")
