"""Which tokens' logprobs a response's messages have, where there are calls beside them."""

from __future__ import annotations

import pytest

from quire.outputs import TokenEvent
from quire.server.calling import Calling
from quire.server.response_items import Body, Items
from quire.server.token_texts import Offsets, TokenTexts
from tests.engine.conftest import tokenizer

CALLING = Calling("hermes", {"f": None}, None, [0], in_special=False)
CALL = '\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n'


def items_of(text: str, tokens_at_once: int) -> list[Body]:
    """The items that a text comes to, told of so many tokens together."""
    hf = tokenizer()
    texts, items = TokenTexts(hf), Items(CALLING, Offsets(TokenTexts(hf), 0, True))
    ids = [*hf(text).input_ids, hf.eos_token_id]
    for start in range(0, len(ids), tokens_at_once):
        part = ids[start : start + tokens_at_once]
        ended = "stop" if start + tokens_at_once >= len(ids) else None
        told = [{"token": texts.of(token_id).text, "logprob": -1.0} for token_id in part]
        items.push(TokenEvent("r", 0, hf.decode(part, skip_special_tokens=True), part, finish_reason=ended), told)
    return items.items


def said(message: Body) -> tuple[str, str]:
    """The text of a message, and of the tokens whose logprobs it has."""
    (part,) = message["content"]
    return part["text"], "".join(one["token"] for one in part["logprobs"])


@pytest.mark.parametrize("tokens_at_once", [1, 3, 1000])
def test_those_of_its_own_text(tokens_at_once: int) -> None:
    first, call, last = items_of(f"the fox:{CALL}the dog", tokens_at_once)
    assert (call["type"], call["arguments"]) == ("function_call", '{"x": 1}')
    assert said(first) == ("the fox:", "the fox:")
    assert said(last) == ("the dog", "}</tool_call>\nthe dog</s>"), "what closes a call is told with what follows"
    assert said(items_of(f"the fox:{CALL}", tokens_at_once)[0]) == ("the fox:", "the fox:")
    assert said(*items_of("<tool_call> the fox", tokens_at_once)) == ("<tool_call> the fox", "<tool_call> the fox</s>")
