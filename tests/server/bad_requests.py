"""Two hundred requests that must be refused, each with what its error must say."""

from __future__ import annotations

import gzip
import json
from typing import Any, NamedTuple

GOOD: dict[str, Any] = {"prompt": "the lazy dog", "max_tokens": 4, "temperature": 0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
LONE = "\ud800"


class Bad(NamedTuple):
    """A request; `param` is the field its error names, None where it is about the whole."""

    path: str
    content: bytes
    status: int = 400
    param: str | None = None
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)


def _completion(param: str, *values: Any, named: str | None = None) -> list[Bad]:
    return [Bad(COMPLETIONS, json.dumps(GOOD | {param: value}).encode(), 400, named or param) for value in values]


def _chat(param: str, *values: Any, named: str | None = None) -> list[Bad]:
    return [Bad(CHATS, json.dumps(CHAT | {param: value}).encode(), 400, named or param) for value in values]


def _deep(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return b'{"prompt": ' + opening * depth + closing * depth + b"}"


def _fields(path: str, body: dict[str, Any], param: str, value: Any) -> Bad:
    return Bad(path, json.dumps(body | {param: value}).encode(), 400, param)


NOT_INTEGERS: tuple[Any, ...] = ("5", 1.5, True, [1], {}, -1, 2**63, 10**30)
NOT_NUMBERS: tuple[Any, ...] = ("1", True, [], {}, float("nan"), float("inf"), -1e300, 1e300)

BAD: list[Bad] = [
    # What is no JSON object.
    *(Bad(COMPLETIONS, content) for content in (b"", b"{", b'{"model": ', b"[]", b"1", b'"x"', b"null", b"true", b"\xff\xfe", b"\x00")),
    *(Bad(COMPLETIONS, content) for content in (b'{"prompt": "x"}}', b'{"prompt": "x",}', b'{"prompt": \xff"x"}', b'{"prompt": "\xed\xa0\x80"}')),
    *(Bad(CHATS, content) for content in (b"", b"{", b"[]", b'{"messages": [}', b"<xml/>")),
    *(Bad(COMPLETIONS, json.dumps(GOOD).encode(), headers=headers) for headers in ((), (("content-type", "text/plain"),))),
    Bad(COMPLETIONS, gzip.compress(json.dumps(GOOD).encode()), 415, headers=(("content-type", "application/json"), ("content-encoding", "gzip"))),
    *(Bad(COMPLETIONS, _deep(depth)) for depth in (3, 65, 500, 5000, 100_000)),
    Bad(COMPLETIONS, _deep(20_000, b'{"a":', b"}")),
    Bad(CHATS, b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": ' + b"[" * 70 + b"]" * 70 + b"}}"),
    Bad(COMPLETIONS, b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}"),
    Bad(COMPLETIONS, b'{"prompt": "x", "temperature": 1e999}', param="temperature"),
    # Prompts.
    *_completion("prompt", None, [], [[]], [""], "", 5, 1.5, True, {}, {"a": 1}, [None], [True], [1.5], ["x", 5], [[5], 6], [[[5]]], [["x"]]),
    *_completion("prompt", [-1], [600], [10**9], [2**63], [10**30], [5, -5], LONE, ["x", LONE], [5] * 9999, "x " * 9000, [[5] * 2050, [5]]),
    *_completion("prompt", [[5]] * 1025, ["x"] * 20_000),
    *_completion("n", *NOT_INTEGERS, 0, 129, 10**9),
    Bad(COMPLETIONS, json.dumps(GOOD | {"prompt": ["x"] * 600, "n": 2}).encode(), 400, "n"),
    # Numbers.
    *_completion("max_tokens", *NOT_INTEGERS, 0),
    *_completion("max_tokens", 2048, named="prompt"),
    *_completion("temperature", *NOT_NUMBERS, -0.1, 2.01, 99),
    *_completion("top_p", *NOT_NUMBERS, 0, 1.01),
    *_completion("min_p", -0.1, 1.1, "x"),
    *_completion("top_k", -2, 1.5, 2**31),
    *_completion("repetition_penalty", 0, -1, 1e7, "x"),
    *_completion("presence_penalty", -2.1, 2.1, "x"),
    *_completion("frequency_penalty", -2.1, 2.1, []),
    *_completion("seed", "x", 1.5, 2**64, -(2**63) - 1),
    *_completion("min_tokens", -1, 5, "x"),
    *_completion("best_of", 0, -1, 129, 1.5, "x"),
    *_completion("logprobs", -1, 21, True, "x"),
    *_completion("prompt_logprobs", -1, 21, "x"),
    *_completion("priority", 2**31, -(2**31) - 1, "x"),
    # Lists and mappings.
    *_completion("stop", "", [""], 5, ["x"] * 17, ["x"] * 100_000, "x" * 5000, {}),
    *_completion("stop", [5], [None], named="stop.0"),
    *_completion("stop_token_ids", 5, [600], list(range(65))),
    *_completion("stop_token_ids", ["x"], [-1], [2**31], [True], named="stop_token_ids.0"),
    *_completion("logit_bias", 5, [], {"x": 1}, {"5": 101}, {"-1": 1}, {"600": 1}, {"5.0": 1}, {"99999999999": 1}, {str(i): 1 for i in range(1025)}),
    *_completion("logit_bias", {"05": 1}, {"5": 1, "05": 2}),
    *_completion("allowed_token_ids", [], 5, [600], list(range(4097))),
    *_completion("suffix", "x", 5),
    *_completion("cache_salt", "", 5, "x" * 600),
    *_completion("user", 5, "x" * 600),
    *_completion("stream", 1, "yes"),
    *_completion("stream_options", 5, [], {}, {"include_usage": True}, {"include_usage": False}),
    *(_fields(COMPLETIONS, GOOD | {"stream": stream}, "stream_options", {"include_usage": True}) for stream in (False, None)),
    *_completion("structured_outputs", 5, [], {}, {"regex": "a", "choice": ["b"]}, {"grammar": "start: <[999]>"}, {"json": {"type": "nothing"}}),
    *_completion("structured_outputs", {"regex": "(a"}, {"regex": "(?=a)b"}, {"json": False}, {"json": {"not": {}}}, {"grammar": "nonsense"}),
    *_completion("structured_outputs", {"json": "{"}, named="structured_outputs.json"),
    *_completion("structured_outputs", {"regex": "a" * 20_000}, {"regex": 5}, {"regex": LONE}, named="structured_outputs.regex"),
    *_completion("structured_outputs", {"choice": []}, {"choice": ["x"] * 1025}, {"choice": "x"}, named="structured_outputs.choice"),
    *_completion("structured_outputs", {"whitespace": "x"}, named="structured_outputs.whitespace"),
    *_completion("response_format", 5, "json"),
    *_completion("response_format", {"type": "nonsense"}, {}, named="response_format.type"),
    *_completion("response_format", {"type": "json_schema"}, {"type": "text", "json_schema": {"name": "x"}}, named="response_format.json_schema"),
    *_completion("response_format", {"type": "json_schema", "json_schema": {}}, named="response_format.json_schema.name"),
    *_completion(
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "minLength": 5, "maxLength": 4}}},
    ),
    *_completion("echo", "yes", 1),
    *_completion("ignore_eos", 1),
    # Fields that are not there.
    *(_fields(COMPLETIONS, GOOD, name, 1) for name in ("no_such_field", "tokenize", "return_logits", "messages", "bad_words")),
    *(_fields(CHATS, CHAT, name, 1) for name in ("prompt", "functions", "function_call", "echo", "chat_template", "audio", "suffix")),
    Bad(COMPLETIONS, json.dumps(GOOD | {LONE: 1}).encode()),
    Bad(COMPLETIONS, json.dumps({f"x{i}": i for i in range(50_000)}).encode()),
    # Chats.
    *_chat("messages", None, [], "hi", 5, {}, named="messages"),
    *_chat("messages", [5], ["x"], [None], [[]], named="messages.0"),
    *_chat("messages", [{"role": "user", "content": LONE}]),
    *_chat("messages", [{"role": "user", "content": "x "}] * 4000),
    *_chat("messages", [{"role": "user", "content": "x"}] * 5000),
    *_chat("messages", [{"role": "nobody", "content": "x"}], [{"role": 5, "content": "x"}], named="messages.0.role"),
    *_chat("messages", [{"content": "x"}], named="messages.0.role"),
    *_chat("messages", [{"role": "user", "content": 5}], [{"role": "user", "content": None}], named="messages.0.content"),
    *_chat("messages", [{"role": "user", "content": "x", "extra": 1}], named="messages.0.extra"),
    *_chat("messages", [{"role": "assistant", "content": "x", "refusal": "no"}], named="messages.0.refusal"),
    *_chat("max_tokens", 0, -1, "5"),
    *_chat("max_tokens", 2048, named="messages"),
    *_chat("top_logprobs", 2, 21, -1),
    *_chat("logprobs", 2, "yes"),
    *_chat("stream_options", {"include_usage": True}),
    _fields("/v1/responses", {"input": "x"}, "stream_options", {"include_obfuscation": False}),
    *_chat("tools", 5, {}, named="tools"),
    *_chat("tools", [{"type": "web_search"}], named="tools.0.type"),
    *_chat("tools", [{"type": "function", "function": {"name": "f"}}] * 2),
    *_chat(
        "tools",
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}, "strict": True}}],
        named="tools.0.function.parameters",
    ),
    *_chat("tools", [{"type": "function", "function": {"name": "f", "parameters": {"default": float("nan")}}}], named="tools.0.function.parameters"),
    Bad("/v1/responses", b'{"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"a": [1e999]}}]}', 400, "tools.0.parameters"),
    *_chat("chat_template_kwargs", {"shout": float("-inf")}),
    *_chat("tool_choice", "required", {"type": "function", "function": {"name": "f"}}),
    *_chat("parallel_tool_calls", False),
    *_chat("response_format", "json", 5),
    # Embeddings.
    *(_fields("/v1/embeddings", {"input": "x"}, "input", value) for value in (None, [], "", [[]], 5, [600], [None], "x " * 9000, LONE)),
    *(_fields("/v1/embeddings", {"input": "x"}, "dimensions", value) for value in (0, 7, "64", 2**31)),
    *(_fields("/v1/embeddings", {"input": "x"}, "encoding_format", value) for value in ("int8", 5)),
    *(_fields("/v1/embeddings", {"input": "x"}, "pooling", value) for value in ("max", 5)),
    *(_fields("/v1/embeddings", {"input": "x"}, name, 1) for name in ("prompt", "max_tokens", "temperature", "stream")),
    # Other addresses and methods.
    *(Bad(path, b"", 404, None, "GET", ()) for path in ("/nothing", "/v1", "/v1/", "/v1/models/other", "/%00", "/..%2fetc/passwd", "/page/static/x")),
    *(Bad(path, b"{}", 405, None, method) for path, method in ((COMPLETIONS, "GET"), (CHATS, "PUT"), ("/v1/models", "POST"), ("/health", "DELETE"))),
    Bad(COMPLETIONS, json.dumps(GOOD | {"model": "other"}).encode(), 404, "model"),
    Bad(CHATS, json.dumps(CHAT | {"model": LONE}).encode(), 400, "model"),
    Bad(COMPLETIONS, b'{"prompt": "' + b"x" * (4 * 2**20) + b'"}', 413),
    Bad("/tokenize", b"{}", 400, "prompt"),
    Bad("/tokenize", b'{"prompt": 5}', 400, "prompt"),
    Bad("/detokenize", b'{"tokens": [600]}', 400, "tokens"),
    Bad("/detokenize", b'{"tokens": "x"}', 400, "tokens"),
    Bad("/detokenize", b'{"tokens": [-1]}', 400, "tokens.0"),
    Bad("/detokenize", b"{}", 400, "tokens"),
]  # fmt: skip
