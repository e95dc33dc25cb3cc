"""GRPO in forty lines: groups of rollouts through the engine on the very model that is trained, which has just learned to like the letter e.

python examples/grpo.py
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quire

GROUP, NEW, TEMPERATURE = 4, 12, 1.0
folder = Path(quire.__file__).parent / "demo_model"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompts = quire.left_pad([tokenizer(text).input_ids for text in ("The king", "She said to her brother", "Once")])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
torch.manual_seed(0)

with quire.LLM(model) as llm:
    for step in range(3):
        tokens, sampled = quire.generate(llm, prompts, max_generated_tokens=NEW, temperature=TEMPERATURE, num_samples=GROUP, logprobs=True)
        rewards = torch.tensor([tokenizer.decode(row[-NEW:]).count("e") for row in tokens], dtype=torch.float32).view(-1, GROUP)
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
        assert torch.equal(quire.score(llm, tokens, temperature=TEMPERATURE)[:, -NEW:], sampled), "the engine's own scores: the same bits"

        real = torch.cat([(prompts != 0).repeat_interleave(GROUP, 0), torch.ones(len(tokens), NEW, dtype=torch.bool)], dim=1)
        logits = model(tokens, attention_mask=real.long(), position_ids=quire.position_ids(real)).logits[:, -NEW - 1 : -1] / TEMPERATURE
        logprobs = logits.log_softmax(-1).gather(2, tokens[:, -NEW:, None])[..., 0]
        difference = (logprobs - sampled).abs().max().item()  # the trainer's own padded forward adds in another order
        assert difference < 1e-4, difference
        (-((logprobs - sampled).exp() * advantages[:, None]).mean()).backward()
        optimizer.step()  # the engine notices that its weights have changed
        optimizer.zero_grad()
        print(f"step {step}: {rewards.mean():.2f} times e in {NEW} tokens, logprobs at most {difference:.1e} apart")
