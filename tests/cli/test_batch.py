"""`quire batch`: OpenAI's Batch format, and going on after any end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM
from quire.cli import batch as batch_module
from quire.cli.askers import Answer
from quire.cli.batch_rows import read_rows
from quire.errors import InvalidRequestError
from tests.cli.conftest import Quire
from tests.server.conftest import KEY, running


def row(custom_id: str, body: Any = None, **more: Any) -> dict[str, Any]:
    body = {"prompt": f"the quick {custom_id}", "max_tokens": 4, "seed": 7} if body is None else body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body} | more


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def answers(path: Path) -> dict[str, Any]:
    """By custom_id; none is there twice."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def bits(path: Path) -> dict[str, Any]:
    """What of the answers is the same whenever they are made."""
    return {name: (one["id"], one["response"]["body"]["choices"]) for name, one in answers(path).items()}


CHAT = {"messages": [{"role": "user", "content": "hello"}]}


def test_rows_mean_what_http_means(quire: Quire, model: str, tmp_path: Path) -> None:
    rows = [
        *(row(f"r{i}") for i in range(5)),
        row("named", {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "n": 2}),
        row("other model", {"model": "gpt", "prompt": "x"}),
        row("bad field", {"prompt": "x", "wizardry": 1}),
        row("no template", CHAT, url="/v1/chat/completions"),
        row("stream", {"prompt": "x", "stream": True}),
        row("get", method="GET"),
        row("where", url="/metrics"),
        row("no body", 3),
        row("more", wizardry=1),
    ]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    result = quire("batch", source, str(out), "--model", model, "--served-model-name", "tiny", "--num-threads", "1")
    assert result.exit_code == 1 and "14 rows: 6 answered, 8 failed" in result.stderr, result.stderr
    told = answers(out)
    assert set(told) == {one["custom_id"] for one in rows}
    with LLM(model, num_threads=1, cache_bytes=2**20) as llm:
        from quire import SamplingParams

        (wanted,) = llm.generate("the quick r3", SamplingParams(max_tokens=4, seed=7))
    body = told["r3"]["response"]["body"]
    assert body["choices"][0]["text"] == wanted.outputs[0].text and told["r3"]["error"] is None
    assert told["r3"]["response"]["status_code"] == 200 and told["r3"]["response"]["request_id"] == body["id"]
    assert len(told["named"]["response"]["body"]["choices"]) == 2
    for name, status in (("other model", 404), ("bad field", 400), ("no template", 400)):
        assert told[name]["response"]["status_code"] == status and told[name]["response"]["body"]["error"]["message"] and told[name]["error"] is None
    codes = {name: told[name]["error"]["code"] for name in ("stream", "get", "where", "no body", "more")}
    assert codes == {"stream": "invalid_body", "get": "invalid_method", "where": "invalid_url", "no body": "invalid_body", "more": "unknown_field"}
    assert all(told[name]["response"] is None for name in codes)
    # All is there: nothing is loaded, and what failed is still said.
    again = quire("batch", source, str(out), "--model", "/nowhere/at/all")
    assert again.exit_code == 1 and "14 of them before" in again.stderr


def test_a_server_elsewhere(quire: Quire, model: str, tmp_path: Path) -> None:
    rows = [row(f"r{i}") for i in range(20)]
    source, here, there = write(tmp_path / "in.jsonl", rows), tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    with running(lambda: LLM(model, num_threads=1, cache_bytes=4 * 2**20)) as server:
        for url in (server.url, server.url + "/v1/"):
            result = quire("batch", source, str(there), "--url", url, "--api-key", KEY, "--in-flight", "7")
            assert (result.exit_code, result.stdout) == (0, ""), result.stderr
        refused = quire("batch", source, str(tmp_path / "no.jsonl"), "--url", server.url, "--api-key", "wrong")
        assert refused.exit_code == 1 and "does not take this key" in refused.stderr
        server.serving.close()
    assert quire("batch", source, str(here), "--model", model, "--num-threads", "1").exit_code == 0
    assert bits(here) == bits(there)
    gone = quire("batch", source, str(tmp_path / "no.jsonl"), "--url", server.url)
    assert gone.exit_code == 1 and "does not answer" in gone.stderr


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            b'{"custom_id": "a"}\n{"custom_id": "b"}\n\n{"custom_id": "a"}\n',
            "line 4 is a row with a custom_id of its own: 'a' is that of line 1 too",
        ),
        (b"{}\n", "line 1 is a JSON object with a custom_id"),
        (b'{"custom_id": 3}', "line 1 is a JSON object with a custom_id"),
        (b'{"custom_id": "a"}\n{nonsense\n', "line 2 is a JSON object"),
        (b"[1]\n", "line 1 is a JSON object"),
        (b"\xff\n", "line 1 is a JSON object"),
        (b'{"custom_id": "a", "body": ' + b"9" * 5000 + b"}", "line 1 is without an integer of more than 4300 digits"),
        (b'{"custom_id": "a", "body": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1 is nested less deep"),
    ],
)
def test_an_input_that_is_refused_whole(lines: bytes, told: str) -> None:
    with pytest.raises(InvalidRequestError, match="in='in.jsonl'") as caught:
        read_rows(io.BytesIO(lines), "in.jsonl")
    assert told in str(caught.value)


