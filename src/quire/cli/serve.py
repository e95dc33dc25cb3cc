"""`quire serve`: the OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from typing import Annotated, get_args

import typer

from quire.cli.door import exit_status, load, needs_server_extra
from quire.cli.options import Without
from quire.config import EngineConfig
from quire.errors import ConfigError, QuireError

PANEL = "Server"
KEY_VARIABLE = "QUIRE_API_KEY"

M_ARENA_MAX = -8  # glibc's number for it, see malloc.h


def serve(
    model: Annotated[str, typer.Argument(help="A hub id, or a local folder in Hugging Face format.")],
    config: Annotated[EngineConfig, Without("trust_remote_code")],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for all interfaces.", rich_help_panel=PANEL)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", rich_help_panel=PANEL)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Who has it may ask. Repeatable.", envvar=KEY_VARIABLE, show_default="everybody may", rich_help_panel=PANEL),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web pages of this origin may ask. Repeatable.", show_default="none", metavar="ORIGIN", rich_help_panel=PANEL),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="its id, or its folder's name", rich_help_panel=PANEL)
    ] = None,
    grace: Annotated[float, typer.Option(help="Seconds that running requests have to end in after SIGTERM.", rich_help_panel=PANEL)] = 30.0,
    log_format: Annotated[
        str, typer.Option(help="What happens, on stderr, as text or as json, a line an event.", metavar="text|json", rich_help_panel=PANEL)
    ] = "text",
    access_log: Annotated[
        bool | None,
        typer.Option(help="A line a request too, without what was asked.", show_default="with json", rich_help_panel=PANEL),
    ] = None,
) -> None:
    """Serve a model over HTTP, as OpenAI does.

    It listens at once and loads meanwhile; /ready says when requests are taken. SIGTERM or Ctrl-C drains it, a second one ends it at once.
    Python code that comes with a checkpoint is never run by a server: such a model is refused.
    """
    _share_one_arena()
    if not api_key and KEY_VARIABLE in os.environ:  # a secret that was not filled in must not open the server
        raise ConfigError(f"{KEY_VARIABLE}={os.environ[KEY_VARIABLE]!r}: must hold a key, or not be set where everybody may ask")
    with needs_server_extra("the server"):
        from quire.server import life, logs
        from quire.server.keys import KeyRing
        from quire.server.settings import ServerSettings, public_name
    settings = ServerSettings(
        model=public_name(model) if served_model_name is None else served_model_name,
        host=host,
        port=port,
        keys=KeyRing(api_key or ()),
        cors_origins=tuple(cors_origin or ()),
        grace_s=grace,
    )
    if log_format not in get_args(logs.LogFormat):
        raise ConfigError(f"log_format={log_format!r}: must be one of {', '.join(get_args(logs.LogFormat))}")
    as_json = log_format == "json"
    with logs.on_stderr("json" if as_json else "text", requests=as_json if access_log is None else access_log):
        try:
            life.serve(settings, lambda: load(model, config, logs.warn if as_json else None))
        except QuireError as error:
            if not as_json:
                raise
            logs.tell("failed", str(error), {"error": str(error)}, level=logging.ERROR)
            raise typer.Exit(exit_status(error)) from error


def _share_one_arena() -> None:
    """Before there are threads: in an arena of its own each would keep what its largest request took, 16 times over on two cores (docs/server.md)."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc than glibc
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
