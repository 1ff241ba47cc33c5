"""What clients send to /v1/responses: OpenAI's fields, and the sampling fields that chat has too.

Invariant: as in `protocol`. What belongs to OpenAI's own machines (stored responses, hosted tools, files, images) is
refused with the reason; what only they would do with an answer (`store`, `user`, caching hints) is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from qengine.serving.errors import invalid, shorten
from qengine.serving.limits import LIMITS
from qengine.serving.protocol import (
    Effort,
    FunctionDefinition,
    FunctionName,
    GenerationRequest,
    ListOf,
    StreamOptions,
    Strict,
)


class _Refused:
    """Why a field is refused, and the values that ask for nothing."""

    def __init__(self, reason: str, *harmless: object) -> None:
        self.reason = reason
        self._harmless = harmless

    def refuses(self, value: Any) -> bool:
        return value is not None and not any(type(value) is type(v) and value == v for v in self._harmless)


_NOT_STORED = "this server keeps no responses; send the earlier items as input"
_REFUSED = {
    "previous_response_id": _Refused(_NOT_STORED),
    "conversation": _Refused(_NOT_STORED),
    "background": _Refused("this server keeps no responses that could be asked for later; leave it out", False),
    "prompt": _Refused("this server has no stored prompts; send the text as input or instructions"),
    "moderation": _Refused("this server does not moderate; leave it out"),
    "context_management": _Refused("this server does not compact conversations; leave it out", []),
    # Fields of other routes, or that have another name here.
    "max_tokens": _Refused("it is called max_output_tokens here"),
    "max_completion_tokens": _Refused("it is called max_output_tokens here"),
    "logprobs": _Refused("ask for them with top_logprobs, or with include", False),
    "thinking": _Refused("it is called reasoning here"),
    "reasoning_effort": _Refused("it is called reasoning.effort here"),
    "response_format": _Refused("it is called text.format here"),
    "prompt_logprobs": _Refused("it belongs to /v1/chat/completions and /v1/completions; leave it out"),
    "n": _Refused("a response is one answer; send several requests", 1),
}


# Input


class InputText(Strict):
    """Text that someone wrote."""

    type: Literal["input_text", "text"]
    text: str


class OutputText(Strict):
    """Text that the model wrote earlier. Its annotations and log-probabilities say nothing to the model."""

    type: Literal["output_text"]
    text: str


class Refusal(Strict):
    """What the model said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


# A union's branch is part of an error's location, from which `protocol` drops names with a capital.
_PART_TAGS = {"input_text": "Input", "text": "Input", "output_text": "Output", "refusal": "Refusal"}


def _part_tag(value: Any) -> str | None:
    return _PART_TAGS.get(_type_of(value))


def _type_of(value: Any) -> str:
    found = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return found if isinstance(found, str) else ""


ContentPart = Annotated[
    Annotated[InputText, Tag("Input")] | Annotated[OutputText, Tag("Output")] | Annotated[Refusal, Tag("Refusal")],
    Discriminator(
        _part_tag,
        custom_error_type="part_type",
        custom_error_message="it should be text: a part of type input_text or output_text",
    ),
]


class InputMessage(Strict):
    """Something said, by whomever."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | ListOf[ContentPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(_part_text(part) for part in self.content)


class FunctionCallItem(Strict):
    """A call that the model made; `arguments` is JSON text."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    arguments: str


