"""GET /v1/models: what is served, which is one model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from quire.server.errors import ServerError
from quire.server.serving import Serving, serving_of

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The models served."""
    return {"object": "list", "data": [_card(serving_of(request))]}


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> dict[str, Any]:
    """One of them."""
    serving = serving_of(request)
    check_model(serving, model)
    return _card(serving)


def check_model(serving: Serving, name: str | None) -> None:
    """Refuse another model than the one served; a request may leave it out.

    Raises:
        ServerError: 404.
    """
    if name is not None and name != serving.settings.model:
        raise ServerError(404, f"model: {name[:80]!r} is not served here; {serving.settings.model!r} is", param="model", code="model_not_found")


def _card(serving: Serving) -> dict[str, Any]:
    info = serving.engine().info
    return {
        "id": serving.settings.model,
        "object": "model",
        "created": serving.settings.created,
        "owned_by": "quire",
        "max_model_len": info.context_len,
    }
