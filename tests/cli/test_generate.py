"""`quire generate`: what comes out where, and the exit status."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quire import LLM, Completion, InvalidRequestError, Receipt, RequestOutput, RequestStream, SamplingParams, StepError, TokenEvent
from quire.cli.door import Stdout
from quire.cli.generate import read_prompts
from tests.cli.conftest import Quire

PROMPTS = ["the quick brown fox", "pack my box"]
ARGS = ["--max-tokens", "8", "--temperature", "0", "--ignore-eos"]
PARAMS = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def expected(model: str) -> list[RequestOutput]:
    with LLM(model) as llm:
        return llm.generate(PROMPTS, PARAMS)


def test_one_prompt_is_raw_text_and_nothing_else(quire: Quire, model: str, expected: list[RequestOutput]) -> None:
    result = quire("generate", PROMPTS[0], "--model", model, "--stats", *ARGS)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected[0].outputs[0].text
    assert "1 request, 8 new tokens" in result.stderr


def test_several_prompts_are_whole_and_in_order(quire: Quire, model: str, expected: list[RequestOutput]) -> None:
    result = quire("generate", *PROMPTS, "--model", model, *ARGS)
    texts = [output.outputs[0].text.rstrip() for output in expected]
    assert result.stdout == f"==> 1: {PROMPTS[0]} <==\n{texts[0]}\n\n==> 2: {PROMPTS[1]} <==\n{texts[1]}\n"


def test_json(quire: Quire, model: str, expected: list[RequestOutput]) -> None:
    result = quire("generate", *PROMPTS, "--json", "--logprobs", "2", "--model", model, *ARGS)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    for i, (line, output) in enumerate(zip(lines, expected, strict=True)):
        done = output.outputs[0]
        assert (line["request"], line["index"], line["prompt"], line["error"]) == (i, 0, PROMPTS[i], None)
        assert [line[name] for name in ("text", "token_ids", "finish_reason", "stop_reason")] == [done.text, done.token_ids, "length", None]
        assert line["logprobs"] == done.logprobs and done.top_logprobs is not None
        assert line["top_logprobs"] == [[t._asdict() for t in top] for top in done.top_logprobs]
        assert line["receipt"]["prompt_tokens"] == output.receipt.prompt_tokens > 0
        assert line["receipt"]["staged_tokens"] == output.receipt.staged_tokens >= len(done.token_ids)


def test_json_of_a_scored_prompt(quire: Quire, model: str) -> None:
    line = json.loads(quire("generate", "--json", PROMPTS[0], "--max-tokens", "0", "--prompt-logprobs", "1", "-m", model).stdout)
    assert line["text"] == "" and line["token_ids"] == [] and line["prompt_logprobs"][0] is None is line["prompt_top_logprobs"][0]
    assert len(line["prompt_logprobs"]) == line["receipt"]["prompt_tokens"] and all(x < 0 for x in line["prompt_logprobs"][1:])
    assert all(len(top) == 1 for top in line["prompt_top_logprobs"][1:])


def test_json_of_several_sequences(quire: Quire, model: str) -> None:
    result = quire("generate", "--json", *PROMPTS, "-n", "2", "--seed", "5", "--max-tokens", "4", "-m", model)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["request"], line["index"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all("logprobs" not in line for line in lines)
    alone = json.loads(quire("generate", "--json", PROMPTS[0], "--seed", "6", "--max-tokens", "4", "-m", model).stdout)
    assert lines[1]["token_ids"] == alone["token_ids"]  # sequence 1 draws as a request with seed + 1 would
    result = quire("generate", "--json", *PROMPTS, "--best-of", "2", "--seed", "5", "--max-tokens", "4", "-m", model)
    best = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["request"] for line in best] == [0, 1]
    assert all(best[i]["token_ids"] in (lines[2 * i]["token_ids"], lines[2 * i + 1]["token_ids"]) for i in (0, 1))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["x", "--max-tokens", "5000"], "at most 2048 tokens together"),
        (["x", "--stop-token-ids", "100000"], "stop_token_ids=100000: must be token ids from 0 to"),
        (["x", "--cache-bytes", "1"], "cache_bytes=1: must be at least"),
        (["x", "--max-model-len", "5000"], "max_model_len=5000"),
        (["x", "--model", "/nowhere/at/all"], "'/nowhere/at/all': no such folder"),
        (["--file", "/nowhere/at/all"], "file='/nowhere/at/all': must be a file that can be read (No such file"),
        ([], "prompt='': must be text"),
        (["-", "-"], "prompt='-': must be given once"),
        (["-", "--file", "-"], "prompt='-': must be given once"),
    ],
)
def test_refusals(quire: Quire, model: str, args: list[str], told: str) -> None:
    result = quire("generate", *(["--model", model] if "--model" not in args else []), *args, stdin="")
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr.splitlines()[-1] and result.stderr.splitlines()[-1].startswith("error: ")


def test_a_prompt_refused_among_many_starts_none(quire: Quire, model: str) -> None:
    result = quire("generate", "fine", "x" * 5000, "--model", model)
    assert (result.exit_code, result.stdout) == (2, "")


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, terminal: bool = False) -> None:
    stream = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: terminal)
    monkeypatch.setattr(sys, "stdin", stream)


def test_where_prompts_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \nthree", encoding="utf-8")
    stdin(monkeypatch, b"never read")
    assert read_prompts(["a", "b"], None) == ["a", "b"]
    assert read_prompts(["a"], str(file)) == ["a", "one", "  two ", "three"]
    file.write_bytes("a\fb\r\nhe\u2028l\u0085lo\n".encode())
    assert read_prompts([], str(file)) == ["a\fb", "he\u2028l\u0085lo"], "lines end where lines end, and nowhere else"
    stdin(monkeypatch, "first line\nsecond é\n".encode())
    assert read_prompts([], None) == ["first line\nsecond é"]
    stdin(monkeypatch, b"piped\n")
    assert read_prompts(["a", "-"], None) == ["a", "piped"]
    stdin(monkeypatch, b"x\r\ny\n")
    assert read_prompts([], "-") == ["x", "y"]
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_prompts([], str(file)) == ["one", "two"], "a mark of UTF-8 is no part of the first prompt"


@pytest.mark.parametrize(("data", "terminal"), [(b"", False), (b"\n", False), (b"ignored", True), (b"\xff", False)])
def test_no_prompt(monkeypatch: pytest.MonkeyPatch, data: bytes, terminal: bool) -> None:
    stdin(monkeypatch, data, terminal)
    with pytest.raises(InvalidRequestError):
        read_prompts([], None)


class FakeLLM:
    """Gives each prompt one token, or an error where the prompt is 'bad'; `interrupt` raises Ctrl-C when the second is asked for."""

    def __init__(self, interrupt: bool = False) -> None:
        self.interrupt, self.cancelled = interrupt, list[str]()

    def submit(self, prompt: str, params: SamplingParams) -> RequestStream:
        stream = RequestStream(prompt, self.cancelled.append)
        if self.interrupt and prompt == "second":
            raise KeyboardInterrupt
        bad = prompt == "bad"
        done = Completion(0, "" if bad else "yes", [] if bad else [1], "error" if bad else "stop")
        output = RequestOutput(prompt, prompt, [1], [done], Receipt(), StepError("the model's forward raised") if bad else None)
        stream.put(TokenEvent(prompt, 0, text=done.text, token_ids=done.token_ids, finish_reason=done.finish_reason, output=output))
        return stream


def fake(monkeypatch: pytest.MonkeyPatch, llm: FakeLLM) -> None:
    @contextlib.contextmanager
    def loaded(*_: Any) -> Iterator[FakeLLM]:
        yield llm

    monkeypatch.setattr("quire.cli.generate.loaded", loaded)


def test_a_failed_request_fails_alone(quire: Quire, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, FakeLLM())
    result = quire("generate", "good", "bad", "--json")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["text"], first["error"]) == ("yes", None)
    assert (second["finish_reason"], second["error"]) == ("error", "StepError: the model's forward raised")
    assert (result.exit_code, result.stderr) == (1, "error: prompt 2: the model's forward raised\n")


def test_ctrl_c_cancels_what_was_submitted(quire: Quire, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM(interrupt=True)
    fake(monkeypatch, llm)
    result = quire("generate", "first", "second")
    assert (result.exit_code, result.output, llm.cancelled) == (130, "", ["first"])


def test_ctrl_c_for_real(model: str) -> None:
    args = [sys.executable, "-m", "quire", "generate", "the quick", "-m", model, "--max-tokens", "none", "--ignore-eos"]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite in the background of a script is told to ignore it
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed) as process:
        assert process.stdout is not None and process.stderr is not None
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read().decode()
        assert process.wait(timeout=60) == 130, said
    assert not [line for line in said.splitlines() if not line.startswith("warning: ")]


ENDLESS = """
import contextlib, sys, threading
from quire.cli import generate, main
from quire.engine.stream import RequestStream
from quire.outputs import TokenEvent

class Endless:
    def submit(self, prompt, params):
        stream = RequestStream("r", lambda _: print("cancelled", file=sys.stderr))
        threading.Thread(target=lambda: [stream.put(TokenEvent("r", 0, text="word ", token_ids=[1])) for _ in iter(int, 1)], daemon=True).start()
        return stream

generate.loaded = lambda *_: contextlib.nullcontext(Endless())
main(["generate", "a prompt"])
"""


def test_a_broken_pipe_ends_it_quietly() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert os.read(process.stdout.fileno(), 4) == b"word"
        process.stdout.close()
        said = process.stderr.read().decode()
        assert (process.wait(timeout=60), said) == (141, "cancelled\n")


def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([sys.executable, "-c", ENDLESS], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1] == "error: No space left on device" and "Traceback" not in ended.stderr


def test_what_rich_prints_ends_as_all_else_at_a_broken_pipe() -> None:
    with pytest.raises(BrokenPipeError):
        Stdout().on_broken_pipe()
