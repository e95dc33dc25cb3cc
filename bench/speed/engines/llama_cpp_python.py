"""llama.cpp through llama-cpp-python's bindings of its C functions: continuous batching as llama.cpp's own server does it.

What decodes goes first, prompts fill the batch up to 512 tokens. A prefix that all prompts share, and a prompt of several samples, is computed once
and copied (`llama_memory_seq_cp`), with one cache for all sequences; else each has a part of its own, which attends to nothing else.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.speed.engines.protocol import Done, Engine, Task, main

BATCH = 512


@dataclass
class Sequence:
    """One that runs: what it still has to compute, its length in the cache, and how many tokens it may draw."""

    request: int
    pending: list[int]
    new: int
    length: int = 0
    drawn: int = 0
    slots: list[int] = field(default_factory=list)


def load(task: Task) -> Engine:
    """A GGUF file made of the checkpoint; keys and values are f16, llama.cpp's default."""
    import llama_cpp
    import numpy as np

    c = llama_cpp
    # In a process of its own, so that its memory is not counted.
    command = [sys.executable, "-m", "bench.speed.engines.gguf_file", task.folder, task.quantization]
    written = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if written.returncode:
        raise RuntimeError(f"no GGUF file: {(written.stderr.strip().splitlines() or ['?'])[-1]}")
    path = Path(written.stdout.strip().splitlines()[-1])
    c.llama_backend_init()
    model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
    if not model:
        raise RuntimeError("llama.cpp cannot load the GGUF file")
    vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    options: Any = c.llama_context_default_params()
    sharing = task.shared > 0 or task.n > 1
    num_slots = min(task.max_concurrent, len(task.prompts)) * task.n + (task.shared > 0)
    options.n_seq_max = num_slots
    options.n_ctx = num_slots * -(-task.max_len // 256) * 256
    options.n_batch = options.n_ubatch = BATCH
    options.n_threads = options.n_threads_batch = task.threads
    options.kv_unified = sharing
    context = c.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context")
    memory, batch = c.llama_get_memory(context), c.llama_batch_init(BATCH, 0, 1)
    dice = np.random.default_rng(task.seed)

    def add(token: int, position: int, slot: int, logits: bool) -> int:
        at = batch.n_tokens
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = token, position, 1, slot, logits
        batch.n_tokens += 1
        return at

    def decode() -> None:
        status = c.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")

    def sample(at: int, count: int) -> list[int]:
        row = np.ctypeslib.as_array(c.llama_get_logits_ith(context, at), shape=(vocab,))
        if task.n == 1:
            return [int(row.argmax())]
        ends = np.cumsum(np.exp(row - row.max()))
        return [int(np.searchsorted(ends, dice.random() * ends[-1])) for _ in range(count)]

    def prefix(tokens: list[int], slot: int) -> None:
        for at in range(0, len(tokens), BATCH):
            batch.n_tokens = 0
            for i, token in enumerate(tokens[at : at + BATCH]):
                add(token, at + i, slot, False)
            decode()

    def run(prompts: list[list[int]], new: list[int], n: int) -> Done:
        c.llama_memory_clear(memory, True)
        start, first, tokens_out = time.perf_counter(), [0.0] * len(prompts), 0
        shared = task.shared if prompts is task.prompts else 0
        stem = num_slots - 1
        free = list(range(num_slots - (task.shared > 0)))
        if shared:
            prefix(prompts[0][:shared], stem)
        waiting = [Sequence(i, prompt[shared:], new[i], shared) for i, prompt in enumerate(prompts)][::-1]
        running: list[Sequence] = []
        while waiting or running:
            while waiting and len(free) >= n:
                running.append(waiting.pop())
                running[-1].slots = [free.pop() for _ in range(n)]
                if shared:
                    c.llama_memory_seq_cp(memory, stem, running[-1].slots[0], 0, shared)
            batch.n_tokens, rows = 0, []
            for sequence in sorted(running, key=lambda s: not s.drawn):
                take = min(len(sequence.pending), BATCH - batch.n_tokens)
                if sequence.drawn:
                    if take < len(sequence.pending):
                        continue
                    rows.append((sequence, [add(token, sequence.length, s, True) for token, s in zip(sequence.pending, sequence.slots, strict=True)]))
                    sequence.length, sequence.pending = sequence.length + 1, []
                    continue
                for i in range(take):
                    last = i + 1 == len(sequence.pending)
                    at = add(sequence.pending[i], sequence.length + i, sequence.slots[0], last)
                    if last:
                        rows.append((sequence, [at]))
                sequence.length, sequence.pending = sequence.length + take, sequence.pending[take:]
            decode()
            for sequence, places in rows:
                if not sequence.drawn:
                    first[sequence.request] = time.perf_counter() - start
                    for slot in sequence.slots[1:]:
                        c.llama_memory_seq_cp(memory, sequence.slots[0], slot, 0, sequence.length)
                    sequence.pending = sample(places[0], n)
                else:
                    sequence.pending = [sample(at, 1)[0] for at in places]
                sequence.drawn += 1
                tokens_out += n
                if sequence.drawn == sequence.new:
                    for slot in sequence.slots:
                        c.llama_memory_seq_rm(memory, slot, -1, -1)
                    free += sequence.slots
                    running.remove(sequence)
        return Done(tokens_out, first)

    return Engine(f"llama-cpp-python {llama_cpp.__version__}, {path.name.rpartition('-')[2]}", run)


if __name__ == "__main__":
    main(load, "llama_cpp", "gguf")
