"""A long prompt in bounded pieces: the memory of a step is bounded, and every bound gives the same bits.

python examples/bounded_prefill.py
"""

from pathlib import Path

from transformers import AutoTokenizer

import quire

folder = Path(quire.__file__).parent / "demo_model"
prompt = AutoTokenizer.from_pretrained(folder)("The king and the queen went to the town by the river. " * 40).input_ids
params = quire.SamplingParams(max_tokens=8, temperature=0.0, logprobs=0, ignore_eos=True)
seen = set()

for options in ({"max_tokens_per_step": 512}, {"max_tokens_per_step": 48}, {"workspace_bytes": 2**20}):
    with quire.LLM(folder, **options) as llm:
        (output,) = llm.generate([prompt], params)
        steps = llm.stats()["num_steps"]
        size = f"{llm.info.max_tokens_per_step} tokens and {llm.info.workspace_bytes / 2**20:.1f} MiB a step"
        print(f"{options}: at most {size}, {steps} steps for {len(prompt)} + 8 tokens")
        seen.add((tuple(output.outputs[0].token_ids), tuple(output.outputs[0].logprobs)))
assert len(seen) == 1
