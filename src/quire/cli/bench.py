"""`quire bench`: a quick look at how fast a model runs here."""

from __future__ import annotations

import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from quire.cli.door import Stdout, loaded
from quire.cli.options import MODEL
from quire.cli.tables import first_token_s, num_new_tokens, table
from quire.config import EngineConfig
from quire.params import SamplingParams

if TYPE_CHECKING:
    from quire import LLM

NUM_RAGGED = 16


@dataclass(frozen=True)
class Measured:
    """One workload's numbers."""

    requests: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    new_tokens_per_s: float
    first_token_s: float
    worst_first_token_s: float


def bench(
    config: EngineConfig,
    model: Annotated[str | None, MODEL] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only the JSON line, without the table.")] = False,
) -> None:
    """Measure one stream and 16 ragged requests, with random prompts and greedy decoding.

    The last line is the same as JSON. The full comparison, with other engines beside this one, lives in bench/ of the repository.
    """
    with loaded(model, config) as llm:
        info = llm.info
        dice = random.Random(0)
        unit = max(1, min(32, (info.context_len - 1) // 16))
        _measure(llm, dice, [(unit, min(unit, 8))])  # the first run of everything is slower
        found = {
            "one stream": _measure(llm, dice, [(2 * unit, 4 * unit)]),
            f"{NUM_RAGGED} ragged": _measure(llm, dice, [(dice.randint(1, 8 * unit), dice.randint(unit, 3 * unit)) for _ in range(NUM_RAGGED)]),
        }
    if not as_json:
        console = Stdout()
        made = table("workload", "prompt\ntokens", "new\ntokens", "seconds", "new tokens\nper s", "first\ntoken", "slowest\nfirst")
        for name, m in found.items():
            ms = (f"{m.first_token_s * 1000:.0f} ms", f"{m.worst_first_token_s * 1000:.0f} ms")
            made.add_row(name, str(m.prompt_tokens), str(m.new_tokens), f"{m.seconds:.2f}", f"{m.new_tokens_per_s:.1f}", *ms)
        console.print(f"[bold]{info.model_type}[/], {info.dtype}, {info.backend}, {info.num_threads} threads", made, sep="\n")
        console.print("A quick look: the full comparison lives in bench/ of the repository.", style="dim")
    about = {"model": info.model, "dtype": info.dtype, "backend": info.backend, "num_threads": info.num_threads}
    typer.echo(json.dumps(about | {name.replace(" ", "_"): asdict(m) for name, m in found.items()}))


def _measure(llm: LLM, dice: random.Random, sizes: list[tuple[int, int]]) -> Measured:
    """Run requests of (prompt, new) tokens at once, on a cold cache."""
    prompts = [[dice.randrange(llm.info.vocab_size) for _ in range(prompt)] for prompt, _ in sizes]
    params = [SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True) for _, new in sizes]
    llm.reset_cache()
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    for output in outputs:
        if output.error is not None:
            raise output.error
    first = [first_token_s(output) for output in outputs]
    new = sum(map(num_new_tokens, outputs))
    return Measured(
        requests=len(sizes),
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=new,
        seconds=round(seconds, 4),
        new_tokens_per_s=round(new / seconds, 2),
        first_token_s=round(statistics.median(first), 4),
        worst_first_token_s=round(max(first), 4),
    )
