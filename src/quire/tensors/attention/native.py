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
        """See `AttentionBackend.attend`. Raises ValueError on shapes, dtypes or strides it cannot take; a debug build raises RuntimeError
        naming the page id, length or offset that is out of range."""
        num_tokens, num_heads, _ = q.shape
        dtype = _dtype_code(pages, place, q=q, k=k, v=v)
        _require(q.shape[2] == place.k_dim and q.stride(2) == 1, "q", q, f"[T, Hq, {place.k_dim}] with a contiguous last dimension")
        _check_staged(k, v, place, num_tokens)
        table = step.tables[place.group]
        query_start, num_committed = step.query_start, step.num_committed
        num_seqs = num_committed.shape[0]
        _require_indices(torch.int32, query_start=query_start, num_committed=num_committed, page_ids=table.page_ids, page_start=table.page_start)
        _require(query_start.shape[0] == num_seqs + 1, "query_start", query_start, f"[S + 1] = [{num_seqs + 1}]")
        _require(table.page_start.shape[0] == num_seqs + 1, "page_start", table.page_start, f"[S + 1] = [{num_seqs + 1}]")
        sinks_address, sinks_dtype = 0, 0
        if mask.sinks is not None:
            _require(mask.sinks.shape == (num_heads,) and mask.sinks.is_contiguous(), "sinks", mask.sinks, f"[Hq] = [{num_heads}], contiguous")
            sinks_address, sinks_dtype = mask.sinks.data_ptr(), DTYPE_CODES[mask.sinks.dtype]
        out = torch.empty((num_tokens, num_heads, place.v_dim), dtype=q.dtype)
        lib.attend(
            dtype, q.data_ptr(), q.stride(0), q.stride(1), k.data_ptr(), k.stride(0), k.stride(1), v.data_ptr(), v.stride(0), v.stride(1),
            out.data_ptr(), pages.data_ptr(), pages.shape[0], pages.shape[1], place.k_offset, place.v_offset, place.page_size,
            num_heads, place.num_kv_heads, place.k_dim, place.v_dim,
            query_start.data_ptr(), num_committed.data_ptr(), table.page_ids.data_ptr(), table.page_start.data_ptr(), table.page_ids.shape[0],
            num_seqs, num_tokens, mask.scale, mask.softcap, mask.window, mask.chunk, sinks_address, sinks_dtype, self.num_threads,
        )  # fmt: skip
        return out

    def commit(self, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, place: LayerPlace, slots: torch.Tensor) -> None:
        """See `AttentionBackend.commit`. Raises as `attend` does."""
        dtype = _dtype_code(pages, place, k=k, v=v)
        num_tokens = slots.shape[0]
        _check_staged(k, v, place, num_tokens)
        _require_indices(torch.int64, slots=slots)
        lib.commit(
            dtype, k.data_ptr(), k.stride(0), k.stride(1), v.data_ptr(), v.stride(0), v.stride(1), pages.data_ptr(), pages.shape[0], pages.shape[1],
            place.k_offset, place.v_offset, place.page_size, place.num_kv_heads, place.k_dim, place.v_dim, slots.data_ptr(), num_tokens,
            self.num_threads,
        )  # fmt: skip


def _dtype_code(pages: torch.Tensor, place: LayerPlace, **tensors: torch.Tensor) -> int:
    _require(pages.dim() == 2 and pages.is_contiguous() and pages.device.type == "cpu", "pages", pages, "[P, E], contiguous, on the CPU")
    _require(pages.dtype in DTYPE_CODES, "pages", pages, "float32, bfloat16 or float16")
    for name, tensor in tensors.items():
        _require(tensor.dtype == pages.dtype and tensor.device.type == "cpu", name, tensor, f"{pages.dtype} on the CPU, as the pages are")
    return DTYPE_CODES[pages.dtype]


def _check_staged(k: torch.Tensor, v: torch.Tensor, place: LayerPlace, num_tokens: int) -> None:
    heads = place.num_kv_heads
    _require(k.shape == (num_tokens, heads, place.k_dim) and k.stride(2) == 1, "k", k, f"[{num_tokens}, {heads}, {place.k_dim}], last contiguous")
    _require(v.shape == (num_tokens, heads, place.v_dim) and v.stride(2) == 1, "v", v, f"[{num_tokens}, {heads}, {place.v_dim}], last contiguous")


def _require_indices(dtype: torch.dtype, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        _require(tensor.dtype == dtype and tensor.dim() == 1 and tensor.is_contiguous() and tensor.device.type == "cpu", name, tensor, f"1-D {dtype}")


def _require(fine: bool, name: str, tensor: torch.Tensor, wanted: str) -> None:
    if not fine:
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype} strides {tensor.stride()} on {tensor.device}: must be {wanted}")
