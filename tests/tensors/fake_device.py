"""A device that there is not: an accelerator as torch sees one, whose memory is the CPU's, and which is strict where real ones are lenient.

Its tensors are plain `torch.Tensor`s on "fake:0", made by DLPack of CPU tensors whose bytes they share. All operators on them come through one
function here, which runs it on the CPU. Unlike a GPU,

- it refuses an operator whose tensors lie on two sides, indices included (a CPU tensor without dimensions may be an operand, as torch has it);
- it counts whatever makes the host wait for it, and whatever is copied there with a wait (`waits`, `uploads`);
- what is copied to the host without a wait is poison until somebody waits, and memory that is written while it is copied from is found out then;
- an address may be asked of a tensor only by those who start kernels or compare addresses;
- what a captured graph computes is poison until it is replayed, and whatever no graph can hold is refused in a capture: waits, copies to or from the
  host, kernels that never ran before.

Like a GPU's, torch's own sums and products on it have an order that depends on how many there are.

`install()` changes torch for the rest of the process: use it in one of its own.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.tensors import quick_interpreter
from tests.tensors.fake_arithmetic import ordered
from tests.tensors.fake_graph import Graph

NAME, MEMORY = "fake", 1 << 30
_CPU, _OTHER = 1, 12  # device types of DLPack: kDLCPU, and kDLExtDev, which is torch's PrivateUse1
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive", "allclose"}
_ASKERS = ("quire.tensors.triton_", "quire.tensors.attention.triton", "quire.tensors.models.form", "triton.")

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _as(x: torch.Tensor, kind: int) -> torch.Tensor:
    """The same bytes as a tensor of the other side."""
    capsule = torch.utils.dlpack.to_dlpack(x)
    address = _pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)  # behind the data's address: device type, device number
    (ctypes.c_int32 * 2).from_address(address)[:] = [kind, 0]
    return torch.utils.dlpack.from_dlpack(capsule)


def on_host(x: torch.Tensor) -> torch.Tensor:
    """A tensor of the device as one of the CPU, over the same bytes. For the fake's own use: nothing is counted."""
    return _as(x, _CPU)


