"""What clients send: OpenAI's request fields and vLLM's extra ones, with strict types and bounds.

Invariant: a request that was made is within `limits`; "10" is no number and true is no integer. A field that would
change the answer but is not supported is refused (`unsupported` knows them); any other unknown field is ignored.
This module does not know the model: context length, vocabulary and --max-logprobs are checked by the routes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, WithJsonSchema

from qengine.request import REPETITION_PENALTIES
from qengine.serving.errors import ApiError, invalid, shorten
from qengine.serving.limits import LIMITS
from qengine.serving.unsupported import refuse_in_chat, refuse_in_completions, refuse_unknown, refuse_unsupported

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Role = Literal["system", "developer", "user", "assistant", "tool"]
_Item = TypeVar("_Item")
#: A list of which the first wrong item is told. All of them would take seconds to collect, in which nothing else runs.
ListOf = Annotated[list[_Item], Field(fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, le=LIMITS.token_id)]


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _bias_map(value: Any) -> Any:
    """JSON keys are strings: {"50256": -100} means token 50256."""
    if not isinstance(value, dict):
        return value
    if len(value) > LIMITS.num_logit_bias:
        raise ValueError(f"has {len(value)} entries, expected at most {LIMITS.num_logit_bias}")
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) <= len(str(LIMITS.token_id))):
            raise ValueError(f"has the key {shorten(key)}, expected token ids")
    return {int(key): bias for key, bias in value.items()}


StopStrings = Annotated[
    ListOf[Annotated[str, Field(min_length=1, max_length=LIMITS.stop_chars)]],
    Field(max_length=LIMITS.num_stop_strings),
    BeforeValidator(_stop_list, json_schema_input_type=str | list[str]),
]
TokenIds = Annotated[ListOf[TokenId], Field(max_length=LIMITS.num_token_ids)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=LIMITS.cache_salt_chars, pattern=r"^[A-Za-z0-9+=_-]+$")]
ToolName = Annotated[str, Field(pattern=rf"^[A-Za-z0-9_.-]{{1,{LIMITS.tool_name_chars}}}$")]
Penalty = Annotated[float, Field(ge=-LIMITS.penalty, le=LIMITS.penalty)]
Bias = Annotated[float, Field(ge=-LIMITS.logit_bias_magnitude, le=LIMITS.logit_bias_magnitude)]
LogitBias = Annotated[dict[TokenId, Bias], BeforeValidator(_bias_map)]


class Strict(BaseModel):
    """What every part of a request is: numbers are no strings, and fields that nobody knows are left out."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the owner of a server lets clients ask.

    Attributes:
        num_prompts: prompts in one call.
        is_strict: fields that nobody knows are refused, not ignored.
        allows_prompt_logprobs: log-probabilities of prompts may be asked for.
    """

    num_prompts: int = LIMITS.num_prompts
    is_strict: bool = False
    allows_prompt_logprobs: bool = False


DEFAULT_RULES = Rules()


class CheckedRequest(Strict):
    """A whole body, which `parse_request` makes."""

    _rules: Rules = PrivateAttr(default=DEFAULT_RULES)

    @classmethod
    def known_names(cls) -> Iterable[str]:
        """Fields that are honoured or have an answer of their own; of others only `unsupported` may know."""
        return cls.model_fields

    @classmethod
    def check_body(cls, body: Mapping[str, Any]) -> None:
        """Refuse what is not supported, before anything is made of `body`. Raises ApiError."""

    def check_together(self) -> None:
        """What fields mean to each other. Raises ApiError."""


class StreamOptions(Strict):
    """`include_usage` adds a last chunk that counts tokens.

    `include_progress` adds chunks until the first token comes: the place in the queue, how much of the prompt is read.
    """

    include_usage: bool | None = None
    include_progress: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class JsonSchemaFormat(Strict):
    """A named schema. It is enforced whatever `strict` says."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputsField(Strict):
    """vLLM's way to ask for a form. Its further options are refused: they would change the answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: ListOf[str] | None = None
    grammar: str | None = None


class GenerationRequest(CheckedRequest):
    """The fields that chat and completions share. None is "not given" everywhere."""

    model: Annotated[str, Field(min_length=1, max_length=LIMITS.model_name_chars)]
    temperature: Annotated[float, Field(ge=0, le=LIMITS.temperature)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=LIMITS.top_k)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=REPETITION_PENALTIES[0], le=REPETITION_PENALTIES[1])] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    n: Annotated[int, Field(ge=1, le=LIMITS.num_choices)] | None = None
    seed: Annotated[int, Field(ge=0, le=LIMITS.seed)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=LIMITS.max_tokens)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=LIMITS.max_tokens)] | None = None
    stop: StopStrings | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: CacheSalt | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsField | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: ListOf[str] | None = None
    guided_grammar: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def include_progress(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_progress)

    def check_together(self) -> None:
        super().check_together()
        self._check_prompt_logprobs()
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is given but stream is not true", param="stream_options")

    def _check_prompt_logprobs(self) -> None:
        found = self.prompt_logprobs
        if found is None:
            return
        advice = "this server was started without --enable-prompt-logprobs"
        if self._rules.allows_prompt_logprobs:
            advice = "they come with whole answers only; leave stream out"
        if self.stream or not self._rules.allows_prompt_logprobs:
            message = f"prompt_logprobs is {found}, but {advice}"
            raise invalid(message, param="prompt_logprobs", code="unsupported_parameter")


class TextPart(Strict):
    """A piece of a message's text; other kinds of parts are refused."""

    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    """What an earlier turn called; `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call of an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionDefinition(Strict):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Strict):
    """The name of a function."""

    name: str


class NamedToolChoice(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatMessage(Strict):
    """One message. Calls of earlier turns reach the template with their arguments as objects."""

    role: Role
    content: str | ListOf[TextPart] | None = None
    name: str | None = None
    tool_calls: ListOf[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def check_content(self, where: str) -> None:
        """Only an assistant that called tools may have said nothing."""
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise invalid(f"{where}.content is missing, expected text", param=f"{where}.content")

    @property
    def num_chars(self) -> int:
        if isinstance(self.content, list):
            return sum(len(part.text) for part in self.content)
        return len(self.content or "")


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[ListOf[ChatMessage], Field(min_length=1, max_length=LIMITS.num_messages)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=LIMITS.max_tokens)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[ListOf[Tool], Field(max_length=LIMITS.num_tools)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: Effort | None = None

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, or its older name `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @classmethod
    def check_body(cls, body: Mapping[str, Any]) -> None:
        refuse_in_chat(body)

    def check_together(self) -> None:
        super().check_together()
        for index, message in enumerate(self.messages):
            message.check_content(f"messages[{index}]")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs is given but logprobs is not true", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid(
                "continue_final_message and add_generation_prompt are both true, expected at most one",
                param="continue_final_message",
            )
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise invalid(
                f"max_tokens is {self.max_tokens} but max_completion_tokens is {self.max_completion_tokens}; "
                "give one of them",
                param="max_completion_tokens",
            )


Prompt = str | list[int]
_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT_SCHEMA = {"type": "string", "minLength": 1}
PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT_SCHEMA,
        _TOKENS_SCHEMA,
        {"type": "array", "items": {"anyOf": [_TEXT_SCHEMA, _TOKENS_SCHEMA]}, "minItems": 1},
    ]
}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `prompt` is a string, token ids, or a list of either; `prompts` is always a list."""

    prompt: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: int | None = None
    tools: list[Any] | None = None

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts, checked.

        Raises:
            ApiError: `prompt` is of no such form, empty, or has too many items.
        """
        return checked_prompts(self.prompt, "prompt", self._rules.num_prompts)

    @classmethod
    def check_body(cls, body: Mapping[str, Any]) -> None:
        refuse_in_completions(body)

    def check_together(self) -> None:
        super().check_together()
        num_choices = self.n or 1
        if self.best_of not in (None, 1, num_choices):
            raise invalid(f"best_of is {self.best_of}, expected 1 or n ({num_choices})", param="best_of")
        if self.tools:
            raise invalid("tools are given, but they belong to /v1/chat/completions; leave them out", param="tools")
        _ = self.prompts


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LIMITS.token_id


def checked_prompts(value: Any, param: str, num_prompts: int) -> list[Prompt]:
    """The prompts of a field that may hold one or several, up to `num_prompts`.

    Raises:
        ApiError: it is of no such form, empty, or has too many items.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise invalid(f"{param} is {shorten(value)}, expected text, token ids, or a list of these", param=param)
    if value and all(_is_token_id(item) for item in value):
        value = [value]
    if not 0 < len(value) <= num_prompts:
        raise invalid(f"{param} has {len(value)} items, expected from 1 to {num_prompts}", param=param)
    return [_check_prompt(item, index, param) for index, item in enumerate(value)]


