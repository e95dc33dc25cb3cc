"""Paged attention under a plain Hugging Face model, with a table of one's own: 10, 1025 and 320 tokens, each with room for 500 more.

python examples/pages.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quire

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=2048, **shape)).eval()
cache = quire.PagedCache(model, num_pages=13, page_size=256)
page_table = torch.tensor(
    [
        [0, 1, 0, 0, 0, 0],  # 10 + 500 tokens: 2 pages, and padding that is never read
        [2, 3, 4, 5, 6, 7],  # 1025 + 500 tokens: 6 pages
        [8, 9, 10, 11, 0, 0],  # 320 + 500 tokens: 4 pages; they need not follow each other
    ]
)
prompts = [torch.randint(256, (1, length)) for length in (10, 1025, 320)]
lens = torch.tensor([10, 1025, 320])

last = []
for row, prompt in enumerate(prompts):  # prefill one by one, so that nothing is padded
    logits = cache.forward(prompt, page_table=page_table[row : row + 1], cache_lens=[0], logits_to_keep=1)
    last.append(int(logits[0, -1].argmax()))
for step in range(8):  # decode together
    logits = cache.forward(torch.tensor(last)[:, None], page_table=page_table, cache_lens=lens + step)
    last = logits[:, -1].argmax(dim=-1).tolist()
    print(f"step {step}: {last}")
