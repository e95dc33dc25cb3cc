"""Responses that may be fetched later: in memory, each for the key that made it alone, the oldest going when there are too many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import Request

from quire.server.errors import ServerError
from quire.server.response_log import EventLog
from quire.server.runs import Run
from quire.server.schema_chat import Message

MAX_STORED = 1024  # of one key
MAX_STORED_BYTES = 64 * 2**20  # of one key, counted as below; an operator knows how many keys there are
MESSAGE_BYTES = 1024  # what a message takes beside its text, on the safe side


class Stored:
    """One response.

    `messages` are what it was asked and what it answered, for a later one to go on from, and `inputs` what it was asked as items. They are shared
    with the responses before and after it, yet counted whole in each: then the bound holds whichever of them go. `run` is there while it runs in the
    background, and `log` where its events are kept.
    """

    def __init__(
        self,
        body: dict[str, Any],
        inputs: Sequence[dict[str, Any]],
        messages: Sequence[Message],
        *,
        run: Run | None = None,
        log: EventLog | None = None,
    ) -> None:
        self.inputs, self.messages, self.run, self.log = inputs, messages, run, log
        self.background = bool(body["background"])
        self.body = body
        self.num_bytes = len(json.dumps([body, inputs])) + sum(MESSAGE_BYTES + 4 * len(str(message.content)) for message in messages)
        self.num_bytes += log.num_bytes if log is not None else 0

    @property
    def items(self) -> list[dict[str, Any]]:
        """What it was asked and what it answered, as items."""
        return [*self.inputs, *self.body["output"]]

    def cancelled(self) -> Stored:
        """Cancel it, if it runs. Returns it as it is then."""
        if self.run is None:
            return self
        self.run.cancel()
        self.body["status"] = "cancelled"
        return Stored(self.body, self.inputs, self.messages, log=self.log)

    @property
    def status(self) -> str:
        """As its body says."""
        return str(self.body["status"])


class ResponseStore:
    """For the event loop alone. Callers are told apart by their namespace."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Stored]] = {}

    def put(self, owner: str, stored: Stored) -> None:
        """Keep one, new or in the place of the one with its id, and let the oldest go that have ended. Those that run are bounded by the queue."""
        kept = self._kept.setdefault(owner, {})
        kept[stored.body["id"]] = stored
        num_bytes = sum(one.num_bytes for one in kept.values())
        for response_id, one in list(kept.items()):
            if len(kept) <= MAX_STORED and num_bytes <= MAX_STORED_BYTES:
                return
            if one.run is None:
                num_bytes -= kept.pop(response_id).num_bytes

    def find(self, owner: str, response_id: str) -> Stored | None:
        """One of the caller's own, None where there is none: another's is as if it were not there."""
        return self._kept.get(owner, {}).get(response_id)

    def get(self, owner: str, response_id: str) -> Stored:
        """One of the caller's own.

        Raises:
            ServerError: 404.
        """
        found = self.find(owner, response_id)
        if found is None:
            raise ServerError(404, "there is no such response, or no more", param="response_id", code="response_not_found")
        return found

    def drop(self, owner: str, response_id: str) -> None:
        """Forget one."""
        self._kept.get(owner, {}).pop(response_id, None)


def store_of(request: Request) -> ResponseStore:
    """The server's store, made when it is first asked for."""
    state = request.app.state
    if not hasattr(state, "responses"):
        state.responses = ResponseStore()
    assert isinstance(state.responses, ResponseStore)
    return state.responses
