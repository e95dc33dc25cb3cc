"""What computes attention and products, and on which device: chosen once, when an engine is put together."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

from quire.errors import ConfigError
from quire.tensors.attention.base import AttentionBackend, PackingProducts, RowReductions
from quire.tensors.attention.reference import ReferenceAttention
from quire.tensors.device import CPU, Device, device_of
from quire.tensors.products import ReferenceProducts
from quire.tensors.triton_cut import BUSY, Cut


@dataclass(frozen=True, slots=True)
class Kernels:
    """What computes, and where.

    `rows`: sums within a row, None where torch's own do. `programs`: whether layers can be native programs, which bring their own kernels.
    `cut`: which calls on an accelerator have their sums cut among programs.
    """

    attention: AttentionBackend
    products: PackingProducts
    sampler: Literal["native", "reference"]
    name: str
    programs: bool = False
    device: Device = CPU
    rows: RowReductions | None = None
    cut: Cut = field(default_factory=Cut)


def choose_kernels(backend: str, num_threads: int, device: str = "cpu") -> Kernels:
    """The kernels asked for; with "auto" Triton's on an accelerator, the native ones on the CPU, or the reference with one warning where they do not
    load.

    Raises:
        ConfigError: "native" or "triton" was asked for, or is all that the device has, and does not load; there is no such device.
    """
    if device != "cpu":
        return _on_accelerator(device, num_threads)
    if backend == "triton":
        return _interpreted(num_threads)
    if backend != "reference":
        try:
            from quire.tensors.attention.native import NativeAttention
            from quire.tensors.native import isa
            from quire.tensors.native_products import NativeProducts

            return Kernels(NativeAttention(num_threads), NativeProducts(num_threads), "native", f"native ({isa()})", programs=True)
        except (ImportError, AttributeError) as error:  # absent, or built from other sources than these
            if backend == "native":
                raise ConfigError(f"backend='native': the native kernels do not load: {error}") from error
            warnings.warn(f"Quire's native kernels do not load ({error}); the reference backend in plain torch is exact but slow", stacklevel=2)
    return Kernels(ReferenceAttention(), ReferenceProducts(), "reference", "reference")


def _interpreted(num_threads: int) -> Kernels:
    try:
        from quire.tensors.attention.triton import INTERPRETED, TritonAttention
        from quire.tensors.triton_products import TritonProducts
    except ImportError as error:
        raise ConfigError(f"backend='triton': Triton does not load: {error}") from error
    if not INTERPRETED:
        raise ConfigError("backend='triton': must run in Triton's interpreter on the CPU (TRITON_INTERPRET=1 before Python starts), or on a device")
    return Kernels(TritonAttention(), TritonProducts(), _sampler(num_threads), "triton (interpreted)")


def _on_accelerator(name: str, num_threads: int) -> Kernels:
    device = device_of(name)
    try:
        from quire.tensors.attention.triton import INTERPRETED, TritonAttention
        from quire.tensors.triton_products import TritonProducts
        from quire.tensors.triton_rows import TritonRows
    except ImportError as error:
        raise ConfigError(f"device={name!r}: Triton does not load: {error}") from error
    told = "triton (interpreted)" if INTERPRETED else "triton"
    cut = Cut(1 if INTERPRETED else BUSY)  # in the interpreter nothing runs side by side
    return Kernels(TritonAttention(cut), TritonProducts(cut), _sampler(num_threads), told, device=device, rows=TritonRows(), cut=cut)


def _sampler(num_threads: int) -> Literal["native", "reference"]:
    """On the CPU, wherever logits come from."""
    return choose_kernels("auto", num_threads).sampler