class Fake:
    """Answers after a moment, in an order of its own."""

    def __init__(self, status: int = 200) -> None:
        self.asked, self.status = list[Any](), status

    async def ask(self, path: str, body: bytes) -> Answer:
        self.asked.append(json.loads(body))
        return Answer(self.status, "req", None, {"choices": [json.loads(body)]})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    asker = Fake()

    @contextlib.contextmanager
    def inside(*_: Any) -> Iterator[Fake]:
        yield asker

    monkeypatch.setattr(batch_module, "inside", inside)
    return asker


def test_what_is_refused_of_an_output(quire: Quire, tmp_path: Path, fake: Fake) -> None:
    source, out = write(tmp_path / "in.jsonl", [row("a"), row("b")]), tmp_path / "out.jsonl"
    assert quire("batch", source, str(out)).exit_code == 0
    whole = out.read_bytes()
    write(tmp_path / "in.jsonl", [row("a"), row("b", {"prompt": "another"})])
    changed = quire("batch", source, str(out))
    assert changed.exit_code == 2 and "the answer to a row as the input has it now (it is one to 'b')" in " ".join(changed.stderr.split())
    write(tmp_path / "in.jsonl", [row("a")])
    assert "a row of the input (it is one to 'b')" in " ".join(quire("batch", source, str(out)).stderr.split())
    write(tmp_path / "in.jsonl", [row("a"), row("b")])
    out.write_bytes(whole + whole.splitlines(keepends=True)[0])
    assert "'a' has two" in quire("batch", source, str(out)).stderr
    out.write_bytes(b"a diary\n" + whole)
    refused = quire("batch", source, str(out))
    assert refused.exit_code == 2 and "is this the right file?" in refused.stderr and out.read_bytes() == b"a diary\n" + whole
    for args, said in (
        ((str(tmp_path / "nowhere"), str(out)), "a file that can be read"),
        ((source, str(tmp_path / "no" / "out")), "a file that can be written"),
        ((source, str(out), "--in-flight", "0"), "in_flight=0"),
        ((source, str(out), "--url", "ftp://x"), "url='ftp://x'"),
        ((source, str(out), "--url", "http://x", "--model", "y"), "without --model"),
    ):
        out.unlink(missing_ok=True)
        told = quire("batch", *args)
        assert told.exit_code == 2 and said in " ".join(told.stderr.split()), told.stderr


def test_rows_do_not_come_through_a_pipe(quire: Quire, tmp_path: Path, fake: Fake) -> None:
    read, written = os.pipe()
    os.write(written, json.dumps(row("a")).encode() + b"\n")
    told = quire("batch", f"/dev/fd/{read}", str(tmp_path / "out.jsonl"))
    os.close(read)
    os.close(written)
    assert told.exit_code == 2 and "must be a plain file" in " ".join(told.stderr.split()), told.stderr
    assert not fake.asked and not (tmp_path / "out.jsonl").exists()


def test_a_torn_last_line_is_cut(quire: Quire, tmp_path: Path, fake: Fake) -> None:
    rows = [row(f"r{i}", {"prompt": "x" * 300 * i}) for i in range(6)]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert quire("batch", source, str(out), "--in-flight", "1").exit_code == 0
    whole, wanted = out.read_bytes(), bits(out)
    for cut in [1, 2, 50, *random.Random(1).sample(range(1, len(whole)), 20), len(whole)]:
        out.write_bytes(whole[:-cut])
        fake.asked.clear()
        assert quire("batch", source, str(out)).exit_code == 0
        assert bits(out) == wanted and len(fake.asked) == 6 - whole[:-cut].count(b"\n")


@pytest.mark.parametrize("held", [b"# Title\n\nlast paragraph without newline", b"one line", b'{"a": 1}\n{"a": 2}', b'{"custom_id":"a"}'])
def test_what_is_no_batchs_answers_is_left_as_it_was(quire: Quire, tmp_path: Path, fake: Fake, held: bytes) -> None:
    source, out = write(tmp_path / "in.jsonl", [row("a")]), tmp_path / "notes.md"
    out.write_bytes(held)
    refused = quire("batch", source, str(out))
    assert refused.exit_code == 2 and "is this the right file?" in " ".join(refused.stderr.split())
    assert out.read_bytes() == held and not fake.asked
    asked = Path(source).read_bytes().rstrip(b"\n")
    Path(source).write_bytes(asked)
    assert quire("batch", source, source).exit_code == 2 and Path(source).read_bytes() == asked


