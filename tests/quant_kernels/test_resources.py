"""The gate that keeps kernels fast without a GPU: what it reads, what it refuses, and what may be selected at all.

The compiler cannot run in this process, where kernels are interpreted, so the command runs in one of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from quant_kernels import resources
from quant_kernels.compiled import sass
from quant_kernels.compiled.cache import FigureCache
from quant_kernels.compiled.keys import variant_key
from quant_kernels.compiled.record import COLUMNS, RECORD, Record, make_record, read_record, record_text
from quant_kernels.compiled.report import (
    MAX_LOP3,
    Budgets,
    Resources,
    budgets_text,
    issue_share,
    lowered_budgets,
    read_budgets,
)
from quant_kernels.compiled.report import judge as judge_with
from quant_kernels.compiled.variants import ARCHS, Variant, all_variants, make_scheme, row_name
from quant_kernels.scheme import ZeroKind
from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.tile import Tile

SCHEME = make_scheme(4, 128, ZeroKind.CONST, torch.float16)
VARIANT = Variant("matmul", SCHEME, Tile(16, 128), 86, torch.float16)
GOOD = {
    "shared_bytes": 37376, "registers": 120, "spill_bytes": 0, "instr_per_weight": 2.16, "lop3_per_weight": 0.5,
    "prmt_per_weight": 0.02, "i2f_per_weight": 0.0,
}  # fmt: skip
BUDGET = Budgets("3.9.0", {row_name(VARIANT): {"86": 2.2}})

#: A loop of five instructions on the tensor cores, one without them, and padding.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/                   LOP3.LUT R3, R2, 0xf000f, RZ, 0xc0, !PT ;
        /*0040*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0050*/                   I2FP.F32.S32 R3, R3 ;
        /*0060*/                   NOP ;
        /*0070*/              @P1  BRA 0x30 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def judge(variant: Variant, figures: Mapping[str, Any], budgets: Budgets, compiler: str = "3.9.0") -> Resources:
    return judge_with(variant, figures, budgets, compiler)


def one_budget(variant: Variant, budget: float) -> Budgets:
    return Budgets("3.9.0", {row_name(variant): {str(variant.arch): budget}})


def test_loops_are_read() -> None:
    loops = sass.loops(LISTING)
    assert [loop.num_instructions for loop in loops] == [2, 4]
    main = sass.main_loop(LISTING)
    assert main is not None
    assert (main.num_tensor, main.count("LOP3"), main.count("I2F"), main.count("NOP")) == (1, 1, 1, 0)
    assert sass.main_loop(LISTING.replace("HMMA", "FFMA")) is None
    assert sass.whole(LISTING).num_instructions == 9


def test_a_good_kernel_passes() -> None:
    row = judge(VARIANT, GOOD, BUDGET)
    assert row.ok
    assert row.problems == ()
    record = row.to_json()
    for name in (
        *("kernel", "config", "arch", "shared_bytes", "shared_limit", "registers", "spill_bytes"),
        *("instr_per_weight", "budget", "lop3_per_weight", "ok"),
    ):
        assert name in record


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"shared_bytes": 99 * 1024 + 1}, "sm_86 has 101376"),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"instr_per_weight": 2.21}, "the budget is 2.20"),
        ({"lop3_per_weight": MAX_LOP3 + 0.01}, "LOP3 per weight"),
        ({"prmt_per_weight": 0.5}, "0.50 PRMT per weight"),
        ({"i2f_per_weight": 1.0}, "1.00 I2F per weight"),
    ],
)
def test_what_is_wrong_is_said(change: Mapping[str, Any], word: str) -> None:
    row = judge(VARIANT, {**GOOD, **change}, BUDGET)
    assert not row.ok
    assert word in " ".join(row.problems)


def test_without_a_budget_or_a_loop_it_fails() -> None:
    nothing = Budgets("3.9.0", {})
    assert "has no budget" in judge(VARIANT, GOOD, nothing).problems[0]
    without = {name: GOOD[name] for name in ("shared_bytes", "registers", "spill_bytes")}
    assert "no loop" in judge(VARIANT, without, nothing).problems[0]


def test_codebooks_may_look_up() -> None:
    book = replace(VARIANT, scheme=make_scheme(4, 64, ZeroKind.CODEBOOK, torch.float16))
    figures = {**GOOD, "prmt_per_weight": 2.25, "lop3_per_weight": 1.0}
    assert judge(book, figures, one_budget(book, 6.0)).ok


def test_shared_memory_by_architecture() -> None:
    big = {**GOOD, "shared_bytes": 120_000}
    variants = [replace(VARIANT, arch=arch) for arch in ARCHS]
    fits = {v.arch: judge(v, big, one_budget(v, 3.0)).ok for v in variants}
    assert fits == {80: True, 86: False, 89: False, 90: True, 120: False}


def test_what_the_figures_mean_for_a_card() -> None:
    # 936e9 / 0.515625 bytes a weight x 2.16 instructions, of 82 x 128 lanes at 1.695 GHz.
    assert issue_share(KNOWN_CARDS["3090"], judge(VARIANT, GOOD, BUDGET)) == pytest.approx(0.2204, rel=1e-3)


def test_budgets_are_lowered_and_never_raised() -> None:
    nothing = Budgets("", {})
    lower = [(VARIANT, {**GOOD, "instr_per_weight": 2.0})]
    higher = [(VARIANT, {**GOOD, "instr_per_weight": 3.0})]
    assert lowered_budgets(BUDGET, lower, "3.9.0", add_new=False) == one_budget(VARIANT, 2.0)
    assert lowered_budgets(BUDGET, higher, "3.9.0", add_new=True) == BUDGET
    assert lowered_budgets(nothing, lower, "3.9.0", add_new=False).rows == {}
    assert lowered_budgets(nothing, lower, "3.9.0", add_new=True) == one_budget(VARIANT, 2.0)


def test_budgets_survive_their_file(tmp_path: Path) -> None:
    file = tmp_path / "budgets.json"
    file.write_text(budgets_text(BUDGET))
    assert read_budgets(file) == BUDGET
    assert read_budgets(tmp_path / "none").rows == {}
    for damage in ("{", "[]", "{}"):
        file.write_text(damage)
        with pytest.raises(ValueError, match="no table of budgets"):
            read_budgets(file)


def test_another_compiler_has_some_air() -> None:
    more = {**GOOD, "instr_per_weight": 2.4}
    assert not judge(VARIANT, more, BUDGET).ok
    assert judge(VARIANT, more, BUDGET, "3.6.0").ok
    assert not judge(VARIANT, {**GOOD, "instr_per_weight": 2.6}, BUDGET, "3.6.0").ok


def test_everything_that_can_be_selected_has_a_budget() -> None:
    budgets = read_budgets()
    missing = [
        f"{row_name(v)} sm_{v.arch}"
        for v in all_variants()
        if v.scheme is not None and budgets.find(v, budgets.compiler) is None
    ]
    assert not missing, "\n".join(missing)


def allowed_at_start(variant: Variant) -> float:
    """The highest budget that a row for M up to 16 may have had when it was first written."""
    assert variant.scheme is not None
    scheme = variant.scheme
    by_group = {32: 3.1, 64: 2.6}.get(scheme.group_size, 2.3)
    allowed = by_group + (0.5 if variant.tile is not None and variant.tile.block_n == 64 else 0.0)
    if scheme.zero == ZeroKind.INTEGER:
        allowed += 0.1
    if scheme.dtype == torch.bfloat16:
        allowed += 0.3 if by_group == 2.3 and scheme.zero == ZeroKind.CONST else 0.4
    return allowed


def test_budgets_of_decode_are_as_low_as_was_asked() -> None:
    budgets = read_budgets()
    rows = [
        v
        for v in all_variants()
        if v.scheme is not None and v.scheme.bits == 4 and v.tile is not None
        and v.tile.block_m == 16 and v.scheme.zero in (ZeroKind.CONST, ZeroKind.INTEGER)
    ]  # fmt: skip
    assert len(rows) > 100
    high = [(row_name(v), v.arch) for v in rows if budgets.rows[row_name(v)][str(v.arch)] > allowed_at_start(v)]
    assert not high


def test_figures_are_remembered_and_damage_is_survived(tmp_path: Path) -> None:
    cache = FigureCache(tmp_path, "3.9")
    assert cache.get(VARIANT) is None
    cache.put(VARIANT, dict(GOOD))
    cache.save()
    assert FigureCache(tmp_path, "3.9").get(VARIANT) == GOOD
    assert FigureCache(tmp_path, "3.9").get(replace(VARIANT, arch=90)) is None
    assert FigureCache(tmp_path, "3.10").get(VARIANT) is None
    cache.path.write_text("{")
    assert FigureCache(tmp_path, "3.9").get(VARIANT) is None
    blocked = FigureCache(tmp_path / "file", "3.9")
    (tmp_path / "file").write_text("")
    blocked.put(VARIANT, dict(GOOD))
    blocked.save()


def test_the_record_answers_for_what_it_was_made_from_alone(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    sizes = dict(list(GOOD.items())[:3])
    norm = next(v for v in all_variants() if v.kernel == "add_rms_norm")
    file.write_text(record_text(make_record([(VARIANT, GOOD), (norm, sizes)], "3.9.0")))
    record = read_record("3.9.0", file)
    assert record.find(VARIANT) == GOOD
    assert record.find(norm) == sizes
    assert record.find(replace(VARIANT, arch=90)) is None
    assert record.difference(VARIANT, GOOD) == ""
    assert record.difference(VARIANT, {**GOOD, "registers": 9}).endswith("has registers 120, compiled 9")
    key = record.rows[row_name(VARIANT)]["86"][0]
    file.write_text(file.read_text().replace(key, key[::-1]))
    assert read_record("3.9.0", file).find(VARIANT) is None
    assert read_record("3.10.0", file).find(norm) is None
    assert read_record("3.9.0", tmp_path / "none").rows == {}


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    for damage in (
        "{",
        "[]",
        "{}",
        '{"compiler": "3.9.0", "counting": "", "figures": {"a": {"86": ["key", 1, "2", 3]}}}',
    ):
        file.write_text(damage)
        with pytest.raises(ValueError, match="take the committed one"):
            read_record("3.9.0", file)


def test_the_committed_record_has_every_configuration() -> None:
    # Keys cannot be compared here, where kernels are interpreted: the command does it, and `make test` runs it.
    record = json.loads(RECORD.read_text())
    assert record["compiler"] == read_budgets().compiler
    assert record["columns"] == ["key", *COLUMNS]
    wanted: dict[str, set[str]] = {}
    for variant in all_variants():
        wanted.setdefault(row_name(variant), set()).add(str(variant.arch))
    assert {name: set(row) for name, row in record["figures"].items()} == wanted


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "quant_kernels.resources", "--jobs", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_the_command_compiles_and_judges(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    name, cache_folder = "matmul w4 float16 g128 const 16x64", str(tmp_path / "cache")
    only = ("--only", name, "--arch", "86", "--arch", "90", "--cache", cache_folder)
    done = run(*only, "--verify", "all", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All fit their cards" in done.stdout
    rows = json.loads(file.read_text())
    assert {row["arch"] for row in rows} == {86, 90}
    assert all(row["ok"] and row["spill_bytes"] == 0 and row["instr_per_weight"] < 2.4 for row in rows)
    tight = tmp_path / "budgets.json"
    table = {f"{r['kernel']} {r['config']}": {str(a): 1.0 for a in ARCHS} for r in rows}
    tight.write_text(budgets_text(Budgets(triton.__version__, table)))
    again = run(*only, "--budgets", str(tight))
    assert again.returncode == 1
    assert "the budget is 1.00" in again.stdout
    assert "compiled" not in again.stderr  # The figures were remembered.


#: The committed record answers for the compiler that made it alone.
WITH_RECORD = pytest.mark.skipif(
    triton.__version__ != json.loads(RECORD.read_text())["compiler"], reason="the record is for another triton"
)
SILU = ("--only", "silu_mul float16", "--arch", "86")


@WITH_RECORD
def test_the_record_spares_compiling(tmp_path: Path) -> None:
    done = run(*SILU, "--cache", str(tmp_path), "--verify", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiled 1 of 1 kernels" in done.stderr
    assert "1 were compiled on this machine; " in done.stdout


@WITH_RECORD
def test_a_record_that_is_wrong_is_found_out(tmp_path: Path) -> None:
    wrong, file, cache = json.loads(RECORD.read_text()), tmp_path / "record.json", ("--cache", str(tmp_path / "cache"))
    names = [name for name in wrong["figures"] if name.startswith("silu_mul float16")]
    wrong["figures"][names[0]]["86"][2] += 1
    wrong["figures"][names[1]]["86"][0] = "another kernel's"
    file.write_text(json.dumps(wrong))
    found = run(*SILU, *cache, "--record", str(file), "--verify", "all")
    assert found.returncode == 1
    assert f"FAILED record: sm_86 {names[0]} has registers" in found.stdout
    assert (
        "FAILED record: kernels that are not in it as they are now: 1; if they are right, --write-record\n"
        in found.stdout
    )


def test_writing_the_record_says_what_it_changes() -> None:
    before = Record(triton.__version__, {row_name(VARIANT): {"86": [variant_key(VARIANT), *GOOD.values()]}})
    changed = {**GOOD, "registers": 121}
    measured = resources.Measured([(VARIANT, changed)], frozenset([VARIANT]))
    problems = resources._record_problems(before, measured)
    change = f"sm_86 {row_name(VARIANT)} has registers 120, compiled 121"
    assert problems == [(change, "find out why, then --verify all --write-record")]
    assert "FAILED" in resources._record_summary(before, measured, problems, is_written=False)
    said = resources._record_summary(before, measured, problems, is_written=True)
    assert said == f"rewritten in the record: {change}\n"
    assert make_record(measured.figures, triton.__version__).find(VARIANT) == changed


def test_another_compilers_record_is_not_used_and_that_is_said() -> None:
    measured = resources.Measured([(VARIANT, GOOD)], frozenset([VARIANT]))
    for record, word in ((Record("0.1", {}), "of triton 0.1"), (Record("", {}), "missing")):
        assert resources._record_problems(record, measured) == []
        assert word in resources._record_summary(record, measured, [], is_written=False)


def test_a_sample_of_what_only_the_record_knows_is_compiled(tmp_path: Path) -> None:
    variants = [replace(VARIANT, arch=arch) for arch in ARCHS]
    record = make_record([(v, GOOD) for v in variants[:4]], triton.__version__)
    cache = FigureCache(tmp_path, triton.__version__)
    cache.put(variants[0], GOOD)
    assert resources._to_compile(variants, cache, record, 0) == variants[4:]
    drawn = {tuple(resources._to_compile(variants, cache, record, 1)) for _ in range(100)}
    assert drawn == {(v, variants[4]) for v in variants[1:4]}
    assert resources._to_compile(variants, cache, record, 9) == variants[1:]


def test_the_command_writes_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another's figures for one kernel in the record; no kernel is compiled."""
    budgets, file = tmp_path / "budgets.json", tmp_path / "record.json"
    budgets.write_text(budgets_text(BUDGET))
    file.write_text(record_text(make_record([(VARIANT, {**GOOD, "registers": 7})], triton.__version__)))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(resources, "all_variants", lambda: [VARIANT])
    monkeypatch.setattr(resources, "_compile", lambda variants, jobs: ((v, dict(GOOD)) for v in variants))
    words = ["--budgets", str(budgets), "--record", str(file), "--cache", str(tmp_path / "cache")]
    assert resources.main([*words, "--verify", "0"]) == 0
    assert resources.main([*words, "--verify", "1"]) == 1
    assert "FAILED record" in capsys.readouterr().out
    assert resources.main([*words, "--write-record"]) == 0
    assert "rewritten in the record" in capsys.readouterr().out
    assert resources.main(words) == 0
    # What is cached is compiled again where all is asked for.
    monkeypatch.setattr(resources, "_compile", lambda variants, jobs: ((v, {**GOOD, "registers": 9}) for v in variants))
    assert resources.main(words) == 0
    assert resources.main([*words, "--verify", "all"]) == 1
    assert "has registers 120, compiled 9" in capsys.readouterr().out


