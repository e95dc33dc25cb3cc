"""vLLM's CPU backend, in one process, its own defaults otherwise."""

from __future__ import annotations

import os

from bench.speed.engines.protocol import Absent, Done, Engine, Task, main

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}  # memory is told of one process; GiB, as Quire has


def load(task: Task) -> Engine:
    """The checkpoint as it is."""
    import vllm

    if task.quantization != "none":
        raise Absent(f"quantization={task.quantization}: needs a checkpoint that is quantised already")
    llm = vllm.LLM(
        model=task.folder, dtype="bfloat16", max_model_len=task.max_len, max_num_seqs=max(task.max_concurrent, task.n), disable_log_stats=False
    )

    def run(prompts: list[list[int]], new: list[int], n: int) -> Done:
        params = [
            vllm.SamplingParams(max_tokens=count, temperature=0.0 if n == 1 else 1.0, seed=task.seed, ignore_eos=True, n=n, detokenize=False)
            for count in new
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        first = [getattr(output.metrics, "first_token_latency", None) for output in outputs]
        tokens = sum(len(sequence.token_ids) for output in outputs for sequence in output.outputs)
        return Done(tokens, None if None in first else first)

    return Engine(f"vllm {vllm.__version__}", run)


if __name__ == "__main__":
    main(load, "torch", "vllm")
