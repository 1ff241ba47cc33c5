"""Templates that would run for hours or fill the memory end within their budget, in a process that watches its size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qengine.errors import RequestError
from qengine.tokenizer import template_budget
from qengine.tokenizer.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo\tx"}]
BIG = "{% set big = 'a' * 1000000 %}"
SIXTY = "{% for i in range(60) %}"
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a body of 116 bytes": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "loops that skip": "{% for i in range(99999) %}{% for j in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
    "loops over characters": BIG + "{% for a in big %}{% for b in big %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a recursive loop": "{% for x in [1, 1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}"
    "{% endfor %}",
    "filters in filters": "{% for i in range(9999) %}{{ range(9999) | map('string') | list | length }}{% endfor %}",
    "slow work in each step": BIG + "{% for i in range(99999) %}{{ big.count('b') }}{% endfor %}",
    "doubling with ~": "{% set ns = namespace(x='ab') %}" + SIXTY + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling with +": "{% set ns = namespace(x='ab') %}" + SIXTY + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(x=[1]) %}" + SIXTY + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling in a join": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}"
    "{% endfor %}",
    "squaring a number": "{% set ns = namespace(x=3) %}" + SIXTY + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "many slices kept": BIG + "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set ns.x = ns.x + [big[i:]] %}{% endfor %}",
    "many texts kept": BIG + "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set ns.x = ns.x + [big ~ i] %}{% endfor %}",
    "replace, a filter": BIG + "{{ big | replace('a', big) | length }}",
    "replace, a method": BIG + "{{ big.replace('a', big) | length }}",
    "join, a filter": BIG + "{{ ([big] * 100000) | join | length }}",
    "join, a method": BIG + "{{ big.join(['', ''] * 100000) | length }}",
    "join of characters": BIG + "{{ (big | list) | join(big) | length }}",
    "center": "{{ 'a' | center(10000000000) | length }}",
    "center, a method": "{{ 'a'.center(10000000000) | length }}",
    "ljust": "{{ 'a'.ljust(10000000000) | length }}",
    "zfill": "{{ 'a'.zfill(10000000000) | length }}",
    "expandtabs": "{{ ('\\t' * 1000000).expandtabs(1000000) | length }}",
    "indent": "{{ ('a\\n' * 100000) | indent(1000000) | length }}",
    "indent by text": BIG + "{{ ('a\\n' * 100000) | indent(big) | length }}",
    "a width": "{{ '%10000000000d' % 1 }}",
    "a width, a filter": "{{ '%10000000000d' | format(1) }}",
    "a width, a method": "{{ '{:>10000000000}'.format(1) }}",
    "a width that is given": "{{ '%*d' % (1000000000, 1) }}",
    "a format of long texts": BIG + "{{ ('%(a)s' * 100000) % {'a': big} }}",
    "a method's format of long texts": BIG + "{{ ('{0}' * 100000).format(big) }}",
    "translate": BIG + "{{ big.translate({97: big}) | length }}",
    "tojson": "{{ [[[1]]] | tojson(indent=1000000000) }}",
    "mapped": "{{ (['a'] * 1000000) | map('center', 1000000) | list | length }}",
    "sums of lists": "{{ ([[1] * 1000000] * 1000000) | sum(start=[]) | length }}",
}
PROGRAM = """
import json, resource, sys, time
from qengine.errors import RequestError
from qengine.tokenizer import template_budget
from qengine.tokenizer.chat_template import ChatTemplate

def size():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

