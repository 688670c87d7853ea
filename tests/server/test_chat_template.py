"""Chat templates render as transformers renders them, and a hostile one is stopped."""

import json
import re
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.server import chat_sandbox
from shoal.server.chat_template import ChatTemplateError, ChatTemplates, read_chat_templates
from tests.server.tiny_tokenizers import built, write_folder

transformers = pytest.importorskip("transformers")

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "chatml": """{%- if tools %}{{- '<|im_start|>system\\n' }}{% for tool in tools %}{{- tool | tojson }}
{% endfor %}{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {%- for call in message.tool_calls %}{{- call.function.arguments | tojson(indent=2) ~ loop.index0 }}{% endfor %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}""",
    "llama": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('roles must alternate user/assistant') }}
  {% endif %}
  {% if message['role'] == 'user' %}
    {{ '[INST] ' + message['content'].strip() ~ ' [/INST]' }}
  {% else %}{% generation %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}
  {% endif %}
{% endfor %}""",
    "namespace": """{%- set ns = namespace(found=false, text='') -%}
{%- for m in messages -%}{%- if loop.index > 5 -%}{%- break -%}{%- endif -%}
{%- if m.role == 'system' -%}{%- set ns.found = true -%}{%- continue -%}{%- endif -%}
{%- set ns.text = ns.text ~ (m.content if m.content is string else m.content[0].text) ~ 3 * '-' -%}
{%- endfor -%}{{ ns.text }}{{ ns.found }}{{ enable_thinking | default('unset') }}{{ "%05.1f|%s" % (1.5, 'x') }}
{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ dict(a=1) | tojson }}{{ '<é>' | tojson }}{{ documents[0].title if documents else 'none' }}{{ 'x'.center(7) }}""",
}

contents = st.text(max_size=12) | st.sampled_from(["  hello ", "<s>", "a\n\nb", "é<b>&"])
conversations = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": contents}),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> "transformers.PreTrainedTokenizerFast":
    files = {"tokenizer_config.json": json.dumps(SPECIALS)}
    folder = write_folder(tmp_path_factory.mktemp("chat"), built("byte_level"), files)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def ours(template: str) -> ChatTemplates:
    return ChatTemplates({"default": template}, SPECIALS, "the model")


def user(text: str = "hi") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@settings(max_examples=60, deadline=None)
@given(messages=conversations, prompt=st.booleans())
def test_renders_as_transformers_does(theirs, name: str, messages: list[dict[str, Any]], prompt: bool) -> None:
    try:
        expected = theirs.apply_chat_template(
            messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
        )
    except jinja2.TemplateError as error:
        with pytest.raises(ChatTemplateError, match=re.escape(str(error))):
            ours(TEMPLATES[name]).render(messages, add_generation_prompt=prompt)
        return
    assert ours(TEMPLATES[name]).render(messages, add_generation_prompt=prompt) == expected


def test_tools_documents_variables_and_reasoning_reach_the_template(theirs) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hé"}]},
        {"role": "assistant", "content": "x", "tool_calls": None, "reasoning": "why"},
    ]
    options = {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, None, True]}}}],
        "documents": [{"title": "T", "text": "…"}],
        "enable_thinking": False,
    }
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {"é": 1}}}]}]
    thinking = "{{ messages[-1].reasoning_content ~ messages[-1].thinking ~ (messages[-1].tool_calls is defined) }}"
    for template, chat in ((TEMPLATES["namespace"], messages), (TEMPLATES["chatml"], calls), (thinking, messages)):
        expected = theirs.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=True, **options
        )
        assert ours(template).render(chat, **options) == expected


@pytest.mark.parametrize("final", ["Sure, ", "Sure,  \n", "trimmed"])
def test_continues_the_final_message(theirs, final: str) -> None:
    messages = [*user(), {"role": "assistant", "content": final}]
    for template in (TEMPLATES["chatml"], TEMPLATES["llama"]):
        expected = theirs.apply_chat_template(
            messages, chat_template=template, tokenize=False, continue_final_message=True
        )
        options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
        assert ours(template).render(messages, **options) == expected
    with pytest.raises(ChatTemplateError, match="needs add_generation_prompt=False"):
        ours(template).render(messages, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="does not show the last message"):
        ours("nothing").render(messages, **options)


def test_templates_come_from_files_before_the_configuration(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert read_chat_templates(tmp_path, {}) == {}
    assert read_chat_templates(tmp_path, {"chat_template": "C"}) == {"default": "C"}
    assert read_chat_templates(tmp_path, {"chat_template": listed}) == {"default": "D", "tool_use": "T"}
    files = {"chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "R"}
    write_folder(tmp_path, built("byte_level"), files)
    assert read_chat_templates(tmp_path, {"chat_template": "C"}) == {"default": "F", "rag": "R"}
    with pytest.raises(ChatTemplateError, match="must be a string or a list of objects"):
        read_chat_templates(tmp_path / "other", {"chat_template": [{"name": "x"}]})


def test_the_template_is_chosen_by_name_and_by_tools() -> None:
    named = ChatTemplates({"default": "D", "tool_use": "T{{ tools | length }}", "rag": "R"}, {}, "the model")
    assert named.render(user()) == "D"
    assert named.render(user(), tools=[{"name": "f"}]) == "T1"
    assert named.render(user(), chat_template="rag") == "R"
    assert named.render(user(), chat_template="{{ messages | length }}") == "1"
    with pytest.raises(ChatTemplateError, match=r"no chat template 'rga'; available: default, rag, tool_use"):
        named.render(user(), chat_template="rga")
    with pytest.raises(ChatTemplateError, match="none is the default: give chat_template one of a, b"):
        ChatTemplates({"a": "A", "b": "B"}, {}, "the model").render(user())


def test_a_model_without_template_says_what_to_do() -> None:
    with pytest.raises(ChatTemplateError, match=r"has no chat template .*use a chat model"):
        ChatTemplates({}, {}, "the model").render(user())


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] must be an object with role and content, found str"),
        ([{"content": "hi"}], r"messages\[0\] has no role"),
        ([{"role": "user", "content": b"hi"}], r"messages\[0\].content is of type bytes"),
        ([{"role": "user", "content": [{"image": object()}]}], r"messages\[0\]\.content\[0\]\.image is of type object"),
    ],
)
def test_messages_that_are_none_are_named(messages: list[Any], text: str) -> None:
    with pytest.raises(ChatTemplateError, match=text):
        ours(TEMPLATES["chatml"]).render(messages)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content.", "not valid jinja, line 1"),
        ("{{ raise_exception('no system role') }}", "refuses the conversation: no system role"),
        ("{{ messages[0].missing.deeper }}", "refuses the conversation: .*has no attribute 'missing'"),
        ("{{ 1 + 'a' }}", "fails on this conversation: TypeError"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses the conversation"),
        ("{% for i in range(10**6) %}{% endfor %}", "fails on this conversation|range too big|refuses"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses too deep"),
    ],
)
def test_a_template_that_fails_is_explained(template: str, text: str) -> None:
    with pytest.raises(ChatTemplateError, match=text):
        ours(template).render(user())


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 10**9 * 'a' }}",
        "{{ ([1] * 10**9) | length }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a\\nb' | indent(10**10) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' | format(10**10, 1) }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
        "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
        "{{ (['a' * 10**6] * 10**4) | join }}",
        "{{ ','.join((['a' * 10**6] * 10**4) | map('string')) }}",
        "{{ ('x' * 10**6).join(['a'] * 10**5) }}",
        "{{ [[['a' * 10**6] * 10**3] * 10**3] | tojson }}",
        "{{ [[['a' * 10**6] * 10**3] * 10**3] | string }}",
        "{{ [['a' * 10**6] * 10**4] ~ '' }}",
        "{{ '{:>9999999999}'.format('a') }}",
        "{{ '{:>{}}'.format('a', 10**10) }}",
        "{{ ('\t' * 10**6).expandtabs(10**6) }}",
        "{{ ('a\n' * 10**6) | indent('x' * 10**6) }}",
        "{{ [1] | batch(10**9, 'x') | list }}",
        "{{ [1] | slice(10**9) | list }}",
        "{{ ([[1]] * 10**6) | sum(start=[]) }}",
    ],
)
def test_a_template_that_blows_up_is_stopped(template: str) -> None:
    started = time.monotonic()
    with pytest.raises(ChatTemplateError, match="was stopped: it"):
        ours(template).render(user())
    assert time.monotonic() - started < 20


def test_a_template_that_runs_on_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "MAX_RENDER_S", 0.05)
    loops = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = messages[0].role %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ChatTemplateError, match=r"was stopped: it ran for more than 0\.05 s"):
        ours(loops).render(user())
    silent = "{% set L = range(9999) | list %}" + "{% for i in L %}" * 4 + "{% endfor %}" * 4
    with pytest.raises(ChatTemplateError, match=r"was stopped: it ran for more than 0\.05 s"):
        ours(silent).render(user())


def test_what_chats_join_sum_and_replace_is_what_jinja_makes_of_it() -> None:
    template = (
        "{{ messages | map(attribute='content') | join(', ') }} {{ messages | join('-', attribute='role') }} "
        "{{ [1, 2] | sum }} {{ [[1], [2]] | sum(start=[]) }} {{ 'aba' | replace('a', 'c', 1) }} "
        "{{ 'a'.replace('a', 'b') }} "
        "{{ '-'.join(messages | map(attribute='role')) }} {% for m in messages %}{{ loop.index }}/{{ loop.length }}"
        "{% if not loop.last %};{% endif %}{% endfor %} {% for x in [] %}{% else %}none{% endfor %} "
        "{{ '{}:{:>3}'.format('a', 1) }}"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    expected = "hi, ho user-assistant 3 [1, 2] cba b user-assistant 1/2;2/2 none a:  1"
    assert ours(template).render(messages) == expected
