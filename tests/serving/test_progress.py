"""Progress before the first token: who sees it, what it says, and that it leaves nothing behind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from qengine.request import RequestProgress, SamplingParams
from tests.serving.response_events import named_events, replay
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import NEVER_FITS_PROMPT, ScriptedEngine
from tests.serving.test_http import CHAT, TEXT, assert_error, chat_body, events, text_body
from tests.serving.tiny import small_server, start_engine
from tests.waiting import WAIT_SECONDS, wait_until

RESPONSES = "/v1/responses"
WANTED = {"stream": True, "stream_options": {"include_progress": True}}


@pytest.fixture
def server() -> Iterator[Running]:
    """One that runs a sequence at a time and reads ten tokens of a prompt in a step."""
    engine = ScriptedEngine(max_num_seqs=1)
    engine.num_prefill_tokens = 10
    with serving(engine) as running:
        yield running
        engine.allow()
        running.wait_until_quiet()
        # The engine's thread forgets the last one after it has answered.
        assert running.async_engine is not None
        wait_until(lambda: not running.async_engine._watched)  # type: ignore[union-attr]


def wait_until_added(server: Running, number: int) -> None:
    """Until `number` requests are in the engine, which listens."""
    wait_until(lambda: len(server.engine.requests) == number)


def paced(server: Running, url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, with a step for each until the first token: none is overtaken by the next."""
    server.engine.hold()
    found: list[dict[str, Any]] = []
    with server.client() as client, client.stream("POST", url, json=body) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line.removeprefix("data: ")))
                has_begun = found[-1].get("choices") or found[-1].get("type") == "response.output_item.added"
                server.engine.allow(math.inf if has_begun else "progress" in found[-1])
    return found


def test_the_prompt_is_read_in_parts(server: Running) -> None:
    payloads = paced(server, CHAT, chat_body(messages=[{"role": "user", "content": "word " * 30}], **WANTED))
    told = [payload["progress"] for payload in payloads if "progress" in payload]
    assert payloads[len(told) :] == [payload for payload in payloads if "progress" not in payload]
    assert {(p["state"], p["queue_position"]) for p in told} == {("running", None)}
    (total,) = {p["prompt_tokens"] for p in told}
    assert [p["computed_tokens"] for p in told] == list(range(0, total, 10))
    assert all(payload["choices"] == [] for payload in payloads[: len(told)])
    assert len({(p["id"], p["object"], p["model"]) for p in payloads}) == 1


@pytest.mark.parametrize("options", [{}, {"stream_options": {}}, {"stream_options": {"include_progress": False}}])
def test_who_did_not_ask_sees_nothing_of_it(server: Running, options: dict[str, Any]) -> None:
    for url, body in ((CHAT, chat_body()), (TEXT, text_body())):
        payloads = events(server.post(url, {**body, "stream": True, **options}))[:-1]
        assert all("progress" not in payload and payload["choices"] for payload in payloads)
    response = server.post(RESPONSES, {"model": "scripted", "input": "hi", "stream": True, **options})
    assert not [event for event in named_events(response) if ":" in event["type"]]


def test_the_place_in_the_queue_falls_as_others_leave_and_ends(server: Running) -> None:
    server.engine.hold(listens=True)
    with ThreadPoolExecutor(2) as pool, server.client() as client:
        first = pool.submit(server.post, TEXT, text_body(max_tokens=200))
        wait_until_added(server, 1)
        second = pool.submit(server.post, TEXT, text_body(max_tokens=200))
        wait_until_added(server, 2)
        with client.stream("POST", CHAT, json=chat_body(**WANTED)) as third:
            lines = (line.removeprefix("data: ") for line in third.iter_lines())
            payloads = (json.loads(line) for line in lines if line.startswith("{"))
            told = [next(payloads)["progress"]]
            server.engine.allow()
            told += [payload["progress"] for payload in payloads if "progress" in payload]
        assert first.result().status_code == second.result().status_code == 200
    # The reader may miss some, but what comes is in order.
    places = [p["queue_position"] for p in told if p["state"] == "waiting"]
    assert places[0] == 2
    assert places == sorted({*places}, reverse=True)
    assert {*places} <= {1, 2}
    assert all(p["computed_tokens"] == 0 for p in told if p["state"] == "waiting")


