"""Puts an engine together: model, arrangement of its layers, pool size, backend. Nothing here runs twice."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch
from transformers import PreTrainedModel

from quire.config import EngineConfig, split_codec
from quire.engine.cache_dir import check_cache_dir, disk_store
from quire.engine.captured import CapturedSteps
from quire.engine.disk_eye import DiskEye
from quire.engine.engine import Engine
from quire.engine.fresh import FreshSteps
from quire.engine.kernels import Kernels, choose_kernels
from quire.engine.runner import Runner
from quire.engine.tier import DiskTier
from quire.engine.verdicts import Verdict
from quire.errors import ConfigError, UnsupportedModelError
from quire.policy.cache import PageCache
from quire.policy.drafts import MAX_DRAWN
from quire.policy.groups import Arrangement, Group, arrange
from quire.policy.scheduler import MAX_SCORED, Scheduler
from quire.request import Limits
from quire.tensors.device import Device
from quire.tensors.host import no_modes_of_callers
from quire.tensors.models.geometry import NOT_TAKEN_BACK, carries
from quire.tensors.models.load import load_model
from quire.tensors.models.model import CausalModel
from quire.tensors.models.probe import failures_told, probe
from quire.tensors.models.workspace import Workspace, measure
from quire.tensors.sampler import Sampler
from quire.tensors.store import PageStore, cached_layers, layer_places
from quire.text.grammar import GrammarCompiler
from quire.text.tokenizer import TextTokenizer, load_tokenizer

LEAST_TOKENS_PER_STEP = 16
MEMORY_SHARE = 0.4  # of what is available, when the pool's size is left to us


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the options resolved to for this model on this machine.

    Sizes in bytes. A step computes at most `max_tokens_per_step` tokens, whose tensors take about `workspace_bytes`. `max_cached_tokens` is what a
    full pool holds of one long sequence; `bytes_per_token` is before any window has moved on. `hidden_size` is None for a model that
    gives no embeddings. `layers`: how many decoder layers run as native programs, as compiled code, or plain, and why, and which steps are captured.
    """

    model: str
    model_type: str
    dtype: str
    backend: str
    device: str
    layers: str
    num_threads: int
    context_len: int
    vocab_size: int
    hidden_size: int | None
    weight_bytes: int
    max_tokens_per_step: int
    workspace_bytes: int
    page_size: int
    kv_codec: str
    page_bytes: int
    num_pages: int
    cache_bytes: int
    bytes_per_token: int
    max_cached_tokens: int
    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Built:
    """An engine ready to run, and what belongs to it."""

    engine: Engine
    model: CausalModel
    tokenizer: TextTokenizer | None
    limits: Limits
    info: EngineInfo
    tier: DiskTier | None
    grammars: GrammarCompiler
    eye: DiskEye | None

    def close(self) -> None:
        """End what runs beside the engine, and leave a live model as it was. The engine's thread has ended."""
        self.engine.masks.close()
        self.grammars.close()
        if self.tier is not None:
            self.tier.close()
        self.model.close()


def build_engine(source: str | PreTrainedModel, config: EngineConfig) -> Built:
    """Load, probe and lay out.

    Raises:
        ModelError: there is no such model, or it is refused.
        ConfigError: an option that does not go with this model or machine.
    """
    check_cache_dir(config, live=not isinstance(source, str))
    num_threads = config.num_threads or torch.get_num_threads()
    kernels = choose_kernels(config.backend, num_threads, config.device)
    if config.compile:
        kernels = replace(kernels, name=f"{kernels.name}, compiled layers")
    with no_modes_of_callers():
        model = open_model(source, config, kernels)
        try:
            return _lay_out(source, model, config, kernels, num_threads)
        except BaseException:
            model.close()
            raise


def open_model(source: str | PreTrainedModel, config: EngineConfig, kernels: Kernels) -> CausalModel:
    """A model that has passed the probe, here or in a command before (verdicts.py). Raises as `build_engine`."""
    device = kernels.device
    with device.current():
        model = load_model(
            source,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
            products=kernels.products,
            quantization=config.quantization,
            device=device,
            rows=kernels.rows,
            max_model_len=config.max_model_len,
        )
    try:
        _context_len(config, model)  # refused before compiling and probing take their time
        if carries(model.layers):
            _check_carried(model, config, kernels)
        if config.compile:
            with model.turn:
                model.compile()
        device.on_a_thread(lambda: _examine(model, kernels, lower=kernels.programs and not (config.compile or config.enforce_eager)))
    except BaseException:
        model.close()
        raise
    return model


