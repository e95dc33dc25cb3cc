"""GET /v1/models: what is served, which is one model."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request

from quire.server.errors import ServerError
from quire.server.schema_answers import Answer
from quire.server.serving import Serving, serving_of

router = APIRouter(tags=["OpenAI"])


class ModelCard(Answer):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["quire"] = "quire"
    max_model_len: int


class ModelList(Answer):
    """The models that are served, which is one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.get("/v1/models")
async def models(request: Request) -> ModelList:
    """The models served."""
    return ModelList(data=[_card(serving_of(request))])


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> ModelCard:
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


def _card(serving: Serving) -> ModelCard:
    info = serving.engine().info
    return ModelCard(id=serving.settings.model, created=serving.settings.created, max_model_len=info.context_len)