def test_the_official_client_passes_over_it_or_reads_it(server: Running) -> None:

    def read(stream: Any) -> list[Any]:
        """With a pause before the first step, so that no token overtakes the progress."""
        iterator = iter(stream)
        first = next(iterator)
        server.engine.allow()
        return [first, *iterator]

    server.engine.answers["hi"] = "All is well."
    server.engine.hold()
    more: dict[str, Any] = {"extra_body": {"stream_options": {"include_progress": True, "include_usage": True}}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=WAIT_SECONDS) as client:
        chat: Any = client.chat.completions.create(**chat_body(stream=True, max_tokens=50), **more)
        chunks = read(chat)
        assert chunks[0].choices == []
        assert chunks[0].progress["state"] == "running"
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        whole: Any = client.chat.completions.create(**chat_body(max_tokens=50))
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage is not None

        server.engine.hold()
        with client.chat.completions.stream(**chat_body(max_tokens=50), **more) as stream:
            read(stream)
            final = stream.get_final_completion()
        assert final.choices[0].message.content == text

        server.engine.hold()
        prompts: Any = client.completions.create(**text_body(prompt=["a", "b"], stream=True), **more)
        told = [chunk.progress for chunk in read(prompts) if hasattr(chunk, "progress")]
        assert told[0]["prompt_index"] in (0, 1)

        server.engine.hold()
        body: dict[str, Any] = {"model": "scripted", "input": "hi", "max_output_tokens": 30}
        with client.responses.stream(**body, extra_body=WANTED) as response_stream:
            kinds = [event.type for event in read(response_stream)]
        assert kinds[:3] == ["response.created", "response.in_progress", "qengine:progress"]


def test_progress_of_a_response_comes_between_its_beginning_and_its_first_item(server: Running) -> None:
    found = paced(server, RESPONSES, {"model": "scripted", "input": "word " * 30, **WANTED})
    told = [event for event in found if event["type"] == "qengine:progress"]
    assert len(told) >= 3
    assert found[2 : 2 + len(told)] == told
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    rest = [event for event in found if event not in told]
    replay([{**event, "sequence_number": index} for index, event in enumerate(rest)])


@pytest.mark.parametrize("url", [CHAT, TEXT, RESPONSES])
def test_refusals_keep_their_status(server: Running, url: str) -> None:
    bodies = {
        CHAT: chat_body(messages=[{"role": "user", "content": NEVER_FITS_PROMPT}]),
        TEXT: text_body(prompt=["fine", NEVER_FITS_PROMPT]),
        RESPONSES: {"model": "scripted", "input": NEVER_FITS_PROMPT},
    }
    assert_error(server.post(url, {**bodies[url], **WANTED}), 400, code="context_length_exceeded")


def test_progress_needs_a_stream(server: Running) -> None:
    assert_error(server.post(CHAT, chat_body(stream_options={"include_progress": True})), 400, param="stream_options")
    assert_error(
        server.post(CHAT, chat_body(stream=True, stream_options={"include_progress": "yes"})),
        400,
        param="stream_options.include_progress",
    )


def test_who_leaves_the_queue_is_watched_no_more(server: Running) -> None:
    server.engine.hold(listens=True)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, TEXT, text_body(max_tokens=200))
        wait_until_added(server, 1)
        with server.client() as client, ThreadPoolExecutor(1) as other:
            stream = client.stream("POST", CHAT, json=chat_body(**WANTED))
            entering = other.submit(stream.__enter__)
            wait_until_added(server, 2)
            entering.result().close()
        wait_until(lambda: len(server.engine.aborted) == 1)
        server.engine.allow()
        assert first.result().status_code == 200


def test_the_real_engine_tells_of_every_part_and_of_the_queue() -> None:
    engine = start_engine(max_num_seqs=1)  # It reads 64 tokens in a step.
    ids = ["a", "b", "c"]
    told: list[list[RequestProgress]] = []
    engine.on_scheduled = lambda: told.append(engine.progress(ids))

    def run(*prompts: list[int], n: int) -> list[list[RequestProgress]]:
        told.clear()
        for request_id, prompt in zip(ids, prompts, strict=False):
            params = SamplingParams(temperature=0, max_tokens=2, n=n, ignore_eos=True)
            engine.add(engine.make_request(request_id, prompt, params))
        while engine.has_unfinished:
            engine.step()
        return told

    alone = [found for step in run([7] * 300, n=1) for found in step]
    assert [p.num_computed_tokens for p in alone] == [0, 64, 128, 192, 256]
    assert {(p.request_id, p.queue_position, p.num_prompt_tokens) for p in alone} == {("a", None, 300)}
    assert run([7] * 300, n=1)[0][0].num_computed_tokens > 200  # Most of it is in the prefix cache.

    steps = run([8] * 70, [9] * 70, [10] * 70, n=2)
    last = [found.queue_position for step in steps for found in step if found.request_id == "c"]
    # A sibling of one that runs stands before it too.
    assert [place for index, place in enumerate(last) if last.index(place) == index] == [3, 2, 1, None]
    assert engine.progress(ids) == []
    engine.check_integrity()
    engine.shutdown()


def test_progress_of_the_real_engine_reaches_a_client() -> None:
    with small_server(max_num_seqs=1) as server:
        body = {"model": "tiny", "prompt": [[8] * 900, [9] * 900], "temperature": 0, "max_tokens": 4, **WANTED}
        told = [p["progress"] for p in events(server.post(TEXT, body))[:-1] if "progress" in p]
        assert told
        for index in (0, 1):
            counts = [p["computed_tokens"] for p in told if p["prompt_index"] == index]
            assert counts == sorted(counts)
        server.wait_until_quiet()
        server.engine.check_integrity()
