"""Which methods, filters and tests a chat template may use, and what each may make at most, computed before it runs.

Invariant: what is not listed here is refused, and no single operation takes long: what copies its operands is bounded
by their own bounds (`template_budget`), what multiplies them is bounded here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from string import Formatter
from types import NoneType
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import BlockReference, LoopContext, Macro, Undefined
from jinja2.utils import Cycler
from markupsafe import Markup

from qengine.tokenizer.template_budget import MAX_INT_BITS, PIECE_BYTES, VALUE_WEIGHT, Budget

#: Longest text or list that `*` may make.
MAX_PRODUCT = 2**20
#: Widths of texts, and numbers of parts.
MAX_WIDTH = 2**16
#: Comparisons of one character with another in one operation: 0.1 s.
MAX_WORK = 2**27
MAX_FORMAT_CHARS = 2**16
MAX_INDENT = 64
#: Longer numbers Python itself refuses to read.
_MAX_DIGITS = 4300
_MAX_PRECISION = 32
_MAX_ATTRIBUTE_CHARS = 256
#: Attributes that one filter may read: 1 s.
MAX_ATTRIBUTES = 2**19
#: Of a text that a filter takes apart: a list of them is near MAX_WEIGHT.
MAX_CHARACTERS = 2**19
#: What is done with a text of so many characters takes no more time than any other step.
_SHORT_TEXT = 2**12
_SMALL = (int, float, dict, NoneType)
_NUMBER = re.compile(r"\d+")
_MAX_NUMBER_LEN = 6
#: Most characters of a number in a format, beside its width and precision.
_FORMATTED_NUMBER = 512
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"

#: (budget, owner or piped value, arguments, keyword arguments): refuses what would be too much.
Bound = Callable[[Budget, Any, tuple[Any, ...], Mapping[str, Any]], None]


def _unbounded(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """What it makes is no larger than its operands."""


def _timed(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """What it makes is no larger than its operands, but it may walk over all of them."""
    if not _is_small(value) or not all(map(_is_small, args)):
        budget.look_at_the_clock()


def _is_small(value: Any) -> bool:
    """Whether it takes no time to walk over it. A dict is looked up, not walked over."""
    return len(value) <= _SHORT_TEXT if isinstance(value, str) else isinstance(value, _SMALL)


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _width(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for number in (*args, *kwargs.values()):
        if isinstance(number, int) and number > MAX_WIDTH:
            raise SecurityError(f"a width or count is {number}, at most {MAX_WIDTH} is allowed")


def _work(text: Any, other: Any) -> None:
    if isinstance(text, str) and isinstance(other, str) and len(text) * len(other) > MAX_WORK:
        raise SecurityError(f"it compares {len(text)} characters with {len(other)}, too many for this operation")


# Texts


def _backwards(budget: Budget, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Python searches backwards, and strips, in as many steps as the product of both lengths."""
    for other in (*args, *kwargs.values()):
        _work(text, other)


