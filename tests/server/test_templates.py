"""Chat templates: the same text as from transformers, and nothing that a template does reaches the server."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from quire.server import chat_template
from quire.server.chat_template import ChatTemplate
from quire.server.errors import ServerError
from quire.server.schema_chat import Message, as_template_messages
from tests.engine.conftest import tokenizer

CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "What is <b>1 + 1</b>? ü 🦊"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "2", "tool_call_id": "1"},
    {"role": "assistant", "content": "  Two "},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds ü", "parameters": {"type": "object", "properties": {"a": {}}}}}]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "strips": "{{- bos_token }}\n{%- for m in messages %}\n    {%- if m.content is defined %}\n{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n"
    "    {%- endif %}\n{%- endfor %}",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "namespaces": "{% set ns = namespace(last='', n=0) %}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "{% set ns.last = m.content %}{% set ns.n = ns.n + 1 %}{% if ns.n > 3 %}{% break %}{% endif %}{{ m.role }}{% endfor %}{{ ns.n }} {{ ns.last }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}",
    "functions": "{{ strftime_now('%Y') }}{% set d = dict(a=1) %}{{ d.a }}{% for i in range(3) %}{{ loop.index }}{% endfor %}"
    "{{ messages[-1].content }}",
}


def template(source: str) -> ChatTemplate:
    hf = tokenizer()
    hf.chat_template = source
    return ChatTemplate(hf)


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request: pytest.FixtureRequest) -> Any:
    made = template(TEMPLATES[request.param])
    yield made, made._hf
    made.close()


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_same_text_as_transformers(both: Any, tools: Any, add_generation_prompt: bool) -> None:
    ours, hf = both
    wanted = hf.apply_chat_template(CHAT, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert ours.render(CHAT, tools, add_generation_prompt=add_generation_prompt) == wanted
    ids = hf.apply_chat_template(CHAT, tools=tools, add_generation_prompt=add_generation_prompt)["input_ids"]
    assert ours.encode(wanted) == ids


def test_continued_as_transformers_does(both: Any) -> None:
    ours, hf = both
    try:
        wanted = hf.apply_chat_template(CHAT, tokenize=False, continue_final_message=True)
    except ValueError:
        with pytest.raises(ServerError, match="cannot be continued"):
            ours.render(CHAT, add_generation_prompt=False, continue_final_message=True)
    else:
        assert ours.render(CHAT, add_generation_prompt=False, continue_final_message=True) == wanted


def test_a_last_message_of_which_the_template_drops_a_part_is_not_continued() -> None:
    ours = template("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}")
    chat = [CHAT[0], {"role": "assistant", "content": "<think>hm</think> Two"}]
    with pytest.raises(ValueError):
        ours._hf.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    with pytest.raises(ServerError, match="or changes it"):
        ours.render(chat, add_generation_prompt=False, continue_final_message=True)
    ours.close()


def test_reasoning_and_calls_without_an_id_as_transformers_hands_them_on() -> None:
    ours = template("{{ messages | tojson }}")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = {"role": "assistant", "content": "Two", "reasoning_content": "1 + 1", "tool_calls": [call]}
    sent = {**said, "tool_calls": [{**call, "function": {"name": "add", "arguments": '{"a": 1}'}}]}
    made = ours.render(as_template_messages([Message.model_validate(sent)], knows_developer=False))
    assert json.loads(made) == json.loads(ours._hf.apply_chat_template([said], tokenize=False))
    assert json.loads(made)[0]["thinking"] == "1 + 1", "as gpt-oss's template calls it"
    ours.close()


def test_templates_for_some_uses_alone_are_told_of_by_name() -> None:
    hf = tokenizer()
    hf.chat_template = {"tool_use": "{{ tools | length }}", "rag": "documents"}
    ours, chat = ChatTemplate(hf), [{"role": "user", "content": "x"}]
    assert ours.render(chat, TOOLS) == "1"
    for ask in (lambda: ours.render(chat), lambda: ours.mentions("developer")):
        with pytest.raises(ServerError, match=r"for some uses \(rag, tool_use\) and none for this chat") as caught:
            ask()
        assert caught.value.status == 400 and caught.value.code == "no_chat_template"
    ours.close()


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.__init__.__globals__ }}", "SecurityError"),
        ("{{ namespace(__init__=1) }}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].update(role='x') }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ dict.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(10**7) %}{% endfor %}", "OverflowError"),
        ("{{ raise_exception('no roles') }}", "no roles"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ open('/etc/passwd') }}", "undefined"),
        ("{{ 'a' * 10**9 }}", "memory"),
        ("{{ 'a' * 2 * 10**7 }}", "16777216"),
        ("{% for", "TemplateSyntaxError"),
    ],
)
def test_hostile_templates_are_refused(source: str, why: str) -> None:
    hostile = template(source)
    with pytest.raises(ServerError) as caught:
        hostile.render(list(CHAT))
    assert caught.value.status == 400 and why in caught.value.message, caught.value.message
    hostile.close()


def test_a_template_without_an_end_is_killed_and_the_next_one_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = template(
        "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok"
    )
    assert slow.render([{"role": "user", "content": "x"}]) == "ok"
    monkeypatch.setattr(chat_template, "MAX_TEMPLATE_S", 0.3)
    began = time.perf_counter()
    with pytest.raises(ServerError, match="took more than 0.3 s"):
        slow.render([{"role": "user", "content": "loop"}])
    assert time.perf_counter() - began < 3
    monkeypatch.undo()
    assert slow.render([{"role": "user", "content": "x"}]) == "ok"
    slow.close()
    assert slow._process is None


def test_the_date_is_that_of_the_servers_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    for ahead in (11, -12):  # a day apart, or nearly
        monkeypatch.setenv("TZ", f"XXX{-ahead:+d}")  # POSIX counts westward
        made, zone = template("{{ strftime_now('%d %H') }}"), timezone(timedelta(hours=ahead))
        before, told, after = datetime.now(zone), made.render([{"role": "user", "content": "x"}]), datetime.now(zone)
        made.close()
        assert told in (before.strftime("%d %H"), after.strftime("%d %H"))


def test_the_renderer_has_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_API_KEY", "secret")
    made = template("ok")
    made.render([{"role": "user", "content": "x"}])
    assert made._process is not None
    with open(f"/proc/{made._process.pid}/environ", "rb") as file:
        assert b"secret" not in file.read()
    made.close()
