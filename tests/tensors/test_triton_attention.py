"""The Triton attention in Triton's interpreter, against the plain torch one. Few tokens: the interpreter takes milliseconds a tile."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from quire.errors import ConfigError
from quire.tensors.attention import triton as triton_attention
from quire.tensors.attention import triton_parts
from quire.tensors.attention.base import LayerPlace, Mask, StepInputs, TableInputs, page_rows
from quire.tensors.attention.reference import ReferenceAttention
from quire.tensors.attention.triton import TritonAttention
from quire.tensors.attention.triton_parts import most_parts, num_blocks
from quire.tensors.codec import RowFormat
from quire.tensors.triton_cut import Cut
from tests.tensors import attention_cases as cases
from tests.tensors import quick_interpreter
from tests.tensors.attention_cases import NAN, POISON, Geometry, Sequence, make_sequence

quick_interpreter.install()
# Of rounding to a dtype. The interpreter cuts floats to bfloat16 where devices round, so there it is twice as large.
UNITS = {torch.bfloat16: 2**-7, torch.float16: 2**-11, torch.float32: 2e-6}


class Checked(TritonAttention):
    """Compares each call with the reference: results nearly (`assert_within_rounding` is the sharp test), pages bit for bit."""

    def attend(self, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        out, expected = super().attend(q, *rest), ReferenceAttention().attend(q, *rest)
        assert out.dtype == expected.dtype and out.shape == expected.shape
        unit = 0.0 if q.dtype == torch.float32 else 2 * UNITS[q.dtype]
        torch.testing.assert_close(out.float(), expected.float(), atol=1e-5 + unit, rtol=1e-5 + unit)
        return out

    def commit(self, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, place: LayerPlace, slots: torch.Tensor) -> None:
        expected = pages.clone()
        ReferenceAttention().commit(k, v, expected, place, slots)
        super().commit(k, v, pages, place, slots)
        assert torch.equal(pages, expected)


class Cache(cases.Cache):
    """Its pages are poisoned where nothing is committed, and so is what an entry of -1 would read: the bytes before them."""

    def __init__(self, geometry: Geometry, page_size: int, num_pages: int, seed: int = 0, backend: TritonAttention | None = None) -> None:
        super().__init__(geometry, page_size, num_pages, seed=seed)
        self.pages = torch.full((num_pages + 1, self.pages.shape[1]), POISON, dtype=torch.uint8)[1:]
        self.backend = backend or TritonAttention()  # type: ignore[assignment]


def compute(geometry: Geometry, sequence: Sequence, counts: list[int], page_size: int = 16, backend: TritonAttention | None = None) -> torch.Tensor:
    """A sequence alone, in steps of so many tokens."""
    fresh = dataclasses.replace(sequence, page_ids=[], rows=[], num_committed=0)
    cache = Cache(geometry, page_size, len(sequence.q) // page_size + 2, seed=page_size, backend=backend)
    for count in counts:
        cache.step([(fresh, count)])
    return fresh.out


def run_batch(geometry: Geometry, page_size: int, backend: TritonAttention | None = None) -> list[Sequence]:
    """Prompts, chunks of them, decoding and idle sequences, together and apart, with padding."""
    a, b, c = (make_sequence(geometry, length, seed) for seed, length in enumerate((70, 67, 3)))
    cache = Cache(geometry, page_size, 3 * (70 // page_size + 2), backend=backend)
    for counts, num_padding in (((33, 0, 1), 0), ((1, 65, 1), 3), ((35, 1, 1), 0), ((1, 1, 0), 2)):
        cache.step(list(zip((a, b, c), counts, strict=True)), num_padding)
    return [a, b, c]


def assert_within_rounding(geometry: Geometry, sequence: Sequence) -> None:
    """As `attention_cases.assert_close`: probabilities of 16 bits are rounded, which moves a result by a rounding of its spread."""
    unit, expected = UNITS[geometry.dtype], cases.reference(geometry, sequence)
    spread = expected.spread if geometry.dtype != torch.float32 else 0.0
    allowed = unit * (1.01 * expected.out.abs() + 1.03 * spread) + 3e-6
    error = (sequence.out.double() - expected.out).abs()
    assert bool((error <= allowed).all()), f"{(error / allowed).max():.3f} of what rounding explains"


PLAIN = Geometry(4, 2, 16, 16)
CASES = {
    "bf16": (PLAIN, 4),
    "fp16, no groups, softcap, window of one": (Geometry(2, 2, 24, 16, torch.float16, window=1, softcap=1.5), 16),
    "fp32, groups of 5": (Geometry(10, 2, 16, 40, torch.float32), 1),
    "80 dims, sinks": (Geometry(2, 1, 80, 80, sinks=True), 24),
    "a group larger than a block, chunk": (Geometry(80, 1, 16, 16, torch.float32, chunk=24), 16),
    "window": (dataclasses.replace(PLAIN, window=9), 4),
    "window over tiles, softcap": (dataclasses.replace(PLAIN, window=66, softcap=1.5, dtype=torch.float32), 24),
    "all": (Geometry(5, 1, 80, 24, torch.float16, window=33, softcap=2.0, sinks=True), 4),
}


@pytest.mark.parametrize(("geometry", "page_size"), CASES.values(), ids=CASES.keys())
def test_ragged_batches_equal_the_reference(geometry: Geometry, page_size: int) -> None:
    for sequence in run_batch(geometry, page_size, Checked(Cut(9))):  # parts of some calls are met apart
        assert_within_rounding(geometry, sequence)


@pytest.mark.parametrize("geometry", [PLAIN, Geometry(5, 1, 16, 24, torch.float32, window=40, softcap=2.0, sinks=True)], ids=["plain", "all"])
def test_bits_do_not_depend_on_the_batch_the_chunks_the_page_size_or_the_programs(geometry: Geometry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a part is a tile. Of some calls its parts are shared out, of some each is met apart, of others one program meets them all."""
    _cut(monkeypatch, 64)
    together = run_batch(geometry, page_size=16, backend=TritonAttention(Cut(9)))
    for sequence, page_size in zip(together, (1, 4, 24), strict=True):
        length = len(sequence.q)
        for counts, least in (([length], 1), ([1, 1, length - 2], 1000), (_split(length, 11), 4)):
            assert torch.equal(compute(geometry, sequence, counts, page_size, TritonAttention(Cut(least))), sequence.out), counts


