"""Compiling: what is refused and how, what hostile grammars cost, and what is remembered."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any

import pytest

from qengine.errors import EngineDeadError, RequestError
from qengine.grammars import trial
from qengine.grammars.compiler import GrammarCompiler
from qengine.grammars.sources import GrammarSource, source_of
from qengine.grammars.trial import TooSlowError
from qengine.grammars.vocabulary import Vocabulary
from qengine.request import StructuredOutputs
from tests.waiting import wait_until

WORD = GrammarSource("regex", "[a-z]{3}")


def schema(value: Any) -> GrammarSource:
    return source_of(StructuredOutputs(json=value))


MALFORMED = {
    "regex, open group": GrammarSource("regex", "((("),
    "regex, look-around": GrammarSource("regex", "(?=a)b"),
    "regex, back reference": GrammarSource("regex", r"(a)\1"),
    "regex, groups without end": GrammarSource("regex", "(" * 1500 + "a" + ")" * 1500),
    "lark, unknown rule": GrammarSource("lark", "start: nobody"),
    "lark, deep": GrammarSource("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000),
    "lark, file": GrammarSource("lark", "%import .secrets.KEY\nstart: KEY"),
    "gbnf": GrammarSource("context_free", "root ::= ((("),
    "schema, unknown type": schema({"type": "strnig"}),
    "schema, bad pattern": schema({"type": "string", "pattern": "((("}),
    "schema, keyword that is not enforced": schema({"type": "array", "uniqueItems": True}),
    "schema, not enforced and asked to be lenient": schema({"not": {}, "x-guidance": {"lenient": True}}),
    "schema, elsewhere": schema({"$ref": "http://127.0.0.1:9/schema.json"}),
    "schema, no such reference": schema({"$ref": "#/$defs/nobody"}),
    "schema, only itself": schema({"$ref": "#"}),
    "schema, impossible": schema({"type": "integer", "minimum": 5, "maximum": 4}),
    "schema, product of alternatives": schema(
        {"allOf": [{"anyOf": [{"properties": {f"{c}{i}": {"type": "string"}}} for c in "ab"]} for i in range(20)]}
    ),
}


@pytest.mark.parametrize("source", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_grammar_is_refused_and_the_next_one_is_not(
    compiler: GrammarCompiler, source: GrammarSource
) -> None:
    for _ in range(2):  # The second answer comes from memory.
        with pytest.raises(RequestError) as caught:
            compiler.compile(source)
        assert caught.value.param == "structured_outputs"
        assert caught.value.code == "invalid_grammar"
        assert len(str(caught.value)) < 600
    assert compiler.compile(WORD).start().allowed


HOSTILE = {
    "nested counts": GrammarSource("regex", "((a{1,99}){1,99}){1,99}"),
    "many stars": GrammarSource("regex", "(?:.*x){200}"),
    "exponential automaton": GrammarSource("regex", "(a|b)*a(a|b){200}"),
    "long": GrammarSource("regex", ".{4000}"),
    "ambiguous": GrammarSource("lark", 'start: s\ns: s s | "a" |'),
    "doubling rules": GrammarSource(
        "lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}? r{i + 1}?" for i in range(40)) + '\nr40: "a"'
    ),
    "complement": GrammarSource("lark", "start: X\nX: ~/(.*a.{30}.*)/"),
    "many properties": schema({"properties": {f"p{i}": {"type": "string"} for i in range(1500)}}),
    "large enum": schema({"enum": [f"item{i:05}" for i in range(4000)]}),
    "endless array": schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    "endless string": schema({"type": "string", "minLength": 10**9}),
    "huge multiple": schema({"type": "integer", "multipleOf": 999999937}),
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_grammar_works_or_is_refused_within_bounds(compiler: GrammarCompiler, source: GrammarSource) -> None:
    """The library's own limits, counted in operations, hold: nothing hangs (the suite would), nothing crashes."""
    try:
        compiled = compiler.compile(source)
    except RequestError:
        return
    assert compiled.start().allowed


def compiles(compiler: GrammarCompiler, source: GrammarSource) -> bool:
    try:
        compiler.compile(source)
    except (RequestError, TooSlowError):
        return False
    return True


def test_a_compile_that_hangs_is_killed_and_the_next_one_works(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "CLOCK_FACTOR", 1.0)
    compiler = GrammarCompiler(lambda: vocabulary, seconds=1.0)
    assert any(compiles(compiler, WORD) for _ in range(60))
    for process_id in compiler.process_ids:
        os.kill(process_id, signal.SIGSTOP)
    with pytest.raises(TooSlowError, match="not compiled within 1 s"):
        compiler.compile(GrammarSource("regex", "[0-9]"))
    # A busy machine may need several attempts of a second.
    assert any(compiles(compiler, GrammarSource("regex", "[0-9]")) for _ in range(60))
    compiler.close()


def test_a_grammar_is_judged_by_its_processor_time(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "CLOCK_FACTOR", 3000.0)
    compiler = GrammarCompiler(lambda: vocabulary, seconds=0.02)
    with pytest.raises(RequestError, match=r"it takes longer than 0\.02 s to compile"):
        compiler.compile(HOSTILE["many properties"])
    assert any(compiles(compiler, WORD) for _ in range(60))
    [process] = compiler.process_ids
    os.kill(process, signal.SIGSTOP)
    threading.Timer(0.1, os.kill, (process, signal.SIGCONT)).start()
    begin = time.monotonic()
    compiler.compile(GrammarSource("regex", "a"))
    assert time.monotonic() - begin > 0.02, "it was not let to compute for longer than it may compute"
    compiler.close()


