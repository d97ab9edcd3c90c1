"""Takes the pictures of the page in README and docs, from a run of the embedded model on data/photographs.

python docs/screenshots.py [RUN]

Trains RUN where there is none (some minutes), into a folder of its own that stays. Needs a Chromium, as the tests do.
"""

import runpy
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from vlm_lora.cli import main as vlm_lora
from vlm_lora.demo import launch

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ["--model", "tiny", "--val-split", "0.2", "--epochs", "12", "--batch-size", "16", "--lr", "3e-3"]

EXAMPLE = 3
"""Which of the held-out pictures is shown."""
WIDE, SHOWN = 1280, 1120
"""Pixels of the window, and of its middle, which is all there is on the page."""


def train(run: Path) -> None:
    data = run.parent / "photographs"
    runpy.run_path(str(ROOT / "data/photographs/build.py"))["main"](data)
    if code := vlm_lora(["train", str(data / "photos"), "--output", str(run), *TRAIN]):
        raise SystemExit(code)


def take(page: Page, name: str, height: int) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)  # until what moves has come to rest
    clip = {"x": (WIDE - SHOWN) / 2, "y": 0, "width": SHOWN, "height": height}
    page.screenshot(path=ROOT / f"docs/{name}.jpg", type="jpeg", quality=88, full_page=True, clip=clip)


def main(run: Path) -> None:
    if not (run / "adapter").is_dir():
        train(run)
    app = launch("tiny", run, port=None, block=False)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": WIDE, "height": 900}, color_scheme="light").new_page()
        page.set_default_timeout(120_000)
        page.goto(app.local_url)
        page.get_by_role("tab", name="Picture", exact=True).click()
        page.locator("#examples .thumbnail-item").nth(EXAMPLE).click()
        page.get_by_role("button", name="Caption or answer").click()
        page.get_by_role("button", name="Caption or answer").and_(page.locator(":enabled")).wait_for()
        take(page, "demo-picture", height=680)
        page.get_by_role("tab", name="What changed").click()
        page.locator("#answer img").wait_for()
        page.get_by_role("button", name="Next", exact=True).click()
        take(page, "demo-evaluation", height=1080)
        browser.close()
    app.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(tempfile.mkdtemp(), "run"))
