"""The real `openai` client against the real engine on a small AWQ checkpoint, in float32 with greedy sampling."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import openai
import pytest

from qengine.config import EngineConfig
from qengine.engine import Engine
from tests.engine.fixtures import expected, path
from tests.serving.running import Running, serving
from tests.waiting import WAIT_SECONDS, wait_until

CHECKPOINT = "llama-awq-g64"
KEY = "a-test-key"
MESSAGES: list[Any] = [{"role": "user", "content": "What does the finally clause do?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    options = {
        "model": path(CHECKPOINT),
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": 32 * 2**20,
    }
    engine = Engine.start(EngineConfig.from_options(options))
    with serving(engine, api_keys=(KEY,), served_model_names=("tiny", "alias"), max_queue=16) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    """A client; afterwards nothing may be left in the engine."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=WAIT_SECONDS) as opened:
        yield opened
    server.wait_until_quiet()
    assert server.engine.num_free_blocks == server.engine.info.num_blocks
    server.engine.check_integrity()


def chat(client: openai.OpenAI, **more: Any) -> Any:
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 16, **more}
    return client.chat.completions.create(**body)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"


@pytest.mark.parametrize("case", expected(CHECKPOINT), ids=lambda case: case.prompt[:20])
def test_completions_equal_the_independent_reference(client: openai.OpenAI, case: Any) -> None:
    for prompt in (case.prompt, case.prompt_token_ids):
        answer = client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=24, logprobs=1, extra_body={"ignore_eos": True}
        )
        choice = answer.choices[0]
        assert choice.text == case.text
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(case.logprobs, abs=1e-3)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 24


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    case = expected(CHECKPOINT)[0]
    answer = client.completions.create(
        model="tiny", prompt=case.prompt, max_tokens=1, echo=True, logprobs=0, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith(case.prompt)
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    scored = client.completions.create(
        model="tiny", prompt=case.prompt_token_ids[:-1], max_tokens=1, temperature=0, logprobs=20,
        logit_bias={str(case.prompt_token_ids[-1]): 100},
    ).choices[0]  # fmt: skip
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[-2] == pytest.approx(scored.logprobs.token_logprobs[0], abs=1e-3)


def test_chat_stream_equals_the_whole(client: openai.OpenAI) -> None:
    whole = chat(client, n=2)
    assert whole.object == "chat.completion"
    texts, reasons = ["", ""], [None, None]
    counts = None
    for chunk in chat(client, n=2, stream=True, stream_options={"include_usage": True}):
        counts = chunk.usage or counts
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert counts is not None
    assert counts.completion_tokens == whole.usage.completion_tokens
    assert counts.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize("echo", [False, True])
def test_completions_stream_equals_the_whole(client: openai.OpenAI, echo: bool) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": ["The class", "A list"], "temperature": 0, "n": 2, "logprobs": 2}
    body["echo"] = echo
    whole: Any = client.completions.create(**body)
    pieces: list[list[Any]] = [[], [], [], []]
    for chunk in client.completions.create(**body, stream=True):
        for choice in chunk.choices:
            pieces[choice.index].append(choice)
    for mine, choice in zip(pieces, whole.choices, strict=True):
        assert "".join(piece.text for piece in mine) == choice.text
        whole_logprobs = choice.logprobs
        joined = {
            name: [entry for piece in mine if piece.logprobs for entry in getattr(piece.logprobs, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        assert joined["tokens"] == whole_logprobs.tokens
        assert joined["text_offset"] == whole_logprobs.text_offset
        # Another batch rounds differently.
        start = 1 if echo else 0  # Nothing is known of a prompt's first token.
        assert joined["token_logprobs"][:start] == whole_logprobs.token_logprobs[:start] == [None] * start
        assert joined["token_logprobs"][start:] == pytest.approx(whole_logprobs.token_logprobs[start:], abs=1e-4)
        assert len(joined["top_logprobs"]) == len(whole_logprobs.top_logprobs)
        assert [piece.finish_reason for piece in mine][-1] == choice.finish_reason


def test_chat_logprobs(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        # Greedy: the likeliest is the chosen one.
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        falling = [top.logprob for top in entry.top_logprobs]
        assert falling == sorted(falling, reverse=True)


def test_stop_strings_cut_exactly_and_never_leak(client: openai.OpenAI) -> None:
    full = chat(client, max_tokens=40).choices[0].message.content
    stop = full[10:15]
    end = full.index(stop)
    whole = chat(client, max_tokens=40, stop=[stop]).choices[0]
    assert (whole.message.content, whole.finish_reason) == (full[:end], "stop")
    streamed = chat(client, max_tokens=40, stop=stop, stream=True)
    pieces = [choice.delta.content or "" for chunk in streamed for choice in chunk.choices]
    assert "".join(pieces) == full[:end]
    kept = chat(client, max_tokens=40, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == full[: end + len(stop)]


def test_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    hot = {"temperature": 1.5, "max_tokens": 20, "n": 3, "seed": 1234}
    first, second = (chat(client, **hot).choices for _ in range(2))
    texts = [choice.message.content for choice in first]
    assert texts == [choice.message.content for choice in second]
    assert len(set(texts)) > 1
    # Choice i uses seed + i.
    alone = chat(client, **{**hot, "n": 1, "seed": 1236}).choices[0].message.content
    assert alone == texts[2]


def test_max_tokens_and_extras(client: openai.OpenAI) -> None:
    short = chat(client, max_tokens=3)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (3, "length")
    newer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=4, temperature=0)
    assert newer.usage is not None
    assert newer.usage.completion_tokens == 4
    banned = chat(client, extra_body={"top_k": 1, "min_tokens": 16, "ignore_eos": True, "repetition_penalty": 1.1})
    assert banned.usage.completion_tokens == 16


def test_a_prompt_may_fill_the_context_but_for_one_token(client: openai.OpenAI, server: Running) -> None:
    limit = server.engine.info.max_model_len
    answer = client.completions.create(model="tiny", prompt=[5] * (limit - 1), temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1
    for num_tokens in (limit, limit + 1):
        with pytest.raises(openai.BadRequestError, match=str(limit)) as caught:
            client.completions.create(model="tiny", prompt=[5] * num_tokens)
        assert caught.value.code == "context_length_exceeded"


def test_continuing_the_last_message(client: openai.OpenAI) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The finally clause"}]
    continued = chat(client, messages=messages, extra_body={"continue_final_message": True})
    text = "<|im_start|>user\n" + MESSAGES[0]["content"] + "<|im_end|>\n<|im_start|>assistant\nThe finally clause"
    answer = client.completions.create(
        model="tiny", prompt=text, temperature=0, max_tokens=16, extra_body={"add_special_tokens": False}
    )
    assert continued.choices[0].message.content == answer.choices[0].text


def test_developer_is_system_for_a_template_that_knows_no_developer(client: openai.OpenAI) -> None:
    answers = [
        chat(client, messages=[{"role": role, "content": "Be short."}, *MESSAGES]) for role in ("system", "developer")
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


def test_errors_are_the_clients_exceptions(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        chat(client, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="knows no such effort"):
        chat(client, reasoning_effort="high")
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong-key", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


@pytest.mark.parametrize("bad", [[-1], [2048], [2**31 - 1]])
def test_token_ids_outside_the_vocabulary(client: openai.OpenAI, bad: list[int]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=bad)
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError):
        chat(client, logit_bias={str(bad[0]): 1})


def test_sixteen_streams_at_once_equal_one_after_the_other(client: openai.OpenAI) -> None:
    prompts = [
        f"The {word} statement number {number}" for number in range(4) for word in ("class", "if", "with", "for")
    ]

    def streamed(prompt: str) -> str:
        chunks = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=12, stream=True)
        return "".join(choice.text for chunk in chunks for choice in chunk.choices)

    alone = [
        client.completions.create(model="tiny", prompt=p, temperature=0, max_tokens=12).choices[0].text for p in prompts
    ]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(streamed, prompts))
    assert together == alone
    assert len(set(alone)) > 1


def test_leaving_a_stream_frees_every_block(client: openai.OpenAI, server: Running) -> None:
    total = server.engine.info.num_blocks
    for _ in range(3):
        with chat(client, max_tokens=900, stream=True, extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))
            assert server.engine.num_free_blocks < total
        server.wait_until_quiet()
        assert server.engine.num_free_blocks == total
    assert chat(client).choices[0].finish_reason is not None


def test_clients_that_leave_at_any_moment_leak_nothing(client: openai.OpenAI, server: Running) -> None:
    random = Random(0)
    long_prompt = [random.randrange(5, 2000) for _ in range(700)]  # Several steps of prefill.
    connections = []
    for number in range(40):
        prompt = long_prompt[: random.choice([3, 700])]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 200, "stream": number % 2 == 0, "ignore_eos": True}
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_SECONDS)
        connection.sendall(head.encode() + content)
        connections.append(connection)
        if len(connections) > 6 or random.random() < 0.3:
            time.sleep(random.random() * 0.05)
            connections.pop(random.randrange(len(connections))).close()
    for connection in connections:
        connection.close()
    server.wait_until_quiet()
    assert server.engine.num_free_blocks == server.engine.info.num_blocks
    case = expected(CHECKPOINT)[0]
    canary = client.completions.create(model="tiny", prompt=case.prompt, temperature=0, max_tokens=24)
    assert canary.choices[0].text == case.text


def test_the_asynchronous_client(server: Running) -> None:
    async def scenario() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=WAIT_SECONDS
        ) as client:
            body: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
            whole = await client.chat.completions.create(**body)
            text = ""
            async for chunk in await client.chat.completions.create(**body, stream=True):
                text += chunk.choices[0].delta.content or ""
            assert text == whole.choices[0].message.content

            # Cancelled while it waits for a long answer without streaming.
            task = asyncio.ensure_future(
                client.chat.completions.create(**{**body, "max_tokens": 900}, extra_body={"ignore_eos": True})
            )
            await asyncio.to_thread(wait_until, lambda: server.engine.has_unfinished)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(scenario())
    server.wait_until_quiet()
    assert server.engine.num_free_blocks == server.engine.info.num_blocks
