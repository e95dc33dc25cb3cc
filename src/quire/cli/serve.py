"""`quire serve`: the OpenAI-compatible server."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from quire.cli.door import load, needs_server_extra, stderr
from quire.cli.options import Without
from quire.config import EngineConfig

if TYPE_CHECKING:
    from quire import LLM

PANEL = "Server"
# For OpenMP, before it is loaded. A kernel's thread that spins for long while it waits takes the core that answers clients; one that sleeps at once
# is woken many times a step. These are some 10 us (docs/speed.md).
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def serve(
    model: Annotated[str, typer.Argument(help="A hub id, or a local folder in Hugging Face format.")],
    config: Annotated[EngineConfig, Without("trust_remote_code")],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for all interfaces.", rich_help_panel=PANEL)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", rich_help_panel=PANEL)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Who has it may ask. Repeatable.", envvar="QUIRE_API_KEY", show_default="everybody may", rich_help_panel=PANEL),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web pages of this origin may ask. Repeatable.", show_default="none", metavar="ORIGIN", rich_help_panel=PANEL),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="its id, or its folder's name", rich_help_panel=PANEL)
    ] = None,
    grace: Annotated[float, typer.Option(help="Seconds that running requests have to end in after SIGTERM.", rich_help_panel=PANEL)] = 30.0,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A JSON line an answer on stderr, without what was asked.", rich_help_panel=PANEL)
    ] = False,
) -> None:
    """Serve a model over HTTP, as OpenAI does.

    It listens at once and loads meanwhile; /ready says when requests are taken. SIGTERM or Ctrl-C drains it, a second one ends it at once.
    Python code that comes with a checkpoint is never run by a server: such a model is refused.
    """
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
    with needs_server_extra("the server"):
        from quire.server import life
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
    if access_log:
        lines = logging.getLogger("quire.access")
        lines.setLevel(logging.INFO)
        lines.addHandler(logging.StreamHandler())
    console = stderr()

    def listening(address: str) -> None:
        console.print(Text.assemble(("Quire", "bold"), f" at {address}/v1, {'with API keys' if settings.keys else 'without API keys'}"))
        if not settings.keys and not settings.on_loopback:
            console.print(Text("Everybody who reaches this address may use it: set --api-key or QUIRE_API_KEY.", style="yellow"))

    def loading() -> LLM:
        llm = load(model, config)
        info = llm.info
        console.print(Text(f"ready: {settings.model}, {info.model_type}, {info.dtype}, {info.backend}, context {info.context_len:,}"))
        return llm

    life.serve(settings, loading, listening)
