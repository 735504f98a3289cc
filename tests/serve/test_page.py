"""The page in headless Chromium: upload, ask, watch, compare, stop, errors, keyboard, three sizes, accessibility.

axe-core is not part of the project: `npm install axe-core` in a folder, and VIDLADA_AXE names its axe.min.js; without,
its test is skipped.
"""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from media import write_video
from processes import wait_for
from serve.running import KEY

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("VIDLADA_SCREENSHOTS")  # a folder to keep pictures in, for people to look at
AXE = os.environ.get("VIDLADA_AXE")
SECONDS = 120_000  # milliseconds, since machines are slow
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=CHROMIUM)
        yield chromium
        chromium.close()


@contextmanager
def open_page(browser, server):
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
    with open_page(browser, server) as page:
        yield page


@pytest.fixture
def endless_page(browser, endless):
    with open_page(browser, endless) as page:
        yield page


def picture(page, name):
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


def choose(page, clip, count=1):
    page.locator("#file").set_input_files(clip)
    playwright.expect(page.locator("#media > li")).to_have_count(count, timeout=SECONDS)


def settings(page, place=0, **values):
    if not page.locator("#settings").evaluate("box => box.open"):
        page.locator("#settings > summary").click()
    panel = page.locator("fieldset").nth(place)
    for name, value in values.items():
        field = panel.locator(f"[name={name}]")
        if field.evaluate("field => field.tagName") == "SELECT":
            field.select_option(str(value))
        else:
            field.fill(str(value))


def answer_text(page, place=-1):
    return page.locator("article .text").nth(place)


def ask(page, question="describe the video ."):
    before = page.locator(".cost:visible").count()
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")
    playwright.expect(page.locator(".cost:visible")).to_have_count(before + 1, timeout=SECONDS)


def test_upload_ask_and_watch(page, clip):
    choose(page, clip)
    assert page.locator(".strip li").count() == 4
    assert re.search("160 × 96, 4.0 s", page.locator(".about").inner_text())
    settings(page, gen_length=32)
    page.evaluate("""() => {
        window.requestAnimationFrame = (draw) => draw();  // every step, even if the browser is too slow to show it
        window.seen = new Set();
        window.spoken = [];
        new MutationObserver(() => document.querySelectorAll(".text .token").forEach(
            (token) => window.seen.add(token.className))).observe(document.body, {subtree: true, childList: true});
        new MutationObserver(() => window.spoken.push(document.getElementById("announce").textContent)).observe(
            document.getElementById("announce"), {childList: true, characterData: true, subtree: true});
    }""")
    ask(page)
    seen = page.evaluate("[...window.seen]")
    assert any("final" in name for name in seen)
    assert any("sure-" in name for name in seen)
    answer = answer_text(page).inner_text()
    assert page.get_by_text(answer, exact=True).locator("visible=true").count() == 1  # it stands there once
    assert page.evaluate("window.spoken") == ["Answering …", f"Answer: {answer}"]
    summary = page.locator(".cost summary").inner_text()
    assert re.fullmatch(r"[\d.]+ s · \d+ tokens a second( · \d+ % of the work saved)?", summary)
    page.locator(".cost summary").click()
    assert "Least certain" in page.locator(".cost table").inner_text()
    picture(page, "answer")


def test_a_conversation(page, clip):
    choose(page, clip)
    settings(page, gen_length=16)
    ask(page, "is it red ?")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "what color is it ?")
    messages = sent.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[0]["content"]] == ["file", "text"]
    assert [part["type"] for part in messages[2]["content"]] == ["text"]
    page.locator("#fresh").click()
    assert page.locator("article").count() == 0


