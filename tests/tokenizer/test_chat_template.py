"""Chat templates: equal to transformers' apply_chat_template, and safe against messages, options and the template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qengine.errors import ConfigError, RequestError
from qengine.tokenizer import Tokenizer, load_tokenizer
from qengine.tokenizer.chat_template import MAX_OPTION_CHARS, ChatTemplate
from tests.tokenizer.conftest import FIXTURES

HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\nToday: " + date_string + "\\n" + system_message }}
{%- if tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "parameters": ' }}
            {{- call.function.arguments | tojson }}{{- "}" }}
        {%- endfor %}
    {%- else %}
        {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' + message['content'] | trim + '<|turn|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}
"""

ALTERNATING = """\
{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ message['content'] + eos_token }}
    {% else %}
        {{ raise_exception('Only user and assistant roles are supported!') }}
    {% endif %}
{% endfor %}
"""

THINKING = """\
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if ns.found %}{%- continue %}{%- endif %}
    {%- if message.role == "user" %}
        {%- set ns.found = true %}{%- set ns.last = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" and message.reasoning_content is string and loop.index0 > ns.last %}
        {%- set content = '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

PARTS = """\
{% macro show(content) %}
{% if content is string %}{{ content }}
{%- else %}
{% for part in content if part.type == 'text' %}{{ part['text'] }}{% if not loop.last %} | {% endif %}{% endfor %}
{%- endif %}
{% endmacro %}
{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ show(m.content) | trim }}{{ eos_token }}{% endgeneration %}
{% else %}{{ show(m.content) | trim }}{% endif %}
</turn>
{% endfor %}{% if add_generation_prompt %}<turn>model
{% endif %}
"""

#: transformers' messages were not cleaned before the template saw them, up to the last version for Python 3.10.
KEEPS_NULLS = tuple(int(part) for part in metadata.version("transformers").split(".")[:2]) < (5, 23)
TEMPLATES = {
    "headers": HEADERS,
    "alternating": ALTERNATING,
    "thinking": THINKING,
    "parts": PARTS,
    "fixture": (FIXTURES / "llama-awq-g64" / "chat_template.jinja").read_text(),
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(sort_keys=true, ensure_ascii=true) }}"
    "{{ messages | tojson(separators=(',', ':')) }}",
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ loop.cycle('a', 'b') }}"
    "{{ m.role | upper }}{% endfor %}{{ dict(a=1)['a'] }}{{ documents is none }}{{ unset }}{{ pad_token is defined }}",
}
PLAIN = [
    {"role": "user", "content": "  What is <b>1 & 2</b>? 'ünï' \u2028 "},
    {"role": "assistant", "content": "It is 3.\n", "reasoning_content": "\nadd them\n"},
    {"role": "user", "content": "Thanks"},
]
CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": PLAIN,
    "one": PLAIN[:1],
    "ends with assistant": PLAIN[:2],
    "nulls": [
        {"role": "user", "content": "x", "name": None},
        {"role": "assistant", "content": "y", "tool_calls": None},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "description": "a < b"}}}]


@pytest.fixture(scope="module")
def oracle(folder_tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=folder_tokenizer._backend, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


@pytest.fixture(scope="module")
def plain_tokenizer(folder_tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(folder_tokenizer._backend, special_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(
    plain_tokenizer: Tokenizer, oracle: Any, name: str, chat: str, tools: Any, generation: bool
) -> None:
    if KEEPS_NULLS and (name == "json" or chat == "nulls"):
        pytest.skip("this version of transformers hands nulls and keys of its own to the template")
    tokenizer = plain_tokenizer.with_chat_template(TEMPLATES[name])
    expected = oracle.apply_chat_template(
        CHATS[chat], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=generation, tokenize=False
    )
    assert tokenizer.render_chat(CHATS[chat], tools=tools, add_generation_prompt=generation) == expected


def test_system_tool_calls_options_and_parts_are_those_of_transformers(plain_tokenizer: Tokenizer, oracle: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
    calls = [
        {"role": "system", "content": " Be kind. "},
        *PLAIN[:1],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    cases: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
        ("headers", calls, {}),
        ("headers", calls, {"date_string": "26 July"}),
        ("thinking", PLAIN, {"enable_thinking": False}),
        ("thinking", PLAIN, {"enable_thinking": True}),
        ("parts", parts, {}),
    ]
    for name, chat, options in cases:
        expected = oracle.apply_chat_template(
            chat, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True, **options
        )
        assert (
            plain_tokenizer.with_chat_template(TEMPLATES[name]).render_chat(chat, template_options=options) == expected
        )


def test_templates_of_models_are_those_of_transformers(gguf_tokenizer: Tokenizer, oracle: Any) -> None:
    template = gguf_tokenizer.chat_template
    assert template is not None
    prompt = gguf_tokenizer.render_chat(PLAIN)
    assert prompt == oracle.apply_chat_template(
        PLAIN, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    ids = gguf_tokenizer.encode(prompt, add_special_tokens=False)
    assert ids[:2] == [1, gguf_tokenizer.encode("system")[0]]
    assert ids.count(1) == prompt.count("<|im_start|>")


# continue_final_message


@pytest.mark.parametrize("name", ["headers", "alternating", "thinking", "parts", "fixture"])
@pytest.mark.parametrize("content", ["The answer is", "The answer is ", " 42\n", "a<|turn|>b"])
def test_the_last_message_is_continued_as_in_transformers(
    plain_tokenizer: Tokenizer, oracle: Any, name: str, content: str
) -> None:
    chat = [*PLAIN[:1], {"role": "assistant", "content": content}]
    expected = oracle.apply_chat_template(
        chat, chat_template=TEMPLATES[name], tokenize=False, continue_final_message=True
    )
    prompt = plain_tokenizer.with_chat_template(TEMPLATES[name]).render_chat(
        chat, add_generation_prompt=False, continue_final_message=True
    )
    assert prompt == expected
    assert prompt.rstrip().endswith(content.strip())


@pytest.mark.parametrize(
    ("template", "content", "generation", "message"),
    [
        (TEMPLATES["fixture"], "x", True, "both true"),
        (TEMPLATES["thinking"], None, False, "no text to continue"),
        ("{{ messages[0].content }}", "x", False, "does not show the last message"),
    ],
)
def test_a_last_message_that_cannot_be_continued_is_refused(
    plain_tokenizer: Tokenizer, template: str, content: Any, generation: bool, message: str
) -> None:
    chat = [*PLAIN[:1], {"role": "assistant", "content": content}]
    with pytest.raises(RequestError, match=message):
        plain_tokenizer.with_chat_template(template).render_chat(
            chat, add_generation_prompt=generation, continue_final_message=True
        )


# Content


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for p in messages[0]['content'] %}{{ p.text }}{% endfor %}", True),
        ("{% for m in messages %}{% for p in m.content | list %}{% endfor %}{% endfor %}", True),
        ("{% set c = messages[0].content %}{% set d = c %}{% for p in d %}{{ p }}{% endfor %}", True),
        (PARTS, True),
        (HEADERS, False),
        (THINKING, False),
        ("{% for line in messages[0].content.split('\n') %}{{ line }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
    ],
)
def test_whether_a_template_wants_parts(template: str, expected: bool) -> None:
    assert ChatTemplate(template).accepts_content_parts is expected


def test_parts_are_joined_for_a_template_that_wants_strings(plain_tokenizer: Tokenizer) -> None:
    tokenizer = plain_tokenizer.with_chat_template("{{ messages[0].content }}")
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert tokenizer.render_chat([{"role": "user", "content": content}]) == "one\ntwo"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        None,
        [5],
        [{}],
        [{"content": "x"}],
        [{"role": 5, "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [5]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": object()}],
    ],
)
def test_malformed_messages_are_refused(plain_tokenizer: Tokenizer, messages: Any) -> None:
    with pytest.raises(RequestError, match=r"expected|messages is not JSON|no object") as caught:
        plain_tokenizer.with_chat_template(THINKING).render_chat(messages)
    assert caught.value.param == "messages"


def test_deep_nesting_is_refused(plain_tokenizer: Tokenizer) -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestError, match="not JSON data"):
        plain_tokenizer.with_chat_template(THINKING).render_chat([{"role": "user", "tool_calls": deep}])
    while isinstance(deep, list):  # taken apart by hand: freeing it whole would recurse too
        deep = deep[0]


def test_the_callers_messages_stay_as_they_are(plain_tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "x"}], "name": None}]
    before = json.dumps(chat)
    for template in (PARTS, THINKING):
        plain_tokenizer.with_chat_template(template).render_chat(
            chat, add_generation_prompt=False, continue_final_message=True
        )
    assert json.dumps(chat) == before


# Options


def test_options_are_the_templates_own_variables(plain_tokenizer: Tokenizer) -> None:
    assert plain_tokenizer.with_chat_template(THINKING).chat_template_variables() == {"enable_thinking"}
    assert plain_tokenizer.with_chat_template(HEADERS).chat_template_variables() == {"date_string"}
    defaulted = "{% set style = style | default('short') %}{% if verbose %}{% set end = 1 %}{% endif %}{{ end }}"
    assert plain_tokenizer.with_chat_template(defaulted).chat_template_variables() == {"style", "verbose"}
    assert plain_tokenizer.with_chat_template(ALTERNATING).chat_template_variables() == set()
    assert plain_tokenizer.chat_template_variables() == set()


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "tokenizer", "return_tensors", "conversation"])
def test_reserved_options_are_refused(plain_tokenizer: Tokenizer, name: str) -> None:
    tokenizer = plain_tokenizer.with_chat_template("{{ " + name + " }}")
    with pytest.raises(RequestError, match=f"'{name}' is set by the server") as caught:
        tokenizer.render_chat(PLAIN, template_options={name: True})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "raise_exception", "range", "namespace", "other", "ns"])
def test_options_that_are_not_the_templates_are_refused(plain_tokenizer: Tokenizer, name: str) -> None:
    tokenizer = plain_tokenizer.with_chat_template(HEADERS + ALTERNATING + THINKING + "{{ range(2) }}")
    with pytest.raises(RequestError, match=r"is set by the server|unknown chat template option .*enable_thinking"):
        tokenizer.render_chat(PLAIN, template_options={name: "x"})


@pytest.mark.parametrize("value", [[], {}, "x" * (MAX_OPTION_CHARS + 1), float("nan"), float("inf"), 2**64, object()])
def test_option_values_that_are_no_small_scalars_are_refused(plain_tokenizer: Tokenizer, value: Any) -> None:
    with pytest.raises(RequestError, match="expected a string of at most 4096 characters"):
        plain_tokenizer.with_chat_template(THINKING).render_chat(PLAIN, template_options={"enable_thinking": value})


# What a template may do


def failures() -> Iterator[tuple[str, str]]:
    yield "{{ raise_exception('no system role here') }}", "refuses these messages: no system role here"
    yield "{{ messages[9].content }}", "UndefinedError"
    yield "{{ messages[0].content + 1 }}", "TypeError"
    yield "{{ 1 / 0 }}", "ZeroDivisionError"
    yield "{{ strftime_now(5) }}", "TypeError"
    yield "{{ unset | tojson }}", "TypeError"
    yield "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"
    yield "{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError"
    yield "{{ ''.__class__.__mro__ }}", "not allowed"
    yield "{{ messages.append(1) }}", "not allowed"
    yield "{{ 'x' * 10 ** 10 }}", "not allowed"
    yield "{{ 10 ** (10 ** 10) }}", "not allowed"
    yield "{{ [0] * (2 ** 40) }}", "not allowed"
    yield "{{ namespace(__class__=1) }}", "not allowed"
    yield "{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "not allowed"
    yield "{{ lipsum.__globals__ }}", "UndefinedError|not allowed"
    yield "{% include 'other' %}", "cannot render"


@pytest.mark.parametrize(("template", "message"), list(failures()), ids=[template for template, _ in failures()])
def test_failures_of_a_template_are_request_errors(plain_tokenizer: Tokenizer, template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        plain_tokenizer.with_chat_template(template).render_chat(PLAIN)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "start", ["lipsum", "cycler", "joiner", "namespace", "dict", "raise_exception", "strftime_now"]
)
@pytest.mark.parametrize(
    "way", ["__globals__['os']", "__init__.__globals__.os", "__class__.__base__.__subclasses__()[0]"]
)
def test_a_template_from_a_model_cannot_leave_the_sandbox(tmp_path: Path, start: str, way: str) -> None:
    sentinel = tmp_path / "was_run"
    template = "{{ " + f"{start}.{way}.system('touch {sentinel}')" + " }}"
    tokenizer = (FIXTURES / "llama-awq-g64" / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(RequestError):
        load_tokenizer(str(tmp_path)).render_chat(PLAIN)
    assert not sentinel.exists()


def test_the_prompt_is_bounded(plain_tokenizer: Tokenizer) -> None:
    tokenizer = plain_tokenizer.with_chat_template("{% for i in range(99999) %}0123456789{% endfor %}")
    with pytest.raises(RequestError, match="more than 1000 characters") as caught:
        tokenizer.render_chat(PLAIN, max_chars=1000)
    assert caught.value.code == "context_length_exceeded"
    assert len(tokenizer.render_chat(PLAIN, max_chars=999_990)) == 999_990


def test_small_products_are_allowed(plain_tokenizer: Tokenizer) -> None:
    tokenizer = plain_tokenizer.with_chat_template("{{ '-' * 3 }}{{ 2 ** 10 }}{{ 3 * 4 }}{{ 2 * 'ab' }}{{ 0.5 * 4 }}")
    assert tokenizer.render_chat(PLAIN) == "---102412abab2.0"


def test_the_clock_of_a_template() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26, 12, 0))
    text = template.render(
        PLAIN,
        add_generation_prompt=True,
        tools=None,
        continue_final_message=False,
        special_tokens={},
        options={},
        max_chars=100,
    )
    assert text == "26 Jul 2024"


# Choosing a template


def test_no_template_is_said_with_what_to_do(plain_tokenizer: Tokenizer) -> None:
    assert plain_tokenizer.chat_template is None
    with pytest.raises(RequestError, match="no chat template: start with --chat-template FILE"):
        plain_tokenizer.render_chat(PLAIN)


def test_a_template_can_be_given(folder_tokenizer: Tokenizer) -> None:
    other = folder_tokenizer.with_chat_template("given")
    assert other.chat_template == "given" == other.render_chat(PLAIN)
    assert folder_tokenizer.render_chat(PLAIN) != "given"
    assert other.encode("x") == folder_tokenizer.encode("x")


@pytest.mark.parametrize("template", ["{% if %}", "{{ ", "{% for x in y %}", "{% unknown %}", "{{ x | nofilter }}"])
def test_a_template_that_is_not_jinja_is_refused(
    folder_tokenizer: Tokenizer, plain_tokenizer: Tokenizer, template: str
) -> None:
    with pytest.raises(ConfigError, match=r"the chat template given is unusable: .* not valid Jinja"):
        folder_tokenizer.with_chat_template(template)
    # One of the model's own is no reason not to load the model: only chat needs it.
    broken = Tokenizer(plain_tokenizer._backend, chat_templates={"default": template})
    with pytest.raises(RequestError, match="not valid Jinja"):
        broken.render_chat(PLAIN)
    assert broken.encode("x")
