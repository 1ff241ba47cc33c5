"""Templates that would run for hours or fill the memory end within their budget, in a process that watches its size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qengine.errors import RequestError
from qengine.tokenizer import template_bounds, template_budget
from qengine.tokenizer.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate
from qengine.tokenizer.template_reading import count_nodes

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
    # What no str, number, list or dict is
    "bytes": "{{ ('a'.encode() * 10000000000) | length }}",
    "bytes through attr": "{{ ((''|attr('encode'))() * 10000000000) | length }}",
    "bytes of a number": "{{ (1).to_bytes(10000000000, 'big') | length }}",
    # One operation that takes hours
    "round": "{{ 1 | round(1000000000, 'ceil') }}",
    "round down": "{{ 1 | round(-1000000000) }}",
    "trim": BIG + "{{ big | trim('b' * 1000000 ~ 'a') | length }}",
    "strip": BIG + "{{ big.strip('b' * 1000000 ~ 'a') | length }}",
    "rfind": BIG + "{{ big.rfind('a' * 300000 ~ 'b' ~ 'a' * 300000) }}",
    "rindex": BIG + "{{ big.rindex('a' * 300000 ~ 'b' ~ 'a' * 300000) }}",
    "rsplit": BIG + "{{ big.rsplit('a' * 300000 ~ 'b' ~ 'a' * 300000) | length }}",
    "rpartition": BIG + "{{ big.rpartition('a' * 300000 ~ 'b' ~ 'a' * 300000) | length }}",
    "count in a list": BIG + "{{ ([big] * 1000000).count(big ~ '') }}",
    "numbers of one hash": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set ns.x = ns.x + [i * 2305843009213693951] %}{% endfor %}{{ ns.x | unique | list | length }}",
    "a large power": "{{ (2 ** 4000) ** 4000 }}",
    "a long number": "{{ ('9' * 1000000) | float }}",
    # What is made is small, and written out it is not
    "a width from an argument": "{{ '{:{}}'.format(1, 10000000000) }}",
    "many widths": "{{ ('%999999d' * 16000) % ((1,) * 16000) }}",
    "widths below": "{{ ('%9999d' * 16000) % ((1,) * 16000) }}",
    "a list of one text": BIG + "{% set l = [big] * 1000000 %}{{ l }}",
    "its JSON": BIG + "{{ ([big] * 1000000) | tojson | length }}",
    "its text": BIG + "{{ ([big] * 1000000) | string | length }}",
    "its text in ~": BIG + "{{ (([big] * 1000000) ~ '') | length }}",
    "its text in %": BIG + "{{ '%s' % [[big] * 1000000] }}",
    "its text in an error": BIG + "{{ raise_exception([big] * 1000000) }}",
    "sorted": BIG + "{{ ([big] * 1000000) | sort | length }}",
    "separators of JSON": BIG + "{{ ([1] * 100000) | tojson(separators=(big, big)) | length }}",
    "a deep indent": "{% set ns = namespace(x=[1] * 100000) %}{% for i in range(150) %}{% set ns.x = [ns.x] %}"
    "{% endfor %}"
    "{{ ns.x | tojson(indent=64) | length }}",
    "joined attributes": BIG + "{{ ([{'a': big}] * 1000000) | join('', attribute='a') | length }}",
    "joined lazily": BIG + "{{ ''.join(([{'a': big}] * 1000000) | map(attribute='a')) | length }}",
    "joined values": BIG + "{{ big.join({'a': 1, 'b': 2}.values() | list * 100000) | length }}",
    "attributes of a namespace": BIG + "{% set ns = namespace(a=big) %}{{ ([ns] * 100000) | join('', attribute='a') }}",
    "a namespace in a format": BIG + "{% set ns = namespace(a=big) %}{{ ('{0.a}' * 10000).format(ns) | length }}",
    "other ends of lines": "{{ ('a\r' * 500000) | indent(60000) | length }}",
    "a date": "{{ strftime_now('%99Y' * 100000) | length }}",
    "a date's width": "{{ strftime_now('%99999Y') | length }}",
    "a list of characters": "{% set big = '\u3042' * 1000000 %}{{ (big ~ big ~ big ~ big) | list | length }}",
    "many small lists": "{% for i in range(99999) %}{{ range(99999) | batch(1) | list | length }}{% endfor %}",
    "many small dicts": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% set ns.x = [{'a': ns.x, 'b': j}] %}{% set ns.x = [j] %}{% endfor %}{% endfor %}",
    "pieces": "{% set big = 'a ' * 500000 %}{{ (big ~ big ~ big ~ big ~ big ~ big ~ big).split() | length }}",
    "words": "{% set big = 'a-' * 500000 %}{{ (big ~ big ~ big ~ big ~ big ~ big) | title | length }}",
    "lists in lists, compared": "{% set ns = namespace(x=[1], y=[1]) %}" + SIXTY + "{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "tuples in tuples, hashed": "{% set ns = namespace(x=1) %}" + SIXTY + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
    "{{ {ns.x: 1} }}",
    "tuples in tuples, deep": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = (ns.x,) %}"
    "{% endfor %}"
    "{{ {ns.x: 1} }}",
    "dicts in dicts": "{% set ns = namespace(x=1) %}" + SIXTY + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}"
    "{{ ns.x | tojson | length }}",
    "arguments in arguments": "{% set ns = namespace(x=1) %}{% macro f() %}{% set ns.x = varargs %}{% endmacro %}"
    + SIXTY
    + "{{ f(ns.x, ns.x) }}{% endfor %}{{ ns.x | string | length }}",
    "arguments from a text": BIG + "{% macro f() %}{{ varargs | length }}{% endmacro %}{{ f(*big) }}",
    # What is written and kept
    "doubling in a block": "{% set ns = namespace(x='ab') %}"
    + SIXTY
    + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "a block that repeats its text": "{% set x %}{% for i in range(99999) %}"
    + "z" * 50_000
    + "{% endfor %}{% endset %}{{ x | length }}",
    "a macro that repeats its text": "{% macro f() %}{% for i in range(99999) %}"
    + "z" * 50_000
    + "{% endfor %}{% endmacro %}{{ f() | length }}",
    "a block that is called": "{% block b %}" + "z" * 50_000 + "{% endblock %}{% set ns = namespace(x=[]) %}"
    "{% for i in range(99999) %}{% set ns.x = ns.x + [self.b()] %}{% endfor %}",
    "a loop that counts what it filtered": BIG + "{% set big = big ~ big ~ big ~ big %}"
    "{% for c in big if true %}{{ loop.length }}{% break %}{% endfor %}",
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
resource.setrlimit(resource.RLIMIT_AS, (size() + 2**29, resource.RLIM_INFINITY))
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
    """Seconds and message of each, all in one process that may take 512 MiB more than it starts with."""
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


@pytest.mark.parametrize(
    "text",
    [
        "x" * (MAX_TEMPLATE_CHARS + 1),
        "{{ " + "(" * 100_000,
        "{% if 1 %}" * 10_000,
        "{{a}}" * 25_000,
        "{{ " + "9" * 5000 + " }}",
        "{{ 'x' | urlize }}",
    ],
)
def test_templates_that_cannot_be_compiled_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="not valid Jinja"):
        _render(text)
    with pytest.raises(RequestError, match="not valid Jinja"):
        _ = ChatTemplate(text).option_names


def test_autoescape_is_refused() -> None:
    with pytest.raises(RequestError, match="not valid Jinja: autoescape is not for chat templates"):
        _render("{% autoescape true %}{{ '<' }}{% endautoescape %}")


def test_a_chain_of_names_is_followed_in_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    links = "".join("{% set a" + str(i + 1) + " = a" + str(i) + " | trim %}" for i in reversed(range(1000)))
    template = ChatTemplate(links + "{% set a0 = m.content %}{% for part in a1000 %}{% endfor %}")
    visits: list[nodes.Node] = []
    find_all = nodes.Node.find_all

    def counted(self: nodes.Node, kind: Any) -> Any:
        visits.append(self)
        return find_all(self, kind)

    monkeypatch.setattr(nodes.Node, "find_all", counted)
    assert template.accepts_content_parts
    assert len(visits) < 10 * count_nodes(template._syntax_tree)


def test_every_template_of_the_fixtures_compiles() -> None:
    for file in Path(__file__).parents[1].joinpath("fixtures").rglob("chat_template.jinja"):
        ChatTemplate(file.read_text()).compile()


#: Each method and filter that templates may use, and what they do with blocks, macros and loops.
USED = [
    "{{ 'aXb'.capitalize() }}{{ 'ß'.casefold() }}{{ 'aXb'.lower() }}{{ 'aXb'.swapcase() }}{{ 'aXb cd'.title() }}",
    "{{ 'aXb'.upper() }}{{ 'abab'.count('a') }}{{ 'ab'.endswith('b') }}{{ 'ab'.find('b') }}{{ 'ab'.index('b') }}",
    "{{ 'a=b'.partition('=') }}{{ 'a=b=c'.rpartition('=') }}{{ 'ab'.startswith(('x', 'a')) }}",
    "{{ 'ab'.removeprefix('a') }}{{ 'ab'.removesuffix('b') }}{{ 'a1'.isalnum() }}{{ 'a'.isalpha() }}"
    "{{ '1'.isdigit() }}",
    "{{ 'a'.islower() }}{{ ' '.isspace() }}{{ 'A'.istitle() }}{{ 'A'.isupper() }}{{ '1'.isnumeric() }}",
    "{{ ' a '.lstrip() }}|{{ ' a '.rstrip() }}|{{ 'xax'.strip('x') }}|{{ 'aba'.rfind('a') }}{{ 'aba'.rindex('a') }}",
    "{{ 'a'.center(5, '*') }}{{ 'a'.ljust(3) }}{{ 'a'.rjust(3) }}{{ '7'.zfill(3) }}{{ 'a\tb'.expandtabs(4) }}",
    "{{ '{} {x!r:>5} {}'.format(1, 2, x='y') }}{{ '{0[a]}'.format({'a': 2}) }}{{ ', '.join(['a', 'b']) }}",
    "{{ 'aba'.replace('a', 'c', 1) }}{{ 'a b'.split() }}{{ 'a,b,c'.split(',', 1) }}{{ 'a,b,c'.rsplit(',', 1) }}",
    "{{ 'a\nb'.splitlines() }}{{ '</think>x'.split('</think>')[-1].lstrip('\n') }}",
    "{{ [1, 2, 1].count(1) }}{{ [1, 2].index(2) }}{{ (1, 2).count(3) }}{{ {'a': 1}.get('b', 3) }}",
    "{% for k, v in {'a': 1, 'b': [2]}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'a': 1}.keys() | list }}",
    "{{ {'a': 1}.values() | list }}{{ -3 | abs }}{{ [1, 2, 3] | batch(2, 'x') | list }}{{ 'ab' | capitalize }}",
    "{{ 'a' | center(5) }}{{ unset | default('d') }}{{ unset | d('e') }}{{ {'b': 1, 'a': 2} | dictsort }}",
    "{{ '<&>' | e }}{{ ('<' | escape) + '<' }}{{ '<' | forceescape }}{{ [1, 2] | first }}{{ '1.5' | float }}",
    "{{ '%s %d' | format('a', 2) }}{% for g in [{'a': 1, 'b': 2}] | groupby('a') %}{{ g.grouper }}{{ g.list }}"
    "{% endfor %}",
    "{{ 'a\nb' | indent(2, true) }}{{ '12' | int }}{{ 'x' | int(5) }}{{ {'a': 1} | items | list }}{{ [1, 2] | last }}",
    "{{ [1, 'a', none] | join('-') }}{{ [{'a': 1}] | join(', ', attribute='a') }}{{ 'abc' | join('.') }}"
    "{{ 'ab' | list }}",
    "{{ [1, 2] | length }}{{ 'ab' | count }}{{ 'AB' | lower }}{{ ['a'] | map('upper') | list }}{{ [3, 1] | max }}",
    "{{ [{'a': 1}] | map(attribute='a') | first }}{{ [3, 1] | min }}{{ [1, none] | reject('none') | list }}",
    "{{ [{'a': 1}, {}] | rejectattr('a', 'defined') | list }}{{ 'aa' | replace('a', 'b', 1) }}{{ 'ab' | reverse }}",
    "{{ [1, 2] | reverse | list }}{{ 2.567 | round(1) }}{{ '<' | safe }}{{ [0, 1] | select | list }}",
    "{{ [{'r': 'u'}, {'r': 'v'}] | selectattr('r', 'equalto', 'u') | list }}{{ range(5) | slice(2) | list }}",
    "{{ ['b', 'A'] | sort }}{{ [{'a': 2}, {'a': 1}] | sort(attribute='a') }}{{ 5 | string }}{{ [1, 2] | sum }}",
    "{{ 'a-b' | title }}{{ {'a': [1, 'ü']} | tojson }}{{ [1] | tojson(indent=2) }}{{ ' a ' | trim }}"
    "{{ 'xax' | trim('x') }}",
    "{{ 'one two three' | truncate(9) }}{{ ['a', 'A', 'b'] | unique | list }}{{ 'ab' | upper }}"
    "{{ ('<' | safe).strip() }}",
    "{{ range(3) | list }}{{ range(1, 6, 2) | last }}{{ dict(a=1, **{'b': 2}) }}{{ namespace(a=1).a }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner(', ') %}"
    "{{ j() }}x{{ j() }}y",
    "{% for x in 'abc' if x != 'b' %}{{ loop.index }}{{ loop.length }}{{ loop.revindex0 }}{{ loop.first }}"
    "{{ loop.previtem }}"
    "{{ loop.nextitem }}{{ loop.cycle('p', 'q') }}{{ loop.changed(x) }}{{ loop.last }}{{ loop.depth }}"
    "{% else %}none{% endfor %}",
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1) }}{{ m(1, 3, 4, c=5) }}"
    "{{ m(*[6, 7]) }}",
    "{% macro m() %}[{{ caller('x') }}]{% endmacro %}{% call(y) m() %}{{ y }}{% endcall %}{{ m.name }}",
    "{% block b %}in{% endblock %}{{ self.b() }}{% filter upper | trim %} a {% endfilter %}{% set s %}b{{ 1 }}"
    "{% endset %}{{ s }}",
    "{% set s | trim | upper %} c {% endset %}{{ s }}{% with a = 1 %}{{ a }}{% endwith %}{{ 'a' if unset else 'b' }}",
    "{{ [1, 2] + [3] }}{{ (1,) + (2,) }}{{ [0] * 3 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 7 / 2 }}{{ 2 ** 8 }}"
    "{{ 'a' * 3 }}{{ 1 - 3 }}",
    "{{ 'b' in ['a', 'b'] }}{{ 'b' in {'b': 1} }}{{ [1] == [1] }}{{ 1 ~ 'a' ~ none ~ [1] }}"
    "{{ [[1, [2]], {'a': (3,)}] }}",
    "{{ {'a': unset} is mapping }}{{ (1, 'a')[::-1] }}{{ [1, 2, 3][-2:] }}{{ messages[0]['content'][:1] }}"
    "{{ 1.0 }}{{ true }}",
    "{{ messages | map(attribute='role') | unique | join }}{{ messages[0].items() | list }}{{ {'items': 1}['items'] }}",
]


@pytest.mark.parametrize("template", USED)
def test_what_templates_use_is_as_in_jinja(template: str) -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    assert _render(template) == plain.from_string(template).render(messages=MESSAGES)


def test_every_method_and_filter_that_is_allowed_is_used() -> None:
    text = "".join(USED)
    left_out = {"isascii", "isdecimal", "isidentifier", "isprintable", "attr"}
    assert {name for name in template_bounds.FILTERS if not re.search(rf"\| ?{name}\b", text)} <= left_out
    methods = {name for name in template_bounds._TEXT_METHODS if f".{name}(" not in text}
    assert methods <= left_out