def test_frames_and_times_seek_the_video(page):
    page.locator("#samples button").first.click()
    playwright.expect(page.locator("#media video")).to_be_visible(timeout=SECONDS)
    # not by wait_for_function, whose second look the page's security policy refuses
    wait_for(lambda: page.evaluate("document.querySelector('#media video').readyState > 0"))
    page.locator(".strip button").nth(3).click()
    wait_for(lambda: page.evaluate("Math.abs(document.querySelector('#media video').currentTime - 3) < 0.2"))
    playwright.expect(page.locator(".strip li.now")).to_have_count(1, timeout=SECONDS)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=ANSWER, content_type="text/event-stream"))
    ask(page, "when ?")
    assert page.locator(".time").all_inner_texts() == ["4.5 s", "0:07"]
    page.locator(".time").first.click()
    wait_for(lambda: page.evaluate("Math.abs(document.querySelector('#media video').currentTime - 4.5) < 0.2"))
    assert page.locator(".thought").evaluate("box => box.open") is False
    assert "let me see" in page.locator(".thought p").text_content()
    picture(page, "times")


def event(content):
    return f"data: {json.dumps(content)}\n\n"


TEXT = "It turns at 4.5 s and <b>again</b> at 0:07."
DRAFT = {"step": 1, "slots": 16, "tokens": [], "statistics": {
    "steps": 1, "tokens": 16, "forward_passes": 1, "layer_tokens": [10], "seconds": {"denoising": 0.1}}}  # fmt: skip
ANSWER = (
    event({"choices": [{"delta": {"reasoning_content": "let me see"}}], "diffusion": {**DRAFT, "thinking": True}})
    + event({"choices": [{"delta": {"content": TEXT}}], "diffusion": DRAFT})
    + event({"choices": [], "usage": {"prompt_tokens": 10}}) + "data: [DONE]\n\n"
)  # fmt: skip


def test_two_settings(page, clip):
    choose(page, clip)
    page.locator("#compare").check()
    settings(page, 0, gen_length=16)
    settings(page, 1, gen_length=16, temperature=2, seed=3)
    assert page.locator("fieldset").nth(1).locator("[name=cache]").input_value() == "mars"
    page.locator("#question").fill("describe the video .")
    page.locator("#ask").click()
    playwright.expect(page.locator(".cost:visible")).to_have_count(2, timeout=SECONDS)
    assert page.locator("article").count() == 2
    assert answer_text(page, 0).inner_text() == answer_text(page, 1).inner_text() or page.locator("mark").count() > 0
    picture(page, "compare")


def test_several_media_and_a_url(page, clip, tmp_path):
    choose(page, [clip, write_video(tmp_path / "other.mp4", frames=50)], count=2)
    page.locator("#url").fill("https://example.com/third.mp4")
    page.locator("#url").press("Enter")
    assert page.locator("#media h3").all_inner_texts() == ["clip.mp4", "other.mp4", "third.mp4"]
    page.get_by_role("button", name="Remove clip.mp4").click()
    page.locator("#question").fill("is it red ?")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.locator("#ask").click()
    content = sent.value.post_data_json["messages"][0]["content"]
    assert [part["type"] for part in content] == ["file", "video_url", "text"]
    playwright.expect(page.locator("#error")).to_contain_text("cannot be fetched", timeout=SECONDS)


def ask_at_length(page):
    """Ask for more than the model can say before the test goes on; what it says stays provisional for long."""
    page.locator("#question").fill("describe the video .")
    settings(page, gen_length=1024, block_length=1024)
    page.locator("#ask").click()
    playwright.expect(page.locator(".text [class*=sure-]").first).to_be_visible(timeout=SECONDS)


def test_stop(endless_page, endless):
    page = endless_page
    cancelled = endless.metric("vidlada_cancelled_answers_total")
    ask_at_length(page)
    picture(page, "midway")
    assert page.locator("#ask").is_disabled()
    page.locator("#stop").click()
    playwright.expect(page.locator("#ask")).to_be_enabled(timeout=SECONDS)
    playwright.expect(answer_text(page)).to_have_text("Stopped.")
    playwright.expect(page.locator("#stop")).to_be_disabled()
    assert page.locator("#error").is_hidden()
    wait_for(lambda: endless.metric("vidlada_cancelled_answers_total") == cancelled + 1)


