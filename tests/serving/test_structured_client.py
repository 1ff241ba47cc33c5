"""The real `openai` client and the bundled model: structured output, tools, and one request's grammar that breaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from qengine.errors import GrammarError
from qengine.grammars.compiler import CompiledGrammar
from qengine.grammars.sources import GrammarSource
from tests.grammars.schemas import SCHEMAS
from tests.serving.chat_templates import HERMES
from tests.serving.openai_client import bundled_server, connected
from tests.serving.running import Running

WAIT_SECONDS = 120.0
MESSAGES: list[Any] = [{"role": "user", "content": "Describe Rome as JSON."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with bundled_server(max_num_seqs=24, kv_cache_memory_bytes=256 * 2**20) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with connected(server, WAIT_SECONDS) as opened:
        yield opened


def chat(client: openai.OpenAI, **more: Any) -> Any:
    body = {"model": "smol", "messages": MESSAGES, "temperature": 0.8, "seed": 1, "max_tokens": 120, **more}
    return client.chat.completions.create(**body)


class Climate(Enum):
    warm = "warm"
    cold = "cold"


class City(BaseModel):
    """What the model is to fill in."""

    population: int = Field(ge=0, le=9_999_999)
    climate: Climate
    is_capital: bool


def test_parse_gives_an_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="smol", messages=MESSAGES, response_format=City, temperature=0, max_tokens=80
    )
    assert isinstance(answer.choices[0].message.parsed, City)
    with client.chat.completions.stream(
        model="smol", messages=MESSAGES, response_format=City, temperature=0, max_tokens=80
    ) as stream:
        last = stream.get_final_completion()
    assert last.choices[0].message.parsed == answer.choices[0].message.parsed


def test_parse_of_a_tool(client: openai.OpenAI, server: Running) -> None:
    server.engine.tokenizer = server.engine.tokenizer.with_chat_template(HERMES)
    tool = openai.pydantic_function_tool(City)
    answer = client.chat.completions.parse(
        model="smol", messages=MESSAGES, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=100
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, City)


def test_answers_validate(client: openai.OpenAI) -> None:
    """A sample of each schema, all at once; `python -m benchmarks.grammar` takes ten of each."""

    def sample(schema: dict[str, Any]) -> Any:
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
        return chat(client, response_format=form, max_tokens=200).choices[0]

    with ThreadPoolExecutor(len(SCHEMAS)) as pool:
        choices = list(pool.map(sample, SCHEMAS.values()))
    for choice, (name, schema) in zip(choices, SCHEMAS.items(), strict=True):
        assert choice.finish_reason == "stop", name
        check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        check.validate(json.loads(choice.message.content))


def test_a_form_may_be_cut_by_max_tokens(client: openai.OpenAI) -> None:
    choice = chat(client, extra_body={"guided_regex": "[a-z]{100}"}, max_tokens=5).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content.isalpha()


def test_a_form_outlives_ignore_eos_and_min_tokens(client: openai.OpenAI) -> None:
    more = {"guided_choice": ["yes", "no"], "ignore_eos": True, "min_tokens": 10}
    choice = chat(client, extra_body=more).choices[0]
    assert choice.message.content in ("yes", "no")
    assert choice.finish_reason == "stop"


def test_log_probabilities_are_of_the_model_not_of_the_grammar(client: openai.OpenAI) -> None:
    form = {"guided_choice": ["zebra"]}
    choice = chat(client, extra_body=form, logprobs=True, top_logprobs=2, temperature=0).choices[0]
    first = choice.logprobs.content[0]
    free = chat(client, logprobs=True, top_logprobs=2, temperature=0, max_tokens=1).choices[0].logprobs.content[0]
    assert first.logprob < -2
    assert [top.token for top in first.top_logprobs] == [top.token for top in free.top_logprobs]


def test_valid_malformed_valid(client: openai.OpenAI) -> None:
    first = chat(client, extra_body={"guided_regex": "[a-z]{4}"}).choices[0].message.content
    for bad in ("(((", "(?=a)"):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, extra_body={"guided_regex": bad})
        assert caught.value.param == "guided_regex"
        assert caught.value.code == "invalid_grammar"
    assert chat(client, extra_body={"guided_regex": "[a-z]{4}"}).choices[0].message.content == first


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_a_forced_call_is_valid_and_a_stream_joins_to_it(client: openai.OpenAI, server: Running, choice: Any) -> None:
    server.engine.tokenizer = server.engine.tokenizer.with_chat_template(HERMES)
    more = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "temperature": 0}
    more["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}  # A small model may think without end.
    whole = chat(client, **more).choices[0]
    (call,) = whole.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    assert whole.finish_reason == ("tool_calls" if choice == "required" else "stop")
    arguments = ""
    for chunk in chat(client, **more, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            arguments += part.function.arguments
    assert arguments == call.function.arguments


def test_a_grammar_that_breaks_fails_its_request_alone(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"temperature": 0, "max_tokens": 12}
    expected = chat(client, extra_body={"guided_regex": "[a-z ]{9}"}, **body).choices[0].message.content

    class Broken:
        """Allows everything and cannot take its fourth token."""

        allowed = b"\xff" * (-(-server.engine.info.vocab_size // 32) * 4)
        is_complete = False
        num_left = 3

        def accept(self, token_id: int) -> None:
            self.num_left -= 1
            if self.num_left < 0:
                raise GrammarError("it broke")

    compile_grammar = server.engine.compile_grammar

    class BrokenCompiled:
        def start(self, **more: Any) -> Broken:
            return Broken()

    def compile_or_break(source: GrammarSource) -> CompiledGrammar | BrokenCompiled:
        return BrokenCompiled() if source.text == "broken" else compile_grammar(source)

    monkeypatch.setattr(server.engine, "compile_grammar", compile_or_break)
    with pytest.raises(openai.BadRequestError, match="it broke"):
        chat(client, extra_body={"guided_regex": "broken"}, **body)
    again = chat(client, extra_body={"guided_regex": "[a-z ]{9}"}, **body).choices[0].message.content
    assert again == expected
