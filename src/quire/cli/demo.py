"""`quire demo`: several prompts at once out of the checkpoint that ships with the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from quire.cli.door import FAILED, Stdout, complain, loaded
from quire.cli.lanes import Run, Show
from quire.cli.options import MODEL
from quire.cli.panels import PanelShow
from quire.cli.show import LineShow
from quire.cli.tables import receipts, totals
from quire.config import EngineConfig
from quire.params import Implied, SamplingParams

if TYPE_CHECKING:
    from quire import LLM

MAX_TOKENS = Implied(96)
SCENE = (
    "It was a cold morning of the early spring, and we sat after breakfast on either side of a cheery fire in the old room at Baker Street. "
    "A thick fog rolled down between the lines of dun-coloured houses. Our visitor had thrown himself into a chair, and"
)
PROMPTS = {
    "scene 1": SCENE + " Holmes",
    "history": "The causes of the American Revolution were many. In the first place, the",
    "stage": "KING RICHARD:\nWhat news, my lord? Speak, and be brief.\n\nMESSENGER:\n",
    "letter": '"My dear Watson," said he, "I have here a letter which',
    "scene 2": SCENE + " the lady",
}
AFTER = {4: 0}  # the other scene starts when the first has its first token, and finds what they share in the cache


def demo(
    config: EngineConfig,
    model: Annotated[str | None, MODEL] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="The most tokens to generate for each prompt.", show_default=f"{MAX_TOKENS}, or what fits")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="The same seed gives the same texts.")] = 7,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of panels, as when stdout is not a terminal.")] = False,
) -> None:
    """Stream text from several prompts at once. Two of them begin with the same scene, which is computed once."""
    # A seed each: with one for all, the noise at one position would be the same in every text.
    most = MAX_TOKENS if max_tokens is None else max_tokens
    params = [SamplingParams(max_tokens=most, temperature=temperature, top_p=0.95, seed=seed + i) for i in range(len(PROMPTS))]
    console = Stdout()
    live = console.is_terminal and not console.is_dumb_terminal and not plain
    with loaded(model, config) as llm:
        info = llm.info
        console.print(Text.assemble(("Quire", "bold"), f" on {info.model_type}, {info.dtype}, {info.backend}: {len(PROMPTS)} prompts at once"))
        run = Run(llm, [_beginning(llm, prompt) for prompt in PROMPTS.values()], params, labels=list(PROMPTS), after=AFTER)
        show: Show = PanelShow(run.lanes, console) if live else LineShow(run.lanes, min(console.width, 100))
        run.go(show)
    console.print(receipts(run.outputs, list(PROMPTS)))
    console.print(Text(totals(run.outputs, run.elapsed_s)))
    failed = [output.error for output in run.outputs if output.error is not None]
    for error in failed:
        complain(error)
    if failed:
        raise typer.Exit(FAILED)


def _beginning(llm: LLM, prompt: str) -> str:
    """As many of a prompt's words as leave half of the context to the model. Two that begin alike still do."""
    if llm.tokenizer is None:
        return prompt  # the engine refuses it by name
    words = prompt.split(" ")
    while len(words) > 1 and len(llm.tokenizer(" ".join(words), verbose=False).input_ids) > llm.info.context_len // 2:
        words.pop()
    return " ".join(words)
