"""What clients send to /v1/messages: Anthropic's fields, and the sampling fields that chat has too.

Invariant: as in `protocol`. What only Anthropic's own machines do (hosted tools, images, documents, containers) is
refused with the reason; what says nothing to a model (`metadata`, `cache_control`, `service_tier`) is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from qengine.serving.errors import ApiError, invalid, shorten
from qengine.serving.limits import LIMITS
from qengine.serving.protocol import GenerationRequest, ListOf, StopStrings, Strict, ToolName

_ADVICE = "but this server does not support it; leave it out"
#: Fields that would change the answer, why they are refused, and the values that ask for nothing.
_REFUSED: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "container": ("this server has no containers; leave it out", ()),
    "mcp_servers": ("this server calls no other servers; leave it out", ([],)),
    "context_management": ("this server does not edit conversations; leave it out", ({},)),
    # Fields of other routes, or that have another name here.
    "stop": ("it is called stop_sequences here", ([],)),
    "response_format": ("it is called output_config.format here", ()),
    "max_completion_tokens": ("it is called max_tokens here", ()),
    "parallel_tool_calls": ("it is called tool_choice.disable_parallel_tool_use here", ()),
    "reasoning_effort": ("it is called output_config.effort here", ()),
    "n": ("a message is one answer; send several requests", (1,)),
    "logprobs": ("messages have no log-probabilities; ask /v1/chat/completions", (False,)),
    "prompt_logprobs": ("messages have no log-probabilities; ask /v1/chat/completions", ()),
    "top_logprobs": ("messages have no log-probabilities; ask /v1/chat/completions", (0,)),
}


class CacheControl(Strict):
    """Anthropic's mark for its cache. Here every beginning that was seen before is reused, marked or not."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


# Content


class TextBlock(Strict):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ThinkingBlock(Strict):
    """Thoughts of an earlier answer, as they were returned. The signature is not looked at."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Strict):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None


# A union's branch is part of an error's location, from which `protocol` drops names with a capital.
_TAGS = {"text": "Text", "thinking": "Thinking", "tool_use": "ToolUse", "tool_result": "ToolResult"}


def _tag(value: Any) -> str | None:
    found = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return _TAGS.get(found) if isinstance(found, str) else None


class ToolResultBlock(Strict):
    """What a call gave. With `is_error` the model reads that it is an error."""

    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: str | ListOf[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


ContentBlock = Annotated[
    Annotated[TextBlock, Tag("Text")]
    | Annotated[ThinkingBlock, Tag("Thinking")]
    | Annotated[ToolUseBlock, Tag("ToolUse")]
    | Annotated[ToolResultBlock, Tag("ToolResult")],
    Discriminator(
        _tag,
        custom_error_type="block_type",
        custom_error_message=f"it should be of type {', '.join(_TAGS)}: this server reads no images or documents",
    ),
]
_ALLOWED = {
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, ToolUseBlock),
    "system": (TextBlock,),
}


class MessageParam(Strict):
    """One turn, or a part of one: neighbours of the same role are one turn."""

    role: Literal["user", "assistant", "system"]
    content: str | ListOf[ContentBlock]

    @property
    def blocks(self) -> list[Any]:
        """The content as blocks."""
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


# Tools


class AnthropicTool(Strict):
    """A tool that your program runs. Tools that Anthropic's servers run, or that only its models know, are refused."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Strict):
    """Whether tools are called: as the model likes, at least one, the named one, or none."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


# Thoughts and form


class ThinkingConfig(Strict):
    """Whether to think before the answer. `budget_tokens` ends the thoughts when there are that many tokens of them."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1, le=LIMITS.max_tokens)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Strict):
    """A schema that the answer's text is made to have."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """The form of the answer, and how much effort it is worth. An effort is for a chat template that knows one."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class RequestMetadata(Strict):
    """Who asks, for Anthropic's abuse detection."""

    user_id: str | None = None


def _without_refused(schema: dict[str, Any]) -> None:
    for name in _REFUSED:
        schema["properties"].pop(name, None)


