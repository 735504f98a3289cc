"""Take the picture of the server's page in the README: python scripts/picture_page.py [docs/page.png].

Needs Playwright and Chromium. Starts a server of the shipped model, shows it the sample video, asks its questions, and
keeps what a window of 1440 pixels shows.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

SAMPLES = Path(__file__).parents[1] / "vidlada" / "serve" / "page" / "samples" / "index.json"
WAIT = 300_000  # milliseconds


def take(url: str, path: str) -> None:
    """Ask in the page at an address and write the picture."""
    with sync_playwright() as playwright:
        executable = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme="light")
        page.set_default_timeout(WAIT)
        page.goto(url)
        expect(page.locator("#model")).to_have_text("tiny", timeout=WAIT)
        page.locator("#samples button").first.click()
        expect(page.locator("#media video")).to_be_visible(timeout=WAIT)
        page.locator("#settings > summary").click()
        page.locator("[name=cache]").fill("mars")
        page.locator("#settings > summary").click()
        questions = json.loads(SAMPLES.read_text(encoding="utf-8"))[0]["questions"]
        for number, question in enumerate(questions, start=1):
            page.locator("#question").fill(question)
            page.locator("#ask").click()
            expect(page.locator(".cost:visible")).to_have_count(number, timeout=WAIT)
        page.evaluate("window.scrollTo(0, 0)")
        page.wait_for_timeout(500)  # scrolling ends
        page.screenshot(path=path)
        browser.close()
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def main() -> None:
    """Start a server, take the picture, and end the server."""
    path = sys.argv[1] if len(sys.argv) > 1 else "docs/page.png"
    command = [sys.executable, "-m", "vidlada", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = ""
        for line in server.stderr:
            url = next(iter(re.findall(r"http://\S+", line)), url)
            if "startup complete" in line:
                break
        try:
            take(url, path)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
