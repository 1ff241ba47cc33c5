"""What each way to quantize costs in quality and time: `python -m benchmarks.quantize_quality`.

One model is quantized by each method with the same calibration, by `qengine quantize`, and compared with the original
by `qengine evaluate`, on two texts that the calibration does not contain: documentation of the standard library, and
answers that the original itself sampled at temperature 1. Everything runs in float32, so that nothing else rounds.
Invariant: the texts depend on the Python version and the seed alone. Results are kept in the work folder; a second run
with the same folder measures only what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import pydoc_data.topics
import re
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY, BenchmarkError, check_writable, write_text
from benchmarks.machine import environment_record, publishable
from benchmarks.process import child_environment, run_child
from qengine import LLM, SamplingParams

DEFAULT_JSON = REPOSITORY / "benchmarks" / "results" / "quantize-quality.json"
#: Name -> flags of `qengine quantize`.
METHODS = {
    "rtn": ("--method", "rtn", "--format", "awq"),
    "rtn-sym": ("--method", "rtn", "--sym", "--format", "gptq"),
    "awq": ("--method", "awq"),
    "gptq": ("--method", "gptq"),
    "gptq-act-order": ("--method", "gptq", "--act-order"),
    "auto": ("--method", "auto"),
}
DOCUMENTED = ("statistics", "decimal", "difflib", "logging", "subprocess", "threading", "random", "email.message")
#: Characters of each module's documentation.
DOCUMENT_CHARS = 1200
QUESTIONS = (
    "What is the capital of Australia, and what is it known for?",
    "Write a short poem about a lighthouse in winter.",
    "Explain how a vaccine works to a ten year old.",
    "How do I reverse a list in Python?",
    "What were the main causes of the French Revolution?",
    "Write an email to my landlord about a broken heater.",
    "What is the difference between weather and climate?",
    "How can I sleep better at night?",
    "Explain compound interest with an example.",
    "What should I pack for a week of hiking?",
    "Give me five tips for a job interview.",
    "Write a function in JavaScript that adds two numbers.",
    "Plan a two day trip to Rome.",
    "How does a refrigerator work?",
    "Describe a busy market in Morocco.",
    "What are the health benefits of walking?",
)
TIMEOUT_S = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one text, against the original.

    `seconds` are those of quantizing, `cpu_seconds` the time that processors worked on it; `peak_gib` the memory of
    that process at its most, `foreseen_gib` what it said before it began.
    """

    method: str
    text: str
    mean_kl: float
    p999_kl: float
    top1_agreement: float
    perplexity: float
    original_perplexity: float
    seconds: float
    cpu_seconds: float
    peak_gib: float
    foreseen_gib: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 for wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    try:
        check_writable(options.json)
        if options.work is None:
            with tempfile.TemporaryDirectory() as folder:
                rows = measure(options, Path(folder))
        else:
            options.work.mkdir(parents=True, exist_ok=True)
            rows = measure(options, options.work)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(rows), end="")
    command = shlex.join(["python", "-m", "benchmarks.quantize_quality", *publishable(arguments)])
    record = {
        "benchmark": "quantize-quality",
        "environment": environment_record(command),
        "num_samples": options.num_samples,
        "seq_len": options.seq_len,
        "group_size": options.group_size,
        "rows": [asdict(row) for row in rows],
    }
    write_text(options.json, json.dumps(record, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace, work: Path) -> list[Row]:
    """Quantize by every method and compare on every text."""
    calibration = work / "calibration.jsonl"
    write_rows(calibration, [{"text": text} for text in calibration_texts(options.num_samples)])
    texts = {"technical": work / "technical.jsonl", "chat": work / "chat.jsonl"}
    if not texts["chat"].exists():
        write_rows(texts["technical"], [{"text": documentation(name)} for name in DOCUMENTED])
        write_rows(
            texts["chat"], sample_answers(None if options.model == "demo" else options.model, options.answer_len)
        )
    rows: list[Row] = []
    for method in options.methods:
        out = work / method
        cost = _quantize(options, method, out, calibration)
        rows += [_compare(options, method, name, out, path, cost) for name, path in texts.items()]
        print(table(rows[-len(texts) :]), end="", flush=True, file=sys.stderr)
    return rows


def calibration_texts(number: int) -> list[str]:
    """The longest of the language reference's topics."""
    return sorted(pydoc_data.topics.topics.values(), key=len, reverse=True)[:number]


def documentation(module: str) -> str:
    """The start of what a module of the standard library says of itself and its parts."""
    namespace = importlib.import_module(module)
    public = [thing for name, thing in vars(namespace).items() if not name.startswith("_") and callable(thing)]
    parts = [inspect.getdoc(namespace) or "", *(inspect.getdoc(thing) or "" for thing in public)]
    return "\n\n".join(part for part in parts if len(part) > 80)[:DOCUMENT_CHARS]


def sample_answers(model: str | None, answer_len: int) -> list[dict[str, Any]]:
    """Conversations whose answers the original model sampled at temperature 1."""
    params = SamplingParams(temperature=1.0, max_tokens=answer_len, seed=0)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with LLM(model, dtype="float32", max_model_len=answer_len + 256) as llm:
        outputs = llm.chat(conversations, params, use_tqdm=False)
    return [
        {"messages": [*asked, {"role": "assistant", "content": output.outputs[0].text}]}
        for asked, output in zip(conversations, outputs, strict=True)
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A JSONL file."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True, slots=True)
class Cost:
    """What `qengine quantize` says that it took, and the processor time of all its threads."""

    seconds: float
    cpu_seconds: float
    peak_gib: float
    foreseen_gib: float

    @staticmethod
    def read(printed: str, cpu_seconds: float) -> Cost:
        """From the command's last lines. Raises BenchmarkError."""
        found = re.search(r"took ([\d.]+) (s|min), ([\d.]+) GiB of memory \(([\d.]+) foreseen\)", printed)
        if found is None:
            raise BenchmarkError(f"qengine quantize did not say what it took: {printed[-300:]}")
        seconds = float(found[1]) * (60 if found[2] == "min" else 1)
        return Cost(seconds, round(cpu_seconds, 1), float(found[3]), float(found[4]))


def _quantize(options: argparse.Namespace, method: str, out: Path, calibration: Path) -> Cost:
    """Make the checkpoint; returns what it took, in an earlier run if it is there."""
    kept = out.parent / f"{method}.json"
    if out.exists() and kept.exists():
        return Cost(**json.loads(kept.read_text(encoding="utf-8")))
    _say(f"quantizing by {method}")
    flags = ["--calibration", str(calibration), "--num-samples", str(options.num_samples), "--resume"]
    flags += ["--seq-len", str(options.seq_len), "--group-size", str(options.group_size), "--device", options.device]
    before = _processor_seconds()
    printed = _run(options, "quantize", options.model, str(out), *METHODS[method], *flags)
    cost = Cost.read(printed, _processor_seconds() - before)
    write_text(kept, json.dumps(asdict(cost)) + "\n")
    return cost


def _compare(options: argparse.Namespace, method: str, name: str, out: Path, text: Path, cost: Cost) -> Row:
    kept = out.parent / f"{method}-{name}.json"
    if not kept.exists():
        _say(f"measuring {method} on {name} text")
        flags = ["--text", str(text), "--dtype", "float32", "--device", options.device, "--json"]
        write_text(kept, _run(options, "evaluate", str(out), "--against", options.model, *flags))
    found = json.loads(kept.read_text(encoding="utf-8"))
    comparison = found["comparison"]
    return Row(
        method,
        name,
        comparison["mean_kl"],
        comparison["p999_kl"],
        comparison["top1_agreement"],
        found["model"]["perplexity"],
        found["original"]["perplexity"],
        **asdict(cost),
    )


def _processor_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _run(options: argparse.Namespace, *command: str) -> str:
    environment = child_environment(options.threads)
    return run_child([sys.executable, "-m", "qengine", *command], environment, TIMEOUT_S).stdout


def table(rows: Sequence[Row]) -> str:
    """The table that people read."""
    head = f"{'method':<16}{'text':<11}{'mean KL':>9}{'p99.9 KL':>10}{'top-1':>8}{'perplexity':>12}"
    lines = [f"{head}{'seconds':>9}{'CPU s':>7}{'GiB':>7}{'foreseen':>10}"]
    lines += [
        f"{r.method:<16}{r.text:<11}{r.mean_kl:>9.3f}{r.p999_kl:>10.2f}{r.top1_agreement:>8.1%}"
        f"{r.perplexity:>12.2f}{r.seconds:>9.0f}{r.cpu_seconds:>7.0f}{r.peak_gib:>7.2f}{r.foreseen_gib:>10.2f}"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantize_quality", description="What each way to quantize costs in quality and time."
    )
    parser.add_argument("--model", default="demo", help="folder, GGUF file or hub id (the bundled model)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(all)")
    parser.add_argument("--num-samples", type=int, default=12, metavar="N", help="of calibration (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=2048, metavar="N", help="tokens of each (%(default)s)")
    parser.add_argument("--group-size", type=int, default=64, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--answer-len", type=int, default=200, metavar="N", help="most tokens of an answer (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keep texts and checkpoints here, and go on from it"
    )
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, metavar="FILE", help="where results go")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
