"""What structured output costs, and whether it holds: `python -m benchmarks.grammar`.

Three questions, one JSON: do answers of twenty schemas parse and validate; how much longer does a token take with a
grammar than without; and how do the two grammar libraries compare in compiling and per token, on those very answers.
xgrammar is compared where it is installed. Wall clock and CPU time are both told, as other processes disturb the first.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema
import torch

from benchmarks.common import REPOSITORY, BenchmarkError, InputError, check_writable, write_text
from benchmarks.machine import environment_record, publishable
from qengine import LLM, SamplingParams, StructuredOutputs
from qengine.errors import ConfigError
from qengine.grammars.library import library_text, new_matcher
from qengine.grammars.sources import source_of
from qengine.grammars.vocabulary import Vocabulary
from qengine.imports import import_late
from qengine.request import RequestOutput
from tests.grammars.schemas import SCHEMAS

DEFAULT_JSON = REPOSITORY / "benchmarks" / "results" / "grammar.json"
#: A form that never ends, so that an answer of any length follows it.
ENDLESS = {
    "type": "array",
    "minItems": 100_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer"},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "age", "ok"],
        "additionalProperties": False,
    },
}


@dataclass(frozen=True, slots=True)
class Validity:
    """Answers that were asked for, that came to an end, and that parse and validate."""

    num_answers: int
    num_complete: int
    num_valid: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds per step with and without a grammar in every sequence; medians of rounds taken in turns."""

    num_sequences: int
    free_wall_ms: float
    grammar_wall_ms: float
    free_cpu_ms: float
    grammar_cpu_ms: float

    @property
    def overhead(self) -> tuple[float, float]:
        """What the grammar adds, as a fraction: of wall clock, of CPU time."""
        return self.grammar_wall_ms / self.free_wall_ms - 1, self.grammar_cpu_ms / self.free_cpu_ms - 1


@dataclass(frozen=True, slots=True)
class Library:
    """One library over the schemas: medians and worst cases of compiling (ms) and of a mask with its token (us)."""

    name: str
    vocabulary_ms: float
    compile_ms: float
    worst_compile_ms: float
    token_us: float
    worst_token_us: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 if an answer does not validate, or 2 for wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        check_writable(options.json)
        with LLM(options.model, max_model_len=1024, max_num_seqs=options.width) as llm:
            validity, answers = measure_validity(llm, options.samples)
            costs = [measure_cost(llm, width, options.tokens, options.rounds) for width in (1, options.width)]
            libraries = compare_libraries(llm, answers)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(validity, costs, libraries), end="")
    command = shlex.join(["python", "-m", "benchmarks.grammar", *publishable(arguments)])
    record = {
        "benchmark": "grammar",
        "environment": environment_record(command),
        "threads": options.threads,
        "validity": asdict(validity),
        "cost": [{**asdict(cost), "overhead_wall_cpu": cost.overhead} for cost in costs],
        "libraries": [asdict(library) for library in libraries],
    }
    write_text(options.json, json.dumps(record, indent=1) + "\n")
    return 0 if validity.num_valid == validity.num_answers else 1


def measure_validity(llm: LLM, num_samples: int) -> tuple[Validity, dict[str, list[list[int]]]]:
    """Ask for `num_samples` answers of each schema; also returns the tokens of the complete ones by schema."""
    answers: dict[str, list[list[int]]] = {}
    num_valid = num_answers = num_tokens = 0
    for name, schema in SCHEMAS.items():
        check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        output = _ask(llm, 1, max_tokens=400, n=num_samples, temperature=1.0, seed=7, schema=schema)[0]
        num_answers += len(output.outputs)
        num_tokens += sum(len(choice.token_ids) for choice in output.outputs)
        complete = [choice for choice in output.outputs if choice.finish_reason == "stop"]
        answers[name] = [choice.token_ids[:-1] for choice in complete]
        num_valid += sum(_is_valid(choice.text, check) for choice in complete)
    return Validity(num_answers, sum(map(len, answers.values())), num_valid, num_tokens), answers


def _is_valid(text: str, check: Any) -> bool:
    try:
        return bool(check.is_valid(json.loads(text)))
    except ValueError:
        return False


def _ask(llm: LLM, width: int, *, schema: dict[str, Any] | None, **params: Any) -> list[RequestOutput]:
    form = None if schema is None else StructuredOutputs(json=schema)
    messages = [{"role": "user", "content": "Give me an example, as JSON."}]
    return llm.chat([messages] * width, SamplingParams(structured_outputs=form, **params), use_tqdm=False)


