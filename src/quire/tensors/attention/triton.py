"""Attention in Triton: one kernel for prompts, decoding and mixes of both, over pages and staged keys, for any device Triton compiles to.

After Dao, "FlashAttention-2" (2023): a block of query rows meets tiles of keys with an online softmax. Query heads that share a KV head share a
block, and keys are gathered through the page table, as in vLLM's unified attention (vllm/attention/ops/triton_unified_attention.py). Where there are
few blocks, parts of the keys are met by programs of their own and folded by a second kernel: Dao et al., "Flash-Decoding" (2023).

The law by which a row's bits depend on its own sequence alone:

    a program     one KV head and a block of query tokens of one sequence: ROWS rows, row r being token r // G, query head r % G of the KV head's G.
                  It finds its sequence itself, in the step's lengths where they lie: the host, which would have to wait for them, reads none
    its shape     ROWS = 64 (more if G is) and KEYS = 64 whatever the step holds, its warps known from the layer alone, so a row's dot products are
                  the same instructions beside any rows; multiply and add are never fused, which a compiler may do here and not there
    its parts     absolute positions [512 i, 512 i + 512), each summed up from scratch and then folded into what came before, in ascending order:
                  by the program that met them, in registers, or, where a call has few programs, by others, from memory. It is the same arithmetic
    its tiles     absolute positions [64 j, 64 j + 64) in ascending order, from the first key any row of the block sees to the block's last position
    its keys      position p < num_committed: page_ids[page_start[s] + p // B], place p % B; else the step's row query_start[s] + p - num_committed
    its softmax   in fp32, one running maximum a row and part. A tile or part of which a row sees nothing changes none of that row's state, not by
                  a bit (but -0, which ends as 0), so it makes no difference which of them other rows of the block bring in: neither chunks nor page
                  size nor neighbours show in the result

Where no row of the block looks, nothing is read: it may be NaN, or belong to a page entry of -1. Tensors of a call lie on the current device.

The kernels compile for GPUs (tests/tensors/test_triton_device.py) and have run on none. Under Triton's interpreter (TRITON_INTERPRET=1 before triton
is imported) they run on CPU tensors: slow, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import torch
import triton
import triton.language as tl

from quire.errors import ConfigError
from quire.tensors.attention.base import LayerPlace, Mask, StepInputs, page_rows
from quire.tensors.attention.triton_parts import (
    LINES,
    PART,
    find_block,
    first_visible,
    fold,
    fold_parts,
    most_parts,
    nothing_met,
    num_blocks,
    reach,
    store,
)
from quire.tensors.codec import RowFormat
from quire.tensors.triton_cut import Cut

_ROWS: Final = 64
_KEYS: Final = 64
_CUT_BYTES: Final = 96 << 20  # for the states of parts; where they took more, programs fold their own
_STAGED_BYTES: Final = 64 << 10  # of shared memory for tiles of keys and values; within it the next ones are loaded while one is computed
_LOG2E: Final = math.log2(math.e)


class TritonAttention:
    """See `AttentionBackend`. Queries, keys and values of one dtype, float32, bfloat16 or float16; rows of an encoded format raise ConfigError."""

    name = "triton"
    carried = None

    def __init__(self, cut: Cut | None = None) -> None:
        """`cut`: which calls meet the parts of their keys apart, none by default."""
        self._cut = cut or Cut()

    def program_steps(self, pages: torch.Tensor, places: Iterable[LayerPlace]) -> None:
        return None

    def encode(self, x: torch.Tensor, row: RowFormat) -> torch.Tensor:
        _plain(row)
        return x

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, place: LayerPlace, step: StepInputs, mask: Mask
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`. Raises ValueError where a head's elements are not contiguous, or of another dtype than the layer's."""
        k_pages, v_pages = _element_rows(pages, place)
        for x, dtype in ((q, k_pages.dtype), (k, k_pages.dtype), (v, v_pages.dtype)):
            if x.dtype != dtype or x.stride(2) != 1:
                raise ValueError(f"attend cannot take {tuple(x.shape)} {x.dtype} strides {x.stride()}: must be {dtype}, a head's elements contiguous")
        group = q.shape[1] // place.num_kv_heads
        rows = max(_ROWS, triton.next_power_of_2(group))
        tokens = rows // group  # of a block
        num_sequences, table = step.num_committed.shape[0], step.tables[place.group]
        out = torch.zeros(q.shape[0], q.shape[1], place.v.dim, dtype=q.dtype, device=q.device)
        if not num_sequences or not q.shape[0]:
            return out
        lanes_k, lanes_v = _lanes(place.k.dim), _lanes(place.v.dim)
        num_warps = min(16, (4 if max(lanes_k, lanes_v) <= 64 else 8) * rows // _ROWS)  # fewer would keep larger heads in memory, not in registers
        stages = 2 if 2 * _KEYS * (lanes_k + lanes_v) * q.element_size() <= _STAGED_BYTES else 1
        # Scores are in units of log2, so that exp2 is all the kernel needs; what a softcap makes of them is made so after it.
        scale, cap = (mask.scale / mask.softcap, mask.softcap * _LOG2E) if mask.softcap else (mask.scale * _LOG2E, 0.0)
        blocks, heads = num_blocks(q.shape[0], num_sequences, tokens), place.num_kv_heads
        parts = most_parts(table.page_ids.shape[0] * place.page_size + q.shape[0], mask, tokens)
        least = self._cut.least_programs
        cut = blocks * heads < least and 4 * out.numel() * parts <= _CUT_BYTES
        sums = out.new_empty(*out.shape[:2], parts if cut else 0, place.v.dim, dtype=torch.float32)
        tops, totals = (sums.new_empty(sums.shape[:3]) for _ in range(2))  # two, as half of one might be less aligned, which is another kernel
        _attend[(blocks, heads, min(parts, -(-least // (blocks * heads))) if cut else 1)](
            q, k, v, k_pages, v_pages, out, step.query_start, step.num_committed, table.page_ids, table.page_start, mask.sinks, sums, tops, totals,
            num_sequences, parts, scale, cap, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
            *out.stride()[:2], CUT=cut, HAS_CAP=bool(mask.softcap), WINDOW=mask.window, CHUNK=mask.chunk, PAGE=place.page_size, GROUP=group,
            DK=place.k.dim, DV=place.v.dim, LANES_K=lanes_k, LANES_V=lanes_v, ROWS=rows, KEYS=_KEYS, PART=PART, WIDE=INTERPRETED,
            num_warps=num_warps, num_stages=stages, enable_fp_fusion=False,
        )  # fmt: skip
        if cut:
            fold_parts[(blocks, q.shape[1], -(-tokens // LINES))](
                out, step.query_start, step.num_committed, mask.sinks, sums, tops, totals, num_sequences, parts, *out.stride()[:2],
                WINDOW=mask.window, CHUNK=mask.chunk, TOKENS=tokens, LINES=LINES, DV=place.v.dim,
                LANES_V=lanes_v, PART=PART, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        return out

    def commit(self, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, place: LayerPlace, slots: torch.Tensor) -> None:
        k_pages, v_pages = _element_rows(pages, place)
        if not len(slots):
            return
        if not place.v.dim:  # of a convolution, which has no values: of what stands for them nothing is read
            v, v_pages = k, k_pages
        _commit[(len(slots), place.num_kv_heads)](
            k, v, k_pages, v_pages, slots, *k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
            PAGE=place.page_size, DK=place.k.dim, DV=place.v.dim, LANES_K=_lanes(place.k.dim), LANES_V=_lanes(place.v.dim), num_warps=1,
        )  # fmt: skip


def _plain(row: RowFormat) -> torch.dtype:
    if row.dtype is None:
        raise ConfigError(f"kv_codec={row.name!r}: must be None with backend='triton', whose kernels read plain rows only")
    return row.dtype


def _element_rows(pages: torch.Tensor, place: LayerPlace) -> tuple[torch.Tensor, torch.Tensor]:
    """`page_rows` as elements: K [P, Hkv, B, Dk] and V [P, Hkv, B, Dv], which has no dtype where it is empty."""
    k, v = page_rows(pages, place)
    return k.view(_plain(place.k)), v.view(_plain(place.v)) if place.v.dim else v


def _lanes(dim: int) -> int:
    """The power of two a head is padded to, at least the 16 that a dot product needs."""
    return max(16, int(triton.next_power_of_2(dim)))


# What follows is compiled by Triton: "tensor" below is a tile of registers, a capitalized parameter is known when the kernel is compiled.


@triton.jit(do_not_specialize=["num_sequences", "num_parts"])  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, k_pages, v_pages, out, query_start, num_committed, page_ids, page_start, sinks, sums, tops, totals, num_sequences, num_parts, scale, cap,
    q_token, q_head, k_token, k_head, v_token, v_head, k_page, k_page_head, k_place, v_page, v_page_head, v_place, out_token, out_head,
    CUT: tl.constexpr, HAS_CAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, LANES_K: tl.constexpr, LANES_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of tokens (`num_blocks`) and one KV head; with CUT a share of its parts, of which it leaves `sums` [T, Hq, num_parts, DV], `tops`
    and `totals` [T, Hq, num_parts]. After the tensors their strides in elements, named for what they step over."""
    kv_head = tl.program_id(1)
    sequence, start, first, count = find_block(query_start, num_sequences, ROWS // GROUP)
    committed = tl.load(num_committed + sequence)
    lowest, last = reach(committed, first, count, ROWS // GROUP, WINDOW, CHUNK)
    begin, end = lowest, last + 1
    if CUT:
        share = tl.cdiv(last // PART + 1 - lowest // PART, tl.num_programs(2))
        part = lowest // PART + share * tl.program_id(2)
        begin, end = tl.maximum(begin, part * PART), tl.minimum(end, (part + share) * PART)
    if (first >= count) | (begin >= end):
        return
    table = page_ids + tl.load(page_start + sequence)

    row = tl.arange(0, ROWS)
    token, head = first + row // GROUP, kv_head * GROUP + row % GROUP
    real = (row < ROWS // GROUP * GROUP) & (token < count)
    position = committed + token
    row_lowest = first_visible(position, WINDOW, CHUNK)
    lane_k, lane_v = tl.arange(0, LANES_K), tl.arange(0, LANES_V)
    at = (start + token).to(tl.int64)
    query = tl.load(q + (at * q_token + head * q_head)[:, None] + lane_k[None, :], mask=real[:, None] & (lane_k < DK)[None, :], other=0.0)
    if WIDE:
        query = query.to(tl.float32)

    all_top, all_total, all_sum = nothing_met(sinks, head, real, ROWS, LANES_V)
    top, total, acc = nothing_met(None, head, real, ROWS, LANES_V)
    last_lowest = first_visible(last, WINDOW, CHUNK)
    for tile in range(begin // KEYS, tl.cdiv(end, KEYS)):
        key = tile * KEYS + tl.arange(0, KEYS)
        old = (key >= lowest) & (key < committed)
        new = (key >= committed) & (key >= lowest) & (key <= last)
        page = tl.load(table + key // PAGE, mask=old, other=0).to(tl.int64)
        staged = (start + key - committed).to(tl.int64)
        old_keys = k_pages + kv_head * k_page_head + page * k_page + key % PAGE * k_place
        old_values = v_pages + kv_head * v_page_head + page * v_page + key % PAGE * v_place
        # Two loads, each of which skips the other's rows: of pointers chosen by `where` no alignment is known, and no load is wide.
        keys = _rows(k + kv_head * k_head + staged * k_token, new, lane_k, DK, _rows(old_keys, old, lane_k, DK, 0.0))
        values = _rows(v + kv_head * v_head + staged * v_token, new, lane_v, DV, _rows(old_values, old, lane_v, DV, 0.0))
        weight_type = values.dtype
        if WIDE:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if HAS_CAP:
            scores = cap * _tanh(scores)
        visible = (key[None, :] >= row_lowest[:, None]) & (key[None, :] <= position[:, None]) & real[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # else a row that has seen nothing yet would take -inf from -inf
        weights = tl.exp2(scores - base[:, None])
        # A row that sees nothing here has weights of 0, and alpha is 1 even where it has seen nothing yet: its state stays as it is.
        alpha = tl.where(new_top == top, 1.0, tl.exp2(top - base))
        # The rounded weights are summed, not those before: what rounding does to all weights alike then cancels.
        weights = weights.to(weight_type)
        total = total * alpha + tl.sum(weights.to(tl.float32), 1)
        if WIDE:
            weights = weights.to(tl.float32)
        if (tile * KEYS + KEYS - 1 > committed + first) | (tile * KEYS < last_lowest):
            # Some row does not see some key, and 0 * NaN would still reach it: what is not finite breaks by itself the rows that do see it.
            broken = (tl.abs(values.to(tl.float32)) < float("inf")) == 0
            values = tl.where(broken, 0.0, values)
            breaks = tl.dot(visible.to(values.dtype), broken.to(values.dtype), input_precision="ieee") > 0
            acc = tl.where(breaks, float("nan"), acc)
        acc = tl.dot(weights, values, acc * alpha[:, None], input_precision="ieee")
        top = new_top
        if (tile % (PART // KEYS) == PART // KEYS - 1) | ((tile + 1) * KEYS >= end):
            if CUT:
                where = (at * (tl.num_programs(1) * GROUP) + head) * num_parts + (tile * KEYS // PART - lowest // PART)
                tl.store(tops + where, top, mask=real)
                tl.store(totals + where, total, mask=real)
                tl.store(sums + where[:, None] * DV + lane_v[None, :], acc, mask=real[:, None] & (lane_v < DV)[None, :])
            else:
                all_top, all_total, all_sum = fold(all_top, all_total, all_sum, top, total, acc)
            top, total, acc = nothing_met(None, head, real, ROWS, LANES_V)

    if not CUT:
        store(out + at * out_token + head * out_head, real, lane_v, DV, all_total, all_sum)


@triton.jit  # type: ignore[untyped-decorator]
def _rows(first, read, lane, DIM: tl.constexpr, other):  # type: ignore[no-untyped-def]
    """Rows [KEYS, lanes] that begin at the pointers `first` [KEYS]; `other`, 0 or such rows, where `read` is not set, and 0 beyond their end."""
    return tl.load(first[:, None] + lane[None, :], mask=read[:, None] & (lane < DIM)[None, :], other=other)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """By an exp2 that cannot overflow: infinities give 1 and -1, NaN gives NaN."""
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    return tl.where(x < 0, -1.0, 1.0) * ((1.0 - e) / (1.0 + e))


@triton.jit  # type: ignore[untyped-decorator]
def _commit(  # type: ignore[no-untyped-def]
    k, v, k_pages, v_pages, slots, k_token, k_head, v_token, v_head, k_page, k_page_head, k_place, v_page, v_page_head, v_place,
    PAGE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, LANES_K: tl.constexpr, LANES_V: tl.constexpr,
):  # fmt: skip
    """One token's keys and values of one KV head."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    if slot >= 0:
        page, place = slot // PAGE, slot % PAGE
        lane_k, lane_v = tl.arange(0, LANES_K), tl.arange(0, LANES_V)
        keys = tl.load(k + token * k_token + head * k_head + lane_k, mask=lane_k < DK)
        tl.store(k_pages + page * k_page + head * k_page_head + place * k_place + lane_k, keys, mask=lane_k < DK)
        values = tl.load(v + token * v_token + head * v_head + lane_v, mask=lane_v < DV)
        tl.store(v_pages + page * v_page + head * v_page_head + place * v_place + lane_v, values, mask=lane_v < DV)


INTERPRETED: Final[bool] = not isinstance(_attend, triton.runtime.JITFunction)
if INTERPRETED:
    from quire.tensors.triton_interpreted import multiply_rows_alike

    multiply_rows_alike()
