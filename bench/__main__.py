"""`python -m bench`: the machine, attention alone, whole workloads beside transformers, in one run. Ends with one JSON line.

The full run takes most of an hour on two cores, nearly all of it in the peers; `--layers 6 --scale 0.5` shows the same ratios in minutes.
"""

from __future__ import annotations

import argparse
import json
import time

from bench import attention, cache, codecs, faces, linear, machine, weights, workloads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="layers of the Qwen3-0.6B shape")
    parser.add_argument("--scale", type=float, default=1.0, help="scales the lengths of ragged and shared-prefix requests")
    parser.add_argument("--requests", type=int, default=48, help="ragged requests")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the long prompt")
    parser.add_argument("--no-peers", action="store_true", help="Quire alone")
    parts = ["machine", "attention", "codecs", "cache", "faces", "linear", "weights", "workloads"]
    parser.add_argument("--only", choices=parts, help="one part (the machine is always measured)")
    parser.add_argument("--workload", default="", help="only workloads whose name holds this")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 32], help="padded batches")
    parser.add_argument("--new", type=int, default=256, help="new tokens of each row of a padded batch")
    parser.add_argument(
        "--text", nargs="+", default=[], help="books the demo checkpoint was made of; codecs and quantised weights are judged on their held-out ends"
    )
    args = parser.parse_args()
    results: machine.Bench = {"date": time.strftime("%Y-%m-%d"), "args": vars(args), "machine": machine.run()}
    if args.only in (None, "attention"):
        results["attention"] = attention.run(results["machine"])
    if args.only in (None, "codecs"):
        results["codecs"] = codecs.run(args.text)
    if args.only in (None, "linear"):
        results["linear"] = linear.run(results["machine"])
    if args.only in (None, "weights"):
        results["weights"] = weights.run(args.text)
    if args.only in (None, "cache"):
        results["cache"] = cache.run(args.layers)
    if args.only in (None, "faces"):
        results["faces"] = faces.run(args.layers, args.batches, args.new, 2 * args.long, not args.no_peers)
    if args.only in (None, "workloads"):
        results["workloads"] = workloads.run(args.layers, args.scale, args.requests, args.long, not args.no_peers, args.workload)
    print(json.dumps(results))


main()
