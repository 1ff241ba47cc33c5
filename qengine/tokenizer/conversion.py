"""Tokenizers without a tokenizer.json, converted by transformers in a process of its own.

Which files are read, and at what cost, is then a library's to decide. So it is given copies of those that a tokenizer
is made of, read within bounds, in a folder that holds nothing else, and of configurations only what says which
tokenizer it is. Invariant: nothing from the model's folder is run, no other file is opened, whatever its configuration
names, and what the conversion may take is bounded; what comes of it is judged like any tokenizer.json. The process has
none of the user's keys, and ends with the conversion.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from qengine.environment import for_rank
from qengine.errors import ConfigError, LoadError
from qengine.tokenizer.files import is_there, read_bytes, read_json
from qengine.tokenizer.rust_errors import library_errors, shorten
from qengine.tokenizer.tokenizer_json import MAX_TOKENIZER_BYTES, check_tokenizer_json

#: Files of a tokenizer that only transformers can convert.
SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "tekken.json")
_COMPANIONS = ("merges.txt", "vocab.txt")
#: The largest published: Tekken's, with 19 MB.
_MAX_FILE_BYTES = 2**25
#: What chooses the class. Other keys name files ("fast_tokenizer_files"), are arguments that may be paths ("vocab",
#: "init_inputs"), or name code ("auto_map"), and every version of transformers may add some.
_CLASS_KEYS = frozenset({"model_type", "model_name", "architectures", "tokenizer_class", "transformers_version"})
_TOKEN_KEYS = frozenset({"added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"})
#: The class's options: truth values, numbers, and names of languages.
_OPTION_KEYS = frozenset(
    {
        *("add_prefix_space", "trim_offsets", "errors", "legacy", "legacy_behaviour", "normalize", "normalize_text"),
        *("do_lower_case", "do_lowercase", "strip_accents", "keep_accents", "tokenize_chinese_chars", "remove_space"),
        *("clean_up_tokenization_spaces", "spaces_between_special_tokens", "split_special_tokens", "never_split"),
        *("fix_mistral_regex", "use_default_system_prompt", "model_max_length", "extra_ids", "offset", "unk_id"),
        *("max_input_chars_per_word", "src_lang", "tgt_lang", "language", "task", "padding_side", "truncation_side"),
    }
)
#: With LD_LIBRARY_PATH and its kind the process finds the libraries that this one runs; it needs no key and no token.
_VARIABLES = frozenset({"PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "LD_PRELOAD", "OMP_NUM_THREADS"}) | {
    # Without which some installations of torch cannot be imported.
    "KMP_DUPLICATE_LIB_OK",
    "MKL_THREADING_LAYER",
}
_VARIABLE_KINDS = ("LC_", "PYTHON")
#: How the process ends if it is not with a failure of the library, which is 1.
NO_PACKAGE = 3
NO_MEMORY = 4
#: After which a process is ended that its own alarm has not ended, as one that was stopped.
_GRACE_SECONDS = 10.0
_MAX_SAID_BYTES = 4096
_SAID = "said"


@dataclass(frozen=True, slots=True)
class ConversionLimits:
    """What a conversion may take. One of 256,000 tokens takes 3 s and 0.25 GB.

    Attributes:
        memory_bytes: of address space, and
        processor_seconds: both beyond what importing transformers took.
        seconds: by the clock, from the start of the process; a busy machine needs a while for the import alone.
    """

    memory_bytes: int = 2 * 2**30
    processor_seconds: int = 60
    seconds: float = 240.0


def convert_slow(root: Path, limits: ConversionLimits | None = None) -> tokenizers.Tokenizer:
    """The tokenizer of a folder that has one of SLOW_FILES.

    Raises:
        LoadError: if a file is broken or too large, transformers cannot make a tokenizer of them, or not within
            `limits`.
        ConfigError: transformers is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="qengine-tokenizer-") as work:
        copies, target = Path(work, "copies"), Path(work, "tokenizer.json")
        copies.mkdir()
        _copy(root, copies)
        _convert(root, copies, target, limits or ConversionLimits())
        data = read_bytes(target, MAX_TOKENIZER_BYTES)
    check_tokenizer_json(data, f"{root}, as transformers converts it,")
    with library_errors(lambda reason: _failed(root, reason)):
        return tokenizers.Tokenizer.from_buffer(data)


