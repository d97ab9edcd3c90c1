"""Captions of a whole folder: read and written where the command has them, changed at once, undone to the byte."""

import asyncio
import json
import time
from contextlib import ExitStack
from types import SimpleNamespace

import gradio as gr
import pytest

from tests.conftest import picture
from tests.test_demo import Parrot, loaded, write_review, write_run
from vlm_lora import Caption, Decoding
from vlm_lora.cli import main
from vlm_lora.demo import captions, folders
from vlm_lora.demo.captions import ALL, DOUBTFUL, LONGEST, ROWS, WITHOUT, WholeFolder
from vlm_lora.demo.folders import Album, Roots
from vlm_lora.demo.runs import Evaluations, Pictures
from vlm_lora.demo.speaker import Speaker
from vlm_lora.demo.tabs import Desk
from vlm_lora.errors import ConfigError, DataError
from vlm_lora.inference import sinks
from vlm_lora.inference.sinks import made_with

PAGE = SimpleNamespace(session_hash="a page")
NUMBERS = (64, 0.0, 1.0, 0)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "in").mkdir(parents=True)
    for i, name in enumerate(("0.png", "1.png", "2.png", "in/3.png")):
        picture(i, (32, 32)).save(folder / name)
    (folder / "0.txt").write_bytes(b"Zero,\r\nin two lines.\r\n")
    (folder / "1.caption").write_text("One")
    return folder


def test_what_is_typed_is_saved_and_can_be_undone_to_the_byte(photos):
    album, before = Album(photos, rows=False), (photos / "0.txt").read_bytes()
    assert list(album.captions(album.pictures).values()) == ["Zero,\r\nin two lines.", "One", "", ""]
    for name, file in (("0.png", "0.txt"), ("1.png", "1.caption"), ("in/3.png", "in/3.txt")):
        held = (photos / file).read_bytes() if (photos / file).exists() else None
        for text in ("Another “one”. ", ""):
            was, now = album.save(name, text)
            assert album.captions([name]) == {name: text.strip()}
            assert (photos / file).exists() == bool(text)
            assert album.change(name, lambda _, was=was: was) == (now, was)
            assert ((photos / file).read_bytes() if (photos / file).exists() else None) == held
    assert (photos / "0.txt").read_bytes() == before


def test_rows_keep_what_else_they_say(photos):
    lines = [
        {"file_name": "1.png", "text": "One", "split": "val"}, {"file_name": "1.png", "text": "Uno"},
        {"file_name": "gone.png", "text": "Gone"}, {"file_name": "2.png", "question": "What?", "answer": "A cat."},
    ]  # fmt: skip
    file = photos / "metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]) + json.dumps(lines[-1]))
    album = Album(photos, rows=True)
    album.save("1.png", "Eins")
    was, _ = album.save("0.png", "Zéro")
    assert was is None
    new = [json.loads(line) for line in file.read_text().splitlines()]
    assert new == [lines[0] | {"text": "Eins"}, *lines[1:], {"file_name": "0.png", "text": "Zéro"}]
    assert "Zéro" in file.read_text()
    assert album.save("0.png", "")[1] is None
    assert [json.loads(line) for line in file.read_text().splitlines()] == [lines[0] | {"text": "Eins"}, *lines[1:]]
    (photos / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ConfigError, match=r"metadata\.csv lies beside it"):
        Album(photos, rows=True)


def test_no_link_leads_out_of_the_folder(photos, tmp_path):
    """Neither a picture, nor a caption that is read or written."""
    (tmp_path / "secret.txt").write_text("secret")
    picture(7, (32, 32)).save(tmp_path / "secret.png")
    (photos / "4.png").symlink_to(tmp_path / "secret.png")
    (photos / "out").symlink_to(tmp_path)
    (photos / "2.txt").symlink_to(tmp_path / "secret.txt")
    album = Album(photos, rows=False)
    assert list(album.pictures) == ["0.png", "1.png", "2.png", "in/3.png"]
    assert album.captions(["2.png"]) == {"2.png": None}
    with pytest.raises(DataError, match="leads out of the folder"):
        album.save("2.png", "mine")
    assert album.write({"2.png": Caption("2.png", "mine")}, {}) == []
    (photos / "metadata.jsonl").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DataError, match="leads out of the folder"):
        Album(photos, rows=True)
    assert (tmp_path / "secret.txt").read_text() == "secret"


