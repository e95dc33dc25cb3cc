"""The command line's table of contents."""

from __future__ import annotations

from typing import Annotated

import typer

from quire import __version__
from quire.cli.batch import batch
from quire.cli.bench import bench
from quire.cli.chat import chat
from quire.cli.check import check
from quire.cli.demo import demo
from quire.cli.door import door
from quire.cli.generate import generate
from quire.cli.serve import serve

app = typer.Typer(
    name="quire",
    help="Run Hugging Face causal language models on a paged, shared, transactional KV cache, on the machine you have.",
    epilog="Exit status: 0 done; 1 a request failed, or check refused a model; 2 a bad option, request or model; 130 Ctrl-C; 141 a broken pipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, batch, serve, check, bench, demo):
    app.command()(door(command))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quire {__version__}")
        raise typer.Exit


VERSION = typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit.")


@app.callback()
def root(version: Annotated[bool, VERSION] = False) -> None:
    """Options of the command itself."""
