"""TRL's contract, held against a trainer of straw with the attributes that TRL 1.16 has, and against TRL itself where it is installed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire.errors import InvalidRequestError
from quire.faces.trl import QuireRollouts
from tests.engine.conftest import tokenizer
from tests.tensors.checkpoints import make, tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}{{ mark or 'assistant:' }}{% endif %}"
)


def trainer(model: Any, **args: Any) -> Any:
    """What a rollout_func is given. The fields of `args` are GRPOConfig's, with its defaults."""
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "max_completion_length": 12}
    other = {"use_vllm": False, "generation_kwargs": None, "chat_template_kwargs": None, "bf16": False, "fp16": False, "num_generations": 4}
    words = tokenizer()
    words.chat_template = TEMPLATE
    return SimpleNamespace(
        args=SimpleNamespace(**(sampling | other | args)),
        model=model,
        processing_class=words,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        eos_token_ids=[2],
        chat_template=None,
        tools=[],
        environment_factories=None,
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def rollouts() -> Iterator[QuireRollouts]:
    with QuireRollouts(cache_bytes=2**23) as made:
        yield made


def test_a_copy_has_the_options_and_no_engine(rollouts: QuireRollouts, model: Any) -> None:
    prompts = [[{"role": "user", "content": "red"}]]
    rollouts(prompts, trainer(model))
    for other in (copy.copy(rollouts), copy.deepcopy(rollouts), pickle.loads(pickle.dumps(rollouts))):
        assert (other._options, other._llm, other._model) == (rollouts._options, None, None)
        other.close()
    assert rollouts(prompts, trainer(model))["completion_ids"][0], "its engine is its own"


def logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """As TRL computes them: log_softmax of the logits over the temperature."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def test_one_completion_for_each_prompt_in_order(model: Any, rollouts: QuireRollouts) -> None:
    prompts = ["the quick brown"] * 4 + ["lazy"] * 4 + ["the quick brown"]
    torch.manual_seed(3)
    told = trainer(model, temperature=0.7)
    given = rollouts(prompts, told)
    assert set(given) == {"prompt_ids", "completion_ids", "logprobs"} and all(type(rows) is list and len(rows) == 9 for rows in given.values())
    assert given["prompt_ids"] == told.processing_class(text=prompts)["input_ids"]
    assert len(set(map(tuple, given["completion_ids"]))) == 9, "samples of one prompt differ"
    for prompt, completion, said in zip(*given.values(), strict=True):
        assert 1 <= len(completion) == len(said) <= 12 and all(type(x) is int for x in completion) and all(type(x) is float for x in said)
        torch.testing.assert_close(torch.tensor(said), logprobs(model, prompt, completion, 0.7), atol=1e-4, rtol=1e-4)
    torch.manual_seed(3)
    assert rollouts(prompts, told) == given
    assert rollouts([], told) == {"prompt_ids": [], "completion_ids": [], "logprobs": []}


def test_conversations_take_the_trainers_template(model: Any, rollouts: QuireRollouts) -> None:
    prompts = [[{"role": "user", "content": "the quick"}], [{"role": "system", "content": "fox"}, {"role": "user", "content": "dog"}]]
    told = trainer(model)
    assert told.processing_class.decode(rollouts(prompts, told)["prompt_ids"][1]) == "system: fox user: dog assistant:"
    told.args.chat_template_kwargs = {"mark": "jumps:"}
    assert told.processing_class.decode(rollouts(prompts, told)["prompt_ids"][0]) == "user: the quick jumps:"
    told.chat_template = "five {{ messages[0]['content'] }}"
    assert told.processing_class.decode(rollouts(prompts, told)["prompt_ids"][0]) == "five the quick"


def test_sampling_is_the_trainers(model: Any, rollouts: QuireRollouts) -> None:
    greedy = rollouts(["the quick"] * 2, trainer(model, top_k=1, temperature=0.9))["completion_ids"]
    assert greedy[0] == greedy[1] == rollouts(["the quick"], trainer(model, top_p=1e-6))["completion_ids"][0]
    assert greedy[0] == rollouts(["the quick"], trainer(model, min_p=1.0))["completion_ids"][0]
    assert len(set(rollouts(["the quick"], trainer(model, repetition_penalty=1e6, top_k=1))["completion_ids"][0])) == 12
    told = trainer(model, top_k=1)
    told.eos_token_ids = [greedy[0][5]]
    ended = rollouts(["the quick"], told)["completion_ids"][0]
    assert ended == greedy[0][: greedy[0].index(greedy[0][5]) + 1], "the end is part of the completion"
    del told.eos_token_ids  # trainers before 1.9 or so have none
    assert rollouts(["the quick"], told)["completion_ids"][0] == greedy[0]


def test_weights_are_as_they_are_now(rollouts: QuireRollouts) -> None:
    model = tiny_model("llama").train()
    told = trainer(model, temperature=1.3)
    before = rollouts(["the quick brown fox jumps"] * 2, told)
    engine = rollouts._llm
    for weight in model.parameters():
        weight.data.mul_(1.2)  # leaves no trace to notice
    after = rollouts(["the quick brown fox jumps"] * 2, told)
    assert rollouts._llm is engine and model.training, "one engine, and the model as it was"
    assert before != after
    for prompt, completion, said in zip(*after.values(), strict=True):
        torch.testing.assert_close(torch.tensor(said), logprobs(model.eval(), prompt, completion, 1.3), atol=1e-4, rtol=1e-4)
    rollouts(["lazy"], trainer(tiny_model("llama", seed=1)))
    assert rollouts._llm is not engine, "another model, another engine"
    rollouts.close()
    rollouts.close()
    assert rollouts(["lazy"], told)["completion_ids"], "a new one where it is needed"


@pytest.mark.parametrize("field", ["use_vllm", "generation_kwargs", "bf16", "fp16", "tools", "environment_factory", "temperature", "model"])
def test_what_would_not_be_followed_is_refused(model: Any, rollouts: QuireRollouts, field: str) -> None:
    args: dict[str, Any] = {name: value for name, value in {"generation_kwargs": {"top_h": 1}, "temperature": -1.0}.items() if name == field}
    told = trainer(model, **({field: True} if field in ("use_vllm", "bf16", "fp16") else args))
    if field in ("tools", "environment_factory"):
        setattr(told, field.replace("factory", "factories"), [print])
    if field == "model":
        told.model = torch.nn.Linear(2, 2)
    with pytest.raises(InvalidRequestError) as error:
        rollouts(["the quick"], told)
    assert error.value.field == field


@pytest.mark.parametrize("conversational", [False, True])
def test_two_steps_of_the_real_trainer(tmp_path: Path, conversational: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl", minversion="1.0")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    folder = make(tmp_path / "model", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = tokenizer()
    words.chat_template = TEMPLATE
    texts = ["the quick brown", "pack my box", "jumps over", "lazy dog"]
    prompts = [[{"role": "user", "content": text}] for text in texts] if conversational else texts
    seen, apart = [], []

    def reward(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(prompts)
        return [float(len(set(ids))) for ids in completion_ids]

    class Checked(QuireRollouts):
        def __call__(self, prompts: Any, trainer: Any) -> dict[str, Any]:
            given = super().__call__(prompts, trainer)
            model.eval()
            for prompt, completion, said in zip(*given.values(), strict=True):
                apart.append((logprobs(model, prompt, completion, 0.8) - torch.tensor(said)).abs().max().item())
            model.train()
            return given

    config = trl.GRPOConfig(
        str(tmp_path / "out"), per_device_train_batch_size=8, num_generations=4, max_completion_length=10, max_steps=2, learning_rate=1e-2,
        temperature=0.8, bf16=False, use_cpu=True, report_to=[], save_strategy="no",
    )  # fmt: skip
    before = model.lm_head.weight.detach().clone()
    with Checked(cache_bytes=2**23) as rollouts:
        data = datasets.Dataset.from_dict({"prompt": prompts})
        trl.GRPOTrainer(model, reward, config, data, processing_class=words, rollout_func=rollouts).train()
    assert len(seen) == len(apart) == 16 and max(apart) < 1e-4
    assert not torch.equal(before, model.lm_head.weight), "it has learned"
