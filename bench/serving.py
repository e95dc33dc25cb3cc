"""`python -m bench.serving`: what HTTP costs beside the engine alone, and what clients see who come when they like. Ends with one JSON line.

    direct   by turns, `--repeat` times: the engine in a process of its own, and `quire serve` with the same requests over loopback.
             `--streams` at once, from first to last byte; then prompts of 20 tokens one after the other, to the first token.
             Marks: 1.05 and 1.3 times the engine's time
    rates    for each rate requests come at random moments for `--seconds`, whether or not those before have been answered, to one server
             after the other: time to the first token and between tokens, tokens a second, failures, CPU time

Servers are processes of their own on a random checkpoint; clients are this process, on the same cores. What is measured, and how: docs/bench.md.

    python -m bench.serving                                                  Qwen3-0.6B's shape: half an hour
    python -m bench.serving --shape smollm2-135m --layers 2 --parts direct   a fast engine, beside which HTTP is seen best: a minute
    python -m bench.serving --peer transformers=PYTHON                       an interpreter that has what transformers' own server needs
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench.http import figures
from bench.http.client import Load, send, send_in_turn
from bench.http.figures import Cpu, Figures, Pair
from bench.http.requests import Ask, equal, poisson, ragged
from bench.http.servers import KINDS, NoServer, Server, serving
from bench.machine import processor
from bench.options import above_zero, new_file, whole
from bench.speed.checkpoints import checkpoint
from bench.speed.processes import end_engines_when_told_to_end, run_engine
from bench.speed.shapes import QWEN3, SHAPES, Shape
from bench.speed.workloads import Job, Workload

SHORT, NUM_SHORT = 20, 40  # tokens of a prompt whose first token is timed, and how many there are of these
AT_ONCE = 32  # sequences


def main() -> None:
    """See the module."""
    args = _arguments()
    end_engines_when_told_to_end()
    shape = SHAPES[args.shape].shortened(args.layers)
    folder = checkpoint(shape, args.cache)
    about = {"date": time.strftime("%Y-%m-%d"), "cpu": processor(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0], "shape": shape.name}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    found: dict[str, Any] = {**about, "args": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}}
    if "direct" in args.parts:
        found["direct"] = direct(args, shape, folder)
    if "rates" in args.parts:
        found["rates"] = rates(args, folder)
    text = json.dumps(found)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


def direct(args: argparse.Namespace, shape: Shape, folder: Path) -> dict[str, Any]:
    """The engine alone and through HTTP, by turns."""
    together: list[Pair] = []
    firsts: list[Pair] = []
    loads: list[Figures] = []
    for repetition in range(args.repeat):
        streams = equal(args.streams, 32, args.new, f"streams {repetition}")
        shorts = equal(NUM_SHORT, SHORT, 2, f"short {repetition}")
        engine_s, _ = _engine(args, shape, folder, streams, args.streams)
        with serving("quire", None, folder, args.threads, args.streams, args.timeout) as server:
            _warm(server, args)
            all_at_once, own = _watched(
                server, lambda server=server, asks=streams: send(server.url, asks, [0.0] * len(asks), server.fields, args.timeout)
            )
            in_turn = send_in_turn(server.url, shorts, server.fields, args.timeout)
        _, own_first_s = _engine(args, shape, folder, shorts, 1)
        for load in (all_at_once, in_turn):
            for problem in {answer.problem for answer in load.answers} - {None}:
                raise SystemExit(f"a request failed: {problem}")
        together.append(Pair(engine_s, own.seconds))
        firsts.append(Pair(own_first_s, statistics.median(answer.event_s[0] - answer.sent_s for answer in in_turn.answers)))
        loads.append(own)
        print(figures.line(f"{args.streams} streams", own), flush=True)
    tokens = args.streams * args.new
    return {
        "streams": figures.compared(f"{args.streams} streams of {args.new} tokens ({tokens:,} in all)", together, 1 + figures.MOST_OVERHEAD),
        "first_token": figures.compared(f"first token of {SHORT} tokens, median of {NUM_SHORT}", firsts, figures.MOST_FIRST_TOKEN),
        "cpu_us_a_token": {
            name: statistics.median(getattr(load, name) for load in loads) for name in ("loop_cpu_us", "server_cpu_us", "clients_cpu_us")
        },
    }


def rates(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every server at every rate; one that is not there is told by name."""
    found: dict[str, Any] = {}
    for name in args.servers:
        peer = "quire" if name == "quire" else "transformers"
        found[name] = {}
        try:
            with serving(name, dict(args.peer).get(peer), folder, args.threads, AT_ONCE, args.timeout) as server:
                _warm(server, args)
                for rate in args.rates:
                    times = poisson(rate, args.seconds, "serving")
                    asks = ragged(len(times), f"{rate} serving", args.scale)
                    _, own = _watched(
                        server, lambda server=server, asks=asks, times=times: send(server.url, asks, times, server.fields, args.timeout)
                    )
                    print(f"{rate:g} a second\n{figures.line(name, own)}", flush=True)
                    found[name][str(rate)] = vars(own)
        except NoServer as problem:
            print(f"    {name:<19} {problem}", flush=True)
            found[name] = {"problem": str(problem)}
    return found


