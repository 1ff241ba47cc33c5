"""`qengine serve` that cannot start, and Ctrl-C before it has: exit codes, one line that says why, no orphans."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors import safe_open

from qengine import cli
from tests.serving.rank_server import FIXTURE, ROOT, children, is_alive, own_ranks
from tests.serving.test_server import free_port
from tests.waiting import wait_until

#: What starts may take at most, on a machine that does nothing else: a guard against hangs, no measurement.
SECONDS = 60.0


@pytest.fixture(autouse=True)
def _clean_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QENGINE_LOG_LEVEL", "QENGINE_API_KEY", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


# Models that are broken


def copied(folder: Path) -> Path:
    shutil.copytree(FIXTURE, folder, dirs_exist_ok=True)
    return folder


def without_a_shard(folder: Path) -> None:
    weights = copied(folder) / "model.safetensors"
    with safe_open(weights, "np") as file:
        names = sorted(file.keys())
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weights.rename(folder / shards[0])
    index = {"weight_map": {name: shards[place % 2] for place, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_short(folder: Path) -> None:
    weights = copied(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def with_a_tensor_of_another_dtype(folder: Path) -> None:
    weights = copied(folder) / "model.safetensors"
    content = weights.read_bytes()
    header_len = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_len])
    header["model.norm.weight"]["dtype"] = "I16"
    spoiled = json.dumps(header, separators=(",", ":")).encode().ljust(header_len)
    weights.write_bytes(len(spoiled).to_bytes(8, "little") + spoiled + content[8 + header_len :])


def with_a_torn_tokenizer(folder: Path) -> None:
    (copied(folder) / "tokenizer.json").write_text("{")


def with_a_torn_config(folder: Path) -> None:
    (copied(folder) / "config.json").write_text('{"architectures": ')


def of_an_unknown_kind(folder: Path) -> None:
    config = json.loads((copied(folder) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Evil"], "auto_map": {"A": "evil.B"}}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def empty(folder: Path) -> None:
    folder.mkdir(exist_ok=True)


def with_a_pickle(folder: Path) -> None:
    copied(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BROKEN: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (without_a_shard, ("model-00002-of-00002.safetensors", "download")),
    (cut_short, ("model.safetensors", "cut short")),
    (with_a_tensor_of_another_dtype, ("model.norm.weight is I16", "expected F16")),
    (with_a_torn_tokenizer, ("tokenizer.json", "download")),
    (with_a_torn_config, ("config.json",)),
    (of_an_unknown_kind, ("Evil",)),
    (empty, ("holds no weights",)),
    (with_a_pickle, ("pytorch_model.bin", "safetensors")),
]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a refused start says, in one line."""
    assert cli.main(["serve", *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(("spoil", "says"), BROKEN, ids=[spoil.__name__ for spoil, _ in BROKEN])
def test_broken_models(
    spoil: Callable[[Path], None], says: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(tmp_path / "model")
    message = run(capsys, str(tmp_path / "model"), "--port", "0", "--device", "cpu")
    assert [words for words in says if words not in message] == []
    assert not (tmp_path / "model" / "ran").exists()
    assert "evil" not in sys.modules


def test_models_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("nothing", "dangling", f"{FIXTURE}/config.json"):
        assert name in run(capsys, str(tmp_path / name), "--port", "0")


# Options. `serve MODEL --port 0` comes before each.

OPTIONS: list[tuple[tuple[str, ...], str]] = [
    *((("--port", port), f"--port is '{port}', expected") for port in ("-1", "70000", "abc", "1.5", "")),
    (("--device", "tpu"), "--device is 'tpu'"),
    (("--dtype", "int3"), "--dtype is 'int3'"),
    *((("-tp", size), f"--tensor-parallel-size is {size}, expected") for size in ("0", "-1")),
    (("-tp", "99"), "--tensor-parallel-size 99"),
    (("-tp", "9"), "--tensor-parallel-size is 9, but the model has 4 query heads"),
    (("-tp", "many"), "--tensor-parallel-size is 'many'"),
    (("-pp", "7"), "--pipeline-parallel-size is 7, but the model has 3 layers"),
    *((("--max-model-len", value), f"--max-model-len is {value}, expected") for value in ("0", "-1")),
    (("--max-model-len", "1000000000000"), "at most 1024 positions"),
    *(
        (("--gpu-memory-utilization", value), "--gpu-memory-utilization is")
        for value in ("0", "1.5", "nan", "-1", "inf", "x")
    ),
    *((("--kv-cache-memory-bytes", value), "KV cache") for value in ("1KiB", "999TiB")),
    (("--max-num-seqs", "0"), "--max-num-seqs is 0"),
    (("--max-num-batched-tokens", "-5"), "--max-num-batched-tokens is -5"),
    (("--block-size", "7"), "--block-size is 7"),
    *((("--host", host), f"--host {host} lets other machines") for host in ("0.0.0.0", "::", "10.0.0.1")),
    (("--host", "no.such.host.invalid", "--allow-no-auth"), "--host no.such.host.invalid is no address"),
    (("--api-key", ""), "a key is empty"),
    (("--api-key", "abc"), "3 characters long"),
    (("--api-key", "a b c d"), "printable ASCII"),
    (("--api-key-file", "/nonexistent"), "--api-key-file /nonexistent"),
    (("--uds", "/nonexistent/socket"), "--uds"),
    (("--tokenizer", "/nonexistent"), "/nonexistent has no tokenizer"),
    (("--chat-template", "/nonexistent"), "--chat-template '/nonexistent'"),
    (("--config", "/nonexistent"), "--config /nonexistent"),
    (("--quantization", "gguf"), "AWQ"),
    (("--load-format", "pickle"), "--load-format is 'pickle'"),
    (("--step-timeout", "0"), "--step-timeout is 0"),
    (("--max-queue", "-1"), "--max-queue is -1"),
    (("--drain-timeout", "nan"), "--drain-timeout is nan"),
    (("--nonsense",), "unknown flag --nonsense"),
    (("another-model",), "takes one MODEL"),
]


@pytest.mark.parametrize(("words", "says"), OPTIONS, ids=lambda value: " ".join(value)[:50] if value else "nothing")
def test_bad_options(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = () if words[0] in ("--uds", "--host") else ("--port", "0")
    assert says in run(capsys, FIXTURE, *first, *words)
    assert own_ranks() == []


@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia"), reason="this machine has a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device is 'cuda', but torch sees no CUDA GPU" in run(capsys, FIXTURE, "--port", "0", "--device", "cuda")


def test_a_key_is_in_no_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", FIXTURE, "--api-key", "a-secret with space", "--port", "0"]) == 2
    assert "a-secret" not in capsys.readouterr().err


# Processes


@contextmanager
def started(*words: str, module: str = "qengine", **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A process of its own session, as in a terminal; nothing of it is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **more,
    )
    try:
        with process:
            yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_busy_port_as_a_user_meets_it(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        with started("serve", FIXTURE, "--port", port) as process:
            out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out, "Traceback" in err) == (2, "", False)
        assert f"cannot listen on 127.0.0.1:{port}" in err.splitlines()[-1]
        assert cli.main(["serve", FIXTURE, "--port", port, "--debug"]) == 2
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ctrl_c_while_the_model_loads(num_ranks: int) -> None:
    port = str(free_port())
    words = ("serve", FIXTURE, "--device", "cpu", "--port", port, "-tp", str(num_ranks))

    def is_loading() -> bool:
        try:
            response = httpx.get(f"http://127.0.0.1:{port}/health", timeout=SECONDS)
        except httpx.ConnectError:
            return False
        assert response.json()["status"] == "loading"
        return num_ranks == 1 or len(children(process.pid)) == num_ranks

    with started(*words, module="tests.serving.stalled_serve") as process:
        wait_until(is_loading, SECONDS)
        time.sleep(0.2)
        ranks = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, "Traceback" in err) == (130, False)
    wait_until(lambda: not any(is_alive(pid) for pid in ranks), 10.0)


def test_ctrl_c_while_everything_is_still_imported() -> None:
    code = (
        "import sys, time; from qengine.interrupts import leave_at_once; leave_at_once(); print('now', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    print('something takes it for its own')"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (130, "")


def test_a_path_and_a_prompt_of_any_kind_where_the_language_is_c(tmp_path: Path) -> None:
    name = "with spaces, 'quotes\"\nnewlines, 天空 🙂 é"
    copied(tmp_path / name)
    environment = {"PATH": os.environ["PATH"], "LANG": "C", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    words = ("generate", name, "--device", "cpu", "--prompt", f"{name}\n", "--max-tokens", "3")
    done = subprocess.run(
        [sys.executable, "-m", "qengine", *words], cwd=tmp_path, env=environment, capture_output=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stdout
    assert b"Traceback" not in done.stderr
