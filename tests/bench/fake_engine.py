"""An engine that speaks the protocol and computes nothing. What it does is asked for with the name of the model's folder."""

from __future__ import annotations

import sys

from bench.speed.engines.protocol import Absent, Done, Engine, Task, main


def load(task: Task) -> Engine:
    """Greets, as engines do, on the output that the answer comes on."""
    print("loading ...")
    calls: list[list[list[int]]] = []

    def run(prompts: list[list[int]], new: list[int], n: int) -> Done:
        calls.append(prompts)
        if task.folder == "raises" and len(calls) == 2:
            raise RuntimeError("out of pages")
        if task.folder == "dies":
            print("terminate called", file=sys.stderr)
            sys.exit(3)
        short = task.folder == "short" and len(calls) == 2
        return Done(n * sum(new) - short, [0.25] * len(prompts), {"calls": len(calls), "threads": task.threads, "prompts": prompts})

    if task.folder == "absent":
        raise Absent("quantization=int8: there is none")
    return Engine("fake 1", run)


if __name__ == "__main__":
    main(load, *(["no_such_module"] if "missing" in sys.argv[1] else []))
