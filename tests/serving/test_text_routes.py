"""/tokenize, /detokenize and /v1/embeddings: answers, what is refused, and that a long text holds nobody up."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from qengine import LLM
from tests.engine.fixtures import path as fixture
from tests.serving.chat_templates import HERMES
from tests.serving.running import Running, serving, watched_loop
from tests.serving.scripted_engine import NAN_PROMPT, NEVER_FITS_PROMPT, ScriptedEngine
from tests.serving.test_http import assert_error
from tests.serving.tiny import small_server
from tests.waiting import WAIT_SECONDS, wait_until

TOKENIZE, DETOKENIZE, EMBED = "/tokenize", "/detokenize", "/v1/embeddings"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = ScriptedEngine()
    engine.tokenizer = engine.tokenizer.with_chat_template(HERMES)
    with serving(engine) as running:
        yield running


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    with small_server() as running:
        yield running


# Tokenizing


def test_texts_become_ids_and_ids_texts(server: Running) -> None:
    tokenizer = server.engine.tokenizer
    for text in ("Hello there", "天空 🙂", "<|im_start|>", "a\u0301\n\n  b", ""):
        answer = server.post(TOKENIZE, {"model": "scripted", "prompt": text}).json()
        ids = tokenizer.encode(text)
        assert answer == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
        bare = server.post(TOKENIZE, {"prompt": text, "add_special_tokens": False, "return_token_strs": True}).json()
        assert bare["tokens"] == tokenizer.encode(text, add_special_tokens=False)
        assert bare["token_strs"] == [tokenizer.token_spelling(i) for i in bare["tokens"]]
        assert server.post(DETOKENIZE, {"tokens": bare["tokens"]}).json() == {"prompt": text}


def test_messages_become_the_ids_of_their_prompt(server: Running) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    for more in (
        {},
        {"tools": [tool]},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        answer = server.post(TOKENIZE, {"messages": MESSAGES, **more}).json()
        chat = {"model": "scripted", "messages": MESSAGES, "max_tokens": 1, **more}
        assert server.post("/v1/chat/completions", chat).status_code == 200
        assert answer["tokens"] == server.engine.prepared[-1].prompt_token_ids


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TOKENIZE, {}, "prompt"),
        (TOKENIZE, {"prompt": "a", "messages": MESSAGES}, "prompt"),
        (TOKENIZE, {"prompt": 3}, "prompt"),
        (TOKENIZE, {"prompt": ["a"]}, "prompt"),
        (TOKENIZE, {"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (TOKENIZE, {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        (TOKENIZE, {"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
        (TOKENIZE, {"prompt": "a", "model": 3}, "model"),
        (TOKENIZE, {"messages": []}, "messages"),
        (TOKENIZE, {"messages": [{"role": "root", "content": "a"}]}, "messages[0].role"),
        (TOKENIZE, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (TOKENIZE, {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template"),
        (TOKENIZE, {"messages": MESSAGES, "chat_template_kwargs": {"tokenize": 1}}, "chat_template_kwargs"),
        (DETOKENIZE, {}, "tokens"),
        (DETOKENIZE, {"tokens": "a"}, "tokens"),
        (DETOKENIZE, {"tokens": [1.5]}, "tokens[0]"),
        (DETOKENIZE, {"tokens": [True]}, "tokens[0]"),
        (DETOKENIZE, {"tokens": [5, -1]}, "tokens[1]"),
        (DETOKENIZE, {"tokens": [5, 2**62]}, "tokens[1]"),
        (DETOKENIZE, {"tokens": [5, 10**30]}, "tokens[1]"),
        (EMBED, {"model": "scripted"}, "input"),
        (EMBED, {"input": "a"}, "model"),
        *(
            (EMBED, {"model": "scripted", "input": value}, "input")
            for value in ("", [], [[]], [""], [-1], [1.5], [True], ["a", 3], {}, 3, None, ["a"] * 257, [10**6])
        ),
        (EMBED, {"model": "scripted", "input": "a", "encoding_format": "int8"}, "encoding_format"),
        (EMBED, {"model": "scripted", "input": "a", "dimensions": 2}, "dimensions"),
        (EMBED, {"model": "scripted", "input": "a", "dimensions": 0}, "dimensions"),
        (EMBED, {"model": "scripted", "input": "a", "dimensions": 2**63}, "dimensions"),
        (EMBED, {"model": "scripted", "input": "a", "pooling": "max"}, "pooling"),
        (EMBED, {"model": "scripted", "input": "a", "normalize": 1}, "normalize"),
        (EMBED, {"model": "scripted", "input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        (EMBED, {"model": "scripted", "input": "a", "cache_salt": ""}, "cache_salt"),
        (EMBED, {"model": "scripted", "input": "x " * 3000}, "input"),
        (EMBED, {"model": "scripted", "input": NEVER_FITS_PROMPT}, None),
    ],
)
def test_what_is_refused(server: Running, path: str, body: dict[str, Any], param: str | None) -> None:
    if body.get("input") == [10**6]:
        body = {**body, "input": [2**31]}
    assert_error(server.post(path, body), 400, param=param)
    server.wait_until_quiet()


def test_other_models_and_methods_and_bodies(server: Running) -> None:
    for path in (TOKENIZE, DETOKENIZE, EMBED):
        body = {"model": "../etc", "prompt": "a", "tokens": [5], "input": "a"}
        assert_error(server.post(path, body), 404, code="model_not_found")
        assert_error(server.get(path), 405)
        with server.client() as client:
            for content in (b"", b"{", b"[]", b'{"prompt": "\\ud800"}', b'{"prompt": "\\u0000"}'):
                response = client.post(path, content=content, headers={"content-type": "application/json"})
                assert_error(response, 400)
            assert_error(client.post(path, content=b"{}", headers={"content-type": "text/plain"}), 415)


def test_while_loading_there_is_nothing_to_tokenize() -> None:
    with serving(None) as loading:
        for path in (TOKENIZE, DETOKENIZE, EMBED, "/v1/messages", "/v1/messages/count_tokens"):
            assert loading.post(path, {}).status_code == 503


def test_the_event_loop_goes_on_while_a_megabyte_is_tokenized(server: Running) -> None:
    """A generous bound here, where others use the machine too; benchmarks measure it."""
    text = "the quick brown fox " * (2**20 // 20)
    with watched_loop(server) as lags:
        began = time.monotonic()
        answer = server.post(TOKENIZE, {"prompt": text, "return_token_strs": True}, timeout=120)
        seconds = time.monotonic() - began
    assert answer.status_code == 200
    found = answer.json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) > 100_000
    assert server.engine.tokenizer.decode(found["tokens"]) == text
    # Held up by the whole of it, the loop would have come round once.
    assert len(lags) > 10
    assert max(lags) < max(0.5, seconds / 2)


def test_calls_for_tokens_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    engine.tokenizer = engine.tokenizer.with_chat_template(HERMES)
    with serving(engine) as running, ThreadPoolExecutor(2) as pool:
        assert running.async_engine is not None
        running.post("/v1/completions", {"model": "scripted", "prompt": "a", "max_tokens": 1})
        text_calls, loop = running.async_engine.text_calls, running.async_engine._loop
        assert loop is not None
        monkeypatch.setattr(text_calls, "capacity", 2)
        may_go_on = threading.Event()
        # Both of the tokenizer's threads.
        busy = [asyncio.run_coroutine_threadsafe(running.async_engine.offload(may_go_on.wait), loop) for _ in range(2)]
        try:
            waiting = [pool.submit(running.post, TOKENIZE, {"prompt": "a"}) for _ in range(2)]
            wait_until(lambda: text_calls.num_in_flight == 2)
            for path, body in (
                (TOKENIZE, {"prompt": "a"}),
                (TOKENIZE, {"messages": MESSAGES}),
                (DETOKENIZE, {"tokens": [5]}),
                ("/v1/messages/count_tokens", {"model": "scripted", "messages": MESSAGES}),
            ):
                refused = running.post(path, body)
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
        finally:
            may_go_on.set()
        assert [future.result().status_code for future in waiting] == [200, 200]
        assert all(future.result() for future in busy)
        wait_until(lambda: text_calls.num_in_flight == 0)
        assert running.post(TOKENIZE, {"prompt": "a"}).status_code == 200


def test_a_long_text_gives_the_ids_that_short_calls_give(server: Running) -> None:
    """Long texts take another call of the library."""
    tokenizer = server.engine.tokenizer
    text = "Some words, 天空 and 🙂.\n" * 500
    assert len(text) > 8192
    assert tokenizer.encode(text) == tokenizer._backend.encode(text).ids


# Embeddings


def test_vectors_are_those_of_the_python_api(real: Running) -> None:
    texts = ["The class statement", "A list"]
    with LLM(fixture("llama-awq-g64"), dtype="float32", max_model_len=256) as llm:
        for pooling in ("last", "mean"):
            expected = [o.outputs.embedding for o in llm.embed(texts, pooling=pooling, use_tqdm=False)]  # type: ignore[arg-type]
            answer = real.post(EMBED, {"model": "tiny", "input": texts, "pooling": pooling}).json()
            assert [item["index"] for item in answer["data"]] == [0, 1]
            for item, vector in zip(answer["data"], expected, strict=True):
                assert item["embedding"] == pytest.approx(vector, abs=1e-5)
            counts = sum(len(llm.engine.tokenizer.encode(text)) for text in texts)
            assert answer["usage"] == {"prompt_tokens": counts, "total_tokens": counts}
    real.wait_until_quiet()
    assert real.engine.num_free_blocks == real.engine.info.num_blocks


def test_every_form_of_input_and_encoding(real: Running) -> None:
    ids = real.engine.tokenizer.encode("A list")
    expected = real.post(EMBED, {"model": "tiny", "input": "A list"}).json()["data"][0]["embedding"]
    for given in (["A list"], ids, [ids]):
        answer = real.post(EMBED, {"model": "tiny", "input": given, "encoding_format": "base64"}).json()
        (item,) = answer["data"]
        assert list(array("f", base64.b64decode(item["embedding"]))) == pytest.approx(expected, abs=1e-5)
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS) as client:
        found = client.embeddings.create(model="tiny", input=["A list"], dimensions=len(expected))
        assert found.data[0].embedding == pytest.approx(expected, abs=1e-5)
        with pytest.raises(openai.BadRequestError, match="mean nothing when cut"):
            client.embeddings.create(model="tiny", input=["A list"], dimensions=8)


def test_options_reach_the_engine(server: Running) -> None:
    def vector(**more: Any) -> list[float]:
        answer = server.post(EMBED, {"model": "scripted", "input": [5, 6, 7], **more}).json()
        found: list[float] = answer["data"][0]["embedding"]
        return found

    assert vector() == [3, 0, 1, 0.1]
    assert vector(pooling="mean", normalize=False) == [3, 1, 0, 0.1]
    assert vector(dimensions=4, pooling=None) == [3, 0, 1, 0.1]


def test_one_text_that_fails_is_a_500_and_harms_no_other(server: Running) -> None:
    body = {"model": "scripted", "input": ["fine", NAN_PROMPT]}
    assert_error(server.post(EMBED, body), 500, code="generation_failed")
    server.wait_until_quiet()
    assert server.post(EMBED, {"model": "scripted", "input": "fine"}).status_code == 200


def test_embeddings_are_counted(real: Running) -> None:
    def total(name: str) -> float:
        lines = real.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

    names = ("qengine:prompt_tokens_total", "qengine:generation_tokens_total", "qengine:request_success_total")
    before = [total(name) for name in names]
    assert real.post(EMBED, {"model": "tiny", "input": [[5, 6, 7], [8, 9]]}).status_code == 200
    real.wait_until_quiet()
    assert [total(name) - b for name, b in zip(names, before, strict=True)] == [5, 0, 2]
    assert total("qengine:num_requests_running") == total("qengine:kv_cache_usage_perc") == 0
