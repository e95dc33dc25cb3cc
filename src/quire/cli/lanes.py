"""Running several prompts at once: one lane for each sequence, filled as its events come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from quire.outputs import Completion, RequestOutput, TokenEvent
from quire.params import SamplingParams

if TYPE_CHECKING:
    from quire import LLM, RequestStream

TICK_S = 1 / 8


@dataclass
class Lane:
    """One sequence on its way: what is known of it so far. `output` is there once its whole request has ended."""

    request: int
    index: int
    label: str
    prompt: str
    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    output: RequestOutput | None = None

    @property
    def completion(self) -> Completion | None:
        """The finished sequence."""
        return self.output.outputs[self.index] if self.output is not None else None

    @property
    def status(self) -> str:
        """How far it is, in a few words."""
        if self.output is not None and self.output.error is not None:
            return "failed"
        if self.first_token_s is None:
            return self.finish_reason or "waiting"
        tokens = f"{self.num_tokens} token{'s' if self.num_tokens != 1 else ''}"
        elapsed = (self.last_token_s or 0.0) - self.first_token_s
        rate = f", {(self.num_tokens - 1) / elapsed:.0f}/s" if elapsed > 0 else ""
        return f"{tokens}{rate}{f', {self.finish_reason}' if self.finish_reason else ''}"

    def take(self, event: TokenEvent) -> None:
        """Add what an event brings."""
        self.text += event.text
        self.num_tokens += len(event.token_ids)
        if event.token_ids:
            self.last_token_s = time.perf_counter()
            self.first_token_s = self.first_token_s or self.last_token_s
        self.finish_reason = event.finish_reason or self.finish_reason


class Show(Protocol):
    """Where lanes are shown: a context around the run. All calls come from one thread."""

    def __enter__(self) -> object: ...
    def __exit__(self, *_: object) -> None: ...
    def changed(self, lane: Lane, text: str) -> None:
        """`text` was just added to the lane; possibly empty."""

    def ended(self, lanes: Sequence[Lane]) -> None:
        """All lanes of one request have their `output`."""

    def tick(self) -> None:
        """Called every `TICK_S`, whatever happens."""


@dataclass
class Run:
    """Prompts that run together, each with its params.

    `after[i] = j` holds request i back until request j has its first token, so that it finds j's prompt in the cache.
    """

    llm: LLM
    prompts: Sequence[str]
    params: Sequence[SamplingParams]
    labels: Sequence[str] = ()
    after: Mapping[int, int] = field(default_factory=dict)
    elapsed_s: float = 0.0

    def __post_init__(self) -> None:
        labels = self.labels or [str(i + 1) for i in range(len(self.prompts))]
        self.requests = [
            [Lane(i, k, labels[i] if params.n == 1 else f"{labels[i]}.{k + 1}", prompt) for k in range(params.n)]
            for i, (prompt, params) in enumerate(zip(self.prompts, self.params, strict=True))
        ]

    @property
    def lanes(self) -> list[Lane]:
        """All lanes, in order."""
        return [lane for lanes in self.requests for lane in lanes]

    @property
    def outputs(self) -> list[RequestOutput]:
        """Of the requests that have ended, in order."""
        return [output for lanes in self.requests if (output := lanes[0].output) is not None]

    def go(self, show: Show) -> None:
        """Run to the end. Left early, by an error or Ctrl-C, it cancels what runs.

        Raises:
            InvalidRequestError: a prompt was refused; then nothing has been shown.
        """
        start = time.perf_counter()
        streams: dict[int, RequestStream] = {}
        try:
            # All that need not wait are checked and queued before anything is shown.
            streams.update((i, self._submit(i)) for i in range(len(self.prompts)) if i not in self.after)
            with show:
                asyncio.run(self._follow(streams, show))
        except BaseException:
            for stream in streams.values():
                stream.cancel()
            raise
        finally:
            self.elapsed_s = time.perf_counter() - start

    def _submit(self, i: int) -> RequestStream:
        return self.llm.submit(self.prompts[i], self.params[i])

    async def _follow(self, streams: dict[int, RequestStream], show: Show) -> None:
        started = [asyncio.Event() for _ in self.prompts]

        async def follow(i: int) -> None:
            if i in self.after:
                await started[self.after[i]].wait()
                streams[i] = self._submit(i)
            lanes = self.requests[i]
            async for event in streams[i]:
                lane = lanes[event.index]
                lane.take(event)
                started[i].set()
                if event.output is not None:
                    for each in lanes:
                        each.output = event.output
                show.changed(lane, event.text)
            show.ended(lanes)

        async def tick() -> None:
            while True:
                await asyncio.sleep(TICK_S)
                show.tick()

        tasks = [asyncio.ensure_future(follow(i)) for i in range(len(self.prompts))]
        ticking = asyncio.ensure_future(tick())
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (ticking, *tasks):
                task.cancel()
            await asyncio.gather(ticking, *tasks, return_exceptions=True)
