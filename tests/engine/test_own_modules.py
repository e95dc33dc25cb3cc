"""Modules of a live model's owner, who multiplies as he likes: the same bits in any company, whatever they do at first and whenever they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from quire import LLM, SamplingParams
from quire.errors import UnsupportedModelError
from quire.tensors.models.exact import ExactMode
from quire.tensors.models.model import CausalModel
from quire.tensors.models.probe import probe
from quire.tensors.native_products import NativeProducts
from tests.tensors.checkpoints import FAMILIES, tiny_model

H = 64
Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
PROMPTS = [[3 + (i * i * 7 + 3 * i + 11 * seed) % 500 for i in range(count)] for seed, count in enumerate((1, 2, 5, 17, 33, 70))]
PARAMS = SamplingParams(max_tokens=3, temperature=0.0, logprobs=0, prompt_logprobs=0, ignore_eos=True)

# x [1, T, 64] with w [64, 64] or w3 [4, 64, 16] -> [1, T, 64]
SERVED: dict[str, Multiply] = {
    "@": lambda x, w, w3: x @ w,
    "@ transposed": lambda x, w, w3: x @ w.T,
    "weight on the left": lambda x, w, w3: (w @ x.mT).mT,
    "matmul": lambda x, w, w3: torch.matmul(x, w),
    "linalg": lambda x, w, w3: torch.linalg.matmul(x, w),
    "mm": lambda x, w, w3: x[0].mm(w)[None],
    "linear": lambda x, w, w3: functional.linear(x, w),
    "inner": lambda x, w, w3: torch.inner(x, w),
    "addmm": lambda x, w, w3: torch.addmm(torch.ones(H), x[0], w)[None],
    "bmm": lambda x, w, w3: torch.bmm(x.expand(4, -1, -1), w3).transpose(0, 1).reshape(x.shape),
    "baddbmm": lambda x, w, w3: torch.baddbmm(torch.ones(4, 1, 1), x.expand(4, -1, -1), w3).transpose(0, 1).reshape(x.shape),
    "einsum": lambda x, w, w3: torch.einsum("btk,kn->btn", x, w),
    "einsum heads": lambda x, w, w3: torch.einsum("btk,hkd->bthd", x, w3).reshape(x.shape),
    "einsum of heads": lambda x, w, w3: torch.einsum("bthd,hkd->btk", x.view(1, -1, 4, 16), w3),
    "einsum ellipsis": lambda x, w, w3: torch.einsum("nk, ...k -> ...n", w, x),
    "einsum of tokens": lambda x, w, w3: torch.einsum("bthd,bthe->btde", x.view(1, -1, 8, 8), x.view(1, -1, 8, 8)).reshape(x.shape),
    "low rank": lambda x, w, w3: (x @ w[:, :3]) @ w[:3] * 0.01,
    "merged": lambda x, w, w3: functional.linear(x, w + w[:, :3] @ w[:3]),
}
REFUSED: dict[str, tuple[str, Multiply]] = {
    "addbmm": ("addbmm", lambda x, w, w3: torch.addbmm(torch.zeros(x.shape[1], 16), x.expand(4, -1, -1), w3).repeat(1, 4)[None]),
    "bilinear": ("_trilinear", lambda x, w, w3: functional.bilinear(x[..., :8], x[..., :8], w.view(H, 8, 8))),
    "convolution": ("convolution", lambda x, w, w3: functional.conv1d(x.mT, w[:, :, None]).mT),
    "out": ("mm", lambda x, w, w3: torch.mm(x[0], w, out=torch.empty(x.shape[1], H))[None]),
    "in place": ("addmm_", lambda x, w, w3: torch.zeros(x.shape[1], H).addmm_(x[0], w)[None]),
    "behind torch's back": ("mm", lambda x, w, w3: torch.ops.aten.mm(x[0], w)[None]),
}


class Own(nn.Module):
    """0.1 x + `multiply`(x, weights), with the weights where `place` says; a switch may leave the product out."""

    def __init__(self, multiply: Multiply, place: str = "parameters") -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        weights = [torch.randn(H, H, generator=random) / 4, torch.randn(4, H, 16, generator=random) / 4]
        self.multiply, self.place, self.on = multiply, place, True
        if place == "parameters":
            self.w, self.w3 = map(nn.Parameter, weights)
        elif place == "a list":
            self.held = nn.ParameterList(weights)
        elif place == "a linear layer":
            self.layer = nn.Linear(H, H, bias=False)
            self.layer.weight.data.copy_(weights[0])
        else:
            self.plain = weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.on:
            return 0.1 * x
        if self.place == "parameters":
            given = [self.w, self.w3]
        elif self.place == "a linear layer":
            given = [self.layer.weight, self.layer.weight.view(4, H, 16)]
        else:
            given = list(self.held) if self.place == "a list" else self.plain
        return 0.1 * x + self.multiply(x, *given)


def owned(multiply: Multiply, place: str = "parameters") -> PreTrainedModel:
    model = tiny_model("llama", num_hidden_layers=2)
    model.model.layers[1].mlp = Own(multiply, place)
    return model


def opened(model: PreTrainedModel) -> CausalModel:
    return CausalModel(model, NativeProducts(2), name="", identity="", live=True)


def bits(llm: LLM, prompts: list[list[int]]) -> list[object]:
    outputs = llm.generate(prompts, PARAMS)
    return [(output.raise_for_error().prompt_logprobs, output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


def alone(llm: LLM) -> list[object]:
    return [bits(llm, [prompt])[0] for prompt in PROMPTS]


def promised(model: PreTrainedModel) -> list[object]:
    """Alone, which is as together, in another order, and a chunk of seven tokens at a time."""
    with LLM(model, page_size=16, cache_bytes=2**24) as llm:
        expected = alone(llm)
        assert bits(llm, PROMPTS) == expected, "together"
    with LLM(model, page_size=16, cache_bytes=2**24, max_tokens_per_step=7) as llm:
        assert bits(llm, PROMPTS[::-1])[::-1] == expected, "in chunks"
    return expected


def anew(model: PreTrainedModel, then: Callable[[LLM], None] = lambda llm: None) -> list[object]:
    """What an engine opened now gives, alone and together in another order, a chunk of seven tokens at a time: of whoever compares that with what an
    open one gives, which has no chunks, a third engine would tell no more. `then` is given this one.
    """
    with LLM(model, page_size=16, cache_bytes=2**24, max_tokens_per_step=7) as llm:
        given = alone(llm)
        assert bits(llm, PROMPTS[::-1])[::-1] == given, "together"
        then(llm)
    return given


@pytest.mark.parametrize("place", ["parameters", "a list", "a linear layer", "plain tensors"])
def test_a_product_is_the_same_in_any_company(place: str) -> None:
    promised(owned(SERVED["@"], place))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SERVED)
def test_every_product_served_is(name: str) -> None:
    x = torch.randn(1, 40, H, generator=torch.Generator().manual_seed(4))
    own = Own(SERVED[name])
    with torch.no_grad():
        plain = own(x)
        with ExactMode(NativeProducts(2)):
            exact = own(x)
            for part in (slice(0, 1), slice(3, 5), slice(7, 24), slice(1, 40)):
                assert torch.equal(own(x[:, part]), exact[:, part])
    assert plain.shape == x.shape and (exact - plain).abs().max() < 1e-4 * plain.std()
    served = opened(owned(SERVED[name]))
    assert probe(served).everywhere is False and served.strays() == []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_has_any_that_bits_do_not_show(family: str) -> None:
    """So of a checkpoint of one, whose weights and code stay what they are, the probe does not ask."""
    served = CausalModel(tiny_model(family), NativeProducts(2), name="", identity="", live=False)
    probe(served)
    assert not served.owned and served.strays() == []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", ["parameters", "plain tensors"])
def test_others_are_refused_by_name(name: str, place: str) -> None:
    operator, multiply = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=f"tokens are multiplied by operators of torch .*Own calls {operator}[;)]"):
        probe(opened(owned(multiply, place)))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["in place", "convolution"])
def test_what_only_weights_go_into_is_not(name: str) -> None:
    """Products of weights alone have the same rows in every step."""
    probe(opened(owned(lambda x, w, w3: x @ REFUSED[name][1](w[None], w, w3)[0])))


def nothing_at_first(model: PreTrainedModel) -> Iterator[None]:
    """As an adapter begins: zeros, that show in no bit of any logit."""
    weights = [*model.model.layers[1].mlp.parameters()]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
        yield
        for weight, was in zip(weights, kept, strict=True):
            weight.copy_(was)


def switched_on_later(model: PreTrainedModel) -> Iterator[None]:
    model.model.layers[1].mlp.on = False
    yield
    model.model.layers[1].mlp.on = True


def put_in_later(model: PreTrainedModel) -> Iterator[None]:
    own, model.model.layers[1].mlp = model.model.layers[1].mlp, nn.Identity()
    yield
    model.model.layers[1].mlp = own


def hooked_in_later(model: PreTrainedModel) -> Iterator[None]:
    own, model.model.layers[1].mlp = model.model.layers[1].mlp, model.model.layers[0].mlp
    yield
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: out + own(args[0]))


def of_another_class_later(model: PreTrainedModel) -> Iterator[None]:
    """As FSDP makes a module its own, in place."""

    class Doubled(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(x)
            return out * 2

    yield
    model.model.layers[1].mlp.__class__ = Doubled


@pytest.mark.parametrize("place", ["parameters", "a list"])
@pytest.mark.parametrize("change", [nothing_at_first, switched_on_later, put_in_later, hooked_in_later, of_another_class_later])
def test_an_open_engine_gives_what_a_fresh_one_does(change: Callable[[PreTrainedModel], Iterator[None]], place: str) -> None:
    model = owned(SERVED["@"], place)
    changing = change(model)
    next(changing)
    with LLM(model, page_size=16, cache_bytes=2**24) as llm:
        before = bits(llm, PROMPTS)
        next(changing, None)
        assert alone(llm) == bits(llm, PROMPTS) == anew(model) != before
        unscored = SamplingParams(max_tokens=1)
        hits = [llm.generate([PROMPTS[-1]], unscored)[0].receipt.cached_tokens for _ in range(2)]
        assert hits == [0, 69], "nothing is forgotten without a change"


def test_what_is_put_in_later_may_be_refused_too_and_taken_out_again() -> None:
    model = owned(SERVED["@"])
    with LLM(model, page_size=16, cache_bytes=2**24) as llm:
        before = bits(llm, PROMPTS)
        mine, model.model.layers[1].mlp = model.model.layers[1].mlp, Own(REFUSED["addbmm"][1])
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match="Own calls addbmm"):
                llm.generate(PROMPTS, PARAMS)
            with pytest.raises(UnsupportedModelError, match="Own calls addbmm"):
                llm.pin(PROMPTS[-1])
        model.model.layers[1].mlp = mine
        assert bits(llm, PROMPTS) == before
        model.lm_head = nn.Linear(H, 500, bias=False)
        with pytest.raises(UnsupportedModelError, match="its vocabulary, its width or .* is another: open it anew"):
            llm.generate(PROMPTS, PARAMS)


def test_compiled_layers_see_no_other_modules() -> None:
    model = owned(SERVED["@"])
    with LLM(model, cache_bytes=2**24) as llm:
        llm._built.model.compiled = True  # without the half minute that it takes
        assert llm.generate(PROMPTS[-1:], PARAMS)[0].error is None
        model.model.layers[1].mlp = Own(SERVED["@"])
        with pytest.raises(UnsupportedModelError, match="other modules than those compiled: undo it, or open it anew"):
            llm.generate(PROMPTS[-1:], PARAMS)
