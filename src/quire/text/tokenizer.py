"""Text to token ids and back: one Hugging Face tokenizer behind the few calls Quire needs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

from quire.errors import InvalidRequestError, ModelError, ModelNotFoundError

# A local folder with none of these holds a model that takes token ids only.
TOKENIZER_FILES = ("tokenizer*", "tokenization_*.py", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "added_tokens.json")


class TextTokenizer:
    """A `PreTrainedTokenizerBase`, fast or slow, with fixed options. Safe to use from several threads at once.

    Attributes:
        hf: the wrapped tokenizer.
        vocab_size: number of tokens it knows, added ones included; a model's vocabulary may be padded beyond it.
        id_of: the id of a token by its name in the vocabulary, None where there is none.
        special_ids: the ids that decoding with `skip_special_tokens` leaves out.
        eos_token_id: the tokenizer's own end-of-sequence token, or None.
        byte_ids: token id -> byte, for tokens such as `<0xE2>` that stand for one byte of a character the vocabulary lacks
            (SentencePiece's byte fallback). Empty for byte-level vocabularies, which have no such tokens.

    Raises:
        ModelError: the tokenizer has an empty vocabulary.
    """

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.vocab_size: int = len(hf)
        if hf.is_fast:
            # The first call turns off truncation and padding that the tokenizer's file may ask for. Done here, no later call changes the
            # tokenizer: changing it while another thread encodes fails ("Already borrowed").
            hf("", verbose=False)
            self.special_ids = frozenset(i for i, token in hf.added_tokens_decoder.items() if token.special)
            self.id_of, self._token_of = hf.backend_tokenizer.token_to_id, hf.backend_tokenizer.id_to_token
        else:
            # Its own conversions may raise, or make up an answer, for what it does not know: the vocabulary itself does not.
            vocab: dict[str, int] = hf.get_vocab()
            self.special_ids = frozenset(i for i in hf.all_special_ids if i is not None)
            self.id_of, self._token_of = vocab.get, {i: token for token, i in vocab.items()}.get
        if self.vocab_size <= len(self.special_ids):
            raise ModelError(f"the tokenizer of {hf.name_or_path!r} has an empty vocabulary: its vocabulary file is missing or was not read")
        self.eos_token_id: int | None = hf.eos_token_id
        # The wrapper around the Rust call costs more than the call: go past it, but only where neither method was overridden.
        plain = hf.is_fast and all(_module(hf, name).startswith("transformers.tokenization_utils") for name in ("decode", "_decode"))
        self._backend: Any = hf.backend_tokenizer if plain else None
        self.byte_ids: Mapping[int, int] = self._find_byte_ids()

    def encode(self, text: str, *, field: str = "prompt", add_special_tokens: bool = True) -> list[int]:
        """The ids of `text` as `hf(text).input_ids` gives them: with BOS if this tokenizer adds it, special tokens in the text parsed.

        Raises:
            InvalidRequestError: `field` is no string, has no UTF-8 form (lone surrogates), or the tokenizer cannot encode it.
        """
        if not isinstance(text, str):
            raise InvalidRequestError(field, text, "a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as err:
            raise InvalidRequestError(field, text, f"text that has a UTF-8 form (lone surrogate at character {err.start})") from None
        try:
            ids = self.hf(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
        except Exception as err:  # tokenizers raises plain Exception, for instance for a word outside a vocabulary without <unk>
            raise InvalidRequestError(field, text, f"text that the tokenizer can encode ({err})") from err
        return list(ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of `ids` (each >= 0), spaces as they are; ids that the tokenizer does not know give no text."""
        if self._backend is not None:
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        known = [i for i in ids if self.knows(i)]  # a fast tokenizer passes over the others, a slow one may raise
        return str(self.hf.decode(known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))

    def knows(self, token_id: int) -> bool:
        """Whether the tokenizer has a token for this id (>= 0); a model's vocabulary may be padded with ids that have none."""
        return self._token_of(token_id) is not None

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides ids and text: equal for two loads of the same files, in any process."""
        hf, digest = self.hf, hashlib.sha256()
        told = [sorted((name, str(token)) for name, token in hf.special_tokens_map.items()), bool(getattr(hf, "split_special_tokens", False))]
        told.append(f"{type(hf).__module__}.{type(hf).__qualname__}")  # of a tokenizer's own code
        if hf.is_fast:
            digest.update(hf.backend_tokenizer.to_str().encode())  # megabytes, and in a form of its own: not for JSON once more
        else:
            told += [sorted(hf.get_vocab().items()), sorted((i, repr(t)) for i, t in hf.added_tokens_decoder.items())]
            told.append(_digest_of_file(getattr(hf, "vocab_file", None)))
        digest.update(json.dumps(told).encode())
        return digest.hexdigest()

    @property
    def added_ids_of_other_text(self) -> frozenset[int]:
        """Added tokens, special ones left out, that do not decode to their content: a normalizer may have put a space before it."""
        added = {i: str(token) for i, token in self.hf.added_tokens_decoder.items() if i not in self.special_ids}
        return frozenset(i for i, content in added.items() if self.decode([i, i], False) != 2 * content)

    def _find_byte_ids(self) -> Mapping[int, int]:
        ids = {byte: self.id_of(f"<0x{byte:02X}>") for byte in range(256)}
        found = {token_id: byte for byte, token_id in ids.items() if token_id is not None}
        # Such a spelling alone proves nothing; that it comes out as the byte does.
        letter = ids[ord("a")]
        return found if letter is not None and self.decode([letter], False) == "a" else {}


def load_tokenizer(source: str, *, trust_remote_code: bool = False, revision: str | None = None) -> TextTokenizer | None:
    """The tokenizer of a hub id or local folder; None if a local folder has no tokenizer files, so that its model takes token ids only.

    Raises:
        ModelNotFoundError: `source` is written as a path and there is nothing.
        ModelError: there is a tokenizer and it cannot be loaded, with the reason; or a hub id without one.
    """
    if os.path.isdir(source):
        if not any(fnmatch(name, pattern) for name in os.listdir(source) for pattern in TOKENIZER_FILES):
            return None
    elif os.path.exists(source):
        raise ModelError(f"{source!r} is a file: a tokenizer is loaded from a folder or a hub id")
    elif os.path.isabs(source) or source.startswith("."):
        raise ModelNotFoundError(f"there is no folder {source!r} to load a tokenizer from")
    # A revision of None would be passed on as if it were a name.
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        from transformers import AutoTokenizer

        return TextTokenizer(AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options))
    except ModelError:
        raise
    except Exception as err:
        reason = f"{type(err).__name__}: {err}"
        raise ModelError(f"the tokenizer of {source!r} could not be loaded ({reason})") from err


def _module(hf: Any, method: str) -> str:
    """The module that defines this tokenizer's `method`, '' if it has none."""
    return str(getattr(getattr(type(hf), method, None), "__module__", ""))


def _digest_of_file(path: object) -> str:
    """Hex digest of a file's content, '' if `path` names no file."""
    if not isinstance(path, str) or not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
