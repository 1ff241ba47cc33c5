"""What a quantized KV cache costs in quality: `python -m benchmarks.kv_quality`.

Perplexity and likeliest tokens of a model over a few texts, with every format of the cache against the unquantized one,
in float32 so that nothing else rounds. Prints a table and writes JSON. It measures no time.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import REPOSITORY, BenchmarkError, InputError, check_writable, write_text
from benchmarks.machine import environment_record, publishable
from qengine import LLM, SamplingParams

FORMATS = ("int8", "fp8", "fp8_e5m2")
DEFAULT_TEXTS = ("LICENSE",)
DEFAULT_JSON = REPOSITORY / "benchmarks" / "results" / "kv-quality.json"


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one format: the mean log-probability of the texts' tokens, and the likeliest token at every place."""

    mean_logprob: float
    likeliest: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Quality:
    """A format against the unquantized cache. `perplexity_change` and `same_likeliest` are fractions."""

    kv_cache_dtype: str
    perplexity: float
    perplexity_change: float
    same_likeliest: float
    num_tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 for wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    try:
        texts = [_read(path) for path in options.texts]
        check_writable(options.json)
        base = score(options.model, texts, options.tokens, "auto")
        rows = [quality(name, base, score(options.model, texts, options.tokens, name)) for name in FORMATS]
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(math.exp(-base.mean_logprob), rows), end="")
    command = shlex.join(["python", "-m", "benchmarks.kv_quality", *publishable(arguments)])
    record = {
        "benchmark": "kv-quality",
        "environment": environment_record(command),
        "unquantized_perplexity": math.exp(-base.mean_logprob),
        "formats": [asdict(row) for row in rows],
    }
    write_text(options.json, json.dumps(record, indent=1) + "\n")
    return 0


def score(model: str | None, texts: Sequence[str], num_tokens: int, kv_cache_dtype: str) -> Scores:
    """Read the texts, the first tokens of each, and score every token but the first."""
    logprobs: list[float] = []
    likeliest: list[int] = []
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    with LLM(model, dtype="float32", max_model_len=num_tokens + 16, kv_cache_dtype=kv_cache_dtype) as llm:
        for text in texts:
            ids = llm.engine.tokenizer.encode(text)[:num_tokens]
            [output] = llm.generate([ids], params, use_tqdm=False)
            records = [record for record in output.prompt_logprobs or () if record is not None]
            logprobs += [record[token].logprob for token, record in zip(ids[1:], records, strict=True)]
            likeliest += [max(record, key=lambda token: record[token].logprob) for record in records]
    return Scores(sum(logprobs) / len(logprobs), tuple(likeliest))


def quality(name: str, base: Scores, found: Scores) -> Quality:
    """One format against the unquantized cache."""
    same = sum(a == b for a, b in zip(base.likeliest, found.likeliest, strict=True))
    change = math.expm1(base.mean_logprob - found.mean_logprob)
    number = len(base.likeliest)
    return Quality(name, math.exp(-found.mean_logprob), change, same / number, number)


def table(base: float, rows: Sequence[Quality]) -> str:
    """The table that people read."""
    lines = [f"{rows[0].num_tokens} tokens; perplexity {base:.3f} with the unquantized cache", ""]
    lines.append(f"{'kv cache':<10}{'perplexity':>12}{'change':>10}{'same likeliest':>17}")
    lines += [
        f"{r.kv_cache_dtype:<10}{r.perplexity:>12.3f}{r.perplexity_change:>+10.2%}{r.same_likeliest:>17.2%}"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text '{path}': {error}") from error


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_quality", description="What a quantized KV cache costs in quality."
    )
    parser.add_argument("texts", nargs="*", type=Path, help="files to read (this repository's license)")
    parser.add_argument("--model", help="folder, GGUF file or hub id (the bundled model)")
    parser.add_argument("--tokens", type=int, default=2000, metavar="N", help="of each text (%(default)s)")
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, metavar="FILE", help="where results go")
    options = parser.parse_args(arguments)
    options.texts = options.texts or [REPOSITORY / name for name in DEFAULT_TEXTS]
    if options.tokens < 2:
        parser.error(f"--tokens is {options.tokens}, expected 2 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
