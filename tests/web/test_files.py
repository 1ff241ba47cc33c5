"""The page's files as HTTP answers: open, exact, guarded by headers, and free of anything from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from qengine.serving.page import PAGE_PATHS
from tests.serving.running import Running, serving
from tests.serving.scripted_engine import ScriptedEngine

SCRIPTS = sorted(path for path in PAGE_PATHS if path.endswith(".js"))


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(ScriptedEngine(), api_keys=("first-key",)) as running:
        yield running


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_a_file_needs_no_key_and_loads_nothing_from_elsewhere(locked: Running, path: str) -> None:
    answer = locked.get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", answer.text)) - {"http://www.w3.org/2000/svg"}
    assert not {address for address in addresses if not address.startswith("https?:")}


def test_the_pages_name_every_file(locked: Running) -> None:
    texts = {path: locked.get(path).text for path in PAGE_PATHS}
    texts["/docs"] = locked.get("/docs", headers={"x-api-key": "first-key"}).text
    for path in PAGE_PATHS - {"/"}:
        name = path.rpartition("/")[2]
        assert any(name in text for other, text in texts.items() if other != path), f"nothing uses {path}"


def test_the_page_has_no_inline_code(locked: Running) -> None:
    page = locked.get("/").text
    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert re.findall(r"\son\w+=|\sstyle=|<style", page) == []


@pytest.mark.parametrize("path", SCRIPTS)
def test_no_script_makes_html_of_text(locked: Running, path: str) -> None:
    banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|DOMParser"
    assert re.findall(banned, locked.get(path).text) == []


def test_an_unchanged_file_is_not_sent_again(locked: Running) -> None:
    first = locked.get("/")
    again = locked.get("/", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert locked.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_only_reading_is_allowed(locked: Running) -> None:
    with locked.client() as client:
        head = client.head("/")
        assert (head.status_code, head.content) == (200, b"")
        assert client.post("/").status_code == 405
