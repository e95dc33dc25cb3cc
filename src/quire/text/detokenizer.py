"""Token ids to text, a token at a time: what is certain comes at once, what is not is held.

The text of a generation is what decoding adds to its prompt: `decode(prompt + generated)` without the `decode(prompt)` it begins with. So a
leading space that the tokenizer drops at the start of a text, but not after a prompt, is kept. Two rules make that exact:

- A character whose bytes begin in the prompt and end in the generation belongs to the generation. If it never completes, its U+FFFD belongs
  to the prompt.
- Byte-fallback tokens (`<0xE2>`): each whole character comes out as itself and each byte that is part of none as one U+FFFD. `decode` gives
  the same for every run of such tokens except one with both: there it turns the good characters into U+FFFD too, after the fact, which a
  stream could only follow by holding every run to its end.

`tokenizers.decoders.DecodeStream` does not do: it holds bytes that never complete for ever, and raises on such a run.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from os.path import commonprefix

from quire.text.tokenizer import TextTokenizer

REPLACEMENT = "\ufffd"
EACH_BYTE = "quire.replace_each_byte"  # an error handler of codecs: one U+FFFD for each byte
# An incomplete character is at most three bytes. A decoder shows it as one U+FFFD, or as one for each byte.
MAX_HELD_CHARS = 3
# Tokens decoded again as the left context of the next one: enough to be no longer at the start of a text.
CONTEXT_TOKENS = 4
# While something is held, also enough to cover it: three U+FFFD of up to three bytes, a character before, and three bytes to find the
# first character boundary, at a token a byte.
HELD_CONTEXT_TOKENS = 16
MAX_WINDOW_TOKENS = 1024


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


class Detokenizer:
    """The text of one growing sequence.

    The text depends only on the tokens, never on how many come in one push. All pushes and the flush together are the whole text, at any
    moment at most three characters of it are held, and a push costs the same after any number of tokens.

    Args:
        tokenizer: the tokenizer of the model.
        prompt_token_ids: the prompt; its last few tokens are the context of the first generated one, and none of its text is returned.
        skip_special_tokens: leave special tokens out of the text, as `decode` does.
        whole: keep a leading space behind a prompt without text, too: a grammar has counted it.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True, *, whole: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._bytes = tokenizer.byte_ids
        # With byte-fallback tokens every other token is whole characters, so that a U+FFFD among them is meant.
        self._max_held = 0 if self._bytes else MAX_HELD_CHARS
        self._utf8 = codecs.getincrementaldecoder("utf-8")(EACH_BYTE)
        self._window: list[int] = []  # the last tokens, byte-fallback ones left out
        self._settled = 0  # characters of the window's text that were returned
        self._held = ""  # the rest of the window's text
        self._slide_at = 2 * CONTEXT_TOKENS
        self._prompt_held = ""
        for token_id in self._tail(prompt_token_ids):
            self._consume(token_id)
        if whole and not self._window:
            self._start_window_with_a_letter()
        self._prompt_held = self._all_held()

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens and returns the text that is now certain, possibly empty."""
        return self._own("".join([self._consume(token_id) for token_id in token_ids]))

    def flush(self) -> str:
        """Returns what was held when no more tokens will come: U+FFFD for bytes of a character that did not complete."""
        text = self._all_held()
        self._utf8.reset()
        self._settled += len(self._held)
        self._held = ""
        return self._own(text)

    def _consume(self, token_id: int) -> str:
        """Takes one token and returns the text that is now certain, the prompt's part included."""
        if not self._has_text(token_id):
            return ""
        byte = self._bytes.get(token_id)
        # At the start of a text an ASCII byte is left to the decoder, which may drop a leading space.
        if byte is not None and (self._window or byte >= 0x80):
            if not self._window:
                self._start_window_with_a_letter()
            return self._utf8.decode(bytes((byte,)))
        return self._utf8.decode(b"", final=True) + self._decode_next(token_id)

    def _decode_next(self, token_id: int) -> str:
        self._window.append(token_id)
        window = self._decode(self._window)
        num_held = 0
        if window.endswith(REPLACEMENT):
            num_held = min(self._max_held, len(window) - len(window.rstrip(REPLACEMENT)))
        certain = max(self._settled, len(window) - num_held)
        text = window[self._settled : certain]
        self._settled, self._held = certain, window[certain:]
        if len(self._window) >= max(self._slide_at, 2 * HELD_CONTEXT_TOKENS if num_held else 0):
            self._slide(window, num_held)
        return text

    def _slide(self, window: str, num_held: int) -> None:
        """Forgets all but the last tokens of the window, whose text is `window`."""
        kept = self._window[-(HELD_CONTEXT_TOKENS if num_held else CONTEXT_TOKENS) :]
        text = self._decode(kept)
        # Where a decoder strips more than one space from the ends of a text, spaces alone are no context: keep more, at a bounded cost.
        if text.endswith(window[-num_held - 1 :]) or len(self._window) >= MAX_WINDOW_TOKENS:
            self._settled = max(0, self._settled + len(text) - len(window))
            self._window, self._slide_at = kept, 2 * CONTEXT_TOKENS
        else:
            self._slide_at = 2 * len(self._window)

    def _tail(self, prompt_token_ids: Sequence[int]) -> list[int]:
        tail: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if self._has_text(token_id):
                tail.append(token_id)
                if len(tail) == HELD_CONTEXT_TOKENS:
                    break
        return tail[::-1]

    def _start_window_with_a_letter(self) -> None:
        # Byte-fallback characters are text too: what follows them is not at the start.
        self._window = [token_id for token_id, byte in self._bytes.items() if byte == ord("a")]
        self._settled = len(self._decode(self._window))

    def _has_text(self, token_id: int) -> bool:
        """False for the tokens that `decode` passes over before it looks at any text."""
        return token_id not in self._hidden and self._tokenizer.knows(token_id)

    def _all_held(self) -> str:
        return self._held + REPLACEMENT * len(self._utf8.getstate()[0])

    def _own(self, text: str) -> str:
        """`text` without what is left at its start of the prompt's incomplete character."""
        if not self._prompt_held or not text:
            return text
        num_shared = len(commonprefix([text, self._prompt_held]))
        self._prompt_held = self._prompt_held[num_shared:] if num_shared == len(text) else ""
        return text[num_shared:]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip)
