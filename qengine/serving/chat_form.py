"""What a chat request asks of its answer (tools, a form, thoughts) and how the answer's parts are shown.

Invariant: a model is asked for nothing that its chat template does not know, and what a grammar makes it write is read
back by the same dialect. A `ChatForm` belongs to one request, a `ChatChoice` to one of its answers.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterable, Set
from typing import Any

from qengine.errors import RequestError
from qengine.serving.answer_parser import AnswerForm, AnswerParser
from qengine.serving.dialect import CallStyle, ToolDialect, reasoning_tags, tool_dialect
from qengine.serving.errors import invalid
from qengine.serving.generation import Delta
from qengine.serving.pieces import Piece
from qengine.serving.protocol import ChatCompletionRequest, ChatMessage, NamedToolChoice, Prompt
from qengine.serving.reasoning import reasoning_phase
from qengine.serving.structured import Form, form_of
from qengine.serving.tool_checks import checked_tools
from qengine.serving.tool_grammar import ToolGrammar, reasoning_lead
from qengine.tokenizer import Tokenizer

_MISTRAL_ID_CHARS = string.ascii_letters + string.digits


def template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as templates read it: arguments of earlier calls are objects, and text is there even if empty.

    Raises:
        ApiError: arguments are not a JSON object.
    """
    shown: dict[str, Any] = message.model_dump(exclude_none=True)
    for position, call in enumerate(shown.get("tool_calls", ())):
        where = f"messages[{index}].tool_calls[{position}].function.arguments"
        call["function"]["arguments"] = parsed_arguments(call["function"]["arguments"], where)
    shown.setdefault("content", "")
    return shown


