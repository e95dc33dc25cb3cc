"""Finding a model and loading it: a hub id, a local folder, or a live model that stays its owner's.

Refused here: a source that is not there, weights that are not safetensors or quantized in a way that transformers does not know, a checkpoint that
lacks some of its weights (transformers would make them up) or has another head, Python code that comes with a checkpoint unless asked for.
"""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from quire.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from quire.tensors.attention.base import PackingProducts, RowReductions
from quire.tensors.device import CPU, Device
from quire.tensors.models.facts import context_len, text_config
from quire.tensors.models.model import CausalModel
from quire.tensors.models.packing import move_rest, pack_weights
from quire.tensors.models.refusals import Misfit, refuse_config, refuse_dtype, told_misfits
from quire.tensors.models.ropes import stretch, unstretched_len, warn_of_limit
from quire.tensors.models.turns import turn_of

_LOADING = threading.Lock()  # transformers replaces methods of all its models for the time of a load; two at once would leave its own in their place

_SAMPLES, _SAMPLE_BYTES = 64, 4096
_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def load_model(
    source: str | PreTrainedModel,
    *,
    dtype: str,
    trust_remote_code: bool,
    revision: str | None,
    products: PackingProducts,
    quantization: str = "none",
    device: Device = CPU,
    rows: RowReductions | None = None,
    max_model_len: int | None = None,
) -> CausalModel:
    """Load `source` for serving through `products` on `device`. It is not probed (see probe.py).

    dtype: "auto" (the checkpoint's), or a name that torch has. A live model keeps its own and takes "auto" or that.
    revision: of a hub id only.
    max_model_len: the context wanted, which decides how LongRoPE is served (see ropes.py).
    quantization: "none", "int8" or "int4", of what packing.py packs; "none" for a live model, whose weights stay as they are.

    Raises:
        ModelNotFoundError: there is no such folder or hub id, or the hub cannot be reached; the message says what was tried.
        UnsupportedModelError: it is there and cannot be served, with the reason.
        ConfigError: an option that does not apply to this source.
    """
    if isinstance(source, PreTrainedModel):
        if quantization != "none":
            raise ConfigError(f"quantization={quantization!r}: a live model's weights are its owner's and stay as they are")
        if trust_remote_code:
            raise ConfigError("trust_remote_code=True: applies to checkpoints, not to a live model, whose code runs already")
        warn_of_limit(text_config(source))
        with turn_of(source):
            identity = _live(source, dtype, revision)
            return CausalModel(source, products, name=type(source).__name__, identity=identity, live=True, device=device, rows=rows)
    if not isinstance(source, str):
        what = "a hub id, a local folder or a transformers PreTrainedModel"
        raise ConfigError(f"model={type(source).__name__}: must be {what}{_what_it_wraps(source)}")
    folder = _local_folder(source)
    if folder is not None and revision is not None:
        raise ConfigError(f"revision={revision!r}: applies to hub ids, and {source!r} is a local folder")
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    where |= {"local_files_only": True} if folder is not None else {"revision": revision or "main"}
    config = _config(source, folder, where)
    refuse_config(config)
    _refuse_quantization(source, config)
    if folder is None:
        _refuse_adapter(source, find_adapter_config_file(source, revision=where["revision"]))  # transformers applies one if peft is there
        folder = _snapshot(source, where)
    elif not any(folder.glob("*.safetensors")):
        raise UnsupportedModelError(f"{source}: holds no .safetensors file{_other_weights(folder)}; only safetensors are loaded, as they run no code")
    text = config.get_text_config(decoder=True)
    length = unstretched_len(text)
    stretched = length is not None and max_model_len is not None and max_model_len > length
    if not stretched:
        warn_of_limit(text)
    model = _weights(source, folder, config, dtype, where)
    refuse_dtype(model)
    if length is not None and stretched:
        stretch(model, length)
    _move(model, products, quantization, device)
    weights = _fingerprint(folder) + ("" if quantization == "none" else f" {quantization}")
    weights += f" {type(model).__module__}"  # of a checkpoint's own code it is a hash of that, or the commit it came with
    weights += " stretched" if stretched else ""
    made = CausalModel(model, products, name=source, identity=_identity(config, model.dtype, weights), live=False, device=device, rows=rows)
    made.context_len = context_len(text, stretched=stretched)
    return made


