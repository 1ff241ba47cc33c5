"""A headless Chromium for the page's tests. Where there is none they are skipped, but not in continuous integration."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.serving.running import Running, serving
from tests.web.talking_engine import TalkingEngine

#: A guard against hangs, not a measurement: the cores may be busy.
PATIENCE_MS = 30_000
OpenPage = Callable[..., Page]


def chromium_path() -> str | None:
    """Debian's package, or what else is called so."""
    return next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Ended with this package: while Playwright runs, no other test could start an event loop."""
    path = chromium_path()
    if path is None:
        reason = "no chromium on this machine; on Debian: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        # Chromium's sandbox needs rights that containers do not give; the pages are our own.
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """`open_page(url, **context options)` is a page of a fresh profile. Any script error on it fails the test."""
    errors: list[str] = []
    with ExitStack() as stack:

        def open_one(url: str, **options: Any) -> Page:
            context = browser.new_context(**{"viewport": {"width": 1100, "height": 760}, **options})
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(PATIENCE_MS)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(url)
            return page

        yield open_one
    assert not errors


@contextmanager
def talking(text: str, **options: Any) -> Iterator[Running]:
    """A guarded server whose model says `text`."""
    engine_options = {name: options.pop(name) for name in ("max_num_seqs", "max_model_len") if name in options}
    engine = TalkingEngine(**engine_options)
    engine.say(text)
    with serving(engine, **options) as running:
        yield running
