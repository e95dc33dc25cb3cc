"""`quire generate`: prompts in, text out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quire.cli.door import FAILED, Stdout, complain, loaded, stderr
from quire.cli.lanes import Run, Show
from quire.cli.options import MODEL
from quire.cli.panels import PanelShow
from quire.cli.show import JsonShow, RawShow, WholeShow
from quire.cli.tables import receipts, totals
from quire.config import EngineConfig
from quire.errors import InvalidRequestError
from quire.params import SamplingParams


def generate(
    params: SamplingParams,
    config: EngineConfig,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; '-' is the whole of stdin as one prompt.", show_default=False)] = None,
    model: Annotated[str | None, MODEL] = None,
    file: Annotated[str | None, typer.Option(help="A file with one prompt a line (blank lines are passed over); '-' for stdin.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each sequence.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Receipts and timing on stderr afterwards.")] = False,
) -> None:
    """Continue prompts.

    Without PROMPTS and --file, what is piped in is one prompt. One sequence is written to stdout as it comes, and nothing else is.
    Several fill panels on a terminal; elsewhere they are written whole and in order, each under a line that names it.
    """
    if params.best_of is not None and not as_json:
        raise InvalidRequestError("best_of", params.best_of, "given with --json: which are the best is known at the end")
    for name in ("logprobs", "prompt_logprobs", "scaled_logprobs"):
        value = getattr(params, name)
        if value is not None and value is not False and not as_json:
            raise InvalidRequestError(name, value, "given with --json: a text shows none")
    wanted = read_prompts(prompts or [], file)
    with loaded(model, config) as llm:
        run = Run(llm, wanted, [params] * len(wanted))
        run.go(_show(run, as_json))
        if stats:
            stderr().print(receipts(run.outputs, [str(i + 1) for i in range(len(wanted))]), totals(run.outputs, run.elapsed_s), sep="")
    failed = [(i, output.error) for i, output in enumerate(run.outputs) if output.error is not None]
    for i, error in failed:
        complain(f"prompt {i + 1}: {error}" if len(wanted) > 1 else f"{error}")
    if failed:
        raise typer.Exit(FAILED)


def read_prompts(given: list[str], file: str | None) -> list[str]:
    """The prompts given, then those of the file; what is piped in where there are none.

    Raises:
        InvalidRequestError: there is no prompt, or one that cannot be read.
    """
    if [*given, file].count("-") > 1:
        raise InvalidRequestError("prompt", "-", "given once, with --file or without: stdin is read once")
    prompts = [_stdin() if prompt == "-" else prompt for prompt in given]
    if file is not None:
        text = _text(sys.stdin.buffer.read(), "stdin") if file == "-" else _file(file)
        prompts += [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line.strip()]  # and at no other sign
    elif not given and not sys.stdin.isatty():
        prompts = [_stdin()]
    if not any(prompts):
        raise InvalidRequestError("prompt", "", "text, given as an argument, with --file, or on stdin")
    return prompts


def _show(run: Run, as_json: bool) -> Show:
    if as_json:
        return JsonShow()
    if len(run.lanes) == 1:
        return RawShow()
    console = Stdout()
    return PanelShow(run.lanes, console) if console.is_terminal and not console.is_dumb_terminal else WholeShow()


def _stdin() -> str:
    """The whole of it but its last line end, which an editor or `echo` has put there."""
    return _text(sys.stdin.buffer.read(), "stdin").removesuffix("\n").removesuffix("\r")


def _file(name: str) -> str:
    try:
        return _text(Path(name).read_bytes(), name)
    except OSError as error:
        raise InvalidRequestError("file", name, f"a file that can be read ({error.strerror})") from error


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")  # by which editors mark a file as UTF-8: no part of what it says
    except UnicodeDecodeError as error:
        raise InvalidRequestError("prompt", name, f"text in UTF-8 (byte {error.start} is not)") from error
