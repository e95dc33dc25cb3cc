"""Every field of `SamplingParams` and `EngineConfig` is an option, with the field's default, and reaches it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import typer.main

from quire import ConfigError, EngineConfig, InvalidRequestError, SamplingParams, StructuredOutput
from quire.cli.app import app
from quire.cli.options import ENGINE, SAMPLING, build, parse_size
from tests.cli.conftest import Quire

LIBRARY_ONLY_FIELDS = {"return_logits", "pooling", "prompt_lookup_num_tokens"}
SAMPLING_FIELDS = {f.name for f in fields(SamplingParams)} - LIBRARY_ONLY_FIELDS
ENGINE_FIELDS = {f.name for f in fields(EngineConfig)}
# Each field as it is typed after its option (True: a flag), and what it must come to.
SAMPLING_TYPED: dict[str, tuple[Any, Any]] = {
    "max_tokens": ("none", None),
    "min_tokens": ("3", 3),
    "temperature": ("0.5", 0.5),
    "top_k": ("40", 40),
    "top_p": ("0.9", 0.9),
    "min_p": ("0.05", 0.05),
    "repetition_penalty": ("1.1", 1.1),
    "presence_penalty": ("-0.5", -0.5),
    "frequency_penalty": ("0.25", 0.25),
    "logit_bias": ("50=-2.5, 7=1", {50: -2.5, 7: 1.0}),
    "allowed_token_ids": ("5, 6,7", (5, 6, 7)),
    "stop": (["\n\n", "END"], ("\n\n", "END")),
    "stop_token_ids": ("2", (2,)),
    "include_stop_in_output": (True, True),
    "ignore_eos": (True, True),
    "seed": ("18446744073709551615", 2**64 - 1),
    "n": ("4", 4),
    "best_of": ("5", 5),
    "logprobs": ("2", 2),
    "prompt_logprobs": ("0", 0),
    "scaled_logprobs": (True, True),
    "skip_special_tokens": (True, False),
    "structured": ("choice=a|b", StructuredOutput(choice=["a", "b"])),
}
PREDICTION_TYPED: dict[str, tuple[Any, Any]] = {"prediction": ("as before", "as before")}  # which goes with no form
ENGINE_TYPED: dict[str, tuple[Any, Any]] = {
    "dtype": ("float32", "float32"),
    "quantization": ("int8", "int8"),
    "max_tokens_per_step": ("64", 64),
    "workspace_bytes": ("2GB", 2 * 10**9),
    "max_sequences": ("8", 8),
    "max_waiting": ("9", 9),
    "cache_bytes": ("1.5GiB", 3 * 2**29),
    "preallocate": (True, True),
    "reserve_bytes": ("1GiB", 2**30),
    "page_size": ("32", 32),
    "kv_codec": ("k=int8,v=int4", "k=int8,v=int4"),
    "cache_layout": ("stacked", "stacked"),
    "cache_dir": ("store", "store"),
    "cache_dir_bytes": ("1GB", 10**9),
    "prefix_sharing": (True, False),
    "prompt_lookup_num_tokens": ("8", 8),
    "max_model_len": ("512", 512),
    "backend": ("reference", "reference"),
    "device": ("cpu", "cpu"),
    "num_threads": ("3", 3),
    "compile": (True, True),
    "trust_remote_code": (True, True),
    "revision": ("main", "main"),
}
EAGER_TYPED: dict[str, tuple[Any, Any]] = {"enforce_eager": (True, True)}  # which does not go with compile


def options(command: str) -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {p.name: p for p in group.commands[command].params}


def test_generate_has_every_field() -> None:
    own = {"prompts", "model", "file", "as_json", "stats"}
    assert set(options("generate")) - own == SAMPLING_FIELDS | ENGINE_FIELDS
    assert set(SAMPLING) == SAMPLING_FIELDS
    assert set(ENGINE) == ENGINE_FIELDS


@pytest.mark.parametrize("command", ["generate", "chat", "batch", "check", "bench", "demo", "serve"])
def test_every_command_has_the_engine_options(command: str) -> None:
    left_out = {"trust_remote_code"} if command == "serve" else set()
    assert ENGINE_FIELDS - set(options(command)) == left_out


@pytest.mark.parametrize("kind", [SamplingParams, EngineConfig])
def test_defaults_are_the_dataclass_own(kind: type) -> None:
    given, left_out = options("generate"), LIBRARY_ONLY_FIELDS if kind is SamplingParams else set()
    assert build(kind, {f.name: given[f.name].default for f in fields(kind) if f.name in given and f.name not in left_out}) == kind()


def test_every_field_is_typed_below() -> None:
    assert {*SAMPLING_TYPED, *PREDICTION_TYPED} == {f.name for f in fields(SamplingParams)} - LIBRARY_ONLY_FIELDS
    assert {*ENGINE_TYPED, *EAGER_TYPED} == {f.name for f in fields(EngineConfig)}


@pytest.mark.parametrize(
    ("kind", "typed"),
    [(SamplingParams, SAMPLING_TYPED), (SamplingParams, PREDICTION_TYPED), (EngineConfig, ENGINE_TYPED), (EngineConfig, EAGER_TYPED)],
)
def test_every_option_reaches_its_field(kind: type, typed: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch, quire: Quire) -> None:
    args: list[str] = []
    for name, (text, _) in typed.items():
        (flag, *_) = options("generate")[name].opts
        args += [flag] if text is True else [word for value in (text if isinstance(text, list) else [text]) for word in (flag, value)]
    seen: list[Any] = []
    monkeypatch.setattr("quire.cli.generate.loaded", lambda model, config: seen.append(config) or stop())
    monkeypatch.setattr("quire.cli.generate.read_prompts", lambda *_: ["a prompt"])
    monkeypatch.setattr("quire.cli.options.SamplingParams.__post_init__", keep(seen, SamplingParams.__post_init__))
    result = quire("generate", "--json", *args)
    assert isinstance(result.exception, StopHere), result.output
    made = next(x for x in seen if isinstance(x, kind))
    assert {name: getattr(made, name) for name in typed} == {name: value for name, (_, value) in typed.items()}


class StopHere(Exception):
    """Where the test has seen enough."""


def stop() -> None:
    raise StopHere


def keep(seen: list[Any], check: Any) -> Any:
    def post_init(self: Any) -> None:
        check(self)
        seen.append(self)

    return post_init


def test_short_names(quire: Quire) -> None:
    text = quire("generate", "--help").stdout
    for name in ("--no-prefix-sharing", "--no-skip-special-tokens", "--threads", "--cache-bytes", "-m", "-n"):
        assert name in text


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1000000", 10**6), ("512MB", 512 * 10**6), ("2GiB", 2**31), ("2gib", 2**31), ("64 KiB", 65536), ("1.5KB", 1500), ("7b", 7), ("1TB", 10**12)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--temperature", "-1"], "temperature=-1.0: must be a number from 0 to 100"),
        (["--temperature", "warm"], "temperature='warm': must be a number"),
        (["--top-k", "x"], "top_k='x': must be an integer"),
        (["--max-tokens", "many"], "max_tokens='many': must be an integer, or 'none'"),
        (["--max-tokens", "0"], "max_tokens=0: must be an integer from 1"),
        (["--logit-bias", "5"], "logit_bias='5': must be pairs"),
        (["--logit-bias", "5=1,6=1,5=2"], "logit_bias='5=1,6=1,5=2': must be pairs of token id and number, each id once"),
        (["--num-threads", "9" * 5000], "num_threads='99999"),
        (["--allowed-token-ids", "1,b"], "allowed_token_ids='1,b': must be token ids"),
        (["--cache-bytes", "5 parsecs"], "cache_bytes='5 parsecs': must be a number of bytes"),
        (["--page-size", "0"], "page_size=0: must be an integer from 1"),
        (["--dtype", "int3"], "dtype='int3': must be one of auto"),
        (["--logprobs", "0"], "logprobs=0: must be given with --json"),
        (["--prompt-logprobs", "2"], "prompt_logprobs=2: must be given with --json"),
        (["--scaled-logprobs"], "scaled_logprobs=True: must be given with --json"),
        (["--model", ""], "'': names no model"),
        (["--logprobs", "1000"], "logprobs=1000: must be an integer from 0 to 256"),
    ],
)
def test_a_bad_value_is_one_line(quire: Quire, args: list[str], told: str) -> None:
    result = quire("generate", "a prompt", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {told}") and result.stderr.count("\n") == 1 and len(result.stderr) < 300


@pytest.mark.parametrize("command", [["chat", "http://127.0.0.1:1"], ["chat"], ["batch", "in.jsonl", "out.jsonl", "--url", "http://127.0.0.1:1"]])
def test_a_server_has_its_own_engine(quire: Quire, command: list[str]) -> None:
    result = quire(*command, "--dtype", "float16", "--no-prefix-sharing")
    assert (result.exit_code, result.stderr) == (2, "error: dtype='float16': must be left out where a server is asked, which has its own\n")


@pytest.mark.parametrize(
    ("command", "goes_with"), [(["chat", "no-such-folder/x/y"], "a server's address"), (["batch", "no.jsonl", "out.jsonl"], "--url")]
)
def test_a_key_is_for_a_server(quire: Quire, command: list[str], goes_with: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = quire(*command, "--api-key", "secret")
    assert (result.exit_code, result.stderr) == (2, f"error: api_key: must be given with {goes_with}\n")
    monkeypatch.setenv("QUIRE_API_KEY", "secret")
    assert "api_key" not in quire(*command).stderr


def test_the_error_is_of_the_right_half() -> None:
    with pytest.raises(InvalidRequestError):
        build(SamplingParams, {f.name: "x" if f.name == "n" else None for f in fields(SamplingParams)})
    with pytest.raises(ConfigError):
        build(EngineConfig, {f.name: "x" if f.name == "page_size" else None for f in fields(EngineConfig)})
