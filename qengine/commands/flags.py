"""Every flag of every command, as data: name, meaning, default, and how its text becomes a value.

The help, the parser and the config file are all made from these tables. Invariant: a default shown here is the one
that EngineConfig or ServerOptions uses (a test compares them); nothing here sets it. Nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qengine.config import AUTO, parse_count, parse_limits, parse_memory
from qengine.errors import ConfigError

#: (text, flag name) -> value; raises ConfigError.
Parse = Callable[[str, str], object]
Kind = Literal["value", "switch", "on/off", "list", "repeat"]


def text(value: str, flag: str) -> str:
    if not value.strip():
        raise ConfigError(f"{flag} is empty; give a value or leave the flag out")
    return value


def any_text(value: str, flag: str) -> str:
    """Text that may be empty: what it means is checked where it is used."""
    return value


def count(value: str, flag: str) -> int:
    return parse_count(value, flag)


def memory(value: str, flag: str) -> int:
    return parse_memory(value, flag)


def limits(value: str, flag: str) -> object:
    return parse_limits(value, flag)


def number(value: str, flag: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{flag} is '{value}', expected a number such as 0.9") from None


def bound(value: str, flag: str) -> str:
    """NAME:MILLISECONDS, which no model is called; the names are checked where they are used."""
    if ":" not in value:
        raise ConfigError(f"{flag} is '{value}', expected NAME:MILLISECONDS such as ttft:1000")
    return value


def length(value: str, flag: str) -> int | str:
    return AUTO if value == AUTO else parse_count(value, flag)


def port(value: str, flag: str) -> int:
    if not value.strip().isdecimal() or not int(value) <= 65535:
        raise ConfigError(f"{flag} is '{value}', expected a whole number from 0 (any free port) to 65535")
    return int(value)


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag. `kind` "on/off" also has a --no- form; "list" takes several values; it and "repeat" may be repeated.

    `refused` says why this version has no such feature: the flag is known, not shown, and an error when given.
    """

    name: str
    help: str = ""
    metavar: str = ""
    parse: Parse = text
    default: str = ""
    short: str = ""
    kind: Kind = "value"
    refused: str = ""

    @property
    def dest(self) -> str:
        """The option's name in Python: "--max-model-len" is "max_model_len"."""
        return self.name[2:].replace("-", "_")

    @property
    def names(self) -> tuple[str, ...]:
        """All the ways to write it."""
        negated = (f"--no-{self.name[2:]}",) if self.kind == "on/off" else ()
        return (self.name, *negated, *((self.short,) if self.short else ()))


@dataclass(frozen=True, slots=True)
class Group:
    """Flags under one heading of the help."""

    title: str
    flags: tuple[Flag, ...]


def _switch(name: str, help: str) -> Flag:
    return Flag(name, help, kind="switch")


# What several commands take

_ENFORCE_EAGER = _switch("--enforce-eager", "no CUDA graphs")
_JSON_INSTEAD = _switch("--json", "one JSON object instead of a table")
_FIGURES = Flag("--json", "write the figures there", "FILE")
_SERVER_KEY = Flag(
    "--api-key", "the key that the server asks for; QENGINE_API_KEY keeps it out of sight", "KEY", any_text
)
_INPUT_LEN = Flag("--random-input-len", "tokens of each prompt", "N", count, default="128")
_OUTPUT_LEN = Flag("--random-output-len", "tokens of each answer", "N", count, default="64")


MODEL_FLAGS = Group(
    "Model",
    (
        Flag("--tokenizer", "folder with another tokenizer", "PATH"),
        Flag(
            "--quantization",
            "awq, gptq, compressed-tensors or gguf; must agree with the file",
            "METHOD",
            default="read",
            short="-q",
        ),
        Flag("--dtype", "compute in auto, half, float16, bfloat16 or float32", "DTYPE", default="auto"),
        Flag("--load-format", "auto, or dummy: random weights of the right shapes", "FORMAT", default="auto"),
        Flag("--bits", "of dummy weights", "N", count, default="the config's, or 4"),
        Flag("--group-size", "of dummy weights; -1 for one group", "N", count, default="the config's, or 128"),
        _switch("--verify", "compare every file with the folder's manifest.json (SHA-256) before it is loaded"),
        _switch("--skip-check", "serve even if the weights compute NaN or infinity at the start"),
        Flag("--chat-template", "Jinja file to use instead of the model's own template", "FILE"),
        Flag(
            "--generation-config",
            "where sampling defaults come from: auto (the model), none, or a folder",
            "WHERE",
            default="auto",
        ),
        Flag("--seed", "for requests that give none", "N", count, default="0"),
        _switch("--trust-remote-code", "accepted, without effect: code from a checkpoint is never run"),
    ),
)

