"""Attention on CPU in C++: one online softmax over pages and staged keys, work proportional to the keys attended.

After Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018), in the tiles of Dao et al., "FlashAttention" (2022). The bits of a row
depend on its own sequence alone: key tiles start at absolute positions and each row meets them in one order (csrc/attention.h).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quire.tensors.attention.base import LayerPlace, Mask, StepInputs
from quire.tensors.attention.native_carried import NativeCarried
from quire.tensors.attention.native_step import NativeSteps, native_store
from quire.tensors.codec import RowFormat
from quire.tensors.native import DTYPE_CODES, lib


class NativeAttention:
    """The default backend on CPU: queries of float32, bfloat16 or float16, keys and values of the same dtype or encoded.

    `num_threads`: threads of each call; results do not depend on it.
    """

    name = "native"

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads}: must be at least 1")
        self.num_threads = num_threads
        self.carried = NativeCarried(num_threads)

    def program_steps(self, pages: torch.Tensor, places: Iterable[LayerPlace]) -> NativeSteps:
        """See `AttentionBackend.program_steps`. Raises ValueError for pages and places that do not fit."""
        return NativeSteps(native_store(pages, places), self.num_threads)

    def encode(self, x: torch.Tensor, row: RowFormat) -> torch.Tensor:
        """See `AttentionBackend.encode`. Raises ValueError on a shape, dtype or stride it cannot take."""
        if row.dtype is not None:
            return x
        if not (x.dim() == 3 and x.shape[2] == row.dim and x.dtype in DTYPE_CODES and x.stride(2) == 1 and x.is_cpu):
            raise ValueError(
                f"encode cannot take {_describe(x=x)} as {row}: [T,Hkv,D] of float32, bfloat16 or float16 on the CPU, the last dimension contiguous"
            )
        num_tokens, num_heads, dim = x.shape
        rows = torch.empty((num_tokens, num_heads, row.num_bytes), dtype=torch.uint8)
        lib.encode(DTYPE_CODES[x.dtype], row.code, *_address(x), rows.data_ptr(), num_tokens, num_heads, dim, row.num_bytes, self.num_threads)
        return rows

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, place: LayerPlace, step: StepInputs, mask: Mask
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`. Raises ValueError on shapes, dtypes or strides it cannot take, RuntimeError naming
        the page id, length or offset that is out of range."""
        num_tokens, num_heads = q.shape[:2]
        table, sinks = step.tables[place.group], mask.sinks
        query_start, num_committed, page_ids, page_start = step.query_start, step.num_committed, table.page_ids, table.page_start
        num_seqs = num_committed.shape[0]
        if not (
            q.dtype in DTYPE_CODES
            and place.k.dtype in (q.dtype, None)
            and place.v.dtype in (q.dtype, None)
            and q.shape[2] == place.k.dim
            and _staged(k, num_tokens, place.num_kv_heads, place.k)
            and _staged(v, num_tokens, place.num_kv_heads, place.v)
            and q.stride(2) == 1
            and pages.dim() == 2
            and pages.dtype == torch.uint8
            and query_start.dtype == num_committed.dtype == page_ids.dtype == page_start.dtype == torch.int32
            and query_start.shape[0] == page_start.shape[0] == num_seqs + 1
            and all(t.is_contiguous() for t in (pages, query_start, num_committed, page_ids, page_start))
            and all(t.is_cpu for t in (q, k, v, pages, query_start, num_committed, page_ids, page_start))
            and (sinks is None or (sinks.shape == (num_heads,) and sinks.is_contiguous() and sinks.dtype in DTYPE_CODES))
        ):
            raise ValueError(
                f"attend cannot take {_describe(q=q, k=k, v=v, pages=pages, sinks=sinks)}, "
                f"{_describe(query_start=query_start, num_committed=num_committed, page_ids=page_ids, page_start=page_start)} at {place}: "
                "q [T,Hq,Dk] must be float32, bfloat16 or float16, k and v [T,Hkv,D] of its dtype or [T,Hkv,bytes] as encode gives them, all with a "
                "contiguous last dimension, pages [P,page_bytes] uint8, the tables contiguous int32, all on the CPU"
            )
        out = torch.empty((num_tokens, num_heads, place.v.dim), dtype=q.dtype)
        lib.attend(
            DTYPE_CODES[q.dtype], *_address(q), *_address(k), *_address(v), out.data_ptr(),
            *_layout(pages, place), num_heads,
            query_start.data_ptr(), num_committed.data_ptr(), page_ids.data_ptr(), page_start.data_ptr(), page_ids.shape[0],
            num_seqs, num_tokens, mask.scale, mask.softcap, mask.window, mask.chunk,
            0 if sinks is None else sinks.data_ptr(), 0 if sinks is None else DTYPE_CODES[sinks.dtype], self.num_threads,
        )  # fmt: skip
        return out

    def commit(self, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, place: LayerPlace, slots: torch.Tensor) -> None:
        """See `AttentionBackend.commit`. Raises as `attend` does."""
        num_tokens = slots.shape[0]
        if not (
            _staged(k, num_tokens, place.num_kv_heads, place.k)
            and _staged(v, num_tokens, place.num_kv_heads, place.v)
            and pages.dim() == 2
            and pages.dtype == torch.uint8
            and slots.dtype == torch.int64
            and pages.is_contiguous()
            and slots.is_contiguous()
            and all(t.is_cpu for t in (k, v, pages, slots))
        ):
            raise ValueError(
                f"commit cannot take {_describe(k=k, v=v, pages=pages, slots=slots)} at {place}: k and v must be as they were attended, pages "
                "[P,page_bytes] contiguous uint8, slots [T] contiguous int64, all on the CPU"
            )
        lib.commit(*_address(k), *_address(v), *_layout(pages, place), slots.data_ptr(), num_tokens, self.num_threads)


def _staged(x: torch.Tensor, num_tokens: int, num_heads: int, row: RowFormat) -> bool:
    """Whether `x` is what `encode` gives for this format."""
    dtype, width = (torch.uint8, row.num_bytes) if row.dtype is None else (row.dtype, row.dim)
    return x.dtype == dtype and x.shape == (num_tokens, num_heads, width) and x.stride(2) == 1


def _address(x: torch.Tensor) -> tuple[int, int, int]:
    """Where x [T,H,*] begins, and its strides from token to token and from head to head in bytes."""
    size = x.element_size()
    return x.data_ptr(), x.stride(0) * size, x.stride(1) * size


def _layout(pages: torch.Tensor, place: LayerPlace) -> tuple[int, ...]:
    return (
        pages.data_ptr(), pages.shape[0], pages.shape[1], place.page_size, place.num_kv_heads,
        place.k_offset, place.k.dim, place.k.code, place.k.num_bytes, place.v_offset, place.v.dim, place.v.code, place.v.num_bytes,
    )  # fmt: skip


def _describe(**tensors: torch.Tensor | None) -> str:
    return ", ".join(
        f"{name} {tuple(t.shape)} {t.dtype} strides {t.stride()} on {t.device}" if t is not None else f"no {name}" for name, t in tensors.items()
    )
