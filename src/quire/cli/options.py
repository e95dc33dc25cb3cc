"""The options of `SamplingParams` and `EngineConfig`, made from the dataclasses: one option a field, under the field's name.

A command takes them all by having a parameter of that type. A field without a help line here is an error at the first import, so none is
forgotten and none needs to be written twice.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

import typer

from quire.config import BACKENDS, CODECS, DTYPES, LAYOUTS, QUANTIZATIONS, EngineConfig
from quire.errors import ConfigError, InvalidRequestError, shown
from quire.params import Implied, SamplingParams
from quire.structured import StructuredOutput

SAMPLING = {
    "max_tokens": "The most tokens to generate; 'none' for as many as there is room for.",
    "min_tokens": "No end-of-sequence, stop token or stop string before this many tokens.",
    "temperature": "0 takes the most likely token.",
    "top_k": "Keep the k most likely tokens; 0 keeps all.",
    "top_p": "Keep the smallest set of most likely tokens that reaches this probability.",
    "min_p": "Keep tokens at least this many times as likely as the most likely one.",
    "repetition_penalty": "Make tokens seen in prompt or output less likely (above 1).",
    "presence_penalty": "Subtracted once from the logit of a token in the output, -2 to 2.",
    "frequency_penalty": "Subtracted for every occurrence in the output, -2 to 2.",
    "logit_bias": "Added to raw logits, such as '50=-2.5,7=1'.",
    "allowed_token_ids": "Draw no other tokens than these, such as '5,6,7'.",
    "stop": "End at this string and cut it off. Repeatable.",
    "stop_token_ids": "End at these tokens, such as '2,13'.",
    "include_stop_in_output": "Keep the stop string in the text.",
    "ignore_eos": "Do not end at the model's own end-of-sequence tokens.",
    "seed": "The same seed gives the same tokens, in any company.",
    "n": "Sequences to generate for each prompt.",
    "best_of": "Generate this many and keep the n most likely (with --json).",
    "logprobs": "0 for the logprobs of the chosen tokens, k also for the k most likely (with --json).",
    "prompt_logprobs": "The same for the prompt's tokens (with --json); with --max-tokens 0 nothing is generated.",
    "scaled_logprobs": "Logprobs of the logits over the temperature (with --json).",
    "skip_special_tokens": "Keep special tokens in the text.",
    "prediction": "Text that the output is thought to repeat much of; several tokens are drawn at once then.",
    "structured": "The form of the text: json, schema={...}, regex=..., choice=a|b or grammar=... (Lark).",
}
LIBRARY_ONLY = {SamplingParams: ("return_logits", "pooling", "prompt_lookup_num_tokens")}  # nothing of them would be printed, or the engine has it
ENGINE = {
    "dtype": f"Of weights and cache: {', '.join(DTYPES)} (the checkpoint's own).",
    "quantization": f"Of the weights, made at load: {', '.join(QUANTIZATIONS)}.",
    "max_tokens_per_step": "The most tokens one step may compute.",
    "workspace_bytes": "The most memory a step's tensors may take; fewer tokens are computed in a step for it.",
    "max_sequences": "The most sequences that run at once.",
    "max_waiting": "The most requests that may wait.",
    "cache_bytes": "Size of the page pool, such as 512MB or 2GiB.",
    "preallocate": "Take the pool's memory at load, not page by page.",
    "reserve_bytes": "Memory to leave to others; the pool shrinks when less is available.",
    "page_size": "Tokens per page.",
    "kv_codec": f"Keys and values in the cache: {', '.join(CODECS)}, or one for each as in k=int8,v=none.",
    "cache_layout": f"{' or '.join(LAYOUTS)}: small pages, or one slot of the whole context a sequence.",
    "cache_dir": "A folder in which cached pages survive restarts.",
    "cache_dir_bytes": "The most bytes of files in it.",
    "prefix_sharing": "Compute equal prefixes anew instead of reusing their pages.",
    "prompt_lookup_num_tokens": "The most tokens to guess from what repeats, and draw several at once; no output changes.",
    "max_model_len": "The context.",
    "backend": f"Attention and products: {', '.join(BACKENDS)} (native where it loads).",
    "device": "Where the model runs: cpu, or an accelerator by torch's name (which none has done yet).",
    "num_threads": "CPU threads of a step.",
    "compile": "Compile decoder layers; slow at the first start, needs a C++ compiler.",
    "enforce_eager": "Run the model's own code in every step: no native programs, no captured steps.",
    "trust_remote_code": "Run Python code that comes with the checkpoint.",
    "revision": "Of a hub id.",
}
ALIASES = {"n": ("-n",), "num_threads": ("--threads",)}
MODEL = typer.Option("--model", "-m", metavar="PATH_OR_ID", help="A local folder or a hub id.", show_default="the demo checkpoint")
UNSET = {
    "seed": "from the system",
    "workspace_bytes": "no bound",
    "cache_bytes": "max-sequences full contexts, at most 40% of memory",
    "cache_dir_bytes": "half of what is free",
    "max_model_len": "the checkpoint's own",
    "num_threads": "torch's number",
    "kv_codec": "as they are",
}


class Without:
    """`Annotated[EngineConfig, Without("...")]`: a command that has no option for these fields; they keep their defaults."""

    def __init__(self, *names: str) -> None:
        self.names = names


class Kind(NamedTuple):
    """How a value is written: its name in the help, what reads it (raising ValueError), and in words what it must be."""

    metavar: str
    read: Callable[[str], Any]
    limit: str


def expand(run: Callable[..., None]) -> Callable[..., None]:
    """`run` with each parameter of type `SamplingParams` or `EngineConfig` replaced by one option for each of the type's fields."""
    hints = get_type_hints(run, include_extras=True)
    kinds = {name: kind for name, kind in get_type_hints(run).items() if kind in (SamplingParams, EngineConfig)}
    names = {name: _option_names(kind, hints[name]) for name, kind in kinds.items()}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(run).parameters.items():
        if name in kinds:
            parameters.extend(_options(kinds[name], names[name]))
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))

    @functools.wraps(run)
    def expanded(**given: Any) -> None:
        for name, kind in kinds.items():
            given[name] = build(kind, {field: given.pop(field) for field in names[name]})
        run(**given)

    vars(expanded)["__signature__"] = inspect.Signature(parameters)
    expanded.__annotations__ = {p.name: p.annotation for p in parameters}
    return expanded


