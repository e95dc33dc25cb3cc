"""A line plot as SVG, both axes logarithmic: a dozen shapes and some text need no library. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 48, 52
COLOURS = ("#1f5fbf", "#c2410c", "#15803d", "#7e22ce")


@dataclass(frozen=True)
class Series:
    """Points (x, y), all above 0, by rising x. A `limit` is dashed, in the colour of the series before it."""

    name: str
    points: Sequence[tuple[float, float]]
    limit: bool = False


def plot(title: str, x_name: str, y_name: str, series: Sequence[Series]) -> str:
    """The picture as text. Raises ValueError where there is no point, or one that is not above 0."""
    points = [point for one in series for point in one.points]
    if not points or min(min(point) for point in points) <= 0:
        raise ValueError("a logarithmic plot needs points above 0")
    xs = sorted({x for x, _ in points})
    x_low, x_high = math.log2(xs[0]), math.log2(xs[-1])
    ticks = _ticks(min(y for _, y in points), max(y for _, y in points))
    y_low, y_high = math.log2(ticks[0]), math.log2(ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - x_low) / (x_high - x_low or 1)
        up = (math.log2(y) - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(WIDTH / 2, 18, title, size=14),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_name),
        _text(16, (TOP + HEIGHT - BOTTOM) / 2, y_name, turned=True),
    ]
    for y in ticks:
        _, at = place(xs[0], y)
        parts += [f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#e5e5e5"/>', _text(LEFT - 8, at + 4, f"{y:,g}", "end")]
    for x in xs:
        at, _ = place(x, ticks[0])
        parts += [f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#f0f0f0"/>', _text(at, HEIGHT - BOTTOM + 18, f"{x:,g}")]
    colour, legend = -1, LEFT + 4
    for one in series:
        colour += not one.limit or colour < 0
        ink, dash = COLOURS[colour % len(COLOURS)], ' stroke-dasharray="6 4"' if one.limit else ""
        placed = [place(*point) for point in one.points]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        parts.append(f'<path d="M{line}" fill="none" stroke="{ink}" stroke-width="2"{dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{ink}"/>' for x, y in placed if not one.limit]
        parts += [f'<path d="M{legend} 34h24" stroke="{ink}" stroke-width="2"{dash}/>', _text(legend + 30, 38, one.name, "start")]
        legend += 48 + 7 * len(one.name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from at most `low` to at least `high`, two of them or more."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    steps = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
    start = max(i for i, step in enumerate(steps) if step <= low)
    stop = min(i for i, step in enumerate(steps) if step >= high and i > start)
    return steps[start : stop + 1]


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 12, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#222"{turn}>{escape(text)}</text>'
