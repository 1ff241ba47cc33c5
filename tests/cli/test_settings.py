"""Options to settings: keys, certificates, prompts, and what is refused before anything is loaded."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest

from qengine.commands.parsing import parse
from qengine.commands.settings import (
    ChatSettings,
    GenerateSettings,
    ServeSettings,
    chat_settings,
    generate_settings,
    serve_settings,
)
from qengine.errors import ConfigError, RequestError
from qengine.serving.options import ServerOptions


def serve(*words: str) -> ServeSettings:
    return serve_settings(parse("serve", words))


def generate(*words: str) -> GenerateSettings:
    return generate_settings(parse("generate", words))


def chat(*words: str) -> ChatSettings:
    return chat_settings(parse("chat", words))


def key_file(folder: Path, text: str, mode: int = 0o600) -> str:
    file = folder / "keys.txt"
    file.write_text(text)
    file.chmod(mode)
    return str(file)


def test_serve_without_flags() -> None:
    settings = serve()
    assert settings.engine.load.model is None
    assert settings.server == ServerOptions()


def test_serve_sorts_options_into_engine_and_server() -> None:
    settings = serve("m", "--port", "1", "--max-model-len", "1K", "--served-model-name", "a", "b", "--dtype", "half")
    assert settings.engine.load.model == "m"
    assert settings.engine.load.dtype == "float16"
    assert settings.engine.scheduler.max_model_len == 1024
    assert settings.server == ServerOptions(port=1, served_model_names=("a", "b"))


@pytest.mark.parametrize(
    "words",
    [["https://a.example", "https://b.example:8443"], ['["https://a.example", "https://b.example:8443"]']],
    ids=["words", "vLLM's JSON"],
)
def test_origins_may_be_given_either_way(words: list[str]) -> None:
    origins = serve("m", "--allowed-origins", *words).server.allowed_origins
    assert origins == ("https://a.example", "https://b.example:8443")


def test_what_clients_may_ask_reaches_the_server() -> None:
    words = "--strict --max-prompts-per-request 4 --enable-prompt-logprobs --max-logprobs 3"
    assert serve(*words.split()).server == ServerOptions(
        strict=True, max_prompts_per_request=4, enable_prompt_logprobs=True, max_logprobs=3
    )


def test_monitoring_and_limits_reach_the_server() -> None:
    words = "--metrics-prefix vllm: --metrics-no-auth --otlp-endpoint http://h:4318/v1/traces --queue-timeout 1.5"
    more = "--request-timeout 60 --max-concurrency-per-key 2 --api-key some-key"
    assert serve(*words.split(), *more.split()).server == ServerOptions(
        metrics_prefix="vllm:",
        metrics_no_auth=True,
        otlp_endpoint="http://h:4318/v1/traces",
        queue_timeout=1.5,
        request_timeout=60.0,
        max_concurrency_per_key=2,
        api_keys=("some-key",),
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--allowed-origins", "[1]"], "--allowed-origins is '[1]', expected origins or a JSON list of them"),
        (["--allowed-origins", "["], "--allowed-origins is '['"),
        (["--allowed-origins", "a.example"], "--allowed-origins has 'a.example', expected a site without a path"),
        (["--metrics-prefix", "two words"], "--metrics-prefix is 'two words', expected letters"),
        (["--otlp-endpoint", "localhost:4317"], "--otlp-endpoint is 'localhost:4317', expected the URL of a collector"),
        (["--queue-timeout", "0"], "queue_timeout is 0"),
        (["--max-prompts-per-request", "0"], "max_prompts_per_request is 0"),
        (["--max-concurrency-per-key", "2"], "max_concurrency_per_key needs keys to count by"),
        (["--max-model-len", "-1"], "max_model_len is -1"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--gpu-memory-utilization", "0"], "gpu_memory_utilization is 0"),
        (["--gpu-memory-utilization", "1.5"], "gpu_memory_utilization is 1.5"),
        (["--gpu-memory-utilization", "nan"], "gpu_memory_utilization is nan"),
        (["--tensor-parallel-size", "0"], "tensor_parallel_size is 0"),
        (["-tp", "100"], "is 100 processes, expected at most 64"),
        (["-pp", "-1"], "pipeline_parallel_size is -1"),
        (["--step-timeout", "nan"], "step_timeout is nan"),
        (["--kv-cache-dtype", "int4"], "kv_cache_dtype is 'int4'"),
        (["--kv-cache-dtype", "int8", "--block-size", "1"], "block_size is 1, but a KV cache of int8 pairs tokens"),
        (["--dtype", "int3"], "dtype is 'int3'"),
        (["-q", "marlin"], "quantization is 'marlin'"),
        (["--block-size", "17"], "block_size is 17"),
        (["--seed", "-1"], "seed is -1"),
        (["--uds", "/run/q.sock", "--port", "1"], "--uds takes the place of --host and --port"),
        (["--ssl-keyfile", "/absent"], "--ssl-keyfile needs --ssl-certfile too"),
        (["--ssl-keyfile", "/absent", "--ssl-certfile", "/absent"], "--ssl-keyfile: no file at '/absent'"),
        (["--api-key", ""], "--api-key: a key is empty, expected at least 4 characters"),
        (["--api-key", "abc"], "--api-key: a key is 3 characters long, expected at least 4"),
        (["--api-key", "ab cd"], "characters other than printable ASCII"),
        (["--api-key", "schlüssel"], "characters other than printable ASCII"),
        (["--api-key-file", "/absent"], "--api-key-file /absent: No such file or directory"),
        (["--api-key-file", "/"], "--api-key-file: '/' is not a file"),
    ],
)
def test_serve_refuses(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        serve(*words)
    assert message in str(caught.value)


def test_keys_come_from_flags_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QENGINE_API_KEY", "from-environment")
    file = key_file(tmp_path, "in-file-1\n\n  in-file-2  \nfrom-environment\n")
    keys = serve("m", "--api-key", "given-1", "given-2", "--api-key-file", file).server.api_keys
    assert keys == ("given-1", "given-2", "in-file-1", "in-file-2", "from-environment")
    assert "visible to this machine's users" in caplog.text
    assert not any(key in caplog.text for key in keys)


def test_a_private_key_file_brings_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert serve("--api-key-file", key_file(tmp_path, "secret\n")).server.api_keys == ("secret",)
    assert not caplog.records


def test_a_readable_key_file_brings_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    serve("--api-key-file", key_file(tmp_path, "secret\n", 0o644))
    assert "other users may read" in caplog.text
    assert "chmod 600" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("content", ["", "\n \n", "abc\n"])
def test_a_key_file_without_good_keys(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"holds no key|is 3 characters long"):
        serve("--api-key-file", key_file(tmp_path, content))


def test_a_key_of_the_config_file_is_not_in_the_process_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("api-key: secret\nport: 1\n")
    assert serve("--config", str(config)).server.api_keys == ("secret",)
    assert not caplog.records


def test_a_short_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QENGINE_API_KEY", "abc")
    with pytest.raises(ConfigError, match="QENGINE_API_KEY: a key is 3 characters long"):
        serve()


def test_trust_remote_code_says_that_it_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert serve("--trust-remote-code") == serve()
    assert caplog.text.count("--trust-remote-code has no effect") == 1


# generate and chat


def test_generate_reads_its_flags() -> None:
    settings = generate(
        "m", "--prompt", "Hi", "--temperature", "0", "--stop", "a", "--stop", "b", "--seed", "7", "--json"
    )
    assert settings.prompts == ("Hi",)
    assert settings.sampling == {"max_tokens": 256, "temperature": 0.0, "stop": ("a", "b"), "seed": 7}
    assert settings.engine.load.seed == 7
    assert settings.as_json
    assert not settings.use_chat_template


def test_flags_not_given_leave_the_models_sampling_alone() -> None:
    assert generate("--prompt", "Hi").sampling == {"max_tokens": 256}
    assert chat().sampling == {"max_tokens": None}


def test_generate_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("größe\n".encode()), encoding="ascii"))
    assert generate("--prompt", "One", "--prompt", "-").prompts == ("One", "größe\n")


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"a\xff", "not UTF-8 text \\(byte 1\\)")])
def test_bad_standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes, message: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(ConfigError, match=message):
        generate("--prompt", "-")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to continue; give --prompt TEXT"),
        (["--prompt", "-", "--prompt", "-"], "standard input can be read once"),
        (["--prompt", "\udcff"], "--prompt is not valid UTF-8"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "x", "--top-p", "0"], "top_p is 0.0"),
        (["--prompt", "x", "--top-k", "-2"], "top_k is -2"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens is 0"),
        (["--prompt", "x", "--stop", ""], "stop is ''"),
    ],
)
def test_generate_refuses(words: list[str], message: str) -> None:
    with pytest.raises((ConfigError, RequestError)) as caught:
        generate(*words)
    assert message in str(caught.value)


def test_chat_reads_its_flags() -> None:
    settings = chat("m", "--system", "Be brief.", "--max-tokens", "5", "--top-p", "0.5")
    assert settings.system == "Be brief."
    assert settings.sampling == {"max_tokens": 5, "top_p": 0.5}
