from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks.common import InputError
from benchmarks.report import (
    bounds_of,
    load_results,
    markdown_report,
    metrics_of,
    terminal_report,
    times_better,
)
from tests.benchmarks import records


def test_ratios_say_how_many_times_better_we_are() -> None:
    metrics = {metric.key: metric for metric in metrics_of(records.results()["workload"])}
    assert times_better(metrics["decode_1"], own=100, other=50) == 2
    assert times_better(metrics["first_token"], own=4, other=1) == 0.25
    assert times_better(metrics["peak_memory"], own=100, other=300) == 3


def test_bounds_worked_out_by_hand() -> None:
    results = records.results()
    bounds = bounds_of(results["engines"][0], results)
    # 1 MB of weights and 96.5 tokens of 100 bytes, 100 times a second, of 1 GB/s.
    assert bounds["decode"]["bytes_per_token"] == 1_009_650
    assert bounds["decode"]["gb_per_s"] == pytest.approx(0.100965)
    assert bounds["decode"]["share"] == pytest.approx(0.100965)
    # 2 x (512 x 1000 + 100) operations in 0.512 s, of the faster dtype's 8 million a second.
    assert bounds["prompt"]["gflop"] == pytest.approx(1.0242e-3)
    assert bounds["prompt"]["share"] == pytest.approx(1_024_200 / 0.512 / 8e6)


def test_no_decode_bound_where_the_bytes_are_unknown() -> None:
    results = records.results()
    assert set(bounds_of({**results["engines"][1], "weight_bytes_per_token": None}, results)) == {"prompt"}
    results["workload"]["batches"] = [16]
    assert set(bounds_of(results["engines"][0], results)) == {"prompt"}


TABLE = """\
Tiny (GGUF Q4_1) on the CPU, 2 threads, median of 3 runs

                      unit            qengine         llama.cpp  ratio
----------------------------------------------------------------------
decode, 1 sequence    tok/s      100 (90.0-110)  50.0 (45.0-55.0)  2.00x
decode, 16 sequences  tok/s       300 (270-330)     200 (180-220)  1.50x
prompt, 512 tokens    tok/s     1000 (900-1100)     400 (360-440)  2.50x
start to first token  s        4.00 (3.60-4.40)  1.00 (0.90-1.10)  0.25x
peak memory           MiB         512 (461-563)     128 (115-141)  0.25x
"""


def test_the_terminal_table() -> None:
    report = terminal_report(records.results())
    for line in TABLE.splitlines()[4:]:
        assert " ".join(line.split()) in " ".join(report.split())
    header, rule, *rows = report.splitlines()[2:9]
    assert header.endswith("ratio")
    assert rule == "-" * len(header)
    assert {len(row) for row in rows} == {len(header)}
    assert report.startswith(TABLE.splitlines()[0] + "\n\n")


def test_the_terminal_report_names_bounds_and_missing_peers() -> None:
    report = terminal_report(records.results())
    assert "reads 1.0 GB/s and multiplies 0 GFLOP/s (bfloat16)" in report
    assert "10% of read bandwidth" in report
    assert "25% of matmul rate" in report
    assert "transformers: not installed: pip install gguf" in report
    assert "Warning" not in report


def test_a_disturbed_run_is_marked() -> None:
    results = records.results()
    results["disturbance"]["foreign_cpu_share"] = 0.4
    warning = "Warning: other processes took 40% of these cores during the run; measure again in quiet."
    assert terminal_report(results).endswith(warning + "\n")
    assert markdown_report(results).endswith(f"- {warning}\n")


def test_one_engine_and_one_run_need_no_ratio_and_no_range() -> None:
    results = records.results()
    results["engines"] = results["engines"][:1]
    results["workload"]["runs"] = 1
    for spread in results["engines"][0]["results"].values():
        spread.update(min=spread["median"], max=spread["median"], values=[spread["median"]])
    report = terminal_report(results)
    assert "ratio" not in report
    assert "one run" in report
    assert "(" not in report.split("\n\n")[1]


def test_the_readme_table() -> None:
    lines = markdown_report(records.results()).splitlines()
    assert lines[0] == "|  | qengine | llama.cpp | ratio |"
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert lines[2] == "| decode, 1 sequence | 100 tok/s | 50.0 tok/s | 2.00x |"
    assert lines[6] == "| peak memory | 512 MiB | 128 MiB | 0.25x |"
    assert "`python -m x`" in lines[8]
    assert lines[-1] == "- transformers: not installed: pip install gguf"


def test_results_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(records.results()))
    assert load_results(path) == records.results()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "expected benchmark 'offline-cpu'"),
        ('{"benchmark": "offline-cpu", "schema": 99}', "schema 1"),
        ('{"benchmark": "offline-cpu", "schema": 1, "model": {}}', "lacks environment, workload"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_results(path)


def test_reports_change_nothing_in_the_results() -> None:
    results = records.results()
    before = copy.deepcopy(results)
    terminal_report(results)
    markdown_report(results)
    assert results == before
