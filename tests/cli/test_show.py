"""How lanes are shown: panels that fit their screen, lines behind labels."""

from __future__ import annotations

import io
import re
import threading
import time
from dataclasses import replace
from typing import cast

import pytest
from rich.console import Console

from quire import LLM, Completion, Receipt, RequestOutput, RequestStream, SamplingParams, TokenEvent
from quire.cli.lanes import Lane, Run
from quire.cli.panels import Layout, PanelShow, printable, whole
from quire.cli.show import LineShow, one_line
from quire.cli.tables import receipts, size, totals


def lanes(num: int, text: str = "") -> list[Lane]:
    return [Lane(i, 0, f"lane {i + 1}", f"The prompt of {i + 1},", text, num_tokens=3, first_token_s=1.0, last_token_s=2.0) for i in range(num)]


def end(lane: Lane) -> None:
    lane.finish_reason = "stop"
    lane.output = RequestOutput("r", lane.prompt, [1, 2], [Completion(0, lane.text, [5, 6, 7], "stop")], Receipt(prompt_tokens=2, decode_s=1.0))


def screen(width: int, height: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None, legacy_windows=False)


def drawn(show: PanelShow, console: Console) -> list[str]:
    with console.capture() as capture:
        console.print(show._frame())
    return capture.get().splitlines()


LONG = "words of some length, " * 200 + "日本語 " * 30 + "the-very-end"


@pytest.mark.parametrize("width", [40, 80, 99, 120, 201])
@pytest.mark.parametrize("num", [1, 2, 5, 12, 100])
def test_a_frame_fits_the_screen(width: int, num: int) -> None:
    console = screen(width, 24)
    lines = drawn(PanelShow(lanes(num, LONG), console), console)
    assert len(lines) < 24
    assert max(Console().render_str(line).cell_len for line in lines) <= width
    assert any("the-very-end" in line for line in lines)
    shown = sum(line.count("╭") for line in lines)
    assert shown == num or any(f"and {num - shown} more" in line for line in lines)


@pytest.mark.parametrize("step", [1, 50])
@pytest.mark.parametrize("width", [10, 37])
def test_text_is_laid_out_as_it_grows_as_it_would_be_at_once(step: int, width: int) -> None:
    console, text = (
        screen(80, 24),
        "One two  three\n\nfour\n" + LONG[:200] + "anextraordinarilylongwordthatfitsnowhere" * 3 + "\n日本語 the-very-end\n",
    )
    lane = lanes(1)[0]
    growing = Layout(lane, console, width)
    for i in range(0, len(text), step):
        lane.text = text[: i + step]
        shown = [line.plain.rstrip() for line in growing.end(12)]
        assert shown == [line.plain.rstrip() for line in whole(lane, console, width) if line.plain.strip()][-12:]


def test_panels_stand_side_by_side_where_there_is_room() -> None:
    for width, columns in ((80, 1), (120, 2)):
        console = screen(width, 40)
        lines = drawn(PanelShow(lanes(5, "text"), console), console)
        assert lines[0].count("╭") == columns
        assert lines[-1].count("╰") == 1 and len(lines[-1]) == width  # an odd last one takes the whole line


def test_ended_panels_are_printed_whole_and_in_order() -> None:
    console = screen(80, 24)
    three = lanes(3, LONG)
    with PanelShow(three, console) as show:
        for i in (1, 0):
            end(three[i])
            show.ended([three[i]])
        assert "lane 3" not in plain(console).split("lane 2")[-1] or show._printed == 2
        assert show._printed == 2
        end(three[2])
        show.ended([three[2]])
        assert show._printed == 3
    text = plain(console)
    assert text.rindex("The prompt of 1") < text.rindex("The prompt of 2") < text.rindex("The prompt of 3")
    assert text.count("the-very-end") >= 3


def test_what_was_there_stays_when_it_is_left_early() -> None:
    console = screen(80, 24)
    with pytest.raises(KeyboardInterrupt), PanelShow(lanes(2, "half a sent"), console):
        raise KeyboardInterrupt
    assert plain(console).count("half a sent") >= 2