def _check_carried(model: CausalModel, config: EngineConfig, kernels: Kernels) -> None:
    """Raise for what a model with states cannot do."""
    if kernels.attention.carried is None:
        raise UnsupportedModelError(f"{model.model_type}: its recurrent layers are served on the CPU alone, by backend 'native' or 'reference'")
    if config.prompt_lookup_num_tokens:
        raise ConfigError(f"prompt_lookup_num_tokens={config.prompt_lookup_num_tokens}: must be 0 for {model.model_type}, {NOT_TAKEN_BACK}")


def _examine(model: CausalModel, kernels: Kernels, *, lower: bool) -> None:
    with model.turn:
        if lower:
            with failures_told(model):
                model.lower()
        verdict = Verdict.of(model, kernels)
        if verdict is not None and (everywhere := verdict.read()) is not None:
            model.everywhere = everywhere
            return
        if kernels.rows is None:
            probe(model)
        else:
            with FreshSteps(model, kernels) as make_step:
                probe(model, make_step)
        if verdict is not None:
            verdict.write(model.everywhere)


def _measured(model: CausalModel, page_size: int) -> Workspace:
    with model.turn:
        return measure(model, page_size)


def _lay_out(source: str | PreTrainedModel, model: CausalModel, config: EngineConfig, kernels: Kernels, num_threads: int) -> Built:
    context_len = model.context_len = _context_len(config, model)
    if config.cache_layout == "stacked":
        config = replace(config, page_size=context_len)
    device = kernels.device
    codec = split_codec(config.kv_codec)
    layers = cached_layers(model.layers, model.dtype, *codec)
    arrangement = arrange(layers, config.page_size)
    workspace = device.on_a_thread(lambda: _measured(model, arrangement.groups[0].page_size))
    device.give_back_freed()  # of loading and probing, before the pool is sized by what there is
    config = replace(config, max_tokens_per_step=_max_tokens_per_step(config, workspace))
    num_pages = _num_pages(config, arrangement, context_len, device)
    store = PageStore(layer_places(arrangement, layers), num_pages, arrangement.page_bytes, kernels.attention, device)
    if config.preallocate:
        store.preallocate(config.reserve_bytes, num_threads)
    identity = hashlib.blake2b(f"{model.identity}/{model.dtype}/{codec}".encode(), digest_size=16).digest()
    cache = PageCache(arrangement.groups, num_pages, sharing=config.prefix_sharing, identity=identity)
    tokenizer = _tokenizer(source, config)
    disk = None
    if config.cache_dir is not None:  # another version may encode rows, or compute them, otherwise
        values = f"{identity.hex()}/{kernels.name}/{version('quire')}/{tokenizer.fingerprint if tokenizer else 'ids'}"
        disk = disk_store(config, store.page_bytes, max(group.page_size for group in arrangement.groups), values)
    tier = DiskTier(cache, store, disk) if disk is not None else None
    scheduler = Scheduler(cache, max_tokens_per_step=config.max_tokens_per_step, max_sequences=config.max_sequences, tier=tier)
    sampler = Sampler(model.vocab_size, kernels.sampler, num_threads)
    captured = _captured(model, store, arrangement, context_len, config)
    runner = Runner(model, store, sampler, arrangement.groups, captured)
    reserve_bytes = config.reserve_bytes if device.takes_back else 0
    engine = Engine(runner, scheduler, tokenizer, reserve_bytes=reserve_bytes, prompt_lookup_num_tokens=config.prompt_lookup_num_tokens)
    info = _info(model, arrangement, store, kernels, num_threads, context_len, config, workspace, _layers(model, captured))
    limits, eye = Limits(model.vocab_size, context_len), DiskEye(disk) if disk is not None else None
    return Built(engine, model, tokenizer, limits, info, tier, GrammarCompiler(tokenizer, model.vocab_size), eye)


def _max_tokens_per_step(config: EngineConfig, workspace: Workspace) -> int:
    if config.workspace_bytes is None:
        return config.max_tokens_per_step
    num_rows = _most_rows(config)
    num_tokens = workspace.most_tokens(config.workspace_bytes, config.max_tokens_per_step, num_rows)
    least = min(LEAST_TOKENS_PER_STEP, config.max_tokens_per_step)
    if num_tokens < least:
        raise ConfigError(
            f"workspace_bytes={config.workspace_bytes}: must be at least {workspace.bytes(least, min(least, num_rows))}, what {least} tokens take"
        )
    return num_tokens