MEMORY_FLAGS = Group(
    "Memory and context",
    (
        Flag(
            "--max-model-len",
            "prompt and output in tokens; 8k = 8000, 8K = 8192, auto = the largest that fits",
            "LEN",
            length,
            default="the model's",
        ),
        Flag("--kv-cache-memory-bytes", "size of the KV cache, such as 4GiB or 512MiB", "SIZE", memory),
        Flag(
            "--kv-cache-dtype",
            "auto (the compute dtype), float16, bfloat16, float32; half as large: int8, fp8 (e4m3), fp8_e5m2",
            "DTYPE",
            default="auto",
        ),
        Flag("--block-size", "tokens per KV block", "N", count, default="16"),
        Flag(
            "--enable-prefix-caching",
            "reuse the KV of prompts that begin alike",
            kind="on/off",
            default="on",
        ),
        Flag("--gpu-memory-utilization", "share of a GPU's memory to use", "SHARE", number, default="0.92"),
        Flag("--gpu-memory-limit", "the same as a size, such as 22GiB, or 22,23.5 per card", "SIZE", limits),
    ),
)

BATCH_FLAGS = Group(
    "Batching",
    (
        Flag("--max-num-seqs", "sequences in one step", "N", count, default="256"),
        Flag(
            "--max-num-batched-tokens",
            "tokens in one step; longer prompts are computed in parts",
            "N",
            count,
            default="2048; 256 on a CPU",
        ),
    ),
)

DEVICE_FLAGS = Group(
    "Devices",
    (
        Flag("--device", "auto (a GPU if there is one), cpu or cuda", "DEVICE", default="auto"),
        Flag("--tensor-parallel-size", "devices that share each layer", "N", count, default="1", short="-tp"),
        Flag("--pipeline-parallel-size", "devices that share the layers", "N", count, default="1", short="-pp"),
        Flag(
            "--step-timeout",
            "seconds after which a step of several devices counts as hung and the engine stops",
            "SECONDS",
            number,
            default="60",
        ),
        Flag("--p2p", "whether cards copy to each other: auto (checked once), on or off", "MODE", default="auto"),
        _ENFORCE_EAGER,
    ),
)

ENGINE_GROUPS = (MODEL_FLAGS, MEMORY_FLAGS, BATCH_FLAGS, DEVICE_FLAGS)

ADDRESS_FLAGS = Group(
    "Address and access",
    (
        Flag("--host", "address to listen on; all but this machine's own need an API key", "HOST", default="127.0.0.1"),
        Flag("--port", "0 picks a free one and prints it", "PORT", port, default="8000"),
        Flag("--uds", "listen on a unix socket instead of host and port", "PATH"),
        Flag(
            "--api-key",
            "key that clients must send; several allowed, 4 characters at least",
            "KEY",
            any_text,
            kind="list",
        ),
        Flag("--api-key-file", "file with one key per line", "FILE"),
        _switch("--allow-no-auth", "listen beyond this machine without a key"),
        Flag("--ssl-keyfile", "private key for HTTPS", "FILE"),
        Flag("--ssl-certfile", "certificate for HTTPS", "FILE"),
    ),
)

