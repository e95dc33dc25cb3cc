"""Which tokens survive top-k, top-p and min-p, how often each is drawn, and the noise behind it."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.params import SamplingParams
from quire.tensors import native
from quire.tensors.sampler import Row, Sampler, SequenceState
from quire.tensors.sampler_reference import edited_logits, gumbel, masses, noise_words, surviving_ids, threefry2x32


def tokens(backend: str, logits: Tensor, num: int, seed: int = 1, **params: object) -> list[int]:
    """num draws from the same logits [V] at consecutive positions."""
    state = SequenceState(SamplingParams(**params), seed, logits.numel())
    drawn = Sampler(logits.numel(), backend, 2).sample(logits.repeat(num, 1), [Row(state, position) for position in range(num)])
    return [d.token_id for d in drawn]


def sorted_whole(logits: Tensor, params: SamplingParams) -> list[int]:
    """The survivors, the slow way: all tokens in order of likelihood, and exact sums of their masses."""
    order = sorted((i for i in range(logits.numel()) if logits[i] > -math.inf), key=lambda i: (-float(logits[i]), i))
    order = order[: params.top_k or None]
    relative = (logits[order] - logits.max()) * (1 / params.temperature)
    if params.top_p < 1:
        sums = list(accumulate(Fraction(mass) for mass in masses(relative).tolist()))
        order = order[: next(n for n, mass in enumerate(sums, 1) if mass >= Fraction(params.top_p * float(sums[-1])))]
    floor = -27.0 if params.min_p == 0 else math.log(params.min_p)  # what lies below -27 is never drawn
    return [i for i, r in zip(order, relative, strict=False) if r >= torch.tensor(floor)]


logit_values = st.one_of(st.integers(-6, 6).map(float), st.floats(-30, 30, width=16), st.just(-math.inf))


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(logit_values, min_size=1, max_size=80).filter(lambda v: max(v) > -math.inf),
    temperature=st.sampled_from([0.25, 1.0, 4.0]),
    top_k=st.integers(0, 90),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1.0), st.sampled_from([0.25, 0.5, 0.75])),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
def test_survivors_are_those_of_a_full_sort(values: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> None:
    logits = torch.tensor(values)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = sorted_whole(logits, params)
    state = SequenceState(params, seed, len(values))
    survivors = surviving_ids(edited_logits(logits, Row(state, 0)), Row(state, 0))
    assert survivors.tolist() == kept
    # The native cuts are seen through draws: among the survivors, and for each position the reference's own.
    rows = [Row(state, position) for position in range(40)]
    fast, slow = Sampler(len(values), "native", 1), Sampler(len(values), "reference", 1)
    drawn = [d.token_id for d in fast.sample(logits.repeat(40, 1), rows)]
    assert set(drawn) <= set(kept)
    assert drawn[:4] == [d.token_id for d in slow.sample(logits.repeat(4, 1), rows[:4])]


def kept(logits: Tensor, **params: object) -> set[int]:
    """The tokens that 500 native draws give, which must be the reference's survivors."""
    row = Row(SequenceState(SamplingParams(**params), 1, logits.numel()), 0)
    drawn = set(tokens("native", logits, 500, **params))
    assert drawn == set(surviving_ids(logits, row).tolist())
    return drawn


def test_cuts_among_ties_take_the_lower_ids() -> None:
    flat = torch.zeros(40)
    for top_k in (1, 7, 39, 40, 1000):
        assert kept(flat, top_k=top_k) == set(range(min(top_k, 40)))
    for top_p, num in ((0.5, 20), (0.500001, 21), (0.025, 1), (1e-9, 1), (0.975, 39), (0.9750001, 40)):
        assert kept(flat, top_p=top_p) == set(range(num))
    steps = torch.tensor([0.0, 1.0, 1.0, 2.0, 1.0, 2.0])
    assert kept(steps, top_k=4) == {3, 5, 1, 2}
    assert kept(steps, top_k=4, top_p=0.65) == {3, 5}  # 2 e^2 of 2 e^2 + 2 e: the mass is that of the top 4
    assert kept(steps, min_p=1.0) == {3, 5}
    assert kept(steps, min_p=math.exp(-1.001)) == {1, 2, 3, 4, 5}


def test_cuts_of_large_rows_that_are_nearly_all_ties() -> None:
    flat = torch.zeros(20_001)
    assert kept(flat, top_k=5) == kept(flat, top_p=5 / 20_001) == set(range(5))
    assert kept(flat, top_p=5.001 / 20_001) == set(range(6))
    flat[[7, 9000, 20_000]] = 1.0
    assert kept(flat, top_k=6, temperature=20.0) == {0, 1, 2, 7, 9000, 20_000}
    steps = (torch.arange(20_001) * 7919 % 5).float()
    first = torch.sort(steps, descending=True, stable=True).indices
    for top_k in (3999, 4000, 4001, 12_345, 20_000):
        assert set(tokens("native", steps, 300, top_k=top_k, temperature=50.0)) <= set(first[:top_k].tolist())


