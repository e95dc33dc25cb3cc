"""Layers as native programs: what plain layers give, to the bit but for functions such as silu; a token's bits whatever is beside it; and what cannot
be lowered stays as it is, and says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

pytest.importorskip("quire.tensors.native")

from quire.tensors.models.exact import VECTOR
from quire.tensors.models.geometry import DryRun
from quire.tensors.models.model import CausalModel
from quire.tensors.models.probe import TOLERANCE
from quire.tensors.models.program import _BUFFER, _CODES, _INSTRUCTION, _STEP
from quire.tensors.models.row_by_row import RowByRow
from quire.tensors.native import DTYPE_CODES, lib
from quire.tensors.native_products import NativeProducts
from tests.tensors.checkpoints import VOCAB, one_thread, tiny_model

__all__ = ["one_thread"]

# Norms, rope in halves and in pairs, partial rope, biases, fused projections, scales, windows, products of Conv1D, parallel residuals, LayerNorm.
LOWERED = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
    "stablelm",
    "gpt2",
    "cohere",
]
PLAIN = {"gpt_oss": "reads a tensor that is neither", "mixtral": "writes in place", "deepseek_v3": "in place", "llama4_text": "in place"}
LENGTHS = [19, 1, 7]


def wrapped(family: str, dtype: torch.dtype, *, lower: bool, live: bool = False, threads: int = 2) -> CausalModel:
    model = CausalModel(tiny_model(family, dtype), NativeProducts(threads), name=family, identity="", live=live)
    if lower:
        model.lower()
    return model


def logits(model: CausalModel, lengths: list[int], ids: torch.Tensor) -> torch.Tensor:
    positions = torch.cat([torch.arange(length) for length in lengths])
    return model.forward(RowByRow(lengths), ids, positions, torch.arange(len(ids)))


def tokens(count: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(count))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("family", "dtype"), [(family, torch.bfloat16 if i % 2 else torch.float32) for i, family in enumerate(LOWERED)])
def test_what_plain_layers_give(family: str, dtype: torch.dtype) -> None:
    plain, lowered = (wrapped(family, dtype, lower=lower) for lower in (False, True))
    assert lowered.lowered is not None and (lowered.lowered.num_lowered, lowered.lowered.plain) == (3, {})
    assert lowered.identity != plain.identity
    ids = tokens(sum(LENGTHS))
    expected, got = (logits(model, LENGTHS, ids) for model in (plain, lowered))
    # In fp32 a last bit here and there; in bf16 most of those are rounded away.
    assert float((got - expected).abs().max()) <= (2e-5 if dtype == torch.float32 else TOLERANCE[dtype] / 4) * float(expected.float().std())
    begin = 0
    for length in LENGTHS:
        part = slice(begin, begin + length)
        assert torch.equal(logits(lowered, [length], ids[part]), got[part])
        assert torch.equal(logits(lowered, [1], ids[begin : begin + 1]), got[begin : begin + 1])
        begin += length


@pytest.mark.usefixtures("one_thread")
def test_the_same_bits_for_any_number_of_threads(isa: str) -> None:
    ids = tokens(200)  # enough for rows to be shared
    models = [wrapped("llama", torch.float16, lower=True, threads=threads) for threads in (1, 2)]
    one, two = (model.forward(DryRun(), ids, torch.arange(200), torch.arange(200)) for model in models)
    assert torch.equal(one, two)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", PLAIN)
def test_what_cannot_be_lowered_stays_plain(family: str) -> None:
    models = [wrapped(family, torch.float32, lower=lower) for lower in (False, True)]
    told = models[1].lowered
    assert told is not None and told.num_lowered == 0 and all(PLAIN[family] in why for why in told.plain.values()), told
    assert models[0].identity == models[1].identity
    ids = tokens(20)
    assert torch.equal(*(logits(model, [20], ids) for model in models))


@pytest.mark.usefixtures("one_thread")
def test_changes_of_a_live_model_are_seen() -> None:
    model = wrapped("llama", torch.float32, lower=True, live=True)
    layers, ids = model.transformers_model.model.layers, tokens(9)
    states = [dict(module.__dict__) for module in model.transformers_model.modules()]
    before = logits(model, [9], ids)
    for module, state in zip(model.transformers_model.modules(), states, strict=True):
        assert module.__dict__.keys() == state.keys() and all(module.__dict__[name] is value for name, value in state.items())
    with torch.no_grad():
        layers[0].mlp.up_proj.weight.mul_(2)
    layers[1].input_layernorm.weight = torch.nn.Parameter(torch.full_like(layers[1].input_layernorm.weight, 0.5))
    changed = logits(model, [9], ids)
    plain = CausalModel(model.transformers_model, NativeProducts(1), name="", identity="", live=True)
    assert not torch.equal(before, changed) and (changed - logits(plain, [9], ids)).abs().max() < 1e-4 * changed.std()
    handle = layers[2].mlp.register_forward_hook(lambda module, args, output: output * 0)
    assert model.changed
    assert torch.equal(logits(model, [9], ids), logits(plain, [9], ids)) and not torch.equal(logits(model, [9], ids), changed)
    handle.remove()
    assert torch.equal(logits(model, [9], ids), changed)
    layers[0].mlp.up_proj.weight = torch.nn.Parameter(layers[0].mlp.up_proj.weight.detach().double())
    with pytest.raises(RuntimeError, match="^weight of layer 0 is now Parameter .* torch.float64, which it was not lowered for"):
        logits(model, [9], ids)


def test_an_owners_modules_are_left_alone() -> None:
    class Mine(torch.nn.Linear):
        pass

    owned = tiny_model("llama")
    owned.model.layers[1].mlp.up_proj = Mine(64, 100, bias=False)
    owned.model.layers[2].mlp.register_forward_hook(lambda *_: None)
    model = CausalModel(owned, NativeProducts(1), name="", identity="", live=True)
    model.lower()
    assert model.lowered is not None and model.lowered.num_lowered == 1
    assert "is its owner's code, or wrapped" in model.lowered.plain["LlamaDecoderLayer"]


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_program_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_CODES, "silu", _CODES["tanh"])
    model = wrapped("llama", torch.float32, lower=True)
    assert model.lowered is not None and model.lowered.plain == {"LlamaDecoderLayer": "its program does not give what it gives"}


def test_code_that_counts_on_tokens_or_values_is_not_lowered() -> None:
    def of(change: Callable[[torch.Tensor], torch.Tensor]) -> str:
        model = tiny_model("llama")
        model.model.layers[0].mlp.forward = lambda x: change(x)
        wrapped = CausalModel(model, NativeProducts(1), name="", identity="", live=False)
        wrapped.lower()
        assert wrapped.lowered is not None and wrapped.lowered.num_lowered == 2  # the other layers
        return wrapped.lowered.plain["LlamaDecoderLayer"]

    assert "another number of tokens" in of(lambda x: x * x.shape[1])
    assert "depends on the values" in of(lambda x: x * 2 if x.sum() > 0 else x)
    assert "cumsum" in of(lambda x: x.cumsum(1))
    outside = torch.ones(64)
    assert "neither its own nor given" in of(lambda x: x * outside)
    assert "flip" in of(lambda x: x.flip(1))


OPERATORS: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "add": (torch.add, 0), "sub": (torch.sub, 0), "mul": (torch.mul, 0), "div": (torch.div, 0), "rsqrt": (lambda a, b: a.abs().rsqrt(), 0),
    "tanh": (lambda a, b: a.tanh(), 4), "sigmoid": (lambda a, b: a.sigmoid(), 4), "silu": (lambda a, b: functional.silu(a), 4),
    "gelu": (lambda a, b: functional.gelu(a), 8), "gelu_tanh": (lambda a, b: functional.gelu(a, approximate="tanh"), 8),
    "relu": (lambda a, b: a.relu(), 0),
}  # fmt: skip


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("op", OPERATORS)
def test_operators(isa: str, op: str, dtype: torch.dtype) -> None:
    torch_op, ulp = OPERATORS[op]
    random = torch.Generator().manual_seed(3)
    for n in (64, 5, 130):
        a, b = (torch.randn(7, n, generator=random).mul(3).to(dtype) for _ in range(2))
        a = a.abs() if op == "rsqrt" else a
        got, expected = run_one(op, a, b), torch_op(*(functional.pad(x, (0, -n % VECTOR), value=1.0) for x in (a, b)))[:, :n]
        if ulp == 0:
            assert torch.equal(got, expected)
        # Where 1 + erf or 1 + tanh cancels, it is the last bits of 1 that are shared.
        error = (got.float() - torch_op(a.double(), b.double()).float()).abs()
        assert (error <= ulp * torch.finfo(torch.float32).eps * a.float().abs().clamp_min(1) + torch.finfo(dtype).eps * expected.float().abs()).all()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch may add in another order")
def test_means_add_in_the_order_of_torch(isa: str) -> None:
    random = torch.Generator().manual_seed(4)
    for n in (8, 15, 16, 63, 64, 65, 100, 128, 600, 1024, 1100, 2048, 3072, 4096, 5120, 8192, 20000):
        a = torch.randn(3, n, generator=random)
        assert torch.equal(run_one("mean", a, a)[:, :1], a.mean(-1, keepdim=True)), n


def run_one(op: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One operator over rows a [R,n] and b [R,n]; all of them in one call, and the last alone with the same bits."""
    n, code = a.shape[1], DTYPE_CODES[a.dtype]
    row, none, wide = (0, 0, 0, 1), (0, 0, 0, 0), -(-n // 16) * 16
    at = [(wide * i, 0, 0, 0 if op == "mean" and i == 2 else 1) for i in range(3)]
    packed = b"".join(
        _INSTRUCTION.pack(*x)
        for x in (
            (_CODES["load"], code, 1, 1, n, 0, 0.0, *at[0], *none * 3),
            (_CODES["load"], code, 1, 1, n, 1, 0.0, *at[1], *none * 3),
            (_CODES[op], code, 1, 1, n, 0, 0.0, *at[2], *at[0], *at[1], *none),
            (_CODES["store"], code, 1, 1, n, 2, 0.0, *none, wide * 2, *row[1:], *none * 2),
        )
    )
    size = a.element_size()
    program = lib.Program(packed, _BUFFER.pack(n * size, code, -1) * 3, _STEP.pack(0, 0, 4, *(0,) * 10), wide * 3, 1)
    out, last = torch.zeros_like(a), torch.zeros_like(a[:1])
    program.run(0, 1, len(a), [a.data_ptr(), b.data_ptr(), out.data_ptr()], 1)
    program.run(0, 1, 1, [a[-1].data_ptr(), b[-1].data_ptr(), last.data_ptr()], 1)
    compared = slice(0, 1) if op == "mean" else slice(None)
    assert torch.equal(last[0, compared], out[-1, compared])
    return out


def test_programs_are_checked() -> None:
    row, none = (0, 0, 0, 1), (0, 0, 0, 0)
    step, buffer = _STEP.pack(0, 0, 1, *(0,) * 10), _BUFFER.pack(64, 0, -1)

    def one(op: int = _CODES["copy"], n: int = 16, buffer: int = 0) -> bytes:
        return _INSTRUCTION.pack(op, 0, 1, 1, n, buffer, 0.0, *row, *row, *none * 2)

    lib.Program(one(), buffer, step, 16, 0)
    for args, why in (
        ((one()[:-1], buffer, step, 16, 0), "whole RowInstruction"),
        ((one(op=len(_CODES)), buffer, step, 16, 0), "not known"),
        ((one(n=17), buffer, step, 16, 0), "outside of scratch"),
        ((one(op=_CODES["load"], buffer=1), buffer, step, 16, 0), "buffer is out of range"),
        ((one(), buffer, _STEP.pack(0, 0, 2, *(0,) * 10), 16, 0), "instructions are out of range"),
        ((one(), buffer, _STEP.pack(1, *(9,) * 12), 16, 0), "product's buffer"),
    ):
        with pytest.raises(ValueError, match=why):
            lib.Program(*args)
    with pytest.raises(ValueError, match="one address"):
        lib.Program(one(), buffer, step, 16, 0).run(0, 1, 1, [], 1)
