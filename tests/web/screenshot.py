"""The README's picture: the page with an answer of the bundled model, taken as it is.

python -m tests.web.screenshot [docs/images/web.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from qengine.config import EngineConfig
from qengine.engine import Engine
from tests.serving.running import serving
from tests.web.conftest import chromium_path

QUESTIONS = ("What is the capital of France?", "Write a Python function that returns the largest number of a list.")
_PATIENCE_MS = 300_000
#: The plot gets a point every two seconds.
_PLOT_MS = 8_000


def take(file: Path) -> None:
    """Ask the bundled model QUESTIONS in the page, and write what it then looks like."""
    engine = Engine.start(EngineConfig.from_options({"max_model_len": 2048}))
    with serving(engine, served_model_names=("SmolLM2-135M-Instruct",)) as running, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 760}, device_scale_factor=2)
        page.goto(running.url)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("200")
        page.keyboard.press("Escape")
        for question in QUESTIONS:
            page.get_by_label("Message", exact=True).fill(question)
            page.keyboard.press("Enter")
            expect(page.locator(".bubble").last).to_have_text(question)
            expect(page.locator(".message").last).to_have_attribute("aria-busy", "false", timeout=_PATIENCE_MS)
        page.mouse.move(600, 300)
        page.wait_for_timeout(_PLOT_MS)
        page.screenshot(path=file)
        browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/web.png"))
