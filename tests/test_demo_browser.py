"""The web demo in a real browser, with a model that was really tuned: what a person sees, hears, and cannot break."""

import io
import json
import os
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.conftest import ROOT

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

from vlm_lora import read_dataset  # noqa: E402
from vlm_lora.cli import main  # noqa: E402
from vlm_lora.demo import launch  # noqa: E402

HTML = "<img src=x onerror=alert(1)>${alert(1)}"
SLOW = 180_000  # milliseconds; two cores may be busy
LATE = """(() => { const fetch = window.fetch; window.fetch = async (...asked) => {
    if (/queue.join/.test(asked[0])) await new Promise(done => setTimeout(done, 400));
    return fetch(...asked); }; })()"""
BUSY = pytest.mark.parametrize("busy", ["", LATE], ids=["at once", "late"])


@pytest.fixture(scope="module")
def pictures() -> list[Path]:
    return sorted((ROOT / "data/emoji_scenes/more").glob("*.png"))[:3]


@pytest.fixture(scope="module")
def run(browser, tmp_path_factory):
    """The embedded model, tuned for a moment; and an evaluation whose texts a browser could misread."""
    place = tmp_path_factory.mktemp("browser")
    photos = place / "photos"
    photos.mkdir()
    for i, source in enumerate(sorted((ROOT / "data/emoji_scenes/more").glob("*.png"))[:8]):
        shutil.copy(source, photos / f"{i}.png")
        (photos / f"{i}.txt").write_text("Emoji.")
    patch = pytest.MonkeyPatch()
    patch.setenv("VLM_LORA_CACHE", str(place / "cache"))
    command = ["train", str(photos), "--model", "tiny", "--output", str(place / "runs/scenes"), "--val-split", "0.5"]
    assert main([*command, "--epochs", "15", "--lr", "5e-3", "--batch-size", "4"]) == 0
    file = place / "runs/scenes/predictions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"references": [f"{HTML} Scene."], "tuned": f"{HTML} {row['tuned']}"} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(place / "runs/scenes", place / "runs/other")
    assert main(["eval", str(photos), "--adapter", str(file.parent), "--review", "--output", str(file.parent)]) == 0
    review = (file.parent / "review.jsonl").read_text()
    (file.parent / "review.jsonl").write_text(review.replace("Emoji.", f"{HTML} Emoji."))
    yield place / "runs/scenes"
    patch.undo()


@pytest.fixture(scope="module")
def app(run):
    app = launch("tiny", run, port=None, block=False, roots=[run.parent.parent / "photos"])
    yield app
    app.close(verbose=False)