def test_what_is_no_text_is_neither_shown_nor_replaced(photos):
    (photos / "2.txt").write_bytes(b"caf\xe9")
    album = Album(photos, rows=False)
    assert album.captions(["2.png"]) == {"2.png": None}
    assert album.write({"2.png": Caption("2.png", "mine")}, {}) == []
    assert (photos / "2.txt").read_bytes() == b"caf\xe9"


@pytest.mark.parametrize("rows", [False, True])
def test_the_command_resumes_what_the_page_began(photos, tmp_path, rows, capsys):
    run = write_run(tmp_path / "runs")
    if rows:
        (photos / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "Zero"}\n')
    album, how = Album(photos, rows), made_with(Decoding(), [str(run)])
    captions = {name: Caption(name, f"of {name}") for name in ("0.png", "2.png")}
    assert album.write(captions | {"1.png": Caption("1.png", error="is damaged")}, how) == ["1.png: is damaged"]
    assert album.captions(["0.png", "2.png"])["2.png"] == "of 2.png"
    assert album.captions(["0.png"])["0.png"].startswith("Zero")  # what was there stays
    flags = ["caption", str(photos), "--recursive", "--format", "metadata" if rows else "sidecar", "--dry-run"]
    assert main([*flags, "--adapter", str(run)]) == 0
    left = [str(photos / name) for name in (("1.png", "in/3.png") if rows else ("in/3.png",))]
    assert capsys.readouterr().out.splitlines() == left
    if rows:
        assert main([*flags, "--adapter", "other"]) == 2
        assert "captions were made with --adapter" in capsys.readouterr().err


def test_what_is_not_a_caption_of_ours_stays_to_the_byte(photos):
    """Blank lines, ends of lines, and a last line without one."""
    file, one = photos / "metadata.jsonl", '{"file_name": "1.png", "text": "One"}'
    for before in (f'\n{one}\r\n\n  \n{{"file_name": "gone.png"}}\n\n', f"\n\n{one}", f"{one}\n"):
        file.write_bytes(before.encode())
        album = Album(photos, rows=True)
        was, _ = album.save("1.png", "Uno")
        assert file.read_bytes() == before.replace("One", "Uno").encode()
        album.change("1.png", lambda _, was=was: was)
        assert file.read_bytes() == before.encode()
        album.save("2.png", "Two")
        ended = before if before.endswith("\n") else before + "\n"
        assert file.read_bytes() == (ended + '{"file_name": "2.png", "text": "Two"}\n').encode()
        album.save("2.png", "")
        assert file.read_bytes() == ended.encode()


class Captions(Parrot):
    """Says which picture it is, and of one that it is damaged."""

    backbone = SimpleNamespace(name="tiny")
    slow = 0.0

    def caption(self, images, prompt=None, *, decoding=None):
        for image in images:
            time.sleep(self.slow)
            self.asked.append(image.name)
            bad = image.name == "2.png"
            yield Caption(image.name, error="is damaged") if bad else Caption(image.name, f"{prompt} {image.name}")


@pytest.fixture
def tab(photos, tmp_path):
    runs = {"run": write_run(tmp_path / "runs")}
    with gr.Blocks() as app:
        adapter = gr.Dropdown(["run"])
        desk = Desk(
            Speaker(loaded(Captions()), runs, ""),
            Evaluations(runs),
            Pictures(tmp_path),
            adapter,
            ExitStack(),
        )
        return WholeFolder(app, desk, Roots([photos], tmp_path / "uploads"))


def shown(tab, values: list, first: int = 6) -> dict:
    """What an answer puts on the page."""
    values = values[first:]
    where = json.loads(values[3])
    texts = values[-len(tab.sheet.texts) :][: len(where["names"])]
    return {"where": values[3], "texts": {t.label: t.value for t in texts}, "notes": [t.info for t in texts]}


