"""One shape for every error: `{"error": {"message", "type", "param", "code"}}`, whatever it was and wherever it came from.

Messages name fields and limits. They never hold a prompt, a path of this machine or a traceback.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from quire.errors import (
    CacheTooSmallError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    NothingToDrawError,
    QueueFullError,
    RequestFailedError,
    shown,
)
from quire.server.limits import MAX_JSON_DEPTH, RETRY_AFTER_S
from quire.structured import StructuredOutput

log = logging.getLogger("quire.server")

CLIENT_LEFT = 499  # for the log: nobody reads it

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
}
# What a field of the engine's is called here.
FIELD_NAMES = {"include_stop_in_output": "include_stop_str_in_output", "params": None}
# What must be of a kind, in the words of JSON.
KINDS = {
    **{"string_type": "a string", "int_type": "an integer", "float_type": "a number", "bool_type": "true or false", "list_type": "a list"},
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "an object"),
}
BRANCH = re.compile(r"^(str|int|float|bool|none|[A-Z]\w*)$|[\[(-]")  # how pydantic calls the kinds of a union
INPUT_SHOULD = re.compile(r"^(Input|List|Dictionary|String) should")  # how it begins what we begin with "must"
PLACES = ("body", "query", "path")  # where fields are
PATH = re.compile(r"(?<![\w:/])(?:~|\.{1,2})?(?:/[^\s/:'\",;)]+){2,}/?")


class ServerError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_AFTER_S))

    def body(self) -> dict[str, Any]:
        """The error object with its envelope."""
        return {"error": {"message": self.message, "type": TYPES.get(self.status, "server_error"), "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP answer."""
        # ASCII: a name that the caller made up may have no UTF-8 form.
        return Response(json.dumps(self.body()).encode(), self.status, self.headers, "application/json")


def refused(param: str, message: str) -> ServerError:
    """A 400 that names the field."""
    return ServerError(400, f"{param}: {message}", param=param)


def without_paths(text: str) -> str:
    """`text` with what looks like a path of this machine taken out."""
    return PATH.sub("<path>", text)


def as_server_error(error: BaseException) -> ServerError:
    """Any exception as what the client is told."""
    match error:
        case ServerError():
            return error
        case ContextLengthError():
            return ServerError(400, str(error), param="prompt", code="context_length_exceeded")
        case CacheTooSmallError():
            return ServerError(400, str(error), param="prompt", code="cache_too_small")
        case InvalidRequestError():
            param = FIELD_NAMES.get(error.field, error.field)
            value = "" if _untold(error) else f"={shown(error.value, 80)}"
            return ServerError(400, f"{param}{value}: must be {error.limit}", param=param, code="invalid_value")
        case QueueFullError():
            return ServerError(429, str(error), code="queue_full")
        case EngineDeadError():
            return ServerError(503, without_paths(str(error)), code="engine_dead")
        case NothingToDrawError():  # which the model has no part in: no client should try it again
            return ServerError(400, str(error).split(": ", 1)[-1], code="nothing_to_draw")
        case RequestFailedError():
            return ServerError(500, without_paths(str(error).split(": ", 1)[-1]), code="request_failed")
        case RequestValidationError() | ValidationError():
            return _validation(error)
        case HTTPException():
            return _http(error)
    log.error("an answer failed", exc_info=error)
    return ServerError(500, f"the server failed ({type(error).__name__}); its log says more", code="internal_error")


def _untold(error: InvalidRequestError) -> bool:
    """Whether the value is a prompt's text, no text at all, or our own word for what the body has."""
    return error.field == "prompt" and (isinstance(error.value, str) or error.value == []) or isinstance(error.value, StructuredOutput)


def install(app: FastAPI) -> None:
    """Have every exception answered in the one shape."""

    async def answer(request: Request, error: Exception) -> Response:
        refusal = as_server_error(error)
        request.state.code = refusal.code  # for the log
        return refusal.response()

    for kind in (HTTPException, RequestValidationError, ServerError, InvalidRequestError, QueueFullError, EngineDeadError, RequestFailedError):
        app.add_exception_handler(kind, answer)


