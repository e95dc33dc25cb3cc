"""Where a request says what form its answer must have, and what the engine is told of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

from quire.errors import InvalidRequestError
from quire.server.errors import ServerError, as_server_error, refused
from quire.server.schema import ResponseFormat, Sampling, StructuredOutputs
from quire.structured import StructuredOutput

MENTIONED = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")


def structure_of(response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None) -> StructuredOutput | None:
    """The engine's `SamplingParams.structured` for a request, None for free text. Call it, and submit, inside `named_as`.

    Raises:
        ServerError, InvalidRequestError: both fields are given, or one is not as it must be.
    """
    if structured_outputs is not None:
        if response_format is not None and response_format.type != "text":
            raise refused("structured_outputs", "must be left out where response_format asks for a form")
        asked = structured_outputs
        return StructuredOutput(
            json_object=bool(asked.json_object), json_schema=asked.json_, regex=asked.regex, choice=asked.choice, grammar=asked.grammar
        )
    if response_format is None:
        return None
    if (response_format.type == "json_schema") != (response_format.json_schema is not None):
        raise refused("response_format.json_schema", "must be given with the type json_schema, and with no other")
    if response_format.json_schema is not None and response_format.json_schema.schema_ is not None:
        return StructuredOutput(json_schema=response_format.json_schema.schema_)
    return None if response_format.type == "text" else StructuredOutput(json_object=True)


def structure_names(asked: Sampling) -> dict[str, str]:
    """What this body calls the fields that the engine knows as `structured`: for `named_as`."""
    if asked.structured_outputs is not None:
        return {"structured.json_schema": "structured_outputs.json", "json_schema": "json", "structured": "structured_outputs"}
    return {"structured.json_schema": "response_format.json_schema.schema", "structured": "response_format"}


@contextlib.contextmanager
def named_as(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, an error about a field is raised under this body's name for it.

    `names`: of fields and of what begins with them and a dot; of two that fit, the longer one counts. What else a message mentions is renamed too,
    where its name cannot be a plain word.
    """
    try:
        yield
    except (ServerError, InvalidRequestError) as error:
        raise _renamed(as_server_error(error), names) from error


def _renamed(error: ServerError, names: Mapping[str, str]) -> ServerError:
    param = error.param or ""
    known = max((name for name in names if param == name or param.startswith(name + ".")), key=len, default=None)
    told = param if known is None else names[known] + param.removeprefix(known)
    headless = param and error.message.startswith(param)
    message = MENTIONED.sub(lambda found: names.get(found[0], found[0]), error.message.removeprefix(param) if headless else error.message)
    return ServerError(error.status, told + message if headless else message, param=told or None, code=error.code, headers=error.headers)
