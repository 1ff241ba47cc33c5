"""The whole way on the bundled model, as the README shows it: quantize, evaluate, serve."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900.0
#: Documentation that is not in the builtin calibration.
TEXT = re.__doc__ or ""


def qengine(*words: str | Path) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "qengine", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_the_model_to_the_server(tmp_path: Path) -> None:
    out, text = tmp_path / "smol-awq", tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    few = ("--num-samples", "4", "--seq-len", "64", "--group-size", "64", "--device", "cpu")
    said = qengine("quantize", "demo", out, "--method", "awq", *few)
    assert f"run it: qengine serve {out}" in said

    measured = json.loads(
        qengine("evaluate", out, "--against", "demo", "--text", text, "--max-tokens", "400", "--json")
    )
    assert 0 < measured["comparison"]["mean_kl"] < 0.5
    assert measured["comparison"]["top1_agreement"] > 0.6

    assert "Paris" in capital(out)


def capital(model: Path) -> str:
    """What a server of the model answers when it is asked for the capital of France."""
    command = [sys.executable, "-m", "qengine", "serve", str(model), "--quantization", "awq", "--port", "0"]
    command += ["--device", "cpu", "--max-model-len", "512"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        watchdog = threading.Timer(TIMEOUT_S, server.kill)
        watchdog.start()
        try:
            found = next((url for line in server.stdout if (url := re.search(r"address +(http://\S+)", line))), None)
            assert found is not None, "the server did not start"
            question = {"role": "user", "content": "What is the capital of France?"}
            body = {"model": str(model), "messages": [question], "max_tokens": 20, "temperature": 0.0}
            answer = httpx.post(f"{found[1]}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
        finally:
            watchdog.cancel()
            server.kill()
    content: str = answer.raise_for_status().json()["choices"][0]["message"]["content"]
    return content
