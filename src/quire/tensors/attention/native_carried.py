"""What layers that carry a state compute, on CPU in C++ (csrc/convolve.h, csrc/recur.h): the same bits for any number of threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quire.tensors.attention.carried import Recurrence, Segments
from quire.tensors.native import DTYPE_CODES, lib


class NativeCarried:
    """`CarriedKernels`, native. Raises ValueError naming what is out of range."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads

    def convolve(
        self, before: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, query_start: torch.Tensor
    ) -> torch.Tensor:
        """See `CarriedKernels`."""
        (num_tokens, channels), out, weight = x.shape, torch.empty_like(x), weight.to(x.dtype).contiguous()
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        lib.convolve(
            DTYPE_CODES[x.dtype], before.data_ptr(), x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(),
            query_start.data_ptr(), before.shape[0], num_tokens, channels, weight.shape[1], self._num_threads,
        )  # fmt: skip
        return out

    def recur(
        self, given: Recurrence, seg: Segments, before: Sequence[torch.Tensor | None], after: Sequence[torch.Tensor | None], out: torch.Tensor
    ) -> None:
        """See `CarriedKernels`."""
        heads, k_dim, v_dim = given.state_shape
        from_, to = ([0 if state is None else state.data_ptr() for state in states] for states in (before, after))
        lib.recur(
            DTYPE_CODES[given.v.dtype], given.q.data_ptr(), given.k.data_ptr(), given.v.data_ptr(), given.decay.data_ptr(), given.beta.data_ptr(),
            out.data_ptr(), from_, to, seg.starts, seg.of, given.k.shape[1], heads, k_dim, v_dim, given.scale, given.normalized, given.corrects,
            self._num_threads,
        )  # fmt: skip