SERVER_FLAGS = Group(
    "API",
    (
        Flag("--served-model-name", "name or names of the model in the API", "NAME", default="the path", kind="list"),
        Flag("--max-logprobs", "most log-probabilities per token that a request may ask for", "N", count, default="20"),
        _switch("--enable-prompt-logprobs", "let requests ask for log-probabilities of their prompt (prompt_logprobs)"),
        Flag("--max-prompts-per-request", "prompts of one completions or embeddings call", "N", count, default="256"),
        _switch("--strict", "refuse fields that this server does not know; else they are ignored"),
        Flag("--max-queue", "requests that may wait; more get status 429", "N", count, default="128"),
        Flag(
            "--drain-timeout", "seconds that running requests get to finish at SIGTERM", "SECONDS", number, default="30"
        ),
        Flag("--queue-timeout", "a request that waits longer gets status 503", "SECONDS", number),
        Flag("--request-timeout", "a request that takes longer, from arrival to end, is stopped", "SECONDS", number),
        Flag("--max-concurrency-per-key", "requests under way with one key; more get status 429", "N", count),
        Flag(
            "--allowed-origins",
            "web sites whose pages may use the server, such as https://example.org; * is any",
            "URL",
            any_text,
            kind="list",
        ),
        Flag("--speculative-config", refused="this version has no speculative decoding"),
    ),
)

MONITORING_FLAGS = Group(
    "Monitoring",
    (
        Flag("--metrics-prefix", "of names at /metrics; vllm: suits vLLM's dashboards", "PREFIX", default="qengine:"),
        _switch("--metrics-no-auth", "serve /metrics without a key"),
        Flag("--otlp-endpoint", "send traces there, such as http://localhost:4318/v1/traces", "URL"),
    ),
)

SAMPLING_FLAGS = Group(
    "Sampling",
    (
        Flag("--temperature", "0 always takes the likeliest token", "T", number, default="the model's, or 1"),
        Flag("--top-p", "keep the likeliest tokens up to this probability", "P", number, default="the model's, or 1"),
        Flag("--top-k", "keep the K likeliest tokens; 0 keeps all", "K", count, default="the model's, or 0"),
        Flag("--stop", "text that ends the answer; several allowed by repeating it", "TEXT", any_text, kind="repeat"),
    ),
)

PROMPT_FLAGS = Group(
    "Prompt and output",
    (
        Flag(
            "--prompt",
            "text to continue, - reads it from standard input; repeat it for several",
            "TEXT",
            any_text,
            kind="repeat",
        ),
        _switch("--chat", "send the prompt as a user's message, through the model's chat template"),
        Flag("--max-tokens", "most tokens to generate", "N", count, default="256"),
        _switch("--json", "one JSON object per prompt and line instead of text"),
    ),
)

CHAT_FLAGS = Group(
    "Conversation",
    (
        Flag("--url", "talk to a server instead; MODEL is then its name there, or left out", "URL"),
        _SERVER_KEY,
        Flag("--system", "system message that the conversation starts with", "TEXT"),
        Flag("--max-tokens", "most tokens in one answer", "N", count, default="what the context holds"),
    ),
)

LOAD_FLAGS = Group(
    "Load",
    (
        Flag("--url", "load this server; left out, one is started with the flags below", "URL"),
        _SERVER_KEY,
        Flag(
            "--request-rate",
            "requests per second, at random times; several are measured in turn, inf sends all at once",
            "RATE",
            number,
            default="inf",
            kind="list",
        ),
        Flag("--num-prompts", "requests per rate", "N", count, default="100"),
        _INPUT_LEN,
        _OUTPUT_LEN,
        Flag("--vocab-size", "random prompts use token ids below this", "N", count, default="1000"),
        Flag("--dataset-path", 'prompts from a file instead, with a JSON object {"prompt": ...} per line', "FILE"),
        Flag(
            "--goodput",
            "bounds in ms for ttft, tpot or e2el, such as ttft:1000 tpot:100; requests within all of them count",
            "BOUND",
            bound,
            kind="list",
        ),
        _FIGURES,
        Flag("--plot", "draw them there: .png, .svg or .pdf (needs matplotlib)", "FILE"),
    ),
)
OFFLINE_FLAGS = Group(
    "Load",
    (
        Flag("--batch", "sequences to decode at once; several are measured in turn", "N", count, "1 16", kind="list"),
        _INPUT_LEN,
        _OUTPUT_LEN,
        Flag("--runs", "readings of each figure; the median counts", "N", count, default="3"),
        _FIGURES,
    ),
)

#: Cards whose figures are known without one there (a test compares with quant_kernels, which is too heavy to ask here).
CARD_NAMES = ("3090", "4090", "5090", "a100", "h100")
#: What their driver shows to a program, in GiB: the least that has been seen, since newer drivers keep more.
CARD_MEMORY = {"3090": 23.57, "4090": 23.52, "5090": 31.36, "a100": 79.14, "h100": 79.10}

