"""The library's front door: a model, its engine and its thread behind one object."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from quire.config import EngineConfig
from quire.engine.build import Built, EngineInfo, build_engine
from quire.engine.cache_map import CacheMap, PageContent, page_content, take_map
from quire.engine.home import stays_here
from quire.engine.intake import Intake, Prompt, as_list
from quire.engine.keeper import CacheKeeper
from quire.engine.pooling import normalized
from quire.engine.steps import StepLog
from quire.engine.stream import RequestStream, cancelled_when_left, shown
from quire.engine.worker import Worker
from quire.errors import ConfigError, InvalidRequestError
from quire.outputs import Explanation, RequestOutput, TokenEvent
from quire.params import Pooling, SamplingParams
from quire.policy.pins import Pin
from quire.request import Request, check_namespace, check_ttl
from quire.tensors.models.probe import probe_again
from quire.tensors.stacked import StackedView

MAX_PIN_ATTEMPTS = 3


class LLM:
    """A causal language model served from a paged cache.

        with LLM("path-or-hub-id") as llm:
            outputs = llm.generate(["Once upon", [5, 6, 7]], SamplingParams(max_tokens=64, temperature=0.8, seed=7))
            for event in llm.stream("Once upon"):
                print(event.text, end="")

    Args:
        model: a hub id, a local folder in Hugging Face format, or a live `PreTrainedModel` on the device. A live model is not copied and not changed.
            Run it yourself, and change its weights or its code, only while no request is open; what was cached is then forgotten by itself,
            except after writes through `.data` and changes inside hooks and objects, which leave no trace: call `reset_cache` after these.
        **options: fields of `EngineConfig`.

    Raises:
        ConfigError, ModelError (both ValueErrors): before anything runs.
    """

    def __init__(self, model: str | os.PathLike[str] | PreTrainedModel, **options: Any) -> None:
        self._config = config = EngineConfig.of(options)
        source = os.fspath(model) if isinstance(model, os.PathLike) else model
        self._built = build_engine(source, config)
        self._worker = Worker(self._built.engine, max_open=config.max_waiting + config.max_sequences)
        self._intake = Intake(self._built)
        # Also at interpreter exit: a thread inside a kernel must not outlive the runtime under it.
        self._close = weakref.finalize(self, _shut_down, self._worker, self._built)

    @property
    def info(self) -> EngineInfo:
        """What the options resolved to for this model on this machine."""
        return self._built.info

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model that is served, nothing of ours on it between steps. Hooks on it are heeded of a live model alone."""
        return self._built.model.transformers_model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer as Hugging Face made it, or None."""
        return self._built.tokenizer.hf if self._built.tokenizer else None

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine, None while nothing has. Then every open request has failed, and so does every later one."""
        return self._worker.death

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        namespace: str | None = None,
        priority: int = 0,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Run prompts to their end, together, and return their outputs in order.

        Args:
            prompts: one prompt (text, or a list, array or tensor of token ids) or a list of prompts.
            params: one for all, or one for each.
            namespace: whose cached pages they may use and add to; nobody else's requests can tell. None is the default one.
            priority: requests of a higher one start first and give way last.
            progress: show a progress bar.

        Raises:
            InvalidRequestError: any prompt or params are refused; then none has run.
            QueueFullError: with what others have open it is more than `max_waiting` and `max_sequences` together; what had begun is cancelled.
            EngineDeadError: the engine has ended, or lives in the process from which this one was forked.
        """
        many = as_list(prompts)
        self.check_room(len(many))
        given = params if params is not None else SamplingParams()
        try:
            each = [given] * len(many) if isinstance(given, SamplingParams) else list(given)
        except TypeError:
            raise InvalidRequestError("params", params, "a SamplingParams, or one for each prompt") from None
        if len(each) != len(many):
            raise InvalidRequestError("params", f"{len(each)} SamplingParams", f"one, or one for each of the {len(many)} prompts")
        requests = [self._request(prompt, one, namespace, priority, read=False) for prompt, one in zip(many, each, strict=True)]  # checks all first
        streams: list[RequestStream] = []
        try:
            streams.extend(self._worker.submit(request) for request in requests)
            return [stream.wait() for stream in shown(streams, progress)]
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, namespace: str | None = None, priority: int = 0
    ) -> Iterator[TokenEvent]:
        """Events of one prompt as they come; leaving them early, or unread, cancels it. Arguments and errors as in `generate`; no `best_of`."""
        if isinstance(params, SamplingParams) and params.best_of is not None:
            raise InvalidRequestError("best_of", params.best_of, "None when streaming: which are the best is known at the end")
        return cancelled_when_left(self.submit(prompt, params, namespace=namespace, priority=priority), self)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        namespace: str | None = None,
        priority: int = 0,
    ) -> torch.Tensor:
        """One vector for each prompt, out of its tokens' final hidden states: float32 [N, D], of length 1 with `normalize`.

        Raises:
            InvalidRequestError: as in `generate`, with the others there; or the model has no plain output layer to take these states from.
            RequestFailedError: one failed in the model.
        """
        many = as_list(prompts)
        if pooling is None:
            raise InvalidRequestError("pooling", None, "'mean' or 'last'")
        params = SamplingParams(max_tokens=0, pooling=pooling)
        vectors = [output.raise_for_error().embedding for output in self.generate(many, params, namespace=namespace, priority=priority)]
        return torch.stack([normalized(v) if normalize else v for v in vectors]) if vectors else torch.empty(0, self.info.hidden_size or 0)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        namespace: str | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> RequestStream:
        """Queue one prompt and return its stream at once, for `for`, `async for`, `wait()` and `cancel()`. Thread-safe.

        With `best_of` all comes with one event, which is the best one's. Errors as in `generate`, and of an open request's `request_id`. The stream
        does not hold this object: when nobody does any more the engine is closed, and what runs is cancelled.
        """
        return self._worker.submit(self._request(prompt, params if params is not None else SamplingParams(), namespace, priority, request_id))

    def cancel(self, request_id: str) -> None:
        """End a request; its pages are back before the next step. Harmless when it has ended, or never was; InvalidRequestError for no string."""
        self._worker.cancel(request_id)

    def check_room(self, num_requests: int) -> None:
        """Refuse, by InvalidRequestError, more requests at once than may ever be open."""
        self._worker.check_room(num_requests)

    def stats(self) -> dict[str, Any]:
        """Counters since the start and the state of the pool now, taken between two steps; docs/cache.md says what each counts."""
        info, stats = self.info, self._worker.call(self._built.engine.stats)
        return {**stats, "bytes_per_token": info.bytes_per_token, "cache_bytes": stats["num_pages"] * info.page_bytes}

    def cache_map(self) -> CacheMap:
        """The state of every page and the way of every open sequence through them, taken between two steps."""
        engine, eye = self._built.engine, self._built.eye
        if eye is None:
            return self._worker.call(lambda: take_map(engine))
        return eye.look(*self._worker.call(lambda: (take_map(engine), engine.scheduler.cache.index.indexed())))

    def page(self, page_id: int, *, namespace: str | None = None) -> PageContent:
        """What one page of the cache holds, as far as this namespace, of which "a/b" is a part of "a", may know.

        Raises:
            InvalidRequestError: there is no such page.
        """
        space = check_namespace(namespace)
        return self._worker.call(lambda: page_content(self._built.engine, page_id, space))

    @property
    def step_log(self) -> StepLog:
        """Where the time of steps goes, and when the last requests' prompts were computed."""
        return self._built.engine.runner.log

    def check_integrity(self) -> None:
        """Raise IntegrityError if an invariant of the cache does not hold. Callable at any time."""
        self._worker.call(self._keeper.check_integrity)

    def explain(self, prompt: Prompt, *, namespace: str | None = None) -> Explanation:
        """What a prompt would find in the cache, and the first token that it would not; takes and changes nothing."""
        token_ids, space = self._checked(prompt), check_namespace(namespace)
        return self._worker.call(lambda: self._keeper.explain(token_ids, space))

    def pin(self, prompt: Prompt, *, ttl: float | None = None, namespace: str | None = None) -> Pin:
        """Compute a prompt if it is not cached, and keep its pages until `unpin`, or for `ttl` seconds. Waits until that is done.

        Raises:
            InvalidRequestError: `ttl` is out of range, the prompt is refused, or more than half of the pool would be pinned, or more than open
                requests leave; or with prefix_sharing=False.
            QueueFullError, RequestFailedError: it could not be computed.
        """
        check_ttl(ttl)
        token_ids, space = self._checked(prompt), check_namespace(namespace)
        for _ in range(MAX_PIN_ATTEMPTS):
            pin = self._worker.call(lambda: self._keeper.pin(token_ids, space, ttl))
            if pin is not None:
                return pin
            self.generate([token_ids], SamplingParams(max_tokens=1, temperature=0.0), namespace=namespace)[0].raise_for_error()
        limit = "one that is not evicted between computing and pinning it; try when less is open"
        raise InvalidRequestError("prompt", f"{len(token_ids)} tokens", limit)

    def unpin(self, pin: Pin | int) -> None:
        """Let a pinned prompt's pages go; they stay cached until something else needs room.

        Raises:
            InvalidRequestError: it is not pinned, or no more.
        """
        self._worker.call(lambda: self._keeper.unpin(pin.pin_id if isinstance(pin, Pin) else pin))

    def pins(self) -> list[Pin]:
        """The pins there are, oldest first."""
        return self._worker.call(self._keeper.pins)

    def share(self, prompt: Prompt) -> int:
        """Declare that the whole pages at the beginning of this prompt are no secret: all namespaces share them from now on.

        Returns how many of its tokens that are. For the operator alone: a system prompt, never what a user wrote. Of more than 256 prompts the
        oldest are forgotten. Raises InvalidRequestError with prefix_sharing=False, and as `explain` for a prompt.
        """
        token_ids = self._checked(prompt)
        return self._worker.call(lambda: self._keeper.share(token_ids))

    def prepare_structured(self) -> bool:
        """Make ready for `SamplingParams.structured` now; else the first such request waits for it, seconds where the vocabulary is large.

        Returns False where there can be no such request: without a tokenizer that llguidance can read, or without llguidance.
        """
        try:
            self._built.grammars.prepare()
        except InvalidRequestError:
            return False
        return True

    def resize_cache(self, cache_bytes: int) -> int:
        """Make the pool smaller, giving memory back to the system, or larger again, up to what it was made for. Returns the bytes it has now.

        Cached pages go first, then the requests of the worst rank wait; none is lost.

        Raises:
            InvalidRequestError: more than the pool was made for, or less than one of the open requests, and all pins, may need.
        """
        if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int):
            raise InvalidRequestError("cache_bytes", cache_bytes, "an integer")
        return self._worker.call(lambda: self._keeper.resize(cache_bytes))

    def stacked(self) -> StackedView:
        """The cache as one tensor a kind, [L, S, Hkv, len, D], with `cache_layout="stacked"`; taken between two steps.

        Raises:
            ConfigError: another layout, layers of several kinds, or a codec.
        """
        if self._config.cache_layout != "stacked":
            raise ConfigError(f"cache_layout={self._config.cache_layout!r}: must be 'stacked' to be seen as one tensor")
        return self._worker.call(self._built.engine.stacked)

    def reset_cache(self) -> None:
        """Forget all cached pages and pins. Requests that run are computed again."""
        self._worker.call(self._keeper.reset)

    def close(self) -> None:
        """Cancel what runs, end the thread and leave a live model as it was. A second call does nothing, or what a Ctrl-C left of the first one."""
        try:
            self._close()
        except BaseException:
            self._close = weakref.finalize(self, _shut_down, self._worker, self._built)
            raise

    __reduce_ex__ = stays_here

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _keeper(self) -> CacheKeeper:
        return self._built.engine.keeper

    def _forget_old_weights(self) -> None:
        """Old keys with new weights would be wrong tokens: whoever comes next to a model in training finds nothing of what was."""
        model = self._built.model
        if model.live and self._worker.call(lambda: model.changed):  # there, as a step changes the model for its time
            self.reset_cache()
            self._worker.call(lambda: probe_again(model))

    def _checked(self, prompt: Prompt) -> tuple[int, ...]:
        self._forget_old_weights()
        return self._intake.token_ids(prompt)

    def _request(
        self, prompt: Prompt, params: SamplingParams, namespace: str | None, priority: int, request_id: str | None = None, *, read: bool = True
    ) -> Request:
        self._forget_old_weights()
        return self._intake.request(prompt, params, namespace, priority, request_id, read=read)


def _shut_down(worker: Worker, built: Built) -> None:
    if not worker.home.is_here:  # a fork's copy: its threads are not here to be ended, nor to write what is on its way to the disk
        return
    worker.stop()
    built.close()
