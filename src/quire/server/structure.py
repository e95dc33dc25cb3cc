"""Where a request says what form its answer must have, and what the engine is told of it."""

from __future__ import annotations

from typing import Any

from quire.server.errors import refused


def structure_of(response_format: dict[str, Any] | None, structured_outputs: dict[str, Any] | None) -> Any:
    """The engine's `SamplingParams.structured` for a request, None for free text.

    Raises:
        ServerError: a 400 that names the field.
    """
    if structured_outputs is not None:
        raise refused("structured_outputs", "this server has no structured output")
    if response_format is None or response_format == {"type": "text"}:
        return None
    raise refused("response_format", "this server has no structured output; must be {'type': 'text'} or left out")
