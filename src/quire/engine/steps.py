"""Where the time of steps goes, by part, and in which steps the last requests' prompts were computed."""

from __future__ import annotations

import time
from collections import OrderedDict

PARTS = ("plan", "forward", "sample", "commit", "deliver")
MAX_REQUESTS = 512  # whose chunks are remembered
MAX_CHUNKS = 1024  # of one of them


class StepLog:
    """Written by the engine's thread; what it holds may be read on any. Times are `time.perf_counter` seconds."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._at = 0.0
        self._chunks: OrderedDict[str, list[tuple[float, int]]] = OrderedDict()

    def begin(self) -> None:
        """A step begins."""
        self._at = time.perf_counter()

    def mark(self, part: str) -> None:
        """What has been done since the last mark was this part of the step."""
        now = time.perf_counter()
        self.seconds[part] += now - self._at
        self._at = now

    def note_chunk(self, request_id: str, num_tokens: int) -> None:
        """This step computes so many tokens of a request that has no output yet."""
        chunks = self._chunks.get(request_id)
        if chunks is None:
            chunks = self._chunks[request_id] = []
            if len(self._chunks) > MAX_REQUESTS:
                self._chunks.popitem(last=False)
        if len(chunks) < MAX_CHUNKS:
            chunks.append((self._at, num_tokens))

    def chunks(self, request_id: str) -> list[tuple[float, int]]:
        """(when it began, number of tokens) of each step before a request's first token; empty when that has been forgotten."""
        return list(self._chunks.get(request_id, ()))
