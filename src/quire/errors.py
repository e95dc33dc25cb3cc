"""Every error Quire raises on purpose, as one tree.

    QuireError
    ├── ConfigError            (ValueError)   an option of the engine itself
    ├── InvalidRequestError    (ValueError)   one request: a field, its value and the limit it broke
    │   ├── ContextLengthError                prompt + max_tokens against the model's context
    │   └── CacheTooSmallError                more pages than the pool can ever hold
    ├── ModelError             (ValueError)   a checkpoint that cannot be served
    │   ├── ModelNotFoundError                nothing to load under that name
    │   └── UnsupportedModelError             loaded, but refused, with the reason
    │       └── ProbeMismatchError            its packed output is not its own unbatched output
    ├── RequestFailedError     (RuntimeError) a request that was accepted and then failed alone
    │   ├── StepError                         the model's forward raised in a step it took part in
    │   ├── NonFiniteLogitsError              the model gave NaN for it
    │   ├── TokenizerError                    the tokenizer raised while it decoded its tokens
    │   └── NothingToDrawError                what it asks for leaves no token to draw
    ├── QueueFullError         (RuntimeError) too many requests wait; try again later
    ├── OutOfPagesError        (RuntimeError) the caller of slots holds all pages; free some
    ├── EngineDeadError        (RuntimeError) the engine's loop has ended, nothing will run any more
    └── IntegrityError         (RuntimeError) an invariant of the cache does not hold: a bug in Quire

The ValueError half is the caller's to mend, the RuntimeError half is not.
"""

from __future__ import annotations


class QuireError(Exception):
    """The root of all errors Quire raises on purpose. They may be pickled: what a worker process raises reaches the one that waits for it."""

    def __reduce__(self) -> tuple[object, ...]:
        return _made_again, (type(self), self.args), self.__dict__


class ConfigError(QuireError, ValueError):
    """An option of the engine has a value it cannot take. The message names field, value and limit."""


class InvalidRequestError(QuireError, ValueError):
    """A request was refused before anything shared was touched.

    Attributes: `field` (the parameter's name), `value` (what was given), `limit` (what it must be, in words).
    """

    def __init__(self, field: str, value: object, limit: str) -> None:
        self.field, self.value, self.limit = field, value, limit
        super().__init__(f"{field}={shown(value)}: must be {limit}")


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt with what may be generated, is longer than the model's context."""

    def __init__(self, num_prompt_tokens: int, max_tokens: int, context_len: int) -> None:
        self.num_prompt_tokens, self.max_tokens, self.context_len = num_prompt_tokens, max_tokens, context_len
        super().__init__(
            "prompt",
            f"{num_prompt_tokens} tokens with max_tokens={max_tokens}",
            f"at most {context_len} tokens together, the model's context ({num_prompt_tokens} + {max_tokens} = {num_prompt_tokens + max_tokens})",
        )


class CacheTooSmallError(InvalidRequestError):
    """The request could not finish even with the whole pool to itself."""

    def __init__(self, num_tokens: int, pages_needed: int, num_pages: int) -> None:
        self.num_tokens, self.pages_needed, self.num_pages = num_tokens, pages_needed, num_pages
        limit = f"at most {num_pages} pages, the whole cache but for what is pinned or given back (raise cache_bytes)"
        super().__init__("prompt", f"{num_tokens} tokens with max_tokens, {pages_needed} pages", limit)


class ModelError(QuireError, ValueError):
    """A checkpoint that cannot be served."""


class ModelNotFoundError(ModelError):
    """There is nothing to load under the given name."""


class UnsupportedModelError(ModelError):
    """The model was refused. The message names the model type and the reason."""


class ProbeMismatchError(UnsupportedModelError):
    """Run packed with others, the model did not give what it gives alone."""


class RequestFailedError(QuireError, RuntimeError):
    """A request that was accepted failed; no other request is affected."""


class StepError(RequestFailedError):
    """The model's forward raised in a step that this request took part in; nothing of that step was committed."""


class NonFiniteLogitsError(RequestFailedError):
    """The model's logits for this request held NaN."""


class TokenizerError(RequestFailedError):
    """The model's tokenizer raised while it decoded this request's tokens; its own exception is the cause."""


class NothingToDrawError(RequestFailedError):
    """What the request itself asks for (allowed tokens, bias, `min_tokens`, structure) left no token to draw, at its first one or later."""


class QueueFullError(QuireError, RuntimeError):
    """Too many requests wait already."""


class OutOfPagesError(QuireError, RuntimeError):
    """A step over slots needs more pages than are free; nothing of it has happened. Free a slot, or make the cache larger."""

    def __init__(self, pages_needed: int, num_available: int) -> None:
        self.pages_needed, self.num_available = pages_needed, num_available
        super().__init__(f"{pages_needed} more pages needed, {num_available} to be had: free a slot or let a prefix go (or raise cache_bytes)")


class EngineDeadError(QuireError, RuntimeError):
    """The engine's loop has ended; every open request failed with this error, and so does every later one. Or this is a fork of its process."""


class IntegrityError(QuireError, RuntimeError):
    """An invariant of the cache does not hold. This is a bug in Quire, never a caller's mistake."""


def _made_again(kind: type[QuireError], args: tuple[object, ...]) -> QuireError:
    """An error with this message; its class would ask for what the message was made of."""
    return kind.__new__(kind, *args)


def shown(value: object, limit: int = 120) -> str:
    """A value as an error's message tells it, in at most `limit` characters."""
    try:
        text = repr(value)
    except Exception:  # an integer of more digits than Python writes, or a caller's own class: its error is not the one to be told
        text = f"a value of type {type(value).__name__} that has no repr"
    return text if len(text) <= limit else text[: limit - 3] + "..."
