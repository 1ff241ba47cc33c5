"""README's section on quantizing, as it stands there, on the bundled model: every command, with few short samples."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from converters.open import open_checkpoint

ROOT = Path(__file__).parents[2]
#: What makes each command small; the rest is README's.
SMALL = {
    "quantize": "--num-samples 4 --seq-len 64 --device cpu",
    "evaluate": "--max-tokens 400 --device cpu --json",
    "serve": "--port 0 --device cpu --max-model-len 256 --max-num-seqs 2",
    "convert": "",
}
PATIENCE = 900
#: One thread: other tests have the other cores, and threads that wait for each other spin.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


def readme_commands() -> dict[str, str]:
    """The words of each `qengine` command of the section, by command."""
    section = (ROOT / "README.md").read_text().split("**Quantize.**")[1].split("\n## ")[0]
    lines = re.findall(r"^\$ qengine (\S+) (.*?)(?: +#.*)?$", section, re.MULTILINE)
    return dict(lines)


def words(name: str) -> list[str]:
    return [sys.executable, "-m", "qengine", name, *readme_commands()[name].split(), *SMALL[name].split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def run(name: str, folder: Path) -> str:
    environment = {**ENVIRONMENT, "HOME": str(folder)}
    done = subprocess.run(
        words(name), cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Its address; killed at the end."""
    process = subprocess.Popen(
        words("serve"), cwd=folder, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    assert process.stdout is not None
    try:
        said = ""
        while (found := re.search(r"address +(http://\S+)", said)) is None:
            line = process.stdout.readline()
            assert line, f"the server did not start: {said}"
            said += line
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield found[1]
    finally:
        watchdog.cancel()
        process.terminate()
        process.wait(60)


def ask(address: str, route: str, body: Any) -> Any:
    request = urllib.request.Request(
        f"{address}{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error


def test_quantize_evaluate_serve_convert(folder: Path) -> None:
    assert list(readme_commands()) == ["quantize", "evaluate", "serve", "convert"]
    said = run("quantize", folder)
    assert "run it: qengine serve" in said
    manifest = json.loads((folder / "smol-awq" / "manifest.json").read_text())
    assert manifest["made_from"] == "SmolLM2-135M-Instruct"
    found = json.loads(run("evaluate", folder))
    assert found["original"]["name"] == "SmolLM2-135M-Instruct"
    assert found["original"]["dtype"] == found["model"]["dtype"]
    # Neither a broken model, which has more than 3, nor one that was compared with itself.
    assert 1e-4 < found["comparison"]["mean_kl"] < 0.5
    assert found["comparison"]["top1_agreement"] > 0.6
    with server(folder) as address:
        message = {"role": "user", "content": "What is the capital of France?"}
        body = {"model": "./smol-awq", "messages": [message], "max_tokens": 24, "temperature": 0.0}
        answer = ask(address, "/v1/chat/completions", body)
        assert "Paris" in answer["choices"][0]["message"]["content"]
    run("convert", folder)
    assert open_checkpoint(folder / "smol-ct").quantization == "compressed-tensors"