template_budget.MAX_SECONDS = 0.5
messages, hostile = json.loads(sys.stdin.read())
resource.setrlimit(resource.RLIMIT_AS, (size() + 2**30, resource.RLIM_INFINITY))
for name, text in hostile.items():
    started = time.process_time()
    try:
        found = ChatTemplate(text).render(
            messages, add_generation_prompt=False, tools=None, continue_final_message=False, special_tokens={},
            options={}, max_chars=2**24,
        )
        outcome = f"rendered {len(found)}"
    except RequestError as error:
        outcome = str(error)
    print(json.dumps([name, time.process_time() - started, outcome]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[float, str]]:
    """Seconds and message of each, all in one process that may take 1 GiB more than it starts with."""
    given = json.dumps([MESSAGES, HOSTILE])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=given, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: (seconds, said) for name, seconds, said in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends(outcomes: dict[str, tuple[float, str]], name: str) -> None:
    seconds, said = outcomes[name]
    assert "does what is not allowed" in said, said
    assert "MemoryError" not in said
    assert seconds < 5


def _render(text: str, messages: Any = MESSAGES) -> str:
    return ChatTemplate(text).render(
        messages,
        add_generation_prompt=False,
        tools=None,
        continue_final_message=False,
        special_tokens={},
        options={},
        max_chars=2**24,
    )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages[1:] %}{{ m.content ~ loop.index ~ '!' }}{% endfor %}", "Yo\tx1!"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% macro f(x) %}<{{ x }}>{{ caller() if caller }}{% endmacro %}{% call f(1) %}in{% endcall %}", "<1>in"),
        ("{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}{% set x | trim %} c {% endset %}{{ x }}", "ABc"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ 'abc'[::-1] }}{{ 'abc'[1:] is defined }}{{ messages[0].content[:1] }}", "cbaTrueH"),
        ("{{ '%s-%05.2f' % ('a', 1.5) }}{{ '{:>4}|{}'.format('b', 2) }}{{ '%d' | format(7) }}", "a-01.50   b|27"),
        ("{{ [1, 2, 3] | sum }}{{ [1] + [2] }}{{ ['x'] | first }}{{ 'a-b' | replace('-', '+') }}", "6[1, 2]xa+b"),
        ("{{ {'a': 1} | tojson(indent=1) }}{{ {'b': 1}.items() | list }}", "{\n \"a\": 1\n}[('b', 1)]"),
        ("{{ ','.join(['a', 'b']) }}{{ 'a\\nb' | indent(2) }}{{ 'x' | center(3) }}", "a,ba\n  b x "),
    ],
)
def test_what_templates_do_works_under_the_budget(template: str, text: str) -> None:
    assert _render(template) == text


def test_a_long_conversation_is_within_the_budget() -> None:
    messages = [{"role": "user", "content": f"message {index} " * 50} for index in range(2000)]
    template = (
        "{% set ns = namespace(all='') %}{% for m in messages %}{% set ns.all = ns.all + '<' + m.role + '>' %}"
        "{{ '<|' ~ m.role ~ '|>' + m['content'] | trim + '\\n' }}{% endfor %}"
    )
    assert len(_render(template, messages)) > 1_000_000


def test_each_rendering_has_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "MAX_STEPS", 100)
    template = ChatTemplate("{% for i in range(n) %}{% endfor %}done")

    def render(n: int) -> str:
        return template.render(
            MESSAGES, add_generation_prompt=False, tools=None, continue_final_message=False, special_tokens={},
            options={"n": n}, max_chars=100,
        )  # fmt: skip

    for _ in range(5):
        assert render(20) == "done"
    with pytest.raises(RequestError, match="more than 100 steps"):
        render(160)


def test_a_template_cannot_reach_its_budget() -> None:
    for name in ("counted_step", "concatenated", "budget", "environment"):
        assert _render("{% set " + name + " = 1 %}{% for i in range(3) %}{{ i ~ 'x' }}{% endfor %}") == "0x1x2x"
    with pytest.raises(RequestError):
        _render("{{ self._TemplateReference__context.parent['the budget'].step }}")


@pytest.mark.parametrize("text", ["x" * (MAX_TEMPLATE_CHARS + 1), "{{ " + "(" * 100_000, "{% if 1 %}" * 20_000])
def test_templates_that_cannot_be_compiled_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="not valid Jinja"):
        _render(text)


def test_filters_that_are_left_out_are_those_that_models_do_not_use() -> None:
    """Every template of the fixtures compiles; so do those of `test_chat_template`."""
    for file in Path(__file__).parents[1].joinpath("fixtures").rglob("chat_template.jinja"):
        ChatTemplate(file.read_text()).compile()
