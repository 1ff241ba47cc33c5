"""Templates that would run for hours or fill the memory end within their budget, in a process that watches its size."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from qengine.errors import RequestError
from qengine.tokenizer import chat_template, template_bounds, template_budget
from qengine.tokenizer import template_rewriting as rewriting
from qengine.tokenizer.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate
from qengine.tokenizer.template_bounds import check_operator
from qengine.tokenizer.template_reading import count_nodes
from qengine.tokenizer.template_sandbox import TemplateEnvironment

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo\tx"}]
BIG = "{% set big = 'a' * 1000000 %}"
WIDE = "{% set big = '\U0001f600' * 1000000 %}{% set big = big ~ big ~ big ~ big ~ big ~ big ~ big ~ big %}"
LONG = "{% set big = 'a' * 1000000 %}{% set big = big ~ big ~ big ~ big ~ big ~ big ~ big ~ big %}"
SIXTY = "{% for i in range(60) %}"
#: What each does with a text of eight million characters made each of them a text of 80 bytes, in one go.
CHARACTER_FILTERS = ("sort", "groupby('0')", "slice(2) | list", "batch(60000) | list", "list")
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
    **{f"characters in {call}": WIDE + "{{ big | " + call + " | length }}" for call in CHARACTER_FILTERS},
    "a loop in a list": WIDE + "{% for c in big %}{{ loop | list | length }}{% endfor %}",
    "a loop in a join": WIDE + "{% for c in big %}{{ ''.join(loop) }}{% endfor %}",
    "a block of wide texts": WIDE + "{% set x %}" + "{{ big }}" * 27 + "{% endset %}{{ x | length }}",
    "a macro of wide texts": WIDE + "{% macro f() %}" + "{{ big }}" * 27 + "{% endmacro %}{{ f() | length }}",
    "a block of texts that one character makes wide": LONG
    + "{% set x %}\U0001f600"
    + "{{ big }}" * 30
    + "{% endset %}{{ x | length }}",
    "a budget that is given back": WIDE
    + "{% set _ = [-1000000000000] | map('a step') | list %}{{ big | list | length }}",
    # What is a number in Jinja's mind
    "a format that is odd": "{{ '%1000000000d' is odd }}",
    "a format that is even, by name": "{{ ['%1000000000d'] | select('even') | list }}",
    "a format that is divisible": "{{ '%1000000000d' is divisibleby(3) }}",
    "a text that is rounded up": "{{ 'ab' | round(9, 'ceil') }}",
    "a list that is rounded down": "{{ [1] | round(9, 'floor') }}",
    "a text of a list that is lower": "{% set big = '\U000e0001' * 1000000 %}{{ ([big] * 12) is lower }}",
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


PRIVATE = (
    *(rewriting.ARGUMENTS, rewriting.CONCATENATED, rewriting.MADE, rewriting.SEARCHED, rewriting.STEP),
    *(rewriting.TESTED, rewriting.TIMED),
)


@pytest.mark.parametrize("name", PRIVATE)
@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("filter", "map(name)"),
        ("filter", "map(name | safe)"),
        ("test", "select(name)"),
        ("test", "reject(name)"),
        ("test", "selectattr('a', name)"),
        ("test", "rejectattr('a', name)"),
    ],
)
def test_a_template_cannot_name_what_counts(name: str, kind: str, call: str) -> None:
    text = "{% set name = '" + name + "' %}{{ [{'a': -1000}] | " + call + " | list }}"
    with pytest.raises(RequestError, match=f"a template has no {kind} '{name}'"):
        _render(text)
    assert _render("{{ '" + name + "' is filter }}{{ '" + name + "' is test }}") == "FalseFalse"


def test_the_name_of_a_filter_is_a_text() -> None:
    with pytest.raises(RequestError, match="the name of a filter is a tuple, expected a text"):
        _render("{{ [1] | map((1, 2)) | list }}")
    with pytest.raises(RequestError, match="did you forget to quote"):
        _render("{{ [1] | map(upper) | list }}")


def test_no_filter_or_test_has_a_private_name() -> None:
    environment = TemplateEnvironment(datetime.now)
    assert set(environment.filters) - set(PRIVATE) == set(template_bounds.FILTERS)
    assert set(environment.tests) == set(template_bounds.TESTS)


def test_a_budget_is_not_given_back() -> None:
    budget = template_budget.Budget()
    with pytest.raises(SecurityError, match="makes -1 bytes, expected 0 or more"):
        budget.charge(-1)


TUPLES = "{% set t, u, d = (1, 2) * 3, (1, 2) * 3, {} %}"
LONG_TEXT = "{% set x, y = 'a' * 5000, 'b' * 5000 %}"


@pytest.mark.parametrize(
    "text",
    [
        TUPLES + "{% if t == u %}{% endif %}" * 100,
        TUPLES + "{% if t != u and not t < u or t >= u %}{% endif %}" * 100,
        TUPLES + "{% if 1 in t %}{% endif %}" * 100,
        TUPLES + "{% if t not in d %}{% endif %}" * 100,
        TUPLES + "{% if t in {'a': 1} %}{% endif %}" * 100,
        TUPLES + "{% if (0,) < (1,) < t %}{% endif %}" * 100,
        TUPLES + "{{ 1 if t == u else 2 }}" * 100,
        TUPLES + "{{ d[t] }}" * 100,
        TUPLES + "{% if t is defined %}{% endif %}" * 100,
        TUPLES + "{% if t is eq(u) %}{% endif %}" * 100,
        "{{ range(1000) | reject | list }}",
        "{{ ('a' * 1000) | select('none') | list }}",
        "{{ ('a' * 1000) | max }}",
        "{{ range(1000) | min }}",
    ],
)
def test_what_walks_over_values_counts(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(template_budget, "MAX_STEPS", 50)
    with pytest.raises(RequestError, match="more than 50 steps"):
        _render(text)


@pytest.mark.parametrize(
    "text",
    [
        TUPLES + "{% if t == u %}{% endif %}" * 8,
        TUPLES + "{% if 1 in t %}{% endif %}" * 8,
        TUPLES + "{% set _ = d[t] %}" * 8,
        TUPLES + "{% if t is eq(u) %}{% endif %}" * 8,
        TUPLES + "{% if d is ne({}) %}{% endif %}" * 8,
        TUPLES + "{% if t is in([u]) %}{% endif %}" * 8,
        TUPLES + "{% if t.count(3) %}{% endif %}" * 8,
        TUPLES + "{% set _ = d.get(t) %}" * 8,
        TUPLES + "{% for i in [1] %}" + "{% if loop.changed(t) %}{% endif %}" * 8 + "{% endfor %}",
        LONG_TEXT + "{% if x is lower %}{% endif %}" * 8,
        LONG_TEXT + "{% if x.islower() %}{% endif %}" * 8,
        LONG_TEXT + "{% if x is eq(y) %}{% endif %}" * 8,
        LONG_TEXT + "{% set _ = x.find('b') %}" * 8,
        LONG_TEXT + "{% if ''.startswith(x) %}{% endif %}" * 8,
    ],
)
def test_what_may_take_time_looks_at_the_clock_each_time(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    clock = SimpleNamespace(thread_time=itertools.count().__next__)  # Each look takes a second.
    monkeypatch.setattr(template_budget, "time", clock)
    with pytest.raises(RequestError, match="more than 5 seconds"):
        _render(text)


def test_what_takes_no_time_does_not_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(thread_time=itertools.count().__next__)
    monkeypatch.setattr(template_budget, "time", clock)
    used = "{% if m.role == 'user' and m.content is string and 'x' in m and m.get('y') is none %}{% endif %}"
    assert _render("{% set m = messages[0] %}" + used * 10) == ""


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (BIG + "{{ big | selectattr('x') | list }}", "'selectattr' takes apart 1000000 characters, at most 524288"),
        (BIG + "{{ big | max }}", "'max' takes apart 1000000 characters"),
        ("{{ (['a'] * 100000) | max(attribute='0.0.0.0.0.0') }}", "'max' reads 600000 attributes, at most 524288"),
        ("{{ ([{}] * 100) | sort(attribute=(1, 2)) }}", "an attribute's name is a tuple, expected a text or number"),
        ("{% for c in 'abc' %}{{ loop | sort }}{% endfor %}", "'sort' is given a loop, expected a list"),
        ("{% for c in 'abc' %}{{ 1 in loop }}{% endfor %}", "'in' is given a loop, expected a list"),
        ("{% for c in 'abc' %}{{ 1 is in(loop) }}{% endfor %}", "'in' is given a loop, expected a list"),
        ("{% for c in 'abc' %}{{ ''.join(loop) }}{% endfor %}", "'join' is given a loop, expected a list"),
        ("{{ 'a' is odd }}", "a str is used as a number"),
        ("{{ ([['a' * 1000000]] * 2) is lower }}", "it makes a text of"),
    ],
)
def test_what_would_take_long_is_refused_before(text: str, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        _render(text)


def test_pieces_of_a_block_cost_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "MAX_MADE", 20_000)
    for piece in ("{{ '' }}", "{% if 1 %}a{% endif %}"):
        with pytest.raises(RequestError, match="more than 20000 bytes"):
            _render("{% set x %}{% for i in range(100) %}" + piece * 30 + "{% endfor %}{% endset %}")


def test_what_is_marked_safe_escapes_what_is_added_to_it() -> None:
    assert _render("{{ ('<' | safe) + '<' + ('<' | safe) }}") == "<&lt;<"
    text = "<" * 2**21
    check_operator(template_budget.Budget(), "+", text, text)
    for left, right in ((Markup(""), text), (text, Markup(""))):
        with pytest.raises(SecurityError, match="it makes a text of"):
            check_operator(template_budget.Budget(), "+", left, right)


def test_what_is_marked_safe_joins_as_it_is() -> None:
    assert _render("{{ ['<', '>'] | join('&' | safe) }}") == "<&>"


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
        "{{ a" + ".b" * 3000 + " }}",
    ],
)
def test_templates_that_cannot_be_compiled_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="not valid Jinja"):
        _render(text)
    with pytest.raises(RequestError, match="not valid Jinja"):
        _ = ChatTemplate(text).option_names


@pytest.mark.parametrize("property_name", ["option_names", "accepts_content_parts", "reads_tools"])
def test_questions_about_a_deep_template_are_refused(property_name: str) -> None:
    with pytest.raises(RequestError, match="it has 3003 parts in each other, at most 200 are compiled"):
        getattr(ChatTemplate("{{ a" + ".b" * 3000 + " }}"), property_name)
    assert ChatTemplate("{% for a in tools" + ".content" * 150 + " %}{% endfor %}").reads_tools


@pytest.mark.parametrize("property_name", ["option_names", "accepts_content_parts", "reads_tools"])
def test_questions_that_fail_are_errors_of_the_template(monkeypatch: pytest.MonkeyPatch, property_name: str) -> None:
    def too_deep(*args: Any) -> Any:
        raise RecursionError("maximum recursion depth exceeded")

    template = ChatTemplate("{{ tools }}")
    for question in ("options_of", "loops_over_content", "reads"):
        monkeypatch.setattr(chat_template, question, too_deep)
    with pytest.raises(RequestError, match="not valid Jinja: maximum recursion depth exceeded"):
        getattr(template, property_name)


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
    "{{ 1 is odd }}{{ 2 is even }}{{ 2.0 is even }}{{ 9 is divisibleby(3) }}{{ 9 is divisibleby 2 }}{{ x is defined }}"
    "{{ x is undefined }}{{ 'upper' is filter }}{{ 'x' is filter }}{{ 'odd' is test }}{{ 'x' is test }}",
    "{{ none is none }}{{ true is boolean }}{{ false is false }}{{ 1 is true }}{{ 1 is integer }}{{ 1.5 is float }}"
    "{{ 1 is string }}{{ {} is mapping }}{{ 1 is number }}{{ [] is sequence }}{{ 1 is sameas 1 }}{{ 'a' is iterable }}",
    "{{ 'aB' is lower }}{{ 'ab' is lower }}{{ 'AB' is upper }}{{ ['a'] is lower }}{{ {'A': 1} is upper }}"
    "{{ x is lower }}{{ none is lower }}{{ 5 is upper }}{{ range is callable }}{{ ('a' | safe) is escaped }}"
    "{{ 'a' is escaped }}",
    "{{ 'a' is in('ab') }}{{ 1 is in [1] }}{{ 3 is eq(3) }}{{ 3 is equalto 4 }}{{ 3 is ne(3) }}{{ 3 is gt(2) }}"
    "{{ 3 is greaterthan(2) }}{{ 3 is ge(3) }}{{ 3 is lt(2) }}{{ 3 is lessthan(2) }}{{ 3 is le(3) }}",
    "{{ [1, 2, 3] | select('>', 1) | list }}{{ [1, 2] | select('==', 1) | list }}{{ [1, 2] | reject('!=', 1) | list }}"
    "{{ [1, 2] | select('>=', 2) | list }}{{ [1, 2] | select('<', 2) | list }}{{ [1, 2] | select('<=', 2) | list }}",
    "{% set a, b = [1], {'a': 1} %}{{ 0 < 1 < 2 }}{{ a == [1] }}{{ a != b }}{{ 'a' in b }}{{ 'a' not in b }}"
    "{{ a in [a] }}{{ [2] > a >= [1] }}{{ 1 in a == true }}{{ b['a'] }}{{ b[a[0]] is defined }}"
    "{{ a[-1] }}{{ a[a[0] - 1] }}",
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
    assert {name for name in template_bounds.TESTS if not re.search(rf"is {name}\b|'{name}'", text)} == set()
