"""Requests made from the server's own description, right ones and wrong ones: no answer is a 5xx, and each one comes.

A few of each in every run; `make test-long` sends more, the counts that vLLM's own test of this kind has and above.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig

from tests.serving.quiet import assert_quiet
from tests.serving.running import Running
from tests.serving.tiny import small_server

Mode = schemathesis.GenerationMode
#: For one answer. Such a model computes the longest in a fraction of it.
SECONDS = 60.0
FEW, MANY = {Mode.POSITIVE: 10, Mode.NEGATIVE: 20}, {Mode.POSITIVE: 50, Mode.NEGATIVE: 200}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with small_server(max_model_len=64) as running:
        yield running


def fields_of_an_error(path: str) -> set[str]:
    """What an error tells, in OpenAI's form or in Anthropic's."""
    return {"type", "message"} if path.startswith("/v1/messages") else {"message", "type", "param", "code"}


def with_known_names(body: Any, name: str) -> Any:
    """The same for the model that is served, so that more than its name is looked at."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        return {**body, "model": name}
    return body


def ask_of_everything(server: Running, mode: Mode, num_examples: int) -> int:
    """Send that many requests to every operation; returns how many were sent."""
    config = SchemathesisConfig.from_dict({"generation": {"allow-x00": mode is Mode.NEGATIVE}})
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json(), config=config)
    num_sent = 0
    options = settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def send(operation: Any) -> None:
        @options
        @given(st.data())
        def one(data: st.DataObject) -> None:
            nonlocal num_sent
            case = data.draw(operation.as_strategy(generation_mode=mode))
            case.body = with_known_names(case.body, server.service.model_names[0])
            response = case.call(base_url=server.url, timeout=SECONDS)
            num_sent += 1
            shown = f"{operation.label}: {response.status_code} {response.content[:300]!r} for {case.body!r}"
            assert response.status_code < 500, shown
            if response.status_code >= 400 and operation.method.upper() != "HEAD":
                assert set(response.json()["error"]) == fields_of_an_error(operation.path), shown

        one()

    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 12
    for operation in operations:
        # Any text is right in a path, so that only a body can be wrong.
        if mode is Mode.POSITIVE or operation.body:
            send(operation)
    return num_sent


@pytest.mark.parametrize("mode", list(FEW), ids=lambda mode: mode.value)
def test_a_few_of_each(server: Running, mode: Mode) -> None:
    with assert_quiet(server):
        assert ask_of_everything(server, mode, FEW[mode]) > FEW[mode]


@pytest.mark.long
@pytest.mark.parametrize("mode", list(MANY), ids=lambda mode: mode.value)
def test_many_of_each(server: Running, mode: Mode) -> None:
    with assert_quiet(server):
        assert ask_of_everything(server, mode, MANY[mode]) > MANY[mode]
