"""The gate every model passes at load (of a command: at its first): what it gives packed with others is compared with what it gives alone.

Four questions, two of them over the same few short sequences, which go past a window or chunk where that is short:
  close   packed logits against the model's own forward of each sequence alone, nothing of ours on it. A wrong mask, a wrong scale, positions taken
          from the batch, state that leaks from one sequence into the next: all show here.
  exact   packed logits against packed logits in another order and against each sequence alone, all through our path: the same bits. If the modules
          that were changed are not all that depend on the batch, the whole forward runs in exact mode from then on, and is asked again.
  strays  whether torch itself multiplies tokens anywhere (strays.py): then too the whole forward runs in exact mode, and whatever that does not know
          is refused by name. Bits alone do not tell: today's weights may hide what tomorrow's show, and few tokens what many would. Not asked of a
          checkpoint whose code is all torch's and transformers' and whose layers are programs: their products are known, each by itself.
  curves  whether elementwise functions are given rests of vectors anywhere but in modules that run in exact mode: then, too, the whole forward does.
          Asked of every model, with the layers as they run, since few tokens seldom meet an element whose last bit tells.

Of a checkpoint without code of its own whose layers are programs (lowered.py), each question is asked where it can still be answered otherwise:
  close   at full depth, all sequences. For the longest one and the few tokens the model's own forward multiplies as torch does in one layer of each
          program and in plain layers, for the few in the head as well, where many rows take a CPU without bf16 long: that shows the kernels and the
          packing. Elsewhere it takes our products, which need not unpack the weights: what layers of one program may differ in (masks, scales,
          whatever hangs on layer_idx) is no product.
  exact   with one layer of each program. Others run the same instructions, each of which takes a token's row alone, whatever the weights are.

A live model is asked again when it is made of other code than any that has passed.

The random state of torch is neither used nor changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from quire.errors import ProbeMismatchError, QuireError, UnsupportedModelError
from quire.tensors.models.facts import ordinary_tokens
from quire.tensors.models.geometry import NoAttention
from quire.tensors.models.hidden import output_layer
from quire.tensors.models.hook import AttentionStep
from quire.tensors.models.model import CausalModel
from quire.tensors.models.row_by_row import RowByRow
from quire.tensors.models.strays import Finder, differing, of_remainders
from quire.tensors.packed import PackedWeight

if TYPE_CHECKING:
    from quire.tensors.models.lowered import LoweredLayers

MakeStep = Callable[[Sequence[int]], AttentionStep]

# Largest difference of a logit, in standard deviations of its sequence's logits. Over the families of the test suite roundings made 1e-5, 0.02 and
# 0.1 of it; larger models add more roundings. A wrong mask or scale moves some logits by a whole deviation.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
# The same where weights are codes, whose products round what they are given to 8 bits, as torch's in the other forward do not: deep models of random
# weights had 0.75. Then the other forward is asked with our products, and held to the tolerance; by wrong weights it would be deviations off.
TOLERANCE_OF_CODES = 1.5
LONGEST_WINDOW = 128  # longer ones cost more than a probe should


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the probe found. `max_error` and `tolerance` are in standard deviations; `everywhere`: exact mode had to cover the whole forward."""

    max_error: float
    tolerance: float
    everywhere: bool


def probe(model: CausalModel, make_step: MakeStep = RowByRow) -> ProbeReport:
    """Check `model`, and set its `everywhere` if bits ask for it.

    make_step: gives the step for fresh sequences of these lengths, packed in order, each from position 0.
    Raises ProbeMismatchError when packed logits are not the model's own, UnsupportedModelError when their bits depend on the batch or a
    forward fails.
    """
    with failures_told(model):
        return _probe(model, make_step)


