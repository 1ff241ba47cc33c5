"""Results of a GPU run as text: Markdown tables, the distance to each bound, and the numbers that were aimed at.

Works on the results record alone, so an old file prints as a new one does. Each kind of part has its own module; this
one puts them together. Aims are no tests: a card that misses them is told so and nothing fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import InputError, read_results
from benchmarks.gpu import report_attention, report_fit, report_matmul, report_models
from benchmarks.gpu.tables import Record

BENCHMARK = "gpu"
SCHEMA = 1
#: Kinds of parts whose records are kept in the results, by kind.
TABLES = ("matmul", "attention", "logits", "end-to-end", "serving", "fit")


def check_results(record: Any) -> Record:
    """Raise InputError unless this is a results file of this benchmark and version."""
    if not isinstance(record, Mapping) or record.get("benchmark") != BENCHMARK or record.get("schema") != SCHEMA:
        raise InputError(f"not a results file of the GPU check: expected benchmark '{BENCHMARK}', schema {SCHEMA}")
    return record


def load_results(path: Path) -> Record:
    """Read a results file.

    Raises:
        InputError: if it cannot be read or is no results file of this version.
    """
    return read_results(path, check_results)


def markdown_report(results: Record) -> str:
    """Everything that was measured: tests, aims, then tables, from whole models down to matmuls."""
    environment = results["environment"]
    title = f"# {results['card']['name']}\n\nMeasured {environment['date'][:10]} by `{environment['command']}`."
    matmul, attention, logits, models, serving, fit = (results.get(kind, []) for kind in TABLES)
    parts = [title, _facts(results), _tests(results), _failed(results), _aims(results)]
    parts += report_models.end_to_end_sections(models)
    parts += [report_models.serving_section(serving), report_models.logits_section(logits)]
    parts.append(report_fit.section(fit))
    parts += report_attention.sections(attention)
    parts += report_matmul.sections(matmul, results.get("copy_bytes_per_s"))
    parts.append(_pending(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _aims(results: Record) -> str:
    matmul, attention, _, models, serving, _ = (results.get(kind, []) for kind in TABLES)
    lines = [
        *report_models.target_lines(models, serving),
        *report_attention.target_lines(attention),
        *report_matmul.target_lines(matmul),
    ]
    return _listed("Aimed at, on an H100:", lines)


def _facts(results: Record) -> str:
    card = results["card"]
    bandwidth = results.get("copy_bytes_per_s")
    facts = [
        f"sm_{card['arch']}, {card['num_sms']} multiprocessors, {card['l2_bytes'] / 2**20:.0f} MB L2",
        card["versions"],
        *([f"driver, clocks and power: {card['driver_and_clocks']}"] if card["driver_and_clocks"] else []),
    ]
    if bandwidth:
        facts.append(f"copies {bandwidth / 1e9:.0f} GB/s")
    return "; ".join(facts) + "."


def _tests(results: Record) -> str:
    return _listed("Tests on the device:", [f"{t['part']}: {t['summary']}" for t in results["tests"]])


def _failed(results: Record) -> str:
    tests = {t["part"] for t in results["tests"]}
    lines = [f"{f['part']}: {f['summary']}" for f in results.get("failed", []) if f["part"] not in tests]
    return _listed("FAILED:", lines)


def _pending(results: Record) -> str:
    missing = report_matmul.notes(results.get("matmul", [])) + report_attention.notes(results.get("attention", []))
    notes = [*missing, *(f"not run yet: {name}" for name in results["pending"])]
    return "\n".join(f"- {note}" for note in notes)


def _listed(title: str, lines: Sequence[str]) -> str:
    return title + "\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""
