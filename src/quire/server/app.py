"""The application: every door, behind the guard."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware

import quire
from quire.server import chat, completions, embeddings, health, metrics, models, page, response_inputs, response_prompt, responses, tokens, traces
from quire.server.errors import install
from quire.server.guard import OPEN_PATHS, Guard
from quire.server.schema_answers import REF, ChatCompletionChunk, CompletionChunk, ErrorEnvelope
from quire.server.schema_response_answers import ResponseEvent
from quire.server.serving import Serving

ERROR = {"application/json": {"schema": {"$ref": REF.format(model=ErrorEnvelope.__name__)}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"content": ERROR, "description": "The request is refused; `param` names the field."},
    "5XX": {"content": ERROR, "description": "503 while the model loads, while the server ends, and when its engine has failed."},
}

UNSEEN = (ErrorEnvelope, CompletionChunk, ChatCompletionChunk, ResponseEvent)  # by FastAPI: they are in no route's one answer


class App(FastAPI):
    """FastAPI, whose document says that there are keys: the guard knows them, no route does."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        document = super().openapi()
        components = document.setdefault("components", {})
        unseen = models_json_schema([(model, "serialization") for model in UNSEEN], ref_template=REF)[1]["$defs"]
        components["schemas"] = unseen | components["schemas"]
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in OPEN_PATHS & document["paths"].keys():
            for operation in document["paths"][path].values():
                operation["security"] = []
        return document


def create_app(serving: Serving) -> FastAPI:
    """The ASGI application over one `Serving`, which is at `app.state.serving`."""
    summary = "OpenAI-compatible inference on a paged, shared cache"
    app = App(title="Quire", version=quire.__version__, summary=summary, docs_url=None, redoc_url=None, responses=ERRORS)
    app.state.serving = serving
    for router in (
        completions.router,
        chat.router,
        responses.router,
        response_inputs.router,
        response_prompt.router,
        embeddings.router,
        models.router,
        tokens.router,
        health.router,
        metrics.router,
        traces.router,
        page.router,
    ):
        app.include_router(router)
    install(app)

    # What comes last here sees a request first: a browser's question whether it may ask carries no key.
    app.add_middleware(Guard, serving=serving)
    if serving.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(serving.settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # OpenAI's client names a dozen of its own in a browser; none says anything here but the key and the body's type
            expose_headers=["x-request-id", "retry-after"],
        )
    return app
