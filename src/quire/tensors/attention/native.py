"""Attention on CPU in C++: one online softmax over pages and staged keys, work proportional to the keys attended.

After Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018), in the tiles of Dao et al., "FlashAttention" (2022). The bits of a row
depend on its own sequence alone: key tiles start at absolute positions and each row meets them in one order (csrc/attention.h).
"""

from __future__ import annotations

import torch

from quire.tensors.attention.base import LayerPlace, Mask, StepInputs
from quire.tensors.native import DTYPE_CODES, lib


class NativeAttention:
    """The default backend on CPU; float32, bfloat16 and float16, the dtype of q, k, v and pages alike.

    `num_threads`: OpenMP threads of each call; results do not depend on it.
    """

    name = "native"

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads}: must be at least 1")
        self.num_threads = num_threads

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, place: LayerPlace, step: StepInputs, mask: Mask
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`. Raises ValueError on shapes, dtypes or strides it cannot take, RuntimeError naming
        the page id, length or offset that is out of range."""
        num_tokens, num_heads = q.shape[:2]
        table, sinks = step.tables[place.group], mask.sinks
        query_start, num_committed, page_ids, page_start = step.query_start, step.num_committed, table.page_ids, table.page_start
        num_seqs = num_committed.shape[0]
        dtype = pages.dtype
        if not (
            dtype in DTYPE_CODES
            and q.dtype == k.dtype == v.dtype == dtype
            and q.shape[2] == place.k_dim
            and k.shape == (num_tokens, place.num_kv_heads, place.k_dim)
            and v.shape == (num_tokens, place.num_kv_heads, place.v_dim)
            and q.stride(2) == k.stride(2) == v.stride(2) == 1
            and pages.dim() == 2
            and query_start.dtype == num_committed.dtype == page_ids.dtype == page_start.dtype == torch.int32
            and query_start.shape[0] == page_start.shape[0] == num_seqs + 1
            and all(t.is_contiguous() for t in (pages, query_start, num_committed, page_ids, page_start))
            and all(t.is_cpu for t in (q, k, v, pages, query_start, num_committed, page_ids, page_start))
            and (sinks is None or (sinks.shape == (num_heads,) and sinks.is_contiguous() and sinks.dtype in DTYPE_CODES))
        ):
            raise ValueError(
                f"attend cannot take {_describe(q=q, k=k, v=v, pages=pages, sinks=sinks)}, "
                f"{_describe(query_start=query_start, num_committed=num_committed, page_ids=page_ids, page_start=page_start)} at {place}: "
                "q [T,Hq,Dk], k [T,Hkv,Dk] and v [T,Hkv,Dv] must have a contiguous last dimension and one dtype (float32, bfloat16 or "
                "float16) with pages [P,E], the tables be contiguous int32, all on the CPU"
            )
        out = torch.empty((num_tokens, num_heads, place.v_dim), dtype=dtype)
        lib.attend(
            DTYPE_CODES[dtype], q.data_ptr(), q.stride(0), q.stride(1), k.data_ptr(), k.stride(0), k.stride(1),
            v.data_ptr(), v.stride(0), v.stride(1), out.data_ptr(),
            pages.data_ptr(), pages.shape[0], pages.shape[1], place.k_offset, place.v_offset, place.page_size,
            num_heads, place.num_kv_heads, place.k_dim, place.v_dim,
            query_start.data_ptr(), num_committed.data_ptr(), page_ids.data_ptr(), page_start.data_ptr(), page_ids.shape[0],
            num_seqs, num_tokens, mask.scale, mask.softcap, mask.window, mask.chunk,
            0 if sinks is None else sinks.data_ptr(), 0 if sinks is None else DTYPE_CODES[sinks.dtype], self.num_threads,
        )  # fmt: skip
        return out

    def commit(self, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, place: LayerPlace, slots: torch.Tensor) -> None:
        """See `AttentionBackend.commit`. Raises as `attend` does."""
        dtype, num_tokens = pages.dtype, slots.shape[0]
        if not (
            dtype in DTYPE_CODES
            and k.dtype == v.dtype == dtype
            and k.shape == (num_tokens, place.num_kv_heads, place.k_dim)
            and v.shape == (num_tokens, place.num_kv_heads, place.v_dim)
            and k.stride(2) == v.stride(2) == 1
            and pages.dim() == 2
            and slots.dtype == torch.int64
            and pages.is_contiguous()
            and slots.is_contiguous()
            and all(t.is_cpu for t in (k, v, pages, slots))
        ):
            raise ValueError(
                f"commit cannot take {_describe(k=k, v=v, pages=pages, slots=slots)} at {place}: k [T,Hkv,Dk], v [T,Hkv,Dv] must have a contiguous "
                "last dimension and one dtype (float32, bfloat16 or float16) with pages [P,E], slots [T] be contiguous int64, all on the CPU"
            )
        lib.commit(
            DTYPE_CODES[dtype], k.data_ptr(), k.stride(0), k.stride(1), v.data_ptr(), v.stride(0), v.stride(1), pages.data_ptr(),
            pages.shape[0], pages.shape[1], place.k_offset, place.v_offset, place.page_size, place.num_kv_heads, place.k_dim, place.v_dim,
            slots.data_ptr(), num_tokens, self.num_threads,
        )  # fmt: skip


def _describe(**tensors: torch.Tensor | None) -> str:
    return ", ".join(
        f"{name} {tuple(t.shape)} {t.dtype} strides {t.stride()} on {t.device}" if t is not None else f"no {name}" for name, t in tensors.items()
    )
