"""Sequences that have keys in the same pages, in the C++ attention: the bits of each are those it has with pages of its own."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("quire.tensors.native", reason="the native kernels are not built")

from quire.tensors.native import lib
from tests.tensors.attention_cases import Cache, Geometry, Sequence, compute_alone, make_sequence

GEOMETRIES = {
    "bf16": Geometry(4, 2, 64, 64),
    "bf16 of many heads": Geometry(16, 1, 32, 96),
    "bf16 odd": Geometry(5, 5, 35, 21),
    "softcap and sinks": Geometry(6, 2, 32, 48, softcap=5.0, sinks=True),
    "fp32": Geometry(7, 1, 20, 64, torch.float32),
    "int8": Geometry(6, 2, 64, 64, codec=("int8", "int8")),
    "mixed": Geometry(4, 2, 64, 40, codec=("int8", "int4")),
}


def branch(cache: Cache, stem: Sequence, shared: int, length: int, seed: int) -> Sequence:
    """A sequence whose first `shared` tokens are those of `stem`, in its full pages as far as there are any."""
    own = make_sequence(cache.geometry, length, seed)
    for name in "qkv":
        setattr(own, name, torch.cat([getattr(stem, name)[:shared], getattr(own, name)[shared:]]))
    pages = shared // cache.place.page_size
    own.page_ids, own.num_committed = stem.page_ids[:pages], pages * cache.place.page_size
    return own


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_branches_of_branches_have_the_bits_they_have_alone(isa: str, geometry: Geometry) -> None:
    alone: list[torch.Tensor] = []  # of the same sequences whatever the size of the pages that they share
    for page_size in (7, 16, 64):
        sequences = run_branches(geometry, page_size)
        alone = alone or [compute_alone(geometry, s, [len(s.q)], page_size=16, num_threads=2) for s in sequences]
        for sequence, expected in zip(sequences, alone, strict=True):
            assert torch.equal(sequence.out, expected[len(sequence.q) - len(sequence.out) :]), page_size


def run_branches(geometry: Geometry, page_size: int) -> list[Sequence]:
    choose = random.Random(page_size)
    cache = Cache(geometry, page_size, 2500 // page_size * 4, seed=page_size)
    sequences = [make_sequence(geometry, 1210, seed=1), make_sequence(geometry, 150, seed=2)]
    cache.step([(sequences[0], 1190), (sequences[1], 90)])
    for shared, length in [(700, 760), (1150, 1170), (1150, 1180), (650, 700), (650, 690), (600, 640), (70, 110), (3, 60)]:
        sequences.append(branch(cache, sequences[0], shared, length, seed=len(sequences)))
    cache.step([(sequences[2], 730 - sequences[2].num_committed)])
    sequences.append(branch(cache, sequences[2], 730, 770, seed=30))
    while open_ones := [s for s in sequences if s.num_committed < len(s.q)]:
        chosen = choose.sample(open_ones, choose.randint(1, len(open_ones)))
        cache.step([(s, min(choose.choice([1, 1, 1, 2, 3, 20]), len(s.q) - s.num_committed)) for s in chosen])
    return sequences


def test_what_is_shared(isa: str) -> None:
    """Four sequences of a prompt of 700 tokens in pages of 16, two of them alike for 1,100, one that shares nothing, and a chunk of a prompt."""
    prompt, more = list(range(43)), list(range(100, 126))
    tables = [[*prompt, *more, 1], [*prompt, *more, 2, 3], [*prompt, 4], [*prompt, 5, 6], list(range(200, 230)), [*prompt, 7, 8, 9]]
    committed = [1110, 1120, 700, 710, 480, 730]
    query_start = [0, 1, 2, 3, 5, 6, 46]  # the fourth has two tokens, the last one 40
    found = lib.shared_items(query_start, committed, tables, 16, 2)
    every, long = [0, 1, 2, 3, 4], [0, 1]
    assert [(part, keys, sorted(tokens)) for part, keys, tokens in found] == [(0, 512, every), (1, 512, long), (1, 128, [2, 3, 4]), (2, 64, long)]


def test_what_is_shared_lies_in_the_same_pages(isa: str) -> None:
    choose = random.Random(3)
    num_shared = 0
    for _ in range(200):
        size = choose.choice([1, 7, 16, 64, 600])
        tables, committed, counts = [], [], []
        for first_page in range(0, 10_000_000, 1_000_000):
            stem = choose.choice([*tables, []])
            kept = stem[: choose.randint(0, len(stem))]
            tables.append([*kept, *range(first_page, first_page + choose.randint(1, 1500 // size + 1))])
            committed.append(choose.randint(0, len(tables[-1]) * size))
            counts.append(choose.choice([0, 1, 1, 2, 9]))
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        found = lib.shared_items(starts, committed, tables, size, 4)
        num_shared += len(found)
        owner = [i for i, count in enumerate(counts) for _ in range(count)]
        met = [(part, token) for part, _, tokens in found for token in tokens]
        assert len(met) == len(set(met)), "a token meets the beginning of a part once"
        for part, keys, tokens in found:
            begin, end = part * 512, part * 512 + keys
            sequences = {owner[token] for token in tokens}
            assert len(sequences) > 1 and 0 < keys <= 512 and keys % 64 == 0 and all(committed[i] >= end for i in sequences)
            assert len({tuple(tables[i][begin // size : (end - 1) // size + 1]) for i in sequences}) == 1
    assert num_shared > 200
