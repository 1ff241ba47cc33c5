"""The tokenizer of a model folder.

Invariant: the folder is a stranger's. Its files are read within bounds (`files`) and judged before the library reads
them (`tokenizer_json`); what is missing or broken is a LoadError that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from qengine.errors import LoadError
from qengine.tokenizer.conversion import SLOW_FILES, convert_slow
from qengine.tokenizer.files import is_there, names_in, read_bytes, read_json, read_text
from qengine.tokenizer.limits import check_backend, require_short_tokens, require_small_additions
from qengine.tokenizer.rust_errors import library_errors, shorten
from qengine.tokenizer.tokenizer import DEFAULT_TEMPLATE, Tokenizer
from qengine.tokenizer.tokenizer_json import MAX_TOKENIZER_BYTES, check_tokenizer_json

#: Of characters there are less, see `chat_template`; a longer file is not read at all.
_MAX_TEMPLATE_BYTES = 2**19
_MAX_TEMPLATES = 64
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a model folder, from `tokenizer.json` and the files beside it.

    As in transformers, the tokens put around a text are those of tokenizer.json's post-processor, whatever
    tokenizer_config.json says of add_bos_token. A folder without tokenizer.json is converted by transformers, which
    never runs code from the folder.

    Raises:
        LoadError: nothing usable is found, or a file is broken.
        ConfigError: a conversion needs transformers and it is not installed.
    """
    root = Path(folder)
    config = read_json(root / "tokenizer_config.json")
    special_map = {} if "added_tokens_decoder" in config else read_json(root / "special_tokens_map.json")
    config = {**config, **special_map}
    backend = _read_backend(root)
    _add_declared_tokens(backend, config)
    special_tokens = _named_tokens(config)
    _add_special_tokens(backend, config, special_tokens)
    return Tokenizer(backend, special_tokens=special_tokens, chat_templates=_chat_templates(root, config))


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a file that `load_tokenizer` can make one of."""
    return any(is_there(folder / name) for name in ("tokenizer.json", *SLOW_FILES))


def _read_backend(root: Path) -> tokenizers.Tokenizer:
    path = root / "tokenizer.json"
    if is_there(path):
        return _backend_of(read_bytes(path, MAX_TOKENIZER_BYTES), path)
    if not has_tokenizer(root):
        raise LoadError(
            f"{root} has no tokenizer: expected tokenizer.json (or one of {', '.join(SLOW_FILES)}); "
            "copy the tokenizer's files of the original model into the folder"
        )
    return convert_slow(root)


def _backend_of(data: bytes, path: Path) -> tokenizers.Tokenizer:
    check_tokenizer_json(data, path)

    def broken(reason: str) -> LoadError:
        return LoadError(f"{path} is not a readable tokenizer ({reason}); download the file again")

    with library_errors(broken):
        return tokenizers.Tokenizer.from_buffer(data)


def _added_token(value: Any, where: str, **defaults: bool) -> tokenizers.AddedToken:
    """An added token from its text, or from an object with its text and flags."""
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str) or not fields["content"]:
        raise LoadError(f"{where} is {shorten(repr(value))}, expected a token's text or an object with its 'content'")
    require_short_tokens((fields["content"],))
    flags = {**defaults, **{name: bool(fields[name]) for name in _ADDED_TOKEN_FLAGS if name in fields}}
    with library_errors(lambda reason: LoadError(f"{where} is {shorten(repr(value))}, unusable: {reason}")):
        return tokenizers.AddedToken(fields["content"], **flags)


def _is_token_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10


def _add_declared_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens of `added_tokens_decoder`, whose flags go before those of tokenizer.json."""
    declared = config.get("added_tokens_decoder", {})
    if not isinstance(declared, dict) or not all(_is_token_id(key) for key in declared):
        raise LoadError("added_tokens_decoder of tokenizer_config.json is malformed, expected token ids with tokens")
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    tokens = [
        _added_token(declared[key], f"added_tokens_decoder[{key}] of tokenizer_config.json")
        for key in sorted(declared, key=int)
    ]
    _add(backend, [token for token in tokens if repr(token) not in known])


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Every "..._token" of the configuration, by name."""
    named = {}
    for name, value in config.items():
        if value == "":
            continue
        if name.endswith("_token") and isinstance(value, str | dict):
            named[name] = _added_token(value, f"{name} of tokenizer_config.json").content
        elif name in _NAMED_TOKENS and value is not None:
            raise LoadError(f"{name} of tokenizer_config.json is {shorten(repr(value))}, expected a token's text")
    return named


def _add_special_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Make the named and the additional special tokens special, keeping the flags of those that exist."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(values, list):
        raise LoadError(f"extra_special_tokens is a {type(extra).__name__}, expected a list or an object of tokens")
    wanted = [*(config[name] for name in named), *values]
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    tokens = []
    for value in wanted:
        token = _added_token(value, "a special token of tokenizer_config.json", normalized=False)
        token = known.get(token.content, token)
        if not token.special or token.content not in known:
            token.special = True
            tokens.append(token)
    _add(backend, tokens)


def _add(backend: tokenizers.Tokenizer, added: list[tokenizers.AddedToken]) -> None:
    """Add tokens to those that are there: with each call the library prepares the search for all of them anew."""
    growth = check_backend(backend)
    every = [*backend.get_added_tokens_decoder().values(), *added]
    normalized = {token.content: token.normalized for token in every}
    require_small_additions(normalized.items(), [growth.normalizer], growth.patterns, "tokenizer_config.json")
    with library_errors(lambda reason: LoadError(f"the tokens of tokenizer_config.json cannot be added: {reason}")):
        backend.add_tokens(added)


def _chat_templates(root: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: files go before the configuration's."""
    folder = root / "additional_chat_templates"
    paths = {Path(name).stem: folder / name for name in names_in(folder) if name.endswith(".jinja")}
    if is_there(root / "chat_template.jinja"):
        paths[DEFAULT_TEMPLATE] = root / "chat_template.jinja"
    if not paths:
        return templates_from(config.get("chat_template"), f"{root / 'tokenizer_config.json'}")
    if len(paths) > _MAX_TEMPLATES:
        raise LoadError(f"{root} has {len(paths)} chat templates, at most {_MAX_TEMPLATES} are expected")
    return {name: read_text(path, _MAX_TEMPLATE_BYTES) for name, path in paths.items()}


def templates_from(value: Any, where: str) -> dict[str, str]:
    """Chat templates by name, of a "chat_template" value: a text, or a list of {"name", "template"} objects."""
    if value is None:
        return {}
    entries = [{"name": DEFAULT_TEMPLATE, "template": value}] if isinstance(value, str) else value
    expected = "expected a text, or a list of objects with 'name' and 'template'"
    if not isinstance(entries, list):
        raise LoadError(f"chat_template in {where} is a {type(value).__name__}, {expected}")
    templates = {}
    for entry in entries:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise LoadError(f"chat_template in {where} has the entry {shorten(repr(entry))}, {expected}")
        templates[name] = text
    return templates
