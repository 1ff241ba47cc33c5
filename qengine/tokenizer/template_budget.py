"""What one rendering of a chat template may use, and how much the values in it are.

A value's weight is its size as if it were written out: a list that holds one text a thousand times has a thousand times
that text. Containers do not change inside the sandbox, so each is weighed once.
Invariant: a container that was made has at most MAX_WEIGHT and MAX_DEPTH, so whatever the interpreter does with it in
one go (compare, hash, write out) ends soon. It does not know what operations make; see `template_bounds`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from itertools import chain
from types import BuiltinMethodType, FunctionType, MethodType, NoneType
from typing import Any, NamedTuple

from jinja2.exceptions import SecurityError
from jinja2.runtime import BlockReference, LoopContext, Macro, TemplateReference, Undefined
from jinja2.utils import Cycler, Joiner, Namespace

#: Longest text that one operation may make, in characters.
MAX_TEXT = 2**23
#: Bytes of all that a rendering makes.
MAX_MADE = 2**28
MAX_STEPS = 5_000_000
#: Of this thread's processor time: a busy machine refuses no template.
MAX_SECONDS = 5.0
#: Most of a container: its characters, and VALUE_WEIGHT for each value.
MAX_WEIGHT = 2**24
MAX_DEPTH = 200
VALUE_WEIGHT = 32
#: Nothing that a template counts is longer than 64 bits; products of two such are fast.
MAX_INT_BITS = 2**12
#: Most bytes of one more text beside its characters, with its place in a list.
PIECE_BYTES = 96
#: Of a container beside its items, with what is remembered of it.
_CONTAINER_BYTES = 384
_STEPS_PER_LOOK_AT_THE_CLOCK = 16
#: Values with contents that their own weight does not show, and functions. Their text is short.
_OPAQUE = (
    *(Namespace, LoopContext, Macro, Cycler, Joiner, BlockReference, TemplateReference),
    *(BuiltinMethodType, MethodType, FunctionType),
)
_PLAIN = (float, complex, NoneType, range, Undefined)
_OPAQUE_CHARS = 128
_LAZY = (Iterator, KeysView, ValuesView, ItemsView)


class Weight(NamedTuple):
    """How much a value is, written out.

    Attributes:
        chars: characters of all texts and digits of all integers in it.
        num_values: of them, containers included.
        depth: containers in each other.
        is_plain: nothing in it has contents that are not counted, as a namespace has.
    """

    chars: int
    num_values: int
    depth: int
    is_plain: bool

    @property
    def size(self) -> int:
        """In units of MAX_WEIGHT."""
        return self.chars + VALUE_WEIGHT * self.num_values


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._made = MAX_MADE
        self._end = time.thread_time() + MAX_SECONDS
        #: id -> (the container, kept so that the id stays its own, and its weight).
        self._weights: dict[int, tuple[Any, Weight]] = {}

    def step(self) -> None:
        """Count one iteration, call or operation.

        Raises:
            SecurityError: if there were too many, or they took too long.
        """
        self._steps -= 1
        if self._steps % _STEPS_PER_LOOK_AT_THE_CLOCK == 0:
            if self._steps < 0:
                raise SecurityError(f"it takes more than {MAX_STEPS} steps")
            self.look_at_the_clock()

    def steps(self, count: int) -> None:
        """Count so many steps at once, of an operation that walks over so much.

        Raises:
            SecurityError: as `step`.
        """
        self._steps -= count
        if self._steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        self.look_at_the_clock()

    def look_at_the_clock(self) -> None:
        """Raises SecurityError if the rendering took too long."""
        if time.thread_time() > self._end:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")

    def allow(self, num_bytes: int) -> None:
        """Refuse an operation that may make more than is left.

        Raises:
            SecurityError: with the bound.
        """
        self.look_at_the_clock()
        if num_bytes > self._made:
            raise SecurityError(f"it makes more than {MAX_MADE} bytes on its way")

    def allow_text(self, num_chars: int) -> None:
        """The same for a text of that many characters.

        Raises:
            SecurityError: with its length.
        """
        if num_chars > MAX_TEXT:
            raise SecurityError(f"it makes a text of {num_chars} characters, at most {MAX_TEXT} are allowed")
        self.allow(4 * num_chars)

    def charge(self, num_bytes: int) -> None:
        """Count what was made.

        Raises:
            SecurityError: if all together is too much, or if it would give bytes back.
        """
        if num_bytes < 0:
            raise SecurityError(f"it says that it makes {num_bytes} bytes, expected 0 or more")
        self._made -= num_bytes
        if self._made < 0:
            raise SecurityError(f"it makes more than {MAX_MADE} bytes on its way")

    def made(self, value: Any, item_bytes: int = 8) -> Any:
        """Count what an operation has made, and hand it on; what is lazy becomes a list.

        Args:
            item_bytes: what each item of a container costs.

        Raises:
            SecurityError: if it is too large, of a kind that no template needs, or all together is too much.
        """
        self.step()
        if isinstance(value, str):
            if len(value) > MAX_TEXT:
                raise SecurityError(f"it makes a text of {len(value)} characters, at most {MAX_TEXT} are allowed")
            self.charge(sys.getsizeof(value))
            return value
        if isinstance(value, _LAZY) and not isinstance(value, _OPAQUE):
            value = self._listed(value)
        if isinstance(value, list | tuple | dict):
            self.charge(item_bytes * len(value))
        elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise SecurityError(f"it makes a number of {value.bit_length()} bits, at most {MAX_INT_BITS} are allowed")
        self.weigh(value)
        return value

    def _listed(self, lazy: Iterable[Any]) -> list[Any]:
        items = []
        for item in lazy:
            self.step()
            self.charge(PIECE_BYTES)
            items.append(item)
        return items

    def weigh(self, value: Any) -> Weight:
        """The weight of a value.

        Raises:
            SecurityError: if it is a container above the bounds, or of a kind that no template needs, such as bytes.
        """
        if isinstance(value, str):
            return Weight(len(value), 1, 0, True)
        if isinstance(value, list | tuple | dict):
            known = self._weights.get(id(value))
            if known is None:
                values = chain(value, value.values()) if isinstance(value, dict) else value
                return self._remember(value, self.weigh_all(values))
            return known[1]
        if isinstance(value, int):
            return Weight(1 + value.bit_length(), 1, 0, True)
        if isinstance(value, _PLAIN):
            return Weight(0, 1, 0, True)
        if isinstance(value, _OPAQUE):
            name = (isinstance(value, Macro) and value.name) or ""
            return Weight(_OPAQUE_CHARS + len(name), 1, 0, False)
        raise SecurityError(f"a template has no use for a value of the type {type(value).__name__}")

    def weigh_all(self, values: Iterable[Any]) -> Weight:
        """The weight of a container of these.

        Raises:
            SecurityError: if it is above the bounds.
        """
        chars, num_values, depth, is_plain = 0, 1, 0, True
        for value in values:
            # The commonest kinds first, without a call.
            kind = type(value)
            if kind is str or kind is int:
                chars += len(value) if kind is str else 1 + value.bit_length()
                num_values += 1
                continue
            known = self._weights.get(id(value))
            weight = self.weigh(value) if known is None else known[1]
            chars += weight.chars
            num_values += weight.num_values
            depth = max(depth, weight.depth)
            is_plain &= weight.is_plain
            if chars + VALUE_WEIGHT * num_values > MAX_WEIGHT:
                break
        return _within_bounds(Weight(chars, num_values, depth + 1, is_plain))

    def added(self, left: Any, right: Any, value: Any) -> Any:
        """`made` for a list or tuple `value` = left + right, whose weight follows from theirs.

        Raises:
            SecurityError: as `made`.
        """
        ours, theirs = self.weigh(left), self.weigh(right)
        num_values, depth = ours.num_values + theirs.num_values - 1, max(ours.depth, theirs.depth)
        weight = Weight(ours.chars + theirs.chars, num_values, depth, ours.is_plain and theirs.is_plain)
        self._remember(value, _within_bounds(weight))
        return self.made(value)

    def _remember(self, container: Any, weight: Weight) -> Weight:
        self.charge(_CONTAINER_BYTES)
        self._weights[id(container)] = (container, weight)
        return weight

    def weigh_arguments(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Weight:
        """The weight of a call's arguments, which is not remembered."""
        return self.weigh_all((*args, *kwargs.values()))

    def text(self, value: Any) -> str:
        """The value's text, as `str` makes it.

        Raises:
            SecurityError: if it is too long.
        """
        if isinstance(value, str):
            return value
        self.allow_text(self.text_chars(value))
        text = str(value)
        self.charge(sys.getsizeof(text))
        return text

    def text_chars(self, value: Any) -> int:
        """Most characters of the value's text. Inside of a container each character may be written with ten."""
        if isinstance(value, str):
            return len(value)
        weight = self.weigh(value)
        return 10 * weight.chars + VALUE_WEIGHT * weight.num_values


def _within_bounds(weight: Weight) -> Weight:
    if weight.size > MAX_WEIGHT:
        raise SecurityError(f"it makes a list or dict of more than {MAX_WEIGHT} characters")
    if weight.depth > MAX_DEPTH:
        raise SecurityError(f"it makes lists or dicts in each other, {weight.depth} deep")
    return weight
