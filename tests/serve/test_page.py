"""The page in headless Chromium: upload, ask, watch, compare, stop, errors, keyboard, a narrow screen."""

import os
import re
import shutil
from pathlib import Path

import pytest
from serve.running import KEY

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("VIDLADA_SCREENSHOTS")  # a folder to keep pictures in, for people to look at
SECONDS = 120_000  # milliseconds, since machines are slow

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server):
    """The page with its key given; whatever goes to another host, or wrong in a script, fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((server.url, "blob:", "data:"))
            else problems.append(request.url))  # fmt: skip
    page.goto(server.url)
    page.locator("#key").fill(KEY)  # the page has opened the field, since it was refused
    page.locator("#key").press("Tab")
    playwright.expect(page.locator("#model")).to_have_text("tiny", timeout=SECONDS)
    yield page
    context.close()
    assert problems == []


def picture(page, name):
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


def choose(page, clip):
    page.locator("#file").set_input_files(clip)
    playwright.expect(page.locator("#strip")).to_be_visible(timeout=SECONDS)


def settings(page, place=0, **values):
    if not page.locator("#settings").evaluate("box => box.open"):
        page.locator("#settings summary").click()
    panel = page.locator("fieldset").nth(place)
    for name, value in values.items():
        panel.locator(f"[name={name}]").fill(str(value))


def said(page, place=0):
    return page.locator(".said").nth(place)


def test_upload_ask_and_watch(page, clip):
    choose(page, clip)
    assert page.locator("#strip li").count() == 4
    assert re.search("160 × 96, 4.0 s", page.locator("#facts").inner_text())
    settings(page, gen_length=32)
    page.evaluate("""() => {
        window.seen = new Set();
        new MutationObserver(() => document.querySelectorAll(".draft .token").forEach(
            (token) => window.seen.add(token.className))).observe(document.body, {subtree: true, childList: true});
    }""")
    page.locator("#question").fill("describe the video .")
    page.locator("#question").press("Enter")
    playwright.expect(page.locator("table")).to_be_visible(timeout=SECONDS)
    seen = page.evaluate("[...window.seen]")
    assert any("final" in name for name in seen)
    assert any("sure-" in name for name in seen)
    settled = "".join(page.locator(".draft .final").all_inner_texts())
    assert said(page).inner_text().split() == settled.split()
    assert "tokens a second" in page.locator("table").inner_text()
    picture(page, "answer")


def test_a_sample_and_two_settings(page):
    page.locator("#samples button").first.click()
    playwright.expect(page.locator("#strip")).to_be_visible(timeout=SECONDS)
    page.locator("#compare").check()
    settings(page, 0, gen_length=16)
    settings(page, 1, gen_length=16)
    assert page.locator("fieldset").nth(1).locator("[name=cache]").input_value() == "mars"
    page.locator("#ask").click()
    playwright.expect(page.locator("table").nth(1)).to_be_visible(timeout=SECONDS)
    assert page.locator("article").count() == 2
    picture(page, "compare")


def test_stop(page):
    page.locator("#question").fill("describe the video .")
    settings(page, gen_length=1024, temperature=2)
    page.locator("#ask").click()
    playwright.expect(said(page)).to_contain_text("step", timeout=SECONDS)
    page.locator("#stop").click()
    playwright.expect(page.locator("#ask")).to_be_enabled(timeout=SECONDS)
    assert page.locator("#error").is_hidden()


def test_errors_are_told(page, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"not a video at all")
    page.locator("#file").set_input_files(tmp_path / "bad.mp4")
    playwright.expect(page.locator("#error")).to_contain_text("cannot be used", timeout=SECONDS)
    page.locator("#question").fill("is it red ?")
    settings(page, cache="nonsense")
    page.locator("#ask").click()
    playwright.expect(page.locator("#error")).to_contain_text("unknown cache", timeout=SECONDS)
    picture(page, "error")


def test_keyboard_alone(page):
    page.locator("#question").focus()
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"ask", "compare", "file"} <= reached


def test_a_narrow_screen(page, clip):
    page.set_viewport_size({"width": 360, "height": 740})
    choose(page, clip)
    settings(page, gen_length=16)
    page.locator("#question").fill("is it red ?")
    page.locator("#ask").click()
    playwright.expect(page.locator("table")).to_be_visible(timeout=SECONDS)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    picture(page, "narrow")


def test_everything_has_a_name(page):
    """Every control can be announced, and every picture has a text."""
    nameless = page.evaluate("""() => [...document.querySelectorAll("input, select, button, img, video")].filter(
        (each) => !each.hidden && !(each.labels?.length || each.textContent.trim() || each.alt || each.ariaLabel
            || each.tagName === "VIDEO")).map((each) => each.outerHTML)""")
    assert nameless == []
    assert page.evaluate("document.documentElement.lang") == "en"