def _split(budget: Budget, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    separator = _given(args, kwargs, 0, "sep")
    is_text = isinstance(separator, str) and separator
    num_pieces = 1 + (text.count(separator) if is_text else len(text) // 2)
    budget.allow(sys.getsizeof(text) + PIECE_BYTES * num_pieces)


def _rsplit(budget: Budget, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    _backwards(budget, text, args, kwargs)
    _split(budget, text, args, kwargs)


def _num_lines(budget: Budget, text: str) -> int:
    num_lines = 1 + sum(text.count(end) for end in _LINE_ENDS)
    budget.allow(sys.getsizeof(text) + PIECE_BYTES * num_lines)
    return num_lines


def _splitlines(budget: Budget, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    _num_lines(budget, text)


def _replace(budget: Budget, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    old, new = _given(args, kwargs, 0, "old"), _given(args, kwargs, 1, "new")
    budget.allow_text(len(text) + text.count(budget.text(old)) * budget.text_chars(new))


def _joined(budget: Budget, separator: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    items = args[0] if args else ()
    if isinstance(items, str):
        budget.allow(PIECE_BYTES * len(items))
        budget.allow_text(len(items) * (1 + len(separator)))
    elif isinstance(items, list | tuple | dict):
        budget.allow_text(budget.weigh(items).chars + len(separator) * len(items))
    elif isinstance(items, LoopContext):
        raise SecurityError("'join' is given a loop, expected a list")


def _expandtabs(budget: Budget, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    _width(budget, text, args, kwargs)
    size = _given(args, kwargs, 0, "tabsize")
    budget.allow_text(len(text) + text.count("\t") * (size if isinstance(size, int) else 8))


def _format(budget: Budget, form: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """`str.format`. A width taken from an argument is not allowed, nor what a namespace holds."""
    weight = budget.weigh_arguments(args, kwargs)
    if not weight.is_plain:
        raise SecurityError("a format is given what is neither text, number, list nor dict")
    _check_format(budget, form, form.count("{"), 10 * weight.chars + VALUE_WEIGHT * weight.num_values)
    if any("{" in (spec or "") for _, _, spec, _ in Formatter().parse(form)):
        raise SecurityError("a format with a width that is given as an argument is not allowed")


def _percent(budget: Budget, form: Any, given: Any) -> None:
    """`form % given`."""
    if isinstance(form, Markup):
        raise SecurityError("'%' of a text that was marked safe is not allowed")
    if "*" in form:
        raise SecurityError("a format with a width that is given as an argument is not allowed")
    _check_format(budget, form, form.count("%"), budget.text_chars(given))


def _check_format(budget: Budget, form: str, num_fields: int, longest: int) -> None:
    if len(form) > MAX_FORMAT_CHARS:
        raise SecurityError(f"a format has {len(form)} characters, at most {MAX_FORMAT_CHARS} are allowed")
    numbers = _NUMBER.findall(form)
    if any(len(number) > _MAX_NUMBER_LEN for number in numbers):
        raise SecurityError("a format with a width of that size is not allowed")
    width = max(map(int, numbers), default=0)
    budget.allow_text(len(form) + num_fields * (longest + width + _FORMATTED_NUMBER))


_TEXT_TESTS = ("alnum", "alpha", "ascii", "decimal", "digit", "identifier", "lower", "numeric", "printable", "space")
_TEXT_METHODS: dict[str, Bound] = {
    **dict.fromkeys(("capitalize", "casefold", "lower", "swapcase", "title", "upper"), _timed),
    **dict.fromkeys(("count", "endswith", "find", "index", "partition", "startswith"), _timed),
    **dict.fromkeys(("removeprefix", "removesuffix"), _timed),
    **{f"is{kind}": _timed for kind in (*_TEXT_TESTS, "title", "upper")},
    **dict.fromkeys(("lstrip", "rfind", "rindex", "rpartition", "rstrip", "strip"), _backwards),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _width),
    "expandtabs": _expandtabs,
    "format": _format,
    "join": _joined,
    "replace": _replace,
    "rsplit": _rsplit,
    "split": _split,
    "splitlines": _splitlines,
}
#: Of a text that was marked safe: what multiplies would escape its arguments too.
_SAFE_TEXT_METHODS = {
    name: bound
    for name, bound in _TEXT_METHODS.items()
    if bound is _timed or name in ("lstrip", "rstrip", "strip", "split", "splitlines")
}
_LOOP = ("changed", "cycle", "depth", "depth0", "first", "index", "index0", "last", "length", "nextitem", "previtem")
#: What a template may ask of a value, by its type; the first type that fits counts. No other attribute exists.
_ATTRIBUTES: tuple[tuple[type, dict[str, Bound]], ...] = (
    (Markup, _SAFE_TEXT_METHODS),
    (str, _TEXT_METHODS),
    (list, dict.fromkeys(("count", "index"), _timed)),
    (tuple, dict.fromkeys(("count", "index", "grouper", "list"), _timed)),  # The last two: of `groupby`.
    (dict, dict.fromkeys(("get", "items", "keys", "values"), _timed)),
    (LoopContext, dict.fromkeys((*_LOOP, "revindex", "revindex0"), _timed)),
    (Cycler, dict.fromkeys(("current", "next", "reset"), _unbounded)),
    (Macro, dict.fromkeys(("arguments", "caller", "catch_kwargs", "catch_varargs", "name"), _unbounded)),
    (BlockReference, {"super": _unbounded}),
)


def attribute_bound(owner: Any, name: str) -> Bound | None:
    """What bounds the method `name` of `owner`; None if a template has no business with it."""
    for kind, attributes in _ATTRIBUTES:
        if isinstance(owner, kind):
            return attributes.get(name)
    return None


# Operators


def check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Refuse `left operator right` if it would be too much.

    Raises:
        SecurityError: with the bound.
    """
    if operator == "%" and isinstance(left, str):
        _percent(budget, left, right)
    elif operator == "*":
        repeated, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(repeated, str | list | tuple) and isinstance(times, int) and len(repeated) * times > MAX_PRODUCT:
            raise SecurityError(f"the result of '*' is larger than {MAX_PRODUCT}")
    elif operator == "+" and isinstance(left, str) and isinstance(right, str):
        budget.allow_text(_added_chars(left, right) + _added_chars(right, left))
    for number in (left, right):
        if isinstance(number, int) and number.bit_length() > MAX_INT_BITS:
            raise SecurityError(f"'{operator}' is given a number of {number.bit_length()} bits")
    is_power = operator == "**" and isinstance(left, int) and isinstance(right, int)
    if is_power and left.bit_length() * right > MAX_INT_BITS:
        raise SecurityError(f"the result of '**' is larger than {MAX_INT_BITS} bits")


def _added_chars(text: str, other: str) -> int:
    """Characters of `text` in its sum with `other`, which escapes it if it was marked safe."""
    return _escaped_chars(text) if isinstance(other, Markup) else len(text)


# Filters


def _characters(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Each character may become a text of its own."""
    if isinstance(value, str):
        budget.allow(PIECE_BYTES * len(value))


def _parts(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    _width(budget, value, args, kwargs)
    _characters(budget, value, args, kwargs)


def _escaped_chars(text: str) -> int:
    return len(text) + 5 * sum(map(text.count, "&<>\"'"))


def _escaped(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    budget.allow_text(_escaped_chars(value))


def _trim(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    _work(value, _given(args, kwargs, 0, "chars"))


def _indent(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    _width(budget, value, args, kwargs)
    if isinstance(value, str):
        width = _given(args, kwargs, 0, "width")
        longest = len(width) if isinstance(width, str) else width if isinstance(width, int) else 4
        budget.allow_text(len(value) + _num_lines(budget, value) * (longest + 1))


def _percent_filter(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    _percent(budget, value, dict(kwargs) if kwargs else args)


def _number(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if isinstance(value, str) and len(value) > _MAX_DIGITS:
        raise SecurityError(f"a number has {len(value)} digits, at most {_MAX_DIGITS} are read")


def _numeric(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if not isinstance(value, int | float | Undefined):
        raise SecurityError(f"a {type(value).__name__} is used as a number")


def _round(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    _numeric(budget, value, args, kwargs)  # Jinja multiplies it with a power of ten.
    precision = _given(args, kwargs, 0, "precision")
    if isinstance(precision, int) and abs(precision) > _MAX_PRECISION:
        raise SecurityError(f"'round' is given {precision} digits, at most {_MAX_PRECISION} are allowed")


def _sum(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if not isinstance(_given(args, kwargs, 1, "start"), int | float | None):
        raise SecurityError("'sum' adds numbers alone")


def _copies(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """What sorts or compares makes lower-case copies of all texts: of each attribute, if there are several.

    Each character of a text becomes a text of its own, and its copy another.
    """
    attribute = kwargs.get("attribute", "")
    times = 1 + sum(text.count(",") for text in (*args, attribute) if isinstance(text, str))
    weight = budget.weigh(value)
    num_values = 2 * len(value) if isinstance(value, str) else weight.num_values
    budget.allow(times * (8 * weight.chars + PIECE_BYTES * num_values))


def _tojson(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    indent, separators = _given(args, kwargs, 1, "indent"), _given(args, kwargs, 2, "separators")
    width = len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0
    if width > MAX_INDENT:
        raise SecurityError(f"'tojson' is given an indent of {width} characters, at most {MAX_INDENT} are allowed")
    weight = budget.weigh(value)
    each = VALUE_WEIGHT + width * (weight.depth + 1) + budget.text_chars(separators)
    budget.allow_text(weight.chars)
    budget.allow(12 * weight.chars + each * weight.num_values + PIECE_BYTES * weight.num_values)


#: Filters that read their value as text, whatever it is.
TEXT_FILTERS = frozenset(
    (
        *("capitalize", "center", "e", "escape", "forceescape", "format", "lower", "replace", "safe", "string"),
        *("title", "trim", "upper"),
    )
)
#: Filters that follow an attribute's name, and its place among the arguments.
ATTRIBUTE_FILTERS = {
    **dict.fromkeys(("groupby", "rejectattr", "selectattr", "sum"), 0),
    **dict.fromkeys(("join", "max", "min", "unique"), 1),
    "sort": 2,
    "map": None,  # By name alone.
}
#: Filters that walk over their value, item by item or character by character.
ITERATING_FILTERS = frozenset(
    (
        *("batch", "dictsort", "groupby", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr"),
        *("slice", "sort", "sum", "unique"),
    )
)
FILTERS: dict[str, Bound] = {
    **dict.fromkeys(("abs", "count", "d", "default", "first", "items", "last", "length"), _unbounded),
    **dict.fromkeys(("capitalize", "lower", "reverse", "safe", "string", "truncate", "upper"), _unbounded),
    # What they make is counted item by item.
    **dict.fromkeys(("map", "reject", "rejectattr", "select", "selectattr"), _unbounded),
    **dict.fromkeys(("batch", "slice"), _parts),
    "attr": _timed,
    "center": _width,
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "unique"), _copies),
    **dict.fromkeys(("e", "escape", "forceescape"), _escaped),
    **dict.fromkeys(("float", "int"), _number),
    **dict.fromkeys(("list", "title"), _characters),
    "format": _percent_filter,
    "indent": _indent,
    "join": _unbounded,  # It is the environment's own.
    "replace": _replace,
    "round": _round,
    "sum": _sum,
    "tojson": _tojson,
    "trim": _trim,
}


def check_filter(budget: Budget, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse the filter `name` of `value` if it would be too much.

    Raises:
        SecurityError: with the bound.
    """
    budget.weigh_arguments(args, kwargs)
    if name in ITERATING_FILTERS:
        _check_iterated(budget, name, value)
    if name in ATTRIBUTE_FILTERS:
        position = ATTRIBUTE_FILTERS[name]
        attribute = kwargs.get("attribute") if position is None else _given(args, kwargs, position, "attribute")
        if attribute is not None:
            _check_attribute(budget, name, value, attribute)
    FILTERS[name](budget, value, args, kwargs)


def _check_iterated(budget: Budget, name: str, value: Any) -> None:
    if isinstance(value, LoopContext):
        raise SecurityError(f"'{name}' is given a loop, expected a list")
    if isinstance(value, str) and len(value) > MAX_CHARACTERS:
        raise SecurityError(f"'{name}' takes apart {len(value)} characters, at most {MAX_CHARACTERS} are allowed")
    budget.steps(_num_items(value))


def _num_items(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 0


def _check_attribute(budget: Budget, name: str, value: Any, attribute: Any) -> None:
    if not isinstance(attribute, str | int):
        raise SecurityError(f"an attribute's name is a {type(attribute).__name__}, expected a text or number")
    text = str(attribute)
    if len(text) > _MAX_ATTRIBUTE_CHARS:
        raise SecurityError(f"an attribute's name has {len(text)} characters")
    if not budget.weigh(value).is_plain:
        raise SecurityError(f"'{name}' looks for an attribute of what is neither text, number, list nor dict")
    num_read = _num_items(value) * (1 + text.count(".") + text.count(","))
    if num_read > MAX_ATTRIBUTES:
        raise SecurityError(f"'{name}' reads {num_read} attributes, at most {MAX_ATTRIBUTES} are allowed")


# Tests


def check_searched(budget: Budget, container: Any) -> None:
    """Before something is looked for in `container`: a loop would run to its end, uncounted.

    Raises:
        SecurityError: with the bound.
    """
    if isinstance(container, LoopContext):
        raise SecurityError("'in' is given a loop, expected a list")
    _timed(budget, container, (), {})


def _compared(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Dicts too are walked over."""
    budget.look_at_the_clock()


def _contained(budget: Budget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for container in (*args, *kwargs.values()):
        check_searched(budget, container)


#: Tests that read their value as text, whatever it is.
TEXT_TESTS = frozenset(("lower", "upper"))
TESTS: dict[str, Bound] = {
    **dict.fromkeys(("boolean", "callable", "defined", "escaped", "false", "float", "integer", "iterable"), _unbounded),
    **dict.fromkeys(("mapping", "none", "number", "sameas", "sequence", "string", "true", "undefined"), _unbounded),
    "in": _contained,
    **dict.fromkeys(("filter", "lower", "test", "upper"), _timed),
    **dict.fromkeys(("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge"), _compared),
    **dict.fromkeys(("<", "lt", "lessthan", "<=", "le"), _compared),
    # Of a text, '%' would be a format.
    **dict.fromkeys(("divisibleby", "even", "odd"), _numeric),
}


def check_test(budget: Budget, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse the test `name` of `value` if it would be too much.

    Raises:
        SecurityError: with the bound.
    """
    TESTS[name](budget, value, args, kwargs)
