"""A transformers script on Quire: one line changes, the rest is transformers' own.

python examples/hf_generate.py [model]      a local folder; the demo checkpoint where none is given
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import quire

folder = sys.argv[1] if len(sys.argv) > 1 else str(Path(quire.__file__).parent / "demo_model")
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder)
model = quire.Generator(model)  # the line

inputs = tokenizer(["It was a cold morning", "The king said"], return_tensors="pt", padding=True)
for text in tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=16), skip_special_tokens=True):
    print(repr(text))

torch.manual_seed(7)
one = tokenizer("Speak, my lord, and", return_tensors="pt")
output = model.generate(**one, do_sample=True, num_return_sequences=3, max_new_tokens=8, return_dict_in_generate=True, output_scores=True)
logprobs = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
for ids, row in zip(output.sequences, logprobs, strict=True):
    print(f"{row.sum():.2f} nats: {tokenizer.decode(ids)!r}")

model.generate(**one, max_new_tokens=16, streamer=TextStreamer(tokenizer))
model.close()
