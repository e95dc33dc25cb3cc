"""What a caller asked, once it has been checked: frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quire.errors import CacheTooSmallError, ContextLengthError, InvalidRequestError
from quire.params import SamplingParams

MAX_NAMESPACE_LEN = 256
MAX_PIN_S = 10**10  # three centuries


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it. `max_tokens` and `seed` are the params' own, resolved: never None.

    `namespace` says whose cached pages it may use and add to; requests of higher `priority` go first.
    `grammar` is `params.structured` compiled (text/grammar.py), of which this floor knows no more. `read`: whether anybody reads its events, or only
    its output. `prediction` is the params' own as tokens.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    namespace: str = ""
    priority: int = 0
    grammar: Any = field(default=None, repr=False, compare=False)
    read: bool = True
    prediction: tuple[int, ...] = field(default=(), repr=False)

    @property
    def num_branches(self) -> int:
        """Sequences to generate, of which the best `n` are given back."""
        return self.params.best_of or self.params.n

    @property
    def num_committed_at_most(self) -> int:
        """See the function of this name."""
        return num_committed_at_most(len(self.prompt_token_ids), self.max_tokens, self.params)


def num_committed_at_most(prompt_len: int, max_tokens: int, params: SamplingParams) -> int:
    """How many tokens of one sequence may come into the cache: the last that is drawn, or only scored, does not; all that are pooled do."""
    return max(prompt_len + max_tokens - 1, prompt_len if params.pooling is not None else 0)


@dataclass(frozen=True, slots=True)
class Limits:
    """What every request of one engine is held against."""

    vocab_size: int
    context_len: int


def check_prompt(token_ids: tuple[int, ...], params: SamplingParams, limits: Limits) -> int:
    """Refuse what can never run; returns `max_tokens` resolved: what nobody asked for as far as the context has room. Touches nothing shared.

    Raises:
        InvalidRequestError: an empty prompt, an id outside the vocabulary.
        ContextLengthError: prompt and max_tokens together exceed the context.
    """
    if not token_ids:
        raise InvalidRequestError("prompt", list(token_ids), "at least one token")
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < limits.vocab_size:
            raise InvalidRequestError("prompt", token_id, f"token ids from 0 to {limits.vocab_size - 1}")
    for name, token_id in params.token_ids_named():
        if token_id >= limits.vocab_size:
            raise InvalidRequestError(name, token_id, f"token ids from 0 to {limits.vocab_size - 1}")
    room = limits.context_len - len(token_ids)
    max_tokens = room if params.max_tokens is None else int(params.max_tokens)
    if params.takes_what_fits:
        max_tokens = max(1, min(max_tokens, room))
    if max_tokens > room:
        raise ContextLengthError(len(token_ids), max_tokens, limits.context_len)
    if max_tokens == 0 and len(token_ids) < 2 and params.prompt_logprobs is not None:
        raise InvalidRequestError("prompt", f"{len(token_ids)} token", "at least 2 tokens where only logprobs are wanted: the first has none")
    return max_tokens


def check_namespace(namespace: str | None) -> str:
    """The namespace, "" for None.

    Raises:
        InvalidRequestError: it is not a string, or longer than MAX_NAMESPACE_LEN.
    """
    if namespace is None:
        return ""
    if not isinstance(namespace, str) or len(namespace) > MAX_NAMESPACE_LEN:
        raise InvalidRequestError("namespace", namespace, f"a string of at most {MAX_NAMESPACE_LEN} characters, or None")
    try:
        namespace.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("namespace", namespace, "a string that UTF-8 can encode") from None
    return namespace


def check_priority(priority: int) -> int:
    """The priority.

    Raises:
        InvalidRequestError: it is not an integer of 32 bits.
    """
    if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**31) <= priority < 2**31:
        raise InvalidRequestError("priority", priority, f"an integer from {-(2**31)} to {2**31 - 1}")
    return priority


def check_ttl(ttl_s: float | None) -> None:
    """Refuse what is no time to keep a pin for.

    Raises:
        InvalidRequestError: it is neither None nor a number of seconds above 0, at most MAX_PIN_S.
    """
    if ttl_s is not None and (isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float) or not 0 < ttl_s <= MAX_PIN_S):
        raise InvalidRequestError("ttl", ttl_s, f"a number of seconds above 0 and at most {MAX_PIN_S}, or None")


def check_fits(num_tokens: int, pages_needed: int, num_pages: int) -> None:
    """Refuse a request that could not finish even alone.

    Raises:
        CacheTooSmallError: it names the pages needed and the pages there are.
    """
    if pages_needed > num_pages:
        raise CacheTooSmallError(num_tokens, pages_needed, num_pages)
