from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from os.path import commonprefix

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from text_tokenizers import MAKERS
from transformers.convert_slow_tokenizer import bytes_to_unicode

from quire.text.detokenizer import MAX_HELD_CHARS, Detokenizer
from quire.text.tokenizer import TextTokenizer

FFFD = "\ufffd"
TEXTS = [
    "The quick brown fox",
    "the 日本語 text 😀😁 the end",
    "👩‍👩‍👧 e\u0301 e\u0301e\u0301 \u0928\u092e\u0938\u094d\u0924\u0947",
    "  two  spaces \n\n and a tab\t. Don't , stop ?",
    f"a real {FFFD} and {FFFD}{FFFD}{FFFD}{FFFD}{FFFD} more",
    "𐍈" * 20,
    "",
]
# The rest are pieces of any kind: byte soup, specials, ids the tokenizer does not know.
BYTE_SOUP = [0xFF, 0x80, 0xC0, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xED, 0xA0, 0x41, 0x20]


@functools.cache
def byte_id(tokenizer: TextTokenizer, byte: int) -> int | None:
    """The token of one byte, in whichever way the family writes it."""
    vocab = tokenizer.hf.get_vocab()
    spellings = (f"<0x{byte:02X}>", f"b{byte}") if tokenizer.byte_ids or not tokenizer.hf.is_fast else (bytes_to_unicode()[byte],)
    return next((vocab[spelling] for spelling in spellings if spelling in vocab), None)


@functools.cache
def pieces(tokenizer: TextTokenizer) -> st.SearchStrategy[list[int]]:
    """Token ids mixed from texts, single bytes, and any ids at all."""
    texts = (st.sampled_from(TEXTS) | st.text(max_size=8)).map(tokenizer.encode)
    byte_ids = [i for i in (byte_id(tokenizer, byte) for byte in BYTE_SOUP) if i is not None]
    any_ids = st.integers(0, tokenizer.vocab_size + 2) | st.sampled_from(byte_ids or [0])
    return st.lists(texts | st.lists(any_ids, max_size=12), max_size=5).map(lambda parts: [i for part in parts for i in part])


# Sizes of pushes, taken in turn: empty ones too, but not only.
SIZES = st.lists(st.integers(0, 4), max_size=5).map(lambda sizes: [*sizes, 1])


