"""`quire batch`: a file of requests in OpenAI's Batch format, answered into another; it may be killed at any time and started again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from quire.cli.askers import Answer, Asker, inside, outside
from quire.cli.batch_rows import Ledger, Row, read_rows
from quire.cli.door import FAILED, stderr
from quire.cli.options import MODEL, refuse_api_key, refuse_engine_options
from quire.config import EngineConfig
from quire.errors import ConfigError, InvalidRequestError, RequestFailedError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
SYNC_S = 1.0  # how much work a machine that loses its power may lose
RETRY_S = 300.0  # how long a row is asked again while the server is full, loading or away
BUSY, NOT_LET_IN = (429, 502, 503, 504), (401, 403)


def batch(
    context: typer.Context,
    config: EngineConfig,
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests, one a line.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Answers. What is in it is not asked again.", show_default=False)],
    model: Annotated[str | None, MODEL] = None,
    url: Annotated[str | None, typer.Option(help="Ask this server; no model is loaded then.", metavar="URL", show_default=False)] = None,
    api_key: Annotated[str | None, typer.Option(help="The server's.", envvar="QUIRE_API_KEY", show_default=False)] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What the rows call the model.", show_default="its id, or its folder's name")] = None,
    in_flight: Annotated[int, typer.Option(help="The most rows that are asked at once, 1 to 1024.")] = 64,
) -> None:
    """Answer a file of requests.

    Rows are {"custom_id", "method": "POST", "url", "body"}; answers {"id", "custom_id", "response", "error"}, in the order in which they
    come. Stopped or killed, the same command goes on where it was: no row is lost, none is answered twice.
    """
    if not 1 <= in_flight <= 1024:
        raise ConfigError(f"in_flight={in_flight}: must be an integer from 1 to 1024")
    if url is not None and (model is not None or served_model_name is not None):
        raise ConfigError(f"url={url!r}: must be given without --model and --served-model-name: the server has its model already")
    if url is not None:
        refuse_engine_options(config)
    else:
        refuse_api_key(context, "--url")
    with _opened(source) as file:
        rows = read_rows(file, str(source))
        with Ledger(out, rows) as ledger:
            before = len(ledger.answered)
            if before < len(rows):
                with inside(model, served_model_name, config) if url is None else outside(url, api_key, in_flight) as asker:
                    asyncio.run(answer_rows(asker, file, rows, ledger, in_flight))
    failed = [name for name, succeeded in ledger.answered.items() if not succeeded]
    told = f"{len(rows)} row{'s' if len(rows) != 1 else ''}: {len(rows) - len(failed)} answered, {len(failed)} failed"
    stderr().print(Text(told + (f", {before} of them before" if before else "")))
    if failed:
        raise typer.Exit(FAILED)


async def answer_rows(asker: Asker, file: BinaryIO, rows: list[Row], ledger: Ledger, in_flight: int) -> None:
    """Ask what `ledger` has no answer to, and write the answers down as they come.

    Raises:
        RequestFailedError: nobody answers any more. What was answered is kept.
    """
    left = iter([row for row in rows if row.custom_id not in ledger.answered])
    with _progress() as progress:
        failed = sum(not succeeded for succeeded in ledger.answered.values())
        bar = progress.add_task("", total=len(rows), completed=len(ledger.answered), failed=failed)

        async def work() -> None:
            nonlocal failed
            for row in left:  # shared: each takes the next
                response, error = await _answered(asker, row.read(file))
                failed += not ledger.append(row, response, error)
                progress.update(bar, advance=1, failed=failed)

        async def sync() -> None:
            while True:
                await asyncio.sleep(SYNC_S)
                await asyncio.to_thread(ledger.sync)

        syncing = asyncio.ensure_future(sync())
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(in_flight):
                    tasks.create_task(work())
        except ExceptionGroup as group:  # the first has ended the others
            raise group.exceptions[0] from None
        finally:
            syncing.cancel()


async def _answered(asker: Asker, row: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """`response` and `error` of one row."""
    error = _wrong(row)
    if error is not None:
        return None, error
    answer = await _patiently(asker, row["url"], json.dumps(row["body"]).encode())
    if answer.body is None:
        return None, {"code": "invalid_response", "message": f"status {answer.status}, and a body that is not JSON"}
    return {"status_code": answer.status, "request_id": answer.request_id, "body": answer.body}, None


async def _patiently(asker: Asker, path: str, body: bytes) -> Answer:
    """Ask until there is an answer that is about this row."""
    until_s, wait_s = time.monotonic() + RETRY_S, 0.25
    while True:
        try:
            answer = await asker.ask(path, body)
        except OSError as error:
            told, dead, after_s = f"nobody answers ({error})", False, None
        else:
            code = _error(answer.body).get("code")
            told, dead, after_s = f"status {answer.status}, {_error(answer.body).get('message')}", code == "engine_dead", answer.retry_after_s
            if answer.status in NOT_LET_IN:
                dead = True
            elif answer.status not in BUSY:
                return answer
        if dead or time.monotonic() > until_s:
            raise RequestFailedError(f"the batch cannot go on: {told}. What was answered is kept; the same command goes on from there")
        await asyncio.sleep(max(after_s or 0.0, wait_s))
        wait_s = min(2 * wait_s, 10.0)


def _wrong(row: dict[str, Any]) -> dict[str, str] | None:
    """What is wrong with a row before anybody is asked, as its own error."""
    body = row.get("body")
    if unknown := sorted(row.keys() - {"custom_id", "method", "url", "body"}):
        return {"code": "unknown_field", "message": f"{unknown[0]}: there is no such field"}
    if row.get("method") != "POST":
        return {"code": "invalid_method", "message": "method: must be 'POST'"}
    if row.get("url") not in URLS:
        return {"code": "invalid_url", "message": f"url: must be one of {', '.join(URLS)}"}
    if not isinstance(body, dict):
        return {"code": "invalid_body", "message": "body: must be a JSON object"}
    for name in ("stream", "background"):
        if body.get(name):
            return {"code": "invalid_body", "message": f"body.{name}: must be false in a batch"}
    return None


def _error(body: Any) -> dict[str, Any]:
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else {}


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[BinaryIO]:
    try:
        file = source.open("rb")
    except OSError as error:
        raise InvalidRequestError("in", str(source), f"a file that can be read ({error.strerror})") from error
    with file:
        if not file.seekable():
            raise InvalidRequestError("in", str(source), "a plain file: a row is read again when its turn comes")
        yield file


def _progress() -> Progress:
    console = stderr()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("[red]{task.fields[failed]} failed"), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
