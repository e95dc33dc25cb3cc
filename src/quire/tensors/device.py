"""Where weights, pages and batches lie, and how they come and go: the CPU is one device, an accelerator another.

Nothing else in the house asks which it is. What only one of them can do is a method that does nothing on the other, or a field that tells.

An accelerator's kernels run behind the back of the thread that starts them, one after the other on that thread's stream. Two calls here keep what a
step needs of that: what goes there (feeds.py) lies in pinned memory that nobody writes again before it has been copied, so nothing is waited
for; what comes back (`to_host`) is waited for, once for all tensors of a step.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import torch

from quire.errors import ConfigError
from quire.tensors.feeds import CopyFeed, Feed, FixedFeed, HostFeed
from quire.tensors.host import give_back, give_back_freed, on_one_torch_thread, one_torch_thread_here, preallocate, room
from quire.tensors.memory import available_bytes

T = TypeVar("T")

ACCELERATORS: Final = ["cuda"]  # as torch names them; AMD's go by that name, too


class Device(Protocol):
    """One device. `where` is its name in torch; `takes_back`: whether pages nobody needs can be given back to whoever else wants memory."""

    @property
    def where(self) -> torch.device: ...

    @property
    def takes_back(self) -> bool: ...

    def current(self) -> AbstractContextManager[Any]:
        """Inside, the calling thread's kernels are started on this device."""
        ...

    def take_thread(self) -> None:
        """From now on the calling thread, which must be ours, starts kernels on this device, and torch's own CPU operators run on it alone."""
        ...

    def on_a_thread(self, run: Callable[[], T]) -> T:
        """What `run` gives on a thread of its own, which has been taken: what is found out there holds for the engine's thread."""
        ...

    def available_bytes(self) -> int:
        """Memory that can be taken now."""
        ...

    def give_back_freed(self) -> None:
        """Let others have memory that was freed and is kept for the next taker."""
        ...

    def room_for_pages(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes]. Raises ConfigError where there is no room for so much."""
        ...

    def room_for_weights(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], not yet written."""
        ...

    def give_back(self, memory: torch.Tensor) -> None:
        """Let others have a page's memory, whose content may be lost; it may be written again."""
        ...

    def preallocate(self, memory: torch.Tensor, num_threads: int) -> None:
        """Have the system give all of what `room_for_pages` gave, now; what is there stays."""
        ...

    def feed(self) -> Feed:
        """A new one."""
        ...

    def to_host(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """These on the CPU. An accelerator is waited for once, not at all where all are empty."""
        ...

    def graphs(self) -> Graphs | None:
        """What captures work here; None where nothing is won by it."""
        ...


def device_of(name: str) -> Device:
    """The device that torch calls so: "cpu", or an accelerator, with or without its number; without, the current one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "cpu":
        return CPU
    kind, _, number = name.partition(":")
    if kind not in ACCELERATORS:
        raise ConfigError(f"device={name!r}: must be one of cpu, {', '.join(ACCELERATORS)}, with a number where there are several")
    module = torch.get_device_module(kind)
    if not module.is_available():
        raise ConfigError(f"device={name!r}: torch {torch.__version__} finds no such device")
    index, count = int(number) if number else module.current_device(), module.device_count()
    if index >= count:
        raise ConfigError(f"device={name!r}: must be below {kind}:{count}, as torch finds {count}")
    return Accelerator(torch.device(kind, index), module)


@dataclass(frozen=True, slots=True)
class Cpu:
    """The CPU, and the system's memory."""

    where: torch.device = torch.device("cpu")
    takes_back: bool = True

    def current(self) -> AbstractContextManager[None]:
        """See `Device`."""
        return nullcontext()

    def take_thread(self) -> None:
        """See `Device`."""
        one_torch_thread_here()

    def on_a_thread(self, run: Callable[[], T]) -> T:
        """See `Device`."""
        return on_one_torch_thread(run)

    def available_bytes(self) -> int:
        """Memory that can be taken without swapping."""
        return available_bytes()

    def give_back_freed(self) -> None:
        """See `Device`."""
        give_back_freed()

    def room_for_pages(self, num_bytes: int) -> torch.Tensor:
        """Taken from the system as it is first written, not before."""
        try:
            memory = torch.empty(num_bytes + mmap.PAGESIZE, dtype=torch.uint8)
        except RuntimeError:
            raise ConfigError(f"cache_bytes={num_bytes}: must be less, the system has no room for so much even where nothing is written") from None
        first = -memory.data_ptr() % mmap.PAGESIZE  # so that rows which fill a page of the system lie in one, not in two
        return memory[first : first + num_bytes]

    def room_for_weights(self, num_bytes: int) -> torch.Tensor:
        """See `host.room`."""
        return room(num_bytes)

    def give_back(self, memory: torch.Tensor) -> None:
        """It reads as zeros afterwards."""
        give_back(memory.data_ptr(), memory.nbytes)

    def preallocate(self, memory: torch.Tensor, num_threads: int) -> None:
        """See `host.preallocate`."""
        preallocate(memory, num_threads)

    def feed(self) -> Feed:
        """See `Device`."""
        return HostFeed()

    def to_host(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """They are there."""
        return tensors

    def graphs(self) -> None:
        """The CPU waits for nobody to start its work."""


CPU: Final = Cpu()


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A device with memory of its own, driven through torch's module for its kind. Pages are taken when the pool is made, and kept."""

    where: torch.device
    module: Any
    takes_back: bool = False

    def current(self) -> AbstractContextManager[Any]:
        """See `Device`. Triton starts kernels on the current device, wherever their tensors lie."""
        context: AbstractContextManager[Any] = self.module.device(self.where.index)
        return context

    def take_thread(self) -> None:
        """See `Device`. Which device is current is each thread's own affair."""
        one_torch_thread_here()
        self.module.set_device(self.where.index)

    def on_a_thread(self, run: Callable[[], T]) -> T:
        """See `Device`."""
        with ThreadPoolExecutor(1, thread_name_prefix="quire-load", initializer=self.take_thread) as thread:
            return thread.submit(run).result()

    def available_bytes(self) -> int:
        """Memory of the device that nobody has taken, other processes included."""
        free: int = self.module.mem_get_info(self.where.index)[0]
        return free

    def give_back_freed(self) -> None:
        """Of the host's memory, and of what torch's allocator keeps of the device's."""
        give_back_freed()
        self.module.empty_cache()

    def room_for_pages(self, num_bytes: int) -> torch.Tensor:
        """Taken at once."""
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.where)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"cache_bytes={num_bytes}: must be less, {self.where} has {self.available_bytes()} bytes to spare beside the weights"
            ) from None

    def room_for_weights(self, num_bytes: int) -> torch.Tensor:
        """See `Device`."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.where)

    def give_back(self, memory: torch.Tensor) -> None:
        """The pool is one tensor, of which nothing can be given back."""

    def preallocate(self, memory: torch.Tensor, num_threads: int) -> None:
        """All of it was taken at once."""

    def feed(self) -> Feed:
        """See `Device`."""
        return CopyFeed(self.where)

    def to_host(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Device`."""
        copies = tuple(x.to("cpu", non_blocking=True) for x in tensors)
        if any(x.numel() for x in tensors):
            self.module.current_stream(self.where).synchronize()
        return copies

    def graphs(self) -> Graphs:
        """See `Device`."""
        return Graphs(self.where, self.module)


class Graphs:
    """Work of an accelerator, captured to be started as a whole, without the Python that started its kernels one by one.

    All that is captured here takes its memory from one pool, so what one graph gives is lost when another is started.
    """

    def __init__(self, where: torch.device, module: Any) -> None:
        self._where, self._module, self._pool, self._stream = where, module, module.graph_pool_handle(), module.Stream(where)

    def feed(self, room: Sequence[array[int]]) -> Feed:
        """One whose tensors stay where they are; see `FixedFeed`."""
        return FixedFeed(self._where, room)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Inside, what makes the host wait raises RuntimeError: no graph can hold it."""
        before = self._module.get_sync_debug_mode()
        self._module.set_sync_debug_mode("error")
        try:
            yield
        finally:
            self._module.set_sync_debug_mode(before)

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What `run` gives, of which nothing is computed yet, and what computes it: again at each call, from what lies then where `run` found it.

        All its kernels must have run before, on tensors of the same shapes: none can be compiled or loaded in a capture.
        """
        graph = self._module.CUDAGraph()
        with self._module.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = run()
        replay: Callable[[], None] = graph.replay
        return result, replay