def _most_rows(config: EngineConfig) -> int:
    """Rows of logits in a step."""
    return max(config.max_sequences, MAX_DRAWN) + MAX_SCORED


def _tokenizer(source: str | PreTrainedModel, config: EngineConfig) -> TextTokenizer | None:
    # A live model brings none; the folder it was loaded from, if it still knows one, does.
    folder = source if isinstance(source, str) else source.name_or_path or ""
    if not isinstance(source, str) and not os.path.isdir(folder):
        return None
    return load_tokenizer(folder, trust_remote_code=config.trust_remote_code, revision=config.revision)


def _context_len(config: EngineConfig, model: CausalModel) -> int:
    if config.max_model_len is None:
        return model.context_len
    if config.max_model_len > model.context_len:
        raise ConfigError(f"max_model_len={config.max_model_len}: must be at most {model.context_len}, the context of {model.name}")
    return config.max_model_len


def _num_pages(config: EngineConfig, arrangement: Arrangement, context_len: int, device: Device) -> int:
    page_bytes = arrangement.page_bytes
    if config.cache_bytes is not None:
        least = page_bytes * len(arrangement.groups)
        if config.cache_bytes < least:
            raise ConfigError(f"cache_bytes={config.cache_bytes}: must be at least {least}, one page for each group of layers")
        return config.cache_bytes // page_bytes
    wanted = config.max_sequences * sum(-(-context_len // group.page_size) for group in arrangement.groups)
    most = int(device.available_bytes() * MEMORY_SHARE) // page_bytes
    if config.cache_layout == "stacked" and wanted > most:
        raise ConfigError(
            f"cache_layout='stacked': {config.max_sequences} slots of {context_len} tokens take {wanted * page_bytes} bytes, of which there are "
            f"{most * page_bytes} to spare: must be fewer (max_sequences), shorter (max_model_len), or cache_bytes given"
        )
    return max(len(arrangement.groups), min(wanted, most))


def _info(
    model: CausalModel,
    arrangement: Arrangement,
    store: PageStore,
    kernels: Kernels,
    num_threads: int,
    context_len: int,
    config: EngineConfig,
    workspace: Workspace,
    layers: str,
) -> EngineInfo:
    num_tokens = config.max_tokens_per_step
    num_pages = store.pages.shape[0]
    # Windows stop growing, so only full groups bound how long a sequence may become.
    full = [g for g in arrangement.groups if g.kind == "full"] or list(arrangement.groups)
    return EngineInfo(
        model=model.name,
        model_type=model.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        backend=kernels.name,
        device=str(kernels.device.where),
        layers=layers,
        num_threads=num_threads,
        context_len=context_len,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        weight_bytes=model.weight_bytes,
        max_tokens_per_step=num_tokens,
        workspace_bytes=workspace.bytes(num_tokens, min(num_tokens, _most_rows(config))),
        page_size=arrangement.groups[0].page_size,
        kv_codec=config.kv_codec or "none",
        page_bytes=store.page_bytes,
        num_pages=num_pages,
        cache_bytes=num_pages * store.page_bytes,
        bytes_per_token=round(arrangement.bytes_per_token()),
        max_cached_tokens=num_pages // len(full) * full[0].page_size,
        groups=tuple(_describe(g) for g in arrangement.groups),
    )


def _captured(model: CausalModel, store: PageStore, arrangement: Arrangement, context_len: int, config: EngineConfig) -> CapturedSteps | None:
    """Not of a live model, whose weights may be others at the next step."""
    graphs = None if config.enforce_eager or model.live else store.device.graphs()
    if graphs is None:
        return None
    limit = min(max(config.max_sequences, MAX_DRAWN), config.max_tokens_per_step)
    return store.device.on_a_thread(lambda: CapturedSteps(graphs, model, store, arrangement.groups, context_len=context_len, limit=limit))


def _layers(model: CausalModel, captured: CapturedSteps | None) -> str:
    if model.compiled:
        return "compiled"
    if model.lowered is None:
        return f"plain, {captured.told}" if captured is not None else "plain"
    why = "; ".join(f"{name} is plain: {reason}" for name, reason in model.lowered.plain.items())
    return f"{model.lowered.num_lowered} of {len(model.layers)} as programs{f' ({why})' if why else ''}"


def _describe(group: Group) -> str:
    reach = 0 if group.carries else group.window or group.chunk
    layers = [place.layer_idx for place in group.places]
    return f"{group.kind}{f' {reach}' if reach else ''}: layers {layers}, {group.page_size} tokens a page"
