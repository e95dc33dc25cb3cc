"""What the engine was asked for: frozen, validated once. What it resolved to for one model and machine is in `LLM.info`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike
from typing import Any

from quire.errors import ConfigError, shown

DTYPES = ("auto", "bfloat16", "float16", "float32")
LAYOUTS = ("paged", "stacked")
BACKENDS = ("auto", "native", "reference", "triton")
CODECS = ("int8", "int4")
QUANTIZATIONS = ("none", "int8", "int4")
RESERVE_BYTES = 256 * 2**20
MAX_DRAFTS = 15  # with the token in hand they are a step of 16 rows, which costs about twice one of a single row


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of one engine.

    Fields:
        dtype: of weights and cache; "auto" takes the checkpoint's own. A live model keeps its own.
        quantization: of the weights of linear layers, made at load from any checkpoint: "none", "int8" or "int4". Not for a live model.
            What such a layer is given in bf16 is rounded as well, to 8 bits for each token and 256 channels with int8, 32 with int4 (not on AMX);
            docs/speed.md has what that costs.
        max_tokens_per_step: the token budget, the most tokens one step may compute, >= 1.
        workspace_bytes: the most bytes that a step's tensors may take beside weights and cache; fewer tokens are computed in a step where
            `max_tokens_per_step` would take more. `None` sets no bound.
        max_sequences: the most sequences that run at once, >= 1; no more do than a step may compute tokens.
        max_waiting: the most requests that may wait, >= 1; one more is refused.
        cache_bytes: bytes of the page pool; `None` takes what `max_sequences` full contexts need, at most 40 % of the memory available.
        preallocate: have the system give the pool's memory at load, not as pages are first written, which steps wait for: a fault for each 4 KiB, of
            about a microsecond where memory is the system's own, of 5 to 20 in a virtual machine that gets it from its host. Refused where there is
            not so much. What the pool gives back and takes again later is given as it is written.
        reserve_bytes: memory to leave to others: the pool gives pages back to the system when less is available, and takes them again when it is.
        page_size: tokens per page, >= 1.
        kv_codec: how keys and values lie in the cache: `None` as they are, "int8", "int4", or one for each, as in "k=int8,v=none".
        cache_layout: "paged", or "stacked": one page of the whole context for each of `max_sequences`, whatever `page_size` says.
        cache_dir: a folder in which complete pages survive restarts; several processes may share it. `None` for none.
        cache_dir_bytes: the most bytes of files in it, at least the file of one page; `None` takes half of what is free on that disk beside them.
        prefix_sharing: reuse pages of equal prefixes.
        prompt_lookup_num_tokens: the most tokens a step may guess for a sequence from what followed the same tokens before, to draw several at once;
            0 for none. No bit of the output changes. Not in steps of 16 sequences and more.
        max_model_len: the context, at most the checkpoint's own; `None` takes that, of LongRoPE its first part (see tensors/models/ropes.py).
        backend: attention and products by the "native" kernels or by the "reference" in plain torch; "auto" takes native where it loads.
            "triton" is both as they run on an accelerator; on the CPU in Triton's interpreter alone (TRITON_INTERPRET=1): slow, for tests.
        device: where weights and pages lie and steps run: "cpu", or an accelerator by torch's name, with or without its number. On one "auto" is
            "triton"; tokens are drawn on the CPU. No real one has run it yet (docs/devices.md, which says what does not go with one).
        num_threads: CPU threads of a step; `None` takes torch's number.
        compile: compile decoder layers with torch's Inductor, which needs a C++ compiler and a minute at the first start with a model. Its output
            keeps every promise, but its bits are not those without it.
        enforce_eager: run the model's own code in every step. Without it the CPU runs decoder layers as native programs where it can, whose bits are
            others, and an accelerator steps of few tokens as captured graphs, whose bits are the same.
        trust_remote_code: run Python code that comes with a checkpoint. Off by default.
        revision: of a hub id.

    Raises:
        ConfigError: a value out of its range, naming field, value and limit.
    """

    dtype: str = "auto"
    quantization: str = "none"
    max_tokens_per_step: int = 512
    workspace_bytes: int | None = None
    max_sequences: int = 64
    max_waiting: int = 100_000
    cache_bytes: int | None = None
    preallocate: bool = False
    reserve_bytes: int = RESERVE_BYTES
    page_size: int = 16
    kv_codec: str | None = None
    cache_layout: str = "paged"
    cache_dir: str | PathLike[str] | None = None
    cache_dir_bytes: int | None = None
    prefix_sharing: bool = True
    prompt_lookup_num_tokens: int = 0
    max_model_len: int | None = None
    backend: str = "auto"
    device: str = "cpu"
    num_threads: int | None = None
    compile: bool = False
    enforce_eager: bool = False
    trust_remote_code: bool = False
    revision: str | None = None

    @classmethod
    def of(cls, options: dict[str, Any]) -> EngineConfig:
        """From options by name. Raises ConfigError for one that there is not, or a value out of its range."""
        try:
            return cls(**options)
        except TypeError as error:
            raise ConfigError(f"{str(error).removeprefix('EngineConfig.__init__() ')}; options are {', '.join(cls.__slots__)}") from None

    def __post_init__(self) -> None:
        _choice("dtype", self.dtype, DTYPES)
        _choice("quantization", self.quantization, QUANTIZATIONS)
        _choice("backend", self.backend, BACKENDS)
        split_codec(self.kv_codec)
        if not isinstance(self.device, str) or not re.fullmatch(r"[a-z]+(:\d{1,3})?", self.device) or self.device.startswith("cpu:"):
            raise ConfigError(f"device={shown(self.device)}: must be cpu, or a device's name as torch has it, as in NAME or NAME:1")
        if self.device != "cpu":
            self._refuse_what_needs_the_cpu()
        if self.backend == "triton" and self.kv_codec is not None:
            raise ConfigError(f"kv_codec={shown(self.kv_codec)}: must be None with backend='triton', whose kernels read plain rows only")
        _choice("cache_layout", self.cache_layout, LAYOUTS)
        for name, high in (("max_tokens_per_step", 2**20), ("max_sequences", 2**16), ("max_waiting", 2**31), ("page_size", 2**20)):
            _integer(name, getattr(self, name), high)
        for name, high in (
            ("workspace_bytes", 2**50),
            ("cache_bytes", 2**50),
            ("cache_dir_bytes", 2**60),
            ("max_model_len", 2**31),
            ("num_threads", 4096),
        ):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), high)
        _integer("reserve_bytes", self.reserve_bytes, 2**50, low=0)
        _integer("prompt_lookup_num_tokens", self.prompt_lookup_num_tokens, MAX_DRAFTS, low=0)
        for name in ("preallocate", "prefix_sharing", "compile", "enforce_eager", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={shown(getattr(self, name))}: must be True or False")
        if self.compile and self.enforce_eager:
            raise ConfigError("enforce_eager=True: must be False with compile=True")
        if self.cache_dir == "" or not isinstance(self.cache_dir, str | PathLike | None):  # "" would be the folder one is in
            raise ConfigError(f"cache_dir={shown(self.cache_dir)}: must be a path or None")
        if self.cache_dir_bytes is not None and self.cache_dir is None:
            raise ConfigError(f"cache_dir_bytes={self.cache_dir_bytes}: must be None without a cache_dir")
        if self.revision is not None and not isinstance(self.revision, str):
            raise ConfigError(f"revision={shown(self.revision)}: must be a string or None")

    def _refuse_what_needs_the_cpu(self) -> None:
        if self.backend not in ("auto", "triton"):
            raise ConfigError(f"backend={self.backend!r}: must be auto or triton with device={self.device!r}")
        if self.reserve_bytes not in (0, RESERVE_BYTES):
            raise ConfigError(f"reserve_bytes={self.reserve_bytes}: must be left out with device={self.device!r}, which takes no pages back")
        for name, why in (
            ("kv_codec", "whose kernels read plain rows only"),
            ("cache_dir", "whose pages the disk is not given"),
            ("compile", "for which layers are not compiled"),
            ("preallocate", "whose pages are all taken at load anyway"),
        ):
            if getattr(self, name):
                raise ConfigError(f"{name}={shown(getattr(self, name))}: must be left out with device={self.device!r}, {why}")


def split_codec(value: object) -> tuple[str | None, str | None]:
    """The codecs of keys and of values that a `kv_codec` names, each "int8", "int4" or None.

    Raises:
        ConfigError: it is no codec.
    """
    if value is None:
        return None, None
    if isinstance(value, str):
        if value in CODECS:
            return value, value
        parts = dict(part.partition("=")[::2] for part in value.split(","))
        if sorted(parts) == ["k", "v"] and value.count(",") == 1 and all(codec in (*CODECS, "none") for codec in parts.values()):
            k, v = (None if parts[name] == "none" else parts[name] for name in "kv")
            return k, v
    raise ConfigError(f'kv_codec={shown(value)}: must be None, {", ".join(CODECS)}, or one for each as in "k=int8,v=none"')


def _integer(field: str, value: object, high: int, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{field}={shown(value)}: must be an integer from {low} to {high}")


def _choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{field}={shown(value)}: must be one of {', '.join(choices)}")
