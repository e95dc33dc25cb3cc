"""Where tokens begin in the text of an answer, for tokenizers that do not write each token as it is."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quire import LLM
from quire.server.chat_template import ChatTemplate
from quire.server.errors import ServerError
from quire.server.infill import TOKENS, infilled
from quire.server.token_texts import Offsets, TokenTexts, encoded
from tests.server.conftest import running
from tests.tensors.checkpoints import make
from tests.text.text_tokenizers import PythonBytes, byte_level, llama_like


def begins(hf: Any, token_ids: list[int], *, skip: bool = True, prompt: str | None = None, start: int = 0) -> list[int]:
    offsets = Offsets(TokenTexts(hf), start, skip, prompt)
    return [offsets.next(token_id) for token_id in token_ids]


@pytest.mark.parametrize("hf", [byte_level(), llama_like()], ids=["byte_level", "llama_like"])
def test_a_prompt_that_is_echoed_is_what_the_caller_wrote(hf: Any) -> None:
    for prompt in ("the hen", " in  the", "x 😀 the", "<s>the hen"):
        ids = hf(prompt).input_ids
        assert ids[0] == hf.bos_token_id, "one that the tokenizer has put before it, or not so much as that"
        texts = TokenTexts(hf)
        for token_id, at in zip(ids, begins(hf, ids, prompt=prompt), strict=True):
            text = texts.of(token_id).text
            if not texts.is_special(token_id) and not text.startswith("bytes:"):
                assert prompt[at:].startswith((text, text.removeprefix(" "))), (prompt, text, at)
        last = texts.of(ids[-1]).text
        assert begins(hf, ids, prompt=prompt)[-1] == len(prompt) - len(last)


def test_spaces_that_tokens_swallow_move_what_follows() -> None:
    hf = llama_like()
    hf.add_special_tokens({"additional_special_tokens": [AddedToken("<|user|>", rstrip=True), AddedToken("<|end|>", lstrip=True)]})  # Phi 3's
    prompt = "<|user|>\n hi  <|end|>a hen"
    ids = hf(prompt).input_ids
    shown = [hf.convert_ids_to_tokens(token_id).lstrip("▁") for token_id in ids]
    assert [token for token in shown if token] == ["<s>", "<|user|>", "h", "i", "<|end|>", "a", "he", "n"]
    for token, at in zip(shown[1:], begins(hf, ids, prompt=prompt)[1:], strict=True):
        assert prompt.startswith((token, f" {token}"), at), (token, at)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab={"the": 0, "fox": 1})))
    assert begins(words, [0, 1, 0], prompt="the  fox\nthe") == [0, 5, 9]


def test_special_tokens_without_a_name_of_their_own_take_no_room_either() -> None:
    hf = byte_level()
    start, tool, t = hf.convert_tokens_to_ids(["<|im_start|>", "<tool>", "t"])
    assert start not in hf.all_special_ids and hf.decode([t, start, tool, t], skip_special_tokens=True) == "t<tool>t"
    assert begins(hf, [t, start, tool, t], start=5) == [5, 6, 6, 12]
    assert begins(hf, [t, start, tool, t], skip=False) == [0, 1, 13, 19]


def test_bytes_that_come_to_no_character_are_before_what_follows() -> None:
    byte, llama = byte_level(), llama_like()
    e2, x82, xac, t = (byte.convert_tokens_to_ids(token) for token in ("â", "Ĥ", "¬", "t"))
    assert byte.decode([e2, x82, xac, t, e2, x82, t]) == "€t\ufffdt"
    assert begins(byte, [e2, x82, xac, t, e2, x82, t]) == [0, 0, 0, 1, 2, 2, 3]
    e2, x82, xac, t = (llama.convert_tokens_to_ids(token) for token in ("<0xE2>", "<0x82>", "<0xAC>", "t"))
    assert llama.decode([t, e2, x82, t]) == "t\ufffd\ufffdt"
    assert begins(llama, [e2, x82, xac, t, e2, x82, t]) == [0, 0, 0, 1, 2, 2, 4]


def test_what_cannot_be_encoded_is_the_callers_to_mend() -> None:
    core = Tokenizer(models.WordLevel(vocab={"the": 0, "fox": 1}))  # without <unk>
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    hf = PreTrainedTokenizerFast(tokenizer_object=core)
    assert ChatTemplate(hf).encode("the fox") == encoded(hf, "the fox", "prompt", add_special_tokens=True) == [0, 1]
    hf.add_tokens(list(TOKENS[0]), special_tokens=True)
    for text, said in (("the dog", "that the tokenizer can encode"), ("\ud800", "that has a UTF-8 form")):
        with pytest.raises(ServerError, match=f"messages: must be text {said}") as caught:
            ChatTemplate(hf).encode(text)
        assert caught.value.status == 400 and caught.value.param == "messages"
        for prompt, suffix, param in ((text, "the", "prompt"), ("the", text, "suffix")):
            with pytest.raises(ServerError, match=f"{param}: must be text {said}"):
                infilled(hf, prompt, suffix)
        with pytest.raises(ServerError, match=f"prompt: must be text {said}"):
            encoded(hf, text, "prompt", add_special_tokens=True)


def test_a_vocabulary_may_have_gaps() -> None:
    hf = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab={"the": 0, "dog": 9})))
    texts = TokenTexts(hf)
    assert [texts.of(token_id).text for token_id in (0, 5, 9, 10)] == ["the", "token_id:5", "dog", "token_id:10"]


def test_a_tokenizer_in_python_is_asked_for_nothing_that_it_does_not_know(tmp_path: Path) -> None:
    folder = Path(make(tmp_path / "model", "llama"))
    code = "from typing import Any\nfrom transformers import PreTrainedTokenizer\n" + inspect.getsource(PythonBytes)
    (folder / "tokenization_bytes.py").write_text(code)
    auto = {"AutoTokenizer": ["tokenization_bytes.PythonBytes", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PythonBytes", "auto_map": auto}))
    with running(lambda: LLM(str(folder), page_size=4, num_threads=1, trust_remote_code=True)) as server:
        prompt = [104, 300, 105, 256]  # of 600 rows of logits the tokenizer knows 257
        told = server.complete(prompt=prompt, max_tokens=1, echo=True, logprobs=0, allowed_token_ids=[33], skip_special_tokens=False)["choices"][0]
        assert told["text"] == "hi</s>!" and told["logprobs"]["tokens"] == ["h", "token_id:300", "i", "</s>", "!"]
        assert server.post("/detokenize", {"tokens": prompt}).json() == {"prompt": "hi</s>"}
        server.complete(prompt=prompt, max_tokens=1)
        assert "hi</s>" in [server.get(f"/page/cache/{page_id}").json()["text"] for page_id in range(4)]
        server.serving.close()