class FunctionCallOutput(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: str | ListOf[ContentPart]

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(_part_text(part) for part in self.output)


class ReasoningText(Strict):
    """A piece of thoughts, or of their summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Strict):
    """Thoughts before an answer, as they were returned."""

    type: Literal["reasoning"]
    content: ListOf[ReasoningText] | None = None
    summary: ListOf[ReasoningText] | None = None
    encrypted_content: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or self.summary or ())


def _part_text(part: InputText | OutputText | Refusal) -> str:
    return part.refusal if isinstance(part, Refusal) else part.text


_ITEM_TAGS = {
    "message": "Message",
    "function_call": "Call",
    "function_call_output": "CallOutput",
    "reasoning": "Reasoning",
}


def _item_tag(value: Any) -> str | None:
    has_type = "type" in value if isinstance(value, dict) else hasattr(value, "type")
    return _ITEM_TAGS.get(_type_of(value) if has_type else "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("Message")]
    | Annotated[FunctionCallItem, Tag("Call")]
    | Annotated[FunctionCallOutput, Tag("CallOutput")]
    | Annotated[ReasoningItem, Tag("Reasoning")],
    Discriminator(
        _item_tag,
        custom_error_type="item_type",
        custom_error_message=f"it should be an item of type {', '.join(_ITEM_TAGS)}",
    ),
]


# Tools


class ResponsesTool(FunctionDefinition):
    """A function that the model may call. Tools that OpenAI's servers run are refused."""

    type: Literal["function"]
    defer_loading: Literal[False] | None = None


class NamedFunction(FunctionName):
    """A function by its name."""

    type: Literal["function"]


class AllowedTools(Strict):
    """Only these of the tools, as if the others were not there."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[ListOf[NamedFunction], Field(min_length=1, max_length=LIMITS.num_tools)]


def _check_function(tool: Any, where: str) -> None:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise invalid(
            f"{where} has the type {shorten(kind)}, but this server knows functions only, which your program runs; "
            "hosted tools need OpenAI's servers",
            param=where,
            code="unsupported_parameter",
        )


# The answer's form


class TextFormat(Strict):
    """What the answer must look like. A schema is enforced whatever `strict` says."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Strict):
    """How the answer is to be written."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(Strict):
    """How to think before the answer. An effort is passed on to the chat template if that knows one."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: str | None = None


class ResponsesStreamOptions(StreamOptions):
    """As of chat; the usage comes in any case."""

    include_obfuscation: bool | None = None


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
_MetadataKey = Annotated[str, Field(max_length=LIMITS.metadata_key_chars)]
_MetadataText = Annotated[str, Field(max_length=LIMITS.metadata_value_chars)]


def _few_entries(value: Any) -> Any:
    """Counted before they are looked at: all of ten thousand could be wrong."""
    if isinstance(value, dict) and len(value) > LIMITS.num_metadata:
        raise ValueError(f"has {len(value)} entries, expected at most {LIMITS.num_metadata}")
    return value


def _without_refused(schema: dict[str, Any]) -> None:
    for name in _REFUSED:
        schema["properties"].pop(name, None)


RequestMetadata = Annotated[
    dict[_MetadataKey, _MetadataText], Field(max_length=LIMITS.num_metadata), BeforeValidator(_few_entries)
]


class ResponsesRequest(GenerationRequest):
    """POST /v1/responses."""

    model_config = ConfigDict(json_schema_extra=_without_refused)

    input: str | Annotated[ListOf[InputItem], Field(min_length=1, max_length=LIMITS.num_messages)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=LIMITS.max_tokens)] | None = None
    max_tool_calls: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[ListOf[ResponsesTool], Field(max_length=LIMITS.num_tools)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: ListOf[Includable] | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: RequestMetadata | None = None
    store: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    @classmethod
    def known_names(cls) -> Iterable[str]:
        return (*cls.model_fields, *_REFUSED)

    @classmethod
    def check_body(cls, body: Mapping[str, Any]) -> None:
        """Refuse what this server does not do, with a better reason than its type would give."""
        for name, refused in _REFUSED.items():
            value = body.get(name)
            if refused.refuses(value):
                raise invalid(f"{name} is {shorten(value)}: {refused.reason}", param=name, code="unsupported_parameter")
        for index, tool in enumerate(_list(body.get("tools"))):
            _check_function(tool, f"tools[{index}]")
        choice = body.get("tool_choice")
        if isinstance(choice, dict) and choice.get("type") != "allowed_tools":
            _check_function(choice, "tool_choice")

    def check_together(self) -> None:
        super().check_together()
        for name, reason in self._unsupported():
            raise invalid(reason, param=name, code="unsupported_parameter")
        form = self.text.format if self.text is not None else None
        if form is not None and form.type == "json_schema" and form.schema_ is None:
            raise invalid("text.format.schema is missing", param="text.format.schema")
        for index, item in enumerate(self.input if isinstance(self.input, list) else ()):
            if isinstance(item, ReasoningItem) and item.encrypted_content is not None and not item.text:
                where = f"input[{index}].encrypted_content"
                raise invalid(f"{where} was encrypted by another server and cannot be read here", param=where)

    def _unsupported(self) -> Iterator[tuple[str, str]]:
        """Values that would change the answer: their field, and what to say."""
        advice = "but this server does not support it; leave it out"
        reasoning = self.reasoning or ReasoningConfig()
        for name in ("summary", "generate_summary"):
            value = getattr(reasoning, name)
            if value not in (None, "auto"):
                yield f"reasoning.{name}", f"reasoning.{name} is '{value}', but thoughts are returned as they are"
        if reasoning.context not in (None, "auto"):
            yield "reasoning.context", f"reasoning.context is '{reasoning.context}', {advice}"
        if reasoning.mode not in (None, "standard"):
            yield "reasoning.mode", f"reasoning.mode is {shorten(reasoning.mode)}, {advice}"
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            yield "text.verbosity", f"text.verbosity is '{self.text.verbosity}', {advice}"
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            name = "stream_options.include_obfuscation"
            yield name, f"{name} is true, {advice}"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
