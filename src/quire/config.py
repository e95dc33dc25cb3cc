"""What the engine was asked for: frozen, validated once. What it resolved to for one model and machine is in `LLM.info`."""

from __future__ import annotations

from dataclasses import dataclass

from quire.errors import ConfigError

DTYPES = ("auto", "bfloat16", "float16", "float32")
BACKENDS = ("auto", "native", "reference")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of one engine.

    Fields:
        dtype: of weights and cache; "auto" takes the checkpoint's own. A live model keeps its own.
        max_tokens_per_step: the token budget, the most tokens one step may compute, >= 1.
        max_sequences: the most sequences that run at once, >= 1.
        max_waiting: the most requests that may wait, >= 1; one more is refused.
        cache_bytes: bytes of the page pool; `None` takes what `max_sequences` full contexts need, at most 40 % of the memory available.
        page_size: tokens per page, >= 1.
        prefix_sharing: reuse pages of equal prefixes.
        max_model_len: the context, at most the checkpoint's own; `None` takes that.
        backend: attention and products by the "native" kernels or by the "reference" in plain torch; "auto" takes native where it loads.
        num_threads: CPU threads of a step; `None` takes torch's number.
        trust_remote_code: run Python code that comes with a checkpoint. Off by default.
        revision: of a hub id.

    Raises:
        ConfigError: a value out of its range, naming field, value and limit.
    """

    dtype: str = "auto"
    max_tokens_per_step: int = 512
    max_sequences: int = 64
    max_waiting: int = 100_000
    cache_bytes: int | None = None
    page_size: int = 16
    prefix_sharing: bool = True
    max_model_len: int | None = None
    backend: str = "auto"
    num_threads: int | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        _choice("dtype", self.dtype, DTYPES)
        _choice("backend", self.backend, BACKENDS)
        for name, high in (("max_tokens_per_step", 2**20), ("max_sequences", 2**16), ("max_waiting", 2**31), ("page_size", 2**20)):
            _integer(name, getattr(self, name), high)
        for name, high in (("cache_bytes", 2**50), ("max_model_len", 2**31), ("num_threads", 4096)):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), high)
        for name in ("prefix_sharing", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be True or False")
        if self.revision is not None and not isinstance(self.revision, str):
            raise ConfigError(f"revision={self.revision!r}: must be a string or None")


def _integer(field: str, value: object, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ConfigError(f"{field}={value!r}: must be an integer from 1 to {high}")


def _choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{field}={value!r}: must be one of {', '.join(choices)}")
