from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.machine import (
    CpuClock,
    busy_seconds,
    cgroup_cpus,
    environment_record,
    package_version,
    parse_cpuinfo,
    publishable,
    usable_cores,
)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("200000 100000", 2.0), ("50000 100000", 0.5), ("max 100000", None), (None, None), ("", None), ("1 0", None)],
)
def test_cgroup_quota(text: str | None, cpus: float | None) -> None:
    assert cgroup_cpus(text) == cpus


def test_usable_cores_are_no_more_than_the_affinity() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


def test_cpuinfo_of_x86_and_arm() -> None:
    x86 = "processor\t: 0\nmodel name\t: Fast CPU\nflags\t: fpu avx2 amx_bf16\n\nprocessor\t: 1\nmodel name\t: Other\n"
    assert parse_cpuinfo(x86) == {"model": "Fast CPU", "flags": ["avx2", "amx_bf16"]}
    arm = "processor\t: 0\nFeatures\t: fp asimd sve2\nCPU implementer\t: 0x41\n"
    assert parse_cpuinfo(arm) == {"model": "0x41", "flags": ["asimd", "sve2"]}
    assert parse_cpuinfo("") == {"model": None, "flags": []}


def test_busy_seconds_counts_stolen_but_not_idle_time() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    stat = "cpu  999 999 999 999 999 999 999 999 0 0\ncpu0 1 2 4 1000 1000 8 16 32 0 0\ncpu1 64 0 0 5 0 0 0 0 0 0\n"
    assert busy_seconds(stat, [0]) == 63 / ticks
    assert busy_seconds(stat, [0, 1]) == 127 / ticks


def test_foreign_share() -> None:
    begin = CpuClock(wall=10, everyone=100, ours=50, num_cpus=2)
    later = CpuClock(wall=20, everyone=115, ours=60, num_cpus=2)
    # Twenty core-seconds passed; fifteen were busy and ten of them ours.
    assert begin.foreign_share(later) == 0.25
    assert begin.foreign_share(CpuClock(20, 109, 60, 2)) == 0
    assert begin.foreign_share(begin) == 0


def test_the_clock_reads_this_machine() -> None:
    clock = CpuClock.read()
    assert clock.everyone > 0
    assert clock.ours > 0
    assert clock.num_cpus == len(os.sched_getaffinity(0))


def test_published_arguments_keep_only_the_end_of_absolute_paths() -> None:
    given = ["--llama-cpp", "/home/me/venv/bin", "--model=/home/me/m.gguf", "--runs", "3", "x/y.json"]
    assert publishable(given) == ["--llama-cpp", ".../bin", "--model=.../m.gguf", "--runs", "3", "x/y.json"]


def test_version_of_a_package_in_a_folder(tmp_path: Path) -> None:
    info = tmp_path / "some_peer-3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-peer\nVersion: 3.1\n")
    assert package_version("some-peer", tmp_path) == "3.1"
    assert package_version("some-peer") is None
    assert package_version("torch") is not None


def test_environment_names_what_figures_depend_on() -> None:
    record = environment_record("python -m x")
    assert record["command"] == "python -m x"
    assert record["memory_bytes"] > 2**28
    assert record["torch"] == package_version("torch")
    assert {"cpu", "cpu_flags", "python", "git_commit", "load_average_at_start", "date", "usable_cores"} <= set(record)