_READ_AS = ("--quantization", "--dtype", "--load-format", "--bits", "--group-size")
INSPECT_FLAGS = Group(
    "What to look at",
    (
        Flag("--gpu", f"a card that need not be there: {', '.join(CARD_NAMES)}", "NAME", default="this machine's"),
        Flag("--device", "cpu leaves this machine's GPU aside", "DEVICE", default="auto"),
        Flag("--rows", "sequences in the decode step", "N", count, default="1"),
        Flag("--bandwidth", "of the memory in GB/s, for the bound", "GB/s", number, default="the card's, if known"),
        _JSON_INSTEAD,
    ),
)
READ_FLAGS = Group("Model", tuple(flag for flag in MODEL_FLAGS.flags if flag.name in _READ_AS))
PLAN_FLAGS = Group(
    "What to plan for",
    (
        Flag(
            "--gpu",
            f"a size such as 24GB, a card ({', '.join(CARD_MEMORY)}), 24GB,12GB for two, or auto: this machine's",
            "CARDS",
            default="this machine's, or its CPU",
        ),
        Flag(
            "--tensor-parallel-size",
            "cards that share each layer",
            "N",
            count,
            default="1, or all that are named",
            short="-tp",
        ),
        Flag("--pipeline-parallel-size", "stages, each with some of the layers", "N", count, default="1", short="-pp"),
        Flag("--device", "cpu plans for this computer's own memory", "DEVICE", default="auto"),
        _ENFORCE_EAGER,
        _JSON_INSTEAD,
    ),
)
EVALUATE_FLAGS = Group(
    "What to measure",
    (
        Flag("--against", "the original, to compare with: a folder, a .gguf file, a hub id or demo", "MODEL"),
        Flag(
            "--text",
            "builtin, a .txt file (one text), a .jsonl file (a text or conversation per row), or a dataset of the hub",
            "TEXT",
            default="builtin",
        ),
        Flag("--window", "tokens that the model reads together", "N", count, default="2048, or the model's context"),
        Flag("--stride", "tokens from window to window; what overlaps is context", "N", count, default="the window"),
        Flag("--max-tokens", "most tokens of the text, from its start", "N", count, default="all"),
        _JSON_INSTEAD,
    ),
)
_RUN_AS = ("--tokenizer", "--quantization", "--dtype", "--verify", "--skip-check")
EVALUATE_MODEL_FLAGS = Group(
    "Model",
    (
        *(flag for flag in MODEL_FLAGS.flags if flag.name in _RUN_AS),
        *(flag for flag in DEVICE_FLAGS.flags if flag.name == "--device"),
        *(flag for flag in MEMORY_FLAGS.flags if flag.name.startswith("--gpu-memory")),
    ),
)
_NOT_PLANNED = ("--enable-prefix-caching",)
PLAN_MEMORY_FLAGS = Group(
    MEMORY_FLAGS.title, tuple(flag for flag in MEMORY_FLAGS.flags if flag.name not in _NOT_PLANNED)
)

QUANTIZE_FLAGS = Group(
    "What to make",
    (
        Flag("--method", "auto, gptq, awq, or rtn: rounding, which needs no calibration", "METHOD", default="gptq"),
        Flag("--bits", "4 or 8", "N", count, default="4"),
        Flag("--group-size", "inputs that share a scale; -1 for one group", "N", count, default="128"),
        _switch("--sym", "the zero point is the middle of the range (gptq's usual)"),
        _switch("--asym", "each group has a zero point (the other methods' usual)"),
        _switch("--act-order", "groups by importance of their inputs (gptq and auto, not in awq's format)"),
        Flag(
            "--format",
            "of the checkpoint: awq, gptq or compressed-tensors",
            "FORMAT",
            default="gptq for gptq, else awq",
        ),
        Flag("--skip", "modules in whose full name this is found stay as they are, such as 'layers\\.0\\.'", "REGEX"),
        _switch("--lm-head", "quantize the output projection too"),
    ),
)
CALIBRATION_FLAGS = Group(
    "Calibration",
    (
        Flag(
            "--calibration", "builtin, FILE.txt, FILE.jsonl (rows with a text), or a hub id", "TEXTS", default="builtin"
        ),
        Flag("--num-samples", "texts to read", "N", count, default="128"),
        Flag("--seq-len", "tokens that longer texts are cut to", "N", count, default="2048"),
    ),
)
RUN_FLAGS = Group(
    "How",
    (
        Flag("--device", "auto, cpu, cuda or cuda:N", "DEVICE", default="auto"),
        _switch("--resume", "go on with what a run that did not end has left"),
        _switch("--evaluate", "measure the result against the original, and write it into its README.md"),
    ),
)
CONVERT_FLAGS = Group(
    "What to make",
    (
        Flag("--format", "awq, gptq, compressed-tensors or dense (unquantized)", "FORMAT"),
        Flag("--dtype", "of what is not quantized: float16 or bfloat16", "DTYPE", default="as it is, or the config's"),
    ),
)

