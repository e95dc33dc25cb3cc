"""Quire runs any Hugging Face causal language model on a paged, shared, transactional KV cache, on the machine you have."""

from __future__ import annotations

from importlib import import_module
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
    NothingToDrawError,
    OutOfPagesError,
    ProbeMismatchError,
    QueueFullError,
    QuireError,
    RequestFailedError,
    StepError,
    TokenizerError,
    UnsupportedModelError,
)
from quire.outputs import Completion, Explanation, Receipt, RequestOutput, TokenEvent, TopLogprob
from quire.params import SamplingParams
from quire.policy.pins import Pin
from quire.structured import StructuredOutput

if TYPE_CHECKING:
    from quire.engine.build import EngineInfo
    from quire.engine.llm import LLM
    from quire.engine.stream import RequestStream
    from quire.faces.hf import Generator
    from quire.faces.padding import causal_mask, left_pad, position_ids
    from quire.faces.pages import PagedCache
    from quire.faces.slots import Prefix, Slots
    from quire.faces.tensors import generate, score
    from quire.faces.trl import QuireRollouts
    from quire.tensors.stacked import StackedView

__version__ = "0.6.0"
__all__ = [
    "CacheTooSmallError",
    "Completion",
    "ConfigError",
    "ContextLengthError",
    "EngineConfig",
    "EngineDeadError",
    "EngineInfo",
    "Explanation",
    "Generator",
    "IntegrityError",
    "InvalidRequestError",
    "LLM",
    "ModelError",
    "ModelNotFoundError",
    "NonFiniteLogitsError",
    "NothingToDrawError",
    "OutOfPagesError",
    "PagedCache",
    "Pin",
    "Prefix",
    "ProbeMismatchError",
    "QueueFullError",
    "QuireError",
    "QuireRollouts",
    "Receipt",
    "RequestFailedError",
    "RequestOutput",
    "RequestStream",
    "SamplingParams",
    "Slots",
    "StackedView",
    "StepError",
    "StructuredOutput",
    "TokenEvent",
    "TokenizerError",
    "TopLogprob",
    "UnsupportedModelError",
    "causal_mask",
    "generate",
    "left_pad",
    "position_ids",
    "score",
]

# torch and transformers take seconds to import: only those who ask for a model wait for them, not `quire --help` or the policy's tests.
_LATER = {
    "EngineInfo": "quire.engine.build",
    "LLM": "quire.engine.llm",
    "RequestStream": "quire.engine.stream",
    "Generator": "quire.faces.hf",
    **dict.fromkeys(("causal_mask", "left_pad", "position_ids"), "quire.faces.padding"),
    "PagedCache": "quire.faces.pages",
    **dict.fromkeys(("Prefix", "Slots"), "quire.faces.slots"),
    **dict.fromkeys(("generate", "score"), "quire.faces.tensors"),
    "QuireRollouts": "quire.faces.trl",
    "StackedView": "quire.tensors.stacked",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    """Those that are imported later, too: a prompt completes them."""
    return sorted({*globals(), *__all__})
