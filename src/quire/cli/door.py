"""What every command goes through: options become `SamplingParams` and `EngineConfig`, errors one line and an exit status.

Exit status: 0 done; 1 a request failed, or a model was refused by `check`; 2 a bad option, request or model; 130 Ctrl-C; 141 a broken pipe.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich.console import Console
from rich.text import Text

from quire.cli.lean import stand_ins
from quire.cli.options import expand
from quire.config import EngineConfig
from quire.errors import ModelNotFoundError, QuireError
from quire.tensors.ahead import made_ahead
from quire.tensors.memory import available_bytes

if TYPE_CHECKING:
    from quire import LLM

FAILED, BAD, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
SERVER_EXTRA = ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "jinja2", "h11")


def door(run: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function: see the module."""
    expanded = expand(run)

    @functools.wraps(expanded)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            expanded(*args, **kwargs)
            sys.stdout.flush()
        except QuireError as error:
            complain(error)
            raise typer.Exit(exit_status(error)) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            drop(sys.stdout)
            raise typer.Exit(BROKEN_PIPE) from error
        except OSError as error:  # a disk that is full, mostly
            drop(sys.stdout)
            complain(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
            raise typer.Exit(FAILED) from error

    return guarded


def exit_status(error: QuireError) -> int:
    """What a command that failed of it ends with."""
    return BAD if isinstance(error, ValueError) else FAILED


def complain(error: Exception | str) -> None:
    """One red line on stderr."""
    _say("error: ", "bold red", str(error), "red")


class Stdout(Console):
    """A console on stdout."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """Rich would end with a status of its own."""
        raise BrokenPipeError


def stderr() -> Console:
    """A console on stderr as it is now (a test may have put another there)."""
    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def loaded(model: str | None, config: EngineConfig) -> Iterator[LLM]:
    """An open `LLM` on `model`, or on the demo checkpoint, with a spinner on the terminal until it is ready."""
    with load(model if model is not None else str(demo_model()), config) as llm:
        yield llm


def load(source: str, config: EngineConfig, warn: Callable[[str], None] | None = None) -> LLM:
    """A new `LLM` on `source`, with a spinner on the terminal until it is ready, or with `warn` told of warnings and nothing shown."""
    with _without_collections(), _made_ahead(source, config), waiting(source, warn), stand_ins_for(config):
        from quire import LLM
        from quire.engine.verdicts import remembered

        with remembered():
            return LLM(source, **asdict(config))


def _made_ahead(source: str, config: EngineConfig) -> contextlib.AbstractContextManager[None]:
    """Memory for the weights, made while the imports run, where packing will want it."""
    if config.backend not in ("auto", "native") or config.device != "cpu":  # which pack nothing, or in another form
        return contextlib.nullcontext()
    return made_ahead(source, dtype=config.dtype, quantization=config.quantization, spare_bytes=lambda: available_bytes() - config.reserve_bytes)


def stand_ins_for(config: EngineConfig) -> contextlib.AbstractContextManager[None]:
    """For what takes long to import, unless the model may use it: compiled layers do, and nobody knows what code of its own does."""
    return contextlib.nullcontext() if config.compile or config.trust_remote_code else stand_ins()


@contextlib.contextmanager
def needs_server_extra(what: str) -> Iterator[None]:
    """Inside, `what` imports the server; where a package of its extra is missing, say so and end."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in SERVER_EXTRA:
            raise
        complain(f"{what} needs {error.name}, which is not installed: pip install 'quire[server]'")
        raise typer.Exit(BAD) from error


@contextlib.contextmanager
def waiting(source: str, warn: Callable[[str], None] | None = None) -> Iterator[None]:
    """Say on the terminal that a model is being loaded, and keep transformers from saying anything. With `warn` say nothing, but tell it warnings."""
    console = stderr()
    name = Path(source).name or source
    spinner = console.status(Text(f"loading {name}"), spinner="dots") if console.is_terminal and warn is None else contextlib.nullcontext()
    with spinner, _without_collections():
        _quiet(hub=not Path(source).expanduser().is_dir() and warn is None, warn=_warn if warn is None else warn)
        yield


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Imports and a model make a million objects that stay: the collector would look through them again and again, for a sixth of their time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # all are now of the oldest generation, and none was looked at
        if collecting:
            gc.enable()


def demo_model() -> Path:
    """The folder of the checkpoint that ships with the package.

    Raises:
        ModelNotFoundError: this installation has none.
    """
    folder = Path(__file__).parent.parent / "demo_model"
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"the demo checkpoint is not in this installation ({folder}): name a model with --model")
    return folder


def drop(*streams: TextIO) -> None:
    """Whoever read our output has gone: what is still buffered goes nowhere, so that the interpreter ends without a word."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _quiet(hub: bool, warn: Callable[[str], None]) -> None:
    """Turn off transformers' log and progress bars (a download's bar stays with `hub`) and tell `warn` of a warning."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if hub:
        from huggingface_hub.utils.tqdm import enable_progress_bars

        enable_progress_bars()
    warnings.showwarning = lambda message, *_, **__: warn(str(message))


def _warn(message: str) -> None:
    _say("warning: ", "bold yellow", message, "yellow")


def _say(head: str, head_style: str, text: str, style: str) -> None:
    stderr().print(Text.assemble((head, head_style), (" ".join(text.split()), style)), soft_wrap=True)
