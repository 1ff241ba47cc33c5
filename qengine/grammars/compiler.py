"""GrammarCompiler: from a source to a compiled grammar, with a memory.

    compiled = compiler.compile(source)      # any thread; may take seconds
    state = compiled.start()                 # one per sequence

Invariant: nothing is compiled in this process that was not compiled elsewhere before within the time limit, and what is
remembered, lasting refusals included, stays within `cache_bytes`. It is called neither from the event loop nor from the
engine's thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import llguidance

from qengine.errors import EngineDeadError, GrammarError, RequestError
from qengine.grammars.library import new_matcher
from qengine.grammars.sources import GrammarSource
from qengine.grammars.state import GrammarState
from qengine.grammars.trial import TooCostlyError, Trial
from qengine.grammars.vocabulary import Vocabulary

COMPILE_SECONDS = 2.0
CACHE_BYTES = 64 * 2**20
#: What a grammar takes beyond its text: measured at 90 kB fresh and 150 kB after use for a small schema.
_BASE_BYTES = 160 * 1024
_BYTES_PER_BYTE = 32
_REFUSAL_BYTES = 1024


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar that is ready to be followed by any number of sequences."""

    matcher: llguidance.LLMatcher
    eos_ids: frozenset[int]

    def start(self, *, stop_token_ids: frozenset[int] = frozenset(), min_tokens: int = 0) -> GrammarState:
        """The state of a new sequence.

        Raises:
            GrammarError: not even the first token can be found at the cost allowed.
        """
        matcher = self.matcher.deep_copy()
        return GrammarState(matcher, self.eos_ids, ending_ids=stop_token_ids, min_tokens=min_tokens)


class GrammarCompiler:
    """Compiles for one model.

    Args:
        load_vocabulary: makes the model's vocabulary; called when the first grammar comes.
        cache_bytes: memory for compiled grammars, by estimate.
        seconds: of processor time for compiling one.
    """

    def __init__(
        self,
        load_vocabulary: Callable[[], Vocabulary],
        *,
        cache_bytes: int = CACHE_BYTES,
        seconds: float = COMPILE_SECONDS,
    ) -> None:
        self._load_vocabulary = load_vocabulary
        self._seconds = seconds
        self._known = _Cache(cache_bytes)
        self._starting = threading.Lock()
        self._is_closed = False

    @property
    def num_cached(self) -> int:
        return len(self._known)

    @property
    def cached_bytes(self) -> int:
        """Memory that the compiled grammars take, by estimate."""
        return self._known.num_bytes

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        vocabulary = self._load_vocabulary()
        _ = vocabulary.for_library
        return vocabulary

    @cached_property
    def _trial(self) -> Trial:
        return Trial(self._vocabulary, self._seconds)

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """The compiled grammar.

        Raises:
            RequestError: the source is no valid grammar, or costs too much.
            TooSlowError: it was given up, as the computer is busy. EngineDeadError: the compiler is closed.
        """
        found = self._known.get(source)
        if found is None:
            with self._starting:
                if self._is_closed:
                    raise EngineDeadError("the engine has been shut down")
                trial = self._trial
            found = self._compile(trial, source)
            size = source.num_bytes + _REFUSAL_BYTES
            if isinstance(found, CompiledGrammar):
                size = _BASE_BYTES + _BYTES_PER_BYTE * source.num_bytes
            self._known.put(source, found, size)
        if isinstance(found, str):
            raise _refuse(found)
        return found

    def _compile(self, trial: Trial, source: GrammarSource) -> CompiledGrammar | str:
        """The grammar, or why it is refused."""
        try:
            compiled = CompiledGrammar(
                new_matcher(self._vocabulary.for_library, trial.run(source)), self._vocabulary.eos_ids
            )
            compiled.start()
        except TooCostlyError as error:
            raise _refuse(str(error)) from error
        except GrammarError as error:
            return str(error)
        return compiled

    @property
    def process_ids(self) -> list[int]:
        """The processes that wait for grammars."""
        with self._starting:
            return self._trial.idle_process_ids() if "_trial" in self.__dict__ else []

    def close(self) -> None:
        """End the processes behind it. Idempotent."""
        with self._starting:
            self._is_closed = True
            if "_trial" in self.__dict__:
                self._trial.close()


def _refuse(reason: str) -> RequestError:
    return RequestError(
        f"the grammar for structured output cannot be used: {reason}",
        param="structured_outputs",
        code="invalid_grammar",
    )


class _Cache:
    """The latest grammars by source, least recently used first. Thread-safe."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[GrammarSource, tuple[CompiledGrammar | str, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, source: GrammarSource) -> CompiledGrammar | str | None:
        with self._lock:
            entry = self._entries.get(source)
            if entry is None:
                return None
            self._entries.move_to_end(source)
            return entry[0]

    def put(self, source: GrammarSource, found: CompiledGrammar | str, num_bytes: int) -> None:
        with self._lock:
            _, old_bytes = self._entries.pop(source, (None, 0))
            self._entries[source] = (found, num_bytes)
            self.num_bytes += num_bytes - old_bytes
            while self.num_bytes > self._capacity_bytes and self._entries:
                _, (_, freed_bytes) = self._entries.popitem(last=False)
                self.num_bytes -= freed_bytes