class Talking:
    """Streams that bring words at their own pace, from threads of their own."""

    def submit(self, prompt: str, params: SamplingParams) -> RequestStream:
        stream = RequestStream(prompt, lambda _: None)
        words = [f"{prompt}-{i}" for i in range(40)]

        def talk() -> None:
            for i, word in enumerate(words):
                done = Completion(0, " ".join(words), [1] * len(words), "stop")
                output = RequestOutput(prompt, prompt, [1], [done], Receipt()) if word is words[-1] else None
                stream.put(TokenEvent(prompt, 0, text=f" {word}", token_ids=[1], finish_reason="stop" if output else None, output=output))
                time.sleep(0.001 * (1 + i % 3))

        threading.Thread(target=talk).start()
        return stream


def on_terminal(drawn: str, height: int) -> list[str]:
    """What a terminal of `height` lines shows after these characters and cursor movements, with what has scrolled away before it."""
    gone, lines, row = list[str](), [""], 0
    for part in re.findall(r"\x1b\[\??\d*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", drawn):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
            if row == height:
                gone.append(lines.pop(0))
                row -= 1
        elif part.endswith("A"):
            row = max(0, row - int(part[2:-1] or 1))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b") and part != "\r":
            lines[row] += part
    return gone + lines


@pytest.mark.parametrize(("width", "num"), [(60, 5), (120, 9), (80, 30)])
def test_nothing_is_drawn_over(monkeypatch: pytest.MonkeyPatch, width: int, num: int) -> None:
    monkeypatch.setattr("quire.cli.lanes.TICK_S", 0.003)
    console = screen(width, 24)
    prompts = [f"lane{i}" for i in range(num)]
    run = Run(cast(LLM, Talking()), prompts, [SamplingParams()] * num)
    run.go(PanelShow(run.lanes, console))
    lines = on_terminal(plain(console), 24)
    words = re.findall(r"lane\d+-\d+", "\n".join(lines))
    assert sorted(words) == sorted(f"{prompt}-{i}" for prompt in prompts for i in range(40))
    assert sum(line.count("╭") for line in lines) == sum(line.count("╰") for line in lines) == num


def plain(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_panels_take_no_orders_from_a_model() -> None:
    assert printable("a\x1b[2Jb\rc\bd\te\n\n\n\nf\x07") == "a[2Jbcd e\n\nf"


def test_lines_behind_labels(capsys: pytest.CaptureFixture[str]) -> None:
    two = [replace(lane, num_tokens=0) for lane in lanes(2)]
    two[1].label = "a longer label"
    show = LineShow(two, 50)
    pieces = ["some ", "words that", " fill", " a line and then some more of it", "\n", "\n", "new", " line"]
    for i, piece in enumerate(pieces):
        for lane in two:
            lane.take(TokenEvent("r", 0, text=piece, token_ids=[1], finish_reason="length" if i == len(pieces) - 1 else None))
            show.changed(lane, piece)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 50
    for lane in two:
        mine = [line.split("│ ", 1)[1] for line in lines if line.startswith(f"{lane.label:>14} │ ")]
        assert mine[0] == f"> {lane.prompt}"
        assert " ".join(mine[1:]).split() == "".join(pieces).split()
        assert mine[-1] == "new line"


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 102400, 1536 * 2**20, 2**50)] == ["0 B", "1023 B", "1.0 KiB", "100 KiB", "1.5 GiB", "1024 TiB"]
    assert one_line("a\nb  c", 9) == "a b c" and one_line("abcdefgh", 5) == "abcd…"
    one = lanes(1, "x")[0]
    end(one)
    assert one.output is not None
    console = screen(80, 24)
    console.print(receipts([one.output], ["it"]))
    assert " 3 " in plain(console) and max(map(len, plain(console).splitlines())) <= 80
    assert totals([one.output], 2.0) == "1 request, 3 new tokens in 2.00 s (2/s), 0 of 2 prompt tokens cached"
    assert one.status == "3 tokens, 2/s, stop"