def test_a_folder_is_captioned_stopped_and_resumed(tab, photos):
    async def visit():
        page = shown(tab, tab.open("photos", PAGE))
        assert page["texts"] == {"0.png": "Zero,\r\nin two lines.", "1.png": "One", "2.png": "", "in/3.png": ""}
        where = page["where"]
        with pytest.raises(ConfigError, match="expected a whole number"):
            await tab.begin(where, "", "", None, 0.0, 1.0, 0)
        captioner = tab.desk.speaker.first.result()
        captioner.slow = 0.2
        await tab.begin(where, "Say", "", *NUMBERS)
        with pytest.raises(ConfigError, match="is being captioned already"):
            await tab.begin(where, "Say", "", *NUMBERS)
        await tab.stop(where)
        (job,) = tab.jobs.values()
        await asyncio.wait_for(job.task, 20)
        assert not (photos / "in/3.txt").exists()
        tab.sheet.roots.album("photos", False).save("in/3.png", "Typed meanwhile.")
        await tab.begin(where, "Say", "", *NUMBERS)
        (job,) = tab.jobs.values()
        told, timer, *texts = tab.tick(where, *[""] * 12)
        assert timer.active
        await asyncio.wait_for(job.task, 20)
        told, timer, *texts = tab.tick(where, "mine", *[""] * 11)
        assert not timer.active
        assert "2.png: is damaged" in told
        assert texts[:1] == [gr.skip()]  # of one that somebody types
        assert texts[3] == "Typed meanwhile."
        with pytest.raises(DataError, match="is no folder that the demo may read"):
            await tab.begin(json.dumps({"folder": "photos/../..", "rows": False}), "", "", *NUMBERS)

    asyncio.run(visit())


def test_pages_orders_and_undo(tab, photos, monkeypatch):
    for i in range(10, 24):
        picture(i, (32, 32)).save(photos / f"{i}.png")
    page = shown(tab, tab.open("photos", PAGE, ROWS))
    assert list(page["texts"]) == ["0.png", "1.png", *(f"{i}.png" for i in range(10, 20))]
    where = page["where"]

    def turned(order: str, adapter: str = "") -> dict:
        return shown(tab, tab.sheet.turn(where, PAGE, order, adapter), 0)

    def typed(where: str, number: int, text: str, at: float) -> None:
        asyncio.run(tab.sheet.save(card(where, number, at), text, PAGE))

    monkeypatch.setattr(captions, "PAUSE", 0.01)

    without = turned(WITHOUT)
    typed(without["where"], 0, "Ze", 1.0)
    typed(without["where"], 0, "Zero", 3.0)
    typed(without["where"], 0, "Zer", 2.0)  # a key that arrives late
    typed(without["where"], 1, "One, which is longer", 4.0)
    following = shown(tab, tab.sheet.turn(json.dumps(json.loads(without["where"]) | {"page": 1}), PAGE), 0)
    assert next(iter(following["texts"])) == "2.png"  # none is passed over, though there are fewer now
    assert next(iter(turned(WITHOUT)["texts"])) == "10.png"
    assert list(turned(LONGEST)["texts"].values())[:3] == ["One, which is longer", "Zero", ""]
    assert (photos / "metadata.jsonl").read_text().count("\n") == 2
    for left in (1, 0):
        tab.sheet.undo(where, PAGE)
        assert (photos / "metadata.jsonl").read_text().count("\n") == left
    with pytest.raises(ConfigError, match="nothing to undo"):
        tab.sheet.undo(where, PAGE)
    typed(where, 0, "Mine", 9.0)
    Album(photos, rows=True).save("0.png", "Somebody else's")
    with pytest.raises(ConfigError, match="has another caption since"):
        tab.sheet.undo(where, PAGE)
    assert turned(ALL)["texts"]["0.png"] == "Somebody else's"


def card(where: str, number: int, at: float) -> str:
    """What the page says of the card in which somebody types."""
    return json.dumps(json.loads(where) | {"card": number, "at": at})


