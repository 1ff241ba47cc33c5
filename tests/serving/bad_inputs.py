"""Bad inputs over HTTP, as data: what is sent, and which answers are right. `test_bad_inputs` sends all of them.

A new route needs a good body in ROUTES, the families of fields that it shares with others, and those of its own. Each
family is a fault and its neighbours on both sides of the line, so good requests are among them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qengine.serving.limits import LIMITS
from tests.serving import bad_inputs_elsewhere as elsewhere
from tests.serving.bad_rows import (
    BAD_SCHEMAS,
    CHAT,
    CLOSED,
    COUNT,
    DETOKENIZE,
    DROP,
    EMBED,
    JSON,
    KEY,
    MAX_MODEL_LEN,
    MESSAGES,
    MODEL,
    OTHER_KEY,
    REFUSAL,
    RESPONSES,
    ROUTES,
    TEXT,
    TOKENIZE,
    USER,
    VOCAB,
    Case,
    Fields,
    each,
    post,
    short,
)

# Fields that every route that generates has

_NAN = [float("nan"), float("inf"), float("-inf")]
_NO_NUMBER = ["10", "hot", True, [], {}]
_HUGE = [-(2**31), 2**63, 2**64, 10**39]


def _sampling() -> Iterator[Fields]:
    yield from each("max_tokens", "max_tokens", 400, [0, -1, 1.5, *_NO_NUMBER, *_HUGE])
    yield from each("min_tokens", "min_tokens", 400, [-1, 3, 1.5, *_NO_NUMBER, *_HUGE])
    yield from each("temperature", "temperature", 400, [-0.1, 2.1, -1, 1e308, *_NO_NUMBER, *_HUGE])
    yield from each("temperature", "temperature", 200, [0, 0.0, 1e-320, 2, 2.0, None])
    yield from each("top_p", "top_p", 400, [0, -1, 1.0001, 1e308, *_NO_NUMBER, *_HUGE])
    yield from each("top_p", "top_p", 200, [1, 1e-320, None])
    yield from each("top_k", "top_k", 400, [-2, 10**9, 0.5, *_NO_NUMBER, *_HUGE])
    yield from each("top_k", "top_k", 200, [0, -1, 1, VOCAB, VOCAB + 1, 10**6, None])
    yield from each("min_p", "min_p", 400, [-0.001, 1.001, 2, *_NO_NUMBER, *_HUGE])
    for name in ("presence_penalty", "frequency_penalty"):
        yield from each(name, name, 400, [-2.01, 2.01, 1e308, *_NO_NUMBER, *_HUGE])
        yield from each(name, name, 200, [-2, 2, None])
    yield from each("repetition", "repetition_penalty", 400, [0, -1, 0.009, 100.5, 1e308, *_NO_NUMBER, *_HUGE])
    yield from each("repetition", "repetition_penalty", 200, [0.01, 100, None])
    yield from each("seed", "seed", 400, [-1, 2**63, 2**64, "a", 1.5, True])
    yield from each("seed", "seed", 200, [0, 2**63 - 1, None])


def _choices() -> Iterator[Fields]:
    yield from each("n", "n", 400, [0, -1, LIMITS.num_choices + 1, 10**9, 2.5, *_NO_NUMBER])
    yield from each("n", "n", 200, [1, LIMITS.num_choices, None])


def _stops() -> Iterator[Fields]:
    yield from each("stop", "stop", 400, [["x"] * (LIMITS.num_stop_strings + 1), 5, {"a": "b"}], param=None)
    yield from each("stop", "stop", 400, [[""], "", ["x" * (LIMITS.stop_chars + 1)], "x" * 10**6, [None]], param=None)
    yield from each("stop", "stop", 200, [["x"] * LIMITS.num_stop_strings, "x" * LIMITS.stop_chars, [], None])


def _token_lists() -> Iterator[Fields]:
    yield from each(
        "stop_token_ids", "stop_token_ids", 400, [[VOCAB], [-1], [1.5], ["1"], [True], 3, [2**63]], param=None
    )
    yield from each("stop_token_ids", "stop_token_ids", 400, [[1] * (LIMITS.num_token_ids + 1)])
    yield from each("allowed", "allowed_token_ids", 400, [[], [VOCAB], [-1], [None], "x"], param=None)
    bias = "logit_bias"
    too_many = {str(i): 1 for i in range(LIMITS.num_logit_bias + 1)}
    bad = [{str(VOCAB): 1}, {"-1": 1}, {"x": 1}, {"1": 101}, {"1": -100.5}, {"1": "1"}, {"1": None}, {"²": 1}, [], "x"]
    yield from each(bias, bias, 400, [*bad, too_many, {str(2**63): 1}, {"": 1}], param=None)
    yield from each(bias, bias, 200, [{"1": 100}, {str(VOCAB - 1): -100}, {}, None])
    for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "add_special_tokens"):
        yield from each(name, name, 400, ["yes", 1, [], {}])


def _streams_and_salts() -> Iterator[Fields]:
    yield from each("stream", "stream", 400, ["yes", 1, [], {}])
    yield Fields("stream_options alone", 400, {"stream_options": {"include_usage": True}}, "stream_options")
    yield Fields("stream_options is no object", 400, {"stream": True, "stream_options": 5}, "stream_options")
    yield Fields("usage in each chunk", 400, {"stream": True, "stream_options": {"continuous_usage_stats": True}})
    yield Fields("include_usage", 400, {"stream": True, "stream_options": {"include_usage": 1}})
    yield from each("salt", "cache_salt", 400, ["", "x" * 129, "a\0b", "a/b", "a b", "é", "a\n", 5, [], {}], param=None)
    yield from each("salt", "cache_salt", 200, ["x" * 128, "aA0+=_-", None])


#: A field of another server that would change the answer, a value that does, and one that does not.
OF_OTHER_SERVERS: tuple[tuple[str, Any, Any], ...] = (
    ("enable_thinking", False, None),
    ("stop_regex", "a+", None),
    ("n_predict", 5, None),
    ("repeat_penalty", 1.1, 1.0),
    ("top_n_sigma", 1.5, -1.0),
)
_THINKING: tuple[tuple[str, Any, Any], ...] = (("thinking", {"type": "enabled", "budget_tokens": 5}, None),)


def _models() -> Iterator[Fields]:
    yield from each("model", "model", 400, [DROP, "", None, 5, [MODEL], "x" * 2**20])
    yield from each("model", "model", 404, ["gpt-4", "../../etc/passwd", "x" * 1024, "TINY", " tiny", "tiny/.."])
    yield Fields("the model's name is cut", 404, {"model": "y" * 1000}, "model", "y" * (LIMITS.shown_chars - 1) + "...")


def _of_other_servers(fields: Sequence[tuple[str, Any, Any]]) -> Iterator[Fields]:
    for name, asks, harmless in fields:
        yield Fields(f"{name} is refused", 400, {name: asks}, name)
        yield Fields(f"{name} that asks for nothing", 200, {name: harmless})


def _thinking_elsewhere() -> Iterator[Fields]:
    yield from _of_other_servers(_THINKING)


def _unknown_fields() -> Iterator[Fields]:
    yield Fields("an unknown field is ignored", 200, {"unheard_of": {"a": [1]}, "user": "me", "metadata": {"a": "b"}})
    template = "{% for i in range(99999999) %}{% for j in range(99999999) %}x{% endfor %}{% endfor %}"
    for name, value in (("chat_template", template), ("prompt_embeds", "AAAA"), ("mm_processor_kwargs", {"a": 1})):
        yield Fields(f"{name} is refused", 400, {name: value}, name)
    yield from _of_other_servers(OF_OTHER_SERVERS)
    yield from each("log-probabilities of prompts", "prompt_logprobs", 400, [-1, 0, 1, 10**9])


def _forms() -> Iterator[Fields]:
    for name, schema in BAD_SCHEMAS.items():
        shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        yield Fields(f"schema: {name}", 400, {"response_format": shape})
        yield Fields(f"guided schema: {name}", 400, {"structured_outputs": {"json": schema}})
    form = "response_format"
    yield from each(form, form, 400, [{}, {"type": "xml"}, {"type": "json_schema"}, 5, "json_object", []], param=None)
    outputs = "structured_outputs"
    too_long = "a" * (LIMITS.regex_bytes + 1)
    regexes = [{"regex": regex} for regex in ("([", "((a{999}){999}){999}", too_long, 5)]
    choices = [{"choice": value} for value in ([], "a", [5], ["x"] * (LIMITS.grammar_choices + 1))]
    yield from each(outputs, outputs, 400, [*regexes, *choices, {"grammar": "start: ((("}, {}, [], 5], param=None)
    yield Fields("two forms", 400, {outputs: {"regex": "a", "choice": ["a"]}})
    yield Fields("JSON that is none", 400, {outputs: {"json": "{"}})
    yield Fields("a good form", 200, {outputs: {"choice": ["a", "b"]}})


_GENERATION = (_sampling, _stops, _token_lists, _streams_and_salts, _models, _unknown_fields)
_EVERYTHING = (*_GENERATION, _thinking_elsewhere, _choices, _forms)
#: Path -> the families of fields that mean there what they mean everywhere.
SHARED: Mapping[str, Sequence[Callable[[], Iterator[Fields]]]] = {
    CHAT: _EVERYTHING,
    TEXT: _EVERYTHING,
    RESPONSES: (*_GENERATION, _thinking_elsewhere),
    MESSAGES: _GENERATION,
    COUNT: (_models, _unknown_fields),
    EMBED: (_models, _unknown_fields),
    TOKENIZE: (_unknown_fields,),
    DETOKENIZE: (_unknown_fields,),
}


# Fields of one route


def _messages() -> Iterator[Fields]:
    yield from each("messages", "messages", 400, [DROP, [], {}, None, "hi", 5])
    yield Fields("100,000 messages", 400, {"messages": [USER] * 100_000})
    yield Fields(
        "messages at the limit and one more", 400, {"messages": [USER] * (LIMITS.num_messages + 1)}, "messages"
    )
    bad = [
        {"content": "hi"},
        {"role": "root", "content": "hi"},
        {"role": 5, "content": "hi"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": 5},
        {"role": "user", "content": {"text": "hi"}},
        {"role": "user", "content": ["hi"]},
        {"role": "system", "content": None},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": None, "tool_call_id": "1"},
        {"role": "user", "content": "hi", "name": 5},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        "hi",
        None,
    ]
    for message in bad:
        yield Fields(f"message: {short(message)}", 400, {"messages": [message]})
        yield Fields(f"second message: {short(message)}", 400, {"messages": [USER, message]})
    for part in MEDIA:
        yield Fields(f"part: {json.dumps(part)}", 400, {"messages": [{"role": "user", "content": [part]}]})
    yield Fields("the template's own refusal", 400, {"messages": [{"role": "system", "content": "hi"}]}, says=REFUSAL)


MEDIA: tuple[dict[str, Any], ...] = (
    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data/"}},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "file", "file": {"file_id": "x"}},
    {"type": "video_url", "video_url": {"url": "http://localhost:1/"}},
    {"type": "refusal", "refusal": "no"},
    {"type": "text"},
    {"type": "text", "text": 5},
    {"type": "unheard_of"},
)


_BAD_PATTERNS = ({"pattern": 5}, {"pattern": "a" * (LIMITS.regex_bytes + 1)})
#: Python's own `re` takes nine seconds for it.
_SLOW_PATTERN = "(?i)" + "[\x01-\uffff]" * 580


def _tool(name: Any = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def _tools() -> Iterator[Fields]:
    yield Fields("tools at the limit", 200, {"tools": [_tool(f"f{i}") for i in range(8)], "tool_choice": "none"})
    yield Fields("129 tools", 400, {"tools": [_tool(f"f{i}") for i in range(LIMITS.num_tools + 1)]}, "tools")
    yield Fields("two tools of one name", 400, {"tools": [_tool(), _tool()]})
    for name in ("", "a b", "x" * 65, "é", 'a"b', 5, None):
        yield Fields(f"tool name {short(name)}", 400, {"tools": [_tool(name)]})
    for parameters in ([], "x", 5, {"type": "array"}, {"type": "strnig"}, *list(BAD_SCHEMAS.values())[3:]):
        yield Fields(f"tool parameters {short(parameters)}", 400, {"tools": [_tool(parameters=parameters)], **REQUIRED})
    for property_ in ({"type": "strnig"}, {"type": 5}, {"type": ["x"]}, *_BAD_PATTERNS):
        tools = {"tools": [_tool(parameters={"type": "object", "properties": {"a": property_}})]}
        yield Fields(f"tool property {short(property_)}", 400, tools)
    for pattern in ("([", _SLOW_PATTERN):
        parameters = {"type": "object", "properties": {"a": {"pattern": pattern}}, "required": ["a"]}
        tools = {"tools": [_tool(parameters=parameters)]}
        yield Fields(f"tool pattern {short(pattern)} that calls must match", 400, {**tools, **REQUIRED})
    shown = {"type": "object", "properties": {"a": {"pattern": r"\p{Lu}+"}}}
    yield Fields("a tool's pattern that Python does not know", 200, {"tools": [_tool(parameters=shown)]})
    for choice in ("any", 5, [], {"type": "function"}, {"type": "function", "function": {"name": "missing"}}):
        yield Fields(f"tool_choice {short(choice)}", 400, {"tools": [_tool()], "tool_choice": choice})
    yield Fields("tool_choice without tools", 400, REQUIRED, "tool_choice")
    named = {"tool_choice": {"type": "function", "function": {"name": "f"}}}
    forms = {"response_format": {"type": "json_object"}, "structured_outputs": {"choice": ["a"]}}
    guided = {"guided_json": {}, "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": 'start: "a"'}
    for name, form in (forms | guided).items():
        for how, choice in (("required", REQUIRED), ("named", named)):
            yield Fields(f"a call that is {how} and {name}", 400, {"tools": [_tool()], name: form, **choice}, name)


REQUIRED = {"tool_choice": "required"}


def _chat_fields() -> Iterator[Fields]:
    yield from _messages()
    yield from _tools()
    yield Fields("21 top_logprobs", 400, {"logprobs": True, "top_logprobs": 21}, "top_logprobs")
    yield from each("top_logprobs", "top_logprobs", 400, [-1, 1.5, "2", 2**63, 1])
    yield from each("logprobs", "logprobs", 400, ["yes", 1, 0, []])
    yield Fields("20 top_logprobs", 200, {"logprobs": True, "top_logprobs": 20})
    yield from each("max_completion_tokens", "max_completion_tokens", 400, [0, -1, "2", 1.5, 2**63, 3])
    kwargs = "chat_template_kwargs"
    bad: list[Any] = [{"tokenize": True}, {"messages": []}, {"tools": [{}]}, {"chat_template": "x"}, {"unheard_of": 1}]
    yield from each(kwargs, kwargs, 400, [*bad, {"enable_thinking": {"a": 1}}, {"enable_thinking": "x" * 5000}, 5, []])
    yield Fields("both prompts", 400, {"continue_final_message": True, "add_generation_prompt": True})
    yield from each("echo", "echo", 400, [True])
    yield from each("best_of", "best_of", 400, [2])
    yield Fields("echo and best_of that ask for nothing", 200, {"echo": False, "best_of": 1})
    call = {"role": "assistant", "content": "a", "function_call": {"name": "f", "arguments": "{}"}}
    yield Fields("an older call", 400, {"messages": [USER, call, USER]}, "messages[1].function_call")
    yield Fields("no older call", 200, {"messages": [USER, {**call, "function_call": None}, USER]})
    yield from each("effort", "reasoning_effort", 400, ["high", "loud", "", 5])
    yield from each("effort", "reasoning_effort", 200, ["none", "medium", None])
    yield Fields("a long message", 400, {"messages": [{"role": "user", "content": "x" * (16 * MAX_MODEL_LEN + 1)}]})


def _prompts() -> Iterator[Fields]:
    bad: list[Any] = ["", [], [[]], [""], ["a", ""], [-1], [1.5], [True], [None], [[1], "", 3], None, 5, {}, DROP]
    yield from each("prompt", "prompt", 400, [*bad, [2**63], [[1, -1]], [1, "a"], [["a"]]])
    yield from each("prompt", "prompt", 400, [[VOCAB], [[0, VOCAB]], [2**31 - 1]])
    yield from each("prompt", "prompt", 400, [["a"] * 1000, ["a"] * (LIMITS.num_prompts + 1)])
    yield from each("prompt", "prompt", 200, [[VOCAB - 1], "a", ["a", "b"], [[1, 2], [3]], [[1, 2], "a"]])
    one = {"max_tokens": 1}
    yield Fields("max_model_len - 1 ids", 200, {**one, "prompt": [5] * (MAX_MODEL_LEN - 1)})
    for num_ids in (MAX_MODEL_LEN, MAX_MODEL_LEN + 1, 100_000):
        says = f"{num_ids} tokens"
        yield Fields(f"{num_ids} ids", 400, {**one, "prompt": [5] * num_ids}, "prompt", says)
    yield Fields("one token too many", 400, {"max_tokens": 3, "prompt": [5] * (MAX_MODEL_LEN - 2)}, "prompt", "512")
    zalgo = "Z" + "\u0300\u0489\u0323" * 10_000
    for name, text in (("4 MB of one letter", "a" * 2**22), ("zalgo", zalgo), ("newlines", "\n" * 10**6)):
        yield Fields(name, 400, {"prompt": text}, "prompt", f"{len(text)} characters")
        yield Fields(f"{name} beside others", 400, {"prompt": ["a", text]}, "prompt")
    yield from each("logprobs", "logprobs", 400, [21, -1, "2", 1.5, True, 2**63])
    yield from each("echo", "echo", 400, ["yes", 1])
    yield from each("max_completion_tokens", "max_completion_tokens", 400, [5])
    yield from each("top_logprobs", "top_logprobs", 400, [5])
    yield from each("effort", "reasoning_effort", 400, ["none", "high"])
    yield from each("suffix", "suffix", 400, ["x", 5])
    yield from each("best_of", "best_of", 400, [2, 0, "x", 2**63], param=None)
    yield Fields("tools", 400, {"tools": [_tool()]}, "tools")


#: The families of one route alone.
OWN: Mapping[str, Sequence[Callable[[], Iterator[Fields]]]] = {
    CHAT: (_chat_fields,),
    TEXT: (_prompts,),
    RESPONSES: (elsewhere.responses,),
    MESSAGES: (elsewhere.messages, elsewhere.budgets),
    COUNT: (elsewhere.messages,),
    EMBED: (elsewhere.embeddings,),
    TOKENIZE: (elsewhere.tokenize,),
    DETOKENIZE: (elsewhere.detokenize,),
}
#: All kinds of bodies and sizes are sent there. One reader serves every route, so the others get what costs little.
_WITH_EVERY_BODY = (CHAT, TEXT)
_LIGHT_BYTES = 10_000


# Bodies


def _bodies(path: str) -> Iterator[Case]:
    good = json.dumps(ROUTES[path]).encode()
    for kind in (
        *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json", ""),
        *("application/jsonx", "application/json-patch+json", "application/xml", "application/json, text/plain"),
    ):
        yield post(f"{path}: Content-Type {kind!r}", 415, path, good, headers=(("Content-Type", kind),))
    yield post(f"{path}: no Content-Type", 415, path, good, headers=())
    yield post(
        f"{path}: with a charset", 200, path, good, headers=(("Content-Type", "Application/JSON; charset=utf-8"),)
    )
    for content in BAD_BODIES:
        if len(content) > _LIGHT_BYTES and path not in _WITH_EVERY_BODY:
            continue
        yield post(f"{path}: body {content[:20]!r}", 400, path, content)
    bomb = gzip.compress(b" " * 2**24)
    for encoding in ("gzip", "deflate", "br", "identity, gzip", "x"):
        yield post(f"{path}: {encoding}", 415, path, bomb, headers=(*JSON, ("Content-Encoding", encoding)))
    for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        yield Case(f"{method} {path}", (405,), path, method)
    for character in ("🙂", "\u202e", "\ufdd0", "e\u0301"):
        text = json.dumps({**ROUTES[path], "user": character}, ensure_ascii=False).encode()
        yield post(f"{path}: {character!r} is text", 200, path, text)


BAD_BODIES = (
    *(b"", b" ", b"{", b"null", b"[]", b'"x"', b"5", b"true", b"nonsense", b"\x00", b"\xff\xfe{}", b"\xef\xbb\xbf{}"),
    *(b'{"model": NaN}', b'{"model": Infinity}', b'{"model": 1e999}', b'{"model": ' + b"9" * 5000 + b"}"),
    *(b'{"model": "\xff"}', b'{"model": "\xc0\xaf"}', b'{"model": "\xed\xa0\x80"}', b'{"model": "\\ud800"}'),
    *(b'{"\\udfff": 1}', b'{"model": "a\\u0000"}', b'{"model": "a\x00"}', b'{"model": "a\nb"}', b"{'model': 'x'}"),
    *(b'{"a":' + b"[" * 65 + b"]" * 65 + b"}", b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b"[" * 1_000_000),
    b"{" + b",".join(b'"k%d":1' % i for i in range(LIMITS.json_keys + 1)) + b"}",
    b'{"a": [' + b"1," * LIMITS.json_items + b"0]}",
    *(b'{"model": "x"} {}', b'{"model": "x",}', b"{} // comment"),
)


def _sizes(path: str) -> Iterator[Case]:
    limit = LIMITS.body_bytes
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"

    def sent(name: str, statuses: tuple[int, ...], raw: bytes) -> Case:
        return Case(f"{path}: {name}", statuses, path, raw=raw)

    yield sent("one byte too many", (413,), head + b"Content-Length: %d\r\n\r\n" % (limit + 1) + b" " * 99)
    yield sent("much too many", (413,), head + b"Content-Length: %d\r\n\r\n" % 10**18 + b" " * 99)
    if path not in _WITH_EVERY_BODY:
        return
    too_much = b"%x\r\n" % (limit + 1) + b" " * (limit + 1) + b"\r\n0\r\n\r\n"
    yield sent("too much in one piece", (413, CLOSED), chunked + too_much)
    yield sent("as much as allowed", (400,), head + b"Content-Length: %d\r\n\r\n" % limit + b" " * limit)
    for length in (b"-1", b"x", b"1e3", b"+5", b"0x10", b"9" * 40, b"5, 6"):
        yield sent(f"Content-Length {length!r}", (400, CLOSED), head + b"Content-Length: " + length + b"\r\n\r\n")
    yield sent("a bad chunk", (400, CLOSED), chunked + b"zz\r\n{}\r\n0\r\n\r\n")
    yield sent("a negative chunk", (400, CLOSED), chunked + b"-1\r\n{}\r\n0\r\n\r\n")
    both = head + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    yield sent("two ways to say how long", (400, CLOSED), both)
    yield sent("an unknown coding", (400, 501, CLOSED), head + b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n")


# Heads


def _heads() -> Iterator[Case]:
    start = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    heads = {
        "a megabyte in one header": start + b"X-Long: " + b"a" * 2**20 + b"\r\n\r\n",
        "a megabyte of path": b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "NUL in a header": start + b"X-Bad: a\0b\r\n\r\n",
        "CR in a header": start + b"X-Bad: a\rb\r\n\r\n",
        "a space before the colon": start + b"X-Bad : a\r\n\r\n",
        "no colon": start + b"X-Bad\r\n\r\n",
        "an empty name": start + b": a\r\n\r\n",
        "letters that are none": start + b"X-\xff: a\r\n\r\n",
        "no number as the version": b"GET /health HTTP/x.y\r\nHost: localhost\r\n\r\n",
        "no version": b"GET /health\r\n\r\n",
        "no host": b"GET /health HTTP/1.1\r\n\r\n",
        "two hosts": start + b"Host: localhost\r\n\r\n",
        "spaces in the path": b"GET /he alth HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 60 + b"\r\n\r\n",
        "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        "HTTP/2 without asking": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    }
    for name, raw in heads.items():
        yield Case(name, (400, 403, 431, 505, CLOSED), raw=raw)
    yield Case("1,000 headers", (431, CLOSED), headers=tuple((f"x-{i}", "1") for i in range(1000)))
    yield Case("101 headers", (431,), headers=tuple((f"x-{i}", "1") for i in range(LIMITS.num_headers)))
    yield Case("a foreign host", (403,), raw=b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n")
    yield Case("a foreign page", (403,), headers=(("Origin", "https://evil.example"),))
    for path in ("/v2/nothing", "/v1", "/v1/", "/v1/model", "/v1/chat", "/etc/passwd", "/%2e%2e/%2e%2e/etc/passwd"):
        yield Case(f"no route {path}", (404,), path)
    for path in ("//v1/models", "/V1/MODELS", "/v1/models//", "/v1/models/..", "/v1/models/nothing", "/v1/%00", "/%ff"):
        yield Case(f"no route {path!r}", (404,), path)
    for path in ("/health", "/v1/models", "/metrics", "/version"):
        for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW"):
            yield Case(f"{method} {path}", (405,), path, method, b"" if method == "POST" else None)
    yield Case("a query where none is expected", (200,), "/health?x=" + "%00" * 100)


def _by_route(path: str) -> Iterator[Case]:
    for family in (*SHARED[path], *OWN[path]):
        for row in family():
            yield row.on(path)
    for number in _NAN if _sampling in SHARED[path] else ():
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty", "seed", "max_tokens"):
            yield post(f"{path}: {name} {number}", 400, path, {**ROUTES[path], name: number})
    yield from _bodies(path)
    yield from _sizes(path)


#: For a server without keys.
CASES: tuple[Case, ...] = (*(case for path in ROUTES for case in _by_route(path)), *_heads())


# Keys


def _auth() -> Iterator[Case]:
    wrong: dict[str, tuple[tuple[str, str], ...]] = {
        "no key": (),
        "an empty bearer": (("Authorization", "Bearer "),),
        "only Bearer": (("Authorization", "Bearer"),),
        "Basic": (("Authorization", "Basic YTpi"),),
        "a space after it": (("Authorization", f"Bearer {KEY} x"),),
        "two spaces": (("Authorization", f"Bearer  {KEY}"),),
        "a letter more": (("Authorization", f"Bearer {KEY}x"),),
        "a letter less": (("Authorization", f"Bearer {KEY[:-1]}"),),
        "another case": (("Authorization", f"Bearer {KEY.upper()}"),),
        "no scheme": (("Authorization", KEY),),
        "a comma": (("Authorization", f"Bearer {KEY}, Bearer {OTHER_KEY}"),),
        "two headers, one good": (("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {KEY}")),
        "two good headers": (("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")),
        "an unknown header": (("X-Auth", KEY),),
        "a cookie": (("Cookie", f"api_key={KEY}"),),
        "x-api-key twice": (("x-api-key", KEY), ("x-api-key", "wrong")),
        "beyond ASCII": (("Authorization", "Bearer \xe9\xff"),),
    }
    for name, headers in wrong.items():
        for path in ("/v1/models", "/metrics", "/version", "/nothing"):
            yield Case(f"{name}: {path}", (401,), path, headers=headers)
        for path in ROUTES:
            body = json.dumps(ROUTES[path]).encode()
            yield Case(f"{name}: POST {path}", (401,), path, "POST", body, headers=(*JSON, *headers))
    for path in (
        "//v1/models",
        "/v1/models/",
        "/V1/MODELS",
        "/v1/%6dodels",
        "/v1/../v1/models",
        "/health/../v1/models",
    ):
        yield Case(f"no way around: {path}", (401,), path)
    yield Case("in the query", (401,), f"/v1/models?api_key={KEY}")
    yield Case(
        "a megabyte of key", (400, 431, CLOSED), "/v1/models", headers=(("Authorization", "Bearer " + "k" * 2**20),)
    )
    for header in (("Authorization", f"Bearer {KEY}"), ("authorization", f"bearer {OTHER_KEY}"), ("x-api-key", KEY)):
        yield Case(f"a good key: {header[0]}", (200,), "/v1/models", headers=(header,))
        yield Case(f"a good key and no route: {header[0]}", (404,), "/nothing", headers=(header,))


#: For a server with KEY and OTHER_KEY.
AUTH_CASES: tuple[Case, ...] = tuple(_auth())
