"""Prometheus metrics. What the doors see is counted as it happens; what the engine knows is asked of it once a scrape.

Every label takes its values from a list written here, so that no client can make more series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from quire.errors import EngineDeadError
from quire.outputs import RequestOutput
from quire.server.traces import Traces

if TYPE_CHECKING:
    from quire.engine.cache_map import CacheMap
    from quire.engine.llm import LLM

OTHER = "other"
ENDPOINTS = ("completions", "chat/completions", "responses", "embeddings", OTHER)  # which reach the engine
STATUSES = ("400", "401", "403", "404", "405", "408", "413", "415", "422", "429", "431", "499", "500", "501", "503", OTHER)
OUTCOMES = ("stop", "length", "cancelled", "error")  # of several sequences the last in this list counts
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

router = APIRouter()


class _Registry(CollectorRegistry):
    """Without the time at which each series was made, which doubles their number and tells nobody anything."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """Everything one server counts, and the traces of its last requests. Thread-safe."""

    def __init__(self) -> None:
        self.traces = Traces()
        self.on_started: list[Callable[[], None]] = []  # called with every request, for those who sleep while there are none
        self._registry = registry = _Registry()
        started = Counter("quire_requests_started", "Requests that reached the engine.", ["endpoint"], registry=registry)
        ended = Counter("quire_requests", "Requests that have ended.", ["endpoint", "outcome"], registry=registry)
        errors = Counter("quire_request_errors", "Answers with an error status.", ["status"], registry=registry)
        self._started = {name: started.labels(name) for name in ENDPOINTS}
        self._ended = {(name, outcome): ended.labels(name, outcome) for name in ENDPOINTS for outcome in OUTCOMES}
        self._errors = {status: errors.labels(status) for status in STATUSES}
        self._prompt = Counter("quire_prompt_tokens", "Prompt tokens of requests that have ended.", registry=registry)
        self._hit = Counter("quire_cached_prompt_tokens", "Of these, tokens found in the cache.", registry=registry)
        self._generated = Counter("quire_generated_tokens", "Tokens drawn for requests that have ended.", registry=registry)
        self._first = Histogram("quire_time_to_first_token_seconds", "From request to first token.", buckets=SECONDS, registry=registry)
        self._between = Histogram("quire_time_between_tokens_seconds", "From token to token.", buckets=TOKEN_SECONDS, registry=registry)
        self._queued = Histogram("quire_request_queued_seconds", "From submission to first admission.", buckets=SECONDS, registry=registry)
        self._prefill = Histogram("quire_request_prefill_seconds", "From admission to first token.", buckets=SECONDS, registry=registry)
        self._decode = Histogram("quire_request_decode_seconds", "From first token to the end.", buckets=SECONDS, registry=registry)
        self.prompt_tokens = self.cached_tokens = 0

    def started(self, endpoint: str) -> None:
        """A request was handed to the engine."""
        self._started[_endpoint(endpoint)].inc()
        for wake in tuple(self.on_started):
            wake()

    def first_token(self, seconds: float) -> None:
        """A request's first token came after so long."""
        self._first.observe(seconds)

    def between_tokens(self, seconds: float) -> None:
        """The next token came so long after the one before."""
        self._between.observe(seconds)

    def finished(self, endpoint: str, output: RequestOutput, *, key_id: str | None = None, token_times_s: Sequence[float] = ()) -> None:
        """A request has ended. With the key that sent it a trace is kept too; its tokens' times are on the clock of `time.perf_counter`."""
        receipt = output.receipt
        reasons = [one.finish_reason for one in output.outputs]
        outcome = "error" if output.error is not None else max(reasons, key=OUTCOMES.index, default="stop")
        self._ended[_endpoint(endpoint), outcome].inc()
        self._prompt.inc(receipt.prompt_tokens)
        self._hit.inc(receipt.cached_tokens)
        self._generated.inc(output.receipt.drawn_tokens)
        self._queued.observe(receipt.queued_s)
        self._prefill.observe(receipt.prefill_s)
        self._decode.observe(receipt.decode_s)
        self.prompt_tokens += receipt.prompt_tokens
        self.cached_tokens += receipt.cached_tokens
        if key_id is not None:
            self.traces.finished(key_id, endpoint, output, token_times_s)

    def refused(self, status: int) -> None:
        """An answer had an error status."""
        self._errors[str(status) if str(status) in self._errors else OTHER].inc()

    def render(self, llm: LLM | None) -> bytes:
        """The exposition text. The engine is asked once; while it loads or when it has died only what it knows is missing."""
        engine = CollectorRegistry()
        engine.register(_EngineMetrics(_map(llm)))
        return generate_latest(self._registry) + generate_latest(engine)


