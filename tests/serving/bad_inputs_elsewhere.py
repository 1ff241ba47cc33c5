"""Rows of bad inputs for the routes beside chat and completions: what only they have. See `bad_inputs`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qengine.serving.limits import LIMITS
from tests.serving.bad_rows import BAD_SCHEMAS, DROP, MAX_MODEL_LEN, USER, VOCAB, Fields, each, short

#: Characters that no context of this length can hold, found before they are tokenized.
_TOO_LONG = "x" * (16 * MAX_MODEL_LEN + 1)
_ADDRESS = "http://169.254.169.254/latest/meta-data/"
_SOME_BAD_SCHEMAS = ("no such type", "a remote reference", "a file", "too deep")


# /v1/responses


def responses() -> Iterator[Fields]:
    """Items, tools, forms, thoughts, and what only OpenAI's own servers do."""
    yield from each("input", "input", 400, [DROP, [], {}, None, 5, _TOO_LONG])
    yield Fields("items at the limit and one more", 400, {"input": [USER] * (LIMITS.num_messages + 1)}, "input")
    for item, where in _ITEMS:
        yield Fields(f"item: {short(item)}", 400, {"input": [item]}, f"input[0]{where}")
        yield Fields(f"second item: {short(item)}", 400, {"input": [USER, item]}, f"input[1]{where}")
    yield from each("instructions", "instructions", 400, [5, [], {}])
    for name in ("previous_response_id", "conversation", "prompt"):
        yield from each(name, name, 400, ["x", {"id": "x"}])
    yield from each("background", "background", 400, [True, "yes"])
    for name, value in (("max_completion_tokens", 2), ("n", 2), ("response_format", {})):
        yield from each(f"{name} of chat", name, 400, [value])
    yield from each("effort of chat", "reasoning_effort", 400, ["high"])
    yield from each("include", "include", 400, ["x", ["x"]], param=None)
    yield from each("truncation", "truncation", 400, ["middle", 5])
    yield from each("top_logprobs", "top_logprobs", 400, [-1, 21, 1.5, "2", 2**63])
    yield from each("max_tool_calls", "max_tool_calls", 400, [-1, "2"])
    yield from each("metadata", "metadata", 400, [[], {"a": 1}, {str(i): "" for i in range(17)}], param=None)
    yield from each("reasoning", "reasoning", 400, [5, {"effort": "x"}, {"summary": "detailed"}], param=None)
    yield from each("text", "text", 400, [5, {"format": {}}, {"format": {"type": "json_schema"}}], param=None)
    for name in _SOME_BAD_SCHEMAS:
        shape = {"type": "json_schema", "name": "s", "schema": BAD_SCHEMAS[name]}
        yield Fields(f"schema: {name}", 400, {"text": {"format": shape}})
    yield from _response_tools()


_CALL = {"type": "function_call", "name": "f"}
#: An item, and the part of it that the error names.
_ITEMS: tuple[tuple[Any, str], ...] = (
    ({"content": "hi"}, ".role"),
    ({"role": "root", "content": "hi"}, ".role"),
    ({"role": "user"}, ".content"),
    ({"role": "user", "content": 5}, ".content"),
    ({"role": "user", "content": [{"type": "input_image", "image_url": _ADDRESS}]}, ".content[0]"),
    ({"role": "user", "content": [{"type": "input_file", "file_url": _ADDRESS}]}, ".content[0]"),
    ({"role": "user", "content": ["hi"]}, ".content[0]"),
    ({"type": "item_reference", "id": "x"}, ""),
    ({"arguments": "{", "call_id": "c", **_CALL}, ".arguments"),
    ({"arguments": "{}", "call_id": "", **_CALL}, ".call_id"),
    ({"type": "function_call_output", "output": "x"}, ".call_id"),
    ("hi", ""),
    (None, ""),
)


