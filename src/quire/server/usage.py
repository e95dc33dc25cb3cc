"""What an answer cost, and tokens' logprobs in the two shapes that OpenAI has for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from quire.outputs import RequestOutput, TopLogprob
from quire.server.token_texts import TokenTexts

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this


def usage_of(outputs: Iterable[RequestOutput]) -> dict[str, Any]:
    """The `usage` object over all outputs."""
    prompt = generated = cached = accepted = rejected = 0
    for output in outputs:
        prompt += output.receipt.prompt_tokens
        cached += output.receipt.cached_tokens
        generated += output.receipt.drawn_tokens
        accepted += output.receipt.accepted_tokens
        rejected += output.receipt.rejected_tokens
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
    usage["prompt_tokens_details"] = {"cached_tokens": cached}
    if accepted or rejected:
        usage["completion_tokens_details"] = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
    return usage


def chat_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], logprobs: Sequence[float], top: Sequence[Sequence[TopLogprob]] | None
) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""
    content = []
    for i, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        others = [_chat_token(texts, one.token_id, one.logprob) for one in top[i]] if top is not None else []
        content.append({**_chat_token(texts, token_id, logprob), "top_logprobs": others})
    return {"content": content, "refusal": None}


def completion_logprobs(
    texts: TokenTexts,
    token_ids: Sequence[int],
    logprobs: Sequence[float | None],
    top: Sequence[Sequence[TopLogprob] | None] | None,
    offsets: Sequence[int],
) -> dict[str, Any]:
    """`logprobs` of a completion's choice, or of the next tokens of one."""
    most_likely = []
    for i, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        named: dict[str, float] | None = None
        if logprob is not None and top is not None:
            named = {}
            # The drawn token is among them, even where it is not likely. Of two tokens with one text the likelier is the one shown.
            for one in (*(top[i] or ()), TopLogprob(token_id, logprob)):
                named.setdefault(texts.of(one.token_id).text, finite(one.logprob))
        most_likely.append(named)
    return {
        "tokens": [texts.of(token_id).text for token_id in token_ids],
        "token_logprobs": [None if logprob is None else finite(logprob) for logprob in logprobs],
        "top_logprobs": most_likely if top is not None else None,
        "text_offset": list(offsets),
    }


def prompt_logprobs(texts: TokenTexts, output: RequestOutput) -> list[dict[str, Any] | None] | None:
    """`prompt_logprobs`: for each token but the first, by token id, the likeliest and the token itself."""
    if output.prompt_logprobs is None:
        return None
    told: list[dict[str, Any] | None] = []
    for i, (token_id, logprob) in enumerate(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)):
        if logprob is None:
            told.append(None)
            continue
        top = output.prompt_top_logprobs[i] if output.prompt_top_logprobs is not None else None
        ranked = {str(one.token_id): _ranked(texts, one, rank) for rank, one in enumerate(top or (), 1)}
        ranked.setdefault(str(token_id), _ranked(texts, TopLogprob(token_id, logprob), None))
        told.append(ranked)
    return told


def finite(logprob: float) -> float:
    """A logprob as JSON can write it."""
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def _chat_token(texts: TokenTexts, token_id: int, logprob: float) -> dict[str, Any]:
    token = texts.of(token_id)
    return {"token": token.text, "logprob": finite(logprob), "bytes": list(token.raw)}


def _ranked(texts: TokenTexts, one: TopLogprob, rank: int | None) -> dict[str, Any]:
    return {"logprob": finite(one.logprob), "rank": rank, "decoded_token": texts.of(one.token_id).text}
