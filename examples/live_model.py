"""A model that a training loop is changing: Quire serves its weights as they are, without a copy, between two steps.

python examples/live_model.py [model]      a local folder; the demo checkpoint where none is given
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quire
from quire import LLM, SamplingParams

folder = sys.argv[1] if len(sys.argv) > 1 else str(Path(quire.__file__).parent / "demo_model")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
lesson = tokenizer("The king said no, and no, and no again.", return_tensors="pt").input_ids
prompt = lesson[0, :4].tolist()
params = SamplingParams(max_tokens=10, temperature=0.0, logprobs=0, ignore_eos=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

with LLM(model) as llm:
    for step in range(3):
        (output,) = llm.generate([prompt], params)
        said = output.outputs[0]
        print(f"step {step}: {tokenizer.decode(said.token_ids)!r} at {sum(said.logprobs):.2f} nats")
        for _ in range(8):
            model(input_ids=lesson, labels=lesson).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
