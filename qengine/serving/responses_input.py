"""From a /v1/responses request to the chat request that means the same, and errors back into its words.

Invariant: this is the only way from responses to the engine, so whatever chat checks is checked here too.
"""

from __future__ import annotations

from typing import Any

from qengine.serving.chat_form import parsed_arguments
from qengine.serving.errors import invalid
from qengine.serving.own_words import OwnWords
from qengine.serving.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    FunctionCall,
    FunctionDefinition,
    FunctionName,
    GenerationRequest,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
    Tool,
    ToolCall,
)
from qengine.serving.responses_protocol import (
    AllowedTools,
    FunctionCallItem,
    FunctionCallOutput,
    InputItem,
    InputMessage,
    NamedFunction,
    ReasoningItem,
    ResponsesRequest,
    TextFormat,
)

_TOKENS = ("max_tokens", "max_output_tokens")
#: What chat calls it -> what it is called here.
_NAMES = (
    (".function.parameters", ".parameters"),
    (".function.name", ".name"),
    _TOKENS,
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
    ("messages", "input"),
)
WORDS = OwnWords(_NAMES, in_messages=[_TOKENS])


def chat_request(request: ResponsesRequest) -> ChatCompletionRequest:
    """The chat request that means the same.

    Raises:
        ApiError: an item of the input cannot be told to the model.
    """
    tools, choice = _tools(request)
    more = {name: getattr(request, name) for name in GenerationRequest.model_fields if name not in _OWN}
    # Not validated again: its parts have been, and some (logit_bias) are no longer as they were sent.
    chat = ChatCompletionRequest.model_construct(
        **more,
        messages=messages_of(request),
        max_completion_tokens=request.max_output_tokens,
        logprobs=request.wants_logprobs or None,
        top_logprobs=request.top_logprobs if request.wants_logprobs else None,
        chat_template_kwargs=request.chat_template_kwargs,
        reasoning_effort=request.reasoning.effort if request.reasoning is not None else None,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_response_format(request.text.format if request.text is not None else None),
    )
    chat.check_together()
    return chat


_OWN = frozenset(("stream_options", "response_format", "max_tokens", "n"))


# Input


def messages_of(request: ResponsesRequest) -> list[ChatMessage]:
    """The conversation. Thoughts, text and calls of one turn become one message.

    Raises:
        ApiError: the arguments of an earlier call are no JSON object.
    """
    messages = [] if request.instructions is None else [ChatMessage(role="system", content=request.instructions)]
    if isinstance(request.input, str):
        return [*messages, ChatMessage(role="user", content=request.input)]
    turn: ChatMessage | None = None
    for index, item in enumerate(request.input):
        if not _is_of_model(item):
            turn = None
            messages.append(_others_message(item))
            continue
        if turn is None or not _fits(turn, item):
            turn = ChatMessage(role="assistant", content=None)
            messages.append(turn)
        _extend(turn, item, f"input[{index}]")
    for message in messages:
        if message.content is None and not message.tool_calls:
            message.content = ""
    return messages


def _is_of_model(item: InputItem) -> bool:
    is_said = isinstance(item, InputMessage) and item.role == "assistant"
    return is_said or isinstance(item, FunctionCallItem | ReasoningItem)


def _others_message(item: InputItem) -> ChatMessage:
    if isinstance(item, FunctionCallOutput):
        return ChatMessage(role="tool", tool_call_id=item.call_id, content=item.text)
    assert isinstance(item, InputMessage)
    return ChatMessage(role=item.role, content=item.text)


def _fits(turn: ChatMessage, item: InputItem) -> bool:
    """Whether an item goes on with the model's turn; thoughts always begin one, and it says one thing."""
    if isinstance(item, FunctionCallItem):
        return True
    return isinstance(item, InputMessage) and turn.content is None


def _extend(turn: ChatMessage, item: InputItem, where: str) -> None:
    if isinstance(item, ReasoningItem):
        turn.reasoning_content = turn.reasoning = item.text or None
    elif isinstance(item, FunctionCallItem):
        parsed_arguments(item.arguments, f"{where}.arguments")
        call = FunctionCall(name=item.name, arguments=item.arguments)
        turn.tool_calls = [*(turn.tool_calls or ()), ToolCall(id=item.call_id, function=call)]
    else:
        assert isinstance(item, InputMessage)
        turn.content = item.text


# Tools, form


def _tools(request: ResponsesRequest) -> tuple[list[Tool] | None, Any]:
    """The tools that may be called, and the choice among them."""
    choice = request.tool_choice
    functions = list(request.tools or ())
    if isinstance(choice, AllowedTools):
        allowed = {tool.name for tool in choice.tools}
        unknown = allowed - {tool.name for tool in functions}
        if unknown:
            names = ", ".join(sorted(unknown))
            raise invalid(f"tool_choice allows {names}, but there is no such tool", param="tool_choice")
        functions = [tool for tool in functions if tool.name in allowed]
        choice = choice.mode
    elif isinstance(choice, NamedFunction):
        return _chat_tools(functions), NamedToolChoice(type="function", function=FunctionName(name=choice.name))
    return _chat_tools(functions), choice


def _chat_tools(functions: list[Any]) -> list[Tool] | None:
    names = FunctionDefinition.model_fields
    definitions = [FunctionDefinition(**{name: getattr(tool, name) for name in names}) for tool in functions]
    return [Tool(type="function", function=definition) for definition in definitions] or None


def _response_format(form: TextFormat | None) -> ResponseFormat | None:
    if form is None:
        return None
    if form.type != "json_schema":
        return ResponseFormat(type=form.type)
    schema = JsonSchemaFormat(name=form.name, description=form.description, schema=form.schema_ or {})
    return ResponseFormat(type="json_schema", json_schema=schema)