def test_a_compile_that_crashes_takes_nobody_along(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(lambda: vocabulary, seconds=60)
    compiler.compile(WORD)
    fresh, send = GrammarSource("regex", "[0-9]"), trial.send

    def kill_and_send(stream: IO[bytes], message: Any) -> None:
        for process_id in process_ids:
            os.kill(process_id, signal.SIGKILL)
        send(stream, message)

    with monkeypatch.context() as patched:
        process_ids = compiler.process_ids
        patched.setattr(trial, "send", kill_and_send)
        with pytest.raises(RequestError, match="too much memory"):
            compiler.compile(fresh)
    # It is no lasting property of the source.
    assert compiler.compile(fresh)
    compiler.close()


def test_a_process_that_dies_between_two_grammars_is_the_fault_of_neither(vocabulary: Vocabulary) -> None:
    compiler = GrammarCompiler(lambda: vocabulary, seconds=60)
    compiler.compile(WORD)
    [before] = compiler.process_ids
    os.kill(before, signal.SIGKILL)
    os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)
    assert compiler.compile(GrammarSource("regex", "[0-9]"))
    assert compiler.process_ids != [before]
    compiler.close()


@contextmanager
def one_in_use(compiler: GrammarCompiler) -> Iterator[int]:
    """The only process, stopped while it tries a grammar, until the block is left."""
    [stopped] = compiler.process_ids
    os.kill(stopped, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(compiler.compile, GrammarSource("regex", "a"))
        wait_until(lambda: not compiler.process_ids)
        yield stopped
        os.kill(stopped, signal.SIGCONT)
        first.result()


def compile_two_at_once(compiler: GrammarCompiler) -> None:
    """While one grammar is tried in a process that is stopped, the next one gets a process of its own."""
    with one_in_use(compiler):
        compiler.compile(GrammarSource("regex", "b"))


def test_a_process_in_use_ends_when_it_has_answered(vocabulary: Vocabulary) -> None:
    compiler = GrammarCompiler(lambda: vocabulary, seconds=60)
    compiler.compile(WORD)
    with one_in_use(compiler) as stopped:
        compiler.close()
    assert compiler.process_ids == []
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)


def test_processes_end_with_the_compiler(vocabulary: Vocabulary) -> None:
    compiler = GrammarCompiler(lambda: vocabulary, seconds=60)
    compiler.compile(WORD)
    compile_two_at_once(compiler)
    process_ids = compiler.process_ids
    assert len(process_ids) == 2
    compiler.close()
    compiler.close()
    for process_id in process_ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
    with pytest.raises(EngineDeadError, match="has been shut down"):
        compiler.compile(GrammarSource("regex", "[0-9]"))


def test_a_compiler_that_nobody_uses_starts_nothing(vocabulary: Vocabulary) -> None:
    compiler = GrammarCompiler(lambda: vocabulary)
    compiler.close()
    with pytest.raises(EngineDeadError):
        compiler.compile(WORD)
    assert not compiler.process_ids


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_unique_schemas_stay_within_the_cache(vocabulary: Vocabulary) -> None:
    capacity = 16 * 2**20
    compiler = GrammarCompiler(lambda: vocabulary, cache_bytes=capacity, seconds=60)
    compiler.compile(WORD)
    before = resident_bytes()
    for number in range(500):
        compiler.compile(schema({"type": "object", "properties": {f"field_{number}": {"type": "string"}}}))
        assert compiler.cached_bytes <= capacity
    assert 10 < compiler.num_cached < 200
    # Without a bound 500 of them would take some 45 MB.
    assert resident_bytes() - before < capacity + 16 * 2**20
    compiler.close()


def test_the_cache_keeps_what_is_used(vocabulary: Vocabulary) -> None:
    compiler = GrammarCompiler(lambda: vocabulary, cache_bytes=600_000, seconds=60)
    kept = compiler.compile(WORD)
    for number in range(10):
        compiler.compile(GrammarSource("regex", f"[a-z]{{{number + 1}}}x"))
        assert compiler.compile(WORD) is kept
    assert compiler.num_cached < 5
    compiler.close()


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({"json": json.dumps({"enum": ["x" * 65536]})}, "bytes"),
        ({"json": {"enum": ["x" * 65536]}}, "bytes"),
        ({"json": "{"}, "not JSON"),
        ({"json": "[1]"}, "expected an object"),
        ({"json": '{"a": ' * 2000 + "1" + "}" * 2000}, "JSON"),
        ({"regex": "x" * 4097}, "4096"),
        ({"regex": ""}, "empty"),
        ({"regex": "\ud800"}, "Unicode"),
        ({"grammar": "x" * 65537}, "bytes"),
        ({"choice": []}, "list of 1 to"),
        ({"choice": ["x"] * 1025}, "list of 1 to"),
        ({"choice": [""]}, "empty"),
        ({"choice": [5]}, "expected text"),
        ({"choice": "abc"}, "list of"),
    ],
)
def test_what_is_too_large_or_no_text_is_refused_unread(wanted: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        source_of(StructuredOutputs(**wanted))


def test_depth_is_bounded() -> None:
    def nested(depth: int) -> dict[str, Any]:
        inner: dict[str, Any] = {}
        for _ in range(depth - 1):
            inner = {"items": inner}
        return inner

    assert source_of(StructuredOutputs(json=nested(32)))
    with pytest.raises(RequestError, match="32 levels"):
        source_of(StructuredOutputs(json=nested(33)))


@pytest.mark.parametrize(
    "wanted", [{}, {"json": {}, "regex": "a"}, {"json_object": False}, {"choice": ["a"], "regex": "a"}]
)
def test_exactly_one_form(wanted: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="exactly one"):
        StructuredOutputs(**wanted)