def cut(ids: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """The ids in pushes of these sizes."""
    at = 0
    for size in itertools.cycle(sizes):
        yield list(ids[at : at + size])
        at += size
        if at >= len(ids):
            return


def whole(tokenizer: TextTokenizer, prompt: Sequence[int], ids: Sequence[int], skip: bool) -> str:
    """The oracle: what decoding everything at once adds to the prompt."""
    before, after = slow_decode(tokenizer, prompt, skip), slow_decode(tokenizer, [*prompt, *ids], skip)
    return after[len(commonprefix([before, after])) :]


def slow_decode(tokenizer: TextTokenizer, ids: Sequence[int], skip: bool) -> str:
    """`decode`; where byte-fallback tokens are, with each run of them as SentencePiece reads it: every invalid byte alone is U+FFFD."""
    if not tokenizer.byte_ids:
        return tokenizer.decode(ids, skip)
    known = [i for i in ids if i < tokenizer.vocab_size and not (skip and i in tokenizer.special_ids)]
    text = ""
    run = b""
    for i in [*known, None]:
        if i in tokenizer.byte_ids:
            run += bytes([tokenizer.byte_ids[i]])
            continue
        text += re.sub("[\udc80-\udcff]", FFFD, run.decode(errors="surrogateescape"))
        run = b""
        text += "" if i is None else tokenizer.hf.convert_ids_to_tokens(i).replace("▁", " ")
    return text.removeprefix(" ")


@pytest.mark.parametrize("family", MAKERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_stream_is_the_whole_text(made: dict[str, TextTokenizer], family: str, data: st.DataObject) -> None:
    tokenizer = made[family]
    prompt, ids, skip = data.draw(pieces(tokenizer)), data.draw(pieces(tokenizer)), data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    text, done = "", []
    for push in cut(ids, data.draw(SIZES)):
        text += detokenizer.push(push)
        done += push
        so_far = whole(tokenizer, prompt, done, skip)
        # Nothing is withdrawn later, and no more than an incomplete character is held.
        assert so_far.startswith(text) or text.startswith(so_far)
        held = so_far[len(text) :]
        assert len(held) <= MAX_HELD_CHARS and set(held) <= {FFFD}
    text += detokenizer.flush()
    assert text == whole(tokenizer, prompt, ids, skip)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("family", ["byte_level", "python_bytes"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_byte_level_text_is_the_plain_decode(made: dict[str, TextTokenizer], family: str, data: st.DataObject) -> None:
    tokenizer = made[family]
    prompt, ids, skip = tokenizer.encode("Any prompt"), data.draw(pieces(tokenizer)), data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    assert "".join(map(detokenizer.push, cut(ids, data.draw(SIZES)))) + detokenizer.flush() == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("family", ["byte_level", "llama_like", "python_bytes"])
@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_any_text_comes_through_without_an_early_replacement_character(made: dict[str, TextTokenizer], family: str, text: str) -> None:
    tokenizer = made[family]
    prompt, ids = tokenizer.encode("x"), tokenizer.encode("x" + text)
    assume(ids[: len(prompt)] == prompt)  # not merged across the border
    expected = tokenizer.decode(ids, True).removeprefix("x")
    detokenizer = Detokenizer(tokenizer, prompt)
    shown = ""
    for token_id in ids[len(prompt) :]:
        shown += detokenizer.push([token_id])
        assert expected.startswith(shown)
    assert shown + detokenizer.flush() == expected


def test_a_character_is_shown_when_its_last_byte_is_there(made: dict[str, TextTokenizer]) -> None:
    for family in ("byte_level", "llama_like", "python_bytes"):
        tokenizer = made[family]
        detokenizer = Detokenizer(tokenizer, tokenizer.encode("the"))
        ids = [byte_id(tokenizer, byte) for byte in "é€😀".encode()]
        assert [detokenizer.push([i]) for i in ids if i is not None] == ["", "é", "", "", "€", "", "", "", "😀"]
        assert detokenizer.flush() == ""


def test_the_whole_part_of_a_token_is_shown_at_once(made: dict[str, TextTokenizer]) -> None:
    tokenizer = made["byte_level"]
    # Trained with a space before most of them, the vocabulary has tokens of a space and the first bytes of a character.
    text = " 😀"
    ids = tokenizer.encode(text)[1:]
    shown = tokenizer.decode(ids[:1], True)
    assert shown == " " + FFFD
    detokenizer = Detokenizer(tokenizer, [])
    assert detokenizer.push(ids[:1]) == " "
    assert detokenizer.push(ids[1:]) == "😀"


def test_an_incomplete_end_is_what_decode_gives(made: dict[str, TextTokenizer]) -> None:
    for family, expected in (("byte_level", FFFD), ("python_bytes", FFFD), ("llama_like", FFFD * 3)):
        tokenizer = made[family]
        ids = [i for i in (byte_id(tokenizer, byte) for byte in "😀".encode()[:3]) if i is not None]
        detokenizer = Detokenizer(tokenizer, tokenizer.encode("a"))
        assert detokenizer.push(ids) == ""
        assert detokenizer.flush() == expected == tokenizer.decode(ids, True)


def test_a_character_begun_by_the_prompt(made: dict[str, TextTokenizer]) -> None:
    for family in ("byte_level", "llama_like", "python_bytes"):
        tokenizer = made[family]
        begun = [i for i in (byte_id(tokenizer, byte) for byte in "😀".encode()) if i is not None]
        prompt = [*tokenizer.encode("a"), *begun[:2]]
        assert Detokenizer(tokenizer, prompt).flush() == ""
        assert Detokenizer(tokenizer, prompt).push(begun[2:]) == "😀"
        letter = tokenizer.encode("b")[-1]
        assert Detokenizer(tokenizer, prompt).push([letter, letter]) == "bb"
    tokenizer = made["byte_level"]
    prompt = tokenizer.encode(f"real {FFFD}{FFFD}")
    detokenizer = Detokenizer(tokenizer, prompt)
    assert detokenizer.push(tokenizer.encode(f"{FFFD}b")[1:]) == f"{FFFD}b"


def test_a_leading_space_is_kept_after_a_prompt_and_dropped_without(made: dict[str, TextTokenizer]) -> None:
    tokenizer = made["llama_like"]
    ids = tokenizer.encode("the end")[1:]
    assert Detokenizer(tokenizer, tokenizer.encode("in")).push(ids) == " the end"
    assert Detokenizer(tokenizer, []).push(ids) == "the end"
    assert Detokenizer(tokenizer, [1]).push(ids) == "the end"  # a prompt of only BOS has no text
    assert Detokenizer(tokenizer, [1], skip_special_tokens=False).push(ids) == " the end"
    for spelled in (ids, [tokenizer.id_of("<0x20>"), *tokenizer.encode("the end")[2:]]):
        assert Detokenizer(tokenizer, [1], whole=True).push(spelled)[0] == " ", "what a grammar holds to begins with it"
    assert Detokenizer(made["byte_level"], [0], whole=True).push(made["byte_level"].encode(" the")[1:]) == " the"
    assert Detokenizer(made["word_piece"], [2]).push(made["word_piece"].encode("tokens do not.")) == " tokens do not."


def test_a_bad_byte_does_not_spoil_the_good_characters_of_its_run(made: dict[str, TextTokenizer]) -> None:
    tokenizer = made["llama_like"]
    ids = [3 + byte for byte in "€".encode() + b"\xff" + "😀".encode()] + tokenizer.encode("the")[1:]
    assert tokenizer.decode(ids, True) == FFFD * 8 + " the"  # why plain decode is not the law here
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("in"))
    assert detokenizer.push(ids) == f"€{FFFD}😀 the"


@pytest.mark.parametrize("family", ["byte_level", "llama_like", "python_bytes"])
def test_special_tokens_inside_a_character(made: dict[str, TextTokenizer], family: str) -> None:
    tokenizer = made[family]
    euro = [i for i in (byte_id(tokenizer, byte) for byte in "€".encode()) if i is not None]
    special = tokenizer.eos_token_id
    assert special is not None
    mixed = [euro[0], special, euro[1], tokenizer.vocab_size + 7, euro[2], special]
    for skip, expected in ((True, "€"), (False, tokenizer.decode(mixed, False))):
        detokenizer = Detokenizer(tokenizer, tokenizer.encode("a"), skip)
        assert detokenizer.push(mixed) + detokenizer.flush() == expected


def test_spaces_that_a_decoder_strips_from_the_ends_are_kept_inside(made: dict[str, TextTokenizer]) -> None:
    tokenizer = made["stripped"]
    word, space = tokenizer.encode("b")[0], tokenizer.encode(" ")[0]
    for num_spaces in (1, 7, 40, 300):
        detokenizer = Detokenizer(tokenizer, [])
        ids = [word] + [space] * num_spaces + [word]
        assert "".join(detokenizer.push([i]) for i in ids) == tokenizer.decode(ids, True) == "b" + " " * num_spaces + "b"


class Counting(TextTokenizer):
    """Counts the ids it decodes."""

    decoded = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        self.decoded += len(ids)
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize("family", ["byte_level", "llama_like", "metaspace", "python_bytes"])
@pytest.mark.parametrize("kind", ["text", "invalid bytes", "unfinished characters", "unknown ids", "specials", "spaces"])
def test_a_push_costs_the_same_after_any_number_of_tokens(family: str, kind: str) -> None:
    tokenizer = Counting(MAKERS[family]())
    unit = {
        "text": tokenizer.encode("the 日本 😀 end in the"),
        "invalid bytes": [byte_id(tokenizer, 0xFF)],
        "unfinished characters": [byte_id(tokenizer, byte) for byte in b"\xf0\x9f\x98"],
        "unknown ids": [tokenizer.vocab_size + 1],
        "specials": [tokenizer.eos_token_id],
        "spaces": tokenizer.encode("a  ")[-1:],
    }[kind]
    ids = [i for i in unit if i is not None]
    if not ids:
        pytest.skip("this family has no tokens for single bytes")
    num_tokens = 3000
    ids = (ids * num_tokens)[:num_tokens]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("a"))
    tokenizer.decoded = 0
    text = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    per_token = tokenizer.decoded / num_tokens
    assert per_token < 45, per_token
    assert text == whole(tokenizer, tokenizer.encode("a"), ids, True)
