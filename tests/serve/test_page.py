"""The page in headless Chromium: upload, ask, watch, compare, stop, errors, keyboard, a narrow screen."""

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from media import write_video
from serve.running import KEY, wait_for

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("VIDLADA_SCREENSHOTS")  # a folder to keep pictures in, for people to look at
SECONDS = 120_000  # milliseconds, since machines are slow

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser, server):
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


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as page:
        yield page


@pytest.fixture
def tireless_page(browser, tireless):
    with opened(browser, tireless) as page:
        yield page


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
        field = panel.locator(f"[name={name}]")
        if field.evaluate("field => field.tagName") == "SELECT":
            field.select_option(str(value))
        else:
            field.fill(str(value))


def said(page, place=0):
    return page.locator(".said").nth(place)


def test_upload_ask_and_watch(page, clip):
    choose(page, clip)
    assert page.locator("#strip li").count() == 4
    assert re.search("160 × 96, 4.0 s", page.locator("#facts").inner_text())
    settings(page, gen_length=32)
    page.evaluate("""() => {
        window.requestAnimationFrame = (draw) => draw();  // every step, even if the browser is too slow to show it
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
    stable = "".join(page.locator(".draft .final").all_inner_texts())
    assert said(page).inner_text().split() == stable.split()
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


def ask_at_length(page):
    """Ask for more than the model can say before the test goes on; what it says stays provisional for long."""
    page.locator("#question").fill("describe the video .")
    settings(page, gen_length=1024, block_length=1024)
    page.locator("#ask").click()
    playwright.expect(page.locator(".draft [class*=sure-]").first).to_be_visible(timeout=SECONDS)


def test_stop(tireless_page, tireless):
    page = tireless_page
    cancelled = tireless.metric("vidlada_cancelled_answers_total")
    ask_at_length(page)
    picture(page, "midway")
    assert page.locator("#ask").is_disabled()
    page.locator("#stop").click()
    playwright.expect(page.locator("#ask")).to_be_enabled(timeout=SECONDS)
    playwright.expect(said(page)).to_have_text("stopped")
    playwright.expect(page.locator("#stop")).to_be_disabled()
    assert page.locator("#error").is_hidden()
    wait_for(lambda: tireless.metric("vidlada_cancelled_answers_total") == cancelled + 1)


def hold_uploads(page):
    """Keep uploads on their way; gives what waits for the next one, to be let go."""
    held, taken = [], iter(range(1000))
    page.route("**/v1/files", lambda route: held.append(route))

    def next_upload():
        place = next(taken)
        while len(held) <= place:
            page.wait_for_timeout(20)  # milliseconds, in which Playwright tells of requests
        return held[place]

    return next_upload


def test_a_question_waits_for_its_video(page, clip):
    next_upload = hold_uploads(page)
    page.locator("#question").fill("is it red ?")
    settings(page, gen_length=16, remasking="random")
    page.locator("#file").set_input_files(clip)
    playwright.expect(page.locator("#facts")).to_have_text("Sending clip.mp4 …", timeout=SECONDS)
    assert page.locator("#ask").is_disabled()
    page.locator("#question").press("Enter")
    page.locator("#form").evaluate("form => form.dispatchEvent(new SubmitEvent('submit', {cancelable: true}))")
    assert said(page).inner_text() == ""
    next_upload().continue_()
    playwright.expect(page.locator("#ask")).to_be_enabled(timeout=SECONDS)
    assert page.locator("#strip li").count() == 4
    with page.expect_request("**/v1/chat/completions") as asked:
        page.locator("#question").press("Enter")
    body = asked.value.post_data_json
    assert [part["type"] for part in body["messages"][0]["content"]] == ["text", "file"]
    assert body["remasking"] == "random"
    playwright.expect(page.locator("table")).to_be_visible(timeout=SECONDS)


def test_the_video_chosen_last_counts(page, clip, tmp_path):
    next_upload = hold_uploads(page)
    page.locator("#file").set_input_files(clip)
    next_upload()
    other = write_video(tmp_path / "other.mp4", frames=50)
    page.locator("#file").set_input_files(other)
    playwright.expect(page.locator("#facts")).to_have_text("Sending other.mp4 …", timeout=SECONDS)
    assert page.locator("#ask").is_disabled()
    next_upload().continue_()
    playwright.expect(page.locator("#ask")).to_be_enabled(timeout=SECONDS)
    assert page.locator("#strip li").count() == 2
    assert page.locator("#error").is_hidden()


def test_a_replaced_video_is_deleted(page, server, clip, tmp_path):
    def stored():
        return {file["id"] for file in server.http().get("/v1/files").json()["data"]}

    before = stored()
    choose(page, clip)
    (first,) = stored() - before
    choose(page, write_video(tmp_path / "other.mp4", frames=50))
    wait_for(lambda: first not in stored())


def test_a_new_video_leaves_the_answer_alone(tireless_page, clip):
    page = tireless_page
    ask_at_length(page)
    choose(page, clip)
    playwright.expect(page.locator("#progress")).to_be_hidden(timeout=SECONDS)
    assert page.locator("#ask").is_disabled()
    assert page.locator("#stop").is_enabled()
    page.locator("#stop").click()
    playwright.expect(page.locator("#ask")).to_be_enabled(timeout=SECONDS)


def test_errors_are_told(page, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"not a video at all")
    page.locator("#file").set_input_files(tmp_path / "bad.mp4")
    playwright.expect(page.locator("#error")).to_contain_text("cannot be used", timeout=SECONDS)
    page.locator("#question").fill("is it red ?")
    settings(page, cache="nonsense")
    page.locator("#ask").click()
    playwright.expect(page.locator("#error")).to_contain_text("unknown cache", timeout=SECONDS)
    picture(page, "error")


def test_what_is_not_the_servers_answer_is_told(page, clip):
    """A proxy in between may refuse an upload in words of its own."""
    page.route("**/v1/files", lambda route: route.fulfill(status=413, content_type="text/html", body="<p>too large"))
    page.locator("#file").set_input_files(clip)
    playwright.expect(page.locator("#error")).to_contain_text("the server answered 413", timeout=SECONDS)
    assert page.locator("#ask").is_enabled()


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
    playwright.expect(page.locator(".draft")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    picture(page, "narrow")


def test_everything_has_a_name(page):
    """Every control can be announced, and every picture has a text."""
    nameless = page.evaluate("""() => [...document.querySelectorAll("input, select, button, img, video")].filter(
        (each) => !each.hidden && !(each.labels?.length || each.textContent.trim() || each.alt || each.ariaLabel
            || each.tagName === "VIDEO")).map((each) => each.outerHTML)""")
    assert nameless == []
    assert page.evaluate("document.documentElement.lang") == "en"