def _copy(root: Path, copies: Path) -> None:
    for name in (*SLOW_FILES, *_COMPANIONS):
        if is_there(root / name):
            (copies / name).write_bytes(read_bytes(root / name, _MAX_FILE_BYTES))
    for name, keys in (
        ("config.json", _CLASS_KEYS),
        ("tokenizer_config.json", _CLASS_KEYS | _TOKEN_KEYS | _OPTION_KEYS),
        ("special_tokens_map.json", _TOKEN_KEYS),
        ("added_tokens.json", None),
    ):
        if is_there(root / name):
            (copies / name).write_text(json.dumps(_kept(read_json(root / name), keys)), encoding="utf-8")


def _kept(fields: dict[str, Any], keys: frozenset[str] | None) -> dict[str, Any]:
    """The fields that are known, and named tokens; without `keys` the fields are tokens themselves, with their ids."""
    if keys is None:
        return {token: value for token, value in fields.items() if isinstance(value, int)}
    has_tokens = keys >= _TOKEN_KEYS
    return {key: value for key, value in fields.items() if key in keys or (has_tokens and key.endswith("_token"))}


def _convert(root: Path, copies: Path, target: Path, limits: ConversionLimits) -> None:
    """Have a process write `target`."""
    words = (root, copies, target, limits.memory_bytes, limits.processor_seconds, limits.seconds)
    said = target.parent / _SAID
    try:
        with said.open("wb") as stderr:
            done = subprocess.run(
                [sys.executable, "-m", "qengine.tokenizer.conversion_process", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                # Python looks for modules where it is started: not where the user happens to be.
                cwd=target.parent,
                env=_environment(target.parent),
                timeout=limits.seconds + _GRACE_SECONDS,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise _too_costly(root, f"{limits.seconds:g} s") from error
    except OSError as error:
        raise _failed(root, f"its process does not start: {error.strerror}") from error
    if done.returncode:
        raise _failure(root, done.returncode, _last_line(said), limits)


def _environment(home: Path) -> dict[str, str]:
    """What the process needs of ours. Threads of the libraries would each reserve memory; the hub is not asked."""
    own = {name: value for name, value in for_rank(1).items() if name in _VARIABLES or name.startswith(_VARIABLE_KINDS)}
    # Parts of it may be named from where this process was started.
    parts = [*own["PYTHONPATH"].split(os.pathsep), *filter(os.path.exists, sys.path)]
    packages = dict.fromkeys(os.path.abspath(part) for part in parts if part)
    return {
        **own,
        "PYTHONPATH": os.pathsep.join(packages),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        # tiktoken keeps what it reads for later, by path, in a folder that all programs share; empty: it does not.
        "TIKTOKEN_CACHE_DIR": "",
        "TMPDIR": str(home),
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _last_line(said: Path) -> str:
    """The last that the process wrote to its stderr."""
    with said.open("rb") as file:
        file.seek(max(0, said.stat().st_size - _MAX_SAID_BYTES))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    line = lines[-1] if lines else ""
    return shorten("".join(character if character.isprintable() else " " for character in line))


def _failure(root: Path, code: int, reason: str, limits: ConversionLimits) -> LoadError | ConfigError:
    """What a process means that ended with `code`, and said `reason`."""
    if code == NO_PACKAGE:
        return ConfigError(reason)
    if code == NO_MEMORY:
        return _too_costly(root, f"{limits.memory_bytes / 2**30:g} GiB of memory")
    if code == -signal.SIGXCPU:
        return _too_costly(root, f"{limits.processor_seconds} s of processor time")
    if code == -signal.SIGALRM:
        return _too_costly(root, f"{limits.seconds:g} s")
    if code < 0:
        memory = f"it may take {limits.memory_bytes / 2**30:g} GiB of memory"
        reason = f"its process was ended by signal {-code}; {memory}{': ' if reason else ''}{reason}"
    return _failed(root, reason or "it does not say why")


def _too_costly(root: Path, limit: str) -> LoadError:
    return LoadError(
        f"{root} has no tokenizer.json, and making one with transformers takes more than {limit}; "
        "copy tokenizer.json of the original model into the folder"
    )


def _failed(root: Path, reason: str) -> LoadError:
    return LoadError(
        f"{root} has no tokenizer.json and transformers cannot make one ({reason}); "
        "try: pip install sentencepiece protobuf tiktoken, or copy tokenizer.json of the original model"
    )
