"""`quire chat`: through a pipe, and what Ctrl-C does at every moment, with a test at the keyboard."""

from __future__ import annotations

import builtins
import contextlib
import json
import re
import signal
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.cli import chat
from quire.cli.remote import Remote
from quire.cli.talkers import Here, Messages, Talker, There, Turn
from quire.server.keys import KeyRing
from tests.cli.conftest import Quire
from tests.engine.conftest import tokenizer
from tests.server.conftest import KEY, TEMPLATE, Running, running
from tests.tensors.checkpoints import make

PATIENCE_S = 60.0
ENDLESS = {"eos_token_id": None}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small Llama that never ends by itself, a tokenizer and a chat template."""
    folder = make(tmp_path_factory.mktemp("chat") / "llama", "llama", **ENDLESS)
    hf = tokenizer()
    hf.chat_template = TEMPLATE
    hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(chatty: str) -> Iterator[Running]:
    with running(lambda: LLM(chatty, num_threads=1, cache_bytes=8 * 2**20, page_size=4)) as one:
        yield one
        one.serving.close()


def answers(llm: LLM, turns: list[str], system: str | None = None) -> list[str]:
    """What the library makes of the same conversation."""
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    said = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        (output,) = llm.generate([ids], SamplingParams(max_tokens=8, temperature=0.7, seed=5), namespace="oracle")
        said.append(output.outputs[0].text)
        messages.append({"role": "assistant", "content": said[-1]})
    return said


ARGS = ("--max-tokens", "8", "--seed", "5")


@pytest.mark.parametrize("where", ["here", "there"])
def test_one_message_a_line(quire: Quire, chatty: str, server: Running, where: str, tmp_path: Path) -> None:
    saved = tmp_path / "said.json"
    typed = f"the fox\n\nthe dog\n//slash\n/save {saved}\n/stats\n/exit\nnever sent\n"
    args = (chatty, "--num-threads", "1") if where == "here" else (server.url, "--api-key", KEY)
    result = quire("chat", *args, *ARGS, "--system", "be brief", stdin=typed)
    assert result.exit_code == 0, result.stderr
    turns = ["the fox", "the dog", "/slash"]
    wanted = answers(server.llm, turns, "be brief")
    assert result.stdout.startswith("".join(one if one.endswith("\n") else one + "\n" for one in wanted))
    told: list[Any] = json.loads(saved.read_text())
    assert [one["role"] for one in told] == ["system", *["user", "assistant"] * 3]
    assert [one["content"] for one in told[1::2]] == turns and [one["content"] for one in told[2::2]] == wanted
    rows = re.findall(r"^ ?(\d) +(\d+) +(\d+) +(\d+) ", result.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "2", "3"], result.stdout
    assert all(int(cached) > 0 for _, _, cached, _ in rows[1:]), "the conversation is sent again, and found in the cache"
    assert "3 answers" in result.stdout


def test_commands(quire: Quire, chatty: str, tmp_path: Path) -> None:
    saved = tmp_path / "said.json"
    typed = f"the fox\n/clear\n/system be kind\nthe dog\n/save {saved}\n/wizardry\n/save\n/save /nowhere/at/all\n/system\n/help\n/stats\n"
    result = quire("chat", chatty, *ARGS, stdin=typed)
    assert result.exit_code == 0, result.stderr
    assert [one["content"] for one in json.loads(saved.read_text())][:2] == ["be kind", "the dog"]
    assert "there is no /wizardry" in result.stderr and "a file's name" in result.stderr and "a file that can be written" in result.stderr
    assert "/clear" in result.stdout and "1 answer, " in result.stdout


def test_a_line_that_is_no_text_is_refused_and_a_mark_of_utf8_is_none(quire: Quire, chatty: str, server: Running) -> None:
    for args in ([chatty, *ARGS], [server.url, "--api-key", KEY, "--max-tokens", "2"]):
        result = quire("chat", *args, stdin=b"\xef\xbb\xbf/nothing\r\nthe \xff\r\nthe fox\n/stats\n")
        assert result.exit_code == 1 and "1 answer," in result.stdout
        assert "there is no /nothing" in result.stderr and "byte 4 of this one is not" in " ".join(result.stderr.split()), result.stderr


def test_any_key_that_a_server_takes_can_be_sent() -> None:
    for key in ("clé", "世界 1", " padded\n"):
        assert KeyRing([key]).caller(Remote("http://x", key)._headers["authorization"]) is not None  # type: ignore[arg-type]


def test_what_is_refused(quire: Quire, model: str, chatty: str, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    none = quire("chat", model, stdin="hello\n")
    assert none.exit_code == 2 and "llama has no chat template" in " ".join(none.stderr.split()) and none.stdout == ""
    wrong = quire("chat", server.url, "--api-key", "wrong", stdin="hello\n")
    assert wrong.exit_code == 1 and "does not take this key" in " ".join(wrong.stderr.split())
    assert quire("chat", "http://127.0.0.1:9", stdin="hello\n").exit_code == 1
    assert quire("chat", "http://", stdin="hello\n").exit_code == 2
    named = quire("chat", "http://me:secret@127.0.0.1:9", stdin="hello\n")
    assert named.exit_code == 2 and "no user or password" in named.stderr and "secret" not in named.stderr
    for address in ("http://a..b", f"http://{'a' * 70}.com", "http://x/é", "http://x/a b"):
        told = quire("chat", address, stdin="hello\n")
        assert told.exit_code == 2 and "must be a server's address" in " ".join(told.stderr.split()), told.stderr
    lines = quire("chat", server.url, "--api-key", "a\nsecret", stdin="hello\n")
    assert lines.exit_code == 2 and "on one line" in " ".join(lines.stderr.split()) and "secret" not in lines.stderr
    assert quire("chat", chatty, "--name", "x", stdin="hello\n").exit_code == 2
    other = quire("chat", server.url, "--api-key", KEY, "--name", "gpt", stdin="hello\n")
    assert other.exit_code == 1 and "not served here" in " ".join(other.stderr.split())
    long = quire("chat", chatty, *ARGS, stdin="x " * 3000 + "\nthe fox\n")
    assert long.exit_code == 1 and "context" in long.stderr
    assert long.stdout.strip() == answers(server.llm, ["the fox"])[0].strip(), "as if the long one had not been said"
    monkeypatch.setattr(chat, "NEARBY", "http://127.0.0.1:9")
    nearby = quire("chat", stdin="hello\n")
    assert nearby.exit_code == 1 and "http://127.0.0.1:9 does not answer" in " ".join(nearby.stderr.split())
    with running(lambda: LLM(model, num_threads=1, cache_bytes=2**20)) as bare:
        told = quire("chat", bare.url, "--api-key", KEY, stdin="hello\n")
        assert told.exit_code == 2 and "tiny has no chat template" in " ".join(told.stderr.split())
        bare.serving.close()


class Pressing:
    """Somebody who presses Ctrl-C when the first piece of an answer is there, `times` times."""

    def __init__(self, talker: Talker, times: int) -> None:
        self._talker, self._times = talker, times

    @property
    def turn(self) -> Turn | None:
        return self._talker.turn

    def answer(self, messages: Messages) -> Generator[str, None, None]:
        with contextlib.closing(self._talker.answer(messages)) as pieces:
            for piece in pieces:
                yield piece
                if self._times:
                    try:
                        signal.raise_signal(signal.SIGINT)
                    finally:
                        for _ in range(self._times - 1):
                            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C is heeded, also in a suite that was started in the background and told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def type_lines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """type_lines("a line", EOFError): what comes from the keyboard; the list it returns has what has not been asked for."""

    def get(*typed: Any) -> list[Any]:
        left = list(typed)

        def give(prompt: str) -> str:
            line = left.pop(0)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", give)
        return left

    return get


@pytest.mark.parametrize("where", ["here", "there"])
def test_ctrl_c_stops_an_answer(
    server: Running, where: str, heeded: None, type_lines: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    talker: Talker = Here(server.llm, "tiny", SamplingParams(max_tokens=None)) if where == "here" else There(Remote(server.url, KEY), None, {})
    talk = chat.Conversation(Pressing(talker, 1), None)
    left = type_lines("the fox", "the dog", EOFError)
    chat._watched(talk)
    assert not left
    assert [one["role"] for one in talk.messages] == ["user", "assistant"] * 2 and talk.messages[1]["content"]
    assert capsys.readouterr().out.count("stopped; ") == 2
    within(lambda: not server.serving.runs and server.llm.stats()["num_held_pages"] == 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_leaves(server: Running, heeded: None, type_lines: Callable[..., list[Any]]) -> None:
    left = type_lines("the fox", "never asked for")
    chat._watched(chat.Conversation(Pressing(Here(server.llm, "tiny", SamplingParams(max_tokens=None)), 2), None))
    assert left == ["never asked for"]
    within(lambda: server.llm.stats()["num_held_pages"] == 0)


def test_ctrl_c_where_nobody_watches_ends_it(server: Running, heeded: None) -> None:
    talk = chat.Conversation(Pressing(There(Remote(server.url, KEY), None, {}), 1), None)
    with pytest.raises(KeyboardInterrupt):
        talk.take("the fox", watched=False)
    within(lambda: not server.serving.runs)


@pytest.mark.parametrize(("late_s", "half", "goes_on"), [(1e9, False, True), (0.0, False, False), (0.0, True, True)])
def test_ctrl_c_at_the_prompt(
    server: Running, monkeypatch: pytest.MonkeyPatch, type_lines: Callable[..., list[Any]], late_s: float, half: bool, goes_on: bool
) -> None:
    """It leaves, unless it came a moment too late for the answer, or drops half a line."""
    monkeypatch.setattr(chat, "LATE_S", late_s)
    monkeypatch.setattr(chat, "half_a_line", lambda: half)
    left = type_lines("the fox", KeyboardInterrupt, "/exit")
    chat._watched(chat.Conversation(Here(server.llm, "tiny", SamplingParams(max_tokens=2)), None))
    assert left == ([] if goes_on else ["/exit"])


def within(condition: Callable[[], object]) -> None:
    """Wait until it comes true."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
