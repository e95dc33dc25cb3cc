"""The machine under torch: memory held and given back, and how many threads torch's own operators take."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from quire.tensors.memory import mapped

T = TypeVar("T")


def give_back(address: int, num_bytes: int) -> None:
    """Let the system have the memory of whole pages in this range; it reads as zeros when it is touched again."""
    page = mmap.PAGESIZE
    first, end = -(-address // page) * page, (address + num_bytes) // page * page
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if first < end and madvise is not None and hasattr(mmap, "MADV_DONTNEED"):
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14, which Python's mmap does not name
TAKEN_AT_ONCE = 16 * 2**20


def preallocate(memory: torch.Tensor, num_threads: int) -> None:
    """Have the system give contiguous memory (uint8) that it has only promised, as if all pages were written; what is there stays."""
    whole = memory.flatten()

    def take(part: torch.Tensor) -> None:
        first = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        if madvise is None or madvise(ctypes.c_void_p(first), ctypes.c_size_t(part.data_ptr() + part.nbytes - first), POPULATE_WRITE):
            part[:: mmap.PAGESIZE] = part[:: mmap.PAGESIZE].clone()
            part[-1:] = part[-1:].clone()

    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="quire-load") as threads:
        list(threads.map(take, torch.split(whole, TAKEN_AT_ONCE)))


def give_back_freed() -> None:
    """Let the system have what malloc keeps of memory that was freed: after loading a model that may be hundreds of megabytes, in pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(ctypes.c_size_t(0))


def room(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of memory not yet touched, in huge pages where the system gives them: for weights, all of which a product walks through."""
    if not num_bytes or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    return torch.frombuffer(mapped(num_bytes), dtype=torch.uint8, count=num_bytes)


@contextlib.contextmanager
def no_modes_of_callers() -> Iterator[None]:
    """Inside, tensors without a device of their own lie on the CPU, whatever default the caller has set: that would take ours along. And they are
    none of inference mode, as the engine's thread, which is not in that, writes to them."""
    on_cpu = contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with torch.inference_mode(False), on_cpu:
        yield


def one_torch_thread_here() -> None:
    """Let torch run its own operators on the calling thread alone, leaving all other threads as they are.

    Torch splits an elementwise operator among threads by element count, and the vector body and the scalar tail of a piece differ in the last
    bit, so a row's bits would depend on the batch (promise 1). `torch.set_num_threads` is no way out: it changes every thread of the process.
    The large products do not suffer, since the native kernels are told their number of threads.
    """
    torch.get_num_threads()  # torch sets its own number when a thread first asks; after that ours stays
    library = _openmp_library()
    if library is not None:
        library.omp_set_num_threads(1)


def on_one_torch_thread(run: Callable[[], T]) -> T:
    """What `run` gives, on a thread of its own as `one_torch_thread_here` makes it: what is found out there holds for the engine's thread.

    It is faster, too: between the many small operators of a short forward torch's second thread mostly waits, at full load.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="quire-load", initializer=one_torch_thread_here) as thread:
        return thread.submit(run).result()


def _openmp_library() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        path = line.rpartition(" ")[2]
        if "libgomp" in path or "libiomp" in path or "libomp" in path:
            return ctypes.CDLL(path)
    return None
