"""argv and config files to options: what is accepted, what is refused and how the refusal reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qengine.commands.flags import COMMANDS, ENGINE_GROUPS, Flag, length
from qengine.commands.parsing import help_text, overview, parse
from qengine.config import EngineConfig
from qengine.errors import ConfigError


def options(line: str, command: str = "serve") -> dict[str, Any]:
    return dict(parse(command, line.split()).options)


def test_nothing_given_sets_nothing() -> None:
    assert options("") == {}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("models/llama", {"model": "models/llama"}),
        ("--port 9000 models/llama", {"port": 9000, "model": "models/llama"}),
        ("models/llama --port=9000", {"port": 9000, "model": "models/llama"}),
        ("--port 0", {"port": 0}),
        ("--enforce-eager models/llama", {"enforce_eager": True, "model": "models/llama"}),
        ("-q awq -tp 1 -pp 1", {"quantization": "awq", "tensor_parallel_size": 1, "pipeline_parallel_size": 1}),
        ("--enable-prefix-caching", {"enable_prefix_caching": True}),
        ("--no-enable-prefix-caching", {"enable_prefix_caching": False}),
        ("--max-model-len 1k", {"max_model_len": 1000}),
        ("--max-model-len 1K", {"max_model_len": 1024}),
        ("--max-model-len auto", {"max_model_len": "auto"}),
        ("--max-num-seqs 1k --max-num-batched-tokens 2K", {"max_num_seqs": 1000, "max_num_batched_tokens": 2048}),
        ("--kv-cache-memory-bytes 24GB", {"kv_cache_memory_bytes": 24 * 2**30}),
        ("--gpu-memory-limit 22", {"gpu_memory_limit": 22 * 2**30}),
        ("--gpu-memory-utilization 0.5", {"gpu_memory_utilization": 0.5}),
        ("m --served-model-name a b", {"model": "m", "served_model_name": ("a", "b")}),
        ("m --served-model-name a --served-model-name b", {"model": "m", "served_model_name": ("a", "b")}),
        ("m --api-key k1 --api-key k2", {"model": "m", "api_key": ("k1", "k2")}),
        ("--seed 1 --seed 2", {"seed": 2}),
        ("--port 1 -- -odd-name", {"port": 1, "model": "-odd-name"}),
    ],
)
def test_flags_become_options(line: str, expected: dict[str, Any]) -> None:
    assert options(line) == expected


def test_repeated_prompts_leave_the_model_alone() -> None:
    found = parse("generate", ["--prompt", "One two", "models/llama", "--prompt", "-"]).options
    assert found == {"prompt": ("One two", "-"), "model": "models/llama"}


@pytest.mark.parametrize("flag", ["--api-key", "--served-model-name"])
def test_a_greedy_flag_never_takes_the_model(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} was given several values and there is no MODEL"):
        options(f"{flag} first models/llama")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--prot 9000", "unknown flag --prot; did you mean '--port'?"),
        ("--max-modellen=5", "unknown flag --max-modellen; did you mean '--max-model-len'?"),
        ("--enable-prefix", "unknown flag --enable-prefix; did you mean '--enable-prefix-caching'?"),
        ("-x", "unknown flag -x"),
        ("--tensor-parallel 2", "unknown flag --tensor-parallel; did you mean '--tensor-parallel-size'?"),
        ("--prompt x", "--prompt is a flag of 'qengine generate', not of 'qengine serve'"),
        ("one two", "serve takes one MODEL, but was given 'one' and 'two'"),
        ("--port", "--port: expected one argument"),
        ("--port 70000", "--port is '70000', expected a whole number from 0"),
        ("--port abc", "--port is 'abc', expected a whole number from 0"),
        ("--port -1", "--port is '-1', expected a whole number from 0"),
        ("--max-model-len many", "--max-model-len is 'many', expected a whole number"),
        ("--max-model-len 1.5", "--max-model-len is '1.5', which is not a whole number"),
        ("--gpu-memory-utilization half", "--gpu-memory-utilization is 'half', expected a number"),
        ("--gpu-memory-limit 1X", "--gpu-memory-limit is '1X', expected a memory size"),
        ("--enforce-eager=yes", "--enforce-eager: ignored explicit argument 'yes'"),
        ("--speculative-config {}", "--speculative-config is not available: this version has no speculative decoding"),
    ],
)
def test_refusals(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options(line)
    assert message in str(caught.value)


def test_an_empty_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="MODEL is empty"):
        parse("serve", [""])


def test_auto_is_a_length_only_as_a_whole_word() -> None:
    assert length("auto", "--max-model-len") == "auto"
    with pytest.raises(ConfigError):
        length("automatic", "--max-model-len")


# Config files


def write(folder: Path, text: str, name: str = "config.yaml") -> str:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_a_config_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "model: models/llama\nport: 9000\nmax-model-len: 8K\nenable-prefix-caching: false\n"
        "served-model-name: [a, b]\napi_key: secret\n--gpu-memory-utilization: 0.5\n",
    )
    found = parse("serve", ["--config", file, "--port", "1", "other"])
    assert found.options == {
        "model": "other",
        "port": 1,
        "max_model_len": 8192,
        "enable_prefix_caching": False,
        "served_model_name": ("a", "b"),
        "api_key": ("secret",),
        "gpu_memory_utilization": 0.5,
    }
    assert found.on_command_line == {"model", "port", "config"}


def test_a_json_config_file(tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps({"port": 1, "no-enable-prefix-caching": True}, indent="\t"), "config.json")
    assert options(f"--config {file}") == {"port": 1, "enable_prefix_caching": False}


def test_an_empty_config_file(tmp_path: Path) -> None:
    assert options(f"--config {write(tmp_path, '# nothing')}") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot: 1", "'prot' is not an option of serve; did you mean 'port'?"),
        ("prompt: x", "'prompt' is not an option of serve"),
        ("config: x", "'config' is not an option of serve"),
        ("no-port: 1", "'no-port' is not an option of serve"),
        ("1: 2", "'1' is not an option of serve"),
        ("port: x", "--port is 'x', expected a whole number"),
        ("port:", "'port' is None, expected text"),
        ("port: [1]", "'port' is [1], expected text"),
        ("enforce-eager: 1", "'enforce-eager' is 1, expected true or false"),
        ("api-key: 1234", "'api-key' is 1234, expected text; put it in quotes"),
        ("tokenizer: 7", "'tokenizer' is 7, expected text; put it in quotes"),
        ("seed: true", "'seed' is True, expected text"),
        ("model: 7", "'model' is 7, expected text"),
        ("speculative-config: x", "--speculative-config is not available"),
        ("- port", "holds a list, expected 'flag: value' lines"),
        ("port: [", "is not readable as YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not readable as YAML"),
    ],
)
def test_config_file_refusals(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options(f"--config {write(tmp_path, content)}")
    assert message in str(caught.value)


def test_config_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        options(f"--config {tmp_path / 'absent.yaml'}")
    with pytest.raises(ConfigError, match="Is a directory"):
        options(f"--config {tmp_path}")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        options(f"--config {write(tmp_path, 'port: 1', 'c.json')}")
    (tmp_path / "latin.yaml").write_bytes(b"tokenizer: \xff")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        options(f"--config {tmp_path / 'latin.yaml'}")


# Help


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", [20, 80, 100, 300])
def test_help_names_every_flag_once_and_keeps_its_width(command: str, width: int) -> None:
    text = help_text(command, width)
    for flag in COMMANDS[command].flags.values():
        shown = f"--[no-]{flag.name[2:]}" if flag.kind == "on/off" else flag.name
        entries = [
            line for line in text.splitlines() if line.startswith("  -") and shown in line.replace("=", " ").split()
        ]
        assert len(entries) == (0 if flag.refused else 1), flag.name
    flags_only = text.partition("Examples:")[0]
    assert max(map(len, flags_only.splitlines())) <= max(80, min(width, 110))
    assert "\N{NO-BREAK SPACE}" not in text


def test_the_examples_of_the_help_parse() -> None:
    for command, described in COMMANDS.items():
        for example, _ in described.examples:
            words = example.partition("<")[0].replace('"', "").split()
            assert " ".join(words).startswith(f"qengine {command}")
            if "--prompt" not in words and "--system" not in words:
                parse(command, words[1 + len(command.split()) :])


def test_the_overview_names_every_command() -> None:
    for command in COMMANDS:
        assert f"\n  {command} " in overview()


def _plain_default(flag: Flag) -> object:
    if flag.kind == "on/off":
        return flag.default == "on"
    return flag.parse(flag.default, flag.name)


def test_the_engine_defaults_shown_are_the_ones_used() -> None:
    config = EngineConfig()
    in_words = dict.fromkeys(("quantization", "bits", "group_size", "max_model_len", "max_num_batched_tokens"))
    sections = (config, config.load, config.cache, config.scheduler, config.parallel)
    for group in ENGINE_GROUPS:
        for flag in group.flags:
            if flag.dest == "trust_remote_code":
                continue
            actual = next(getattr(s, flag.dest) for s in sections if hasattr(s, flag.dest))
            if flag.dest in in_words:
                assert actual is in_words[flag.dest]
            elif flag.default:
                assert _plain_default(flag) == actual, flag.name
            else:
                assert not actual, flag.name


def test_flags_and_engine_options_are_the_same() -> None:
    flags = {flag.dest for group in ENGINE_GROUPS for flag in group.flags}
    config = EngineConfig()
    fields = {
        field.name
        for section in (config.load, config.cache, config.scheduler, config.parallel)
        for field in dataclasses.fields(section)
    }
    assert flags - {"trust_remote_code"} == (fields | {"enforce_eager"}) - {"model"}
