from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import process
from benchmarks.common import BenchmarkError, InputError
from benchmarks.process import child_environment, run_child, run_python

MINUTE = 60.0


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie that waits for init."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def assert_ends(pid: int) -> None:
    """A killed process needs a moment to be gone; one that was forgotten would sleep on for ten minutes."""
    for _ in range(500):
        if not is_running(pid):
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} is still running")


def test_output_and_the_order_of_times() -> None:
    result = run_child(
        python("import sys; print('one', flush=True); input_ = sys.stdin.read(); print('two')"), {}, MINUTE
    )
    assert result.stdout == "one\ntwo\n"
    assert 0 < result.first_output_seconds <= result.seconds


# A child's peak starts at its parent's size, so this is measured from a Python that has loaded nothing large.
PEAKS = """
import sys
from benchmarks.process import run_child
for code in ("print()", "x = b'x' * (100 * 2**20); print()"):
    print(run_child([sys.executable, "-c", code], {}, 60).peak_rss_bytes)
"""


def test_peak_memory_is_that_of_the_child() -> None:
    small, large = map(int, run_child(python(PEAKS), child_environment(1), MINUTE).stdout.split())
    assert small < 60 * 2**20
    assert 100 * 2**20 <= large < 140 * 2**20


def test_the_parent_stays_small() -> None:
    code = "import sys, benchmarks.offline; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = run_child(python(code), child_environment(1), MINUTE).stdout
    assert "'qengine'" in loaded
    for heavy in ("torch", "numpy", "transformers", "tokenizers"):
        assert f"'{heavy}'" not in loaded


def test_a_failure_shows_the_end_of_stderr() -> None:
    code = "import sys; print('line', file=sys.stderr); sys.exit('the reason')"
    with pytest.raises(BenchmarkError, match=r"exit code 1:\n    line\n    the reason"):
        run_child(python(code), {}, MINUTE)


def test_a_signal_is_named() -> None:
    with pytest.raises(BenchmarkError, match="killed by signal 11"):
        run_child(python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), {}, MINUTE)


def test_a_missing_program() -> None:
    with pytest.raises(BenchmarkError, match="cannot start /no/such/program: No such file"):
        run_child(["/no/such/program"], {}, MINUTE)


def test_too_slow_a_child_is_ended() -> None:
    gc.collect()  # What earlier tests left may end now.
    before = children()
    with pytest.raises(BenchmarkError, match="did not finish in 0 s; see --timeout"):
        run_child(["sleep", "600"], dict(os.environ), timeout_s=0.2)
    assert children() == before


def test_a_child_that_closes_its_stdout_is_still_waited_for() -> None:
    with pytest.raises(BenchmarkError, match="exit code 7"):
        run_child(["sh", "-c", "exec >&-; sleep 0.1; exit 7"], dict(os.environ), MINUTE)


def test_what_a_child_leaves_behind_is_ended(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    run_child(["sh", "-c", f"sleep 600 >/dev/null 2>&1 & echo $! > {pid_file}"], dict(os.environ), MINUTE)
    assert_ends(int(pid_file.read_text()))


def test_ctrl_c_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # What earlier tests left may end now.
    before = children()
    seen: list[int] = []

    def interrupted(running: object, _deadline: float) -> None:
        seen.append(running.pid)  # type: ignore[attr-defined]
        assert is_running(seen[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "_read_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_child(["sleep", "600"], dict(os.environ), MINUTE)
    assert_ends(seen[0])
    assert children() == before


def children() -> list[str]:
    return sorted(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_environment_sets_threads_and_hides_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    variables = child_environment(3, EXTRA="1")
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "3"
    assert variables["CUDA_VISIBLE_DEVICES"] == ""
    assert variables["PYTHONPATH"].endswith(os.pathsep + "/mine")
    assert variables["EXTRA"] == "1"


WORKER = """
import sys
from benchmarks.common import InputError, answer, run_worker

def work(spec, channel):
    print("noise that must not reach the parent's stdout")
    if spec["bad"]:
        raise InputError("the spec is bad")
    answer(channel, {"doubled": 2 * spec["value"]})

sys.exit(run_worker({"work": work}, InputError))
"""


@pytest.fixture
def worker_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    (tmp_path / "a_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return child_environment(1)


def test_a_worker_answers_on_a_clean_channel(worker_environment: dict[str, str]) -> None:
    record, result = run_python("a_worker", "work", {"bad": False, "value": 21}, worker_environment, MINUTE)
    assert record == {"doubled": 42}
    assert result.stdout.count("\n") == 1
    assert "noise" in result.stderr


def test_what_a_worker_says_about_its_input_is_an_input_error(worker_environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"^the spec is bad$"):
        run_python("a_worker", "work", {"bad": True}, worker_environment, MINUTE)


def test_a_fault_of_a_worker_shows_its_traceback(worker_environment: dict[str, str]) -> None:
    with pytest.raises(BenchmarkError, match=r"a_worker ended with exit code 1:[\s\S]*KeyError: 'value'"):
        run_python("a_worker", "work", {"bad": False}, worker_environment, MINUTE)