def _what_it_wraps(source: object) -> str:
    if not hasattr(source, "get_base_model"):
        return ""
    return "; of a model that peft wraps, give get_base_model(), which runs with the adapters that are active, or what merge_and_unload() returns"


def _refuse_adapter(source: str, path: str | Path | None) -> None:
    if path is not None:
        raise UnsupportedModelError(
            f"{source}: has an adapter ({Path(path).name}), and a checkpoint is served without any: merge it into the weights and save those"
            " (peft's merge_and_unload), or apply it to a live model"
        )


def _refuse_quantization(source: str, config: PreTrainedConfig) -> None:
    """What transformers does not know it leaves out: codes would be taken for weights, without their scales."""
    given = getattr(config, "quantization_config", None)
    method = given.get("quant_method") if isinstance(given, dict) else None
    if isinstance(method, str) and method not in {"bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING}:
        raise UnsupportedModelError(f"{source} ({config.model_type}): its weights are quantized by {method!r}, which transformers does not know")


def _move(model: PreTrainedModel, products: PackingProducts, quantization: str, device: Device) -> None:
    """Pack the weights, and put all that the model has where it is served."""
    try:
        pack_weights(model, products, quantization, device)
        move_rest(model, device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"device={str(device.where)!r}: it has no room for the weights of {model.name_or_path}: {_first_line(error)}") from error


def _live(model: PreTrainedModel, dtype: str, revision: str | None) -> str:
    """The identity of a live model, whose options these are."""
    own = str(model.dtype).removeprefix("torch.")
    if dtype not in ("auto", own):
        raise ConfigError(f"dtype={dtype!r}: a live model keeps its own, {own}")
    if revision is not None:
        raise ConfigError(f"revision={revision!r}: applies to hub ids, not to a live model")
    # Its weights may change at any time, so nothing computed with them is ever taken for another model's.
    return _identity(model.config, model.dtype, f"live {uuid.uuid4()}")


def _local_folder(source: str) -> Path | None:
    """The folder `source` names, or None for a hub id. Nothing is asked of the network for what looks like a path."""
    if not source.strip():
        raise ModelNotFoundError(f"{source!r}: names no model; a model is a folder with a config.json, or a hub id")
    path = Path(source).expanduser()
    if path.is_dir():
        _refuse_adapter(source, find_adapter_config_file(str(path)))
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"{source!r}: the folder has no config.json")
        return path
    if path.exists():
        raise ModelNotFoundError(f"{source!r}: is a file; a model is a folder with a config.json, or a hub id")
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ModelNotFoundError(f"{source!r}: no such folder, and not the form of a hub id (owner/name)")
    return None


def _config(source: str, folder: Path | None, where: dict[str, Any]) -> PreTrainedConfig:
    if folder is not None:
        _refuse_unasked_code(source, folder, where)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source if folder is None else str(folder), **where)
    except Exception as error:
        # Offline, unknown, private, gated, malformed: each hub client version raises another type for it.
        if "trust_remote_code" in str(error):
            raise _unasked_code(source) from error
        if folder is None:
            raise ModelNotFoundError(f"{source!r}: no local folder of that name, and the hub gave none: {_first_line(error)}") from error
        raise UnsupportedModelError(f"{source}: its config.json cannot be read: {_first_line(error)}") from error
    return config


