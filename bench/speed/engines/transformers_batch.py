"""transformers' continuous batching, as `generate_batch` runs it; each request has its own length, so requests are added one by one."""

from __future__ import annotations

import time

from bench.speed.engines.protocol import Absent, Done, Engine, Task, main


def load(task: Task) -> Engine:
    """In the checkpoint's own dtype, with a cache for what may run at once."""
    import torch
    import transformers
    from transformers import ContinuousBatchingConfig, GenerationConfig

    if task.quantization != "none":
        raise Absent(f"quantization={task.quantization}: transformers has none that is its own on CPU")
    torch.set_num_threads(task.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(task.folder, dtype="auto").eval()
    page = ContinuousBatchingConfig().page_size
    longest = -(-task.max_len // page)
    # Told nothing it takes most of the memory there is. This is what all that may run at once fill, and as much again.
    blocks = 2 * max(2, min(task.max_concurrent, len(task.prompts)) * task.n * longest)
    sizes = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=512, max_requests_per_batch=task.max_concurrent)

    def run(prompts: list[list[int]], new: list[int], n: int) -> Done:
        sampled = {"do_sample": True, "num_return_sequences": n} if n > 1 else {"do_sample": False}
        config = GenerationConfig(max_new_tokens=max(new), eos_token_id=-1, pad_token_id=0, **sampled)
        start, first, lengths = time.perf_counter(), {}, {}
        with model.continuous_batching_context_manager(generation_config=config, continuous_batching_config=sizes, warmup=False) as manager:
            for i, (ids, count) in enumerate(zip(prompts, new, strict=True)):
                manager.add_request(ids, request_id=str(i), max_new_tokens=count, eos_token_id=-1, streaming=n == 1)
            while len(lengths) < n * len(prompts):
                result = manager.get_result(timeout=1.0)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("it stopped before its requests had finished")
                    continue
                if result.error is not None:
                    raise RuntimeError(result.error)
                if result.generated_tokens:
                    first.setdefault(result.request_id, time.perf_counter() - start)
                if result.is_finished():
                    lengths[result.request_id] = len(result.generated_tokens)
        return Done(sum(lengths.values()), [first[str(i)] for i in range(len(prompts))] if n == 1 else None)

    return Engine(f"transformers {transformers.__version__}", run)


if __name__ == "__main__":
    main(load, "torch", "transformers")
