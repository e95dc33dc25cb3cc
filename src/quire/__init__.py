"""Quire runs any Hugging Face causal language model on a paged, shared, transactional KV cache, on the machine you have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.config import EngineConfig
from quire.errors import (
    CacheTooSmallError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    IntegrityError,
    InvalidRequestError,
    ModelError,
    ModelNotFoundError,
    NonFiniteLogitsError,
    ProbeMismatchError,
    QueueFullError,
    QuireError,
    RequestFailedError,
    StepError,
    UnsupportedModelError,
)
from quire.outputs import Completion, Receipt, RequestOutput, TokenEvent, TopLogprob
from quire.params import SamplingParams

if TYPE_CHECKING:
    from quire.engine.llm import LLM
    from quire.engine.stream import RequestStream

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CacheTooSmallError",
    "Completion",
    "ConfigError",
    "ContextLengthError",
    "EngineConfig",
    "EngineDeadError",
    "IntegrityError",
    "InvalidRequestError",
    "ModelError",
    "ModelNotFoundError",
    "NonFiniteLogitsError",
    "ProbeMismatchError",
    "QueueFullError",
    "QuireError",
    "Receipt",
    "RequestFailedError",
    "RequestOutput",
    "RequestStream",
    "SamplingParams",
    "StepError",
    "TokenEvent",
    "TopLogprob",
    "UnsupportedModelError",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only those who ask for a model wait for them, not `quire --help` or the policy's tests.
    if name == "LLM":
        from quire.engine.llm import LLM

        return LLM
    if name == "RequestStream":
        from quire.engine.stream import RequestStream

        return RequestStream
    raise AttributeError(f"module 'quire' has no attribute {name!r}")
