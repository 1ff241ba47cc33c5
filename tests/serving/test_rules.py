"""What the owner of a server lets clients ask: strictness, prompts per call, log-probabilities of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from qengine.serving.protocol import CompletionRequest, Rules, parse_request
from tests.serving.bad_rows import CHAT, EMBED, MESSAGES, ROUTES, TEXT, USER
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import ScriptedEngine
from tests.serving.test_http import assert_error
from tests.serving.tiny import PROMPT, small_server


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    engine = ScriptedEngine()
    with serving(engine, served_model_names=("tiny",), strict=True, max_prompts_per_request=2) as running:
        yield running


@pytest.fixture(scope="module")
def telling() -> Iterator[Running]:
    with small_server(server_options={"enable_prompt_logprobs": True}) as running:
        yield running


# Strictness


def message_of(response: Any) -> str:
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


@pytest.mark.parametrize("path", ROUTES)
def test_a_strict_server_refuses_what_nobody_knows(strict: Running, path: str) -> None:
    assert strict.post(path, ROUTES[path]).status_code == 200
    said = message_of(strict.post(path, {**ROUTES[path], "unheard_of": 1}))
    assert "'unheard_of'" in said
    assert "--strict" in said
    assert "y" * 300 not in message_of(strict.post(path, {**ROUTES[path], "y" * 3000: 1}))
    # What changes no answer is known, and what is refused keeps its own reason.
    assert strict.post(path, {**ROUTES[path], "user": "me", "metadata": {}}).status_code == 200
    assert "--strict" not in message_of(strict.post(path, {**ROUTES[path], "chat_template": "x"}))


def test_a_strict_server_knows_what_was_meant(strict: Running) -> None:
    said = message_of(strict.post(CHAT, {**ROUTES[CHAT], "temprature": 1}))
    assert "did you mean 'temperature'?" in said
    assert message_of(strict.post(MESSAGES, {**ROUTES[MESSAGES], "stop": ["x"]})).endswith("stop_sequences here")


# Prompts


@pytest.mark.parametrize(("path", "name"), [(TEXT, "prompt"), (EMBED, "input")])
def test_prompts_per_call(strict: Running, path: str, name: str) -> None:
    assert strict.post(path, {**ROUTES[path], name: ["a", "b"]}).status_code == 200
    said = assert_error(strict.post(path, {**ROUTES[path], name: ["a", "b", "c"]}), 400, param=name)
    assert "from 1 to 2" in said


def test_more_prompts_than_by_default() -> None:
    body = {"model": "tiny", "prompt": ["a"] * 300}
    assert len(parse_request(CompletionRequest, body, Rules(num_prompts=300)).prompts) == 300


# Log-probabilities of prompts


def test_a_completion_tells_of_its_prompt_what_an_echo_tells(telling: Running) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "n": 2}
    first, second = telling.post(TEXT, {**asked, "prompt_logprobs": 2}).json()["choices"]
    assert first["logprobs"] is None
    told = first["prompt_logprobs"]
    assert told == second["prompt_logprobs"]
    echo = telling.post(TEXT, {**asked, "logprobs": 2, "echo": True, "prompt_logprobs": 2}).json()["choices"][0]
    assert echo["prompt_logprobs"] == told
    ids = telling.engine.tokenizer.encode(PROMPT)
    assert told[0] is None
    for token_id, position, expected in zip(ids[1:], told[1:], echo["logprobs"]["token_logprobs"][1:], strict=False):
        assert position[str(token_id)]["logprob"] == pytest.approx(expected)
        assert {1, 2} <= {entry["rank"] for entry in position.values()}
        assert position[str(token_id)]["decoded_token"] == telling.engine.tokenizer.token_text(token_id)
    assert len(told) == len(ids)
    assert "prompt_logprobs" not in telling.post(TEXT, asked).json()["choices"][0]


def test_chat_tells_of_its_prompt(telling: Running) -> None:
    asked = {"model": "tiny", "messages": [USER], "max_tokens": 1}
    told = telling.post(CHAT, {**asked, "prompt_logprobs": 0}).json()
    assert len(told["prompt_logprobs"]) == told["usage"]["prompt_tokens"]
    assert all(len(position) == 1 for position in told["prompt_logprobs"][1:])
    assert "prompt_logprobs" not in telling.post(CHAT, asked).json()


def test_log_probabilities_of_prompts_that_are_refused(strict: Running, telling: Running) -> None:
    for path in (TEXT, CHAT):
        good = {**ROUTES[path], "prompt_logprobs": 1}
        assert "--enable-prompt-logprobs" in assert_error(strict.post(path, good), 400, param="prompt_logprobs")
        assert telling.post(path, good).status_code == 200
        for more in ({"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": True}, {"stream": True}):
            assert_error(telling.post(path, {**good, **more}), 400, param="prompt_logprobs")
    different = {"prompt_logprobs": 1, "logprobs": 2, "echo": True}
    assert_error(telling.post(TEXT, {**ROUTES[TEXT], **different}), 400, param="prompt_logprobs")
    for path in ROUTES.keys() - {TEXT, CHAT}:
        assert telling.post(path, {**ROUTES[path], "prompt_logprobs": 1}).status_code == 400
    telling.wait_until_quiet()
