"""What the routes answer, as schemas for /openapi.json.

Invariant: answers are made elsewhere, as plain dicts, for speed; tests hold them to these models, which know all their
fields.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    """What went wrong: in words, of which kind, in which field, and a reason that programs can read."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer):
    """Every answer that is an error."""

    error: ErrorDetail


class Health(_Answer):
    """The server's state; `error` says why it is not ready."""

    status: str
    error: ErrorDetail | None = None


class Version(_Answer):
    """The version of the server."""

    version: str


class Model(_Answer):
    """A name of the model, and how long its context is."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Answer):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class PromptTokens(_Answer):
    """How many of a prompt's tokens came from the prefix cache."""

    cached_tokens: int


class Usage(_Answer):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class ProgressReport(_Answer):
    """How far a request is before its first token; `queue_position` begins at 1."""

    state: Literal["waiting", "running"]
    queue_position: int | None
    prompt_tokens: int
    computed_tokens: int
    prompt_index: int | None = None


class TopLogprob(_Answer):
    """A token that could have been."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    """One entry for each token."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(_Answer):
    """A function and the JSON text of its arguments; in a stream a part of either."""

    name: str | None = None
    arguments: str


class CalledTool(_Answer):
    """A call; in a stream `index` says which one a part belongs to."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class AnswerMessage(_Answer):
    """What the model said, or in a stream what it said next."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CalledTool] | None = None


class PromptLogprob(_Answer):
    """A token that could stand at a place of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


#: For each token of the prompt, by token id; nothing for the first.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class _ChatChoice(_Answer):
    index: int
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "abort"] | None
    stop_reason: int | str | None = None


class ChatChoice(_ChatChoice):
    """One answer."""

    message: AnswerMessage


class ChatDelta(_ChatChoice):
    """What one answer gained."""

    delta: AnswerMessage


class ChatCompletion(_Answer):
    """A conversation's next message, `n` times."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class ChatCompletionChunk(_Answer):
    """One event of a chat's stream, which ends with `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None
    progress: ProgressReport | None = None


class CompletionLogprobs(_Answer):
    """Lists with one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Answer):
    """One continuation; the prompts' choices are numbered through."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(_Answer):
    """Continuations; the events of a stream look the same, and it ends with `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    progress: ProgressReport | None = None


class OutputPart(_Answer):
    """Text of an item."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[TokenLogprob] | None = None


class OutputItem(_Answer):
    """A message (`role`, `content`), thoughts (`summary`, `content`) or a call (`call_id`, `name`, `arguments`)."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | None = None
    content: list[OutputPart] | None = None
    summary: list[Any] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class ResponseFailure(_Answer):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(_Answer):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class InputTokens(_Answer):
    """How many came from the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokens(_Answer):
    """How many were thoughts, counted from their text."""

    reasoning_tokens: int


class ResponseUsage(_Answer):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class ResponseObject(_Answer):
    """A response: its items, and what was asked."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: ResponseUsage | None
    model: str
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    reasoning: dict[str, Any]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    background: Literal[False]
    previous_response_id: None
    service_tier: Literal["default"]
    store: Literal[False]


class ResponseEvent(BaseModel):
    """One event of a response's stream, named by its type; further fields depend on it."""

    type: str
    sequence_number: int
    response: ResponseObject | None = None
    output_index: int | None = None
    item_id: str | None = None
    item: OutputItem | None = None
    content_index: int | None = None
    part: OutputPart | None = None
    delta: str | None = Field(None, description="what a text or the arguments of a call gained")
    progress: ProgressReport | None = None


# Anthropic's API


class AnthropicErrorDetail(_Answer):
    """What went wrong: of which kind, and in words."""

    type: str
    message: str


class AnthropicErrorBody(_Answer):
    """Every answer of Anthropic's API that is an error."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class AnthropicUsage(_Answer):
    """Counts of tokens. Those of the prompt that were in the prefix cache are in `cache_read_input_tokens` alone."""

    input_tokens: int
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int
    output_tokens: int


class MessageBlock(_Answer):
    """A part of a message: text, thoughts, or a tool call; its type says which fields it has."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: Literal[""] | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class AnthropicMessage(_Answer):
    """A message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage


class MessageEvent(_Answer):
    """One event of a message's stream, named by its type; further fields depend on it."""

    type: str
    message: AnthropicMessage | None = None
    index: int | None = None
    content_block: MessageBlock | None = None
    delta: dict[str, Any] | None = None
    usage: AnthropicUsage | None = None
    error: AnthropicErrorDetail | None = None
    progress: ProgressReport | None = None


class TokenCount(_Answer):
    """Tokens of a prompt."""

    input_tokens: int


# Texts


class Embedding(_Answer):
    """The vector of one text: numbers, or base64 of float32 in little-endian order."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(_Answer):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(_Answer):
    """The vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokenized(_Answer):
    """Token ids, and as the vocabulary writes them if that was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Answer):
    """A text."""

    prompt: str
