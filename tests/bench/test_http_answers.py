"""An answer read back out of the bytes that came: framing, events, and when each was whole."""

from __future__ import annotations

import json
import random

import pytest
from bench.http.answers import Heard, Piece, events, heard, unchunked

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def told(text: str, finish_reason: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": finish_reason}], "usage": None}).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    return b"data: " + json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}).encode() + b"\n\n"


def chunked(*chunks: bytes) -> bytes:
    return b"".join(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks) + b"0\r\n\r\n"


def cut(data: bytes, dice: random.Random, most: int) -> list[Piece]:
    """The same bytes in pieces, one a second."""
    pieces, at = [], 0
    while at < len(data):
        size = dice.randint(1, most)
        pieces.append((float(len(pieces)), data[at : at + size]))
        at += size
    return pieces


def whole_at(pieces: list[Piece], num_bytes: int) -> float:
    """When so many bytes were there, the slow way."""
    got = 0
    for when, data in pieces:
        got += len(data)
        if got >= num_bytes:
            return when
    raise AssertionError


@pytest.mark.parametrize("framed", [True, False])
@pytest.mark.parametrize("most", [1, 7, 60, 10_000])
def test_events_however_they_were_cut(framed: bool, most: int) -> None:
    said = [told("a"), told("b\r\n\r\n1f\r\n"), told(""), told("c", "length"), usage(4), b"data: [DONE]\n\n"]
    for seed in range(20):
        dice = random.Random(seed)
        if framed:  # chunks with one event, with two, and with parts of some
            stream, sizes = b"".join(said), []
            while sum(sizes) < len(stream):
                sizes.append(min(dice.randint(1, 150), len(stream) - sum(sizes)))
            parts = [stream[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
            data = HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(*parts)
        else:
            data = HEAD + b"\r\n" + b"".join(said)
        pieces = cut(data, dice, most)
        found = heard(-1.0, pieces, 4)
        assert found.problem is None and found.tokens == 4 and found.end_s == pieces[-1][0] and found.sent_s == -1.0
        if framed:
            ends = []
            for i in range(4):
                left, at = len(b"".join(said[: i + 1])), data.index(b"\r\n\r\n") + 4
                for part in parts:  # walk to the chunk that has the event's last byte
                    at = data.index(b"\r\n", at) + 2
                    if left <= len(part):
                        ends.append(at + left)
                        break
                    left, at = left - len(part), at + len(part) + 2
        else:
            ends = [data.index(b"\r\n\r\n") + 4 + len(b"".join(said[: i + 1])) for i in range(4)]
        assert found.event_s == tuple(whole_at(pieces, end) for end in ends)


def test_a_last_event_without_tokens_is_no_token() -> None:
    body = told("a") + told("b") + b'data: {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": 2}}\n\n'
    found = heard(0.0, [(1.0, HEAD + b"\r\n"), (2.0, body)], 2)
    assert found == Heard(0.0, (2.0, 2.0), 2.0, 2, None)


@pytest.mark.parametrize(
    ("pieces", "problem"),
    [
        ([], "no answer"),
        ([(1.0, b"HTTP/1.1 429 Too Many\r\n\r\n{}")], "HTTP/1.1 429 {}"),
        ([(1.0, HEAD + b"\r\n" + told("a"))], "0 tokens came, 2 were asked for"),
        ([(1.0, HEAD + b"\r\n" + told("a") + usage(1))], "1 tokens came, 2 were asked for"),
        ([(1.0, HEAD + b'\r\ndata: {"error": {"message": "x"}}\n\n')], 'an error event: {"message": "x"}'),
        ([(1.0, HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(told("a"), usage(2))[:-30])], "0 tokens came, 2 were asked for"),
    ],
)
def test_what_goes_wrong_is_a_failure(pieces: list[Piece], problem: str) -> None:
    assert heard(0.0, pieces, 2).problem == problem


def test_chunks_and_events_alone() -> None:
    content, places = unchunked(b"3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n")
    assert content == b"abc0123456789" and places == [(0, 7), (3, 15)]
    assert events(b": comment\n\nevent: x\ndata: 1\ndata:2\n\ndata: half", [(0, 0)]) == [(36, b"1\n2")]