def _endpoint(name: str) -> str:
    name = name.removeprefix("/").removeprefix("v1/")
    return name if name in ENDPOINTS else OTHER


def _map(llm: LLM | None) -> CacheMap | None:
    try:
        return None if llm is None else llm.cache_map()
    except EngineDeadError:
        return None


class _EngineMetrics(Collector):
    """What one look at the engine says, as metrics."""

    def __init__(self, seen: CacheMap | None) -> None:
        self._seen = seen

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("quire_engine_up", "Whether the engine takes requests.", value=self._seen is not None)
        if self._seen is None:
            return
        stats = self._seen.stats
        yield GaugeMetricFamily("quire_sequences_running", "Sequences that hold pages.", value=stats["num_running"])
        yield GaugeMetricFamily("quire_sequences_waiting", "Sequences in the queue.", value=stats["num_waiting"])
        pages = GaugeMetricFamily("quire_pages", "Pages; every page is in one state. All but on_disk are of the pool.", labels=["state"])
        for state, count in self._seen.counts().items():
            pages.add_metric([state], count)
        disk = self._seen.disk
        pages.add_metric(["on_disk"], disk.num_only if disk is not None else 0)
        yield pages
        if disk is not None:
            yield GaugeMetricFamily("quire_pages_also_on_disk", "Pages of the pool whose content lies on disk too.", value=disk.num_also)
        yield GaugeMetricFamily("quire_pinned_pages", "Pages that are pinned, whoever else holds them.", value=stats["num_pinned_pages"])
        yield CounterMetricFamily("quire_preemptions", "Sequences that gave their pages up for others.", value=stats["num_preemptions"])
        yield CounterMetricFamily("quire_steps", "Steps of the engine.", value=stats["num_steps"])
        yield CounterMetricFamily("quire_computed_tokens", "Tokens that went through the model.", value=stats["num_computed_tokens"])
        yield CounterMetricFamily("quire_drawn_tokens", "Tokens drawn, also those of requests that run.", value=stats["num_drawn_tokens"])
        yield CounterMetricFamily("quire_drafted_tokens", "Tokens guessed and computed.", value=stats["num_drafted_tokens"])
        yield CounterMetricFamily("quire_accepted_tokens", "Guessed tokens that were right; each saved a step.", value=stats["num_accepted_tokens"])
        yield CounterMetricFamily(
            "quire_cache_hit_tokens", "Tokens found in the cache whenever a sequence started.", value=stats["num_cached_tokens"]
        )
        seconds = CounterMetricFamily("quire_step_seconds", "Where the time of steps went.", labels=["part"])
        for part, spent in self._seen.step_seconds.items():
            seconds.add_metric([part], spent)
        yield seconds
        for name in ("fetched", "stored"):
            if f"num_{name}_pages" in stats:
                yield CounterMetricFamily(f"quire_disk_pages_{name}", f"Pages {name} by the tier on disk.", value=stats[f"num_{name}_pages"])


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    """Metrics in the Prometheus text format."""
    serving = request.app.state.serving
    return Response(serving.metrics.render(serving.llm), media_type=CONTENT_TYPE_LATEST)
