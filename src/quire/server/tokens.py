"""POST /tokenize and /detokenize, and GET /tokenizer_info: all that a client needs who has no tokenizer of its own."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field

from quire.server.chat import chat_prompt
from quire.server.errors import ServerError, refused
from quire.server.limits import MAX_LABEL_CHARS
from quire.server.models import check_model
from quire.server.schema import Asked, TokenId
from quire.server.schema_answers import Answer, answers
from quire.server.schema_chat import ChatPrompt, Messages
from quire.server.serving import Serving, serving_of
from quire.server.sse import json_response
from quire.server.token_texts import TokenTexts, encoded

router = APIRouter(tags=["tokens"])
ModelName = Annotated[str, Field(max_length=MAX_LABEL_CHARS)] | None


class TokenizeRequest(ChatPrompt):
    """A text as `prompt`, or a chat as `messages`."""

    model: ModelName = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(default=None, description="Those that go around every text; true where not given. Not for a chat.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Asked):
    """Tokens."""

    model: ModelName = None
    tokens: list[TokenId]
    skip_special_tokens: bool | None = None


class Tokens(Answer):
    """The answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokensText(Answer):
    """The answer of POST /detokenize."""

    prompt: str


class TokenizerInfo(Answer):
    """The answer of GET /tokenizer_info: special tokens as text, null where there is none."""

    tokenizer_class: str
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


@router.post("/tokenize", responses=answers(Tokens))
async def tokenize(request: Request, asked: TokenizeRequest) -> Response:
    """The token ids that a prompt or a chat comes to."""
    serving = serving_of(request)
    info = serving.engine().info
    check_model(serving, asked.model)
    if asked.messages is not None:
        for name in ("prompt", "add_special_tokens"):
            if getattr(asked, name) is not None:
                raise refused(name, "must be left out with messages")
        ids = await chat_prompt(serving, asked, asked.messages)
    elif asked.prompt is not None:
        for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if getattr(asked, name) is not None:
                raise refused(name, "must be left out without messages")
        ids = await asyncio.to_thread(_encode, serving, asked.prompt, asked.add_special_tokens is not False)
    else:
        raise refused("prompt", "must be given, or messages")
    strings = [_texts(serving).of(token_id).text for token_id in ids] if asked.return_token_strs else None
    return json_response({"count": len(ids), "max_model_len": info.context_len, "tokens": ids, "token_strs": strings})


@router.post("/detokenize", responses=answers(TokensText))
async def detokenize(request: Request, asked: DetokenizeRequest) -> Response:
    """The text of token ids."""
    serving = serving_of(request)
    info = serving.engine().info
    check_model(serving, asked.model)
    outside = next((token_id for token_id in asked.tokens if token_id >= info.vocab_size), None)
    if outside is not None:
        raise refused("tokens", f"must be token ids from 0 to {info.vocab_size - 1}; {outside} is not")
    text = await asyncio.to_thread(_texts(serving).decode, asked.tokens, bool(asked.skip_special_tokens))
    return json_response({"prompt": text})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> TokenizerInfo:
    """What the model's tokenizer is, for clients that make prompts out of templates and special tokens themselves."""
    serving = serving_of(request)
    llm = serving.engine()
    _texts(serving)
    hf = llm.tokenizer
    template = hf.chat_template.get("default") if isinstance(hf.chat_template, dict) else hf.chat_template  # some have several, by name
    return TokenizerInfo(
        tokenizer_class=type(hf).__name__,
        model_max_length=llm.info.context_len,
        bos_token=hf.bos_token,
        eos_token=hf.eos_token,
        pad_token=hf.pad_token,
        unk_token=hf.unk_token,
        chat_template=template,
    )


def _encode(serving: Serving, text: str, add_special_tokens: bool) -> list[int]:
    assert serving.llm is not None
    _texts(serving)
    return encoded(serving.llm.tokenizer, text, "prompt", add_special_tokens=add_special_tokens)


def _texts(serving: Serving) -> TokenTexts:
    if serving.texts is None:
        raise ServerError(400, "this model came without a tokenizer: its prompts are token ids", code="no_tokenizer")
    return serving.texts
