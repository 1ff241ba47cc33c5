"""Text <-> token ids of one model, and its chat template.

Invariant: nothing changes after construction but caches, so threads can share a Tokenizer. Ids are what the model's own
`tokenizer.json` gives; no code from a checkpoint runs (a chat template runs in a sandbox).
It does not decide which end-of-sequence ids stop a request (the engine joins these with the model's configuration).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from qengine.errors import ConfigError, LoadError, RequestError
from qengine.imports import import_late
from qengine.tokenizer.chat_template import DEFAULT_MAX_CHARS, ChatTemplate
from qengine.tokenizer.library import library_errors, shorten
from qengine.tokenizer.limits import (
    MAX_CONFIG_BYTES,
    MAX_TEMPLATE_BYTES,
    MAX_TOKENIZER_BYTES,
    check_normalizer,
    require_size,
)
from qengine.tokenizer.token_bytes import decode_bytes, decoding_rule

DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
#: Files of a tokenizer that only transformers can convert.
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "tekken.json")
#: Longer texts are encoded as a batch: then the library lets other threads run, which it does not for a single text.
_LONG_CHARS = 8192
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Tokenizer:
    """One model's tokenizer.

    Args:
        backend: the library's tokenizer; owned from here on.
        special_tokens: text of the named ones ("bos_token", "eos_token", ...), as chat templates know them.
        eos_token_ids: ids that end a sequence, as far as the tokenizer's own files say; default: eos_token's id.
        chat_templates: Jinja texts by name; "default" is used, or "tool_use" when there are tools.
        other_tokens: text of ids that the backend cannot hold, because their text is empty or another id's too.

    Attributes:
        vocab_size: one more than the largest id that stands for a token.
        bos_token_id: id of the beginning of a sequence, or None.
        eos_token_ids: see above.
        special_token_ids: ids that `skip_special_tokens` leaves out.

    Raises:
        LoadError: if the tokenizer cannot be decoded token by token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: frozenset[int] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        other_tokens: Mapping[int, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._other_tokens = dict(other_tokens or {})
        self._templates = {name: ChatTemplate(text) for name, text in (chat_templates or {}).items()}
        self._bytes_cache: dict[int, bytes] = {}
        self.decoding_rule = decoding_rule(backend.decoder)
        self.vocab_size = 1 + max((*backend.get_vocab().values(), *self._other_tokens), default=-1)
        self.bos_token_id = self._id_of("bos_token")
        eos_token_id = self._id_of("eos_token")
        own_eos = frozenset() if eos_token_id is None else frozenset((eos_token_id,))
        self.eos_token_ids = own_eos if eos_token_ids is None else eos_token_ids
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def reads_text(self) -> bool:
        """Whether text can become ids."""
        return True

    def _id_of(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    # Text to ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognized.

        `add_special_tokens` adds what the model expects around a text (usually a bos token). Text of `render_chat` has
        them already: encode it with False.

        Raises:
            RequestError: if `text` is not text that UTF-8 can carry.
        """
        if not isinstance(text, str):
            raise RequestError(f"the prompt is {type(text).__name__}, expected a string", param="prompt")

        def refuse(reason: str) -> RequestError:
            return RequestError(f"the prompt cannot be tokenized, expected Unicode text: {reason}", param="prompt")

        with library_errors(refuse):
            if len(text) > _LONG_CHARS:
                (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            else:
                encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
        return ids

    # Ids to text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no character become U+FFFD, ids that stand for no token give nothing."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        kept = [token_id for token_id in ids if token_id not in skipped]
        pieces = [self.token_bytes(token_id, is_first=position == 0) for position, token_id in enumerate(kept)]
        return decode_bytes(self.decoding_rule, pieces)

    def token_text(self, token_id: int) -> str:
        """The token's own text, as log-probabilities show it: U+FFFD where its bytes are no whole character."""
        return self.token_bytes(token_id).decode("utf-8", self.decoding_rule.errors)

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        """The token's exact bytes in the middle of a text (`is_first`: at its start); empty if it is no token."""
        if is_first and self.decoding_rule.dropped_in_first:
            return self.decoding_rule.token_bytes(self._spelling(token_id), is_first=True)
        data = self._bytes_cache.get(token_id)
        if data is None:
            data = self.decoding_rule.token_bytes(self._spelling(token_id))
            if 0 <= token_id < self.vocab_size:
                self._bytes_cache[token_id] = data
        return data

    def token_spelling(self, token_id: int) -> str:
        """The token as the vocabulary writes it, such as "Ġworld"; empty if it is no token."""
        return self._spelling(token_id)

    def _spelling(self, token_id: int) -> str:
        if not 0 <= token_id < self.vocab_size:
            return ""
        return self._other_tokens.get(token_id) or self._backend.id_to_token(token_id) or ""

    # Chat

    @property
    def chat_template(self) -> str | None:
        """Text of the default chat template."""
        template = self._templates.get(DEFAULT_TEMPLATE)
        return None if template is None else template.text

    def with_chat_template(self, text: str) -> Tokenizer:
        """The same tokenizer with `text` as its one chat template.

        Raises:
            ConfigError: if it is not a valid Jinja template.
        """
        template = ChatTemplate(text)
        try:
            template.compile()
        except RequestError as error:
            raise ConfigError(f"the chat template given is unusable: {error}") from error
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._templates = {DEFAULT_TEMPLATE: template}
        return other

    def tool_template(self) -> str | None:
        """Text of the template that shows tools to the model; None if no template of this model reads them."""
        template = self._select_template(True)
        return template.text if template is not None and template.reads_tools else None

    def special_token_id(self, text: str) -> int | None:
        """The id of a special token; None if `text` is not the whole of one."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self.special_token_ids else None

    def chat_template_variables(self, *, has_tools: bool = False) -> frozenset[str]:
        """Names that `render_chat` takes as `template_options`; empty without a template."""
        template = self._select_template(has_tools)
        return frozenset() if template is None else template.option_names - self._special_tokens.keys()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        max_chars: int = DEFAULT_MAX_CHARS,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation, by the model's chat template.

        Args:
            messages: dicts with "role" and "content" (a string, or a list of {"type": "text", "text": ...} parts).
            add_generation_prompt: end with the header that makes the model answer.
            tools: JSON schemas of functions the model may call.
            continue_final_message: end inside the last message, for the model to go on with it.
            max_chars: longest prompt to make.
            template_options: the template's own options, such as enable_thinking: JSON scalars.

        Raises:
            RequestError: there is no template, it refuses the messages, an option is not one of its own, or the prompt
                is too long.
        """
        template = self._select_template(bool(tools))
        if template is None:
            raise RequestError(self._no_template(), param="messages")
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            continue_final_message=continue_final_message,
            special_tokens=self._special_tokens,
            options=template_options or {},
            max_chars=max_chars,
        )

    def _select_template(self, has_tools: bool) -> ChatTemplate | None:
        default = self._templates.get(DEFAULT_TEMPLATE)
        return self._templates.get(TOOL_TEMPLATE, default) if has_tools else default

    def _no_template(self) -> str:
        advice = "start with --chat-template FILE, or send a plain prompt to the completions API"
        if self._templates:
            return f"this model has chat templates {sorted(self._templates)} but no 'default' one: {advice}"
        return f"this model has no chat template: {advice}"


# Loading


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
    config = _read_json(root / "tokenizer_config.json")
    special_map = {} if "added_tokens_decoder" in config else _read_json(root / "special_tokens_map.json")
    config = {**config, **special_map}
    backend = _read_backend(root)
    _add_declared_tokens(backend, config)
    special_tokens = _named_tokens(config)
    _add_special_tokens(backend, config, special_tokens)
    return Tokenizer(backend, special_tokens=special_tokens, chat_templates=_chat_templates(root, config))


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a file that `load_tokenizer` can make one of."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *_SLOW_FILES))


def _read_backend(root: Path) -> tokenizers.Tokenizer:
    path = root / "tokenizer.json"
    if path.is_file():

        def broken(reason: str) -> LoadError:
            return LoadError(f"{path} is not a readable tokenizer ({reason}); download the file again")

        require_size(path, MAX_TOKENIZER_BYTES)
        with library_errors(broken):
            backend = tokenizers.Tokenizer.from_file(str(path))
        check_normalizer(backend, path)
        return backend
    if not has_tokenizer(root):
        raise LoadError(
            f"{root} has no tokenizer: expected tokenizer.json (or one of {', '.join(_SLOW_FILES)}); "
            "copy the tokenizer's files of the original model into the folder"
        )
    return _convert_slow(root)


def _convert_slow(root: Path) -> tokenizers.Tokenizer:
    transformers = import_late("transformers", needed_for=f"converting the tokenizer of {root}")

    def failed(reason: str) -> LoadError:
        return LoadError(
            f"{root} has no tokenizer.json and transformers cannot make one ({reason}); "
            "try: pip install sentencepiece protobuf tiktoken, or copy tokenizer.json of the original model"
        )

    with library_errors(failed):
        # An explicit False: unset, transformers may ask on the terminal whether to run the folder's code.
        slow = transformers.AutoTokenizer.from_pretrained(str(root), local_files_only=True, trust_remote_code=False)
        backend = getattr(slow, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise failed(f"{type(slow).__name__} has no fast form")
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    require_size(path, MAX_CONFIG_BYTES)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not readable JSON ({shorten(str(error))}); download the file again") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _added_token(value: Any, where: str, **defaults: bool) -> tokenizers.AddedToken:
    """An added token from its text, or from an object with its text and flags."""
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str) or not fields["content"]:
        raise LoadError(f"{where} is {shorten(repr(value))}, expected a token's text or an object with its 'content'")
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
    with library_errors(lambda reason: LoadError(f"the tokens of tokenizer_config.json cannot be added: {reason}")):
        backend.add_tokens(added)


def _chat_templates(root: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: files go before the configuration's."""
    paths = {path.stem: path for path in sorted(root.glob("additional_chat_templates/*.jinja"))}
    if (root / "chat_template.jinja").is_file():
        paths[DEFAULT_TEMPLATE] = root / "chat_template.jinja"
    if not paths:
        return templates_from(config.get("chat_template"), f"{root / 'tokenizer_config.json'}")
    for path in paths.values():
        require_size(path, MAX_TEMPLATE_BYTES)
    try:
        return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    except (OSError, ValueError) as error:
        raise LoadError(f"a chat template of {root} is unreadable: {error}") from error


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