def build(kind: Any, given: Mapping[str, Any]) -> Any:
    """The dataclass from its options' values as they were typed; a field that is on by default has an option that turns it off.

    Raises:
        InvalidRequestError, ConfigError: a value that cannot be read or is out of range, naming field, value and limit.
    """
    hints = get_type_hints(kind)
    values = {}
    for f in [f for f in fields(kind) if given.get(f.name) is not None]:
        values[f.name] = value = given[f.name]
        if isinstance(value, bool):
            values[f.name] = not value if f.default is True else value
        elif isinstance(value, str):
            how = _kind(f.name, hints[f.name])
            try:
                values[f.name] = how.read(value)
            except InvalidRequestError:
                raise
            except ValueError:
                if kind is SamplingParams:
                    raise InvalidRequestError(f.name, value, how.limit) from None
                raise ConfigError(f"{f.name}={shown(value)}: must be {how.limit}") from None
    return kind(**values)


def refuse_engine_options(config: EngineConfig) -> None:
    """Refuse options of an engine where a server is asked, which has its own.

    Raises:
        ConfigError: the first one that is not as it would be unasked.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        if value != f.default:
            raise ConfigError(f"{f.name}={value!r}: must be left out where a server is asked, which has its own")


def refuse_api_key(context: typer.Context, goes_with: str) -> None:
    """Refuse --api-key where no server is asked. One in the environment is for whoever asks one.

    Raises:
        ConfigError: it was typed.
    """
    source = context.get_parameter_source("api_key")
    if source is not None and source.name == "COMMANDLINE":
        raise ConfigError(f"api_key: must be given with {goes_with}")


def parse_size(text: str) -> int:
    """Bytes of '512MB' (a million each), '2GiB' (2**30 each) or a plain number.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS:
        raise ValueError(text)
    return int(float(match[1]) * UNITS[match[2]]) if "." in match[1] else int(match[1]) * UNITS[match[2]]