def parsed_arguments(text: str, where: str) -> dict[str, Any]:
    """The arguments of an earlier call; none if `text` is empty. Raises ApiError, which names `where`."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise invalid(f"{where} is not JSON: {error}", param=where) from error
    if not isinstance(arguments, dict):
        raise invalid(f"{where} is JSON, but no object", param=where)
    return arguments


class ChatForm:
    """What one request asks.

    Args:
        request: the request.
        tokenizer: whose chat template says what the model knows.

    Attributes:
        template_tools: the tools as the template shows them to the model; None for none.
        template_options: further variables of the template.

    Raises:
        ApiError: it asks what this model cannot do, or contradicts itself.
    """

    def __init__(self, request: ChatCompletionRequest, tokenizer: Tokenizer) -> None:
        self._request = request
        self._special_id = tokenizer.special_token_id
        self._asked = form_of(request)
        template = (tokenizer.tool_template() if request.tools else None) or tokenizer.chat_template or ""
        self._tags = reasoning_tags(template)
        self._tools = checked_tools(request, self._asked)
        self._choice = request.tool_choice or ("auto" if self._tools else "none")
        self._dialect = self._find_dialect(tokenizer.tool_template())
        self._answer = AnswerForm(tags=self._tags)
        self.template_options = self._options(tokenizer.chat_template_variables(has_tools=bool(request.tools)))
        knows_tools = bool(request.tools) and tokenizer.tool_template() is not None
        self.template_tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()] or None
        if not knows_tools:
            self.template_tools = None

    def _options(self, known: Set[str]) -> dict[str, Any]:
        """The template's options, with the effort as the template knows it."""
        options = dict(self._request.chat_template_kwargs or {})
        effort = self._request.reasoning_effort
        if effort is None:
            return options
        if "reasoning_effort" in known:
            options.setdefault("reasoning_effort", effort)
        elif "enable_thinking" in known and effort in ("none", "medium"):
            options.setdefault("enable_thinking", effort != "none")
        elif effort != "none" or self._tags is not None:
            raise invalid(
                f"reasoning_effort is '{effort}', but this model's chat template knows no such effort; leave it out",
                param="reasoning_effort",
                code="unsupported_parameter",
            )
        return options

    def _find_dialect(self, template: str | None) -> ToolDialect | None:
        if not self._tools or self._choice == "none":
            return None
        advice = "leave tools out or set tool_choice to 'none'"
        if template is None:
            raise _unsupported(f"tools are given, but this model's chat template knows no tools; {advice}")
        dialect = tool_dialect(template)
        if dialect is None:
            raise _unsupported(
                "tools are given, but this model writes tool calls in a form that this server does not read "
                f"(it reads Hermes and Qwen, Llama 3 and Mistral); {advice}"
            )
        return dialect

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling parameters that this form needs: markers that are special tokens must show in the text."""
        markers = [] if self._tags is None else [self._tags.opener, self._tags.closer]
        markers += [] if self._dialect is None else [self._dialect.opener, self._dialect.closer]
        needs_special = any(self._special_id(marker) is not None for marker in markers if marker)
        return {"skip_special_tokens": False} if needs_special else {}

    def at(self, prompt: Prompt) -> Form | None:
        """Fix what answers to `prompt` look like; returns the grammar to hold them to, if any."""
        phase = None
        if self._tags is not None and isinstance(prompt, str):
            phase = reasoning_phase(prompt, self._tags)
        self._answer = AnswerForm(
            tags=self._tags,
            phase=phase,
            dialect=self._dialect,
            names=frozenset(tool.name for tool in self._tools),
            max_calls=1 if self._request.parallel_tool_calls is False else None,
        )
        lead = reasoning_lead(self._tags, phase, self._special_id)
        if self._dialect is not None:
            return self._tool_form(self._dialect, lead)
        if self._asked is None:
            return None
        return self._asked.after(lead)

    def _tool_form(self, dialect: ToolDialect, lead: str) -> Form | None:
        grammar = ToolGrammar(dialect, self._special_id)
        is_parallel = self._request.parallel_tool_calls is not False
        if isinstance(self._choice, NamedToolChoice):
            named = [tool for tool in self._tools if tool.name == self._choice.function.name]
            return Form(grammar.forced(named, is_parallel=False, lead=lead), "tools")
        if self._choice == "required":
            return Form(grammar.forced(self._tools, is_parallel=is_parallel, lead=lead), "tools")
        content = None if self._asked is None else self._asked.json_schema()
        if content is None and not any(tool.is_strict for tool in self._tools):
            return None
        return Form(grammar.free(self._tools, is_parallel=is_parallel, content=content, lead=lead), "tools")

    @property
    def thoughts_end(self) -> str:
        """What the model writes after its thoughts; nothing if it does not think."""
        return "" if self._tags is None else self._tags.closer

    def new_choice(self) -> ChatChoice:
        """The parts of a new answer; the prompt must be known, see `at`."""
        return ChatChoice(
            self._answer,
            shows_reasoning=self._request.include_reasoning is not False,
            is_named=isinstance(self._choice, NamedToolChoice),
        )


class ChatChoice:
    """One answer in OpenAI's shape, as a whole or in deltas."""

    def __init__(self, form: AnswerForm, *, shows_reasoning: bool, is_named: bool) -> None:
        self._parser = AnswerParser(form)
        self._has_reasoning = form.tags is not None and shows_reasoning
        self._shows_reasoning = shows_reasoning
        self._is_named = is_named
        self._is_mistral = form.dialect is not None and form.dialect.style in (CallStyle.LIST, CallStyle.NAMED)

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next are thoughts."""
        return self._parser.is_thinking

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's: an answer that ends with calls says so, unless the one call was the client's own choice."""
        ends_with_calls = reason == "stop" and self._parser.num_calls and not self._is_named
        return "tool_calls" if ends_with_calls else reason

    def deltas(self, delta: Delta) -> list[dict[str, Any]]:
        """What a stream gains with new text."""
        return [self._delta(piece) for piece in self.pieces(delta)]

    def message(self, delta: Delta) -> dict[str, Any]:
        """The whole message of an answer that came at once."""
        pieces = self.pieces(delta)
        calls = _calls(pieces, self.new_call_id)
        content = _text(pieces, "content")
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if self._has_reasoning:
            thoughts = _text(pieces, "reasoning") or None
            message |= {"reasoning_content": thoughts, "reasoning": thoughts}
        return {**message, "tool_calls": calls} if calls else message

    def pieces(self, delta: Delta) -> list[Piece]:
        """The parts that new text makes certain. For each delta either this is called, or one of the two above."""
        pieces = self._parser.feed(delta.text, is_last=delta.finish_reason is not None)
        return pieces if self._shows_reasoning else [piece for piece in pieces if piece.kind != "reasoning"]

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if piece.kind == "content":
            return {"content": piece.text}
        if piece.kind == "reasoning":
            return {"reasoning_content": piece.text, "reasoning": piece.text}
        if piece.kind == "call":
            return {"tool_calls": [{"index": piece.call, **_call(self.new_call_id(), piece.text)}]}
        return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}

    def new_call_id(self) -> str:
        """What the result of a call will refer to it by."""
        if self._is_mistral:  # Its template accepts no other ids.
            return "".join(secrets.choice(_MISTRAL_ID_CHARS) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


def _call(call_id: str, name: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}


def _calls(pieces: Iterable[Piece], new_id: Any) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.kind == "call":
            calls.append(_call(new_id(), piece.text))
        elif piece.kind == "arguments":
            calls[piece.call]["function"]["arguments"] += piece.text
    return calls


def _text(pieces: Iterable[Piece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def _unsupported(message: str) -> RequestError:
    return RequestError(message, param="tools", code="unsupported_parameter")