@pytest.mark.parametrize("out", ["/dev/null", "/dev/full", "/dev/zero"])
def test_answers_go_to_a_plain_file(quire: Quire, tmp_path: Path, fake: Fake, out: str) -> None:
    refused = quire("batch", write(tmp_path / "in.jsonl", [row("a")]), out)
    assert refused.exit_code == 2 and "a plain file" in " ".join(refused.stderr.split()) and not fake.asked


def test_one_batch_at_a_time(quire: Quire, tmp_path: Path, fake: Fake) -> None:
    import fcntl

    source, out = write(tmp_path / "in.jsonl", [row("a")]), tmp_path / "out.jsonl"
    with out.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        result = quire("batch", source, str(out))
    assert result.exit_code == 2 and "no other batch" in " ".join(result.stderr.split()) and not fake.asked


def test_a_busy_server_is_asked_again_and_a_dead_one_is_not(quire: Quire, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write(tmp_path / "in.jsonl", [row("a"), row("b")]), tmp_path / "out.jsonl"
    told = [OSError("refused"), 503, 429, 200]
    plain = fake.ask

    async def moody(path: str, body: bytes) -> Answer:
        now = told.pop(0) if told else 200
        if isinstance(now, OSError):
            raise now
        return (await plain(path, body))._replace(status=now)

    monkeypatch.setattr(fake, "ask", moody)
    assert quire("batch", source, str(out), "--in-flight", "1").exit_code == 0 and len(answers(out)) == 2
    for status, patience in ((503, 0.0), (401, 300.0)):
        out.unlink()
        told[:] = [200, *[status] * 99]
        monkeypatch.setattr(batch_module, "RETRY_S", patience)
        result = quire("batch", source, str(out), "--in-flight", "1")
        assert result.exit_code == 1 and "the batch cannot go on" in result.stderr
        assert set(answers(out)) == {"a"}, "what was answered is kept, and no answer is made up for the rest"


# A batch in a fork for each output that it reads the name of: it says the fork's pid, and then how that ended.
KILLED = """
import asyncio, hashlib, json, os, random, sys
from pathlib import Path
from quire.cli import batch
from quire.cli.askers import Answer
from quire.cli.batch_rows import Ledger, read_rows

class Fake:
    async def ask(self, path, body):
        await asyncio.sleep(random.random() / 100)
        return Answer(200, "req", None, {"choices": [hashlib.sha256(body).hexdigest() * 200]})

source = Path(sys.argv[1])
for out in iter(sys.stdin.readline, ""):
    forked = os.fork()
    if forked:
        print(forked, flush=True)
        print(os.waitpid(forked, 0)[1], flush=True)
        continue
    with source.open("rb") as file:
        rows = read_rows(file, "in")
        with Ledger(Path(out.rstrip()), rows) as ledger:
            asyncio.run(batch.answer_rows(Fake(), file, rows, ledger, 16))
    break
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    source, out, wanted = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "wanted.jsonl"
    write(source, [row(f"r{i}") for i in range(600)])
    draw, sizes = random.Random(5), [0]
    with subprocess.Popen([sys.executable, "-c", KILLED, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as forks:
        asked, told = forks.stdin, forks.stdout
        assert asked is not None and told is not None
        asked.write(f"{wanted}\n".encode())
        assert told.readline() and told.readline() == b"0\n"
        for i in range(8):
            asked.write(f"{out}\n".encode())
            pid, until = int(told.readline()), time.monotonic() + 60
            size = draw.randrange(1, wanted.stat().st_size // 8)
            while (
                time.monotonic() < until
                and (not out.exists() or out.stat().st_size < sizes[-1] + size)
                and not select.select([told], [], [], 0.001)[0]
            ):
                pass
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            assert told.readline() in (b"0\n", b"9\n")
            sizes.append(out.stat().st_size)
            if i % 2:  # as if the kill had come in the middle of a write
                os.truncate(out, sizes[-1] - draw.randrange(1, 5000))
        assert 1 < out.read_bytes().count(b"\n") < 600
        asked.write(f"{out}\n".encode())
        assert told.readline() and told.readline() == b"0\n"
        asked.close()
    assert bits(out) == bits(wanted) and len(bits(out)) == 600


def test_killed_with_a_model(quire: Quire, model: str, tmp_path: Path) -> None:
    source, out, wanted = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "wanted.jsonl"
    body = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.9}
    write(source, [row(f"r{i}", {**body, "prompt": f"the quick {i}", "seed": i}) for i in range(40)])
    args = ["--model", model, "--in-flight", "4", "--num-threads", "1"]
    with subprocess.Popen([sys.executable, "-m", "quire", "batch", str(source), str(out), *args], stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until and (not out.exists() or out.read_bytes().count(b"\n") < 5):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    first = len(answers(out))
    assert 5 <= first < 40
    again = quire("batch", str(source), str(out), *args[:3], "16", *args[4:])
    assert again.exit_code == 0 and f"{first} of them before" in again.stderr, again.stderr
    assert quire("batch", str(source), str(wanted), *args).exit_code == 0
    assert bits(out) == bits(wanted)