def _option_names(kind: Any, hint: Any) -> list[str]:
    without = [name for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Without) for name in extra.names]
    return [f.name for f in fields(kind) if f.name not in (*LIBRARY_ONLY.get(kind, ()), *without)]


def _options(kind: Any, names: list[str]) -> list[inspect.Parameter]:
    helps, panel = (SAMPLING, "Sampling") if kind is SamplingParams else (ENGINE, "Engine")
    hints = get_type_hints(kind)
    return [_option(f.name, hints[f.name], f.default, helps[f.name], panel) for f in fields(kind) if f.name in names]


def _option(name: str, hint: Any, default: Any, text: str, panel: str) -> inspect.Parameter:
    """Every value is taken as text and read by `build`, so that a bad one is reported like one out of range."""
    flag = name.replace("_", "-")
    names = [f"--{flag}", *ALIASES.get(name, ())]
    told = UNSET.get(name, True)
    if isinstance(default, Implied):  # which the same number is not if somebody types it
        default, told = None, f"{default}, or what fits"
    annotation: Any = str | None if default is None else str
    metavar: str | None = None
    if isinstance(default, bool):
        names[0], default, annotation = f"--no-{flag}" if default else f"--{flag}", False, bool
    elif name == "stop":
        annotation, metavar = list[str] | None, "TEXT"
    else:
        metavar, default = _kind(name, hint).metavar, None if default is None else str(default)
    option = typer.Option(default, *names, help=text, metavar=metavar, show_default=told, rich_help_panel=panel)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _kind(name: str, hint: Any) -> Kind:
    return SPECIAL.get(name) or KINDS[next((arg for arg in get_args(hint) if arg is not NoneType), hint)]


def _max_tokens(text: str) -> int | None:
    return None if text.strip().lower() == "none" else int(text)


def _ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def _bias(text: str) -> dict[int, float]:
    pairs = [part.partition("=")[::2] for part in text.split(",") if part.strip()]
    biases = {int(token_id): float(bias) for token_id, bias in pairs}
    if len(biases) < len(pairs):  # of two for one id neither is what was asked
        raise ValueError(text)
    return biases


def _structured(text: str) -> StructuredOutput:
    form, _, value = text.partition("=")
    if text == "json":
        return StructuredOutput(json_object=True)
    if form not in ("schema", "regex", "choice", "grammar"):
        raise ValueError(text)
    given: dict[str, Any] = {"json_schema" if form == "schema" else form: value.split("|") if form == "choice" else value}
    return StructuredOutput(**given)


KINDS = {int: Kind("INTEGER", int, "an integer"), float: Kind("NUMBER", float, "a number"), str: Kind("NAME", str, "a name")}
SPECIAL = {
    "max_tokens": Kind("INTEGER|none", _max_tokens, "an integer, or 'none'"),
    "logit_bias": Kind("ID=NUMBER,...", _bias, "pairs of token id and number, each id once, such as '50=-2.5,7=1'"),
    "allowed_token_ids": Kind("ID,...", _ids, "token ids, such as '5,6,7'"),
    "stop_token_ids": Kind("ID,...", _ids, "token ids, such as '2,13'"),
    "structured": Kind("FORM", _structured, "json, schema=..., regex=..., choice=a|b or grammar=..."),
    "prediction": Kind("TEXT", str, "text"),
    "cache_bytes": Kind("SIZE", parse_size, "a number of bytes, such as 512MB, 2GiB or 1000000"),
    "reserve_bytes": Kind("SIZE", parse_size, "a number of bytes, such as 512MB, 2GiB or 1000000"),
    "workspace_bytes": Kind("SIZE", parse_size, "a number of bytes, such as 512MB, 2GiB or 1000000"),
    "cache_dir": Kind("FOLDER", str, "a folder"),
    "cache_dir_bytes": Kind("SIZE", parse_size, "a number of bytes, such as 512MB, 2GiB or 1000000"),
}
UNITS = {"": 1, "b": 1} | {f"{p}{i}b": (1024 if i else 1000) ** e for e, p in enumerate("kmgt", 1) for i in ("", "i")}