def test_what_is_said_to_the_compiler_beside_the_text_counts() -> None:
    code = """
import triton
import quant_kernels.elementwise.silu_mul as module
from quant_kernels.compiled.keys import source_of
function = module.silu_mul_kernel.fn
kinds = [{}, {"do_not_specialize": ["num_columns"]}, {"noinline": True}, {"debug": True}, {}]
texts = [source_of(triton.jit(function, **kind)) for kind in kinds]
print(len(set(texts)), texts[0] == texts[4])
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "4 True\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--arch", "75"), "75"),
        (("--json", "/no/such/folder/rows.json"), "folder that exists"),
        (("--jobs", "0"), "--jobs is 0"),
        (("--budgets", "/no/such/file"), "no file"),
        (("--record", "/no/such/file"), "no file"),
        (("--verify", "some"), "'some' is neither a number nor 'all'"),
        (("--new-budgets", "--only", "x"), "all configurations at once"),
        (("--write-record", "--arch", "86"), "all configurations at once"),
    ],
)
def test_wrong_calls_of_the_command(arguments: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        resources.main(arguments)
    assert stopped.value.code == 2
    assert word in capsys.readouterr().err


def test_interpreted_kernels_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resources.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_a_name_that_no_configuration_has() -> None:
    nothing = run("--only", "no such kernel")
    assert nothing.returncode == 2
    assert "no configuration" in nothing.stderr