@pytest.fixture
def open_page(app, browser):
    """Opens the page; at the end, nobody else may have been contacted, and nothing have gone wrong in the page."""
    contexts, hosts, wrong, waited_for = [], set(), [], set()

    def open_one(**settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.on("request", lambda request: "/heartbeat/" in request.url or waited_for.add(request))
        page.on("requestfinished", lambda request: waited_for.discard(request))
        page.on("requestfailed", lambda request: waited_for.discard(request))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.goto(app.local_url)
        page.locator("#examples .thumbnail-item").first.wait_for()
        quiet = 0
        while quiet < 5:  # the page's own "networkidle" would wait for gradio's heartbeat, which never ends
            page.wait_for_timeout(100)
            quiet = 0 if waited_for else quiet + 1
        page.wrong = wrong
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert hosts <= {"127.0.0.1", "localhost", None, ""}  # None: data: and blob:
    assert wrong == []


def upload(page, path: Path) -> None:
    with page.expect_response(lambda response: "/upload" in response.url):
        page.locator("#picture input[type=file]").first.set_input_files(path)
    page.locator("#picture img").wait_for(state="attached")


def choose(page, files: list[Path]) -> None:
    """Several pictures."""
    page.get_by_role("tab", name="Pictures", exact=True).click()
    page.locator("#files input[type=file]").set_input_files(files)
    expect(page.get_by_role("textbox", name=files[-1].name, exact=True)).to_be_visible(timeout=SLOW)


@pytest.fixture
def says_html(monkeypatch):
    from vlm_lora import Captioner

    stream = Captioner.stream
    monkeypatch.setattr(Captioner, "stream", lambda *given, **more: (f"{HTML} {t}" for t in stream(*given, **more)))


def said(page, label: str):
    return page.get_by_role("tabpanel").get_by_label(label, exact=True).first


def caption_it(page) -> None:
    page.get_by_role("button", name="Caption or answer").click()


@pytest.fixture
def says_slowly(monkeypatch):
    from vlm_lora import Captioner

    def stream(*given, **more):
        for text in whole(*given, **more):
            yield text
            time.sleep(0.2)

    whole = Captioner.stream
    monkeypatch.setattr(Captioner, "stream", stream)


def test_upload_and_caption_by_base_and_tuned(open_page, pictures, says_slowly):
    page = open_page()
    grown = page.evaluate(
        """() => { window.grown = new Set(); const box = document.querySelector('textarea[aria-label=Base]');
        setInterval(() => window.grown.add(box.value), 2); return box !== null; }"""
    )
    assert grown
    upload(page, pictures[0])
    caption_it(page)
    expect(said(page, "Base")).to_have_value(re.compile(r"\.$"), timeout=SLOW)
    base, tuned = said(page, "Base").input_value(), said(page, "Tuned").input_value()
    assert base != tuned
    assert tuned == "Emoji."
    assert len(page.evaluate("[...window.grown]")) > 2  # it came word by word
    page.get_by_role("textbox", name="Question").fill("Is there a cat?")
    caption_it(page)
    expect(said(page, "Base")).to_have_value(re.compile(r"^(Yes|No)\b.*\.$"), timeout=SLOW)


@pytest.fixture
def asked(monkeypatch):
    """What a model was asked that answers with the question and a number, ten times a second: "Long" for a minute."""
    from vlm_lora import Captioner

    requests = []

    def stream(self, image, request=None, **_):
        requests.append(request)
        steps = 600 if request == "Long" else 15
        for i in range(steps):
            time.sleep(0.1)
            yield f"{request} {i}" + "." * (i == steps - 1)

    monkeypatch.setattr(Captioner, "stream", stream)
    return requests


@BUSY
def test_a_new_question_ends_the_answer_before(open_page, pictures, asked, busy):
    page = open_page()
    page.evaluate(busy)
    upload(page, pictures[0])
    question = page.get_by_role("textbox", name="Question")
    question.fill("Long")
    question.press("Enter")
    expect(said(page, "Tuned")).to_have_value(re.compile("^Long "), timeout=SLOW)
    question.fill("Q")
    question.press("Enter")  # and twice more, as people do
    caption_it(page)
    caption_it(page)
    for i in range(4):  # each new question comes right after the last word
        expect(said(page, "Base")).to_have_value("Q" * (i + 1) + " 14.", timeout=SLOW)
        assert said(page, "Tuned").input_value() == "Q" * (i + 1) + " 14."
        question.fill("Q" * (i + 2))
        question.press("Enter")
    assert asked.count("Long") == 1


def test_who_waits_sees_what_comes_first(open_page, pictures, asked, monkeypatch):
    """Also of another tab: all share a model."""
    from vlm_lora import Caption, Captioner

    def caption(self, images, prompt=None, **_):
        for image in images:
            time.sleep(3)
            yield Caption(image.name, f"{prompt} {image.name}")

    monkeypatch.setattr(Captioner, "caption", caption)
    several, single = open_page(), open_page()
    choose(several, pictures[:2])
    upload(single, pictures[1])
    single.get_by_role("textbox", name="Question").first.fill("Long")
    several.get_by_role("textbox", name="Question").locator("visible=true").fill("Say")
    several.get_by_role("button", name="Caption those without one").click()
    expect(several.locator("#captioned .big")).to_have_text("0 of 2", timeout=SLOW)
    caption_it(single)
    expect(single.get_by_text("1 request comes first").first).to_be_visible(timeout=SLOW)
    expect(said(single, "Tuned")).to_have_value(re.compile("^Long"), timeout=SLOW)  # between two pictures
    expect(several.locator("#captioned")).to_contain_text("1 come first", timeout=SLOW)
    single.get_by_role("button", name="Stop").first.click()
    expect(several.locator("#captioned .big")).to_have_text("2 of 2", timeout=SLOW)
    for path in pictures[:2]:
        expect(several.get_by_role("textbox", name=path.name, exact=True)).to_have_value(
            f"Say {path.name}", timeout=SLOW
        )


def no_longer_grows(page) -> bool:
    """Whether the answer of the tuned model stays what it is for a second, within half a minute."""
    for _ in range(30):
        before = said(page, "Tuned").input_value()
        page.wait_for_timeout(1000)
        if said(page, "Tuned").input_value() == before:
            return True
    return False


@BUSY
def test_stop_ends_all_that_was_asked(open_page, pictures, asked, busy):
    """Also where a busy page sends a request long after it was asked for one."""
    page = open_page()
    page.evaluate(busy)
    upload(page, pictures[0])
    question, stop = page.get_by_role("textbox", name="Question"), page.get_by_role("button", name="Stop").first
    for wait in (0, 100, 1000):
        question.fill("Long")
        caption_it(page)
        expect(said(page, "Tuned")).to_have_value(re.compile("Long"), timeout=SLOW)
        caption_it(page)
        page.wait_for_timeout(wait)
        stop.click()
        assert no_longer_grows(page)
    asked.clear()
    question.fill("Short")
    caption_it(page)
    expect(said(page, "Base")).to_have_value("Short 14.", timeout=SLOW)
    assert asked == ["Short", "Short"]


@pytest.mark.parametrize("change", ["example", "remove"])
def test_an_old_answer_does_not_come_back_beside_another_picture(open_page, pictures, asked, change):
    page = open_page()
    remove = page.locator("#picture").get_by_role("button", name=re.compile("Clear|Remove", re.IGNORECASE)).first
    for wait in (0, 130, 270):
        upload(page, pictures[0])
        page.get_by_role("textbox", name="Question").fill("Long")
        caption_it(page)
        expect(said(page, "Tuned")).to_have_value(re.compile("."), timeout=SLOW)
        page.wait_for_timeout(wait)
        if change == "example":
            page.locator("#examples .thumbnail-item").nth(1).click()
        else:
            remove.click()
        expect(said(page, "Tuned")).to_have_value("", timeout=SLOW)
        assert no_longer_grows(page)
        assert said(page, "Tuned").input_value() == ""
        if change == "example":
            remove.click()


def test_what_a_model_says_is_text(open_page, pictures, says_html):
    page = open_page()
    upload(page, pictures[0])
    caption_it(page)
    expect(said(page, "Base")).to_have_value(re.compile(r"\.$"), timeout=SLOW)
    assert said(page, "Tuned").input_value() == f"{HTML} Emoji."


def test_an_example_comes_with_what_the_data_says(open_page):
    page = open_page()
    examples = page.locator("#examples .thumbnail-item")
    assert re.match(r"Example: <img .* Scene\.", examples.first.get_attribute("aria-label"))
    examples.first.click()
    expect(said(page, "What the data says")).to_have_value(re.compile(r"^<img .*Scene"), timeout=SLOW)
    expect(page.locator("#picture img")).to_be_visible()


def test_stop_ends_an_answer(open_page, app, pictures, monkeypatch):
    from vlm_lora import Captioner

    stream, ended = Captioner.stream, []

    def slow(self, *given, **more):
        try:
            for i in range(400):
                for text in stream(self, *given, **more):
                    time.sleep(0.05)
                    yield f"{i} {text}"
        finally:
            ended.append(True)

    monkeypatch.setattr(Captioner, "stream", slow)
    page, other = open_page(), open_page()
    for each in (page, other):  # two people at once
        upload(each, pictures[1])
    caption_it(page)
    expect(said(page, "Tuned")).to_have_value(re.compile("."), timeout=SLOW)
    caption_it(other)
    expect(other.get_by_text("1 request comes first").first).to_be_visible(timeout=SLOW)
    page.get_by_role("button", name="Stop").first.click()
    expect(said(other, "Tuned")).to_have_value(re.compile("."), timeout=SLOW)  # it is the other's turn
    left = said(page, "Tuned").input_value()
    other.get_by_role("button", name="Stop").first.click()
    limit = time.monotonic() + 20
    while len(ended) < 2 and time.monotonic() < limit:
        page.wait_for_timeout(100)
    assert len(ended) == 2
    assert said(page, "Tuned").input_value() == left


def test_bad_pictures_are_told_plainly_and_too_large_ones_refused(open_page, tmp_path, pictures):
    page = open_page()
    toast = page.get_by_test_id("toast-body")
    cut = tmp_path / "cut.png"
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(noise, "PNG")
    cut.write_bytes(noise.getvalue()[:2000])
    upload(page, cut)
    page.get_by_role("textbox", name="Question").press("Enter")
    expect(toast.first).to_contain_text("'cut.png' is damaged or cut off", timeout=SLOW)
    assert "/" not in toast.first.inner_text()
    page.reload()
    page.locator("#examples .thumbnail-item").first.wait_for()
    large = tmp_path / "large.png"
    large.write_bytes(pictures[0].read_bytes() + bytes(21_000_000))
    page.locator("#picture input[type=file]").first.set_input_files(large)
    expect(toast.first).to_contain_text(re.compile("maximum", re.IGNORECASE), timeout=SLOW)
    assert all("413" in told for told in page.wrong), page.wrong  # the browser itself notes a refused upload
    page.wrong.clear()


def test_a_folder_becomes_training_data(open_page, pictures, tmp_path):
    """Captioned, corrected, undone, and taken away; what is typed stays when the page is opened again."""
    page = open_page()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    choose(page, [*pictures, bad])
    page.get_by_role("button", name="Caption those without one").click()
    told = page.locator("#captioned")
    expect(told).to_contain_text("4 of 4", timeout=SLOW)
    expect(told).to_contain_text("1 without one: bad.png: 'bad.png' is not an image")
    first, second = (page.get_by_role("textbox", name=path.name, exact=True) for path in pictures[:2])
    expect(first).to_have_value("Emoji.", timeout=SLOW)
    first.fill(f"{HTML} corrected.")
    expect(page.get_by_text(f"Saved: {pictures[0].name}")).to_be_visible(timeout=SLOW)
    second.fill("A mistake.")
    expect(page.get_by_text(f"Saved: {pictures[1].name}")).to_be_visible(timeout=SLOW)
    page.get_by_role("button", name="Undo").locator("visible=true").click()
    expect(second).to_have_value("Emoji.", timeout=SLOW)
    page.get_by_label("Without caption").locator("visible=true").click()
    expect(first).to_have_count(0, timeout=SLOW)
    expect(page.get_by_role("textbox", name="bad.png", exact=True)).to_be_visible()
    page.get_by_role("button", name="Take away").click()
    with page.expect_download() as started:
        page.locator("#download a").first.click()
    zipfile.ZipFile(started.value.path()).extractall(tmp_path / "data")
    data = read_dataset(tmp_path / "data", prompt="Describe.")
    assert (data.format, len(data.examples)) == ("sidecar", 3)
    assert [bad.source for bad in data.bad] == ["bad.png"]
    texts = [example.dialogues[0].turns[0].assistant for example in data.examples]
    assert sorted(texts) == [f"{HTML} corrected.", "Emoji.", "Emoji."]


def test_what_cannot_be_done_is_told(open_page):
    """Gradio (6.31) shows no error of an event that passes over its queue."""
    page = open_page()
    page.get_by_role("tab", name="Pictures", exact=True).click()
    folder, toast = (
        page.get_by_label("A folder of this machine").locator("visible=true"),
        page.get_by_test_id("toast-body"),
    )
    folder.click()
    page.get_by_role("option", name="photos").click()
    expect(page.get_by_role("textbox", name="0.png", exact=True)).to_have_value("Emoji.", timeout=SLOW)
    for button, told in (
        ("Undo", "There is nothing to undo."),
        ("Caption those without", "There is no picture without a caption."),
    ):
        page.get_by_role("button", name=button).locator("visible=true").click()
        expect(toast.get_by_text(told)).to_be_visible(timeout=SLOW)
    folder.fill(HTML)
    folder.press("Enter")
    expect(toast.get_by_text(f"'{HTML}' is no folder")).to_be_visible(timeout=SLOW)


def test_what_changed_by_keyboard_alone(open_page):
    page = open_page()
    tab = page.get_by_role("tab", name="What changed")
    for _ in range(20):
        page.keyboard.press("Tab")
        if tab.evaluate("tab => tab === document.activeElement"):
            break
        if page.get_by_role("tab", name="Picture", exact=True).evaluate("tab => tab === document.activeElement"):
            page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    card, place = page.locator("#answer"), page.locator(".steps").get_by_text("of 4")
    expect(place).to_contain_text("1 of 4", timeout=SLOW)
    expect(page.locator(".figure b")).to_be_visible()
    first = card.locator("dd").first.inner_text()
    assert first.startswith(HTML)
    assert card.locator("mark").first.inner_text() == "Emoji."
    seen = {card.locator("img").get_attribute("alt")}
    page.locator("body").evaluate("() => document.activeElement.blur()")
    for i in (2, 3, 4, 1):
        page.keyboard.press("ArrowRight")
        expect(place).to_contain_text(f"{i} of 4", timeout=SLOW)
        seen.add(card.locator("img").get_attribute("alt"))
    assert len(seen) == 4
    page.keyboard.press("ArrowLeft")
    expect(place).to_contain_text("4 of 4", timeout=SLOW)
    expect(page.get_by_role("tabpanel").locator("svg", has_text="held out").first).to_be_visible(timeout=SLOW)


def test_doubtful_captions_are_seen_beside_their_pictures(open_page):
    page = open_page()
    page.get_by_role("tab", name="Pictures", exact=True).click()
    folder = page.get_by_label("A folder of this machine").locator("visible=true")
    folder.click()
    page.get_by_role("option", name="photos").click()
    expect(page.get_by_role("textbox", name="0.png", exact=True)).to_have_value("Emoji.", timeout=SLOW)
    page.get_by_label("Worst by review").locator("visible=true").click()
    notes = page.locator(".album").locator("visible=true").get_by_text("a token for")
    expect(notes).to_have_count(8, timeout=SLOW)
    scores = [float(note.split()[0]) for note in notes.all_inner_texts()]
    assert scores == sorted(scores)
    assert HTML in notes.first.inner_text()


def test_a_caption_by_keyboard_alone(open_page):
    page = open_page()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('thumbnail-item')"):
            break
    page.keyboard.press("Enter")
    expect(said(page, "What the data says")).to_have_value(re.compile("Scene"), timeout=SLOW)
    for _ in range(40):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.innerText") == "Caption or answer":
            break
    page.keyboard.press("Enter")
    expect(said(page, "Base")).to_have_value(re.compile(r"\.$"), timeout=SLOW)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_up_and_down_only(open_page, scheme):
    page = open_page(viewport={"width": 320, "height": 640}, color_scheme=scheme)
    assert page.locator("body").evaluate("body => body.classList.contains('dark')") == (scheme == "dark")
    for name in ("Train", "Picture", "Pictures", "What changed"):
        page.get_by_role("tab", name=name, exact=True).click()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, name
        for folded in page.get_by_role("button", name="Advanced").locator("visible=true").all():
            folded.click()
            page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, name


def test_another_run_is_chosen(open_page, pictures):
    page = open_page()
    upload(page, pictures[0])
    page.get_by_label("Adapter").click()
    page.get_by_role("option", name="other").click()
    caption_it(page)
    expect(said(page, "Base")).to_have_value(re.compile(r"\.$"), timeout=SLOW)
    assert said(page, "Tuned").input_value() == "Emoji."


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for source in sorted((ROOT / "data/emoji_scenes/images").glob("*"))[:16]:
        shutil.copy(source, folder)
        (folder / f"{source.stem}.txt").write_text("Emoji.")
    return folder


@pytest.fixture
def empty(browser, photos, tmp_path, monkeypatch):
    """A demo without any run, in a folder of its own; ``open(width)`` opens it."""
    monkeypatch.setenv("VLM_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    app, wrong = launch("tiny", None, port=None, block=False, roots=[photos]), []

    def open_page(width: int):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(SLOW)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(app.local_url)
        return page

    yield open_page
    app.close(verbose=False)
    assert wrong == []


@pytest.mark.long
def test_from_an_empty_page_to_a_tuned_adapter(empty, photos, tmp_path):
    """By mouse: pictures are dropped, a caption is corrected, the run is stopped, resumed from another page, killed and
    resumed again."""
    page = empty(1280)
    expect(page.get_by_text("Nothing has been trained here yet.")).to_be_visible(timeout=SLOW)
    page.locator("#data input[type=file]").set_input_files(sorted(photos.iterdir()))
    expect(page.get_by_text("16 pictures, 16 captions.")).to_be_visible(timeout=SLOW)
    first = sorted(photos.glob("*.png"))[0].name
    page.get_by_role("textbox", name=first, exact=True).fill("A corrected one.")
    expect(page.get_by_text(f"Saved: {first}")).to_be_visible(timeout=SLOW)
    page.get_by_label("Times through the pictures").first.fill("60")
    page.get_by_label("Learning rate").fill("0.005")
    page.get_by_label("Learning rate").press("Tab")
    page.get_by_role("button", name="What will it cost?").click()
    expect(page.get_by_text("It fits.")).to_be_visible(timeout=SLOW)
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.locator(".run.learning .big", has_text="Step")).to_be_visible(timeout=SLOW)
    page.get_by_role("button", name="Stop").locator("visible=true").click()
    expect(page.locator(".run.stopped")).to_be_visible(timeout=SLOW)
    other = empty(390)
    other.get_by_role("button", name="Resume").click()
    expect(other.locator(".run.learning .big", has_text="Step")).to_be_visible(timeout=SLOW)
    expect(page.locator(".run.learning .big", has_text="Step")).to_be_visible(timeout=SLOW)  # who had it open sees it
    other.close()
    (record,) = (tmp_path / "runs").glob("*.train.json")
    os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
    expect(page.locator(".run.stopped")).to_be_visible(timeout=SLOW)
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".run.done")).to_be_visible(timeout=SLOW)
    assert page.locator("#learning svg").count()
    run = next((tmp_path / "runs").glob("*/report.html")).parent
    expect(page.get_by_label("Adapter", exact=True)).to_have_value(run.name)
    texts = [path.read_text().strip() for path in (tmp_path / "runs/uploads").glob("*/*.txt")]
    assert sorted(texts) == ["A corrected one.", *["Emoji."] * 15]
    page.get_by_role("tab", name="Picture", exact=True).click()
    upload(page, next(each for each in photos.iterdir() if each.suffix != ".txt"))
    caption_it(page)
    expect(said(page, "Tuned")).to_have_value(re.compile("Emoji|corrected"), timeout=SLOW)
    page.get_by_role("tab", name="What changed").click()
    expect(page.locator("#answer img")).to_be_visible(timeout=SLOW)


