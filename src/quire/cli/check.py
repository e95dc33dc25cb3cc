"""`quire check`: load a model, probe it, and say what it would be served with."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from quire.cli.door import FAILED, Stdout, stand_ins_for, waiting
from quire.cli.tables import size
from quire.config import EngineConfig
from quire.errors import ModelError, ModelNotFoundError


def check(
    model: Annotated[str, typer.Argument(help="A hub id, or a local folder in Hugging Face format.")],
    config: EngineConfig,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Say whether a model is supported, and what it costs.

    It is loaded and probed: run packed with others it must give, bit for bit where that is promised, what it gives alone.
    Exit status 1 and the reason where it is refused.
    """
    found = inspect(model, config)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        Stdout().print(_table(found))
    if not found["supported"]:
        raise typer.Exit(FAILED)


def inspect(model: str, config: EngineConfig) -> dict[str, Any]:
    """`supported`, and either the fields of `EngineInfo` with what fits, or `reason`.

    Raises:
        ModelNotFoundError, ConfigError: there was nothing to inspect, or not with these options.
    """
    with waiting(model), stand_ins_for(config):
        from quire.engine.build import build_engine

        try:
            built = build_engine(model, config)
        except ModelNotFoundError:
            raise
        except ModelError as error:
            return {"supported": False, "model": model, "error": type(error).__name__, "reason": str(error)}
        try:
            pages = built.engine.scheduler.cache.pages_to_finish(built.info.context_len)
            fits = built.info.num_pages // pages
            text = built.tokenizer is not None
            return {"supported": True, **asdict(built.info), "pages_per_full_context": pages, "full_contexts": fits, "has_tokenizer": text}
        finally:
            built.model.close()


def _table(found: dict[str, Any]) -> Table:
    made = Table(box=box.ROUNDED, show_header=False, title=Text(str(found["model"]), style="bold"), title_justify="left")
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    if not found["supported"]:
        made.add_row("supported", Text("no", style="bold red"))
        made.add_row("reason", Text(str(found["reason"])))
        return made
    share = found["num_pages"] / found["pages_per_full_context"]
    contexts = f"{found['full_contexts']:,} full contexts{f' ({share:.2f} of one)' if share < 1 else ''}"
    rows = {
        "supported": Text("yes, the probe passed", style="bold green"),
        "model type": found["model_type"],
        "dtype": found["dtype"],
        "weights": size(found["weight_bytes"]),
        "vocabulary": f"{found['vocab_size']:,} tokens{'' if found['has_tokenizer'] else '; no tokenizer, so prompts are token ids'}",
        "context": f"{found['context_len']:,} tokens",
        "backend": f"{found['backend']}, {found['num_threads']} thread{'s' if found['num_threads'] != 1 else ''}",
        "layers": found["layers"],
        "layer groups": "\n".join(found["groups"]),
        "page": f"{found['page_size']} tokens, {size(found['page_bytes'])}",
        "cache per token": size(found["bytes_per_token"]),
        "page pool": f"{found['num_pages']:,} pages, {size(found['cache_bytes'])}",
        "what fits": f"{found['max_cached_tokens']:,} tokens, {contexts}",
    }
    for name, value in rows.items():
        made.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    return made
