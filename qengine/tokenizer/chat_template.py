"""A model's chat template: messages -> the text of a prompt.

The environment is the one transformers gives templates (trim_blocks, lstrip_blocks, loop controls, tojson,
raise_exception, strftime_now, {% generation %}), so a template renders here as it does there.
Invariant: templates come from strangers and run in a sandbox (`template_sandbox`), on plain copies of the messages,
with bounded time, memory and result; whatever goes wrong in one is a RequestError. It does not accept templates from
clients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, TypeVar

from jinja2 import Template, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError

from qengine.errors import RequestError
from qengine.tokenizer.rust_errors import shorten
from qengine.tokenizer.template_reading import count_nodes, depth_of, loops_over_content, options_of, reads
from qengine.tokenizer.template_sandbox import RaisedByTemplate, TemplateEnvironment

DEFAULT_MAX_CHARS = 2**24
MAX_OPTION_CHARS = 4096
#: The longest template of a published model has some 20,000 characters.
MAX_TEMPLATE_CHARS = 2**17
#: Nodes of its syntax tree, of which such a template has some 5,000; compiling this many takes a second.
MAX_TEMPLATE_NODES = 20_000
#: Of these in each other. Templates of known families have some 10; of more than 200 Python's compiler makes nothing.
MAX_TEMPLATE_DEPTH = 200
#: Names that a template is given by us, or that mean something to other engines: never a client's to set.
RESERVED_OPTIONS = frozenset(
    (
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "conversation"),
        *("chat_template", "tokenize", "tokenizer", "return_tensors", "return_dict", "max_chars"),
    )
)
#: Written after the last message's text to find it in the result; the trailing space shows whether a template trims.
_END_MARK = "\ue000end of the final message\ue000 "
#: Names under which clients and templates pass a message's reasoning; the first is what most templates read.
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_T = TypeVar("_T")


class ChatTemplate:
    """One template, compiled at first use.

    Attributes:
        text: the Jinja source.
    """

    def __init__(self, text: str, *, now: Callable[[], datetime] = datetime.now) -> None:
        self.text = text
        self._now = now

    def compile(self) -> None:
        """Compile now. Raises RequestError if the text is not a valid template."""
        _ = self._compiled

    @cached_property
    def option_names(self) -> frozenset[str]:
        """The template's own variables: what it reads and nobody but a client gives."""
        return self._ask(options_of) - RESERVED_OPTIONS

    @cached_property
    def accepts_content_parts(self) -> bool:
        """Whether the template loops over a message's content, so that it wants parts and not only a string."""
        return self._ask(loops_over_content)

    @cached_property
    def reads_tools(self) -> bool:
        """Whether the template can show tools to the model."""
        return self._ask(lambda tree: reads(tree, "tools"))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        continue_final_message: bool,
        special_tokens: Mapping[str, str],
        options: Mapping[str, Any],
        max_chars: int,
    ) -> str:
        """See `Tokenizer.render_chat`."""
        self._check_options(options, special_tokens)
        chat = [self._plain_message(message, index) for index, message in enumerate(_plain(messages, "messages"))]
        if not chat:
            raise RequestError("messages is empty, expected at least one message", param="messages")
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt are both true, expected at most one",
                    param="continue_final_message",
                )
            _mark_end(chat[-1])
        variables = {
            **special_tokens,
            **options,
            "messages": chat,
            "tools": _plain(tools, "tools") if tools is not None else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(variables, max_chars)
        return _cut_at_mark(text) if continue_final_message else text

    @cached_property
    def _environment(self) -> TemplateEnvironment:
        return TemplateEnvironment(self._now)

    def _ask(self, question: Callable[[nodes.Template], _T]) -> _T:
        tree = self._syntax_tree
        try:
            return question(tree)
        except Exception as error:  # it may compile the template, see `_compiled`; and Jinja walks in recursion
            raise _invalid(error) from error

    @cached_property
    def _syntax_tree(self) -> nodes.Template:
        if len(self.text) > MAX_TEMPLATE_CHARS:
            raise _invalid(ValueError(f"it has {len(self.text)} characters, at most {MAX_TEMPLATE_CHARS} are read"))
        try:
            tree = self._environment.parse(self.text)
        except Exception as error:  # also ValueError and OverflowError, of what stands in it as numbers
            raise _invalid(error) from error
        num_nodes = count_nodes(tree)
        if num_nodes > MAX_TEMPLATE_NODES:
            raise _invalid(ValueError(f"it has {num_nodes} parts, at most {MAX_TEMPLATE_NODES} are compiled"))
        depth = depth_of(tree)
        if depth > MAX_TEMPLATE_DEPTH:
            raise _invalid(ValueError(f"it has {depth} parts in each other, at most {MAX_TEMPLATE_DEPTH} are compiled"))
        return tree

    @cached_property
    def _compiled(self) -> Template:
        _ = self._syntax_tree  # Checks the text; the environment changes the tree that it compiles.
        try:
            return self._environment.from_string(self.text)
        except Exception as error:  # Jinja's, and those of Python's own compiler
            raise _invalid(error) from error

    def _run(self, variables: Mapping[str, Any], max_chars: int) -> str:
        pieces, num_chars = [], 0
        try:
            for piece in self._compiled.generate(TemplateEnvironment.budgeted(variables)):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > max_chars:
                    raise _TooLongError
        except RequestError:
            raise
        except _TooLongError:
            raise RequestError(
                f"the conversation makes a prompt of more than {max_chars} characters, expected fewer",
                param="messages",
                code="context_length_exceeded",
            ) from None
        except RaisedByTemplate as error:
            raise RequestError(
                f"the chat template refuses these messages: {shorten(str(error))}", param="messages"
            ) from error
        except SecurityError as error:
            raise RequestError(
                f"the chat template does what is not allowed: {shorten(str(error))}; use --chat-template FILE with one "
                "that you trust",
                param="messages",
            ) from error
        except Exception as error:  # a template is a program: it can fail in every way that Python can
            raise RequestError(
                f"the chat template cannot render these messages: {type(error).__name__}: {shorten(str(error))}; check "
                "the roles and fields of the messages against what the model expects",
                param="messages",
            ) from error
        return "".join(pieces)

    def _check_options(self, options: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
        for name, value in options.items():
            param = "chat_template_kwargs"
            if name in RESERVED_OPTIONS or name in special_tokens:
                raise RequestError(f"the chat template option '{name}' is set by the server", param=param)
            if name not in self.option_names:
                known = ", ".join(sorted(self.option_names - special_tokens.keys())) or "none"
                raise RequestError(f"unknown chat template option '{name}'; this model's has: {known}", param=param)
            if not _is_small_scalar(value):
                raise RequestError(
                    f"the chat template option '{name}' is {shorten(repr(value)[:MAX_OPTION_CHARS])}, expected a "
                    f"string of at most {MAX_OPTION_CHARS} characters, a finite number, true, false or null",
                    param=param,
                )

    def _plain_message(self, message: Any, index: int) -> dict[str, Any]:
        """The message without null fields, its content in the form the template expects."""
        where = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"{where} is no object with a 'role'", param="messages")
        present = {key: value for key, value in message.items() if value is not None}
        content = present.get("content")
        if isinstance(content, list):
            texts = [_part_text(part, f"{where}.content[{position}]") for position, part in enumerate(content)]
            if not self.accepts_content_parts:
                present["content"] = "\n".join(texts)
        elif content is not None and not isinstance(content, str):
            raise RequestError(
                f"{where}.content is a {type(content).__name__}, expected a string or a list of parts", param="messages"
            )
        reasoning = next((present[name] for name in _REASONING_NAMES if name in present), None)
        return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def _plain(value: Any, param: str) -> Any:
    """A copy made of plain JSON types alone: a template can neither change the caller's objects nor call into them."""
    try:
        plain = json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{param} is not JSON data: {shorten(str(error))}", param=param) from error
    if not isinstance(plain, list):
        raise RequestError(f"{param} is {shorten(repr(value))}, expected a list of objects", param=param)
    return plain


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise RequestError(
            f"{where} has the type {shorten(repr(kind))}, expected {{'type': 'text', 'text': ...}}: this model reads "
            "text only",
            param="messages",
        )
    text: str = part["text"]
    return text


def _is_small_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_OPTION_CHARS
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return value.bit_length() <= 64
    return value is None


def _invalid(error: BaseException) -> RequestError:
    line = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
    return RequestError(
        f"the chat template is not valid Jinja{line}: {shorten(str(error))}; start with --chat-template FILE",
        param="messages",
    )


# continue_final_message


def _mark_end(message: dict[str, Any]) -> None:
    """Write the mark after the text of `message`."""
    content = message.get("content")
    if isinstance(content, str) and _END_MARK not in content:
        message["content"] = content + _END_MARK
    elif isinstance(content, list) and content:
        content[-1]["text"] += _END_MARK
    else:
        raise RequestError(
            "continue_final_message is true but the last message has no text to continue", param="messages"
        )


def _cut_at_mark(text: str) -> str:
    mark = _END_MARK.rstrip()
    position = text.rfind(mark)
    if position < 0:
        raise RequestError(
            "continue_final_message is true but this chat template does not show the last message's text",
            param="messages",
        )
    before = text[:position]
    # A template that trimmed the mark's space trims every message's end: so must the cut.
    return before if text.startswith(_END_MARK, position) else before.rstrip()


class _TooLongError(Exception):
    """The result passed its bound."""
