"""A model's own chat template, rendered by a process that can be killed. Requests bring values for it, never a template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from quire.server.errors import ServerError, refused
from quire.server.limits import MAX_TEMPLATE_BYTES, MAX_TEMPLATE_S
from quire.server.token_texts import encoded
from quire.server.tool_formats import Format, detect_format

RENDERER = Path(__file__).with_name("render.py")
# Of a template's variables these are not the caller's to choose.
RESERVED = frozenset(("messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"))


class ChatTemplate:
    """Renders chats to token ids. Thread-safe; one chat at a time, which takes about a millisecond."""

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self._lock = threading.Lock()
        named = hf.special_tokens_map.items()
        self._special = {name: [str(one) for one in token] if isinstance(token, list) else str(token) for name, token in named}
        self._process: subprocess.Popen[bytes] | None = None

    def mentions(self, word: str, tools: list[dict[str, Any]] | None = None) -> bool:
        """Whether the template has this word in it."""
        return word in self._source(tools)

    def call_format(self, tools: list[dict[str, Any]]) -> Format | None:
        """The format of tool calls that the template teaches, None if it is none that is known here."""
        return detect_format(self._source(tools))

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Names and ids of the tokenizer's special tokens."""
        return {str(token): token_id for token_id, token in self._hf.added_tokens_decoder.items() if token.special}

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        values: dict[str, Any] | None = None,
    ) -> str:
        """The prompt of a chat as text. Blocks.

        Raises:
            ServerError: the template refuses the chat, or takes too long or too much memory for it.
        """
        reserved = (RESERVED | self._special.keys()) & (values or {}).keys()
        if reserved:
            raise refused(f"chat_template_kwargs.{min(reserved)}", "is not for requests to set")
        source = self._source(tools)
        unread = [name for name in values or {} if name not in source]
        if unread:
            raise refused(f"chat_template_kwargs.{min(unread)}", "must be left out: this model's chat template has no such variable")
        asked = {
            "template": source,
            # Templates write None out where they do not expect it; a key that is missing they all know.
            "messages": [{name: value for name, value in message.items() if value is not None} for message in messages],
            "variables": {**self._special, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt, **(values or {})},
            "continued": continue_final_message,
        }
        answer = self._ask(json.dumps(asked).encode() + b"\n")
        if "error" in answer:
            raise refused("messages", f"this model's chat template refused them ({answer['error']})")
        return str(answer["text"])

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered chat. The template has written the special tokens, so the tokenizer adds none."""
        return encoded(self._hf, text, "messages", add_special_tokens=False)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _source(self, tools: list[dict[str, Any]] | None) -> str:
        try:
            return str(self._hf.get_chat_template(None, tools))  # some tokenizers have one template of their own for tools
        except ValueError:
            names = ", ".join(sorted(self._hf.chat_template))
            message = f"messages: this model has chat templates for some uses ({names}) and none for this chat"
            raise ServerError(400, message, param="messages", code="no_chat_template") from None

    def _ask(self, line: bytes) -> dict[str, Any]:
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = _start()
            assert process.stdin is not None and process.stdout is not None
            watch = threading.Timer(MAX_TEMPLATE_S, process.kill)
            watch.start()
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = b""
            finally:
                watch.cancel()
            if not answer.endswith(b"\n"):
                self._end()
                raise ServerError(400, f"messages: this model's chat template took more than {MAX_TEMPLATE_S:g} s for them", param="messages")
            found: dict[str, Any] = json.loads(answer)
            return found

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _start() -> subprocess.Popen[bytes]:
    # -I and no environment: nothing that the server was started with reaches a template, but for where the date that it writes is to be taken.
    command = [sys.executable, "-I", str(RENDERER), str(MAX_TEMPLATE_BYTES)]
    zone = {name: os.environ[name] for name in ("TZ",) if name in os.environ}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=zone)
