"""Plots are well-formed, and points lie where they belong."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from bench.scaling import limits
from bench.speed.shapes import QWEN3
from bench.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, plot

SVG = "{http://www.w3.org/2000/svg}"


def test_points_lie_on_the_axes() -> None:
    tree = ET.fromstring(
        plot("a <title> & more", "x", "y", [Series("one", [(1, 10), (2, 20), (4, 50)]), Series("limit", [(1, 20), (4, 100)], limit=True)])
    )
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in tree.iter(f"{SVG}circle")]
    # x doubles in equal steps; y runs from 10 at the bottom to 100 at the top. The limit has no circles.
    assert [x for x, _ in circles] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    assert circles[0][1] == HEIGHT - BOTTOM and circles[0][1] > circles[1][1] > circles[2][1] > TOP
    dashed = [path for path in tree.iter(f"{SVG}path") if "stroke-dasharray" in path.attrib]
    assert len(dashed) == 2 and dashed[0].attrib["d"].endswith(f"{WIDTH - RIGHT:.1f} {TOP:.1f}")
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    assert "a <title> & more" in texts and {"10", "20", "50", "100", "1", "2", "4"} <= set(texts)


@pytest.mark.parametrize("points", [[], [(1, 0)], [(0, 1)]])
def test_what_no_logarithm_has(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        plot("", "", "", [Series("one", points)])


def test_one_point_is_a_plot() -> None:
    assert ET.fromstring(plot("", "", "", [Series("one", [(8, 3.5)])])).tag == f"{SVG}svg"


def test_scaling_limits() -> None:
    batch, context, prompt = limits(QWEN3, "none", [1, 64], [128, 16_384], read=20e9, rate=200e9)
    assert batch[0][1] == pytest.approx(20e9 / (2 * 595_984_384), rel=1e-3)  # reading the weights
    assert batch[1][1] == pytest.approx(200e9 / (2 * 595_984_384), rel=0.03)  # arithmetic, and a little attention
    assert context[1][1] == pytest.approx(20e9 / (2 * 595_984_384 + 114_688 * 16_384), rel=1e-3)
    assert context[0][1] < batch[0][1] and prompt[1][1] < prompt[0][1]
