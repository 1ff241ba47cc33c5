"""The chat page in Chromium: asking, watching, stopping, editing, keeping, and what happens when things go wrong.

The server is real; its engine says what a test gave it and takes a step when the test allows one, so that nothing
depends on speed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from tests.serving.running import Running
from tests.waiting import wait_until
from tests.web.conftest import PATIENCE_MS, OpenPage, talking

expect.set_options(timeout=PATIENCE_MS)
ANSWER = "The **sky** is blue, and `grass` is green."


@pytest.fixture
def server() -> Iterator[Running]:
    with talking(ANSWER) as running:
        yield running


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Page) -> list[str]:
    return page.locator(".answer .prose").all_inner_texts()


def stats(page: Page) -> str:
    """What stands under the last answer, once it is complete."""
    expect(page.locator(".message").last).to_have_attribute("aria-busy", "false")
    line = page.locator(".answer .stats").last
    expect(line).to_contain_text("token")
    return line.inner_text()


# Asking


def test_tokens_are_seen_as_they_arrive(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    server.engine.hold()
    ask(page, "What colour is the sky?")
    expect(page.locator(".bubble")).to_have_text("What colour is the sky?")
    expect(page.locator(".answer.waiting")).to_be_visible()
    server.engine.allow(12)
    expect(page.locator(".answer .prose")).not_to_be_empty()
    part = answers(page)[0]
    assert "green" not in part
    server.engine.allow()
    expect(page.locator(".answer .prose")).to_have_text("The sky is blue, and grass is green.")
    assert page.locator(".answer strong").inner_text() == "sky"
    assert page.locator(".answer code").inner_text() == "grass"
    assert re.search(rf"to first token.*\b{len(server.engine.script)} tokens", stats(page))


def test_the_place_in_the_queue_and_the_reading_of_the_prompt_are_shown(open_page: OpenPage) -> None:
    with talking(ANSWER * 4, max_num_seqs=1) as server:
        server.engine.num_prefill_tokens = 10
        page = open_page(server.url)
        state = page.locator(".answer .state").last
        server.engine.hold(listens=True)
        for text in ("I am first", "I am second", "word " * 40):
            page.get_by_role("button", name="New chat", exact=True).click()
            ask(page, text)
            expect(page.locator(".answer.waiting")).to_have_count(1)
            expect(state).not_to_be_empty()
        expect(state).to_have_text("Waiting, 2nd in line")

        def is_read() -> bool:
            """One step after the other, until the first two are answered and the third is read."""
            if server.engine.num_permits == 0:
                server.engine.allow(1)
            return bool(server.engine.num_waiting == 0)

        wait_until(is_read)
        numbers: set[int] = set()

        def read_on() -> bool:
            server.engine.allow(1)
            page.wait_for_timeout(20)
            found = re.fullmatch(r"Reading the prompt, (\d+) %", state.inner_text())
            numbers.update([int(found[1])] if found else [])
            return page.locator(".answer .prose").last.inner_text() != ""

        wait_until(read_on)
        assert len(numbers) >= 3
        expect(state).to_be_hidden()
        server.engine.allow()
        stats(page)
        page.reload()
        expect(page.locator(".answer .state")).to_be_hidden()


def test_the_speed_is_tokens_over_time(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    server.engine.hold()
    ask(page, "Hi")
    server.engine.allow(2)
    expect(page.locator(".answer .prose")).not_to_be_empty()
    page.wait_for_timeout(200)
    server.engine.allow()
    expect(page.locator(".answer .stats")).to_contain_text("tok/s")
    rate = float(stats(page).split(" tok/s")[0].replace("≈", ""))
    # At least 0.2 s lie between the first piece and the last.
    assert 0 < rate < len(server.engine.script) / 0.2


def test_escape_stops_an_answer_and_keeps_what_had_come(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    server.engine.say(ANSWER + " And so on." * 200)
    server.engine.hold()
    ask(page, "Go on")
    server.engine.allow(12)
    expect(page.locator(".answer .prose")).to_contain_text("The")
    page.keyboard.press("Escape")
    expect(page.locator(".answer .stats")).to_contain_text("stopped by you")
    # A step now and then, or the engine would never get to the abort.
    wait_until(lambda: server.engine.allow(1) is None and len(server.engine.aborted) == 1)
    assert "green" not in answers(page)[0]
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_the_conversation_so_far_is_sent_with_the_settings(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Max tokens").fill("7")
    page.get_by_label("Seed").fill("11")
    page.keyboard.press("Escape")
    ask(page, "One")
    assert "cut at the limit of tokens" in stats(page)
    first = answers(page)[0]
    ask(page, "Two")
    expect(page.locator(".answer")).to_have_count(2)
    stats(page)
    request = server.engine.prepared[-1]
    parts = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", request.prompt, re.DOTALL)
    assert [role for role, _ in parts] == ["system", "user", "assistant", "user"]
    assert [parts[0][1], parts[1][1], parts[3][1]] == ["Be brief.", "One", "Two"]
    assert parts[2][1].replace("*", "").startswith(first[:5])
    assert (request.params.temperature, request.params.max_tokens, request.params.seed) == (0.25, 7, 11)


def test_a_wrong_setting_is_shown_and_not_sent(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("9")
    page.keyboard.press("Escape")
    ask(page, "Hi")
    expect(page.get_by_label("Temperature")).to_be_focused()
    assert page.get_by_label("Message", exact=True).input_value() == "Hi"
    assert server.engine.prepared == []


def test_edit_and_resend_replaces_what_followed_and_can_be_undone(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    for text in ("First", "Second"):
        ask(page, text)
        expect(page.locator(".bubble").last).to_have_text(text)
        stats(page)
    expect(page.locator(".answer:not(.running)")).to_have_count(2)
    page.locator(".question").first.hover()
    page.get_by_role("button", name="Edit and send again").first.click()
    page.get_by_label("Edit the message").fill("Changed")
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text(["Changed"])
    stats(page)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".bubble")).to_have_text(["First", "Second"])
    assert len(answers(page)) == 2


def test_an_answer_can_be_asked_for_again(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    ask(page, "Hi")
    stats(page)
    server.engine.say("Something else.")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".answer .prose")).to_have_text("Something else.")
    assert len(answers(page)) == 1


# Keeping


def test_a_reload_keeps_the_conversation_even_in_the_middle_of_an_answer(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    ask(page, "One")
    stats(page)
    server.engine.hold()
    ask(page, "Two")
    server.engine.allow(12)
    expect(page.locator(".answer .prose").last).to_contain_text("The")
    page.reload()
    expect(page.locator(".bubble")).to_have_text(["One", "Two"])
    kept = answers(page)
    assert kept[0] == "The sky is blue, and grass is green."
    assert kept[1].startswith("The")
    server.engine.allow()
    server.wait_until_quiet()


def test_conversations_are_listed_renamed_exported_and_deleted(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    ask(page, "About the sky")
    stats(page)
    page.get_by_role("button", name="New chat", exact=True).click()
    expect(page.get_by_text("What would you like to know?")).to_be_visible()
    ask(page, "About the sea")
    stats(page)
    titles = page.locator(".conversation-open")
    expect(titles).to_have_text(["About the sea", "About the sky"])

    titles.last.click()
    expect(page.locator(".bubble")).to_have_text(["About the sky"])
    page.get_by_role("button", name="More for About the sky").click()
    page.get_by_role("menuitem", name="Rename").click()
    page.get_by_role("textbox", name="Name").fill("Blue")
    page.keyboard.press("Enter")
    expect(titles).to_have_text(["About the sea", "Blue"])

    page.get_by_role("button", name="More for Blue").click()
    with page.expect_download() as download:
        page.get_by_role("menuitem", name="Export as JSON").click()
    exported = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert [message["content"] for message in exported["messages"]] == ["About the sky", ANSWER]

    page.get_by_role("button", name="More for Blue").click()
    page.get_by_role("menuitem", name="Delete").click()
    expect(titles).to_have_text(["About the sea"])
    page.get_by_role("button", name="Undo").click()
    expect(titles).to_have_text(["About the sea", "Blue"])
    page.reload()
    expect(titles).to_have_text(["About the sea", "Blue"])


def test_a_storage_that_someone_else_wrote_does_not_break_the_page(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    bad = ["{", "null", '{"messages": 3}', '{"messages": [{"role": "x"}, null, {"role": "user", "content": {}}]}']
    for index, text in enumerate(bad):
        page.evaluate("([name, text]) => localStorage.setItem(name, text)", [f"qengine:conversation:{index}", text])
    page.evaluate("localStorage.setItem('qengine:settings', '[1]')")
    page.reload()
    page.get_by_role("button", name="New chat", exact=True).click()
    ask(page, "Hi")
    stats(page)
    assert answers(page) == ["The sky is blue, and grass is green."]


# When things go wrong


def test_a_server_that_is_away_loses_nothing(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    page.route("**/v1/**", lambda route: route.abort())
    ask(page, "Are you there?")
    card = page.get_by_role("alert")
    expect(card).to_contain_text("The server is away")
    expect(page.locator(".bubble")).to_have_text(["Are you there?"])
    page.unroute("**/v1/**")
    card.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer .prose")).to_have_text("The sky is blue, and grass is green.")
    expect(card).to_have_count(0)
    assert page.locator(".bubble").count() == 1


def test_a_full_server_is_explained(open_page: OpenPage) -> None:
    with talking(ANSWER, max_num_seqs=1, max_queue=0) as server:
        page = open_page(server.url)
        server.engine.hold()
        ask(page, "I am first")
        wait_until(lambda: server.async_engine is not None and server.async_engine.admission.num_in_flight == 1)
        page.get_by_role("button", name="New chat", exact=True).click()
        ask(page, "I am second")
        expect(page.get_by_role("alert")).to_contain_text("The server is busy")
        server.engine.allow()
        server.wait_until_quiet()
        page.get_by_role("alert").get_by_role("button", name="Try again").click()
        expect(page.locator(".answer .prose")).to_have_text("The sky is blue, and grass is green.")
        # The first answer went on although its conversation was not open.
        page.get_by_role("button", name="I am first", exact=True).click()
        expect(page.locator(".answer .prose")).to_have_text("The sky is blue, and grass is green.")


def test_a_conversation_that_is_too_long_is_explained(open_page: OpenPage) -> None:
    with talking(ANSWER, max_model_len=64) as server:
        page = open_page(server.url)
        ask(page, "word " * 100)
        expect(page.get_by_role("alert")).to_contain_text("too long for the model")
        page.get_by_role("button", name="Start a new chat").click()
        ask(page, "Hi")
        stats(page)


def test_a_stream_without_an_end_is_told_from_a_whole_answer(server: Running, open_page: OpenPage) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "Half an"}}]}

    def cut(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(chunk)}\n\n")

    page = open_page(server.url)
    page.route("**/v1/chat/completions", cut)
    ask(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text("The answer is incomplete")
    assert answers(page) == ["Half an"]
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer .prose")).to_have_text("The sky is blue, and grass is green.")


def test_the_key_is_asked_for_and_kept_for_the_tab(open_page: OpenPage) -> None:
    with talking(ANSWER, api_keys=("open-sesame",)) as server:
        page = open_page(server.url)
        key = page.get_by_label("API key")
        expect(key).to_be_visible()
        key.fill("wrong-key")
        page.keyboard.press("Enter")
        expect(page.get_by_text("did not accept this key")).to_be_visible()
        key.fill("open-sesame")
        page.keyboard.press("Enter")
        expect(key).to_be_hidden()
        ask(page, "Hi")
        stats(page)
        page.reload()
        expect(page.locator("#model-name")).to_have_text("scripted")
        assert page.evaluate("JSON.stringify(localStorage)").count("sesame") == 0
