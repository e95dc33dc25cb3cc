"""The page in a real browser: it streams, draws what there is, works by keyboard, and tells nobody what is not theirs. Keeps screenshots."""

from __future__ import annotations

import base64
import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM
from tests.server.conftest import KEY, OTHER_KEY, Running, running

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
SECRET = "jumps over the lazy dog"
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def site(model: str) -> Iterator[Running]:
    with running(lambda: LLM(model, page_size=4, cache_bytes=2**20, num_threads=1)) as one:
        yield one
        one.serving.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture
def open_page(browser: Any, site: Running) -> Iterator[Any]:
    """open_page(key, **context): the page, with its complaints in `page.complaints`."""
    contexts, pages = [], []

    def get(key: str | None = KEY, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": 1440, "height": 1000}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(site.url)
        if key:
            page.fill("#key", key)
            page.press("#key", "Enter")
            page.wait_for_selector("#status[data-status=ready]")
            until(page, "quire.feed.states.length > 0 && document.querySelector('#models').options.length > 0")
            page.complaints.clear()  # of the answer before there was a key
        pages.append(page)
        return page

    yield get
    for page in pages:
        assert page.complaints == []
    for context in contexts:
        context.close()


def until(page: Any, condition: str) -> None:
    """Playwright's own wait evaluates a string in the page, which its policy forbids."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(30)


def send(page: Any, prompt: str, **params: object) -> None:
    for name, value in {"max_tokens": 40, **params}.items():
        page.fill(f"#{name}", str(value))
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")


def test_without_a_key_it_asks_for_one(open_page: Any, shots: Path) -> None:
    page = open_page(key=None)
    page.wait_for_selector("#status[data-status=refused]")
    assert page.inner_text("#status") == "needs an API key" and page.get_attribute("#key", "aria-invalid") == "true"
    page.screenshot(path=shots / "no_key.png")
    page.complaints.clear()  # Chromium reports the 401 itself


def test_the_playground_streams_several_at_once(open_page: Any, shots: Path) -> None:
    page = open_page()
    send(page, SECRET, n=2)
    send(page, "pack my box", n=1, copies=2)
    until(page, "document.querySelectorAll('.card').length === 3 && !document.querySelector('.card.running')")
    cards = page.query_selector_all(".card")
    assert [len(card.query_selector_all(".choice")) for card in cards] == [1, 1, 2]
    for card in cards:
        text = card.inner_text()
        assert any(reason in text for reason in ("length", "stop")) and "to the first" in text and "prompt tokens cached" in text
    shades = page.eval_on_selector_all(".token[title]", "tokens => tokens.map((token) => token.style.backgroundColor)")
    assert len(set(shades)) > 3 and all(shade.startswith("rgba(var(--shade)") or shade.startswith("rgb") for shade in shades)
    page.screenshot(path=shots / "answers.png")
    with page.expect_download() as downloading:
        cards[-1].query_selector("button:has-text('Trace')").click()
    events = json.loads(Path(downloading.value.path()).read_text())["traceEvents"]
    assert {"queued", "prefill", "decode", "chunk", "token"} <= {event["name"] for event in events}


def test_stop_ends_the_request(open_page: Any, site: Running) -> None:
    page = open_page()
    send(page, SECRET, max_tokens=1000, copies=2)
    page.wait_for_selector(".card.running .token")
    page.click("#stop-all")
    until(page, "!document.querySelector('.card.running')")
    assert page.inner_text(".card .state") in ("stopped", "stop")
    until(page, "quire.feed.rows.size === 0")
    assert site.llm.stats()["num_held_pages"] == 0


def test_a_conversation_goes_on(open_page: Any) -> None:
    page = open_page()
    page.check("input[value=chat]", force=True)
    send(page, "hello", max_tokens=8)
    until(page, "document.querySelector('.card .state').textContent.match(/length|stop/)")
    page.click(".card button:has-text('Reply')")
    page.fill("#prompt", "and then?")
    page.press("#prompt", "Control+Enter")
    until(page, "document.querySelectorAll('.card .choice').length === 2 && !document.querySelector('.card.running')")
    assert len(page.query_selector_all(".card")) == 1 and "and then?" in page.inner_text(".card")


def test_what_is_refused_is_said(open_page: Any) -> None:
    page = open_page()
    send(page, SECRET, max_tokens=100_000)
    page.wait_for_selector(".card .error")
    assert "2048" in page.inner_text(".card .error")
    page.complaints.clear()  # Chromium reports the 400 itself


def test_the_cells_are_the_states(open_page: Any, site: Running, shots: Path) -> None:
    page = open_page()
    done = threading.Event()

    def load() -> None:
        for i in range(3):
            site.complete(prompt=SECRET * (i + 1), max_tokens=150, n=3, ignore_eos=True, temperature=1.0)
        done.set()

    thread = threading.Thread(target=load)
    thread.start()
    until(page, "quire.feed.rows.size > 1")
    page.screenshot(path=shots / "running.png")
    while not done.is_set():
        assert page.evaluate("quire.map.drawn.every((state, page) => state === quire.feed.states[page])")
        page.wait_for_timeout(100)
    thread.join()
    until(page, "quire.feed.rows.size === 0")
    states = base64.b64decode(page.evaluate("btoa(String.fromCharCode(...quire.feed.states))"))
    assert states == site.llm.cache_map().states
    wrong = page.evaluate("""() => {
        const { map, feed } = quire, seen = {}, wrong = [];
        feed.states.forEach((state, page) => {
            const at = map.place(page).map((length) => Math.round(length * map.ratio));
            const pixel = map.pen.getImageData(...at, 1, 1).data.join();
            if ((seen[state] ??= pixel) !== pixel) wrong.push(page);
        });
        return wrong.length || new Set(Object.values(seen)).size !== Object.keys(seen).length;
    }""")
    assert not wrong, "a state has one colour, and another state another"


def test_the_tooltip_tells_the_owner_only(open_page: Any, site: Running, shots: Path) -> None:
    site.complete(prompt=SECRET, max_tokens=2, temperature=0)
    mine, other = open_page(), open_page(OTHER_KEY)
    namespace = site.serving.settings.keys.caller(f"Bearer {KEY}".encode()).namespace  # type: ignore[union-attr]
    page_id = next(i for i in range(site.llm.info.num_pages) if site.llm.page(i, namespace=namespace).position == 0)
    for page in (mine, other):
        x, y = page.evaluate(f"quire.map.place({page_id})")
        page.hover("#map", position={"x": x - 3, "y": y})
        until(page, "document.querySelectorAll('#tip p').length > 1")
    assert mine.inner_text("#tip pre") and "Tokens 0 to 3" in mine.inner_text("#tip")
    assert other.query_selector("#tip pre") is None and "not this key's to see" in other.inner_text("#tip")
    mine.screenshot(path=shots / "tooltip.png")


def test_the_keyboard_reaches_everything(open_page: Any) -> None:
    page = open_page()
    page.reload()  # the way begins at the top
    until(page, "quire.feed.states.length > 0 && document.querySelector('#models').options.length > 0")
    page.complaints.clear()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.className"))
        outline = page.evaluate(
            """() => {
                const at = document.activeElement; // where the input itself is unseen, what stands for it is framed
                return [at, at.nextElementSibling ?? at].map((one) => getComputedStyle(one).outlineStyle).join();
            }"""
        )
        assert "solid" in outline or "auto" in outline, reached
        if reached[-1] == "map":
            break
    order = [
        name
        for name in ("skip", "key", "theme", "mode", "models", "prompt", "max_tokens", "temperature", "n", "copies", "send", "shade", "follow", "map")
    ]
    assert [name for name in reached if name in order] == order
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    until(page, "document.querySelector('#tip-said').textContent.startsWith('Page 1,')")
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")
    unnamed = page.eval_on_selector_all(
        "button, input, select, textarea",
        "all => all.filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim()).map((one) => one.id)",
    )
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_system_chooses_the_theme_and_the_button_overrules_it(open_page: Any, shots: Path, scheme: str) -> None:
    page = open_page(color_scheme=scheme, reduced_motion="reduce")
    luminance = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => +a + +b, 0)"
    assert (page.evaluate(luminance) > 380) == (scheme == "light")
    page.screenshot(path=shots / f"{scheme}.png")
    other = {"light": "dark", "dark": "light"}[scheme]
    while page.evaluate("document.documentElement.dataset.theme") != other:
        page.click("#theme")
    assert (page.evaluate(luminance) > 380) == (other == "light")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == other


def test_ten_thousand_pages_are_smooth(open_page: Any, shots: Path) -> None:
    """Made up in the browser: what 64 sequences do to 10,000 pages in one tick."""
    page, rng = open_page(), random.Random(1)
    states = bytes(rng.choice((0, 1, 1, 2, 3, 3, 3, 4)) for _ in range(10_000))
    message = {
        "status": "ready",
        "at": 1.0,
        "names": ["free", "held", "shared", "cached", "pinned", "moving", "retired"],
        "rows": [],
        "prompt_tokens": 0,
    }
    message |= {"full": base64.b64encode(states).decode(), "counts": {"free": 10_000, "cached": 0, "retired": 0}, "cached_tokens": 0}
    message["stats"] = dict.fromkeys(("num_running", "num_waiting", "num_computed_tokens", "num_preemptions", "num_steps"), 0)
    times = page.evaluate(
        """async (message) => {
            const { feed, map } = quire, took = [], frames = [];
            feed.stopping.abort();
            feed.take(message);
            const whole = map.frames.at(-1);
            const rows = Array.from({ length: 64 }, (_, k) => [1e6 + k, k % 2 ? `cmpl-${k}abcdefabcdef` : null, 0, 900, 2500, 2400, null]);
            const pages = (i) => Array.from({ length: 150 }, (_, j) => (i * 150 + j * 7) % 10000);
            const paths = Object.fromEntries(rows.map(([k], i) => [k, { 0: { all: pages(i) } }]));
            for (let tick = 0; tick < 30; tick++) {
                const delta = Array.from({ length: 200 }, (_, i) => [(i * 47 + tick * 13) % 10000, 1, (i + tick) % 5]).flat();
                const began = performance.now();
                feed.take({ ...message, full: undefined, delta, at: 1 + tick * 0.15, rows, paths: tick ? {} : paths });
                const asked = performance.now();
                took.push(asked - began);
                await new Promise(requestAnimationFrame);
                await new Promise((resume) => setTimeout(resume));
                frames.push(performance.now() - began);
            }
            const median = (all) => all.toSorted((a, b) => a - b)[all.length >> 1];
            return { whole, tick: median(took), frame: median(frames), right: map.drawn.every((state, i) => state === feed.states[i]) };
        }""",
        message,
    )
    page.screenshot(path=shots / "ten_thousand.png")
    print(times, shots)
    assert times["right"]
    assert times["tick"] < 100 and times["frame"] < 400, times  # some 3 and 17 ms on a quiet machine; a suite shares its cores