def _check_prompt(value: Any, index: int, param: str) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(_is_token_id(item) for item in value):
        return list(value)
    raise invalid(
        f"{param}[{index}] is {shorten(value)}, expected text or token ids, and not empty",
        param=param,
    )


_Request = TypeVar("_Request", bound=CheckedRequest)


def parse_request(kind: type[_Request], body: Mapping[str, Any], rules: Rules = DEFAULT_RULES) -> _Request:
    """`body` as a request of `kind`, by the `rules` of the server.

    Raises:
        ApiError: 400, naming the first field that is wrong, what was found and what was expected.
    """
    if rules.is_strict:
        refuse_unknown(body, kind.known_names())
    refuse_unsupported({name: value for name, value in body.items() if name not in kind.model_fields})
    kind.check_body(body)
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise _first_problem(error) from error
    request._rules = rules
    request.check_together()
    return request


def _first_problem(error: ValidationError) -> ApiError:
    # Of a union, the branch that got furthest says most, and "too short" more than "no string".
    detail = max(
        error.errors(include_url=False, include_context=False),
        key=lambda found: (len(found["loc"]), not found["type"].endswith("_type")),
    )
    param = _param_name(detail["loc"])
    if detail["type"] == "missing":
        return invalid(f"{param} is missing", param=param)
    if detail["type"] == "value_error":
        return invalid(f"{param} {detail['msg'].removeprefix('Value error, ')}", param=param)
    if detail["type"] == "model_type":
        return invalid(f"{param} is {shorten(detail['input'])}, expected an object", param=param)
    expected = _SUBJECT.sub("it should", detail["msg"]).split(" after validation")[0]
    return invalid(f"{param} is {shorten(detail['input'])}, but {expected}", param=param)


_SUBJECT = re.compile(r"^[A-Z]\w+ should")
# Names that pydantic adds to a location for the branch of a union or a key of a mapping; classes begin with a capital.
_BRANCHES = ("str", "[key]")


def _param_name(location: tuple[int | str, ...]) -> str:
    """ "messages[0].content" of ("messages", 0, "content", "list[TextPart]")."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part not in _BRANCHES and "[" not in part and not part[:1].isupper():
            name += f".{part}" if name else part
    return name
