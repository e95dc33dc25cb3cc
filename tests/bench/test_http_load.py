"""Requests and their times, the clients against a socket of ours, figures, and what is said of a server that is not there."""

from __future__ import annotations

import json
import socket
import statistics
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.http.answers import Heard
from bench.http.client import send, send_in_turn
from bench.http.figures import Cpu, Pair, compared, figures, percentile
from bench.http.requests import equal, poisson, ragged
from bench.http.servers import KINDS, NoServer, serving, why_not
from bench.speed.checkpoints import _tokenizer


def test_arrivals_are_poisson_and_seeded() -> None:
    times = poisson(5.0, 2000.0, "x")
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert times == poisson(5.0, 2000.0, "x") != poisson(5.0, 2000.0, "y") and times[0] > 0 and times[-1] < 2000.0
    assert abs(len(times) - 10_000) < 500  # five standard deviations
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05) and statistics.pstdev(gaps) == pytest.approx(0.2, rel=0.05)


def test_prompts_are_as_long_as_they_say() -> None:
    asks = ragged(200, "x") + equal(50, 20, 7, "x")
    assert asks == ragged(200, "x") + equal(50, 20, 7, "x") and len({ask.prompt for ask in asks}) == 250
    assert all(16 <= len(ask.prompt) <= 256 and 16 <= ask.new <= 128 for ask in asks[:200]) and {ask.new for ask in asks[200:]} == {7}
    assert max(len(ask.prompt) for ask in asks) > 200 and sum(len(ask.prompt) < 64 for ask in asks[:200]) > 70
    tokenizer = _tokenizer(400)
    assert all(len(tokenizer(ask.prompt).input_ids) == len(ask.prompt) for ask in asks)


def test_percentiles() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 0.991, 1.0)] == [1.0, 50.0, 99.0, 100.0, 100.0]
    assert percentile([7.0], 0.5) == percentile([7.0], 0.99) == 7.0


def test_figures_of_a_load() -> None:
    answers = [
        Heard(10.0, (10.5, 10.6, 10.8), 11.0, 3),
        Heard(11.0, (11.25, 11.75), 12.0, 2),
        Heard(12.0, (), 14.0, 0, "HTTP/1.1 429"),
    ]
    found = figures(answers, Cpu(0.001, 0.5, 0.002))
    assert (found.requests, found.failures, found.problems, found.tokens) == (3, 1, {"HTTP/1.1 429": 1}, 5)
    assert found.seconds == 4.0 and found.tokens_s == 1.25 and found.first_token_s == (0.25, 0.5)
    assert found.between_tokens_s == pytest.approx((0.2, 0.5)) and found.loop_cpu_us == pytest.approx(200) and found.server_cpu_us == 100_000
    nothing = figures([Heard(1.0, problem="no answer", end_s=1.0)], Cpu(0, 0, 0))
    assert nothing.first_token_s is None and nothing.tokens_s == 0.0 and nothing.failures == 1


def test_marks(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [Pair(1.0, 1.04), Pair(2.0, 2.12), Pair(1.0, 1.0)]
    assert compared("x", pairs, 1.05)["reached"] is True and compared("x", pairs, 1.03)["reached"] is False
    told = compared("x", pairs, 1.05)
    assert told["ratio"] == pytest.approx(1.04) and told["engine_s"] == 1.0 and "mark 1.05: reached" in capsys.readouterr().out


@pytest.fixture
def echo() -> Iterator[tuple[str, list[dict[str, object]]]]:
    """A server that gives every request as many tokens as it asks for, but for those of a prompt "short", and hangs on "never"."""
    asked: list[dict[str, object]] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(sock: socket.socket) -> None:
            with sock:
                got = b""
                while b"\r\n\r\n" not in got or len(got.partition(b"\r\n\r\n")[2]) < int(got.split(b"content-length: ")[1].split(b"\r\n")[0]):
                    got += sock.recv(65536)
                body = json.loads(got.partition(b"\r\n\r\n")[2])
                asked.append(body)
                if body["prompt"] == "never":
                    sock.recv(1)
                    return
                sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for _ in range(body["max_tokens"]):
                    sock.sendall(b'data: {"choices": [{"text": "x", "finish_reason": null}]}\n\n')
                sock.sendall(b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % body["max_tokens"])

        def accept() -> None:
            while True:
                try:
                    sock, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(sock,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        server.shutdown(socket.SHUT_RDWR)


def test_clients(echo: tuple[str, list[dict[str, object]]]) -> None:
    from bench.http.requests import Ask

    url, asked = echo
    load = send(url, [Ask("a", 3), Ask("never", 2), Ask("b", 5)], [0.0, 0.0, 0.2], {"stream": True}, 0.5)
    assert [answer.tokens for answer in load.answers] == [3, 0, 5] and [len(answer.event_s) for answer in load.answers] == [3, 0, 5]
    assert [answer.problem for answer in load.answers] == [None, "no answer", None] and load.client_cpu_s > 0
    assert load.answers[2].event_s[0] - load.answers[0].sent_s >= 0.2 and all(body["stream"] is True for body in asked)
    in_turn = send_in_turn(url, [Ask("a", 1), Ask("b", 2)], {}, 5)
    assert [answer.tokens for answer in in_turn.answers] == [1, 2] and in_turn.answers[1].sent_s >= in_turn.answers[0].end_s


def test_nobody_listens() -> None:
    from bench.http.requests import Ask

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (answer,) = send(f"http://127.0.0.1:{probe.getsockname()[1]}", [Ask("a", 1)], [0.0], {}, 5).answers
    assert answer.problem == "no answer" and not answer.event_s


def test_a_server_that_is_not_there_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(NoServer, match="^absent: .*No such file"), serving("transformers", str(tmp_path / "python"), tmp_path, 1, 1, 5):
        pass
    assert set(KINDS) == {"quire", "transformers", "transformers_batch"}
    missing = "Traceback ...\nImportError: Missing dependencies for serving. Install with `pip install transformers[serving]`\n"
    assert why_not(missing, 1) == "absent: ImportError: Missing dependencies for serving. Install with `pip install transformers[serving]`"
    assert why_not("python: No module named transformers\n\n", 1) == "absent: python: No module named transformers"
    assert why_not("loading\nValueError: no such model\n", 1) == "failed: exit status 1: ValueError: no such model"
    assert why_not("", -9) == "failed: exit status -9: it said nothing"


def test_one_that_does_not_become_ready_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.http import servers

    sleeper = servers.Kind(lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"], "/health", lambda _: {})
    monkeypatch.setitem(servers.KINDS, "transformers", sleeper)
    with pytest.raises(NoServer, match="failed: not ready after 0.5 s"), serving("transformers", None, tmp_path, 1, 1, 0.5):
        pass
