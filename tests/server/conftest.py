"""A real server over a tiny checkpoint: uvicorn on a free port, in a thread of the test process. One for the whole session."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quire import LLM
from quire.server.app import create_app
from quire.server.keys import KeyRing
from quire.server.life import Server, address, bind
from quire.server.serving import Serving, start_loading
from quire.server.settings import ServerSettings
from tests.engine.conftest import tokenizer
from tests.tensors.checkpoints import make

KEY, OTHER_KEY = "key-of-the-tests", "another-key"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content | trim }}\n{% endfor %}"
    "{% if tools %}call <tool_call>: {{ tools | tojson }}\n{% endif %}{% if shout is defined %}SHOUT {{ shout }}\n{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass
class Running:
    """A server that runs."""

    url: str
    serving: Serving
    server: Server
    thread: threading.Thread

    @property
    def llm(self) -> LLM:
        assert self.serving.llm is not None
        return self.serving.llm

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any = None, *, key: str | None = KEY, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        headers |= more.pop("headers", {})
        return (
            httpx.post(self.url + path, json=body, headers=headers, timeout=60, **more)
            if body is not None
            else httpx.post(self.url + path, headers=headers, timeout=60, **more)
        )

    def get(self, path: str, key: str | None = KEY) -> httpx.Response:
        return httpx.get(self.url + path, headers={"authorization": f"Bearer {key}"} if key else {}, timeout=60)

    def complete(self, **body: Any) -> dict[str, Any]:
        answer = self.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@contextlib.contextmanager
def running(load: Callable[[], LLM], *, wait: bool = True, max_connections: int = 256, **settings: Any) -> Iterator[Running]:
    """A server with these settings. Without `wait` it may still be loading."""
    sock = bind("127.0.0.1", 0)
    serving = Serving(ServerSettings(**({"model": "tiny", "keys": KeyRing([KEY, OTHER_KEY]), "grace_s": 5.0} | settings)), load)
    server = Server(create_app(serving), serving, max_connections)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
    thread.start()
    loading = start_loading(serving, lambda: None)
    if wait:
        loading.join()
        assert serving.load_error is None, serving.load_error
    try:
        yield Running(address(sock), serving, server, thread)
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small Llama, a tokenizer and a chat template."""
    folder = make(Path(tmp_path_factory.mktemp("server")) / "tiny", "llama")
    hf = tokenizer()
    hf.chat_template = TEMPLATE
    hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(model: str) -> Iterator[Running]:
    """The server of the session. Its cache goes on from test to test, as in life."""
    with running(lambda: LLM(model, page_size=4, max_tokens_per_step=128, cache_bytes=8 * 2**20, num_threads=1)) as one:
        yield one
        one.serving.close()


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    """The openai client with a valid key and no retries."""
    return server.client()
