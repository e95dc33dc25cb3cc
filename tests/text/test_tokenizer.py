from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from text_tokenizers import MAKERS, byte_level
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from quire.errors import InvalidRequestError, ModelError, ModelNotFoundError
from quire.text.tokenizer import TextTokenizer, load_tokenizer

TEXTS = [
    "",
    "The fox",
    " leading",
    "trailing ",
    "a\n\n  b",
    "</s> and <s><|im_start|> <tool>",
    "日本語 😀 e\u0301",
    "\x00\u2028",
    "\ufffd",
    "don 't . ",
]


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_those_of_transformers(made: dict[str, TextTokenizer], family: str, text: str) -> None:
    tokenizer = made[family]
    ids = tokenizer.encode(text)
    assert ids == tokenizer.hf(text).input_ids and type(ids) is list
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == tokenizer.hf.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def test_bos_special_tokens_and_sizes(made: dict[str, TextTokenizer]) -> None:
    tokenizer = made["byte_level"]
    bos, eos, start, tool = (tokenizer.hf.convert_tokens_to_ids(t) for t in ("<s>", "</s>", "<|im_start|>", "<tool>"))
    ids = tokenizer.encode("a<|im_start|></s><tool>")
    assert ids[0] == bos and ids[-3:] == [start, eos, tool]
    assert tokenizer.special_ids == {bos, eos, start}
    assert tokenizer.eos_token_id == eos
    assert tokenizer.vocab_size == len(tokenizer.hf) == tool + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>a<|im_start|></s><tool>"
    assert made["word_piece"].eos_token_id is None
    assert made["python_bytes"].special_ids == {256} and made["python_bytes"].eos_token_id == 256


@pytest.mark.parametrize("family", MAKERS)
def test_special_ids_are_what_decode_leaves_out(made: dict[str, TextTokenizer], family: str) -> None:
    tokenizer = made[family]
    context = next(i for i in range(tokenizer.vocab_size - 1, 0, -1) if i not in tokenizer.special_ids)
    for token_id in range(tokenizer.vocab_size):
        shown, hidden = (tokenizer.decode([context, token_id, context], skip) for skip in (False, True))
        assert (shown != hidden) == (token_id in tokenizer.special_ids), tokenizer.hf.convert_ids_to_tokens(token_id)


def test_byte_ids_only_where_they_decode_to_bytes(made: dict[str, TextTokenizer]) -> None:
    assert made["llama_like"].byte_ids == {3 + byte: byte for byte in range(256)}
    assert not any(made[family].byte_ids for family in MAKERS if family != "llama_like")
    spelled = byte_level()
    spelled.add_tokens(["<0x61>", "<0xE2>"])
    assert not TextTokenizer(spelled).byte_ids


def test_unknown_ids_give_no_text(made: dict[str, TextTokenizer]) -> None:
    for family in ("byte_level", "llama_like", "python_bytes"):
        ids = made[family].encode("the end")
        assert made[family].decode([*ids, 5000], True) == made[family].decode(ids, True)


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffcd", "\ud83d\ude00"])
def test_lone_surrogates_are_refused(made: dict[str, TextTokenizer], text: str) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate at character") as caught:
        made["byte_level"].encode(text)
    assert caught.value.field == "prompt"


def test_what_cannot_be_encoded_is_a_bad_request(made: dict[str, TextTokenizer]) -> None:
    with pytest.raises(InvalidRequestError, match="a string"):
        made["byte_level"].encode(["two", "texts"])  # type: ignore[arg-type]
    no_unk = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"))))
    with pytest.raises(InvalidRequestError, match="UNK") as caught:
        no_unk.encode("c")
    assert caught.value.field == "prompt"


def test_truncation_and_padding_of_the_file_are_off_from_the_start() -> None:
    hf = byte_level()
    hf.backend_tokenizer.enable_truncation(4)
    hf.backend_tokenizer.enable_padding(length=8)
    expected = len(byte_level()("a long text of many tokens").input_ids)
    tokenizer = TextTokenizer(hf)
    assert hf.backend_tokenizer.truncation is None and hf.backend_tokenizer.padding is None
    assert len(tokenizer.encode("a long text of many tokens")) == expected > 8
    with ThreadPoolExecutor(8) as pool:  # "Already borrowed" if a call changed the tokenizer while another encodes
        texts = [f"text number {i} " * 20 for i in range(200)]
        assert list(pool.map(tokenizer.encode, texts)) == [tokenizer.encode(text) for text in texts]


def test_a_long_text_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    hf = byte_level()
    hf.model_max_length = 8
    TextTokenizer(hf).encode("many words " * 50)
    assert not caplog.records


@pytest.mark.parametrize("family", MAKERS)
def test_fingerprint_is_the_same_for_the_same_tokenizer_only(made: dict[str, TextTokenizer], family: str) -> None:
    before = made[family].fingerprint
    made[family].encode("some text")
    again = MAKERS[family]()
    assert TextTokenizer(again).fingerprint == before
    assert len({tokenizer.fingerprint for tokenizer in made.values()}) == len(made)
    again.add_tokens([AddedToken("<more>", special=False)])
    with_more = TextTokenizer(again).fingerprint
    again = MAKERS[family]()
    again.add_tokens([AddedToken("<more>", special=True)], special_tokens=True)
    assert len({before, with_more, TextTokenizer(again).fingerprint}) == 3


def test_importing_the_text_floor_imports_neither_tensors_nor_transformers() -> None:
    package = list(sys.modules["quire"].__path__)
    code = f"""
import sys, types
sys.modules["quire"] = types.ModuleType("quire")  # in place of the package's own __init__, which imports every floor
sys.modules["quire"].__path__ = {package!r}
import quire.text.tokenizer, quire.text.detokenizer, quire.text.stops
print({{"torch", "transformers", "tokenizers"}} & set(sys.modules))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "set()", out.stderr


CONFIG = json.dumps({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100})


def test_load_a_folder(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(CONFIG)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded is not None
    assert loaded.encode("The fox 😀</s>") == byte_level()("The fox 😀</s>").input_ids
    assert loaded.special_ids == TextTokenizer(byte_level()).special_ids


def test_a_folder_without_a_tokenizer_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(str(tmp_path)) is None
    for name in ("config.json", "generation_config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(CONFIG)
    assert load_tokenizer(str(tmp_path)) is None


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "{"},
        {"tokenizer.json": "{}"},
        {"tokenizer_config.json": "{}"},
        {"tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'},
        {"tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'},  # transformers makes an empty one
        {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}', "tokenization_x.py": "raise SystemExit"},
        {"vocab.json": "not json", "merges.txt": ""},
    ],
)
def test_a_broken_folder_is_an_error_that_names_it(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ModelNotFoundError):
        load_tokenizer("./nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is a file"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
