"""What is changed on a model for the time of one forward, and put back after it.

The model never knows it is served: a trainer may run its own forward and backward on the same live model between two of ours, so nothing of Quire
stays on it. Invariant: after `installed()` has been left, also by an exception, every changed attribute is as it was before.

The set of changes is found once; it is for the caller to make another when a live model is made of other modules (`CausalModel.take_again`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from quire.tensors.attention.base import Products, RowReductions
from quire.tensors.models import mixing
from quire.tensors.models.calls import Change, changed, is_foreign
from quire.tensors.models.exact import VECTOR, ExactMode, in_whole_vectors
from quire.tensors.models.hook import NAME, QueryScale
from quire.tensors.packed import PackedWeight

Forward = Callable[..., Any]

_EXACT = {"linear", "relu", "relu2", "relu6", "leaky_relu", "prelu"}  # invariant as they are
# Elementwise activations that are more than a comparison and a product. nn.Softmax, nn.GLU, nn.PReLU are not elementwise and not here.
_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    *(cast(type[nn.Module], entry[0] if isinstance(entry, tuple) else entry) for name, entry in ACT2CLS.items() if name not in _EXACT),
    nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid,
    nn.Tanhshrink, nn.Softsign,
)  # fmt: skip


class Surgery:
    """The changes one model needs: forwards of modules, implementation names in configs, training flags (of a live model).

    Attributes: `mode`, `query_scales` (layer_idx -> Llama 4's query temperature), `chunks` (layer_idx -> chunk, filled by the first forward).
    """

    def __init__(self, model: nn.Module, products: Products, *, live: bool, whole_vectors: bool = True, rows: RowReductions | None = None) -> None:
        """`whole_vectors`: whether elementwise functions are given whole vectors; `rows`: what sums within a row go to (see exact.py)."""
        self._products = products
        self.mode = ExactMode(products, whole_vectors=whole_vectors, rows=rows)
        self.query_scales: dict[int, QueryScale] = {}
        self.chunks: dict[int, int] = {}
        self._forwards: list[Change] = []
        self._settings: list[Change] = []
        self._states = [module.__dict__ for module in model.modules()] if live else []
        for module in model.modules():
            forward = _product_of(module, products) or _mixing_of(module)
            if forward is None and rows is None:  # with them the whole forward is in exact mode, and in no need of whole vectors
                forward = _forward_of(module, self.mode, live)
            if forward is not None and (whole_vectors or not isinstance(module, _ACTIVATIONS)):
                self._forwards.append((module.__dict__, "forward", forward))
            self._take_over_query_scale(module)
            if rows is not None and hasattr(module, "warn_if_padding_and_no_attention_mask"):  # to look at the ids is to wait for the device
                self._settings.append((module.__dict__, "warn_if_padding_and_no_attention_mask", lambda *_: None))
        for config in _configs(model):
            self._settings.append((config.__dict__, "_attn_implementation_internal", NAME))
            # The other experts implementations choose between kernels by the batch; the eager one calls plain products, expert by expert.
            self._settings.append((config.__dict__, "_experts_implementation_internal", "eager"))

    def replace(self, module: nn.Module, forward: Forward) -> None:
        """From now on `module` as a whole gets `forward`, and nothing inside it is changed."""
        inside = {id(inner.__dict__) for inner in module.modules()}
        self._forwards = [change for change in self._forwards if id(change[0]) not in inside]
        self._forwards.append((module.__dict__, "forward", forward))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Everything in place inside, everything as before outside."""
        with changed(self._settings), changed(self._forwards), self._in_eval_mode():
            yield

    @contextmanager
    def unpatched(self, multiplied: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Inside, the model is in eval mode, with its own plain code for attention and experts, and nothing else is changed.

        multiplied: modules in which linear layers take our products all the same.
        """
        changes: list[Change] = [(state, name, "eager") for state, name, _ in self._settings if name.endswith("_implementation_internal")]
        for module in {inner for outer in multiplied for inner in outer.modules()}:
            forward = _product_of(module, self._products)
            if forward is not None:
                changes.append((module.__dict__, "forward", forward))
        with changed(changes), self._in_eval_mode():
            yield

    def _in_eval_mode(self) -> AbstractContextManager[None]:
        # Each module by itself: parts of a model may be frozen in eval mode.
        return changed([(state, "training", False) for state in self._states if state["training"]])

    def _take_over_query_scale(self, module: nn.Module) -> None:
        # Llama 4 counts positions from the start of the batch, which is not the start of a sequence; the hook uses the true ones.
        if getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale") and not getattr(module, "use_rope", True):
            attention: Any = module
            self.query_scales[int(attention.layer_idx)] = QueryScale(float(attention.floor_scale), float(attention.attn_scale))
            self._settings.append((module.__dict__, "attn_temperature_tuning", False))


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Every config object that a module reads, with the configs inside it, once each. Modules may hold copies of the model's own."""
    found: dict[int, PreTrainedConfig] = {}

    def add(config: PreTrainedConfig) -> None:
        if id(config) not in found:
            found[id(config)] = config
            for inner in list(config.__dict__.values()):
                if isinstance(inner, PreTrainedConfig):
                    add(inner)

    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, PreTrainedConfig):
                add(value)
    return list(found.values())


def _product_of(module: nn.Module, products: Products) -> Forward | None:
    """The forward of a layer that is one product, for the time of ours."""
    if "forward" in module.__dict__:  # put there by a library that wraps modules one by one; what it wraps is its own affair
        return None
    if is_plain(module, nn.Linear):
        return _linear(module, products)
    return _conv1d(module, products) if is_plain(module, Conv1D) else None


def _mixing_of(module: nn.Module) -> Forward | None:
    """The forward of a module that mixes tokens in another way than attention, for the time of ours."""
    return mixing.forward_of(module) if "forward" not in module.__dict__ and mixing.convolves(module) else None


def _forward_of(module: nn.Module, mode: ExactMode, live: bool) -> Forward | None:
    """The forward that any other module gets, or None if its own will do."""
    if isinstance(module, _ACTIVATIONS):
        return _activation(module)
    if is_rotary(module):
        return _rotary(module)
    if live and is_foreign(module):  # it may do tomorrow what it does not do today
        return _in_mode(module, mode)
    if not isinstance(module, nn.Embedding) and any(weight is not None and weight.dim() > 1 for weight in module._parameters.values()):
        return _in_mode(module, mode)
    return None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module computes exactly what `kind` does: a subclass may quantise, a tensor subclass that is not ours may too."""
    weight = module._parameters.get("weight")
    return isinstance(module, kind) and type(module).forward is kind.forward and type(weight) in (nn.Parameter, torch.Tensor, PackedWeight)


def is_rotary(module: nn.Module) -> bool:
    """Whether the module makes rope's tables: frequencies in a buffer (one a layer type in some families), and forward(x, position_ids, ...)."""
    if not any(name.endswith("inv_freq") for name in module._buffers):
        return False
    return list(inspect.signature(module.forward).parameters)[1:2] == ["position_ids"]


# Weights are read from the module at every call: a trainer may have put others in their place.
def _linear(module: nn.Module, products: Products) -> Forward:
    linear = products.linear
    parameters: Any = module._parameters

    def forward(input: torch.Tensor) -> torch.Tensor:
        return linear(input, parameters["weight"], parameters["bias"])

    return forward


def _conv1d(module: nn.Module, products: Products) -> Forward:
    matmul = products.matmul
    parameters: Any = module._parameters

    def forward(x: torch.Tensor) -> torch.Tensor:
        return matmul(x, parameters["weight"], parameters["bias"])

    return forward


def _activation(module: nn.Module) -> Forward:
    original = module.forward

    def forward(input: torch.Tensor) -> torch.Tensor:
        return in_whole_vectors(original, input)

    return forward


def _rotary(module: nn.Module) -> Forward:
    """Positions [..., T] padded to whole vectors; tables [..., T, D] cut back. Once a step, not once a layer."""
    original = module.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count = position_ids.shape[-1]
        if count % VECTOR == 0:
            return original(x, position_ids, *args, **kwargs)
        tables = original(x, functional.pad(position_ids, (0, -count % VECTOR)), *args, **kwargs)
        if isinstance(tables, torch.Tensor):
            return tables[..., :count, :]
        return tuple(table[..., :count, :] for table in tables)

    return forward


def _in_mode(module: nn.Module, mode: ExactMode) -> Forward:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return original(*args, **kwargs)

    return forward


def without_autocast(kind: str) -> torch.autocast | nullcontext[None]:
    """A trainer's autocast would change the dtype of products behind our back; switching it off costs too much to do when it is not on."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
