"""The sandbox that chat templates run in: Jinja's own, with transformers' names, and an end to time and memory.

Jinja's sandbox keeps a template from Python's internals, but not from running for hours or asking for a terabyte. Here
a template has the methods, filters and tests of `template_bounds` alone; every iteration, call, filter, test, operator
and comparison is counted against the `Budget` of its rendering, except comparisons with a constant; and what could make
something huge in one go is bounded before it is made.
Invariant: a rendering ends within its budget, or with a SecurityError. Processes would bound more, and cost more.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace

from qengine.tokenizer import template_rewriting as rewriting
from qengine.tokenizer.template_bounds import (
    FILTERS,
    TESTS,
    TEXT_FILTERS,
    TEXT_TESTS,
    attribute_bound,
    check_filter,
    check_operator,
    check_searched,
    check_test,
)
from qengine.tokenizer.template_budget import PIECE_BYTES, Budget

#: Arguments of one call that come from a list.
MAX_ARGUMENTS = 1024
MAX_DATE_FORMAT = 256
#: Not a name that a template could write.
_BUDGET = "the budget"
_DATE_WIDTH = re.compile(r"%[-_0^#+]*[1-9]")


class RaisedByTemplate(TemplateError):  # noqa: N818  (an error of the template's making, not a kind of ours)
    """`raise_exception` was called."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, now: Callable[[], datetime]) -> None:
        extensions: list[str | type[Extension]] = [_GenerationTag, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_shown)
        self.globals = {
            "cycler": Cycler,
            "dict": _make_dict,
            "joiner": Joiner,
            "namespace": _SafeNamespace,
            "raise_exception": _raise_exception,
            "range": safe_range,
            "strftime_now": lambda form: _format_date(now(), form),
        }
        self._functions = frozenset(map(id, self.globals.values()))
        known = {**self.filters, "join": _join, "tojson": _tojson}
        self.filters = {name: _counted(self, name, known[name]) for name in FILTERS}
        self.filters |= {
            rewriting.ARGUMENTS: _arguments,
            rewriting.CONCATENATED: _concatenated,
            rewriting.MADE: _made,
            rewriting.SEARCHED: _searched,
            rewriting.STEP: _step,
            rewriting.TESTED: _tested,
            rewriting.TIMED: _timed,
        }
        known_tests: dict[str, Any] = {**self.tests, "filter": FILTERS.__contains__, "test": TESTS.__contains__}
        self.tests = {name: _counted_test(name, known_tests[name]) for name in TESTS}

    @staticmethod
    def budgeted(variables: Mapping[str, Any]) -> dict[str, Any]:
        """The variables of a rendering, with a budget of its own."""
        return {**variables, _BUDGET: Budget()}

    # Hooks of Jinja's

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(rewriting.Counting().visit(source), *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have the attribute."""
        if attr.startswith("_"):
            return False
        return isinstance(obj, Namespace | TemplateReference) or attribute_bound(obj, attr) is not None

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run the filter that a value names, as in `map(name)`; those of the rewriting are for the compiler alone."""
        _check_name("filter", name, FILTERS)
        return super().call_filter(name, *args, **kwargs)

    def call_test(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run the test that a value names, as in `select(name)`."""
        _check_name("test", name, TESTS)
        return super().call_test(name, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`."""
        budget = _budget(context)
        check_operator(budget, operator, left, right)
        value = super().call_binop(context, operator, left, right)
        return (
            budget.added(left, right, value)
            if isinstance(value, list | tuple) and operator == "+"
            else budget.made(value)
        )

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  (as in Jinja)
        """Call a function or method from a template."""
        budget = _budget(__context)
        if isinstance(__obj, Undefined):
            return super().call(__context, __obj, *args, **kwargs)  # It raises what it stands for.
        budget.weigh_arguments(args, kwargs)
        owner = __self._check_call(budget, __obj, args, kwargs)
        made = budget.made(super().call(__context, __obj, *args, **kwargs), PIECE_BYTES)
        if isinstance(owner, str) and isinstance(made, list | tuple):
            budget.charge(sys.getsizeof(owner))  # It was cut in pieces.
        return made

    def _check_call(self, budget: Budget, called: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The object whose method is called; None for a function."""
        if isinstance(called, Macro | BlockReference | LoopContext | Joiner) or id(called) in self._functions:
            return None
        method = getattr(called, "__wrapped__", called)  # Jinja's sandbox wraps str.format, which is safe only so.
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        bound = attribute_bound(owner, name)
        if bound is None or (name == "format" and method is called):
            raise SecurityError(f"a template may not call {type(owner).__name__}.{name}")
        bound(budget, owner, args, kwargs)
        return owner


def _check_name(kind: str, name: object, known: Mapping[str, object]) -> None:
    if isinstance(name, Undefined):
        return  # Jinja says what is missing.
    if not isinstance(name, str):
        raise SecurityError(f"the name of a {kind} is a {type(name).__name__}, expected a text")
    if name not in known:
        raise SecurityError(f"a template has no {kind} {str(name)[:100]!r}")


def _budget(context: Context) -> Budget:
    budget = context.parent.get(_BUDGET)
    if not isinstance(budget, Budget):  # What Jinja computes while it compiles.
        return Budget()
    return budget


# What counts


def _counted(environment: TemplateEnvironment, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at its arguments first, and is counted. Given a context, it is never run by the compiler."""
    passes = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @functools.wraps(function)
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        if name in TEXT_FILTERS:
            value = budget.text(value)
        check_filter(budget, name, value, args, kwargs)
        known = {"context": context, "eval_context": context.eval_ctx, "environment": environment}
        first = () if passes is None else (known[passes],)
        return budget.made(function(*first, value, *args, **kwargs), PIECE_BYTES)

    return pass_context(counted)


def _counted_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a test."""
    is_of_text = name in TEXT_TESTS

    @functools.wraps(function)
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.step()
        if is_of_text:
            value = budget.text(value)
        check_test(budget, name, value, args, kwargs)
        return function(value, *args, **kwargs)

    return pass_context(counted)


@pass_context
def _shown(context: Context, value: Any) -> str:
    """What `{{ value }}` writes. A block joins it with others: each character takes four bytes if one of them does."""
    budget = _budget(context)
    text = budget.text(value)
    budget.charge(4 * len(text) + 8)
    return text


@pass_context
def _step(context: Context, num_bytes: int) -> None:
    """An iteration of a loop or the start of a macro, which writes so many bytes of its own."""
    budget = _budget(context)
    budget.step()
    budget.charge(num_bytes)


@pass_context
def _searched(context: Context, container: Any) -> Any:
    """What stands behind `in`."""
    budget = _budget(context)
    budget.step()
    check_searched(budget, container)
    return container


@pass_context
def _timed(context: Context, value: Any) -> Any:
    """The result of a comparison, or what was found under a key: their operands may be large."""
    _budget(context).steps(1)
    return value


@pass_context
def _tested(context: Context, value: Any) -> Any:
    """The condition of a loop, asked for each of its items; Jinja may keep those that pass."""
    budget = _budget(context)
    budget.step()
    budget.charge(PIECE_BYTES)
    return value


@pass_context
def _made(context: Context, value: Any) -> Any:
    """A list, dict, slice or block."""
    return _budget(context).made(value)


@pass_context
def _concatenated(context: Context, parts: list[Any]) -> str:
    """`a ~ b ~ c`."""
    budget = _budget(context)
    texts = [budget.text(part) for part in parts]
    budget.allow_text(sum(map(len, texts)))
    made: str = budget.made("".join(texts))
    return made


@pass_context
def _arguments(context: Context, given: Any) -> Any:
    """What follows `*` or `**` in a call."""
    if not isinstance(given, list | tuple | dict | range) or len(given) > MAX_ARGUMENTS:
        raise SecurityError(f"arguments given with * are no list or dict of at most {MAX_ARGUMENTS}")
    return given


# Names


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: marks what an assistant wrote, for training; only its body matters."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _SafeNamespace(Namespace):
    """A namespace without underscore names: a stored `__class__` would deceive the sandbox's own checks."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As in Jinja, so that a template may store a name "self".
        self, *rest = args
        attributes = _make_dict(*rest, **kwargs)
        for name in attributes:
            _check_stored_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_stored_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        # Not what it holds, which may be itself.
        return "<Namespace>"


def _check_stored_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {str(name)[:100]!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict`, of few pairs: many keys with one hash would take the square of their number."""
    if any(not isinstance(given, dict) and len(given) > MAX_ARGUMENTS for given in args):
        raise SecurityError(f"'dict' is given more than {MAX_ARGUMENTS} pairs")
    return dict(*args, **kwargs)


def _format_date(now: datetime, form: str) -> str:
    """`strftime`; the system's own knows widths, and fills them with spaces."""
    if isinstance(form, str) and (len(form) > MAX_DATE_FORMAT or _DATE_WIDTH.search(form)):
        raise SecurityError(f"'strftime_now' is given a width, or more than {MAX_DATE_FORMAT} characters")
    return now.strftime(form)


@pass_context
def _raise_exception(context: Context, message: object) -> None:
    raise RaisedByTemplate(_budget(context).text(message))


@pass_context
def _join(context: Context, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    """Jinja's filter, which would join what it has not measured."""
    budget = _budget(context)
    items = budget.made(iter(value) if isinstance(value, str | dict | range) else value, PIECE_BYTES)
    if attribute is not None:
        items = budget.made(map(make_attrgetter(context.environment, attribute), items))
    separator = str(budget.text(d))  # One that was marked safe would escape the items.
    texts = [budget.text(item) for item in items]
    budget.allow_text(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as a model was trained on it: unlike Jinja's filter, nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