def test_a_question_waits_for_its_video(page, clip):
    waiting = []
    page.route("**/v1/files", lambda route: waiting.append(route))
    page.locator("#question").fill("is it red ?")
    page.locator("#file").set_input_files(clip)
    playwright.expect(page.locator("#facts")).to_have_text("Sending clip.mp4 …", timeout=SECONDS)
    assert page.locator("#ask").is_disabled()
    page.locator("#question").press("Enter")
    assert page.locator("article").count() == 0
    while not waiting:
        page.wait_for_timeout(20)  # milliseconds, in which Playwright tells of requests
    waiting[0].continue_()
    playwright.expect(page.locator("#ask")).to_be_enabled(timeout=SECONDS)
    assert page.locator(".strip li").count() == 4


def test_a_removed_video_is_deleted(page, server, clip):
    def read_storage():
        return {file["id"] for file in server.http().get("/v1/files").json()["data"]}

    before = read_storage()
    choose(page, clip)
    (first,) = read_storage() - before
    page.get_by_role("button", name="Remove clip.mp4").click()
    wait_for(lambda: first not in read_storage())


def test_a_drop_beside_the_box_stays_on_the_page(page):
    page.locator("h1").evaluate("""heading => {
        const data = new DataTransfer();
        data.items.add(new File(["not a video"], "dropped.mp4", {type: "video/mp4"}));
        heading.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
    }""")
    playwright.expect(page.locator("#error")).to_contain_text("cannot be used", timeout=SECONDS)


def test_errors_are_shown(page, clip, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"not a video at all")
    choose(page, clip)
    page.locator("#file").set_input_files(tmp_path / "bad.mp4")
    playwright.expect(page.locator("#error")).to_contain_text("cannot be used", timeout=SECONDS)
    assert page.locator("#media h3").all_inner_texts() == ["clip.mp4"]  # what is shown is what is asked about
    page.locator("#question").fill("is it red ?")
    settings(page, cache="nonsense")
    page.locator("#ask").click()
    playwright.expect(page.locator("#error")).to_contain_text("unknown cache", timeout=SECONDS)
    assert page.locator("#question").input_value() == "is it red ?"
    picture(page, "error")


def test_a_server_that_is_gone_is_reported(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.locator("#question").fill("is it red ?")
    page.locator("#ask").click()
    playwright.expect(page.locator("#error")).to_contain_text("cannot be reached", timeout=SECONDS)


def test_what_is_not_the_servers_answer_is_reported(page, clip):
    """A proxy in between may refuse an upload in words of its own."""
    page.route("**/v1/files", lambda route: route.fulfill(status=413, content_type="text/html", body="<p>too large"))
    page.locator("#file").set_input_files(clip)
    playwright.expect(page.locator("#error")).to_contain_text("the server answered 413", timeout=SECONDS)
    assert page.locator("#ask").is_enabled()


def test_keyboard_alone(page):
    page.locator("#choose").focus()
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    places = [reached.index(name) for name in ("url", "question", "ask", "compare")]
    assert places == sorted(places)


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (768, "dark"), (1440, "light")])
def test_sizes_and_accessibility(page, clip, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    choose(page, clip)
    settings(page, gen_length=16)
    page.locator("#settings > summary").click()
    ask(page)
    playwright.expect(answer_text(page)).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    small = page.evaluate("""() => [...document.querySelectorAll("button, input, summary, textarea, select")]
        .filter((each) => each.offsetParent && !each.closest(".time, .check")
            && each.getBoundingClientRect().height < 43).map((each) => each.outerHTML)""")
    assert small == []
    page.wait_for_timeout(300)  # scrolling ends
    picture(page, f"{width}-{scheme}")
    if AXE:
        content = Path(AXE).read_text()
        page.evaluate(content)
        page.locator("#settings > summary").click()
        violations = page.evaluate(
            "async () => (await axe.run()).violations.map((each) => [each.id, each.nodes[0].html])"
        )
        assert violations == []
