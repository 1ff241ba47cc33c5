"""The machine a benchmark runs on: what it is, how many cores we may use, and how much others disturb us.

Reads /proc and /sys only; a fact that cannot be read is None, never a guess. It measures nothing: probe.py does.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY

#: CPU features that decide which matrix kernels can run.
RELEVANT_FLAGS = (
    *("avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
_PACKAGES = ("torch", "transformers", "numpy")
_CPU_FOLDER = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Physical cores this process may use: its affinity, siblings counted once, within the cgroup's CPU quota."""
    cores = {_core_of(cpu) for cpu in os.sched_getaffinity(0)}
    quota = cgroup_cpus(_read(Path("/sys/fs/cgroup/cpu.max")))
    return max(1, min(len(cores), int(quota)) if quota is not None else len(cores))


def cgroup_cpus(cpu_max: str | None) -> float | None:
    """CPUs that a cgroup's ``cpu.max`` ("quota period", "max" for none) allows; None for no limit."""
    fields = (cpu_max or "").split()
    if len(fields) != 2 or not all(f.isdigit() for f in fields) or fields[1] == "0":
        return None
    return int(fields[0]) / int(fields[1])


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache that CPU 0 sees."""
    sizes = [_cache_size(_read(file)) for file in (_CPU_FOLDER / "cpu0/cache").glob("index*/size")]
    return max((s for s in sizes if s is not None), default=None)


def environment_record(command: str) -> dict[str, Any]:
    """Everything about machine and software that a figure depends on."""
    cpu = parse_cpuinfo(_read(Path("/proc/cpuinfo")) or "")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "git_commit": _git_commit(),
        "cpu": cpu["model"],
        "cpu_flags": cpu["flags"],
        "usable_cores": usable_cores(),
        "logical_cpus": os.cpu_count(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: package_version(name) for name in _PACKAGES},
        "load_average_at_start": [round(x, 2) for x in os.getloadavg()],
    }


def parse_cpuinfo(text: str) -> dict[str, Any]:
    """Model name and relevant flags of the first CPU in /proc/cpuinfo (x86 and arm spell them differently)."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or fields.get("CPU implementer")
    return {"model": model, "flags": [flag for flag in RELEVANT_FLAGS if flag in present]}


def package_version(name: str, folder: Path | None = None) -> str | None:
    """Version of an installed distribution, in this Python or in the site-packages `folder`, without importing it."""
    path = sys.path if folder is None else [str(folder)]
    found = next(iter(importlib.metadata.distributions(name=name, path=path)), None)
    return found.version if found is not None else None


def publishable(arguments: Iterable[str]) -> list[str]:
    """Command-line arguments with absolute paths cut to their last part, so that results can be shown around."""
    shown = []
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        shown.append(f"{option}{equals}.../{Path(value).name}" if value.startswith("/") else argument)
    return shown


@dataclass(frozen=True, slots=True)
class CpuClock:
    """CPU seconds used so far: by everyone on our CPUs, and by us with our finished children."""

    wall: float
    everyone: float
    ours: float
    num_cpus: int

    @classmethod
    def read(cls) -> CpuClock:
        cpus = os.sched_getaffinity(0)
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        ours = sum(u.ru_utime + u.ru_stime for u in usages)
        return cls(time.monotonic(), busy_seconds(_read(Path("/proc/stat")) or "", cpus), ours, len(cpus))

    def foreign_share(self, later: CpuClock) -> float:
        """Share of our CPUs' time from this reading to `later` that other processes (or other machines) took."""
        wall = (later.wall - self.wall) * self.num_cpus
        foreign = (later.everyone - self.everyone) - (later.ours - self.ours)
        return min(1.0, max(0.0, foreign / wall)) if wall > 0 else 0.0


def busy_seconds(proc_stat: str, cpus: Iterable[int]) -> float:
    """Busy and stolen seconds of the CPUs named, from /proc/stat."""
    wanted = {f"cpu{cpu}" for cpu in cpus}
    ticks = 0
    for line in proc_stat.splitlines():
        name, *counts = line.split() or [""]
        if name in wanted:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(c) for c in counts[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _core_of(cpu: int) -> str:
    """A name shared by the hardware threads of one core."""
    return _read(_CPU_FOLDER / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def _cache_size(text: str | None) -> int | None:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    if not text or text[-1] not in units or not text[:-1].isdigit():
        return None
    return int(text[:-1]) * units[text[-1]]


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _git_commit() -> str | None:
    """The commit of this checkout, with "+changes" when files differ from it; None outside a checkout."""
    git = ["git", "--no-optional-locks", "-C", str(REPOSITORY)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes.stdout.strip() else "")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
