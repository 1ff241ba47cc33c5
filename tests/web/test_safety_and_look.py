"""Hostile answers, phones, keyboards, dark mode, the load strip, and one answer of a real model."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from qengine.config import EngineConfig
from qengine.engine import Engine
from tests.serving.running import Running, serving
from tests.web.conftest import PATIENCE_MS, OpenPage, talking
from tests.web.test_chatting import answers, ask, stats

expect.set_options(timeout=PATIENCE_MS)

HOSTILE = """\
<img src=x onerror="window.harm = 1"> <script>window.harm = 2</script>

[click](javascript:window.harm=3) [data](data:text/html,<script>window.harm=4</script>) [ok](https://example.org/a)

[relative](/v1/models) <javascript:window.harm=5> ![pixel](https://example.org/pixel.png)

```html"><img src=x onerror=window.harm=6>
</code></pre><script>window.harm = 7</script>
```

| <svg onload=window.harm=8> | b |
|---|---|
| [x](JaVaScRiPt:window.harm=9) | **<iframe srcdoc="<script>top.harm=10</script>">** |

> - <a href="javascript:window.harm=11">nested</a>
"""
#: Shapes that are slow or deep for a careless reader of Markdown.
TWISTED = [
    "x" * 200_000,
    "*a " * 4_000,
    "[" * 4_000,
    "[a](" * 2_000,
    "`" * 3_001 + " a",
    "> " * 2_000 + "deep",
    "- " * 2_000 + "deep",
    "|" * 4_000 + "\n" + "|-" * 4_000,
    "```\n" + "never closed\n" * 500,
    "http://" + "(" * 4_000,
    "**" * 3_000,
    "\\" * 5_001,
]
#: Markdown and its HTML.
MARKDOWN = [
    ("a *b* **c** ~~d~~ `e`", "<p>a <em>b</em> <strong>c</strong> <del>d</del> <code>e</code></p>"),
    ("snake_case_name and 2*3*4 \\*x\\*", "<p>snake_case_name and 2<em>3</em>4 *x*</p>"),
    ("# A\n\n### B #", "<h2>A</h2><h4>B</h4>"),
    ("one\ntwo", "<p>one<br>two</p>"),
    ("- a\n- b\n  - c\n\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("1. a\n   ```\n   x\n   ```\n2. b", "<ol><li>a<pre>x</pre></li><li>b</li></ol>"),
    ("> a\n> b\n\nc", "<blockquote><p>a<br>b</p></blockquote><p>c</p>"),
    ("```py\n<b>\n\n*x*\n```", "<pre>&lt;b&gt;\n\n*x*</pre>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    ("***both***", "<p><strong><em>both</em></strong></p>"),
    ("&lt; <b>x</b> &amp;", "<p>&amp;lt; &lt;b&gt;x&lt;/b&gt; &amp;amp;</p>"),
    ("`` a`b ``", "<p><code>a`b</code></p>"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with talking("Green.") as running:
        yield running


def render(page: Page, text: str) -> Any:
    """Draw `text` with the page's own renderer; returns how long its text is on the page."""
    return page.evaluate(
        """async (text) => {
          const { renderMarkdown } = await import("./web/markdown.js");
          const parent = document.createElement("div");
          renderMarkdown(parent, text, (code) => document.createTextNode(code));
          return parent.textContent.length;
        }""",
        text,
    )


def markup(page: Page, text: str) -> str:
    """The HTML that the page's renderer makes of `text`."""
    return page.evaluate(
        """async (text) => {
          const { renderMarkdown } = await import("./web/markdown.js");
          const parent = document.createElement("div");
          const code = (text) => Object.assign(document.createElement("pre"), { textContent: text });
          for (let end = 1; end < text.length; end += 3) renderMarkdown(parent, text.slice(0, end), code);
          renderMarkdown(parent, text, code);
          return parent.innerHTML;
        }""",
        text,
    )


# Safety


def test_a_hostile_answer_does_not_run(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    asked_for: list[str] = []
    page.on("request", lambda request: asked_for.append(request.url))
    server.engine.say(HOSTILE)
    ask(page, "<img src=x onerror='window.harm=12'>")
    stats(page)
    prose = page.locator(".answer .prose")
    assert prose.locator("script, img, iframe, svg[onload], [onerror], [srcdoc]").count() == 0
    links = prose.locator("a").evaluate_all("links => links.map((link) => [link.getAttribute('href'), link.rel])")
    assert {href for href, _ in links} == {"https://example.org/a", "https://example.org/pixel.png"}
    assert all("noopener" in rel for _, rel in links)
    for span in prose.get_by_text(re.compile("^(click|data|x|nested)$")).all():
        span.click()
    page.reload()
    expect(page.locator(".answer .prose")).to_contain_text("window.harm = 1")
    assert page.evaluate("window.harm") is None
    assert {url for url in asked_for if not url.startswith(server.url)} == set()


def test_a_huge_line_neither_hangs_nor_widens_the_page(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    server.engine.say("long" * 2_500)
    ask(page, "Go")
    stats(page)
    assert len(answers(page)[0]) == 10_000
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator(".scroller").evaluate("node => node.scrollWidth <= node.clientWidth")


def test_twisted_text_is_drawn(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    for text in TWISTED:
        assert 0 <= render(page, text) <= len(text), text[:20]
    assert render(page, TWISTED[0]) == len(TWISTED[0])


def test_markdown(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    for text, expected in MARKDOWN:
        assert markup(page, text) == expected


def test_a_table_and_a_link_with_brackets(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    table = markup(page, "| a | b |\n|:-:|--:|\n| `x|y` | \\| |")
    assert re.sub("<div[^>]*>|</div>", "", table) == (
        '<table><thead><tr><th class="center">a</th><th class="right">b</th></tr></thead>'
        '<tbody><tr><td class="center"><code>x|y</code></td><td class="right">|</td></tr></tbody></table>'
    )
    assert 'href="https://en.example.org/A_(b)"' in markup(page, "[a](https://en.example.org/A_(b)) (x)")
    assert 'href="https://a.example/x"' in markup(page, "See https://a.example/x.")


# Look and feel


def test_a_phone_has_no_sideways_scrolling(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url, viewport={"width": 360, "height": 700}, is_mobile=True, has_touch=True)
    server.engine.say(
        "| a | b | c | d |\n|---|---|---|---|\n" + f"| {'word ' * 9}" * 4 + "|\n\n```\n" + "x" * 300 + "\n```"
    )
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    ask(page, "A table, please. " + "w" * 120)
    stats(page)
    assert page.evaluate(fits)
    assert page.locator(".scroller").evaluate("node => node.scrollWidth <= node.clientWidth")
    page.get_by_role("button", name="Show conversations").tap()
    expect(page.get_by_role("button", name="New chat")).to_be_visible()
    assert page.evaluate(fits)
    page.get_by_role("button", name="Close the list of conversations").tap()
    expect(page.get_by_role("button", name="New chat")).to_be_hidden()
    page.get_by_role("button", name="Settings").tap()
    assert page.evaluate(fits)


def test_the_keyboard_is_enough(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    server.engine.say("Green.")
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the message box")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert server.engine.prepared == [] or server.engine.prepared[-1].prompt.count("two") == 0
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("one\ntwo")
    stats(page)
    expect(page.locator("#announcer")).to_contain_text("Green.")
    page.keyboard.press("Shift+Tab")
    for _ in range(3):
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Shift+Tab")
    more = page.get_by_role("button", name="More for one two")
    more.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("menuitem", name="Delete")).to_be_focused()
    page.keyboard.press("Escape")
    expect(more).to_be_focused()


def test_every_control_has_a_name(server: Running, open_page: OpenPage) -> None:
    page = open_page(server.url)
    server.engine.say("```py\nx = 1\n```")
    ask(page, "Code")
    stats(page)
    page.get_by_role("button", name="Settings").click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, a[href]")]
          .filter((node) => !(node.getAttribute("aria-label") || node.textContent.trim() || node.labels?.length))
          .map((node) => node.outerHTML)"""
    )
    assert nameless == []


def brightness(page: Page, what: str) -> float:
    """0 to 255, of a CSS colour of the page's body."""
    return float(
        page.evaluate(
            """(what) => {
              const context = document.createElement("canvas").getContext("2d");
              context.fillStyle = getComputedStyle(document.body)[what];
              context.fillRect(0, 0, 1, 1);
              return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).reduce((a, b) => a + b) / 3;
            }""",
            what,
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_button(server: Running, open_page: OpenPage, scheme: str) -> None:
    def is_dark() -> bool:
        return brightness(page, "backgroundColor") < 60 and brightness(page, "color") > 200

    page = open_page(server.url, color_scheme=scheme)
    assert is_dark() == (scheme == "dark")
    button = page.locator("#theme")
    for name, dark in (("light", False), ("dark", True)):
        button.click()
        expect(button).to_have_attribute("aria-label", f"Theme: {name}")
        assert is_dark() == dark
    page.reload()
    assert is_dark()
    button.click()
    assert is_dark() == (scheme == "dark")


# The load strip

METRICS = """\
# HELP x:num_requests_running Requests in a step.
# TYPE x:num_requests_running gauge
x:num_requests_running{{engine="0",model_name="m"}} 3.0
x:num_requests_waiting{{engine="0",model_name="a {{b}} c"}} 2
x:kv_cache_usage_perc{{engine="0"}} 0.425
x:generation_tokens_total{{engine="0"}} {num_tokens}
x:generation_tokens_created{{engine="0"}} 1.7e9
"""


@pytest.mark.parametrize("prefix", ["qengine", "vllm"])
def test_the_strip_shows_what_the_server_does(server: Running, open_page: OpenPage, prefix: str) -> None:
    page = open_page("about:blank")
    num_tokens = iter(range(0, 10**9, 500))
    text = METRICS.replace("x:", f"{prefix}:")
    page.route("**/metrics", lambda route: route.fulfill(body=text.format(num_tokens=next(num_tokens))))
    page.goto(server.url)
    expect(page.locator("#strip")).to_be_visible()
    assert page.locator("#strip-running").inner_text() == "3"
    assert page.locator("#strip-waiting").inner_text() == "2"
    assert page.locator("#strip-kv").inner_text() == "43 %"
    expect(page.locator("#strip-rate")).not_to_have_text("0")
    assert page.locator("#strip-plot .line").get_attribute("d", timeout=PATIENCE_MS).startswith("M")


@pytest.mark.parametrize("body", ["", "qengine:num_requests_running 1\n", "<html>"])
def test_without_figures_there_is_no_strip(server: Running, open_page: OpenPage, body: str) -> None:
    page = open_page("about:blank")
    asked = threading.Event()

    def answer(route: Any) -> None:
        route.fulfill(status=200 if body else 404, body=body)
        asked.set()

    page.route("**/metrics", answer)
    page.goto(server.url)
    expect(page.locator("#health-dot")).to_have_class("dot good")
    for _ in range(PATIENCE_MS // 20):
        page.wait_for_timeout(20)  # The route is answered meanwhile.
        if asked.is_set():
            break
    assert asked.is_set()
    expect(page.locator("#strip")).to_be_hidden()


# A real model


def test_the_bundled_model_answers(open_page: OpenPage) -> None:
    engine = Engine.start(EngineConfig.from_options({"max_model_len": 1024}))
    with serving(engine) as running:
        page = open_page(running.url)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("24")
        page.keyboard.press("Escape")
        ask(page, "What is the capital of France?")
        assert "tok/s" in stats(page)
        assert "Paris" in answers(page)[0]
        expect(page.locator("#strip")).to_be_visible()
        expect(page.locator("#strip-running")).to_have_text("0")
