"""Groups of layers: every layer placed once, pages of one size in every group, and no two layers on the same elements."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.policy.groups import ALIGNMENT, MAX_PADDING, Arrangement, arrange
from quire.tensors.models.geometry import STATE_REACH
from tests.policy.oracle import SOAK


@dataclass(frozen=True)
class Layer:
    layer_idx: int
    num_kv_heads: int = 2
    k_bytes: int = 16
    v_bytes: int = 16
    window: int = 0
    chunk: int = 0
    state_bytes: int = 0


def check(layers: list[Layer], page_size: int) -> Arrangement:
    arrangement = arrange(layers, page_size)
    by_idx = {layer.layer_idx: layer for layer in layers}
    placed = [place.layer_idx for group in arrangement.groups for place in group.places]
    assert sorted(placed) == sorted(by_idx) and len(placed) == len(layers)
    assert [group.group_id for group in arrangement.groups] == list(range(len(arrangement.groups)))
    for group in arrangement.groups:
        assert group.page_size >= 1 and group.places
        ranges = []
        for place in group.places:
            layer = by_idx[place.layer_idx]
            assert (layer.window, layer.chunk) == (group.window, group.chunk)
            tokens = group.page_size * layer.num_kv_heads
            ranges += [(place.k_offset, place.k_offset + tokens * layer.k_bytes), (place.v_offset, place.v_offset + tokens * layer.v_bytes)]
            if layer.state_bytes:
                ranges = [*ranges[:-2], (place.k_offset, place.k_offset + layer.state_bytes)]
            assert place.k_offset % ALIGNMENT == place.v_offset % ALIGNMENT == 0
        ranges.sort()
        assert ranges[0][0] >= 0 and ranges[-1][1] <= arrangement.page_bytes
        assert all(end <= start for (_, end), (start, _) in zip(ranges, ranges[1:], strict=False))
        assert group.carries == bool(layer.state_bytes)
        if group.carries:  # a state fits whatever the page holds; with the others' tokens a page of it ends where a page of theirs does
            assert group.page_size == (arrangement.groups[0].page_size if group.group_id else page_size)
            continue
        # One more token would not fit: no page is larger than its group needs.
        shapes, tokens = [by_idx[p.layer_idx] for p in group.places], group.page_size + 1
        longer = sum(-(-tokens * x.num_kv_heads * row // ALIGNMENT) * ALIGNMENT for x in shapes for row in (x.k_bytes, x.v_bytes))
        most = max(len(g.places) for g in arrangement.groups if (g.window, g.chunk) == (group.window, group.chunk) and g.page_size == group.page_size)
        if len(group.places) == most:
            assert longer > arrangement.page_bytes
    full = [group for group in arrangement.groups if group.kind == "full"]
    if full:
        assert full[0].page_size >= page_size
    return arrangement


kinds = st.tuples(
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([1, 8, 18, 64]),
    st.sampled_from([1, 8, 16]),
    st.sampled_from([(0, 0), (0, 0), (5, 0), (512, 0), (0, 16)]),
)
states = st.tuples(st.just(1), st.just(0), st.just(0), st.just((STATE_REACH, 0)), st.sampled_from([4, 64, 1000, 40000]))
layer_sets = st.lists(st.one_of(kinds, kinds, states), min_size=1, max_size=4).flatmap(
    lambda kinds: st.lists(st.sampled_from(kinds), min_size=1, max_size=40).map(
        lambda chosen: [Layer(i, heads, k, v, *mask, *state) for i, (heads, k, v, mask, *state) in enumerate(chosen)]
    )
)


@settings(max_examples=3000 if SOAK else 150, deadline=None)
@given(layers=layer_sets, page_size=st.sampled_from([1, 4, 16, 20, 128]))
def test_any_layers(layers: list[Layer], page_size: int) -> None:
    arrangement = check(layers, page_size)
    kinds = {(x.window, x.chunk, x.num_kv_heads, x.k_bytes, x.v_bytes, x.state_bytes) for x in layers}
    places = len(kinds) and sum(max(len(h.places) for h in arrangement.groups) for _ in arrangement.groups)
    assert places - len(layers) <= MAX_PADDING * len(layers) or len(kinds) == 1


@pytest.mark.parametrize(
    ("num_sliding", "num_full", "groups", "places"), [(15, 3, 6, 3), (25, 1, 26, 1), (20, 4, 6, 4), (5, 1, 6, 1), (12, 12, 2, 12)]
)
def test_sliding_and_full_layers(num_sliding: int, num_full: int, groups: int, places: int) -> None:
    every = (num_sliding + num_full) // num_full
    layers = [Layer(i, window=0 if i % every == every - 1 else 512) for i in range(num_sliding + num_full)]
    arrangement = check(layers, 16)
    assert len(arrangement.groups) == groups and {len(group.places) for group in arrangement.groups} == {places}
    assert {group.page_size for group in arrangement.groups} == {16}
    assert arrangement.groups[0].kind == "full"


def test_one_kind_is_one_group() -> None:
    assert len(check([Layer(i) for i in range(28)], 16).groups) == 1


def test_layers_of_another_geometry_hold_another_number_of_tokens() -> None:
    layers = [Layer(i) for i in range(4)] + [Layer(4 + i, num_kv_heads=1, window=64) for i in range(4)]
    assert [group.page_size for group in check(layers, 16).groups] == [16, 32]


@pytest.mark.parametrize(("state_bytes", "tokens"), [(1000, 16), (4 * 64 * 16 + 64, 65)])
def test_a_page_holds_one_state_and_as_many_tokens_as_fill_what_that_takes(state_bytes: int, tokens: int) -> None:
    """As in a model with three recurrent layers for one of attention: all pages are as long as a state, where rows of tokens are shorter."""
    layers = [Layer(i) if i % 4 == 3 else Layer(i, 1, 0, 0, STATE_REACH, 0, state_bytes) for i in range(8)]
    arrangement = check(layers, 16)
    assert [(group.kind, len(group.places), group.page_size) for group in arrangement.groups] == [("full", 2, tokens)] + [("carried", 2, tokens)] * 3
    assert arrangement.page_bytes == 2 * max(state_bytes, 64 * 16)
