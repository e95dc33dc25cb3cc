"""Matrix products in plain torch whose row bits do not depend on the batch: the oracle of the native kernels, and the fallback without them.

torch picks a GEMM by the number of rows, and another GEMM adds in another order: fp32 has three to four classes of row counts, bf16 too at some
widths. So every product here has exactly 16 rows, from a block of its own (a slice of a larger tensor could be aligned differently): one class.
A row's place within the block was measured not to matter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

BLOCK_ROWS = 16


class ReferenceProducts:
    """`Products` (see attention/base.py) in blocks of exactly 16 rows."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times weight [N, K] transposed, plus bias [N]; result [..., N] in x's dtype, which must be the weight's.

        Raises RuntimeError, as torch does, when shapes or dtypes do not fit.
        """
        return _by_blocks(lambda block: functional.linear(block, weight, bias), x, weight.shape[0])

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times weight [K, N], plus bias [N]; result [..., N] in x's dtype, which must be the weight's.

        Raises RuntimeError, as torch does, when shapes or dtypes do not fit.
        """
        if bias is None:
            return _by_blocks(lambda block: torch.mm(block, weight), x, weight.shape[1])
        return _by_blocks(lambda block: torch.addmm(bias, block, weight), x, weight.shape[1])


def _by_blocks(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, width: int) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], width)
    block = rows.new_zeros(BLOCK_ROWS, rows.shape[1])  # rows left over from an earlier block only feed results that are dropped
    for start in range(0, rows.shape[0], BLOCK_ROWS):
        part = rows[start : start + BLOCK_ROWS]
        block[: part.shape[0]] = part
        out[start : start + BLOCK_ROWS] = product(block)[: part.shape[0]]
    return out.view(*x.shape[:-1], width)