class Fake:
    """What has happened on the device. `waits`: times that the host waited for it, by what; `uploads`: copies to it that were waited for."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.uploads = self.num_launches = 0
        self.failing: Callable[[str], bool] = lambda operator: False
        self.waits_fail = "default"  # torch's mode of synchronizing operations
        self._graph: Graph | None = None  # being captured
        self._known: set[str] = set()  # kernels that have run
        self._leaving: list[tuple[torch.Tensor, torch.Tensor]] = []  # memory of the host that is being copied from, and what it held
        self._coming: list[tuple[torch.Tensor, torch.Tensor]] = []  # memory of the host that is being copied to, and what it will hold

    def wait(self, what: str) -> None:
        """The host waits until all is done."""
        if self._graph is not None or self.waits_fail == "error":
            raise RuntimeError(f"{what}: called a synchronizing operation")
        self.waits.append(what)
        leaving, self._leaving = self._leaving, []
        coming, self._coming = self._coming, []
        for source, held in leaving:
            if not torch.equal(source, held):
                raise RuntimeError("memory was written while it was being copied to the device")
        for target, value in coming:
            target.copy_(value)

    def run(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """One operator."""
        name = op.overloadpacket.__name__
        if self.failing(name):
            raise RuntimeError(f"the device failed at {name}")
        if name in ("_copy_from", "_copy_from_and_resize"):
            return self._copy(*args, **kwargs)
        if name in ("set_", "resize_", "_resize_output_"):
            raise RuntimeError(f"{name}: not on this device")
        if name.startswith("empty") and torch.Size(args[0]).numel() * (kwargs.get("dtype") or torch.float32).itemsize > MEMORY:
            raise torch.OutOfMemoryError("the device has no room for so much")
        if name in _WAITS or (name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1:2]))):
            self.wait(name)
        if mixed := [tuple(x.shape) for x in _tensors((args, kwargs)) if x.is_cpu and x.dim()]:
            raise RuntimeError(f"{op}: tensors {mixed} are on the CPU, others on the device")
        wants = [argument.type.kind() == "TensorType" for argument in op._schema.arguments]
        theirs: dict[int, torch.Tensor] = {}

        def ours(x: Any) -> Any:
            if isinstance(x, torch.Tensor) and not x.is_cpu:
                mine = on_host(x) if x.numel() else torch.empty(x.shape, dtype=x.dtype)  # of which an operator may make more
                theirs[id(mine)] = x
                return mine
            if isinstance(x, (list, tuple)):
                return [ours(item) for item in x]
            return torch.device("cpu") if isinstance(x, torch.device) else x

        # What stands for a tensor may arrive as a number.
        given = [torch.tensor(x) if want and isinstance(x, (int, float)) else ours(x) for x, want in zip(args, wants, strict=False)]
        named = {key: ours(x) for key, x in kwargs.items()}
        views = any(returned.alias_info is not None for returned in op._schema.returns)
        out = ordered(name, op, given, dict(named))
        if self._graph is not None:
            self._graph.add_operator(lambda: self._again(name, op, given, named), [] if views else list(_tensors(out)))
        for x in _tensors((given, named)):
            if id(x) in theirs and x.numel() and not theirs[id(x)].numel():
                theirs[id(x)].data = _as(x, _OTHER)
        # A view of a tensor that is none of inference mode's is none either.
        plain = views and not any(x.is_inference() for x in _tensors(args[:1]))
        with torch.inference_mode(torch.is_inference_mode_enabled() and not plain):
            return _each(out, lambda x: theirs[id(x)] if id(x) in theirs else _as(x, _OTHER))

    def _again(self, name: str, op: Any, given: Any, named: Any) -> list[torch.Tensor]:
        """The results of an operator of a graph."""
        if self.failing(name):
            raise RuntimeError(f"the device failed at {name}")
        return [] if name.startswith("empty") else list(_tensors(ordered(name, op, given, dict(named))))

    def launch(self, kernel: str, start: Callable[[], object]) -> None:
        """A kernel is started, as `start` does it."""
        if self.failing(kernel):
            raise RuntimeError(f"the device failed at {kernel}")
        if self._graph is not None:
            if kernel not in self._known:
                raise RuntimeError(f"{kernel}: loaded in a capture")
            self._graph.add(start)
        self._known.add(kernel)
        self.num_launches += 1

    @contextmanager
    def capture(self, graph: Graph) -> Iterator[None]:
        """As `torch.cuda.graph`: what is started inside is `graph`'s."""
        self.wait("capture")
        self._graph = graph
        try:
            yield
            graph.poison()
        finally:
            self._graph = None

    def _copy(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if self._graph is not None and (source.is_cpu or target.is_cpu):
            raise RuntimeError("a copy from or to the host in a capture")
        if not source.is_cpu and not target.is_cpu:
            on_host(target).copy_(on_host(source))
            if self._graph is not None:
                self._graph.add(lambda: on_host(target).copy_(on_host(source)))
        elif source.is_cpu:
            pinned = getattr(source, "pinned_by_fake", False)
            if not (pinned and non_blocking):
                self.uploads += 1
            else:
                self._leaving.append((source, source.clone()))
            on_host(target).copy_(source)
        elif non_blocking:
            self._coming.append((target, on_host(source).to(target.dtype, copy=True)))
            target.view(torch.uint8).fill_(0xA5) if target.dim() and target.is_contiguous() else target.fill_(1)
        else:
            self.wait("copy")
            target.copy_(on_host(source))
        return target


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    """Those in an operator's arguments."""
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, (list, tuple, dict)):
        for item in given.values() if isinstance(given, dict) else given:
            yield from _tensors(item)


