"""How a model writes tool calls and reasoning, found from its chat template.

Invariant: no flag and no model name is asked; the markers that a template writes around earlier calls and thoughts are
those that the model was trained to write. It knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

_REASONING_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)


class CallStyle(Enum):
    """How one answer lists its calls."""

    #: <tool_call>{...}</tool_call>, again and again (Hermes, Qwen).
    TAGGED = "tagged"
    #: The whole answer is {...}, or several with semicolons between them (Llama 3).
    BARE = "bare"
    #: [TOOL_CALLS][{...}, {...}] (Mistral).
    LIST = "list"
    #: [TOOL_CALLS]name[ARGS]{...}, again and again (newer Mistral).
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class ToolDialect:
    """How calls are written.

    Attributes:
        opener: text before a call (before the list of them in LIST); may be left out in BARE.
        closer: text after a call.
        arguments_key: what the arguments are called.
    """

    style: CallStyle
    opener: str
    closer: str = ""
    arguments_key: str = "arguments"


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """What stands before and after a model's thoughts."""

    opener: str
    closer: str


def tool_dialect(template: str) -> ToolDialect | None:
    """How the model of a chat template calls tools; None if that cannot be told from it."""
    if "[TOOL_CALLS]" in template or "[AVAILABLE_TOOLS]" in template:
        style = CallStyle.NAMED if "[ARGS]" in template else CallStyle.LIST
        return ToolDialect(style, "[TOOL_CALLS]")
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return ToolDialect(CallStyle.TAGGED, "<tool_call>", "</tool_call>")
    writes_llama = "<|python_tag|>" in template or ('"parameters": ' in template and '"name": ' in template)
    if writes_llama and "<tool_call>" not in template:
        return ToolDialect(CallStyle.BARE, "<|python_tag|>", arguments_key="parameters")
    return None


def reasoning_tags(template: str) -> ReasoningTags | None:
    """The tags around a model's thoughts; None if its template knows none."""
    for opener, closer in _REASONING_TAGS:
        if closer in template:
            return ReasoningTags(opener, closer)
    return None
