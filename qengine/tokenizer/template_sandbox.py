"""The sandbox that chat templates run in: Jinja's own, with transformers' names, and an end to time and memory.

Jinja's sandbox keeps a template from Python's internals, but not from running for hours or asking for a terabyte. Here
every iteration, call, filter and operator is counted against the `Budget` of its rendering, together with the size of
what it makes; what could make something huge in one go (replace, join, widths, repetition) is computed beforehand.
Invariant: a rendering ends within its budget, or with a SecurityError. Processes would bound more, and cost more.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

#: Longest string or list that `*`, and largest bit length that `*` and `**`, may make inside a template.
MAX_PRODUCT = 2**20
#: Longest string that one operation may make.
MAX_VALUE_CHARS = 2**24
#: Characters of all strings that a rendering makes, and 8 for each item of a list.
MAX_MADE = 2**28
MAX_STEPS = 5_000_000
#: Of this thread's processor time: a busy machine refuses no template.
MAX_SECONDS = 5.0
_MAX_INDENT = 64
#: Not a name that a template could write.
_BUDGET = "the budget"
#: They run regular expressions or formatters over whole texts, and no chat template needs them.
_REMOVED_FILTERS = ("filesizeformat", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
#: Arguments of these are widths or counts.
_SIZED = frozenset(("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "truncate", "zfill"))
_LONG_NUMBER = re.compile(r"\d{7}")


class RaisedByTemplate(TemplateError):  # noqa: N818  (an error of the template's making, not a kind of ours)
    """`raise_exception` was called."""


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._made = MAX_MADE
        self._end = time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        """Count one iteration, call or operation.

        Raises:
            SecurityError: if there were too many, or they took too long.
        """
        self._steps -= 1
        if self._steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        if time.thread_time() > self._end:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")

    def make(self, value: Any) -> Any:
        """Count what an operation has made, and hand it on.

        Raises:
            SecurityError: if it is too long, or all together is too much.
        """
        self.step()
        if isinstance(value, str):
            _require_length(len(value))
            self._made -= len(value)
        elif isinstance(value, list | tuple | dict | set):
            self._made -= 8 * len(value)
        if self._made < 0:
            raise SecurityError(f"it makes texts of more than {MAX_MADE} characters on its way")
        return value


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        del self.globals["lipsum"]
        self.globals["namespace"] = _SafeNamespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(form)
        self.filters["tojson"] = _tojson
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.filters = {name: _counted(self, name, function) for name, function in self.filters.items()}

    @staticmethod
    def budgeted(variables: Mapping[str, Any]) -> dict[str, Any]:
        """The variables of a rendering, with a budget of its own."""
        return {**variables, _BUDGET: Budget()}

    # Hooks of Jinja's

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counting().visit(source), *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`."""
        _check_operator(operator, left, right)
        return _budget(context).make(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  (as in Jinja)
        """Call a function or method from a template."""
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja's sandbox wraps str.format.
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_sizes(getattr(method, "__name__", ""), owner, args, kwargs)
        return _budget(__context).make(super().call(__context, __obj, *args, **kwargs))

    # What `_Counting` writes into templates

    @pass_context
    def counted_step(self, context: Context) -> str:
        """An iteration of a loop, or the start of a macro."""
        _budget(context).step()
        return ""

    @pass_context
    def counted(self, context: Context, value: Any) -> Any:
        """A value that no call made, such as a slice; `call` counts it."""
        return value

    @pass_context
    def concatenated(self, context: Context, *parts: Any) -> str:
        """`a ~ b ~ c`."""
        texts = [str(part) for part in parts]
        _require_length(sum(map(len, texts)))
        return "".join(texts)


def _budget(context: Context) -> Budget:
    budget = context.parent.get(_BUDGET)
    if not isinstance(budget, Budget):  # What Jinja computes while it compiles.
        return Budget()
    return budget


class _Counting(NodeTransformer):
    """Writes the counting into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  (as Jinja calls it)
        return self._with_step(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._with_step(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._with_step(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("concatenated", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("counted", [node], node.lineno) if isinstance(node.arg, nodes.Slice) else node

    def _with_step(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("counted_step", [], node.lineno), lineno=node.lineno))
        return node


def _call(name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    # An attribute of the environment, which a template cannot write and so not replace.
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=lineno)


# Sizes, before they are made


def _counted(environment: TemplateEnvironment, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at its arguments first, and is counted. Given a context, it is never run by the compiler."""
    passes = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @functools.wraps(function)
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.step()
        if name == "join" and not isinstance(value, str):
            value = list(value)
        _check_sizes(name, value, args, kwargs)
        known = {"context": context, "eval_context": context.eval_ctx, "environment": environment}
        first = () if passes is None else (known[passes],)
        return budget.make(function(*first, value, *args, **kwargs))

    return pass_context(counted)


def _require_length(length: int) -> None:
    if length > MAX_VALUE_CHARS:
        raise SecurityError(f"it makes a text of {length} characters, at most {MAX_VALUE_CHARS} are allowed")


def _check_operator(operator: str, left: Any, right: Any) -> None:
    is_bounded = True
    if operator == "*":
        repeated, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(repeated, str | list | tuple):
            is_bounded = not isinstance(times, int) or len(repeated) * times <= MAX_PRODUCT
        elif isinstance(repeated, int) and isinstance(times, int):
            is_bounded = repeated.bit_length() + times.bit_length() <= MAX_PRODUCT
    elif operator == "**":
        is_integral = isinstance(left, int) and isinstance(right, int)
        is_bounded = not is_integral or left.bit_length() * right <= MAX_PRODUCT
    elif operator == "%" and isinstance(left, str):
        _check_format(left, "%", right.values() if isinstance(right, dict) else right)
    if not is_bounded:
        raise SecurityError(f"the result of '{operator}' is larger than {MAX_PRODUCT}")


def _check_sizes(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """What a filter, or a method of a string, with this name would make of `value`."""
    given = [*args, *kwargs.values()]
    numbers = [number for number in given if isinstance(number, int)]
    if name in _SIZED:
        if any(number > MAX_PRODUCT for number in numbers):
            raise SecurityError(f"'{name}' is given {max(numbers)}, at most {MAX_PRODUCT} is allowed")
        if name in ("expandtabs", "indent") and isinstance(value, str):
            pieces = value.count("\t" if name == "expandtabs" else "\n") + 1
            texts = [len(text) for text in given if isinstance(text, str)]
            _require_length(len(value) + pieces * max([8, *numbers, *texts]))
    elif name == "tojson" and any(number > _MAX_INDENT for number in numbers):
        raise SecurityError(f"'tojson' is given an indent of {max(numbers)}, at most {_MAX_INDENT} is allowed")
    elif name == "replace" and len(given) >= 2:
        old, new = str(given[0]), str(given[1])
        text = str(value)
        _require_length(len(text) + text.count(old) * len(new))
    elif name == "join":
        _check_join(value, given)
    elif name in ("format", "format_map"):
        flat = [item for part in given for item in (part.values() if isinstance(part, dict) else (part,))]
        _check_format(str(value), "%{", flat)
    elif name == "sum" and any(not isinstance(number, int | float | str) for number in given):
        raise SecurityError("'sum' adds numbers alone")
    elif name == "translate":
        raise SecurityError("'translate' is not for templates")


def _check_join(value: Any, given: list[Any]) -> None:
    """As a filter the items are joined, as a method the text joins what it is given."""
    items: Any = value
    separator = str(given[0]) if given else ""
    if not isinstance(value, list):
        separator, items = str(value), given[0] if given and isinstance(given[0], list | tuple) else []
    _require_length(sum(len(item) if isinstance(item, str) else 1 for item in items) + len(separator) * len(items))


def _check_format(form: str, marks: str, given: Any) -> None:
    values: Iterable[Any] = given if isinstance(given, list | tuple | type({}.values())) else (given,)
    longest = max((len(value) for value in values if isinstance(value, str | list | tuple | dict)), default=0)
    if _LONG_NUMBER.search(form) or "*" in form:
        raise SecurityError("a format with a width of that size is not allowed")
    _require_length(len(form) + sum(form.count(mark) for mark in marks) * (longest + 2**10))


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
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_stored_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_stored_name(name)
        super().__setitem__(name, value)


def _check_stored_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {name!r}")


def _raise_exception(message: object) -> None:
    raise RaisedByTemplate(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as a model was trained on it: unlike Jinja's filter, nothing is escaped for HTML."""
    if isinstance(indent, str) and len(indent) > _MAX_INDENT:
        raise SecurityError(
            f"'tojson' is given an indent of {len(indent)} characters, at most {_MAX_INDENT} are allowed"
        )
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
