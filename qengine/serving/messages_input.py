"""From a /v1/messages request to the chat request that means the same, and errors back into its words.

Invariant: this is the only way from messages to the engine, so whatever chat checks is checked here too. A
tool's result is told as a message of role "tool", as chat templates know them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qengine.serving.dialect import reasoning_tags
from qengine.serving.errors import invalid
from qengine.serving.limits import LIMITS
from qengine.serving.messages_protocol import (
    CountTokensRequest,
    TextBlock,
    ThinkingBlock,
    ThinkingConfig,
    ToolResultBlock,
    ToolUseBlock,
)
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
    TextPart,
    Tool,
    ToolCall,
)
from qengine.tokenizer import Tokenizer

#: What chat calls it -> what it is called here.
_NAMES = (
    (".function.parameters", ".input_schema"),
    (".function.name", ".name"),
    ("response_format.json_schema", "output_config.format"),
    ("response_format", "output_config.format"),
)
WORDS = OwnWords(_NAMES, in_messages=_NAMES)
_OWN = frozenset(("stream_options", "response_format", "stop", "n"))
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_request(request: CountTokensRequest, tokenizer: Tokenizer) -> ChatCompletionRequest:
    """The chat request that means the same.

    Raises:
        ApiError: a message cannot be told to the model, or it cannot think as it is asked to.
    """
    more = {name: getattr(request, name) for name in GenerationRequest.model_fields if name not in _OWN}
    messages = messages_of(request)
    thinking, choice, form = request.thinking, request.tool_choice, request.output_config
    # Not validated again: its parts have been, and some (logit_bias) are no longer as they were sent.
    chat = ChatCompletionRequest.model_construct(
        **more,
        messages=messages,
        stop=request.stop_sequences,
        continue_final_message=messages[-1].role == "assistant" or None,
        chat_template_kwargs=_template_options(request, tokenizer),
        tools=_tools(request),
        tool_choice=_tool_choice(request),
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        include_reasoning=False if thinking is not None and thinking.display == "omitted" else None,
        response_format=_response_format(form.format.schema_) if form is not None and form.format else None,
    )
    chat.check_together()
    return chat


# Messages


def messages_of(request: CountTokensRequest) -> list[ChatMessage]:
    """The conversation; neighbours of one role are one turn. The last turn may be the beginning of the answer.

    Raises:
        ApiError: it ends with calls that have no result, or with thoughts alone, or is too long.
    """
    messages: list[ChatMessage] = []
    if request.system:
        system = request.system
        messages.append(_said("system", [system] if isinstance(system, str) else [block.text for block in system]))
    names: dict[str, str] = {}
    for role, blocks in _turns(request):
        if role == "assistant":
            messages.append(_model_turn(blocks, names))
        else:
            messages += _other_turn(role, blocks, names)
    _check_number(messages)
    last = messages[-1]
    if last.role == "assistant" and (last.tool_calls or not last.content):
        reason = "calls tools: send their results after it" if last.tool_calls else "has no text that could go on"
        raise invalid(f"the last message is the assistant's and {reason}", param="messages")
    return messages


def _check_number(messages: Sequence[ChatMessage]) -> None:
    """The limit holds once more: a message may hold many results, each of which the template reads as a message."""
    num_messages = sum(message.role != "system" for message in messages)
    if num_messages > LIMITS.num_messages:
        raise invalid(
            f"messages are {num_messages} with each tool_result as one of its own, expected at most "
            f"{LIMITS.num_messages}; send fewer",
            param="messages",
        )


def _turns(request: CountTokensRequest) -> list[tuple[str, list[Any]]]:
    turns: list[tuple[str, list[Any]]] = []
    for message in request.messages:
        if not turns or turns[-1][0] != message.role:
            turns.append((message.role, []))
        turns[-1][1].extend(message.blocks)
    return turns


def _said(role: Any, texts: Sequence[str]) -> ChatMessage:
    """A message of text; several texts stay parts, which templates put together as they do for chat."""
    if len(texts) == 1:
        return ChatMessage(role=role, content=texts[0])
    return ChatMessage(role=role, content=[TextPart(type="text", text=text) for text in texts])


def _model_turn(blocks: Sequence[Any], names: dict[str, str]) -> ChatMessage:
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    turn = _said("assistant", texts) if texts else ChatMessage(role="assistant", content="")
    thoughts = "\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    turn.reasoning_content = turn.reasoning = thoughts or None
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    names.update({call.id: call.name for call in calls})
    turn.tool_calls = [_call(call) for call in calls] or None
    return turn


def _call(block: ToolUseBlock) -> ToolCall:
    return ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=json.dumps(block.input)))


def _other_turn(role: str, blocks: Sequence[Any], names: dict[str, str]) -> list[ChatMessage]:
    """Text between results is a message of its own."""
    messages: list[ChatMessage] = []
    texts: list[str] = []
    for block in blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
            continue
        if texts:
            messages.append(_said(role, texts))
        texts = []
        messages.append(_result(block, names))
    return [*messages, _said(role, texts)] if texts or not messages else messages


def _result(block: ToolResultBlock, names: dict[str, str]) -> ChatMessage:
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    if block.is_error:
        text = f"Error: {text}"
    name = names.get(block.tool_use_id)
    return ChatMessage(role="tool", tool_call_id=block.tool_use_id, name=name, content=text)


# Tools, form, thoughts


def _tools(request: CountTokensRequest) -> list[Tool] | None:
    functions = [
        FunctionDefinition(name=t.name, description=t.description, parameters=t.input_schema, strict=t.strict)
        for t in request.tools or ()
    ]
    return [Tool(type="function", function=function) for function in functions] or None


def _tool_choice(request: CountTokensRequest) -> Any:
    choice = request.tool_choice
    if choice is None:
        return None
    if choice.name is not None:
        return NamedToolChoice(type="function", function=FunctionName(name=choice.name))
    return _CHOICES[choice.type]


def _response_format(schema: dict[str, Any]) -> ResponseFormat:
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=schema))


def _template_options(request: CountTokensRequest, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The template's options, with thoughts and effort as the template knows them."""
    options = dict(request.chat_template_kwargs or {})
    known = tokenizer.chat_template_variables(has_tools=bool(request.tools))
    if request.thinking is not None:
        thinks = reasoning_tags(tokenizer.chat_template or "") is not None
        _set_thinking(options, request.thinking, is_option="enable_thinking" in known, thinks=thinks)
    effort = request.output_config.effort if request.output_config is not None else None
    if effort is not None:
        if "reasoning_effort" not in known:
            raise invalid(
                f"output_config.effort is '{effort}', but this model's chat template knows no effort; leave it out",
                param="output_config.effort",
                code="unsupported_parameter",
            )
        options.setdefault("reasoning_effort", effort)
    return options or None


def _set_thinking(options: dict[str, Any], thinking: ThinkingConfig, *, is_option: bool, thinks: bool) -> None:
    """`is_option`: the template can be told whether to think; `thinks`: it knows thoughts at all."""
    wants = thinking.type != "disabled"
    if is_option:
        options.setdefault("enable_thinking", wants)
        return
    # "adaptive" leaves it to the model.
    if thinking.type == "adaptive" or wants == thinks:
        return
    reason = "this model does not think" if wants else "this model cannot be told not to"
    raise invalid(
        f"thinking.type is '{thinking.type}', but {reason}; leave it out",
        param="thinking.type",
        code="unsupported_parameter",
    )
