"""The map in a real browser: it draws what there is, and tells nobody what is not theirs."""

from __future__ import annotations

import base64
import random
import time
from pathlib import Path
from typing import Any

from quire import SamplingParams
from quire.policy.pages import DISK_MARK, STATES
from quire.server.feed import COUNTERS
from tests.server.browser import SECRET, browser, open_page, shots, site, steps_take, until
from tests.server.conftest import KEY, OTHER_KEY, Running

__all__ = ["browser", "open_page", "shots", "site"]


def test_the_cells_are_the_states(open_page: Any, site: Running, shots: Path) -> None:
    page = open_page()
    namespace = site.serving.settings.keys.caller(f"Bearer {KEY}".encode()).namespace  # type: ignore[union-attr]
    with steps_take(0.05, site):
        params = SamplingParams(max_tokens=600, n=3, ignore_eos=True, temperature=1.0)
        streams = [site.llm.submit(SECRET * (i + 1), params, namespace=namespace if i else "another's") for i in range(2)]
        site.serving.metrics.started("completions")
        until(page, "[...quire.feed.rows.values()].filter((row) => row.waits === null).length === 6")
        for _ in range(4):
            last = page.evaluate("quire.feed.message.at")
            until(page, f"quire.feed.message.at > {last}")
            assert page.evaluate("quire.map.drawn.every((state, page) => state === quire.feed.states[page])")
        until(page, "Number(document.querySelector('#number-decode').textContent) > 0")
        page.screenshot(path=shots / "running.png")
        for stream in streams:
            stream.cancel()
        until(page, "quire.feed.rows.size === 0")
    until(page, "quire.feed.message.counts.moving === 0")
    states = base64.b64decode(page.evaluate("btoa(String.fromCharCode(...quire.feed.states))"))
    unmarked = states.translate(bytes(state & ~DISK_MARK for state in range(256)))
    assert unmarked == site.llm.cache_map().states.translate(bytes(state & ~DISK_MARK for state in range(256)))
    wrong = page.evaluate("""() => {
        const { map, feed } = quire, seen = {}, wrong = [];
        feed.states.forEach((state, page) => {
            const [x, y] = map.place(page), foot = y + (map.cell - map.gap) / 2 - 2;
            const pixel = [y, foot].map((y) => map.pen.getImageData(Math.round(x * map.ratio), Math.round(y * map.ratio), 1, 1).data.join()).join();
            if ((seen[state] ??= pixel) !== pixel) wrong.push(page);
        });
        return wrong.length || new Set(Object.values(seen)).size !== Object.keys(seen).length;
    }""")
    assert not wrong, "a state has one colour, and another state another"


def test_the_tooltip_tells_the_owner_only(open_page: Any, site: Running, shots: Path) -> None:
    site.complete(prompt=SECRET, max_tokens=2, temperature=0)
    while not site.llm.cache_map().disk.settled:  # type: ignore[union-attr]
        time.sleep(0.05)
    mine, other = open_page(), open_page(OTHER_KEY)
    namespace = site.serving.settings.keys.caller(f"Bearer {KEY}".encode()).namespace  # type: ignore[union-attr]
    page_id = next(i for i in range(site.llm.info.num_pages) if site.llm.page(i, namespace=namespace).position == 0)
    for page in (mine, other):
        x, y = page.evaluate(f"quire.map.place({page_id})")
        page.hover("#map", position={"x": x - 3, "y": y})
        until(page, "document.querySelectorAll('#tip p').length > 1")
        assert "lies on disk too" in page.inner_text("#tip")
    assert mine.inner_text("#tip pre") and "Tokens 0 to 3" in mine.inner_text("#tip")
    assert other.query_selector("#tip pre") is None and "not this key's to see" in other.inner_text("#tip")
    mine.screenshot(path=shots / "tooltip.png")


def test_what_lies_on_disk_only_is_shown(open_page: Any, site: Running, shots: Path) -> None:
    site.complete(prompt="pack my box with five dozen liquor jugs", max_tokens=2, temperature=0)
    page = open_page()
    until(page, "quire.feed.message.disk.also > 0 && quire.feed.message.counts.moving === 0")
    site.llm.reset_cache()
    site.serving.metrics.started("completions")
    until(page, "quire.feed.message.disk.also === 0")
    num = page.evaluate("quire.feed.message.disk.only")
    assert num > 0 and page.inner_text("#disk-said").startswith(f"{num} page")
    assert page.inner_text("#legend .disk b") == f"{num}" and page.evaluate("document.querySelector('#disk-cells').clientHeight > 0")
    page.screenshot(path=shots / "disk.png")


def test_of_ten_thousand_pages_only_what_changed_is_drawn(open_page: Any, shots: Path) -> None:
    """Made up in the browser: what 64 sequences do to 10,000 pages in one tick. How long it takes is in docs/page.md; no clock decides here."""
    page, rng = open_page(), random.Random(1)
    states = bytes(rng.choice((0, 1, 1, 2, 3, 3, 3, 4)) | rng.choice((0, 0, DISK_MARK)) for _ in range(10_000))
    message: dict[str, Any] = {"status": "ready", "at": 1.0, "names": STATES, "rows": [], "prompt_tokens": 0, "cached_tokens": 0}
    message |= {
        "full": base64.b64encode(states).decode(),
        "counts": {"free": 10_000, "cached": 0, "retired": 0},
        "disk": {"also": 3300, "only": 20_000},
    }
    message["stats"] = dict.fromkeys(COUNTERS, 0)
    told = page.evaluate(
        """async (message) => {
            const { feed, map } = quire, drawn = [];
            feed.stopping.abort();
            feed.take(message);
            const rows = Array.from({ length: 64 }, (_, k) => [1e6 + k, k % 2 ? `cmpl-${k}abcdefabcdef` : null, 0, 900, 2500, 2400, null]);
            const pages = (i) => Array.from({ length: 150 }, (_, j) => (i * 150 + j * 7) % 10000);
            const paths = Object.fromEntries(rows.map(([k], i) => [k, { 0: { all: pages(i) } }]));
            const fillRect = map.pen.fillRect, counts = { cells: 0 };
            map.pen.fillRect = (...at) => { counts.cells++; return fillRect.apply(map.pen, at); };
            const ticks = 30, each = 200;
            for (let tick = 0; tick < ticks; tick++) {
                const delta = Array.from({ length: each }, (_, i) => [(i * 47 + tick * 13) % 10000, 1, (i + tick) % 5]).flat();
                counts.cells = 0;
                feed.take({ ...message, full: undefined, delta, at: 1 + tick * 0.15, rows, paths: tick ? {} : paths });
                drawn.push(counts.cells);
                await new Promise(requestAnimationFrame);
            }
            return { most: Math.max(...drawn), each, right: map.drawn.every((state, i) => state === feed.states[i]) };
        }""",
        message,
    )
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        until(page, "new Promise(requestAnimationFrame)")
        page.screenshot(path=shots / f"ten_thousand_{scheme}.png")
    assert told["right"] and told["most"] <= 3 * told["each"], told
    assert "20,000 pages on disk only, " in page.inner_text("#disk-said") and " a cell" in page.inner_text("#disk-said")
