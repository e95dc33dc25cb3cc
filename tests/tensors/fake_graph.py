"""Captured graphs of the device that there is not (fake_device.py): what computes them is kept, and done again on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Graph:
    """What was started while it was captured, in order."""

    num_replays = 0  # of all

    def __init__(self) -> None:
        self._kernels: list[Callable[[], object]] = []
        self._made: list[torch.Tensor] = []

    def add(self, kernel: Callable[[], object]) -> None:
        """What writes where it wrote in the capture."""
        self._kernels.append(kernel)

    def add_operator(self, run: Callable[[], Sequence[torch.Tensor]], made: Sequence[torch.Tensor]) -> None:
        """What computes its results anew, and where they lay."""
        self._made += made

        def again() -> None:
            for x, value in zip(made, run(), strict=False):
                x.copy_(value)

        self._kernels.append(again)

    def poison(self) -> None:
        """Nothing has been computed in a capture."""
        with torch.inference_mode():
            for x in self._made:
                x.view(torch.uint8).fill_(0xA5) if x.dim() and x.is_contiguous() else x.fill_(1)

    def replay(self) -> None:
        """As `torch.cuda.CUDAGraph`'s."""
        Graph.num_replays += 1
        with torch.inference_mode():
            for kernel in self._kernels:
                kernel()
