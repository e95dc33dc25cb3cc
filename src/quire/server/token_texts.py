"""Single tokens as text and as bytes, for logprobs: a token may be part of a character, or begin with a space that decoding alone drops."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from quire.server.errors import refused
from quire.text.detokenizer import EACH_BYTE
from quire.text.tokenizer import TextTokenizer

SPACES = re.compile(r"\s+")


class TokenText(NamedTuple):
    """A token's text and bytes. The text of one that is not whole characters is its bytes written out, so that two stay two."""

    text: str
    raw: bytes


class TokenTexts:
    """Texts of one tokenizer's tokens. Each is worked out once."""

    def __init__(self, hf: Any) -> None:
        self._hf, self._tokenizer = hf, TextTokenizer(hf)
        self._known: dict[int, TokenText] = {}
        self.errors = EACH_BYTE if self._tokenizer.byte_ids else "replace"  # how bytes that are no character come out of it
        self._letters = _byte_letters() if hf.is_fast and _is_byte_level(hf) else None
        letter = self._tokenizer.id_of("a")  # a token that is a letter wherever it stands
        self._before = letter if letter != hf.unk_token_id else None

    def of(self, token_id: int) -> TokenText:
        """One token's."""
        if token_id not in self._known:
            raw = self._bytes(token_id)
            self._known[token_id] = TokenText(f"token_id:{token_id}", b"") if raw is None else TokenText(_shown(raw), raw)
        return self._known[token_id]

    def is_special(self, token_id: int) -> bool:
        """Whether it is left out of texts without special tokens."""
        return token_id in self._tokenizer.special_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of several."""
        return self._tokenizer.decode(token_ids, skip_special_tokens)

    def _bytes(self, token_id: int) -> bytes | None:
        if not self._tokenizer.knows(token_id):  # a row of logits without a token behind it
            return None
        token = self._hf.convert_ids_to_tokens(token_id)
        if self._letters is not None and all(letter in self._letters for letter in token) and not self.is_special(token_id):
            return bytes(self._letters[letter] for letter in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes((int(token[3:5], 16),))
        if self._before is None:
            return self.decode([token_id], False).encode()
        # What it adds to a text: alone, at the start of one, some decoders drop its space.
        before, both = self.decode([self._before], False), self.decode([self._before, token_id], False)
        return (both.removeprefix(before) if both.startswith(before) else self.decode([token_id], False)).encode()


class Offsets:
    """Where in a growing text each of its tokens begins. Special tokens take no room where they are left out.

    With `prompt` the tokens are those of this text, which the caller wrote or has been told: special tokens take room where they stand in it, and a
    space that the tokenizer has put before a word takes none.
    """

    def __init__(self, texts: TokenTexts, start: int, skip_special_tokens: bool, prompt: str | None = None) -> None:
        self._texts, self._at, self._skip, self._prompt = texts, start, skip_special_tokens, prompt
        self._characters = codecs.getincrementaldecoder("utf-8")(texts.errors)

    def next(self, token_id: int) -> int:
        """That of the next token: how many characters are complete before it."""
        raw = self._shown(token_id)
        if raw and not 0x80 <= raw[0] < 0xC0:  # nor will a character be whose bytes came before
            self._at += len(self._characters.decode(b"", final=True))
        at = self._at
        self._at += len(self._characters.decode(raw))
        return at if self._prompt is None else min(at, len(self._prompt))

    def _shown(self, token_id: int) -> bytes:
        raw, special = self._texts.of(token_id).raw, self._texts.is_special(token_id)
        if self._prompt is None:
            return b"" if self._skip and special else raw
        if self._prompt.startswith(raw.decode(errors="ignore"), self._at):
            return raw
        raw = raw if special else raw.removeprefix(b" ")
        word, gap = raw.decode(errors="ignore"), SPACES.match(self._prompt, self._at)
        if word and gap and self._prompt.startswith(word, gap.end()):  # some tokens swallow the spaces beside them, some tokenizers all
            self._at = gap.end()
            return raw
        return b"" if special else raw


def encoded(hf: Any, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
    """The token ids of a text that is, or was made of, the field `param`.

    Raises:
        ServerError: it has no UTF-8 form, or the tokenizer cannot encode it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused(param, "must be text that has a UTF-8 form (there is a lone surrogate)") from None
    try:
        return list(hf(text, add_special_tokens=add_special_tokens, verbose=False).input_ids)
    except Exception as error:  # tokenizers raises plain Exception, for instance for a word outside a vocabulary without <unk>
        raise refused(param, f"must be text that the tokenizer can encode ({error})") from error


def _shown(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _is_byte_level(hf: Any) -> bool:
    decoder = json.loads(hf.backend_tokenizer.to_str()).get("decoder") or {}
    return "ByteLevel" in {decoder.get("type"), *(inner.get("type") for inner in decoder.get("decoders", []))}


def _byte_letters() -> dict[str, int]:
    """The letter by which byte-level vocabularies write each byte: printable ones themselves, the others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
