"""GET /v1/responses/{id}/input_items: what a stored response was made from, a page at a time."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Query, Request, Response

from quire.server.errors import refused
from quire.server.response_items import Body
from quire.server.response_store import store_of
from quire.server.schema_answers import answers
from quire.server.schema_items import FunctionCallItem, FunctionOutputItem, Item
from quire.server.schema_response_answers import InputItems
from quire.server.schema_responses import Included, ResponseRequest
from quire.server.sse import json_response

MOST = 100  # OpenAI's numbers
DEFAULT = 20
PARAMETERS = ("limit", "order", "after")
INCLUDE = ("include", "include[]")  # the second as OpenAI's clients write lists
router = APIRouter(tags=["OpenAI"])


@router.get("/v1/responses/{response_id}/input_items", responses=answers(InputItems))
async def listed(
    request: Request,
    response_id: str,
    limit: Annotated[int, Query(ge=1, le=MOST)] = DEFAULT,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(description="The id of the last item of the page before.")] = None,
) -> Response:
    """What a response was made from: its input, and before that what led to it by previous_response_id. With asc the last item comes last."""
    check_query(request, PARAMETERS)
    items = store_of(request).get(request.state.namespace, response_id).inputs
    items = list(items if order == "asc" else reversed(items))
    if after is not None:
        place = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise refused("after", "must be the id of an item in this list")
        items = items[place + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return json_response({"object": "list", "data": page, "has_more": len(items) > limit, **ends})


def check_query(request: Request, known: Sequence[str]) -> None:
    """Refuse what else there is behind an address. `include` is taken with what may be asked of an answer: a stored one is told with all it has.

    Raises:
        ServerError: 400.
    """
    for name, value in request.query_params.multi_items():
        if name in INCLUDE:
            if value not in get_args(Included):
                raise refused("include", f"must be of {' and '.join(get_args(Included))}")
        elif name not in known:
            raise refused(name, f"must be left out: there are {', '.join((*known, 'include'))}")


def inputs_of(asked: ResponseRequest, before: Sequence[Body]) -> list[Body]:
    """The items that `asked` is answered from, each with an id of its own: those `before` it, and those it brings."""
    found, ids = list(before), {item["id"] for item in before}
    for item in _told(asked):
        if item["id"] in ids:  # sent back to where it is already: a page that begins after it would never end
            item["id"] = _new_id(item)
        ids.add(item["id"])
        found.append(item)
    return found


def _told(asked: ResponseRequest) -> Iterator[Body]:
    items = [Item(role="user", content=asked.input)] if isinstance(asked.input, str) else asked.input
    for item in items:
        told = item.model_dump(exclude_none=True) | _content(item)
        yield {"id": _new_id(told), "status": "completed"} | told


def _content(item: Item | FunctionCallItem | FunctionOutputItem) -> Body:
    """A message's content as parts, which a list has also where the request had text."""
    if not isinstance(item, Item):
        return {}
    if not isinstance(item.content, str):
        parts = [part.model_dump(exclude_none=True, exclude={"logprobs"}) for part in item.content]
    else:
        parts = [{"type": "output_text" if item.role == "assistant" else "input_text", "text": item.content}]
    return {"content": [_part(part) for part in parts]}


def _part(part: dict[str, Any]) -> Body:
    return {"annotations": [], "logprobs": []} | part if part["type"] == "output_text" else part


def _new_id(item: Body) -> str:
    kind = {"message": "msg", "function_call": "fc"}.get(item["type"], "fco")
    return f"{kind}_{uuid.uuid4().hex}"
