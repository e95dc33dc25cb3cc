"""The API's page: made by itself out of our OpenAPI document, in a browser that reaches nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from quire.server.page import STATIC
from tests.server.browser import browser, open_page, shots, site, until
from tests.server.conftest import KEY, Running
from tests.server.test_openapi import document

__all__ = ["browser", "open_page", "shots", "site"]


def test_nothing_comes_from_outside(server: Running) -> None:
    for file in STATIC.iterdir():
        assert not re.search(r"(https?:)?//[a-z0-9]+\.|@import|cdn", file.read_text()), file.name
    for path in ("/docs", "/page/static/docs.html", "/"):
        answer = server.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"] and "http" not in answer.headers["content-security-policy"]
    assert server.get("/openapi.json", key=None).status_code == server.get("/docs", key=None).status_code == 401
    assert server.get("/docs/oauth2-redirect").status_code == 404


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_lists_every_address_and_object(open_page: Any, site: Running, shots: Path, scheme: str) -> None:
    page = open_page(key=None, color_scheme=scheme)
    page.wait_for_selector("#status[data-status=refused]")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.click("a:has-text('API')")
    page.wait_for_selector("#status[data-status=refused]")
    assert page.query_selector(".entry") is None, "without a key nothing is told"
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    until(page, "document.querySelectorAll('.entry').length > 0")
    page.complaints.clear()  # Chromium reports the 401s itself
    operations = {f"{method}:{path}" for path, told in document()["paths"].items() for method in told}
    shown = page.eval_on_selector_all(".entry", "all => all.map((one) => one.id)")
    assert len(shown) == len(set(shown)) and set(shown) == operations | set(document()["components"]["schemas"])
    links = page.eval_on_selector_all(".kind a", "all => all.map((one) => one.hash.slice(1))")
    assert set(links) <= set(shown)
    assert all(url.startswith(site.url) for url in asked) and not re.search(r"undefined|NaN|\[object", page.inner_text("main"))
    page.screenshot(path=shots / f"docs_{scheme}.png")
    page.click("[id='post:/v1/completions'] summary")
    fields = page.eval_on_selector_all(
        "[id='post:/v1/completions'] table:first-of-type td:first-child code", "all => all.map((one) => one.textContent)"
    )
    assert set(document()["components"]["schemas"]["CompletionRequest"]["properties"]) <= set(fields)
    kinds = page.inner_text("[id='post:/v1/completions'] .inside")
    assert "integer (≥ -2^63, < 2^64) or null" in kinds and "2,147" not in kinds and "object of numbers" in kinds
    page.screenshot(path=shots / f"docs_open_{scheme}.png")
    page.click("#unfold")
    assert not re.search(r"undefined|NaN|\[object", page.inner_text("main"))
    page.click("#unfold")
    page.fill("#filter", "cached_tokens")
    assert 0 < page.locator(".entry:visible").count() < len(shown)
    page.goto(f"{site.url}/page/static/docs.html#Usage")
    until(page, "document.getElementById('Usage')?.open === true")
    page.set_viewport_size({"width": 360, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=shots / f"docs_narrow_{scheme}.png")
