"""`python -m bench.start`: how long `quire generate` takes to its first token and where that goes, idle CPU, size, memory. Ends with one JSON line.

All on a random checkpoint of Qwen3-0.6B's shape in a folder, with warm file caches (everything runs once before it is timed), medians of `--repeat`:

    command    seconds from starting `quire generate` to the first byte on its stdout, one start after another; and once after 10 seconds in which
               nothing ran, when the host of a virtual machine may have taken back the memory that the start before gave up
    new        the same where no command has loaded this checkpoint before, so that it is probed (src/quire/engine/verdicts.py)
    split      the same steps in a process that times each: interpreter, torch, transformers, quire, load, probe, first token
    idle       CPU seconds that a process with an open LLM takes in 10 seconds without a request
    size       bytes of quire's folder and kernels, and of what it requires, installed
    memory     W2 of bench.speed: weights + pages that were used + what is left: imports, a step's tensors, allocators

Ends with an error if `quire generate` imports any of the server's packages.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WEB = {"fastapi", "uvicorn", "starlette"}
IDLE_S = 10.0
PARTS = ("interpreter", "torch", "transformers", "quire", "load", "probe", "first_token")
GENERATE = ["generate", "Once upon a time", "--max-tokens", "2", "--temperature", "0", "--ignore-eos", "--model"]
NO_WEB = f"""
import atexit, sys
atexit.register(lambda: sys.stderr.write("web:" + ",".join(sorted({WEB!r} & set(sys.modules))) + ";"))
from quire.cli import main
main(sys.argv[1:])
"""


def main() -> None:
    """See the module."""
    from bench.options import above_zero, whole
    from bench.speed.checkpoints import checkpoint
    from bench.speed.processes import end_engines_when_told_to_end
    from bench.speed.shapes import QWEN3

    parser = argparse.ArgumentParser(prog="bench.start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=whole, help="fewer layers than the shape has")
    parser.add_argument("--scale", type=above_zero, default=1.0, help="of W2's lengths")
    parser.add_argument("--repeat", type=whole, default=3)
    args = parser.parse_args()
    end_engines_when_told_to_end()
    shape = QWEN3.shortened(args.layers)
    folder = str(checkpoint(shape))
    check_imports(folder)  # which also warms the files up
    found: dict[str, Any] = {"shape": shape.name, "web_imports": [], "load_average": os.getloadavg()[0]}
    found["command_s"] = statistics.median(command_s(folder) for _ in range(args.repeat))
    time.sleep(IDLE_S)
    found["command_after_idle_s"] = command_s(folder)
    told = f"{found['command_s']:.2f} s, {found['command_after_idle_s']:.2f} s after {IDLE_S:.0f} s of nothing"
    print(f"quire generate to its first byte: {told}; no {', '.join(sorted(WEB))} imported", flush=True)
    found["new_command_s"] = statistics.median(command_s(folder, new=True) for _ in range(args.repeat))
    print(f"  of a checkpoint that it has not met: {found['new_command_s']:.2f} s", flush=True)
    splits = [child("split", folder, str(time.time())) for _ in range(args.repeat)]
    found["split_s"] = {part: statistics.median(split[part] for split in splits) for part in PARTS}
    print("  of which " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in found["split_s"].items()), flush=True)
    found |= child("idle", folder)
    print(f"idle: {found['idle_cpu_s']:.3f} s of CPU in {IDLE_S:.0f} s, {found['threads']} threads", flush=True)
    found["size_bytes"] = sizes()
    print("size: " + ", ".join(f"{name} {size / 2**20:,.1f} MB" for name, size in found["size_bytes"].items()), flush=True)
    found["memory_bytes"] = memory(folder, args.layers, args.scale)
    print("W2, MB: " + ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in found["memory_bytes"].items()), flush=True)
    print(json.dumps(found))


def check_imports(folder: str) -> None:
    """Raise RuntimeError if the command imports the web stack, or fails."""
    done = subprocess.run([sys.executable, "-c", NO_WEB, *GENERATE, folder], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    told = re.search(r"web:(.*?);", done.stderr)
    if done.returncode or told is None:
        raise RuntimeError(f"quire generate ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    if told[1]:
        raise RuntimeError(f"quire generate imports {told[1]}")


def command_s(folder: str, *, new: bool = False) -> float:
    """Seconds from starting the command to the first byte of its output; `new`: where it has met no checkpoint."""
    command, pipes = [sys.executable, "-m", "quire", *GENERATE, folder], {"stdout": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory() as home:
        start = time.perf_counter()
        with subprocess.Popen(command, **pipes, env={**os.environ, "XDG_CACHE_HOME": home} if new else None) as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.communicate()
    if not first or process.returncode:
        raise RuntimeError(f"quire generate gave {first!r} and ended with {process.returncode}")
    return seconds


def child(what: str, *args: str) -> dict[str, Any]:
    """Run one of the functions below in a process of its own and return what it found."""
    done = subprocess.run([sys.executable, "-m", "bench.start", f"--{what}", *args], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"bench.start --{what} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def split(folder: str, started: str) -> dict[str, float]:
    """Seconds of each step of a start; `started` is the time of day at which the parent started this process."""
    times = {"interpreter": time.time() - float(started)}
    clock = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal clock
        times[part], clock = time.perf_counter() - clock, time.perf_counter()

    importlib.import_module("torch")
    lap("torch")
    _ = importlib.import_module("transformers").AutoModelForCausalLM  # transformers imports what it is asked for
    lap("transformers")
    from quire import LLM, SamplingParams
    from quire.engine import build

    lap("quire")
    probe, probing = build.probe, 0.0

    def timed(*what: Any) -> None:
        nonlocal probing
        start = time.perf_counter()
        probe(*what)
        probing = time.perf_counter() - start

    build.probe = timed
    with LLM(folder) as llm:
        lap("load")
        times |= {"load": times["load"] - probing, "probe": probing}
        next(iter(llm.stream("Once upon a time", SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))))
        lap("first_token")
    return times


def idle(folder: str) -> dict[str, Any]:
    """CPU seconds of an open LLM that nobody asks anything."""
    from bench.speed.engines.protocol import status_bytes
    from quire import LLM, SamplingParams

    with LLM(folder) as llm:
        llm.generate("Once upon a time", SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
        time.sleep(1.0)
        before = time.process_time()
        time.sleep(IDLE_S)
        taken = time.process_time() - before
        return {"idle_cpu_s": taken, "threads": len(os.listdir("/proc/self/task")), "idle_rss_bytes": status_bytes("VmRSS")}


def sizes() -> dict[str, int]:
    """Installed bytes of quire and of the distributions that it requires, directly or not, compiled Python code left out."""
    import quire
    from quire.tensors import native

    package = Path(quire.__file__).parent
    own = sum(path.stat().st_size for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    kernels = Path(native.loaded_from())
    if package not in kernels.parents:
        own += kernels.stat().st_size
    found = {name: _distribution_bytes(name) for name in sorted(_closure(["torch", "transformers"]))}
    others = sum(size for name, size in found.items() if name not in ("torch", "transformers"))
    return {"quire": own, "torch": found["torch"], "transformers": found["transformers"], "what these require": others}


def _closure(names: list[str]) -> set[str]:
    """Installed distributions that `names` need, themselves included, without extras."""
    seen: set[str] = set()
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in seen:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system or Python
        seen.add(name)
        names += [re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in required if "extra ==" not in requirement]
    return seen


def _distribution_bytes(name: str) -> int:
    files = importlib.metadata.files(name) or []
    return sum(Path(file.locate()).stat().st_size for file in files if file.suffix != ".pyc" and Path(file.locate()).is_file())


def memory(folder: str, layers: int | None, scale: float) -> dict[str, int]:
    """The peak of W2 and its parts."""
    from bench.speed.processes import run_engine
    from bench.speed.shapes import QWEN3
    from bench.speed.workloads import make

    run = run_engine("quire", make(layers, scale, QWEN3)["W2"], Path(folder), "none", os.cpu_count() or 1, {}, 3600)
    if run.problem is not None or run.memory is None or run.counters is None:
        raise RuntimeError(f"W2: {run.problem}")
    peak, base = run.memory["peak"], run.memory["base"]
    weights, pool = run.counters["weight_bytes"], run.counters["pool_bytes"]
    parts = {"peak": peak, "imports": base, "weights": weights, "pages used": pool, "extra": peak - base - weights - pool}
    return parts | {"workspace foreseen": run.counters["workspace_bytes"]}


if __name__ == "__main__":
    children = {"--split": split, "--idle": idle}
    if len(sys.argv) > 1 and sys.argv[1] in children:
        print(json.dumps(children[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