def _split(length: int, count: int) -> list[int]:
    return [min(count, length - at) for at in range(0, length, count)]


def test_decoding_gives_the_bits_of_a_prompt() -> None:
    sequence = make_sequence(PLAIN, 70, seed=3)
    assert torch.equal(compute(PLAIN, sequence, [60] + [1] * 10), compute(PLAIN, sequence, [70]))


@pytest.mark.parametrize("options", [{}, {"window": 140, "chunk": 250}], ids=["plain", "window and chunk"])
def test_bits_over_parts_do_not_depend_on_the_programs_or_the_chunks(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    _cut(monkeypatch, 128)
    geometry = Geometry(2, 1, 16, 16, dtype=torch.float32, sinks=True, **options)  # type: ignore[arg-type]
    sequence = make_sequence(geometry, 300, seed=8)
    whole = compute(geometry, sequence, [300])
    assert_within_rounding(geometry, dataclasses.replace(sequence, rows=[whole]))
    for counts, least in (([298, 1, 1], 1), ([298, 1, 1], 2), ([260, 39, 1], 1000)):
        assert torch.equal(compute(geometry, sequence, counts, 16, TritonAttention(Cut(least))), whole)


def test_parts_as_long_as_they_are() -> None:
    geometry = Geometry(1, 1, 16, 16)
    sequence = make_sequence(geometry, 520, seed=9)
    whole = compute(geometry, sequence, [520])
    assert_within_rounding(geometry, dataclasses.replace(sequence, rows=[whole]))
    assert torch.equal(compute(geometry, sequence, [519, 1], 16, TritonAttention(Cut(2))), whole)


def _cut(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    for module in (triton_attention, triton_parts):
        monkeypatch.setattr(module, "PART", part)


@pytest.mark.parametrize(("num_keys", "window", "chunk"), [(n, w, c) for n in (1, 512, 513, 2000) for w, c in ((0, 0), (1, 0), (513, 0), (0, 700))])
def test_there_is_room_for_all_parts_of_a_block(num_keys: int, window: int, chunk: int) -> None:
    mask, block = Mask(1.0, window, chunk), 16
    firsts = [mask.first_visible(first) // 512 for first in range(num_keys)]
    seen = max((min(first + block, num_keys) - 1) // 512 - firsts[first] + 1 for first in range(num_keys))
    assert seen <= most_parts(num_keys, mask, block) <= seen + 1


@pytest.mark.parametrize("options", [{"window": 9}, {"chunk": 20}], ids=["window", "chunk"])
def test_keys_out_of_sight_and_neighbours_are_not_read(options: dict[str, int]) -> None:
    """Committed keys no coming query sees, in a page that it does read, and all of another sequence: NaN."""
    geometry = dataclasses.replace(PLAIN, **options)  # type: ignore[arg-type]
    sequence, neighbour = make_sequence(geometry, 90, seed=4), make_sequence(geometry, 90, seed=5)
    expected = compute(geometry, sequence, [90])
    for x in (neighbour.q, neighbour.k, neighbour.v):
        x.fill_(NAN)
    cache = Cache(geometry, page_size=16, num_pages=14)
    cache.step([(neighbour, 70), (sequence, 70)])
    lowest = geometry.first_key(70)
    k, v = page_rows(cache.pages, cache.place)
    for position in range(lowest // 16 * 16, lowest):
        page = sequence.page_ids[position // 16]
        k[page, :, position % 16] = v[page, :, position % 16] = POISON
    cache.step([(sequence, 20), (neighbour, 20)], num_padding=1)
    assert -1 in sequence.page_ids and lowest % 16
    assert torch.equal(torch.cat(sequence.rows), expected)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [NAN, torch.inf])
def test_a_broken_token_breaks_no_row_that_does_not_see_it(value: float) -> None:
    geometry = dataclasses.replace(PLAIN, window=20)
    sequence = make_sequence(geometry, 100, seed=6)
    whole = compute(geometry, sequence, [100])
    sequence.k[41], sequence.v[41] = torch.inf, value
    for counts in ([100], [45, 55]):
        broken = compute(geometry, sequence, counts)
        assert torch.equal(broken[:41], whole[:41]) and torch.equal(broken[61:], whole[61:])
        assert not broken[41:61].isfinite().all(2).any()


def test_large_scores_saturate() -> None:
    geometry = Geometry(2, 1, 16, 16, torch.float32, softcap=30.0)
    sequence = make_sequence(geometry, 40, seed=7, scale=100.0)
    Cache(geometry, 16, 4).step([(sequence, 40)])
    expected = cases.reference(geometry, sequence).out
    torch.testing.assert_close(sequence.out.double(), expected, atol=1e-2, rtol=1e-4)


def test_nothing_to_do_and_slots_of_no_page() -> None:
    cache = Cache(PLAIN, page_size=4, num_pages=2, backend=Checked())
    cache.step([])
    cache.step([(make_sequence(PLAIN, 3, seed=1), 0)], num_padding=3)
    assert bool((cache.pages == POISON).all())
    sequence = make_sequence(PLAIN, 4, seed=2)
    cache.backend.commit(sequence.k, sequence.v, cache.pages, cache.place, torch.tensor([5, -1, -1, 0]))
    cache.backend.commit(sequence.k[:0], sequence.v[:0], cache.pages, cache.place, torch.tensor([], dtype=torch.int64))


def test_the_lengths_of_a_step_may_change_where_they_lie() -> None:
    """A batch of the same shape as the one before is the same tensors, written anew (engine/batch.py)."""
    a, b = make_sequence(PLAIN, 40, seed=1), make_sequence(PLAIN, 40, seed=2)
    expected = compute(PLAIN, a, [37])
    starts, committed = torch.tensor([0, 3, 40], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    backend, cache = TritonAttention(), Cache(PLAIN, 4, 2)
    step = StepInputs(starts, committed, (TableInputs(committed[:0], torch.zeros(3, dtype=torch.int32)),) * 2)
    for counts in ((3, 37), (37, 3)):
        starts[1] = counts[0]
        q, k, v = (torch.cat([getattr(x, name)[:count] for x, count in zip((a, b), counts, strict=True)]) for name in "qkv")
        out = backend.attend(q, k, v, cache.pages, cache.place, step, cache.mask)
    assert torch.equal(out[:37], expected)


@pytest.mark.parametrize("counts", [[1], [5, 0, 1, 1, 33, 32, 0, 31], [0, 0, 64, 1], [1] * 40, [0, 0]])
@pytest.mark.parametrize("block", [1, 4, 32, 64])
def test_there_are_programs_for_all_tokens(counts: list[int], block: int) -> None:
    """As the kernel finds them; two of them never have the same token."""
    starts = [sum(counts[:s]) for s in range(len(counts) + 1)]
    found = []
    for program in range(num_blocks(starts[-1], len(counts), block)):
        s = max(s for s in range(len(counts)) if starts[s] // block + s <= program)
        first = (program - starts[s] // block - s) * block
        found += [starts[s] + token for token in range(first, min(first + block, counts[s]))]
    assert found == list(range(starts[-1]))


def test_what_it_cannot_read_is_refused() -> None:
    sequence = make_sequence(PLAIN, 3, seed=1)
    with pytest.raises(ConfigError, match="kv_codec='int8'"):
        TritonAttention().encode(sequence.k, RowFormat("int8", 16))
    encoded = dataclasses.replace(PLAIN, codec=("int4", None))
    cache = Cache(PLAIN, 4, 2)
    cache.place = dataclasses.replace(cache.place, k=encoded.rows[0])
    step = StepInputs(torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), ())
    with pytest.raises(ConfigError, match="kv_codec='int4'"):
        cache.backend.attend(sequence.q, sequence.k, sequence.v, cache.pages, cache.place, step, cache.mask)
    with pytest.raises(ValueError, match="torch.float32"):
        Cache(PLAIN, 4, 2).backend.attend(sequence.q.float(), sequence.k, sequence.v, cache.pages, Cache(PLAIN, 4, 2).place, step, cache.mask)
