"""transformers' `generate` on left-padded batches of 16 in order of arrival, each as long as its longest."""

from __future__ import annotations

import time
from typing import Any

from bench.speed.engines.protocol import Absent, Done, Engine, Task, main

BATCH = 16


def load(task: Task) -> Engine:
    """In the checkpoint's own dtype, with transformers' own choice of attention."""
    import torch
    import transformers
    from transformers.generation import BaseStreamer

    if task.quantization != "none":
        raise Absent(f"quantization={task.quantization}: transformers has none that is its own on CPU")
    torch.set_num_threads(task.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(task.folder, dtype="auto").eval()

    class Clock(BaseStreamer):
        """When the first tokens came; the prompts are put before them."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(prompts: list[list[int]], new: list[int], n: int) -> Done:
        start, first, tokens = time.perf_counter(), [], 0
        for at in range(0, len(prompts), BATCH):
            part, counts = prompts[at : at + BATCH], new[at : at + BATCH]
            width, most = max(map(len, part)), max(counts)
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            clock = Clock()
            drawn = {"do_sample": True, "num_return_sequences": n, "top_k": 0} if n > 1 else {"do_sample": False}
            made = model.generate(ids, attention_mask=mask, max_new_tokens=most, pad_token_id=0, streamer=clock, **drawn)
            first += [clock.times[1] - start] * len(part)
            tokens += sum(min(count, made.shape[1] - width) for count in counts) * n
        return Done(tokens, first)

    return Engine(f"transformers {transformers.__version__}", run)


if __name__ == "__main__":
    main(load, "torch", "transformers")
