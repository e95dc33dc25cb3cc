"""Small tokenizers of every family whose decoding differs, made on the spot."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Don't stop, isn't it? The end of the text and then the rest.",
    "日本語のテキスト、中文文本 한국어 😀😁🚀 👩‍👩‍👧 naïve café e\u0301 \u0928\u092e\u0938\u094d\u0924\u0947",
    "def f(x):\n    return  x ** 2  # two  spaces\n\n",
]


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2 style: byte-level BPE, tokens may end inside a character, with a special and an ordinary added token, BOS added."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
    core.add_special_tokens(["<|im_start|>"])
    core.add_tokens([AddedToken("<tool>", special=False)])
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def llama_like() -> PreTrainedTokenizerFast:
    """Llama-2 style: leading space as ▁, byte fallback, one space stripped at the start."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = []
    for char in "▁abcdefghijklmnopqrstuvwxyz.,é日😀":
        vocab[char] = len(vocab)
    for left, right in [("▁", "▁"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁▁", "▁▁")]:
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerFast:
    """T5 style: Unigram pieces with ▁, no byte fallback."""
    pieces = ["▁", "▁the", "▁a", "he", "ing", *"abcdefghijklmnopqrstuvwxyz.,é日😀\u0301", "\ufffd"]
    core = Tokenizer(models.Unigram([("<unk>", -20.0), *((piece, -float(i % 7) - 1) for i, piece in enumerate(pieces))], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def word_piece(cleanup: bool = True) -> PreTrainedTokenizerFast:
    """BERT style: spaces are made up between words, and taken away again before punctuation."""
    words = ["[UNK]", "[CLS]", "the", "do", "not", "n't", "'", "s", ".", ",", "?", "token", "##s", "##ing", "##e\u0301", "日", "##本", "😀"]
    core = Tokenizer(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=cleanup)
    core.add_special_tokens(["[CLS]"])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", cls_token="[CLS]", clean_up_tokenization_spaces=True)


def end_of_word() -> PreTrainedTokenizerFast:
    """GPT-1 style: a space after each word but the last."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "a</w>", "b</w>", "the</w>", "th", "e</w>", "</w>", "ab", "é</w>", "😀"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", end_of_word_suffix="</w>"))
    core.decoder = decoders.BPEDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


class PythonBytes(PreTrainedTokenizer):  # type: ignore[misc]
    """A tokenizer in Python, as custom code brings it: one token a byte, but for one special."""

    def __init__(self, **options: Any) -> None:
        super().__init__(eos_token="</s>", **options)

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {f"b{i}": i for i in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str) -> list[str]:
        return [f"b{byte}" for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return int(token[1:])

    def _convert_id_to_token(self, index: int) -> str:
        assert index < 256
        return f"b{index}"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        parts = (bytes([int(token[1:])]) if token[0] == "b" else token.encode() for token in tokens)
        return b"".join(parts).decode(errors="replace")


class Stripped(PythonBytes):
    """A tokenizer in Python that strips all spaces from both ends, and shows every bad byte."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        parts = (bytes([int(token[1:])]) if token[0] == "b" else token.encode() for token in tokens)
        return re.sub("[\udc80-\udcff]", "\ufffd", b"".join(parts).decode(errors="surrogateescape")).strip(" ")


MAKERS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "llama_like": llama_like,
    "metaspace": metaspace,
    "word_piece": word_piece,
    "word_piece_spaced": lambda: word_piece(cleanup=False),
    "end_of_word": end_of_word,
    "python_bytes": PythonBytes,
    "stripped": Stripped,
}