def _engine(args: argparse.Namespace, shape: Shape, folder: Path, asks: list[Ask], at_once: int) -> tuple[float, float]:
    """Seconds of the engine alone for all, and to the first token of the median request."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    jobs = tuple(Job(tuple(tokenizer.encode(ask.prompt).ids), ask.new) for ask in asks)
    workload = Workload("serving", "the same requests", "batch", shape, jobs, max_concurrent=at_once)
    run = run_engine("quire", workload, folder, "none", args.threads, {}, args.timeout)
    if run.problem is not None or run.first_token_s is None:
        raise SystemExit(f"the engine alone: {run.problem}")
    return run.seconds, statistics.median(run.first_token_s)


def _warm(server: Server, args: argparse.Namespace) -> None:
    send_in_turn(server.url, equal(2, 8, 2, "warm"), server.fields, args.timeout)


def _watched(server: Server, run: Any) -> tuple[Load, Figures]:
    before = server.cpu_s()
    load: Load = run()
    loop_s, all_s = (after - was for after, was in zip(server.cpu_s(), before, strict=True))
    return load, figures.figures(load.answers, Cpu(loop_s, all_s, load.client_cpu_s))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default=QWEN3.name)
    parser.add_argument("--layers", type=whole, help="fewer layers than the shape has")
    parser.add_argument("--parts", nargs="+", choices=["direct", "rates"], default=["direct", "rates"])
    parser.add_argument("--streams", type=whole, default=AT_ONCE, help="at once, of the direct comparison")
    parser.add_argument("--new", type=whole, default=128, help="tokens of each of these")
    parser.add_argument("--rates", nargs="+", type=above_zero, default=[0.5, 1.0, 2.0, 4.0], help="requests a second")
    parser.add_argument("--seconds", type=above_zero, default=30.0, help="in which requests come, for each rate")
    parser.add_argument("--scale", type=above_zero, default=1.0, help="of these requests' lengths")
    parser.add_argument("--servers", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--peer", type=_peer, action="append", default=[], metavar="transformers=PYTHON", help="its interpreter, if not this one")
    parser.add_argument("--repeat", type=whole, default=3)
    parser.add_argument("--threads", type=whole, default=os.cpu_count())
    parser.add_argument("--timeout", type=above_zero, default=600, help="seconds for a server to be ready, and for an answer after the last request")
    parser.add_argument("--cache", type=Path, help="where checkpoints are kept; default: a folder of the system's temporary one")
    parser.add_argument("--json", type=new_file, help="write the JSON line here, too")
    args = parser.parse_args()
    for rate in args.rates if "rates" in args.parts else ():
        if not poisson(rate, args.seconds, "serving"):
            parser.error(f"argument --seconds: '{args.seconds:g}': must be longer, as no request comes at a rate of {rate:g}")
    return args


def _peer(given: str) -> tuple[str, str]:
    name, equals, python = given.partition("=")
    if name != "transformers" or not equals or not python:
        raise argparse.ArgumentTypeError(f"{given!r}: must be transformers=PYTHON")
    return name, python


if __name__ == "__main__":
    main()
