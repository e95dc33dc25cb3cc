"""Many prompts at once, each with its own sampling, outputs in order.

python examples/offline.py [model]      a local folder or hub id; the demo checkpoint where none is given
"""

import sys
from pathlib import Path

import quire
from quire import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else Path(quire.__file__).parent / "demo_model"
prompts = ["It was a cold morning", "The causes of the war", "Speak, my lord, and"]

with LLM(model, max_sequences=16) as llm:
    greedy = SamplingParams(max_tokens=24, temperature=0.0)
    warm = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=7, n=2)
    for output in llm.generate(prompts, [greedy, greedy, warm]):
        print(f"{output.prompt!r}: {output.receipt.cached_tokens} of {output.receipt.prompt_tokens} prompt tokens were cached")
        for completion in output.outputs:
            print(f"  {completion.index}: {completion.text!r} ({completion.finish_reason})")
    print({name: n for name, n in llm.stats().items() if name.startswith("num_")})