def _response_tools() -> Iterator[Fields]:
    tool = {"type": "function", "name": "f"}
    yield Fields("129 tools", 400, {"tools": [{**tool, "name": f"f{i}"} for i in range(LIMITS.num_tools + 1)]}, "tools")
    yield Fields("two tools of one name", 400, {"tools": [tool, tool]})
    for kind in ("web_search", "file_search", "code_interpreter", "mcp", "computer_use_preview"):
        hosted = {"type": kind, "server_url": _ADDRESS}
        yield Fields(f"a hosted tool: {kind}", 400, {"tools": [hosted]}, "tools[0]")
    for bad in ({"name": "a b"}, {"name": None}, {"parameters": []}, {"parameters": BAD_SCHEMAS["no such type"]}):
        yield Fields(f"tool with {short(bad)}", 400, {"tools": [{**tool, **bad}], "tool_choice": "required"})
    for choice in ("any", 5, [], {"type": "function"}, {"type": "function", "name": "missing"}, {"type": "web_search"}):
        yield Fields(f"tool_choice {short(choice)}", 400, {"tools": [tool], "tool_choice": choice})
    yield Fields("tool_choice without tools", 400, {"tool_choice": "required"}, "tool_choice")


# /v1/messages and /v1/messages/count_tokens


def messages() -> Iterator[Fields]:
    """Turns, blocks, tools, forms, and what only Anthropic's own servers do."""
    yield from each("messages", "messages", 400, [DROP, [], {}, None, "hi", 5])
    yield Fields(
        "messages at the limit and one more", 400, {"messages": [USER] * (LIMITS.num_messages + 1)}, "messages"
    )
    for message, where in _TURNS:
        yield Fields(f"message: {short(message)}", 400, {"messages": [message]}, f"messages[0]{where}")
        yield Fields(f"second message: {short(message)}", 400, {"messages": [USER, message]}, f"messages[1]{where}")
    yield Fields("a long message", 400, {"messages": [{"role": "user", "content": _TOO_LONG}]})
    yield Fields("thoughts alone", 400, {"messages": [USER, _turn("assistant", {"type": "thinking", "thinking": "x"})]})
    yield from each("system", "system", 400, [5, {}, [5], [{"type": "image"}]], param=None)
    for name in ("container", "mcp_servers", "context_management"):
        yield from each(name, name, 400, ["x", [{"url": _ADDRESS}]])
    for name, value in (("n", 2), ("response_format", {}), ("logprobs", True), ("reasoning_effort", "high")):
        yield from each(f"{name} of chat", name, 400, [value])
    yield from each("stop_sequences", "stop_sequences", 400, [[""], ["x"] * 9, 5, [None]], param=None)
    yield from each("metadata", "metadata", 400, [5, {"user_id": 5}], param=None)
    yield from each("thinking", "thinking", 400, [5, {}, {"type": "on"}, {"type": "enabled"}], param=None)
    effort: list[Any] = [5, {"effort": "x"}, {"format": {}}, {"format": {"type": "text"}}]
    yield from each("output_config", "output_config", 400, effort, param=None)
    yield from _anthropic_tools()


def _turn(role: str, *blocks: Any) -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


_IMAGE = {"type": "image", "source": {"type": "url", "url": _ADDRESS}}
#: A message, and the part of it that the error names.
_TURNS: tuple[tuple[Any, str], ...] = (
    ({"content": "hi"}, ".role"),
    ({"role": "root", "content": "hi"}, ".role"),
    ({"role": "tool", "content": "hi"}, ".role"),
    ({"role": "user"}, ".content"),
    ({"role": "user", "content": None}, ".content"),
    (_turn("user", "hi"), ".content[0]"),
    (_turn("user", _IMAGE), ".content[0]"),
    (_turn("user", {"type": "document", "source": {"type": "url", "url": _ADDRESS}}), ".content[0]"),
    (_turn("user", {"type": "text"}), ".content[0].text"),
    (_turn("user", {"type": "tool_use", "id": "c", "name": "f", "input": {}}), ".content[0]"),
    (_turn("user", {"type": "tool_result", "tool_use_id": "c"}), ".content[0].tool_use_id"),
    (_turn("assistant", {"type": "tool_use", "id": "", "name": "f", "input": {}}), ".content[0].id"),
    ("hi", ""),
    (None, ""),
)


def _anthropic_tools() -> Iterator[Fields]:
    tool = {"name": "f", "input_schema": {"type": "object"}}
    yield Fields("129 tools", 400, {"tools": [{**tool, "name": f"f{i}"} for i in range(LIMITS.num_tools + 1)]}, "tools")
    yield Fields("two tools of one name", 400, {"tools": [tool, tool]})
    for bad in (
        {"name": "a b"},
        {"name": None},
        {"input_schema": []},
        {"type": "bash_20250124"},
        {"input_schema": None},
    ):
        yield Fields(f"tool with {short(bad)}", 400, {"tools": [{**tool, **bad}]})
    for choice in ("any", 5, {}, {"type": "tool"}, {"type": "tool", "name": "missing"}, {"type": "auto", "name": "f"}):
        yield Fields(f"tool_choice {short(choice)}", 400, {"tools": [tool], "tool_choice": choice})
    yield Fields("tool_choice without tools", 400, {"tool_choice": {"type": "any"}}, "tool_choice")


