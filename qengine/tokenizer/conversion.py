"""Tokenizers without a tokenizer.json, converted by transformers.

Which files are read is then a library's to decide. So it is given copies of those that a tokenizer is made of, read
within bounds, in a folder that holds nothing else.
Invariant: nothing from the model's folder is run, and no other file is opened, whatever its configuration names.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import tokenizers

from qengine.errors import LoadError
from qengine.imports import import_late
from qengine.tokenizer.files import is_there, read_bytes, read_json
from qengine.tokenizer.rust_errors import library_errors

#: Files of a tokenizer that only transformers can convert.
SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "tekken.json")
_COMPANIONS = ("merges.txt", "vocab.txt")
#: They choose the class and its options.
_CONFIGURATIONS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
#: The largest published: Tekken's, with 19 MB.
_MAX_FILE_BYTES = 2**25


def convert_slow(root: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder that has one of SLOW_FILES.

    Raises:
        LoadError: if a file is broken or too large, or transformers cannot make a tokenizer of them.
        ConfigError: transformers is not installed.
    """

    def failed(reason: str) -> LoadError:
        return LoadError(
            f"{root} has no tokenizer.json and transformers cannot make one ({reason}); "
            "try: pip install sentencepiece protobuf tiktoken, or copy tokenizer.json of the original model"
        )

    with tempfile.TemporaryDirectory(prefix="qengine-tokenizer-") as copies:
        _copy(root, Path(copies))
        transformers = import_late("transformers", needed_for=f"converting the tokenizer of {root}")
        with library_errors(failed):
            # An explicit False: unset, transformers may ask on the terminal whether to run the folder's code.
            slow = transformers.AutoTokenizer.from_pretrained(copies, local_files_only=True, trust_remote_code=False)
            backend = getattr(slow, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise failed(f"{type(slow).__name__} has no fast form")
    return backend


def _copy(root: Path, copies: Path) -> None:
    for name in (*SLOW_FILES, *_COMPANIONS):
        if is_there(root / name):
            (copies / name).write_bytes(read_bytes(root / name, _MAX_FILE_BYTES))
    for name in _CONFIGURATIONS:
        if is_there(root / name):
            fields = read_json(root / name)
            # Paths of other files, and code.
            kept = {key: value for key, value in fields.items() if not key.endswith("_file") and key != "auto_map"}
            (copies / name).write_text(json.dumps(kept), encoding="utf-8")