def reach(page, what) -> None:
    """Press Tab until it has the focus."""
    passed = []
    for _ in range(120):
        if what.count() and what.first.evaluate("it => it === document.activeElement"):
            return
        page.keyboard.press("Tab")
        passed.append(page.evaluate("document.activeElement.outerHTML.slice(0, 80)"))
    raise AssertionError(f"{what} is not reached by Tab, but {passed}")


@pytest.mark.long
def test_from_a_folder_to_its_captions_by_keyboard_alone(empty, photos, tmp_path):
    """On a phone's width: a folder is trained on, and what has no caption there gets one."""
    page = empty(390)
    folder = page.get_by_label("A folder of this machine").locator("visible=true")
    expect(folder).to_be_visible(timeout=SLOW)
    reach(page, folder)
    page.keyboard.type("photos")
    page.keyboard.press("Enter")
    expect(page.get_by_text("16 pictures, 16 captions.")).to_be_visible(timeout=SLOW)
    reach(page, page.get_by_label("Times through the pictures").first)
    page.keyboard.press("Control+a")
    page.keyboard.type("40")
    reach(page, page.get_by_label("Learning rate"))
    page.keyboard.press("Control+a")
    page.keyboard.type("0.005")
    reach(page, page.get_by_role("button", name="Train", exact=True))
    page.keyboard.press("Enter")
    expect(page.locator(".run.done")).to_be_visible(timeout=SLOW)
    new = [photos / f"{i}.png" for i in range(2)]
    for path, source in zip(new, sorted((ROOT / "data/emoji_scenes/more").glob("*.png")), strict=False):
        shutil.copy(source, path)
    page.evaluate("scrollTo(0, 0); document.activeElement.blur()")
    reach(page, page.get_by_role("tab", name="Pictures", exact=True))
    page.keyboard.press("Enter")
    reach(page, page.get_by_label("A folder of this machine").locator("visible=true"))
    page.keyboard.type("photos")
    page.keyboard.press("Enter")
    expect(page.get_by_text("2 without a caption.").locator("visible=true")).to_be_visible(timeout=SLOW)
    reach(page, page.get_by_role("button", name="Caption those without one"))
    page.keyboard.press("Enter")
    expect(page.locator("#captioned")).to_contain_text("2 of 2", timeout=SLOW)
    assert [path.with_suffix(".txt").read_text() for path in new] == ["Emoji.\n"] * 2
    box = page.get_by_role("textbox", name="0.png", exact=True).locator("visible=true")
    expect(box).to_have_value("Emoji.", timeout=SLOW)
    reach(page, box)
    page.keyboard.press("Control+a")
    page.keyboard.type("By hand.")
    expect(page.get_by_text("Saved: 0.png")).to_be_visible(timeout=SLOW)
    assert new[0].with_suffix(".txt").read_text() == "By hand.\n"
