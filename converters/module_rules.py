"""What a quantization config says of single modules: rules by name, part of a name or regular expression, in order.

A pattern comes from a stranger, and Python's matcher tries every way in which it could fit: a few repetitions in a row
take milliseconds, and thousands of such patterns are asked for every linear of a model. So the ways of each pattern
are counted beforehand, and the sum over all patterns and modules is bounded: what is too much is refused, on any
machine alike. Invariant: a match that is begun is cheap. Patterns are a subset of Python's, without flags and with
plain ASCII, for names of modules have nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import comb

from converters.errors import CheckpointError
from converters.files import shown

MAX_RULES = 4096
MAX_PATTERN_CHARS = 256
#: Of all patterns of a config; compiling 1,000 takes some 10 ms.
MAX_ALL_PATTERN_CHARS = 2**17
#: Ways of all matches of a model together, at some 30 ns each.
MAX_WAYS = 2**26
#: What calling the matcher takes, in ways.
_WAYS_OF_A_CALL = 20
#: A layer's number, the only digits of a name, is below 4096.
_WAYS_OF_DIGITS = 5
_USUAL_NAME_CHARS = 32
_GROUP = re.compile(r"\((?:\?(?::|=|!|<=|<!|P<\w+>)|(?!\?))")
_CLASS = re.compile(r"\[\^?\]?(?:[^\]\\]|\\[dDwWsS]|\\[^A-Za-z0-9])*\]")
_ESCAPE = re.compile(r"\\[dDwWsSbBAZ0-9]|\\[^A-Za-z0-9]")
_REPETITION = re.compile(r"(?:[*+]|\{\d*(?:,\d*)?\})[?+]?")
_DIGITS = (r"\d", "[0-9]")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression of a config, and in how many ways it can be tried on a name.

    Attributes:
        regex: to match from the start of a name.
        repetitions: how many parts of it take as much of the name as they like.
        choices: the product of the other ways: alternatives and options.
    """

    regex: re.Pattern[str]
    repetitions: int
    choices: int

    @classmethod
    def compile(cls, text: str, where: str) -> Pattern:
        """A pattern of a file.

        Raises:
            CheckpointError: beginning with `where`, if it is none, or too costly to match.
        """
        if len(text) > MAX_PATTERN_CHARS or not text.isascii():
            raise CheckpointError(
                f"{where}: the pattern '{shown(text)}' has {len(text)} characters, expected at most "
                f"{MAX_PATTERN_CHARS}, of ASCII"
            )
        counter = _Counter(text, where)
        try:
            choices = counter.alternatives()
            pattern = cls(re.compile(text), counter.repetitions, choices)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{where}: '{shown(text)}' is no regular expression: {shown(error)}") from error
        if pattern.ways(_USUAL_NAME_CHARS) > MAX_WAYS:
            raise counter.too_costly()
        return pattern

    def matches(self, name: str) -> bool:
        """Whether it matches from the start of the name."""
        return self.regex.match(name) is not None

    def ways(self, num_chars: int) -> int:
        """At most so many ways are tried on a name of that length: to cut it between the repetitions, and to choose."""
        return _WAYS_OF_A_CALL + comb(num_chars + self.repetitions, self.repetitions) * self.choices


@dataclass(frozen=True, slots=True)
class Part:
    """A text that stands anywhere in a name."""

    text: str

    def matches(self, name: str) -> bool:
        """Whether the name has it."""
        return self.text in name

    def ways(self, num_chars: int) -> int:
        """What looking costs, as for a pattern."""
        return _WAYS_OF_A_CALL


class _Counter:
    """Walks over the text of an expression once and counts. What it does not know, it refuses."""

    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self.where = where
        self.at = 0
        self.repetitions = 0

    def too_costly(self) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: the pattern '{shown(self.text)}' is too costly to match; use fewer repetitions and "
            "alternatives, and no repetition of a group"
        )

    def alternatives(self) -> int:
        """The ways of everything up to a closing bracket: of one alternative or another."""
        total, ways = 0, 1
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] == "|":
                self.at += 1
                total, ways = total + ways, 1
            else:
                ways *= self._item()
        return total + ways

    def _item(self) -> int:
        """The ways of a group, a class or a character, with the repetition or question mark behind it."""
        begin, ways = self.at, 1
        is_group = self.text[begin] == "("
        if is_group:
            self._take(_GROUP)
            ways = self.alternatives()
            self.at += 1
        elif self.text[begin] in "[\\":
            self._take(_CLASS if self.text[begin] == "[" else _ESCAPE)
        else:
            self.at += 1
        item = self.text[begin : self.at]
        if self.text.startswith("?", self.at):
            self.at += 2 if self.text.startswith(("??", "?+"), self.at) else 1
            return ways + 1
        if not self.text.startswith(("*", "+", "{"), self.at):
            return ways
        self._take(_REPETITION)
        if is_group:
            raise self.too_costly()
        if item in _DIGITS:
            return _WAYS_OF_DIGITS
        self.repetitions += 1
        return ways

    def _take(self, expected: re.Pattern[str]) -> None:
        found = expected.match(self.text, self.at)
        if found is None:
            raise CheckpointError(
                f"{self.where}: the pattern '{shown(self.text)}' is not read, from character {self.at + 1} on; use "
                "groups without flags, closed classes, and escapes of punctuation and of \\d, \\w, \\s, \\b"
            )
        self.at = found.end()


@dataclass(frozen=True, slots=True)
class DynamicRule:
    """Overrides for the module of that name, or for those that match; None leaves a value as it is."""

    module: str | Pattern | Part
    skip: bool = False
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None


@dataclass(slots=True)
class ModuleRules:
    """The rules of a config, of which the first that matches counts. Remembers what was found, and what it has cost."""

    rules: Sequence[DynamicRule] = ()
    where: str = ""
    _places: dict[str, int] = field(init=False)
    _patterns: list[tuple[int, Pattern | Part]] = field(init=False)
    _found: dict[str, DynamicRule | None] = field(init=False, default_factory=dict)
    _ways: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        modules = [rule.module for rule in self.rules]
        # Backwards, so that the first of equal names stays.
        self._places = {name: place for place, name in reversed([*enumerate(modules)]) if isinstance(name, str)}
        self._patterns = [(place, module) for place, module in enumerate(modules) if not isinstance(module, str)]

    def first(self, name: str) -> DynamicRule | None:
        """The rule for a module.

        Raises:
            CheckpointError: if all that has been asked took too long.
        """
        if name not in self._found:
            self._found[name] = self._search(name)
        return self._found[name]

    def _search(self, name: str) -> DynamicRule | None:
        exact = self._places.get(name, len(self.rules))
        for place, pattern in self._patterns:
            if place > exact:
                break
            self._ways += pattern.ways(len(name))
            if self._ways > MAX_WAYS:
                raise CheckpointError(
                    f"{self.where}: its {len(self._patterns)} patterns are too costly for so many modules, as of "
                    f"{shown(name)}; use fewer patterns, with fewer repetitions, or names of modules"
                )
            if pattern.matches(name):
                return self.rules[place]
        return self.rules[exact] if exact < len(self.rules) else None


def require_short(patterns: Iterable[str], where: str) -> None:
    """Refuse more regular expressions than can be compiled at once.

    Raises:
        CheckpointError: beginning with `where`.
    """
    total = sum(map(len, patterns))
    if total > MAX_ALL_PATTERN_CHARS:
        raise CheckpointError(f"{where}: patterns of {total} characters, at most {MAX_ALL_PATTERN_CHARS} are read")
