"""Fields that would change the answer and are not supported: they are refused, never ignored.

Invariant: a value that asks for nothing (null, an empty list, OpenAI's default) is no reason to refuse. Fields that do
not change the text of the answer (user, metadata, store, service_tier, ...) are not listed and so are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qengine.config import nearest
from qengine.serving.errors import ApiError, invalid, shorten
from qengine.serving.limits import LIMITS

_Harmless = Callable[[Any], bool]


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == [] or value == {}


def _is_null(value: Any) -> bool:
    return value is None


def _one_of(*values: object) -> _Harmless:
    return lambda value: value is None or any(type(value) is type(v) and value == v for v in values)


def _is_unset(value: Any) -> bool:
    """llama.cpp's "no": none, or a number of zero or below."""
    return value is None or (type(value) in (int, float) and value <= 0)


_FIELDS: dict[str, _Harmless] = {
    # OpenAI
    "functions": _is_empty,
    "function_call": _one_of("none", "auto"),
    "modalities": _one_of(["text"]),
    "audio": _is_null,
    "web_search_options": _is_null,
    "verbosity": _is_null,
    "suffix": _one_of(""),
    # vLLM
    "prompt_embeds": _is_null,
    "chat_template": _is_null,
    "mm_processor_kwargs": _is_null,
    "media_io_kwargs": _is_null,
    "documents": _is_empty,
    "logits_processors": _is_empty,
    "prompt_logprobs": _is_null,
    "bad_words": _is_empty,
    "truncate_prompt_tokens": _is_null,
    "use_beam_search": _is_empty,
    "length_penalty": _one_of(1, 1.0),
    "spaces_between_special_tokens": _one_of(True),
    "return_tokens_as_token_ids": _is_empty,
    "return_token_ids": _is_empty,
    "kv_transfer_params": _is_null,
    "vllm_xargs": _is_empty,
    "thinking_token_budget": _is_null,
    # SGLang and llama.cpp
    "enable_thinking": _is_null,
    "stop_regex": _is_empty,
    "n_predict": _is_null,
    "repeat_penalty": _one_of(1, 1.0),
    "top_n_sigma": _is_unset,
    "regex": _is_null,
    "json_schema": _is_null,
    "ebnf": _is_null,
    "grammar": _one_of(""),
    "typical_p": _one_of(1, 1.0),
    "mirostat": _one_of(0),
    "dry_multiplier": _one_of(0, 0.0),
    "xtc_probability": _one_of(0, 0.0),
}
#: Fields of other routes, what asks for nothing, and what to do instead.
_NOT_IN_CHAT: dict[str, tuple[_Harmless, str]] = {
    "echo": (_is_empty, "it belongs to /v1/completions; leave it out"),
    "best_of": (_one_of(1), "it belongs to /v1/completions; leave it out"),
    "thinking": (_is_empty, "it belongs to /v1/messages; chat templates have their options in chat_template_kwargs"),
}
_NOT_IN_COMPLETIONS: dict[str, tuple[_Harmless, str]] = {
    "max_completion_tokens": (_is_null, "it is called max_tokens here"),
    "top_logprobs": (_one_of(0), "logprobs says how many here"),
    "reasoning_effort": (_is_null, "it belongs to /v1/chat/completions; leave it out"),
    "thinking": (_is_empty, "it belongs to /v1/messages; leave it out"),
}
#: vLLM's older names for structured output; which library does the work is no client's business, so it is ignored.
_PREFIX = "guided_"
_KNOWN_WITH_PREFIX = frozenset(
    ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend")
)


#: What changes no answer.
_IGNORED = frozenset(
    (
        *("user", "safety_identifier", "metadata", "store", "service_tier", "priority", "request_id"),
        *("prompt_cache_key", "prompt_cache_retention"),
    )
)


def refuse_unknown(body: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ApiError (400) for a field that is neither one of `known` nor has an answer here."""
    names = {*known, *_IGNORED, *_FIELDS, *_NOT_IN_CHAT, *_NOT_IN_COMPLETIONS, *_KNOWN_WITH_PREFIX}
    for name in body:
        if name not in names and not name.startswith(_PREFIX):
            hint = nearest(name[: LIMITS.shown_chars], sorted(names))
            raise invalid(
                f"{shorten(name)} is no field that this server knows, and it was started with --strict{hint}",
                param=name[: LIMITS.shown_chars],
                code="unknown_parameter",
            )


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """Raise ApiError (400) if `body` asks for something that this server cannot do."""
    for name, value in body.items():
        is_unknown = name.startswith(_PREFIX) and name not in _KNOWN_WITH_PREFIX
        is_harmless = _is_null if is_unknown else _FIELDS.get(name)
        if is_harmless is not None and not is_harmless(value):
            raise _refusal(name, value, "but this server does not support it; leave it out")


def refuse_in_chat(body: Mapping[str, Any]) -> None:
    """The same for what only chat refuses: fields of other routes, and the older way to tell of calls."""
    _refuse_of_others(body, _NOT_IN_CHAT)
    messages = body.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        value = message.get("function_call") if isinstance(message, dict) else None
        if value is not None:
            raise _refusal(f"messages[{index}].function_call", value, "but calls are told as tool_calls here")


def refuse_in_completions(body: Mapping[str, Any]) -> None:
    """The same for what only completions refuse."""
    _refuse_of_others(body, _NOT_IN_COMPLETIONS)


def _refuse_of_others(body: Mapping[str, Any], fields: Mapping[str, tuple[_Harmless, str]]) -> None:
    for name, (is_harmless, advice) in fields.items():
        if not is_harmless(body.get(name)):
            raise _refusal(name, body[name], f"but {advice}")


def _refusal(param: str, value: object, reason: str) -> ApiError:
    return invalid(f"{param} is {shorten(value)}, {reason}", param=param, code="unsupported_parameter")
