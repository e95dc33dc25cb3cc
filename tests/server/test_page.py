"""The page in a real browser: its playground streams and stops, it works by keyboard, in both themes and in a narrow window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.browser import SECRET, browser, open_page, send, shots, site, steps_take, until
from tests.server.conftest import Running

__all__ = ["browser", "open_page", "shots", "site"]


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
    with steps_take(0.05, site):  # to its end it would run for a minute
        send(page, SECRET, max_tokens=1200, copies=2)
        page.wait_for_selector(".card.running .token")
        page.click("#stop-all")
        until(page, "!document.querySelector('.card.running')")
        assert page.inner_text(".card .state") in ("stopped", "stop")
        until(page, "quire.feed.rows.size === 0")
    assert site.llm.stats()["num_running"] == 0


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


@pytest.mark.parametrize("width", [360, 700])
def test_a_narrow_window(open_page: Any, site: Running, shots: Path, width: int) -> None:
    page = open_page()
    page.set_viewport_size({"width": width, "height": 900})
    send(page, SECRET, max_tokens=8)
    until(page, "document.querySelector('.card .state').textContent.match(/length|stop/)")
    wide = page.evaluate(
        """() => [...document.querySelectorAll('body *')]
            .filter((one) => !one.closest('.unseen, .skip') && one.getBoundingClientRect().right > innerWidth + 1)
            .map((one) => one.id || one.className || one.tagName)"""
    )
    assert wide == [] and page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=shots / f"narrow_{width}.png", full_page=True)
