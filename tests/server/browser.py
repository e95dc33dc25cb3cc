"""The page in a real browser: fixtures and waits. Screenshots stay in build/screenshots, or in the folder that QUIRE_SCREENSHOTS names."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM
from tests.engine.conftest import tokenizer
from tests.server.conftest import KEY, TEMPLATE, Running, running
from tests.tensors.checkpoints import make

CHROMIUM = shutil.which("chromium")
SECRET = "jumps over the lazy dog"
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model that never ends by itself, with a disk under its pool."""
    folder, pages = make(tmp_path_factory.mktemp("site") / "tiny", "llama", eos_token_id=None), tmp_path_factory.mktemp("pages")
    hf = tokenizer()
    hf.chat_template = TEMPLATE
    hf.save_pretrained(folder)
    with running(lambda: LLM(folder, page_size=4, cache_bytes=2**20, num_threads=1, cache_dir=pages)) as one:
        yield one
        one.serving.close()


@contextlib.contextmanager
def steps_take(seconds: float, site: Running) -> Iterator[None]:
    """Inside, a tiny model is as slow as a large one: what runs still runs when a page looks, however slow the page is."""
    runner = site.llm._built.engine.runner
    run = runner.run

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return run(*args, **options)

    runner.run = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        runner.run = run  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, where it is installed. For a module only: while it runs, this thread has an event loop."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shots() -> Path:
    folder = Path(os.environ.get("QUIRE_SCREENSHOTS") or Path(__file__).parents[2] / "build" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
