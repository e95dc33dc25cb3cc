"""A scheduler of one's own over slots: whoever comes first gets a free slot, everybody moves on together, whoever is done leaves.

python examples/slots.py
"""

from collections import deque
from pathlib import Path

from transformers import AutoTokenizer

import quire

folder = Path(quire.__file__).parent / "demo_model"
tokenizer = AutoTokenizer.from_pretrained(folder)
waiting = deque(["The king was", "She looked at", "In the morning", "He had never", "It was a"])
said: dict[int, list[int]] = {}
sampling = quire.SamplingParams(temperature=0.8, top_k=50, seed=7)

with quire.Slots(folder, num_slots=3) as slots:
    while waiting or slots.active:
        while waiting and len(slots.active) < 3:
            slot = min({0, 1, 2} - set(slots.active))
            prefix = slots.prefill(tokenizer(waiting.popleft()).input_ids, sampling)
            said[slot] = [*prefix.token_ids, slots.insert(prefix, slot)]
        for slot, token in slots.generate().items():
            said[slot].append(token)
            if len(said[slot]) > 16:
                print(f"slot {slot}: {tokenizer.decode(said.pop(slot))!r}")
                slots.free(slot)

    prefix = slots.prefill(tokenizer("One beginning, three ends:").input_ids, sampling)
    ends = {slot: [token] for slot, token in slots.bulk_insert(prefix, [0, 1, 2], seeds=[1, 2, 3]).items()}
    for _ in range(8):
        for slot, token in slots.generate().items():
            ends[slot].append(token)
    for tokens in ends.values():
        print(repr(tokenizer.decode(tokens)))