def measure_cost(llm: LLM, width: int, num_tokens: int, num_rounds: int) -> Cost:
    """Time answers of `num_tokens` tokens with a grammar and without, in turns; the first turn warms up."""
    seconds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(num_rounds + 1):
        for has_grammar in (False, True):
            wall, cpu = time.perf_counter(), time.process_time()
            schema = ENDLESS if has_grammar else None
            outputs = _ask(llm, width, schema=schema, max_tokens=num_tokens, temperature=1.0, seed=3, ignore_eos=True)
            seconds[has_grammar].append((time.perf_counter() - wall, time.process_time() - cpu))
            assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
    free, held = (
        [1e3 * statistics.median(column) / num_tokens for column in zip(*taken[1:], strict=True)]
        for taken in (seconds[False], seconds[True])
    )
    return Cost(width, free[0], held[0], free[1], held[1])


# The libraries alone

#: Compile a schema; then a function that takes a token: works out the mask before it and moves on.
Compile = Callable[[dict[str, Any]], Callable[[int], None]]


def compare_libraries(llm: LLM, answers: dict[str, list[list[int]]]) -> list[Library]:
    """Compile every schema and follow its answers, with each library that is installed."""
    engine = llm.engine
    vocabulary = Vocabulary.of(engine.tokenizer, engine.info.vocab_size, engine.tokenizer.eos_token_ids)
    found = [_measure_library("llguidance", lambda: _llguidance(vocabulary), answers)]
    try:
        xgrammar = import_late("xgrammar")
    except ConfigError:
        return found
    return [*found, _measure_library("xgrammar", lambda: _xgrammar(xgrammar, vocabulary), answers)]


def _llguidance(vocabulary: Vocabulary) -> Compile:
    tokenizer = vocabulary.for_library

    def compile_schema(schema: dict[str, Any]) -> Callable[[int], None]:
        matcher = new_matcher(tokenizer, library_text(source_of(StructuredOutputs(json=schema))))

        def take(token_id: int) -> None:
            matcher.compute_bitmask()
            assert matcher.consume_token(token_id)

        return take

    return compile_schema


def _xgrammar(xgrammar: Any, vocabulary: Vocabulary) -> Compile:
    vocab_size = len(vocabulary.tokens)
    info = xgrammar.TokenizerInfo(
        list(vocabulary.tokens),
        xgrammar.VocabType.RAW,
        vocab_size=vocab_size,
        stop_token_ids=sorted(vocabulary.eos_ids),
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    mask = xgrammar.allocate_token_bitmask(1, vocab_size)

    def compile_schema(schema: dict[str, Any]) -> Callable[[int], None]:
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))

        def take(token_id: int) -> None:
            matcher.fill_next_token_bitmask(mask)
            matcher.accept_token(token_id)

        return take

    return compile_schema


def _measure_library(name: str, make: Callable[[], Compile], answers: dict[str, list[list[int]]]) -> Library:
    begin = time.perf_counter()
    compile_schema = make()
    vocabulary_ms = 1e3 * (time.perf_counter() - begin)
    compile_ms, token_us = [], []
    for schema_name, lists in answers.items():
        for token_ids in lists:
            begin = time.perf_counter()
            take = compile_schema(SCHEMAS[schema_name])
            compile_ms.append(1e3 * (time.perf_counter() - begin))
            for token_id in token_ids:
                begin = time.perf_counter()
                take(token_id)
                token_us.append(1e6 * (time.perf_counter() - begin))
    return Library(
        name,
        vocabulary_ms,
        statistics.median(compile_ms),
        max(compile_ms),
        statistics.median(token_us),
        max(token_us),
    )


def table(validity: Validity, costs: Sequence[Cost], libraries: Sequence[Library]) -> str:
    """The results for people."""
    lines = [
        f"{validity.num_valid} of {validity.num_answers} answers parse and validate "
        f"({validity.num_complete} came to an end; {validity.num_tokens} tokens)",
        "",
        "sequences  free ms/step  grammar ms/step  wall   CPU",
    ]
    for cost in costs:
        wall, cpu = cost.overhead
        lines.append(
            f"{cost.num_sequences:9}  {cost.free_wall_ms:12.2f}  {cost.grammar_wall_ms:15.2f}  {wall:+.1%}  {cpu:+.1%}"
        )
    lines += ["", "library     vocabulary ms  compile ms (worst)  token us (worst)"]
    for library in libraries:
        compiling = f"{library.compile_ms:8.2f} ({library.worst_compile_ms:7.1f})"
        token = f"{library.token_us:7.1f} ({library.worst_token_us:6.0f})"
        lines.append(f"{library.name:10}  {library.vocabulary_ms:13.0f}  {compiling}  {token}")
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grammar", description=__doc__)
    parser.add_argument("--model", help="a folder, a .gguf file or a hub id; the bundled model if left out")
    parser.add_argument("--samples", type=int, default=10, help="answers of each schema")
    parser.add_argument("--width", type=int, default=16, help="sequences at once, beside one alone")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a timed answer")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, help="where to write the figures")
    options = parser.parse_args(arguments)
    for name in ("samples", "width", "tokens", "rounds", "threads"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}, expected at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