def _refuse_unasked_code(source: str, folder: Path, where: dict[str, Any]) -> None:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{source}: its config.json is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UnsupportedModelError(f"{source}: its config.json is not an object")
    known = raw.get("model_type") in transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if raw.get("auto_map") and not known and not where["trust_remote_code"]:
        raise _unasked_code(source)


def _unasked_code(source: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{source}: comes with Python code of its own (auto_map), which runs only with trust_remote_code=True")


def _weights(source: str, folder: Path, config: PreTrainedConfig, dtype: str, where: dict[str, Any]) -> PreTrainedModel:
    what = f"{source} ({config.model_type})"
    try:
        with _LOADING:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                attn_implementation="eager",  # what every family has; ours is put in for the time of a forward
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below, by name; transformers refuses without
                **where,
            )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _unasked_code(source) from error
        if "Unrecognized configuration class" in str(error):
            told = "transformers has no causal language model of this type (AutoModelForCausalLM takes others only)"
        else:
            told = f"transformers cannot load it: {_first_line(error)}{_damaged(folder)}"
        raise UnsupportedModelError(f"{what}: {told}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise UnsupportedModelError(f"{what}: the checkpoint lacks {len(missing)} weights, such as {missing[0]}")
    misfits = sorted(Misfit(name, list(held), list(made)) for name, held, made in info.get("mismatched_keys") or ())
    if misfits:
        raise UnsupportedModelError(f"{what}: the checkpoint has weights of other shapes than its config: {told_misfits(misfits)}")
    unexpected = sorted(info.get("unexpected_keys") or ())
    other = next((name for name in config.architectures or () if name.endswith(_OTHER_HEADS)), None)
    if other is not None and unexpected:  # without any its layers may well have a tied head
        raise UnsupportedModelError(f"{what}: is a {other}, whose head ({unexpected[0]}) is no language model's")
    surplus = _without_a_place(model, unexpected)
    if surplus:
        told = f"the checkpoint's layers have {len(surplus)} weights that its config has no place for, such as {surplus[0]}"
        warnings.warn(f"{what}: {told}; they are left out", stacklevel=2)
    model.train(False).requires_grad_(False)
    return model


def _without_a_place(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Those of the decoder layers, or of more layers than there are: then config and weights disagree.

    Others are common and mean nothing: heads for other tasks or more tokens, towers for images.
    """
    num_layers = getattr(text_config(model), "num_hidden_layers", None)
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers]
    return sorted(name for name in unexpected if name.startswith(tuple(lists)))


def _snapshot(source: str, where: dict[str, Any]) -> Path:
    """The cache folder of a hub id's revision."""
    path = cached_file(source, "config.json", revision=where["revision"], local_files_only=True)  # the config was just fetched
    if path is None:
        raise ModelNotFoundError(f"{source!r}: the hub cache holds no config.json")
    return Path(path).parent


def _damaged(folder: Path) -> str:
    """Which of the files that hold weights cannot be read, as those who read them do not tell."""
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"))):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                safe_open(path, framework="pt")
        except Exception:
            with path.open("rb") as file:
                pointer = file.read(64).startswith(b"version https://git-lfs")
            return f" ({path.name}{', which is a pointer of Git LFS to the weights and not these' if pointer else ''})"
    return ""


def _other_weights(folder: Path) -> str:
    found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx") for path in folder.glob(pattern))
    return f" but {found[0]}" if found else ""


def _identity(config: PreTrainedConfig, dtype: torch.dtype, weights: str) -> str:
    settings = config.to_dict()
    for field in ("_name_or_path", "transformers_version"):
        settings.pop(field, None)
    told = json.dumps([settings, str(dtype), weights, torch.__version__, transformers.__version__], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()


def _fingerprint(folder: Path) -> str:
    """What tells one set of weight files from another without reading gigabytes: sizes, times of change, and samples of the bytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} {path.stat().st_mtime_ns} ".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    """Of its message; with the second, where the first only announces it."""
    lines = (f"KeyError: {error}" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