class CountTokensRequest(GenerationRequest):
    """POST /v1/messages/count_tokens: a message's prompt."""

    model_config = ConfigDict(json_schema_extra=_without_refused)

    messages: Annotated[ListOf[MessageParam], Field(min_length=1, max_length=LIMITS.num_messages)]
    system: str | ListOf[TextBlock] | None = None
    tools: Annotated[ListOf[AnthropicTool], Field(max_length=LIMITS.num_tools)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    stop_sequences: StopStrings | None = None
    metadata: RequestMetadata | None = None
    cache_control: CacheControl | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def known_names(cls) -> Iterable[str]:
        return (*cls.model_fields, *_REFUSED)

    @classmethod
    def check_body(cls, body: Mapping[str, Any]) -> None:
        """Refuse what this server does not do, with a better reason than its type would give."""
        for name, (reason, harmless) in _REFUSED.items():
            value = body.get(name)
            if value is not None and not any(type(value) is type(v) and value == v for v in harmless):
                raise invalid(f"{name} is {shorten(value)}: {reason}", param=name, code="unsupported_parameter")
        tools = body.get("tools")
        for index, tool in enumerate(tools if isinstance(tools, list) else ()):
            if isinstance(tool, dict):
                _check_tool(tool, f"tools[{index}]")

    def check_together(self) -> None:
        super().check_together()
        called: set[str] = set()
        for index, message in enumerate(self.messages):
            for position, block in enumerate(message.blocks):
                self._check_block(message.role, block, f"messages[{index}].content[{position}]", called)
        self._check_choice()
        thinking = self.thinking
        if thinking is not None and (thinking.type == "enabled") != (thinking.budget_tokens is not None):
            expected = "expected with type 'enabled', and only there"
            found = "missing" if thinking.budget_tokens is None else str(thinking.budget_tokens)
            raise invalid(f"thinking.budget_tokens is {found}, {expected}", param="thinking.budget_tokens")

    def _check_block(self, role: str, block: Any, where: str, called: set[str]) -> None:
        """One block, in its place; `called` are the calls so far."""
        if not isinstance(block, _ALLOWED[role]):
            raise invalid(f"{where} is of type {block.type}, which a message of role {role} cannot hold", param=where)
        if isinstance(block, ToolUseBlock):
            called.add(block.id)
        if isinstance(block, ToolResultBlock) and block.tool_use_id not in called:
            raise invalid(
                f"{where}.tool_use_id is {shorten(block.tool_use_id)}, but no message before calls a tool by that id",
                param=f"{where}.tool_use_id",
            )

    def _check_choice(self) -> None:
        choice = self.tool_choice
        if choice is not None and (choice.type == "tool") != (choice.name is not None):
            found = "missing" if choice.name is None else shorten(choice.name)
            raise invalid(
                f"tool_choice.name is {found}, expected with type 'tool', and only there", param="tool_choice"
            )


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=LIMITS.max_tokens)]

    def check_together(self) -> None:
        super().check_together()
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            raise invalid(
                f"thinking.budget_tokens is {budget}, expected less than max_tokens ({self.max_tokens}), of which the "
                "thoughts are a part",
                param="thinking.budget_tokens",
            )


def _check_tool(tool: Mapping[str, Any], where: str) -> None:
    kind = tool.get("type")
    if isinstance(kind, str) and kind != "custom":
        raise _unsupported(
            f"{where} has the type {shorten(kind)}, but this server knows only tools with an input_schema, which your "
            "program runs",
            where,
        )
    harmless: Mapping[str, tuple[object, ...]] = {
        "defer_loading": (False,),
        "input_examples": ([],),
        "allowed_callers": (["direct"], []),
    }
    for name, values in harmless.items():
        value = tool.get(name)
        if value is not None and value not in values:
            raise _unsupported(f"{where}.{name} is {shorten(value)}, {_ADVICE}", f"{where}.{name}")


def _unsupported(message: str, param: str) -> ApiError:
    return invalid(message, param=param, code="unsupported_parameter")