def _validation(error: RequestValidationError | ValidationError) -> ServerError:
    """The first thing that is wrong, under the name of the field it is in."""
    found = error.errors()
    first = _most_telling(found)
    if first["type"] == "json_invalid":
        return ServerError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}", code="invalid_json")
    where = _where(first["loc"], of_a_field=first["type"] in ("extra_forbidden", "missing"))
    if not where and first["type"] in ("missing", "model_attributes_type"):
        return ServerError(400, "the body must be a JSON object, sent with content-type: application/json", code="invalid_json")
    param = ".".join(str(part)[:64] for part in where) or None
    message = INPUT_SHOULD.sub("must", first["msg"].removeprefix("Value error, ")).replace(" after validation", "")
    if first["type"] == "extra_forbidden":
        return ServerError(400, f"{param}: there is no such field", param=param, code="unknown_field")
    if first["type"] == "missing":
        return ServerError(400, f"{param}: must be given", param=param, code="missing_field")
    if first["type"] in KINDS:
        message = _kinds(found, where)
    elif first["type"] == "literal_error":
        message = _words(found, where)
    elif first["type"] == "none_required":
        message = "must be null or left out: this server has no such thing"
    # A number, or a word where there is a choice of them: other texts may be a prompt's.
    told = type(first["input"]) in (int, float, bool) or (first["type"] == "literal_error" and isinstance(first["input"], str))
    given = shown(first["input"], 80)
    value = f"={given.lower() if isinstance(first['input'], bool) else given}" if told else ""
    return ServerError(400, f"{param}{value}: {message}" if param else message, param=param, code="invalid_value")


def _kinds(found: Sequence[Any], where: Sequence[str | int]) -> str:
    """What a value that is of none of the kinds it may be of must be."""
    kinds = [KINDS[one["type"]] for one in found if one["type"] in KINDS and _where(one["loc"], of_a_field=False) == where]
    return f"must be {' or '.join(dict.fromkeys(kinds))}"


def _words(found: Sequence[Any], where: Sequence[str | int]) -> str:
    """Which words a value must be one of, where each kind of what it is in has its own."""
    words = [one["ctx"]["expected"] for one in found if one["type"] == "literal_error" and _where(one["loc"], of_a_field=False) == where]
    return f"must be {' or '.join(dict.fromkeys(words)).replace('False', 'false')}"


def _where(loc: Sequence[str | int], *, of_a_field: bool) -> list[str | int]:
    """The way to what is wrong, without the kinds of unions that pydantic names on it. With `of_a_field` the last part is a name, as it may look."""
    parts = loc[1:] if loc and loc[0] in PLACES else loc
    last = len(parts) - 1
    return [part for i, part in enumerate(parts) if isinstance(part, int) or (of_a_field and i == last) or not BRANCH.search(part)]


def _most_telling(found: Sequence[Any]) -> Any:
    """Of a union each kind that did not match complains: what is not about the kind, or is furthest in, is about what was meant."""
    about_one_field = [one for one in found if one["loc"][:2] == found[0]["loc"][:2]]
    return min(about_one_field, key=lambda one: (one["type"].endswith("_type"), -len(one["loc"])))


def _http(error: HTTPException) -> ServerError:
    match error.status_code:
        case 404 if error.detail == "Not Found":
            message = "there is nothing at this address"
        case 405:
            message = "this address does not take this method"
        case 400 if isinstance(error.__cause__, ClientDisconnect):
            return ServerError(CLIENT_LEFT, "the client has left", code="client_left")
        case 400 if "parsing the body" in str(error.detail):
            return ServerError(400, _unparsed(error.__cause__), code="invalid_json")
        case _:
            message = str(error.detail)
    return ServerError(error.status_code, message, headers=error.headers)


def _unparsed(cause: BaseException | None) -> str:
    """Why a body could not be read, where it was not its grammar."""
    match cause:
        case RecursionError():
            return f"the body must be nested at most {MAX_JSON_DEPTH} deep"
        case ValueError() if not isinstance(cause, UnicodeError):  # JSON has no bound, and Python's parser this one
            return f"the body has an integer of more than {sys.get_int_max_str_digits()} digits, the most there may be"
    return "the body is not JSON in UTF-8"