def _each(out: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(out, (list, tuple)):
        return type(out)(_each(x, change) for x in out)
    return change(out) if isinstance(out, torch.Tensor) else out


FAKE = Fake()


class _Stream:
    def __init__(self, where: torch.device) -> None:
        pass

    def synchronize(self) -> None:
        FAKE.wait("synchronize")


class _Module:
    """What `torch.cuda` is to a GPU, as far as it is asked."""

    current = 0
    CUDAGraph, Stream = Graph, _Stream

    def graph_pool_handle(self) -> object:
        return object()

    def graph(self, graph: Graph, *, pool: object, stream: _Stream, capture_error_mode: str) -> Any:
        return FAKE.capture(graph)

    def get_sync_debug_mode(self) -> str:
        return FAKE.waits_fail

    def set_sync_debug_mode(self, mode: str) -> None:
        FAKE.waits_fail = mode

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return self.current

    def set_device(self, index: int) -> None:
        self.current = index

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        yield

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return MEMORY, MEMORY

    def current_stream(self, where: torch.device) -> _Stream:
        return _Stream(where)

    def empty_cache(self) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: int) -> None:
        pass

    def set_rng_state(self, state: None, device: int) -> None:
        pass


def _home(to: Any) -> Any:
    """`Tensor.to`, whose way to the CPU without a wait asks for an allocator of pinned memory, which Python cannot give."""

    def moved(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.device.type == NAME and args == ("cpu",) and kwargs == {"non_blocking": True}:
            return torch.empty_like(x, device="cpu").copy_(x, non_blocking=True)
        result: torch.Tensor = to(x, *args, **kwargs)
        return result

    return moved


def _pin_memory(x: torch.Tensor, *_: Any) -> torch.Tensor:
    pinned = x.clone()
    pinned.pinned_by_fake = True  # type: ignore[attr-defined]
    return pinned


def _guard_addresses() -> None:
    address = torch.Tensor.data_ptr

    def data_ptr(x: torch.Tensor) -> int:
        frame: Any = sys._getframe(1)
        while frame.f_globals["__name__"] in (__name__, "quire.tensors.models.exact"):  # every call of torch passes through there
            frame = frame.f_back
        if x.device.type == NAME and not frame.f_globals["__name__"].startswith(_ASKERS):
            raise RuntimeError(f"{frame.f_globals['__name__']} asks for the address of a tensor on the device")
        return address(x)

    torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]


def _let_kernels_run() -> None:
    """Triton's interpreter copies tensors to the CPU and back; here it gets the bytes themselves, and all of a launch must lie on one side."""
    from triton.runtime import interpreter

    there, back = interpreter.GridExecutor._init_args_hst, interpreter.GridExecutor._restore_args_dev

    def init(self: Any, args: Any, kwargs: Any) -> Any:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if all(x.is_cpu for x in given):
            return there(self, args, kwargs)
        if any(x.is_cpu for x in given):
            raise RuntimeError(f"{self.fn.__name__}: started with tensors of the CPU")
        FAKE.launch(self.fn.__name__, lambda: self(*args, **kwargs))
        move = lambda x: on_host(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
        return [move(x) for x in args], {name: move(x) for name, x in kwargs.items()}

    def restore(self: Any, args: Any, *rest: Any) -> None:
        if all(x.is_cpu for x in args if isinstance(x, torch.Tensor)):
            back(self, args, *rest)

    interpreter.GridExecutor._init_args_hst, interpreter.GridExecutor._restore_args_dev = init, restore
    quick_interpreter.install()


@functools.cache
def install() -> Fake:
    """Give torch the device, and the engine leave to use it. Twice is once."""
    from quire.tensors import device

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _library.fallback(FAKE.run, "PrivateUse1")
    _aten.impl("convolution_overrideable", functools.partial(FAKE.run, torch.ops.aten.convolution.default), "PrivateUse1")  # no fallback reaches it
    torch.Tensor.pin_memory = _pin_memory  # type: ignore[method-assign,assignment]
    torch.Tensor.to = _home(torch.Tensor.to)  # type: ignore[method-assign]
    _guard_addresses()
    _let_kernels_run()
    device.ACCELERATORS.append(NAME)
    return FAKE


_library, _aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
