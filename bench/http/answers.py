"""An answer as it was heard on a socket: bytes, and when each piece of them came. Read when all is over: the client costs little meanwhile."""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

Piece = tuple[float, bytes]  # when it came, in seconds of one clock


@dataclass(frozen=True)
class Heard:
    """One streamed completion.

    `event_s` is when each event with tokens came whole, `end_s` when the last byte came; `tokens` is what the server says it generated.
    `problem` is why that is not all there should be: a status, an error event, an answer that was cut off.
    """

    sent_s: float
    event_s: tuple[float, ...] = ()
    end_s: float = 0.0
    tokens: int = 0
    problem: str | None = None


def heard(sent_s: float, pieces: list[Piece], new: int) -> Heard:
    """What became of a request for `new` tokens whose whole answer is `pieces`."""
    head, _, body = b"".join(data for _, data in pieces).partition(b"\r\n\r\n")
    status, chunked = head[:12].decode("latin-1"), b"transfer-encoding: chunked" in head.lower()
    if not pieces or not status.endswith(" 200"):
        said = body[:200].decode("utf-8", "replace")
        return Heard(sent_s, end_s=pieces[-1][0] if pieces else sent_s, problem=f"{status or 'no answer'} {said}".strip())
    starts, ends, at = [], [], 0
    for when, data in pieces:
        at += len(data)
        starts.append(when)
        ends.append(at)
    times, tokens, problem = [], 0, None
    for end, data in events(*(unchunked(body) if chunked else (body, [(0, 0)]))):
        if data == b"[DONE]":
            continue
        said = json.loads(data)
        if "error" in said:
            problem = f"an error event: {json.dumps(said['error'])[:200]}"
        tokens = (said.get("usage") or {}).get("completion_tokens", tokens)
        if any(speaks(choice) for choice in said.get("choices", ())):
            times.append(starts[bisect_left(ends, len(head) + 4 + end)])
    if problem is None and tokens != new:
        problem = f"{tokens} tokens came, {new} were asked for"
    return Heard(sent_s, tuple(times), pieces[-1][0], tokens, problem)


def speaks(choice: dict[str, Any]) -> bool:
    """Whether a choice of a chunk brings tokens: text, or token by token what is no text yet; the last may only say why it is the last."""
    return bool(choice.get("text")) or choice.get("finish_reason") is None


def unchunked(body: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """The content of a chunked body, and where it lay: (place in the content, place in the body) of each chunk's beginning.

    What comes after a chunk that is not whole is left out.
    """
    content, places, at, length = [], [], 0, 0
    while (line := body.find(b"\r\n", at)) >= 0:
        size = int(body[at:line].split(b";")[0], 16)
        if size == 0 or line + 2 + size > len(body):
            break
        places.append((length, line + 2))
        content.append(body[line + 2 : line + 2 + size])
        length, at = length + size, line + 4 + size
    return b"".join(content), places


def events(content: bytes, places: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
    """(how many bytes of the body there are when it is whole, data) of each server-sent event."""
    found, at, chunk = [], 0, 0
    while (end := content.find(b"\n\n", at)) >= 0:
        while chunk + 1 < len(places) and places[chunk + 1][0] < end + 2:
            chunk += 1
        lines = [line[5:].removeprefix(b" ") for line in content[at:end].split(b"\n") if line.startswith(b"data:")]
        if lines:
            found.append((end + 2 - places[chunk][0] + places[chunk][1], b"\n".join(lines)))
        at = end + 2
    return found
