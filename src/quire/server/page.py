"""The page at `/` and what it shows: its files, one stream of what changes in the engine, and single pages of the cache when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, StreamingResponse

from quire.server.feed import MAX_WATCHERS, Feed

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}

router = APIRouter()


@router.get("/", include_in_schema=False)
def index() -> FileResponse:
    """The page."""
    return _file("index.html")


@router.get("/docs", include_in_schema=False)
def docs() -> FileResponse:
    """The API's page, for whoever has a key. Without one a browser opens it among the static files and gives the key there."""
    return _file("docs.html")


@router.get("/page/static/{name}", include_in_schema=False)
def static(name: str) -> FileResponse:
    """One of its files; there are no folders under it."""
    if name not in {path.name for path in STATIC.iterdir()}:
        raise HTTPException(404, f"there is no {name!r}")
    return _file(name)


def _file(name: str) -> FileResponse:
    return FileResponse(STATIC / name, headers=HEADERS, media_type=TYPES[Path(name).suffix])


@router.get("/page/events", include_in_schema=False)
async def events(request: Request) -> StreamingResponse:
    """What changes in the engine, as server-sent events."""
    state = request.app.state
    if not hasattr(state, "feed"):
        state.feed = Feed(state.serving)
    feed: Feed = state.feed
    if feed.num_watchers >= MAX_WATCHERS:
        raise HTTPException(429, f"{feed.num_watchers} watch already, the most there may be")
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(feed.events(request.state.namespace), media_type="text/event-stream", headers=headers)


@router.get("/page/cache/{page_id}", include_in_schema=False)
def cache_page(request: Request, page_id: int) -> dict[str, Any]:
    """One page of the cache; its tokens only if they are those of the caller's own namespace."""
    serving = request.app.state.serving
    if serving.llm is None:
        raise HTTPException(503, "the model is being loaded")
    seen = serving.llm.page(page_id, namespace=request.state.namespace)
    text = serving.texts.decode(seen.token_ids, False) if seen.token_ids is not None and serving.texts is not None else None
    return {
        "page": seen.page_id,
        "state": seen.state,
        "pinned": seen.pinned,
        "holders": seen.num_holders,
        "requests": list(seen.request_ids),
        "group": seen.group_id,
        "position": seen.position,
        "tokens": None if seen.token_ids is None else len(seen.token_ids),
        "text": text,
    }
