"""Text <-> token ids of one model, and its chat template. Files become one in `loading`.

Invariant: nothing changes after construction but caches, so threads can share a Tokenizer. Ids are what the model's own
`tokenizer.json` gives; no code from a checkpoint runs (a chat template runs in a sandbox).
It does not decide which end-of-sequence ids stop a request (the engine joins these with the model's configuration).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from qengine.errors import ConfigError, RequestError
from qengine.tokenizer.chat_template import DEFAULT_MAX_CHARS, ChatTemplate
from qengine.tokenizer.limits import (
    MAX_IDS,
    MAX_NORMALIZED_BYTES,
    check_backend,
    count_normalized,
    normalized_bytes,
    require_short_tokens,
)
from qengine.tokenizer.rust_errors import library_errors
from qengine.tokenizer.token_bytes import decode_bytes, decoding_rule

DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
#: Characters of a prompt for each token of a context; few texts are longer and still fit.
CHARS_PER_TOKEN = 16
_LEAST_CHARS = 2**16
_MOST_BYTES_OF_A_CHARACTER = 4


def most_chars(max_model_len: int) -> int:
    """Characters that a chat template may make for a context of `max_model_len` tokens."""
    return max(_LEAST_CHARS, CHARS_PER_TOKEN * max_model_len)


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
        LoadError: if the tokenizer cannot be decoded token by token, or would make too much of a text.
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
        self._growth = check_backend(backend)
        texts = [token.content for token in backend.get_added_tokens_decoder().values()]
        #: Characters of the shortest text that may cut a prompt in two.
        self._shortest_added = min(map(len, filter(None, texts)), default=None)
        self.decoding_rule = decoding_rule(backend.decoder)
        vocabulary = backend.get_vocab()
        require_short_tokens((*vocabulary, *self._other_tokens.values()))
        self.vocab_size = 1 + max((*vocabulary.values(), *self._other_tokens), default=-1)
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
            RequestError: if `text` is not text that UTF-8 can carry, or would take too much memory.
        """
        if not isinstance(text, str):
            raise RequestError(f"the prompt is {type(text).__name__}, expected a string", param="prompt")

        def refuse(reason: str) -> RequestError:
            return RequestError(f"the prompt cannot be tokenized, expected Unicode text: {reason}", param="prompt")

        with library_errors(refuse):
            self._require_few_ids(text)
            # A batch, for which the library lets other threads run. For a single text of less than 8,192 characters it
            # does not, however long its expressions take.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
        return ids

    def _require_few_ids(self, text: str) -> None:
        """Refuse a text that could take much memory: by the worst case, and if that is too much, by its own."""
        growth = self._growth
        if len(text) * _MOST_BYTES_OF_A_CHARACTER * growth.normalized * growth.ids <= MAX_IDS:
            return
        num_pieces = 1.0 if self._shortest_added is None else 1 + len(text) / self._shortest_added
        num_normalized = normalized_bytes(growth.normalizer, text, "the tokenizer", num_pieces)
        if num_normalized > MAX_NORMALIZED_BYTES:
            raise _too_long(text, len(text) * MAX_NORMALIZED_BYTES / num_normalized, growth.normalized)
        if num_normalized * growth.ids > MAX_IDS:
            num_normalized = min(num_normalized, count_normalized(self._backend, text))
        if num_normalized * growth.ids > MAX_IDS:
            most = len(text) * MAX_IDS / (num_normalized * growth.ids)
            raise _too_long(text, most, growth.normalized * growth.ids)

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


def _too_long(text: str, most: float, growth: float) -> RequestError:
    return RequestError(
        f"the prompt has {len(text)} characters, at most about {most:.0f} can be tokenized: this model's tokenizer may "
        f"make up to {growth:.0f} times as many of them; shorten it",
        param="prompt",
        code="context_length_exceeded",
    )
