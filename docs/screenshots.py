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


def train(run: Path) -> None:
    data = run.parent / "photographs"
    runpy.run_path(str(ROOT / "data/photographs/build.py"))["main"](data)
    if code := vlm_lora(["train", str(data / "photos"), "--output", str(run), *TRAIN]):
        raise SystemExit(code)


def take(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)  # until what moves has come to rest
    page.screenshot(path=ROOT / f"docs/{name}.jpg", type="jpeg", quality=88)


def main(run: Path) -> None:
    if not (run / "adapter").is_dir():
        train(run)
    app = launch("tiny", run, port=None, block=False)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1020, "height": 660}, color_scheme="light").new_page()
        page.set_default_timeout(120_000)
        page.goto(app.local_url)
        page.get_by_role("tab", name="Picture", exact=True).click()
        page.locator("#examples .thumbnail-item").first.click()
        page.get_by_role("button", name="Caption or answer").click()
        page.get_by_role("button", name="Caption or answer").and_(page.locator(":enabled")).wait_for()
        take(page, "demo-picture")
        page.set_viewport_size({"width": 1020, "height": 900})
        page.get_by_role("tab", name="What changed").click()
        page.locator("#answer img").wait_for()
        take(page, "demo-evaluation")
        browser.close()
    app.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / ("" if len(sys.argv) > 1 else "run"))