def budgets() -> Iterator[Fields]:
    """What only an answer has: its length, its thoughts, its form."""
    yield Fields("no max_tokens", 400, {"max_tokens": DROP}, "max_tokens")
    for budget in (0, -1, 2, 2**63, "1", None):
        fields = {"thinking": {"type": "enabled", "budget_tokens": budget}}
        yield Fields(f"a budget of {budget} of 2 tokens", 400, fields, "thinking.budget_tokens")
    for name in _SOME_BAD_SCHEMAS:
        shape = {"type": "json_schema", "schema": BAD_SCHEMAS[name]}
        yield Fields(f"schema: {name}", 400, {"output_config": {"format": shape}})


# Texts


def embeddings() -> Iterator[Fields]:
    """What can be turned into vectors, and how."""
    bad: list[Any] = ["", [], [[]], [""], ["a", ""], [-1], [1.5], [True], [None], [[1], "", 3], None, 5, {}, DROP]
    yield from each("input", "input", 400, [*bad, [2**63], [VOCAB], [[0, VOCAB]], ["a"] * (LIMITS.num_prompts + 1)])
    yield from each("input", "input", 200, [[VOCAB - 1], ["a", "b"], [[1, 2], "a"]])
    yield from each("input", "input", 400, [_TOO_LONG, [5] * (MAX_MODEL_LEN + 1), ["a", _TOO_LONG]])
    yield from each("encoding", "encoding_format", 400, ["int8", 5])
    yield from each("dimensions", "dimensions", 400, [0, -1, 3, 1.5, "4", 2**63])
    yield from each("pooling", "pooling", 400, ["max", 5])
    for name in ("normalize", "add_special_tokens"):
        yield from each(name, name, 400, ["yes", 1])
    yield from each("salt", "cache_salt", 400, ["", "x" * 129, "a b", 5])
    yield from each("truncation", "truncate_prompt_tokens", 400, [5])


def tokenize() -> Iterator[Fields]:
    """A text or a conversation."""
    yield from each("prompt", "prompt", 400, [DROP, None, 5, ["a"], {}])
    yield from each("prompt", "prompt", 200, ["", "x" * 100_000])
    yield Fields("both", 400, {"messages": [USER]}, "prompt")
    for value in ([], {}, "hi", [None], [{"role": "root", "content": "a"}], [{"role": "user"}]):
        yield Fields(f"messages {short(value)}", 400, {"prompt": DROP, "messages": value})
    for name in ("add_special_tokens", "return_token_strs", "add_generation_prompt", "continue_final_message"):
        yield from each(name, name, 400, ["yes", 1])
    for name, asked in (("tools", [{"type": "function", "function": {"name": "f"}}]), ("continue_final_message", True)):
        yield from each("of messages", name, 400, [asked])
    kwargs = {"messages": [USER], "chat_template_kwargs": {"tokenize": True}}
    yield Fields("a reserved option of templates", 400, {"prompt": DROP, **kwargs}, "chat_template_kwargs")
    yield from _model_or_none()


def detokenize() -> Iterator[Fields]:
    """Token ids."""
    yield from each("tokens", "tokens", 400, [DROP, None, 5, "a", {}, [[5]]], param=None)
    for value in (-1, VOCAB, 1.5, True, None, "5", 2**63, 10**39):
        yield Fields(f"tokens [5, {value}]", 400, {"tokens": [5, value]}, "tokens[1]")
    yield from each("tokens", "tokens", 200, [[], [VOCAB - 1], [5] * 10_000])
    yield from _model_or_none()


def _model_or_none() -> Iterator[Fields]:
    """Here the model need not be named."""
    yield from each("model", "model", 200, [DROP, None])
    yield from each("model", "model", 400, ["", 5, "x" * (LIMITS.model_name_chars + 1)])
    yield from each("model", "model", 404, ["gpt-4", "../../etc/passwd"])
