"""Short causal convolutions over pages, in torch and native: the bits of a plain convolution of each whole sequence, however it comes in steps."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import functional

native = pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.errors import UnsupportedModelError  # noqa: E402
from quire.tensors.attention.base import AttentionBackend, LayerPlace, StepInputs, TableInputs  # noqa: E402
from quire.tensors.attention.native import NativeAttention  # noqa: E402
from quire.tensors.attention.reference import ReferenceAttention  # noqa: E402
from quire.tensors.codec import row_format  # noqa: E402
from quire.tensors.models.program import Program, assemble  # noqa: E402
from quire.tensors.models.rowplan import Convolve, Operand, Plan, RowOp  # noqa: E402
from quire.tensors.store import PageStore, StagedStep  # noqa: E402
from tests.tensors.checkpoints import one_thread, tiny_model  # noqa: E402
from tests.tensors.test_models import load  # noqa: E402

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

NAN = float("nan")
POISON = 255  # NaN in every dtype
GROUPS = 2  # of tables; a layer of convolution in each


@dataclass
class Layer:
    """A convolution: its kernel [C,W], and a bias [C] or none."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def channels(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """Of a whole sequence x [T,C]: in fp32, oldest first, each product and each sum rounded."""
        padded, wide = functional.pad(x.float(), (0, 0, self.width - 1, 0)), self.weight.float()
        out = padded[: len(x)] * wide[:, 0]
        for tap in range(1, self.width):
            out = out + padded[tap : tap + len(x)] * wide[:, tap]
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)


def make_layer(channels: int, width: int, dtype: torch.dtype, bias: bool, seed: int) -> Layer:
    g = torch.Generator().manual_seed(seed)
    return Layer(torch.randn((channels, width), generator=g).to(dtype), torch.randn(channels, generator=g).to(dtype) if bias else None)


@dataclass
class Sequence:
    """`x`, `tables`, `rows`: for each layer, which has a group of its own, its inputs, its page ids, and what came out."""

    x: list[torch.Tensor]
    num_committed: int = 0
    tables: list[list[int]] = field(default_factory=lambda: [[] for _ in range(GROUPS)])
    rows: list[list[torch.Tensor]] = field(default_factory=lambda: [[] for _ in range(GROUPS)])

    def __len__(self) -> int:
        return len(self.x[0])


class Torch:
    """Convolutions as plain layers run them."""

    backend: AttentionBackend = ReferenceAttention()

    def run(self, step: StagedStep, layer_idx: int, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        return step.convolve(layer_idx, x, layer.weight, layer.bias)


class Native:
    """Convolutions as layers that are programs run them: of one that copies its input, convolves the copy, and copies the result."""

    def __init__(self, num_threads: int = 2) -> None:
        self.num_threads = num_threads
        self.backend: AttentionBackend = NativeAttention(num_threads)

    def run(self, step: StagedStep, layer_idx: int, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        program, weights = _program(layer, x.dtype), [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        layers, out = native.lib.Layers(), torch.full_like(x, NAN)
        form = native.lib.ConvolveForm(native.DTYPE_CODES[x.dtype], layer.width, 0, -1 if layer.bias is None else 1)
        layers.add(program.native, program.ends[0], len(weights), 1, form, layer_idx)
        layers.set_weights(0, [weight.data_ptr() for weight in weights])
        assert step.of_programs is not None
        layers.run(step.of_programs.handle, len(x), [x.data_ptr()], 0, [out.data_ptr()], self.num_threads)
        return out


def _program(layer: Layer, dtype: torch.dtype) -> Program:
    given, mixed, gives, out, weight, bias = range(6)
    c, flat = layer.channels, (0, 0, 1)

    def copy(source: int, target: int) -> RowOp:
        return RowOp("copy", dtype, (1, 1, c), Operand(target, 0, flat), (Operand(source, 0, flat),))

    weights, added = ((weight, 0), (bias, 1)), bias
    if layer.bias is None:
        weights, added = weights[:1], None
    mix = Convolve((mixed,), ((c,),), layer.width, weight, added, gives, False)
    sizes = (c, c, c, c, c * layer.width, c)
    return assemble(Plan(((copy(given, mixed),), (copy(gives, out),)), (mix,), (dtype,) * 6, sizes, weights, ((given, 0),), ((out, (c,)),)))


class Cache:
    """Pages of which each belongs to one group, poisoned wherever nothing was committed; they are handed out in random order."""

    def __init__(self, layers: list[Layer], dtype: torch.dtype, page_sizes: list[int], num_pages: int, way: Torch | Native, seed: int) -> None:
        self.layers, self.way, self.page_sizes = layers, way, page_sizes
        none = row_format(None, dtype, 0)
        self.places = []
        for group, (layer, size) in enumerate(zip(layers, page_sizes, strict=True)):
            row, begin = row_format(None, dtype, layer.channels), 3 * dtype.itemsize
            self.places.append(LayerPlace(2 * group + 1, group, size, 1, row, none, begin, begin + size * row.num_bytes))
        page_bytes = max(place.v_offset for place in self.places) + 5 * dtype.itemsize
        self.store = PageStore(self.places, num_pages, page_bytes, way.backend)
        self.store.pages.fill_(POISON)
        self.free = list(range(num_pages))
        random.Random(seed).shuffle(self.free)

    def step(self, work: list[tuple[Sequence, int]], num_padding: int = 0, *, fails: bool = False) -> None:
        """Computes the next `count` tokens of each sequence and, unless the step fails, commits them."""
        counts, tables, slots = [count for _, count in work], [], []
        starts = [0, *itertools.accumulate(counts)]
        for group, (layer, size) in enumerate(zip(self.layers, self.page_sizes, strict=True)):
            ids, begins, places = [], [0], []
            for sequence, count in work:
                table = sequence.tables[group]
                for entry in range(min(max(0, sequence.num_committed - layer.width + 1) // size, len(table))):
                    self._let_go(table, entry)  # it is behind what the next token can see
                ids += table
                begins.append(len(ids))
                while len(table) * size < sequence.num_committed + count:
                    table.append(self.free.pop())
                places += [table[p // size] * size + p % size for p in range(sequence.num_committed, sequence.num_committed + count)]
            tables.append(TableInputs(torch.tensor(ids, dtype=torch.int32), torch.tensor(begins, dtype=torch.int32)))
            slots.append(torch.tensor(places + [-1] * num_padding, dtype=torch.int64))
        lengths = torch.tensor([s.num_committed for s, _ in work], dtype=torch.int32)
        step = StagedStep(self.store, StepInputs(torch.tensor(starts, dtype=torch.int32), lengths, tuple(tables)), slots)
        results = []
        for group, (layer, place) in enumerate(zip(self.layers, self.places, strict=True)):
            own = [s.x[group][s.num_committed : s.num_committed + count] for s, count in work]
            padding = torch.full((num_padding, layer.channels), NAN, dtype=layer.weight.dtype)
            out = self.way.run(step, place.layer_idx, layer, torch.cat([*own, padding]))
            assert torch.equal(out[starts[-1] :], torch.zeros_like(padding)), "padding comes back zero"
            results.append(out)
        if fails:
            return
        step.commit()
        for index, (sequence, count) in enumerate(work):
            sequence.num_committed += count
            for rows, out in zip(sequence.rows, results, strict=True):
                rows.append(out[starts[index] : starts[index + 1]])

    def _let_go(self, table: list[int], entry: int) -> None:
        if table[entry] >= 0:
            self.store.pages[table[entry]] = POISON
            self.free.append(table[entry])
            table[entry] = -1


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def run_ragged(layers: list[Layer], lengths: list[int], page_sizes: list[int], way: Torch | Native, seed: int, most: int = 40) -> None:
    """Chunks and single tokens of several sequences, each step with some of them and others that compute nothing in it. Some steps fail."""
    choose, dtype = random.Random(seed), layers[0].weight.dtype
    g = torch.Generator().manual_seed(seed)
    sequences = [Sequence([torch.randn((length, layer.channels), generator=g).to(dtype) for layer in layers]) for length in lengths]
    num_pages = sum(length // size + 2 for length in lengths for size in page_sizes)
    cache = Cache(layers, dtype, page_sizes, num_pages, way, seed)
    while open_ones := [s for s in sequences if s.num_committed < len(s)]:
        chosen = choose.sample(open_ones, choose.randint(1, len(open_ones)))
        work = [(s, min(choose.choice([0, 1, 1, 2, 7, choose.randint(1, most)]), len(s) - s.num_committed)) for s in chosen]
        cache.step(work, choose.choice([0, 0, 3]), fails=choose.random() < 0.1)
    for sequence, (group, layer) in itertools.product(sequences, enumerate(layers)):
        assert same_bits(torch.cat(sequence.rows[group]), layer.expected(sequence.x[group]))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [  # of each layer the channels, the width of its kernel, and whether it has a bias
    ((1, 1, False), (5, 2, True)),
    ((16, 3, False), (17, 3, True)),
    ((33, 4, True), (7, 7, False)),
    ((64, 9, False), (100, 5, True)),
    ((3, 16, True), (48, 8, False)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", CASES, ids=str)
def test_any_mix_has_the_bits_of_each_sequence_whole(dtype: torch.dtype, shapes: tuple[tuple[int, int, bool], ...]) -> None:
    layers = [make_layer(channels, width, dtype, bias, seed) for seed, (channels, width, bias) in enumerate(shapes)]
    for seed, page_sizes in enumerate(([1, 16], [4, 4], [16, 1])):
        run_ragged(layers, [1, 3, 17, 40, 66], page_sizes, Torch(), seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", CASES, ids=str)
def test_native_ones_have_the_same_bits(isa: str, dtype: torch.dtype, shapes: tuple[tuple[int, int, bool], ...]) -> None:
    layers = [make_layer(channels, width, dtype, bias, seed) for seed, (channels, width, bias) in enumerate(shapes)]
    for seed, page_sizes in enumerate(([1, 16], [4, 4], [16, 1])):
        run_ragged(layers, [1, 3, 17, 40, 66], page_sizes, Native(), seed)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_of_so_many_products_that_threads_share_them(num_threads: int) -> None:
    layers = [make_layer(200, 4, torch.bfloat16, True, 1), make_layer(333, 3, torch.bfloat16, False, 2)]
    run_ragged(layers, [150, 3, 210, 90], [16, 4], Native(num_threads), seed=4, most=200)


def test_what_is_expected_here_is_torchs_convolution() -> None:
    for channels, width, bias in itertools.chain(*CASES):
        layer = make_layer(channels, width, torch.float32, bias, seed=3)
        x = torch.randn((30, channels), generator=torch.Generator().manual_seed(4))
        own = None if layer.bias is None else layer.bias.double()
        out = functional.conv1d(functional.pad(x.double().T, (width - 1, 0)), layer.weight.double()[:, None], own, groups=channels).T
        torch.testing.assert_close(layer.expected(x).double(), out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", [Torch(), Native()], ids=["torch", "native"])
def test_nothing_to_do(way: Torch | Native) -> None:
    layers = [make_layer(5, 3, torch.float32, True, 1), make_layer(4, 4, torch.float32, True, 2)]
    cache = Cache(layers, torch.float32, [4, 1], 30, way, seed=0)
    cache.step([])
    cache.step([], num_padding=1)
    idle, busy = (Sequence([torch.randn(3, layer.channels) for layer in layers]) for _ in range(2))
    cache.step([(idle, 0), (busy, 3), (idle, 0)], num_padding=2)
    for rows, layer, x in zip(busy.rows, layers, busy.x, strict=True):
        assert same_bits(torch.cat(rows), layer.expected(x))


def test_a_wrong_table_is_named() -> None:
    """Of native ones, which would read what is not theirs."""
    layers = [make_layer(5, 3, torch.float32, True, seed) for seed in range(2)]
    cache = Cache(layers, torch.float32, [4, 4], 6, Native(), seed=0)
    sequence = Sequence([torch.randn(9, 5) for _ in range(2)])
    cache.step([(sequence, 6)])
    cache.step([(sequence, 1)], fails=True)
    for wrong in (6, -1):
        sequence.tables[0][1] = wrong
        with pytest.raises(RuntimeError, match=rf"page id {wrong} \(sequence 0, entry 1\) is outside 0\.\.5"):
            cache.step([(sequence, 1)])
    sequence.tables[0].pop()
    with pytest.raises(RuntimeError, match="6 committed tokens but only 1 pages of 4"):
        cache.step([(sequence, 1)])


def with_given(**given: object) -> Callable[[torch.nn.Module], object]:
    """Calls a module with these besides."""
    return lambda module: module.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, **given}), with_kwargs=True)


def doubled(module: torch.nn.Module) -> None:
    """Makes of what a module is called with a batch of two."""
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"].expand(2, -1, -1)}), with_kwargs=True
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_given(seq_idx=torch.zeros(1)), r"mixes tokens by tensors that are not known here \(seq_idx\)"),
        (with_given(initial_states=torch.zeros(1), activation=None), r"tensors that are not known here \(initial_states\)"),
        (doubled, "mixes a batch of 2, not 1"),
        (lambda module: delattr(module, "layer_idx"), "has no layer_idx, so what it keeps of a token has no place in the cache"),
    ],
)
def test_what_a_call_may_not_ask_for(change: Callable[[torch.nn.Module], object], told: str) -> None:
    model = tiny_model("lfm2")
    change(model.model.layers[2].conv)
    with pytest.raises(UnsupportedModelError, match=f"^lfm2: Lfm2ShortConv .*{told}"):
        load(model)