GENERAL_FLAGS = Group(
    "General",
    (
        Flag("--config", "YAML or JSON file with flag names as keys; the command line wins", "FILE"),
        _switch("--debug", "show tracebacks and debug messages"),
        Flag("--help", "show this text", kind="switch", short="-h"),
    ),
)

MODEL_HELP = (
    "a folder, a .gguf file, or a hub id such as organization/name; demo or left out: the bundled SmolLM2-135M-Instruct"
)
SOURCE_HELP = "a folder, a .gguf file, or a hub id; demo is the bundled SmolLM2-135M-Instruct"
OUT_HELP = "the folder to write, which must not exist"


@dataclass(frozen=True, slots=True)
class CommandHelp:
    """What a command takes and says of itself.

    Attributes:
        own_groups: of its flags, before those that every command has.
        words: what stands beside the flags, by option name, with its help; the last ones may be left out only where
            there is one.
    """

    summary: str
    own_groups: tuple[Group, ...]
    examples: tuple[tuple[str, str], ...]
    words: tuple[tuple[str, str], ...] = (("model", MODEL_HELP),)

    @property
    def groups(self) -> tuple[Group, ...]:
        """All of its flags."""
        return (*self.own_groups, GENERAL_FLAGS)

    @property
    def flags(self) -> dict[str, Flag]:
        """By option name; --help is not an option."""
        return {f.dest: f for g in self.groups for f in g.flags if f.dest != "help"}


