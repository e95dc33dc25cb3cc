"""Lanes as panels that fill up side by side on a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from quire.cli.lanes import Lane
from quire.cli.show import Quiet

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")
WIDE = 100  # columns from which two panels stand side by side
LEAST, MOST = 4, 9  # lines of one panel while it fills


class PanelShow(Quiet):
    """One panel a lane, as many as the screen has room for; rows of panels that have ended are printed whole, in order, and scroll away."""

    def __init__(self, lanes: Sequence[Lane], console: Console) -> None:
        self._console = console
        self._columns = 2 if console.width >= WIDE and len(lanes) > 1 else 1
        self._rows = [lanes[i : i + self._columns] for i in range(0, len(lanes), self._columns)]
        self._printed = 0
        self._layouts: dict[tuple[int, int], Layout] = {}
        # No thread of its own draws: one that drew while another printed would count on lines that are no longer there.
        self._live = Live(console=console, get_renderable=self._frame, auto_refresh=False, transient=True)

    def __enter__(self) -> PanelShow:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        started = [row for row in self._rows[self._printed :] if any(lane.text or lane.finish_reason for lane in row)]
        self._printed = len(self._rows)
        for row in started:
            self._console.print(self._row(row, None))

    def tick(self) -> None:
        """Draw the frame."""
        self._live.refresh()

    def ended(self, lanes: Sequence[Lane]) -> None:
        """Print the rows that are complete."""
        while self._printed < len(self._rows) and all(lane.output is not None for lane in self._rows[self._printed]):
            row = self._rows[self._printed]
            self._printed += 1
            self._console.print(self._row(row, None))

    def _frame(self) -> RenderableType:
        rows = self._rows[self._printed :]
        room = max(LEAST, self._console.height - 2)
        height = max(LEAST, min(MOST, room // max(1, len(rows))))
        shown = rows[: max(1, room // height)]
        parts: list[RenderableType] = [self._row(row, height) for row in shown]
        if hidden := sum(len(row) for row in rows[len(shown) :]):
            parts.append(Text(f"  and {hidden} more", style="dim"))
        return Group(*parts)

    def _row(self, row: Sequence[Lane], height: int | None) -> Table:
        """Panels side by side: `height` lines of each lane's end, or all of it."""
        width = self._console.width // len(row)
        if height is None:
            texts = [whole(lane, self._console, width - 4) for lane in row]
            height = max(map(len, texts)) + 2
        else:
            texts = [self._layout(lane, width - 4).end(height - 2) for lane in row]
        grid = Table.grid()
        grid.add_row(*(_panel(lane, lines, width, height) for lane, lines in zip(row, texts, strict=True)))
        return grid

    def _layout(self, lane: Lane, width: int) -> Layout:
        key = (lane.request, lane.index)
        if key not in self._layouts or self._layouts[key].width != width:
            self._layouts[key] = Layout(lane, self._console, width)
        return self._layouts[key]


class Layout:
    """A growing text in lines. A frame wraps only the last line and what is new: frames are drawn on the cores that compute."""

    def __init__(self, lane: Lane, console: Console, width: int) -> None:
        self.width = width
        self._lane, self._console = lane, console
        self._lines: list[Text] = []
        self._last = Text(printable(lane.prompt), style="dim italic")
        self._taken = 0

    def end(self, height: int) -> list[Text]:
        """The last `height` lines that are not blank."""
        text = self._lane.text
        until = len(text.rstrip())  # a space at the end waits for its word: wrapped now, it might be lost
        if until > self._taken or not self._lines:
            wrapped = Text.assemble(self._last, printable(text[self._taken : until])).wrap(self._console, self.width)
            self._taken = max(until, self._taken)
            self._lines = [*self._lines, *(line for line in wrapped[:-1] if line.plain.strip())][-height:]
            self._last = wrapped[-1] if wrapped else Text()
        return [*self._lines, self._last][-height:]


def whole(lane: Lane, console: Console, width: int) -> list[Text]:
    """The prompt, dim, and all that followed it."""
    return list(Text.assemble((printable(lane.prompt), "dim italic"), printable(lane.text).rstrip()).wrap(console, width))


def _panel(lane: Lane, lines: list[Text], width: int, height: int) -> Panel:
    ended = lane.finish_reason is not None
    failed = lane.output is not None and lane.output.error is not None
    colour = "red" if failed else COLOURS[(lane.request) % len(COLOURS)]
    body = Text("\n").join(lines) if lines else Text()
    if failed and lane.output is not None:
        body = Text(f"{lane.output.error}", style="red")
    return Panel(
        body,
        title=Text(lane.label, style=f"bold {colour}"),
        title_align="left",
        subtitle=Text(lane.status, style="dim" if not ended else colour),
        subtitle_align="right",
        border_style=colour if ended or lane.num_tokens else "dim",
        width=width,
        height=height,
    )


def printable(text: str) -> str:
    """`text` without control characters, which would move the cursor out of its panel. Line ends stay, at most two in a row."""
    kept = "".join(" " if c == "\t" else c for c in text if c in "\n\t" or c.isprintable() or c == "\u200d")
    return re.sub(r"\n{3,}", "\n\n", kept)