@contextmanager
def failures_told(model: CausalModel) -> Iterator[None]:
    """What a model's own code raises on several tokens, whatever that is, becomes an UnsupportedModelError: one token, which it took, may be a case
    of its own."""
    try:
        yield
    except (QuireError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{model.model_type}: its forward fails on several tokens: {type(error).__name__}: {error}") from error


def _probe(model: CausalModel, make_step: MakeStep) -> ProbeReport:
    """The four questions, in order."""
    sequences, everywhere = _sequences(model), model.everywhere
    programs = model.lowered if not model.owned else None
    packed = _packed(model, make_step, sequences)
    error, tolerance = _check_close(model, sequences, packed, programs)
    _check_strays(model)
    with programs.first_of_each() if programs is not None else nullcontext():
        _check_curves(model)
        if model.everywhere != everywhere or (programs is not None and programs.alike):
            packed = _packed(model, make_step, sequences)
        exact = _exact(model, make_step, sequences, packed)
    if not exact:
        everywhere = model.everywhere
        model.everywhere = True
        if everywhere or not _exact(model, make_step, sequences, _packed(model, make_step, sequences)):
            raise UnsupportedModelError(f"{model.model_type}: the bits of a token's logits depend on what else is in the batch, even in exact mode")
    model.passed()
    return ProbeReport(error, tolerance, model.everywhere)


def _check_close(
    model: CausalModel, sequences: Sequence[torch.Tensor], packed: Sequence[torch.Tensor], programs: LoweredLayers | None
) -> tuple[float, float]:
    """(largest error, how large it may be) of the packed logits. Raises ProbeMismatchError."""
    tolerance = TOLERANCE[model.dtype]
    own = _own_logits(model, sequences, programs)
    errors = _errors(packed, own)
    if programs is not None and tolerance < float(errors.max()) <= TOLERANCE_OF_CODES and _of_codes(model):
        errors = _errors(packed, [_own_forward(model, ids, [model.transformers_model]) for ids in sequences])
    if not model.compiled and not bool((errors <= tolerance).all()) and bool(errors.median() <= tolerance) and model.dtype != torch.float32:
        # Most tokens agree and some do not: a mistake, or experts chosen by a rounding. In fp32 the two look different.
        # Compiled layers have their dtype in the code, and no experts: of them there is no second opinion.
        tolerance = TOLERANCE[torch.float32]
        with model.with_float_activations():
            errors = _errors(_packed(model, RowByRow, sequences), _own_logits(model, sequences))
    error = float(errors.max())
    if not error <= tolerance:  # NaN too
        if not all(bool(logits.isfinite().all()) for logits in own):
            told = "NaN or infinite, as of weights that are, or of activations past what its dtype holds"
            raise ProbeMismatchError(f"{model.model_type}: its own forward gives logits that are {told}")
        raise ProbeMismatchError(
            f"{model.model_type}: packed with others, logits differ by {error:.3g} deviations from those of each sequence alone"
            f" (at most {tolerance:g} for {str(model.dtype).removeprefix('torch.')} weights): tokens reach each other by another way than attention,"
            " attention takes something that its interface does not pass on, or its own positions do not begin at 0"
        )
    return error, tolerance


def _check_strays(model: CausalModel) -> None:
    """Have the whole forward in exact mode if torch multiplies tokens anywhere. Raises UnsupportedModelError if it still does."""
    plain = not model.compiled and (model.lowered is None or bool(model.lowered.plain))
    strays = model.strays() if model.owned or plain or model.rows is not None else []
    if strays and not model.compiled:  # compiled layers are as they were traced
        model.everywhere = True
        strays = model.strays()
    if strays:
        done, sums = "multiplied", ""
        if model.rows is not None:
            done = "multiplied or added up"
            sums = ", and along one dimension sum, mean, var, std, norm, softmax, log_softmax, layer_norm, rms_norm"
        told = "; ".join(f"{owner} calls {operator}" for operator, owner in strays[:4])
        raise UnsupportedModelError(
            f"{model.model_type}: tokens are {done} by operators of torch whose bits depend on how many there are ({told});"
            f" served are linear, matmul (@), mm, bmm, mv, inner, addmm, baddbmm, einsum of two operands{sums};"
            " not in place, without out=, uncompiled"
        )


def _check_curves(model: CausalModel) -> None:
    """Have the whole forward in exact mode if elementwise functions get rests of vectors. Raises UnsupportedModelError if they still do."""
    if not model.everywhere and not model.compiled and _curves(model):
        model.everywhere = True
        if told := "; ".join(f"{owner} calls {operator}" for operator, owner in _curves(model)[:4]):
            raise UnsupportedModelError(
                f"{model.model_type}: elementwise functions whose bits depend on how many elements there are ({told}) are called in spellings"
                " that exact mode does not know"
            )


def probe_again(model: CausalModel) -> None:
    """Take a live model, whose weights have changed, as it is now, and probe it if it is made of other code than any that has passed.

    Raises as `probe`, UnsupportedModelError too for a change that only a new engine can take; nothing may be computed until a later call succeeds.
    """
    with model.turn, failures_told(model):
        if model.take_again():
            _probe(model, RowByRow)


def _sequences(model: CausalModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random token ids: enough to leave a short window or chunk behind; one token, for which code may branch; a few that begin with it."""
    spans = [span for layer in model.layers for span in (layer.window, layer.chunk) if 0 < span <= LONGEST_WINDOW]
    random = torch.Generator().manual_seed(20)
    usable = torch.tensor(ordinary_tokens(model.transformers_model.config, min(model.vocab_size, 4096)))  # drawn from on the CPU, wherever it runs
    longest, few = (
        usable[torch.randint(len(usable), (min(length, model.context_len),), generator=random)].to(model.where)
        for length in (max(spans, default=13) + 4, 6)
    )
    return longest, few[:1], few


def _packed(model: CausalModel, make_step: MakeStep, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [len, V] of each sequence, all computed in one forward."""
    lengths = [len(ids) for ids in sequences]
    positions = torch.cat([torch.arange(length, device=model.where) for length in lengths])
    logits = model.forward(make_step(lengths), torch.cat(list(sequences)), positions, torch.arange(sum(lengths), device=model.where))
    return list(torch.split(logits, lengths))


def _curves(model: CausalModel) -> list[tuple[str, str]]:
    """(operator, class of the module) of elementwise functions that are given rests of vectors."""
    few, more = Finder(of_remainders), Finder(of_remainders)
    for watch, num_tokens in ((few, 3), (more, 5)):  # of one element a token, or several: no whole vectors
        with watch:
            model.forward_of(NoAttention(), num_tokens, num_rows=num_tokens)
    return differing(few, more)


def _exact(model: CausalModel, make_step: MakeStep, sequences: Sequence[torch.Tensor], packed: Sequence[torch.Tensor]) -> bool:
    backwards = _packed(model, make_step, sequences[::-1])[::-1]
    alone = [_packed(model, make_step, [ids])[0] for ids in sequences]
    begun = _packed(model, make_step, [sequences[0][:3]])[0]  # its first tokens only: two rows or three are a class of their own in fp32
    same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(packed, backwards, alone, strict=True))
    return same and torch.equal(packed[0][:3], begun)


def _own_logits(model: CausalModel, sequences: Sequence[torch.Tensor], programs: LoweredLayers | None = None) -> list[torch.Tensor]:
    """Logits [len, V] of each sequence in a forward of its own, by the model as it is; with `programs`, as said above, by our products in part."""
    whole, head = model.transformers_model, output_layer(model.transformers_model)
    ours: Sequence[Iterable[nn.Module]] = [(), (), ()]
    if programs is not None:
        ours = [[*programs.alike, *([] if head is None else [head])], [whole], programs.alike]
    return [_own_forward(model, ids, multiplied) for ids, multiplied in zip(sequences, ours, strict=True)]


def _own_forward(model: CausalModel, ids: torch.Tensor, multiplied: Iterable[nn.Module]) -> torch.Tensor:
    """Logits [len, V] of a sequence alone, by our products in `multiplied`.

    It is not told positions, unless it cannot do without: those of RoBERTa, for one, begin behind the pad's id.
    """
    with model.unpatched(multiplied) as alone:
        asked = {"input_ids": ids.unsqueeze(0), "use_cache": False}
        try:
            logits: torch.Tensor = alone(**asked).logits[0]
        except TypeError:  # somebody's own code may have to be told
            logits = alone(**asked, position_ids=torch.arange(len(ids), device=model.where).unsqueeze(0)).logits[0]
    return logits


def _of_codes(model: CausalModel) -> bool:
    return any(isinstance(weight, PackedWeight) and weight.form.quantization != "none" for weight in model.transformers_model.parameters())


def _errors(packed: Sequence[torch.Tensor], alone: Sequence[torch.Tensor]) -> torch.Tensor:
    """For every token, the largest difference of a logit in standard deviations of its sequence's logits; infinite where not a number."""
    parts = []
    for got, own in zip((x.cpu() for x in packed), (x.cpu() for x in alone), strict=True):  # a row at a time, which stays in the cache
        largest = torch.stack([(x.double() - y.double()).abs().amax() for x, y in zip(got, own, strict=True)])
        parts.append(largest / own.double().std().clamp_min(1e-12))
    return torch.cat(parts).nan_to_num(nan=torch.inf)