COMMANDS: dict[str, CommandHelp] = {
    "serve": CommandHelp(
        "Serve a model over HTTP, with OpenAI's API.",
        (ADDRESS_FLAGS, SERVER_FLAGS, MONITORING_FLAGS, *ENGINE_GROUPS),
        (
            ("qengine serve", "the bundled model, on http://127.0.0.1:8000"),
            ("qengine serve ./Qwen2.5-7B-Instruct-AWQ --max-model-len 16K", "a local 4-bit checkpoint"),
            ("qengine serve model.gguf --port 0 --served-model-name llama", "any free port, a short name"),
            ("qengine serve MODEL --host 0.0.0.0 --api-key-file keys.txt", "for the whole network, with keys"),
        ),
    ),
    "generate": CommandHelp(
        "Continue one prompt, as it comes, or several at once.",
        (PROMPT_FLAGS, SAMPLING_FLAGS, *ENGINE_GROUPS),
        (
            ('qengine generate --prompt "The capital of France is"', "the bundled model"),
            ('qengine generate MODEL --chat --prompt "Why is the sky blue?"', "through the chat template"),
            ("qengine generate MODEL --prompt - --temperature 0 < text.txt", "from standard input"),
            ('qengine generate --prompt "One" --prompt "Two" --json', "two prompts in one batch"),
        ),
    ),
    "chat": CommandHelp(
        "Talk to a model in the terminal. /help lists its commands, Ctrl-C stops an answer, Ctrl-D ends.",
        (CHAT_FLAGS, SAMPLING_FLAGS, *ENGINE_GROUPS),
        (
            ("qengine chat", "the bundled model"),
            ('qengine chat MODEL --system "Answer in one sentence."', "with a system message"),
            ("qengine chat --url http://127.0.0.1:8000", "with a model that is being served"),
        ),
    ),
    "inspect": CommandHelp(
        "Say what would run and what makes it slow, without running the model.",
        (INSPECT_FLAGS, READ_FLAGS),
        (
            ("qengine inspect ./Qwen2.5-7B-Instruct-AWQ --gpu 4090", "on a card that need not be there"),
            ("qengine inspect MODEL --gpu h100 --rows 32", "a step of 32 sequences"),
            ("qengine inspect MODEL --load-format dummy -q gptq", "from a config.json alone"),
            ("qengine inspect --bandwidth 40 --json", "the bundled model on this CPU, for a program"),
        ),
    ),
    "plan": CommandHelp(
        "Say where every byte of a card would go and what context fits. Exits with 1 if it does not fit.",
        (PLAN_FLAGS, READ_FLAGS, PLAN_MEMORY_FLAGS, BATCH_FLAGS),
        (
            ("qengine plan ./Qwen2.5-14B-Instruct-AWQ --gpu 24GB", "a card that need not be there"),
            ("qengine plan MODEL --gpu 3090,3090 --max-model-len 16K", "two cards, a context that must fit"),
            ("qengine plan MODEL --gpu 24GB,12GB --kv-cache-dtype int8", "cards that are unlike"),
            ("qengine plan MODEL --gpu 24GB,12GB -pp 2", "the same with some of the layers on each"),
            ("qengine plan DIR --load-format dummy -q awq --gpu 8GB", "from a config.json alone"),
        ),
    ),
    "quantize": CommandHelp(
        "Make a 4-bit checkpoint of a model, one layer in memory at a time; a run that is stopped can go on.",
        (QUANTIZE_FLAGS, CALIBRATION_FLAGS, RUN_FLAGS),
        (
            ("qengine quantize demo ./smol-awq --method awq --group-size 64", "the bundled model"),
            ("qengine quantize ./Qwen3-8B ./Qwen3-8B-GPTQ --calibration texts.jsonl", "calibrated on one's own texts"),
            ("qengine quantize MODEL OUT --method auto --evaluate", "the best method, and what it cost in quality"),
            ("qengine quantize MODEL OUT --resume", "after Ctrl-C, a power cut or a full disk"),
        ),
        (("model", SOURCE_HELP), ("out", OUT_HELP)),
    ),
    "convert": CommandHelp(
        "Write a checkpoint in another format without quantizing it again: every weight stays what it is.",
        (CONVERT_FLAGS,),
        (
            ("qengine convert ./model-gptq ./model-awq --format awq", "from symmetric GPTQ to AWQ, bit for bit"),
            ("qengine convert model.gguf ./model --format dense", "a GGUF file as plain safetensors"),
        ),
        (("model", SOURCE_HELP), ("out", OUT_HELP)),
    ),
    "evaluate": CommandHelp(
        "Measure a model: perplexity, and its divergence from the original that it was made of.",
        (EVALUATE_FLAGS, EVALUATE_MODEL_FLAGS),
        (
            ("qengine evaluate", "the bundled model on the builtin text"),
            ("qengine evaluate OUT --against MODEL", "a quantized model and what it was made of"),
            ("qengine evaluate MODEL --text wiki.test.raw.txt --stride 512", "one's own text, with context"),
            ("qengine evaluate OUT --against MODEL --text chats.jsonl --json", "conversations, for a program"),
        ),
    ),
    "bench serve": CommandHelp(
        "Load a server with requests at random times: latencies, throughput, goodput.",
        (LOAD_FLAGS, *ENGINE_GROUPS),
        (
            ("qengine bench serve --num-prompts 20", "the bundled model, all requests at once"),
            ("qengine bench serve --url http://127.0.0.1:8000 --request-rate 1 2 4 8", "a server, at four rates"),
            ("qengine bench serve MODEL --goodput ttft:1000 tpot:100 --plot load.png", "with bounds and a chart"),
        ),
    ),
    "bench offline": CommandHelp(
        "Time prompts and decoding without a server.",
        (OFFLINE_FLAGS, *ENGINE_GROUPS),
        (
            ("qengine bench offline", "the bundled model"),
            ("qengine bench offline MODEL --batch 1 8 32 --random-input-len 1024", "three widths, long prompts"),
        ),
    ),
}
