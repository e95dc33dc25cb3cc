"""OpenVINO GenAI's continuous batching, on a model that optimum-intel exports. Its own defaults otherwise: keys and values are 8-bit on CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.speed.engines.protocol import Done, Engine, Task, main

EXPORT = "export"
BITS = {"int8": 8, "int4": 4}


def load(task: Task) -> Engine:
    """The exported model is kept beside the checkpoint; exporting runs in a process of its own, so that its memory is not counted."""
    import numpy as np
    import openvino
    import openvino_genai

    folder = Path(task.folder).parent / f"{Path(task.folder).name}-openvino-{task.quantization}"
    if not folder.is_dir():
        command = [sys.executable, "-m", "bench.speed.engines.openvino_genai_pipeline", EXPORT, task.folder, str(folder), task.quantization]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise RuntimeError(f"exporting failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    scheduling = openvino_genai.SchedulerConfig()
    scheduling.cache_size = 2  # GiB, as Quire has
    scheduling.max_num_batched_tokens = 512
    scheduling.max_num_seqs = max(task.max_concurrent, task.n)
    scheduling.enable_prefix_caching = task.shared > 0
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduling, "CPU", {"INFERENCE_NUM_THREADS": task.threads})

    def run(prompts: list[list[int]], new: list[int], n: int) -> Done:
        start, first, tokens = time.perf_counter(), {}, [0] * len(prompts)
        handles: list[Any] = []

        def add(i: int) -> None:
            config = openvino_genai.GenerationConfig(max_new_tokens=new[i], ignore_eos=True, num_return_sequences=n, do_sample=n > 1)
            config.set_eos_token_id(0)  # ignored, but the checkpoint's own, none, is refused
            handles.append(pipeline.add_request(i, openvino.Tensor(np.array([prompts[i]], dtype=np.int64)), config))

        for i in range(len(prompts)):
            add(i)
            # What others share must be in its prefix cache before they are added, or each of them computes it.
            while task.shared and i == 0 and not handles[0].can_read():
                pipeline.step()
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for i, handle in enumerate(handles):
                if n == 1 and handle.can_read():
                    first.setdefault(i, time.perf_counter() - start)
                    tokens[i] += sum(len(output.generated_ids) for output in handle.read().values())
        if n > 1:
            tokens = [sum(len(output.generated_ids) for output in handle.read_all()) for handle in handles]
        return Done(sum(tokens), [first[i] for i in range(len(prompts))] if n == 1 else None)

    return Engine(f"openvino-genai {openvino_genai.__version__}", run)


def export(source: str, target: str, quantization: str) -> None:
    """Write the model and its tokenizer as OpenVINO takes them; "none" keeps bf16 weights as they are."""
    from openvino import save_model
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    unfinished = Path(f"{target}.{os.getpid()}")
    weights = OVWeightQuantizationConfig(bits=BITS[quantization]) if quantization in BITS else None
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, load_in_8bit=False, quantization_config=weights)
    model.save_pretrained(unfinished)
    for name, part in zip(("tokenizer", "detokenizer"), convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True), strict=True):
        save_model(part, unfinished / f"openvino_{name}.xml")
    unfinished.rename(target)


if __name__ == "__main__":
    if sys.argv[1] == EXPORT:
        export(*sys.argv[2:])
    else:
        main(load, "openvino", "openvino_genai")
