"""`python -m bench.speed`: whole workloads on random checkpoints of public shapes, every engine in a process of its own. Ends with one JSON line.

Engines take turns: in each repetition every workload is run by one engine after the other, and medians are given. The machine's limits are measured
before each repetition and after the last, memory's before and after each run as well, and the best of each counts. What is measured, and how a limit
comes about: docs/bench.md.

    python -m bench.speed                                        all that is told, bf16: an hour and more
    python -m bench.speed --engines quire --only W1 W2           Quire alone
    python -m bench.speed --layers 2 --scale 0.1 --repeat 1      a few minutes, to see that all works
    python -m bench.speed --peer llama.cpp=PYTHON --peer vllm=PYTHON --quantization none int8
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.options import above_zero, new_file, whole
from bench.speed import report
from bench.speed.checkpoints import checkpoint
from bench.speed.limits import Limit, limit, weight_bytes
from bench.speed.processes import ENGINES, OURS, EngineRun, end_engines_when_told_to_end, run_engine
from bench.speed.shapes import QWEN3, SHAPES, STORED_BYTES
from bench.speed.workloads import Workload, make

Key = tuple[str, str, str]  # quantization, workload, engine


def main() -> None:
    """See the module."""
    args = _arguments()
    end_engines_when_told_to_end()
    peers = dict(args.peer)
    engines = args.engines
    chosen = {name: w for name, w in make(args.layers, args.scale, SHAPES[args.shape]).items() if name in args.only}
    folders = {w.shape: checkpoint(w.shape, args.cache) for w in chosen.values()}
    reading, best_read = machine.Reading(), 0.0
    measured = [machine.run(reading)]
    runs: dict[Key, list[EngineRun]] = {}
    for _ in range(args.repeat):
        for key in [(q, name, engine) for name in chosen for q in args.quantization for engine in engines]:
            quantization, name, engine = key
            before = runs.setdefault(key, [])
            if before and before[-1].problem is not None:
                continue  # what failed once is not tried again
            reads = reading.now()
            run = run_engine(engine, chosen[name], folders[chosen[name].shape], quantization, args.threads, peers, args.timeout)
            reads += reading.now()
            best_read, beside = max(best_read, *reads), statistics.median(reads)
            before.append(replace(run, read_bytes_s=beside * 1e9))
            told = run.problem or f"{run.seconds:.2f} s, memory {beside:.1f} GB/s"
            print(f"  {name} {quantization} {engine}: {told}, load {os.getloadavg()[0]:.1f}", flush=True)
        measured.append(machine.run(reading))
    read_bytes_s = max(best_read, *(m["read_gb_s"] for m in measured)) * 1e9
    flop_s = max(m["matrix_limit_gflop_s"] for m in measured) * 1e9
    print(f"limits: {read_bytes_s / 1e9:.1f} GB/s, {flop_s / 1e9:.0f} GFLOP/s, the best of all measurements")
    blocks = [_told(chosen[name], q, engines, runs, read_bytes_s, flop_s) for name in chosen for q in args.quantization]
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    line = json.dumps({"date": time.strftime("%Y-%m-%d"), "args": arguments, "machine": measured, "workloads": blocks})
    print(line)
    if args.json:
        args.json.write_text(line + "\n")


def _told(
    workload: Workload, quantization: str, engines: list[str], runs: dict[Key, list[EngineRun]], read_bytes_s: float, flop_s: float
) -> dict[str, Any]:
    """Print one workload's figures and return them."""

    def limit_by(rate: float) -> Limit:
        return limit(workload, rate, flop_s, quantization)

    least = limit_by(read_bytes_s)
    found = {engine: report.figures(workload, least, runs[quantization, workload.name, engine], limit_by) for engine in engines}
    print(
        f"{workload.name} {workload.title}, {workload.shape.name}, {quantization}: {workload.tokens_in:,} tokens in, {workload.tokens_out:,} out; "
        f"limit {least.seconds:.3f} s by {least.bound} ({weight_bytes(workload.shape, quantization) / 2**20:,.0f} MB of weights a step)"
    )
    quire = found.get("quire")
    for engine, own in found.items():
        print(report.line(engine, own, None if engine == "quire" else quire))
    block = report.as_json(workload, quantization, least, found)
    if quire is not None:
        plain = runs.get(("none", workload.name, "quire"))
        mark, reached = report.verdict(workload, quantization, quire, report.figures(workload, least, plain) if plain else None)
        if mark:
            print(f"    {mark}")
        block |= {"mark": mark, "reached": reached}
    return block


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default=QWEN3.name, help="of W1 to W5; W6 has the hybrid's")
    parser.add_argument("--layers", type=whole, help="fewer layers than the shape has")
    parser.add_argument("--scale", type=above_zero, default=1.0, help="of all lengths")
    parser.add_argument("--only", nargs="+", choices=list(make(1, 0.01, QWEN3)), default=list(make(1, 0.01, QWEN3)), help="workloads")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="default: all; peers not given are absent")
    parser.add_argument("--peer", type=_peer, action="append", default=[], metavar="NAME=PYTHON", help="a peer's own interpreter")
    parser.add_argument("--quantization", nargs="+", choices=list(STORED_BYTES), default=["none"])
    parser.add_argument("--repeat", type=whole, default=3)
    parser.add_argument("--threads", type=whole, default=torch.get_num_threads())
    parser.add_argument("--timeout", type=above_zero, default=3600, help="seconds for one run of one engine")
    parser.add_argument("--cache", type=Path, help="where checkpoints are kept; default: a folder of the system's temporary one")
    parser.add_argument("--json", type=new_file, help="write the JSON line here, too")
    return parser.parse_args()


def _peer(given: str) -> tuple[str, str]:
    name, equals, python = given.partition("=")
    if name not in ENGINES or name in OURS or not equals or not python:
        raise argparse.ArgumentTypeError(f"{given!r}: must be NAME=PYTHON, NAME one of {', '.join(n for n in ENGINES if n not in OURS)}")
    return name, python


if __name__ == "__main__":
    main()
