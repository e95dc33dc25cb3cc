"""The `quire` command: generate, chat, batch, serve, check, bench, demo. It is an extra (`pip install 'quire[cli]'`); the library does not need it.

Nothing here imports torch or transformers before a command that runs a model does, so that `quire --help` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

EXTRA = ("typer", "rich")


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (`sys.argv` where `args` is None) and exit with its status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # as Python has it where the system's is closed; this file takes its place there too
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 until the process ends
    try:
        from quire.cli.app import app
        from quire.cli.door import BROKEN_PIPE, drop
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        sys.exit(f"quire: the command line needs {error.name}, which is not installed: pip install 'quire[cli]'")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end a generation
    try:
        app(args=args, prog_name="quire")
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # of a help or an error, which are typer's and rich's to write: they say 1
            drop(sys.stdout, sys.stderr)
            end.code = BROKEN_PIPE
        raise
    sys.exit(0)
