"""`python -m bench`: the engine's parts, each beside the machine's own limits, in one run. Ends with one JSON line.

Whole workloads beside other engines are `python -m bench.speed`. All that is here: docs/bench.md.
"""

from __future__ import annotations

import argparse
import json
import time

from bench import attention, cache, codecs, drafts, faces, linear, machine, weights
from bench.options import whole


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=whole, default=28, help="layers of the Qwen3-0.6B shape")
    parser.add_argument("--long", type=whole, default=8192, help="half the tokens of the prompt that is computed in chunks")
    parser.add_argument("--no-peers", action="store_true", help="Quire alone in padded batches")
    parts = ["machine", "attention", "codecs", "codecs-quality", "codecs-speed", "cache", "drafts", "faces", "linear", "weights"]
    parser.add_argument("--only", choices=parts, help="one part (the machine is always measured); the two halves of codecs also apart")
    parser.add_argument("--batches", type=whole, nargs="+", default=[4, 16, 32], help="padded batches")
    parser.add_argument("--new", type=whole, default=256, help="new tokens of each row of a padded batch")
    parser.add_argument(
        "--text", nargs="+", default=[], help="books the demo checkpoint was made of; codecs and quantised weights are judged on their held-out ends"
    )
    args = parser.parse_args()
    results: machine.Bench = {"date": time.strftime("%Y-%m-%d"), "args": vars(args), "machine": machine.run()}
    if args.only in (None, "attention"):
        results["attention"] = attention.run(results["machine"])
    if args.only in (None, "codecs", "codecs-quality"):
        results["codecs"] = codecs.quality(args.text)
    if args.only in (None, "codecs", "codecs-speed"):
        results["codecs_speed"] = codecs.speed(results["machine"])
    if args.only in (None, "linear"):
        results["linear"] = linear.run(results["machine"])
    if args.only in (None, "weights"):
        results["weights"] = weights.run(args.text)
    if args.only in (None, "cache"):
        results["cache"] = cache.run(args.layers)
    if args.only in (None, "drafts"):
        results["drafts"] = drafts.run(args.layers)
    if args.only in (None, "faces"):
        results["faces"] = faces.run(args.layers, args.batches, args.new, 2 * args.long, not args.no_peers)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
