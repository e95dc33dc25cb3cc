"""A mixed load for a server in another process: every kind of request, from many clients at once, some of whom leave when they like."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from tests.server.bad_requests import BAD, CHAT, CHATS, COMPLETIONS, GOOD

KEYS = ("a-key", "another-key")
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
FORMS: list[dict[str, Any]] = [
    {"regex": "[a-f]{4,8}"},
    {"choice": ["yes", "no", "perhaps"]},
    {"json": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}},
    {"json_object": True},
    {"grammar": 'start: "a" "b"+'},
]
MAX_LENGTH = 400  # of a text that such a form asks for


class Wrong(Exception):
    """An answer that is not what it has to be."""


class Load:
    """Clients of one server. `done` counts what was asked, by kind, and so do answers to those who waited for them."""

    def __init__(self, url: str, seed: int) -> None:
        self._url, self._dice = url, random.Random(seed)
        self.done: Counter[str] = Counter()
        self._wanted: dict[str, Any] = {}
        self._kinds: dict[str, tuple[int, Callable[[httpx.AsyncClient], Awaitable[None]]]] = {
            "known": (4, self._known),
            "whole": (3, self._whole),
            "stream": (4, self._stream),
            "leaves": (5, self._leaves),
            "bad": (3, self._bad),
            "tools": (1, self._tools),
            "form": (2, self._form),
            "response": (2, self._response),
            "embedding": (1, self._embedding),
            "tokens": (1, self._tokens),
            "look": (2, self._look),
            "page": (1, self._page),
            "silent": (1, self._silent),
        }

    async def run(self, seconds: float, at_once: int) -> None:
        """Ask for so long, so many at a time.

        Raises:
            Wrong: an answer was.
        """
        names, weights = list(self._kinds), [weight for weight, _ in self._kinds.values()]
        end = time.monotonic() + seconds

        async def one_client(key: str) -> None:
            async with httpx.AsyncClient(base_url=self._url, headers={"authorization": f"Bearer {key}"}, timeout=120) as client:
                while time.monotonic() < end:
                    (name,) = self._dice.choices(names, weights)
                    await self._kinds[name][1](client)
                    self.done[name] += 1

        async with asyncio.TaskGroup() as group:
            for i in range(at_once):
                group.create_task(one_client(KEYS[i % len(KEYS)]))

    async def fill(self, num_forms: int) -> None:
        """Ask for so many different forms, so that what is kept of compiled ones has its full size."""
        async with httpx.AsyncClient(base_url=self._url, headers={"authorization": f"Bearer {KEYS[0]}"}, timeout=120) as client:
            for i in range(num_forms):
                await self._ask_form(client, {"regex": f"[a-f]{{{MAX_LENGTH - i}}}"})

    def _prompt(self) -> list[int]:
        return [self._dice.randrange(5, 300)] * self._dice.randint(1, 40)

    async def _post(self, client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int = 200) -> Any:
        answer = await client.post(path, json=body)
        if answer.status_code != status:
            raise Wrong(f"{path}: {answer.status_code}, {answer.text[:300]}")
        return answer.json()

    async def _known(self, client: httpx.AsyncClient) -> None:
        """The same answer every time, whatever else is going on."""
        for name, path, body in (("completion", COMPLETIONS, GOOD), ("chat", CHATS, CHAT | {"temperature": 0})):
            choices = (await self._post(client, path, body))["choices"]
            if self._wanted.setdefault(name, choices) != choices:
                raise Wrong(f"{name}: {choices} where {self._wanted[name]} had come")

    async def _whole(self, client: httpx.AsyncClient) -> None:
        prompts = [self._prompt() for _ in range(self._dice.randint(1, 3))]
        n, new = self._dice.randint(1, 3), self._dice.randint(1, 40)
        more = self._dice.choice([{}, {"logprobs": 3}, {"echo": True, "logprobs": 1}, {"stop": ["a", "e"]}, {"best_of": 4}])
        said = await self._post(client, COMPLETIONS, {"prompt": prompts, "n": n, "max_tokens": new, **more})
        if len(said["choices"]) != n * len(prompts):
            raise Wrong(f"{len(said['choices'])} choices")

    async def _stream(self, client: httpx.AsyncClient) -> None:
        new = self._dice.randint(1, 60)
        body = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": new, "ignore_eos": True, "temperature": 1.0}
        path, asked = self._dice.choice([(COMPLETIONS, {"prompt": self._prompt()}), (CHATS, {"messages": CHAT["messages"]})])
        async with client.stream("POST", path, json=body | asked) as answer:
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        if lines[-1:] != ["data: [DONE]"] or json.loads(lines[-2][6:])["usage"]["completion_tokens"] != new:
            raise Wrong(f"{path}: a stream ended with {lines[-2:]}")

    async def _leaves(self, client: httpx.AsyncClient) -> None:
        """Gone after a random time: before the answer, in its middle, perhaps after it."""
        body = {
            "prompt": [self._prompt() for _ in range(self._dice.randint(1, 3))],
            "n": self._dice.randint(1, 2),
            "stream": self._dice.random() < 0.8,
        }
        with contextlib.suppress(TimeoutError, httpx.TransportError):
            async with asyncio.timeout(self._dice.choice((0.0, 0.01, 0.1, 0.3)) * self._dice.random()):
                async with client.stream("POST", COMPLETIONS, json=body | {"max_tokens": 1500, "ignore_eos": True}) as answer:
                    async for _ in answer.aiter_raw():
                        pass

    async def _bad(self, client: httpx.AsyncClient) -> None:
        bad = self._dice.choice(BAD)
        try:
            answer = await client.request(bad.method, bad.path, content=bad.content, headers=dict(bad.headers))
        except httpx.TransportError:
            if bad.status != 413:  # such a connection may be closed before all was sent
                raise
            return
        if answer.status_code != bad.status:
            raise Wrong(f"{bad.path}: {answer.status_code} where {bad.status} was due, {answer.text[:300]}")

    async def _tools(self, client: httpx.AsyncClient) -> None:
        choice = self._dice.choice(["required", "auto"])
        said = await self._post(client, CHATS, CHAT | {"tools": TOOLS, "tool_choice": choice, "max_tokens": 120})
        (answer,) = said["choices"]
        if choice == "required" and answer["finish_reason"] == "tool_calls":
            (call, *_) = answer["message"]["tool_calls"]
            if json.loads(call["function"]["arguments"]) not in ({"city": "Rome"}, {"city": "Oslo"}):
                raise Wrong(f"a call of {call}")

    async def _form(self, client: httpx.AsyncClient) -> None:
        form = self._dice.choice([*FORMS, {"regex": f"[a-f]{{{self._dice.randint(1, MAX_LENGTH)}}}"}])  # also forms that were never seen
        await self._ask_form(client, form)

    async def _ask_form(self, client: httpx.AsyncClient, form: dict[str, Any]) -> None:
        said = await self._post(client, COMPLETIONS, {"prompt": self._prompt(), "max_tokens": 30, "structured_outputs": form})
        (answer,) = said["choices"]
        if form == FORMS[1] and answer["finish_reason"] == "stop" and answer["text"] not in form["choice"]:
            raise Wrong(f"{answer['text']!r} of {form}")

    async def _response(self, client: httpx.AsyncClient) -> None:
        kind = self._dice.choice([{}, {"stream": True}, {"background": True}, {"store": False}])
        asked = {"input": "hello", "max_output_tokens": self._dice.randint(1, 20), **kind}
        if "stream" in kind:
            async with client.stream("POST", "/v1/responses", json=asked) as answer:
                lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
            last = json.loads(lines[-1][6:])
            if last["type"] not in ("response.completed", "response.incomplete"):
                raise Wrong(lines[-1])
            said = last["response"]
        else:
            said = await self._post(client, "/v1/responses", asked)
        if "background" in kind:
            await self._post(client, f"/v1/responses/{said['id']}/cancel", {})
        if "store" not in kind and (await client.delete(f"/v1/responses/{said['id']}")).status_code != 200:
            raise Wrong("a stored response was not there")

    async def _embedding(self, client: httpx.AsyncClient) -> None:
        await self._post(client, "/v1/embeddings", {"input": [self._prompt(), self._prompt()]})

    async def _tokens(self, client: httpx.AsyncClient) -> None:
        ids = (await self._post(client, "/tokenize", {"prompt": "the lazy dog", "add_special_tokens": False}))["tokens"]
        if (await self._post(client, "/detokenize", {"tokens": ids}))["prompt"] != "the lazy dog":
            raise Wrong("tokens are another text")

    async def _look(self, client: httpx.AsyncClient) -> None:
        for path in ("/health", "/ready", "/metrics", "/traces", "/v1/models", "/", "/openapi.json"):
            answer = await client.get(path)
            if answer.status_code != 200:
                raise Wrong(f"{path}: {answer.status_code}")

    async def _page(self, client: httpx.AsyncClient) -> None:
        """Someone watches the page for a moment."""
        with contextlib.suppress(TimeoutError, httpx.TransportError):
            async with asyncio.timeout(self._dice.random()), client.stream("GET", "/page/events") as answer:
                if answer.status_code != 200:
                    raise Wrong(f"/page/events: {answer.status_code}")
                async for _ in answer.aiter_raw():
                    pass

    async def _silent(self, client: httpx.AsyncClient) -> None:
        """A connection on which half a request comes, and no more."""
        host, port = client.base_url.host, client.base_url.port
        _, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"[: self._dice.randint(0, 40)])
        await asyncio.sleep(self._dice.random())
        writer.transport.abort()
