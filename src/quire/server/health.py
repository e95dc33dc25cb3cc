"""Probes: alive, ready, and which version."""

from __future__ import annotations

import time
from typing import Literal

from fastapi import APIRouter, Request, Response

import quire
from quire.server.errors import ServerError
from quire.server.schema_answers import Answer, answers
from quire.server.serving import serving_of

router = APIRouter(tags=["probes"])


class Alive(Answer):
    """The answer of GET /health."""

    status: Literal["alive"] = "alive"


class Ready(Answer):
    """The answer of GET /ready."""

    status: Literal["ready"]


class Version(Answer):
    """The answer of GET /version."""

    version: str


@router.get("/health")
async def health(request: Request) -> Alive:
    """200 while this process is worth keeping, loading included; 503 and the reason when its engine has failed."""
    failure = serving_of(request).failure
    if failure is not None:
        raise ServerError(503, f"there is no engine: {failure}", code="engine_dead")
    return Alive()


@router.get("/ready", responses=answers(Ready))
async def ready(request: Request) -> Response:
    """200 when requests are taken; until then 503 with what is being waited for."""
    serving = serving_of(request)
    try:
        serving.engine()
    except ServerError as error:
        if error.code == "loading":
            error.message = f"the model is being loaded, for {time.monotonic() - serving.started_s:.0f} s so far"
        raise
    return Response('{"status": "ready"}', media_type="application/json")


@router.get("/version")
async def version() -> Version:
    """Of Quire."""
    return Version(version=quire.__version__)
