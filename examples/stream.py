"""Text as it comes, by `for`; two requests at once, by `async for`; and one that is cancelled.

python examples/stream.py [model]      a local folder or hub id; the demo checkpoint where none is given
"""

import asyncio
import sys
from pathlib import Path

import quire
from quire import LLM, RequestStream, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else Path(quire.__file__).parent / "demo_model"
params = [SamplingParams(max_tokens=24, temperature=0.8, seed=seed) for seed in (7, 8, 9)]


async def follow(name: str, stream: RequestStream) -> None:
    async for event in stream:
        print(f"{name}: {event.text!r}", end="\n" if event.output else "  ")


async def both(llm: LLM) -> None:
    await asyncio.gather(follow("king", llm.submit("The king", params[1])), follow("queen", llm.submit("The queen", params[2])))


with LLM(model) as llm:
    for event in llm.stream("Once upon a time", params[0]):
        print(event.text, end="", flush=True)
    print()
    asyncio.run(both(llm))
    long = llm.submit("And so", SamplingParams(max_tokens=None, ignore_eos=True))
    long.cancel()
    print("cancelled:", long.wait().outputs[0].finish_reason)