def test_what_is_typed_is_written_once_there_is_a_pause_and_keeps_nobody_waiting(tab, photos, monkeypatch):
    """Also where the page, or the demo, is closed before the pause is over."""
    written, file = [], photos / "2.txt"

    def slowly(file, text):
        time.sleep(1)
        written.append(text)
        sinks.replace_text(file, text)

    monkeypatch.setattr(folders, "replace_text", slowly)
    monkeypatch.setattr(captions, "PAUSE", 0.2)
    where = shown(tab, tab.open("photos", PAGE))["where"]

    async def visit():
        keys = [asyncio.ensure_future(tab.sheet.save(card(where, 2, i), "Two"[:i], PAGE)) for i in (1, 2, 3)]
        await asyncio.sleep(0.05)
        # A browser sends six requests at a time: none is to wait for its pause when another key comes
        assert [key.done() for key in keys] == [True, True, False]
        longest = 0.0
        while not all(key.done() for key in keys):
            began = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - began)
        assert longest < 0.9  # the loop serves everybody
        assert written == ["Two\n"]
        assert [key.result() for key in keys] == [gr.skip(), gr.skip(), "<p>Saved: 2.png</p>"]
        closed = asyncio.ensure_future(tab.sheet.save(card(where, 2, 4.0), "Page closed", PAGE))
        await asyncio.sleep(0)
        closed.cancel()
        while len(written) < 2:
            await asyncio.sleep(0.01)
        last = asyncio.ensure_future(tab.sheet.save(card(where, 2, 5.0), "Demo closed", PAGE))
        await asyncio.sleep(0)
        tab.desk.at_close.close()
        assert file.read_text() == "Demo closed\n"
        await last

    asyncio.run(asyncio.wait_for(visit(), 60))
    assert written == ["Two\n", "Page closed\n", "Demo closed\n"]
    tab.sheet.undo(where, PAGE)  # one change, however it was typed
    assert not file.exists()


def test_a_picture_that_goes_away_stops_nothing(tab, photos):
    """Another page looks anew, while this one turns pages and captions."""
    for i in range(10, 24):
        picture(i, (32, 32)).save(photos / f"{i}.png")

    async def visit():
        where = shown(tab, tab.open("photos", PAGE))["where"]
        tab.desk.speaker.first.result().slow = 0.1
        await tab.begin(where, "Say", "", *NUMBERS)
        for name in ("in/3.png", "23.png"):
            (photos / name).unlink()
        tab.open("photos", SimpleNamespace(session_hash="another page"))
        page = shown(tab, tab.sheet.turn(json.dumps(json.loads(where) | {"page": 1}), PAGE), 0)
        assert list(page["texts"])[-1] == "in/3.png"
        with pytest.raises(DataError, match="the picture is no longer in the folder"):
            tab.sheet.roots.album("photos", False).save("in/3.png", "mine")
        (job,) = tab.jobs.values()
        await asyncio.wait_for(job.task, 20)
        assert job.done == len(job.images)
        assert sorted(told.partition(":")[0] for told in job.wrong) == ["2.png", "23.png", "in/3.png"]

    asyncio.run(visit())
    assert (photos / "22.txt").read_text() == "Say 22.png\n"
    assert not (photos / "23.txt").exists()


def test_a_folder_without_pictures_is_not_praised(tab, photos):
    (photos / "none").mkdir()
    told = tab.open("photos/none", PAGE)
    (head,) = (part for part in told if isinstance(part, str) and "pictures." in part)
    assert head.startswith("<p><b>0 pictures.</b>  What you type")
    with pytest.raises(ConfigError, match="no picture without a caption"):
        asyncio.run(tab.begin(shown(tab, told)["where"], "", "", *NUMBERS))


def test_what_cannot_be_saved_is_told_beside_the_pictures(tab, photos, monkeypatch):
    monkeypatch.setattr(captions, "PAUSE", 0.01)
    where = shown(tab, tab.open("photos", PAGE))["where"]
    (photos / "2.txt").mkdir()
    told = asyncio.run(tab.sheet.save(card(where, 2, 1.0), "<b>mine", PAGE))
    assert told == "<p>Not saved: 2.txt cannot be written (it is a folder or a device; expected a file)</p>"
    photos.rename(photos.with_name("gone"))
    told = asyncio.run(tab.sheet.save(card(where, 0, 2.0), "mine", PAGE))
    assert told.startswith("<p>Not saved: &#39;photos&#39; is no folder that the demo may read")


def test_the_worst_by_review_come_with_what_the_review_says(tab, tmp_path):
    tab.sheet.roots.folders["mine"] = (tmp_path / "runs/photos").resolve()
    where = shown(tab, tab.open("mine", PAGE))["where"]
    assert shown(tab, tab.sheet.turn(where, PAGE, DOUBTFUL, "run"), 0)["texts"] == {}
    write_review(tmp_path / "runs/run", {"0.png": 1.5, "1.png": -0.25, "gone.png": -3.0})
    page = shown(tab, tab.sheet.turn(where, PAGE, DOUBTFUL, "run"), 0)
    assert list(page["texts"]) == ["1.png", "0.png"]
    assert page["notes"][0].startswith("-0.25 a token for")
