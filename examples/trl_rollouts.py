"""GRPO whose completions Quire generates, on the very weights in training: two steps of TRL's trainer.

python examples/trl_rollouts.py [model]      a local folder; without trl (pip install trl) it shows what the trainer would be given
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quire

folder = sys.argv[1] if len(sys.argv) > 1 else str(Path(quire.__file__).parent / "demo_model")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompts = ["The king", "The queen", "Once upon a time", "Speak, my lord"]

with quire.QuireRollouts(cache_bytes=2**26) as rollouts:
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
        args = SimpleNamespace(**sampling, max_completion_length=12, chat_template_kwargs=None)
        whole = SimpleNamespace(unwrap_model=lambda model: model)
        given = rollouts(prompts, SimpleNamespace(args=args, model=model, processing_class=tokenizer, accelerator=whole))
        for text, logprobs in zip(tokenizer.batch_decode(given["completion_ids"]), given["logprobs"], strict=True):
            print(f"rollout of {sum(logprobs):.2f} nats: {text!r}")
    else:
        config = GRPOConfig(tempfile.mkdtemp(), max_steps=2, num_generations=4, max_completion_length=12, bf16=False, use_cpu=True, report_to=[])
        data = Dataset.from_dict({"prompt": prompts})
        GRPOTrainer(model, lambda completions, **_: [-float(len(c)) for c in completions], config, data, rollout_func=rollouts,
                    processing_class=tokenizer).train()  # fmt: skip
        print("rollout after rollout, two steps were taken")
