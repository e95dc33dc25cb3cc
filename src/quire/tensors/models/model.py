"""A causal language model as the engine sees it: a forward over a packed ragged batch whose attention is the caller's.

Shape letters: T packed tokens of a step, R rows of logits, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quire.errors import EngineDeadError, QuireError, UnsupportedModelError
from quire.tensors.attention.base import Products, RowReductions
from quire.tensors.device import CPU, Device
from quire.tensors.models.calls import is_foreign, is_wrapped
from quire.tensors.models.exact import VECTOR
from quire.tensors.models.facts import check_context, context_len, eos_token_ids, ordinary_tokens, text_config, weight_bytes
from quire.tensors.models.form import Form
from quire.tensors.models.geometry import DryRun, LayerGeometry, NoAttention, NoProducts, check_layers, check_vocabulary
from quire.tensors.models.hidden import HiddenRows, kept, output_layer, width
from quire.tensors.models.hook import AttentionStep, Running, running
from quire.tensors.models.precise import WidenedProducts, WithFloatActivations
from quire.tensors.models.refusals import misfits, refuse_model, told_misfits
from quire.tensors.models.strays import Finder, OverlookedProducts, differing, of_products, of_products_and_sums
from quire.tensors.models.surgery import Surgery, without_autocast
from quire.tensors.models.turns import in_turn, turn_of

if TYPE_CHECKING:
    from quire.tensors.models.lowered import LoweredLayers
    from quire.tensors.models.recording import Recording

MAX_PASSED = 16  # codes of a live model that are known to have passed the probe


class CausalModel:
    """One transformers model, run packed. Use from one thread, with one torch thread, and never while a trainer's own forward runs.

    Attributes:
        name: hub id, folder, or the class of a live model. model_type: the config's.
        dtype: of the weights. vocab_size: rows of the logits. context_len: the longest position + 1 that is served.
        eos_token_ids: of the config and the generation config.
        layers: one `LayerGeometry` per attention layer, in order.
        identity: changes whenever the logits may: weights, config, dtype, versions. A live model's is new each time it is wrapped.
        hidden_size: of the final hidden states, None where the model has no plain output layer to take them from.
        weight_bytes: of parameters and buffers, shared ones once. live: whether the caller owns the model.
        owned: whether any of its code is neither torch's nor transformers', or may become so.
        everywhere: whether the whole forward runs in exact mode, not only the modules that need it (see probe.py): on an accelerator, always.
        compiled: whether its layers are compiled code (see compiled.py), which gives other bits than plain ones do.
        lowered: its layers that run as native programs (see lowered.py), which gives other bits too; None before `lower()`.
        turn: to be taken for what is more than a forward, as others may serve the same live model (see turns.py).
        where: the device of all that it is given and gives. rows: what adds within a row, None where torch's own sums look at one row alone.

    Raises UnsupportedModelError, with the reason, for a model that cannot be served.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        products: Products,
        *,
        name: str,
        identity: str,
        live: bool,
        device: Device = CPU,
        rows: RowReductions | None = None,
    ) -> None:
        refuse_model(model, device.where, live=live)
        config = text_config(model)
        self.where, self.rows, self.turn = device.where, rows, turn_of(model)
        self.name, self.identity, self.live = name, identity, live
        self.model_type: str = model.config.model_type
        self.dtype: torch.dtype = model.dtype
        self.eos_token_ids = eos_token_ids(model)
        self.context_len = context_len(config)
        self.weight_bytes = weight_bytes(model)
        self.compiled = self._lowers = False
        self._model: PreTrainedModel | None = model
        self._products = products
        self.lowered: LoweredLayers | None = None
        self._passed: dict[object, bool] = {}  # code that has been probed -> whether it had to run in exact mode everywhere
        self._tokens_multiple = 1
        self._read(model)
        self.hidden_size = width(self._output_layer)
        self.vocab_size, self.layers = self._shapes(model)
        self._form = Form(model) if live else None

    def _read(self, model: PreTrainedModel) -> None:
        """Find what is to be changed on the model for the time of a forward."""
        self._surgery: Surgery | None = Surgery(model, self._products, live=self.live, rows=self.rows)
        self._output_layer = output_layer(model)
        self._takes_logits_at = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        # A hook may do tomorrow what it does not do today, and there is no telling.
        self.everywhere = self.rows is not None or (self.live and any(map(is_wrapped, model.modules())))
        self.owned = self.live or any(map(is_foreign, model.modules()))

    def _shapes(self, model: PreTrainedModel) -> tuple[int, tuple[LayerGeometry, ...]]:
        """(vocabulary, geometry of every layer), from a forward of one token."""
        dry = DryRun()
        self._logits_multiple = 1
        try:
            with self.with_products(NoProducts()):
                vocab_size = self.forward_of(dry, num_tokens=1, num_rows=1).shape[1]
        except QuireError:
            raise
        except Exception as error:  # a model's own code may raise anything
            # Code of its own may not be ready to do without the mask that we do not build.
            what = "its forward fails on one token" if dry.layers else "no layer had called transformers' attention interface when its forward failed"
            shapes = f"; it has weights of other shapes than its config: {told_misfits(found)}" if (found := misfits(model)) else ""
            raise UnsupportedModelError(f"{self.model_type}: {what}: {type(error).__name__}: {error}{shapes}") from error
        if getattr(text_config(model), "final_logit_softcapping", None) and self.rows is None:  # tanh over R * V elements, in whole vectors alone
            self._logits_multiple = VECTOR // math.gcd(VECTOR, vocab_size)
        check_vocabulary(vocab_size, model)
        return vocab_size, check_layers(dry.layers, model)

    @property
    @in_turn
    def changed(self) -> bool:
        """Whether a live model is other than when it was last taken (see form.py). Ask between forwards: in one it is not as its owner made it."""
        return self.live and (self._form is None or not self._form.holds())

    def read_ends(self) -> None:
        """Take the end-of-sequence ids that are named now: trainers set them in a config, and the generation config is no part of the form."""
        self.eos_token_ids = eos_token_ids(self._open()[0])

    def take_again(self) -> bool:
        """Take a live model as it is made now. Whether its code is other than any that has passed the probe, so that it must be probed.

        Raises UnsupportedModelError for a change that only a new engine can take. Until a call succeeds, or the probe, it counts as changed.
        """
        model, _ = self._open()
        made_so = self._form is not None and self._form.is_made_so()
        if self.compiled and not made_so:  # until that is undone, so the form stays
            raise UnsupportedModelError(f"{self.model_type}: compile=True: it is made of other modules than those compiled: undo it, or open it anew")
        self._form = None
        if not made_so:
            self._take(model)
        form = Form(model)
        if form.code not in self._passed:
            return True
        self.everywhere, self._form = self._passed[form.code], form
        return False

    def _take(self, model: PreTrainedModel) -> None:
        self.lowered = None
        refuse_model(model, self.where, live=self.live)
        check_context(model, self.context_len)
        self._read(model)
        if (model.dtype, *self._shapes(model), width(self._output_layer)) != (self.dtype, self.vocab_size, self.layers, self.hidden_size):
            what = "its dtype, its vocabulary, its width or what its layers keep of a token is another"
            raise UnsupportedModelError(f"{self.model_type}: {what}: open it anew")
        if self._lowers:
            self._lower()

    def passed(self) -> None:
        """Note that the model, made as it is now, has passed the probe."""
        if self.live:
            if len(self._passed) == MAX_PASSED:
                self._passed.clear()
            self._form = Form(self._open()[0])
            self._passed[self._form.code] = self.everywhere

    @in_turn
    def forward(
        self, step: AttentionStep, input_ids: torch.Tensor, positions: torch.Tensor, logits_at: torch.Tensor, hidden: HiddenRows | None = None
    ) -> torch.Tensor:
        """Run the packed tokens once; attention is `step`'s.

        input_ids, positions: int64 [T], T >= 1; positions are within each sequence. logits_at: int64 [R], places in the packed batch, R >= 0.
        hidden: final hidden states that are wanted too, of a model with a `hidden_size`.
        Returns logits [R, V], contiguous, in the dtype the model gives them. They may be inference tensors: change them in place only under
        torch.inference_mode. A row's bits depend on its own sequence alone, as far as `step` and the products keep to that.

        Whatever the model raises passes through, with the model as it was before.
        """
        if hidden is not None and not hidden.at.shape[0]:
            hidden = None
        native = self.lowered.replay.native if self.lowered is not None else None
        if native is not None and step.of_programs is not None and hidden is None:
            return native(step.of_programs, input_ids, positions, logits_at)
        num_rows = logits_at.shape[0]
        if num_rows % self._logits_multiple:
            logits_at = torch.cat([logits_at, logits_at[-1:].expand(-num_rows % self._logits_multiple)])
        padded = positions
        if padding := -positions.shape[0] % self._tokens_multiple:
            input_ids, padded = (torch.cat([x, x[-1:].expand(padding)]) for x in (input_ids, positions))
        inputs: dict[str, Any] = {"input_ids": input_ids.unsqueeze(0), "position_ids": padded.unsqueeze(0), "use_cache": False}
        keeping: Callable[[], AbstractContextManager[None]] = nullcontext
        if hidden is not None:
            assert self._output_layer is not None
            if self._takes_logits_at:
                keeping = partial(kept, self._output_layer, hidden, slice(len(logits_at), None), slice(len(logits_at)))
                logits_at = torch.cat([logits_at, hidden.at])
            else:
                keeping = partial(kept, self._output_layer, hidden, hidden.at, slice(None))
        if self._takes_logits_at:
            inputs["logits_to_keep"] = logits_at
        model, surgery = self._open()
        lowered = self.lowered if self.lowered is not None and (not self.live or self.lowered.intact()) else None
        if lowered is not None:
            surgery = lowered.surgery

        def own(watching: AbstractContextManager[None] | None = None) -> torch.Tensor:
            with surgery.installed(), surgery.mode if self.everywhere else nullcontext(), keeping(), watching or nullcontext():
                logits: torch.Tensor = model(**inputs).logits
            return logits

        # Buffers a live model makes lazily in a forward must serve its trainer's backward later, which inference tensors cannot.
        with (
            torch.inference_mode(not self.live),
            torch.no_grad(),
            without_autocast(self.where.type),
            running(Running(step, positions, surgery.mode, surgery.query_scales, surgery.chunks, padded)),
        ):
            if lowered is None:
                logits = own()[0]
            elif self.everywhere or hidden is not None:
                logits = lowered.chains.run(own)[0]
            else:
                logits = lowered.replay.run(own, inputs)[0]
        if not self._takes_logits_at:
            logits = logits[logits_at]
        return logits[:num_rows].contiguous()

    def forward_of(self, step: AttentionStep, num_tokens: int, num_rows: int) -> torch.Tensor:
        """A forward of one sequence of so many tokens, where it does not matter which: logits [num_rows, V] behind the first of them."""
        places = torch.arange(num_tokens, device=self.where)
        token = ordinary_tokens(self.transformers_model.config, 64)[0]
        return self.forward(step, torch.full_like(places, token), places, places[:num_rows])

    def compile(self) -> None:
        """Compile the decoder layers; every forward from now on runs the compiled ones. Takes a minute the first time, seconds from torch's cache.

        Raises ConfigError without a C++ compiler, UnsupportedModelError for a model that cannot be compiled; then nothing has changed. Call it
        before anything is computed: the logits' bits, and `identity` with them, are others afterwards.
        """
        from quire.tensors.models.compiled import GRANULE, compile_layers  # the tracer behind it takes a second to import

        model, surgery = self._open()
        self.everywhere = False  # compiled layers are as they are traced
        code = compile_layers(model, surgery, partial(self.forward_of, num_rows=1), live=self.live, geometry=self.layers)
        self._tokens_multiple = GRANULE
        self.compiled, self.identity = True, f"{self.identity} {code}"

    def lower(self) -> None:
        """Run the decoder layers that can be as native programs from now on; `lowered` tells which cannot, and why. Takes milliseconds a layer.

        Needs native products. Call it before anything is computed: the logits' bits, and `identity` with them, are others afterwards.
        """
        self._lower()
        assert self.lowered is not None
        self._lowers = True
        if self.lowered.num_lowered:
            self.identity = f"{self.identity} {self.lowered.code}"

    def _lower(self) -> None:
        from quire.tensors.models.lowered import lower_layers  # needs the native kernels, without which this model may be served as well
        from quire.tensors.models.recording import Recorder, RecordingProducts, RecordingStep
        from quire.tensors.native_products import NativeProducts

        model, _ = self._open()
        products = self._products
        assert isinstance(products, NativeProducts)

        def record(layers: Sequence[nn.Module], num_tokens: int) -> dict[nn.Module, Recording]:
            recorder = Recorder(layers)
            with self.with_products(RecordingProducts(recorder, products), whole_vectors=False), recorder.watching():
                self.forward_of(RecordingStep(recorder), num_tokens, num_rows=0)
            return recorder.recordings

        self.lowered = lower_layers(model, products, record, live=self.live, geometry=self.layers)

    @property
    def transformers_model(self) -> PreTrainedModel:
        """The model itself, nothing of ours on it. Raises RuntimeError after close()."""
        return self._open()[0]

    @contextmanager
    def unpatched(self, multiplied: Iterable[nn.Module] = ()) -> Iterator[PreTrainedModel]:
        """The model in eval mode, with its own plain code for attention and experts: what its packed output is compared with.

        multiplied: modules in which linear layers take this model's products.
        """
        model, surgery = self._open()
        with surgery.unpatched(multiplied), torch.inference_mode(not self.live), torch.no_grad(), without_autocast(self.where.type):
            yield model

    @contextmanager
    def with_float_activations(self) -> Iterator[None]:
        """Inside, this model's forwards and its own run with fp32 activations, whatever its weights are (see precise.py)."""
        with self.with_products(WidenedProducts(self._products)), WithFloatActivations():
            yield

    def strays(self) -> list[tuple[str, str]]:
        """Products, and with `rows` sums, that depend on the tokens and that torch computes: (operator, class of the module); see strays.py."""
        few, more = (Finder(of_products if self.rows is None else of_products_and_sums) for _ in range(2))
        for watch, num_tokens in ((few, 3), (more, 5)):
            with self.with_products(OverlookedProducts(self._products, watch)), watch:
                self.forward_of(NoAttention(), num_tokens, num_rows=num_tokens)
        return differing(few, more)

    @contextmanager
    def with_products(
        self, products: Products, *, whole_vectors: bool = True, forwards: Mapping[nn.Module, Callable[..., Any]] | None = None
    ) -> Iterator[None]:
        """Inside, this model's forwards take these products, in plain layers. `whole_vectors`: see `Surgery`. `forwards`: of modules, in place of
        their own."""
        (model, before), lowered = self._open(), self.lowered
        self._surgery, self.lowered = Surgery(model, products, live=self.live, whole_vectors=whole_vectors, rows=self.rows), None
        for module, forward in (forwards or {}).items():
            self._surgery.replace(module, forward)
        try:
            yield
        finally:
            self._surgery, self.lowered = before, lowered

    def close(self) -> None:
        """Let go of the model. Idempotent. Nothing is left on it, as nothing of ours outlives a forward."""
        self._model = self._surgery = self._output_layer = self.lowered = None

    def _open(self) -> tuple[PreTrainedModel, Surgery]:
        if self._model is None or self._surgery is None:
            raise EngineDeadError(f"model {self.name} is closed")
        return self._model, self._surgery