def chi_square_limit(freedom: int) -> float:
    """The value that chance exceeds once in 10,000 (Wilson and Hilferty, 1931)."""
    ninth = 2 / (9 * freedom)
    return freedom * (1 - ninth + 3.719 * math.sqrt(ninth)) ** 3


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_tokens_are_drawn_in_proportion(params: dict[str, float]) -> None:
    num = 20_000
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, 2.0, -2.5, 0.7, 1.6, -0.4])
    weights = (logits.double() / params.get("temperature", 1.0)).softmax(0)
    order = weights.argsort(descending=True, stable=True)[: int(params.get("top_k", 10))]
    kept = weights[order] / weights[order].sum()
    order = order[: int((kept.cumsum(0) < params.get("top_p", 1.0) - 1e-9).sum()) + 1]
    order = order[weights[order] >= params.get("min_p", 0.0) * weights.max()]
    expected = weights[order] / weights[order].sum() * num
    counts = Counter(tokens("native", logits, num, **params))
    assert set(counts) == set(order.tolist())
    statistic = sum((counts[int(i)] - float(e)) ** 2 / float(e) for i, e in zip(order, expected, strict=True))
    assert statistic < chi_square_limit(len(order) - 1)


def test_seeds_draw_in_proportion_too() -> None:
    """The same position under consecutive seeds, as the sequences of one request have them."""
    logits, num = torch.tensor([0.0, 1.0, -1.0]), 6000
    rows = [Row(SequenceState(SamplingParams(), 2**40 + i, 3), 17) for i in range(num)]
    counts = Counter(d.token_id for d in Sampler(3, "native", 2).sample(logits.repeat(num, 1), rows))
    expected = (logits.double().softmax(0) * num).tolist()
    assert sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected)) < chi_square_limit(2)


def test_rare_tokens_are_drawn_as_rarely_as_they_should() -> None:
    """Half of the mass lies in 16,384 tokens of 2^-15 each: wins by large noise, which small uniforms make."""
    num, rare = 4000, 2**14
    logits = torch.zeros(rare + 1)
    logits[100] = math.log(rare)
    drawn = torch.tensor(tokens("native", logits, num))
    assert abs(int((drawn == 100).sum()) - num / 2) < 4 * math.sqrt(num) / 2
    others = drawn[drawn != 100]
    assert len(set(others.tolist())) > 0.92 * len(others)
    assert abs(float(others.double().mean()) - rare / 2) < 4 * rare / math.sqrt(12 * len(others))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # of the generator's authors: kat_vectors of Random123
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_known_answers(counter: tuple[int, int], key: tuple[int, int], words: tuple[int, int]) -> None:
    first, second = threefry2x32(key, torch.tensor([counter[0]]), torch.tensor([counter[1]]))
    assert (int(first), int(second)) == words


def native_noise(seed: int, position: int, num_tokens: int) -> Tensor:
    """The noise bits of tokens 0 .. num_tokens - 1 as the kernels compute them, int64 [num_tokens] in [0, 2**32)."""
    padded = math.ceil(num_tokens / 32) * 32
    words = torch.empty(padded, dtype=torch.int32)
    native.lib.sample_noise(seed, position, padded, words.data_ptr())
    return words[:num_tokens].to(torch.int64) & 0xFFFFFFFF


def test_native_noise_is_the_references() -> None:
    assert native_noise(0, 0, 32)[[0, 16]].tolist() == [0x6B200159, 0x99BA4EFE]
    for seed, position in ((0, 0), (1, 2), (2**64 - 1, 2**31 - 1), (0x0370734413198A2E, 5)):
        assert torch.equal(native_noise(seed, position, 5000), noise_words(seed, position, torch.arange(5000)))


def uniforms(seed: int, position: int, num: int = 200_000) -> Tensor:
    return (native_noise(seed, position, num).double() + 0.5) / 2**32


def test_noise_looks_uniform_and_independent() -> None:
    num = 200_000
    u, sigma = uniforms(11, 3), 1 / math.sqrt(200_000)
    assert abs(float(u.mean()) - 0.5) < 4 * sigma * math.sqrt(1 / 12)
    assert abs(float(u.var()) - 1 / 12) < 4 * sigma * math.sqrt(1 / 180)
    bits = native_noise(11, 3, num)
    assert all(abs(float((bits >> i & 1).double().mean()) - 0.5) < 4 * sigma / 2 for i in range(32))
    buckets = torch.bincount((u * 256).long(), minlength=256).double()
    assert float(((buckets - num / 256) ** 2 / (num / 256)).sum()) < chi_square_limit(255)
    neighbours = {
        "next position": uniforms(11, 4),
        "next seed": uniforms(12, 3),
        "seed's high word": uniforms(11 + 2**32, 3),
        "seed and position exchanged": uniforms(3, 11),
        "next token": u.roll(1),
        "other word of the counter": u.roll(16),
        "next counter block": u.roll(32),
    }
    for name, other in neighbours.items():
        correlation = float(((u - 0.5) * (other - 0.5)).mean()) * 12
        assert abs(correlation) < 4 * sigma, name
    noise = gumbel(bits)
    assert abs(float(noise.mean()) - 0.5772157) < 4 * sigma * math.pi / math.sqrt(6)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
