"""What is kept of rows on disk is what reading gives, in every layout and after every change; else it is nothing.

Run: pytest tests/data/test_kept.py
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

import tests.data.test_formats as formats
import tests.data.test_layouts as layouts
from tests.conftest import ROOT
from tests.data.test_formats import PROMPT, lines
from tests.data.test_shards import samples, write_tar
from vlm_lora.cli import evaluate, main
from vlm_lora.config import TrainConfig
from vlm_lora.data import index, origin
from vlm_lora.data.index import index_folder
from vlm_lora.data.readers import kept, read_dataset, sources
from vlm_lora.errors import DataError
from vlm_lora.training.prepare import read_and_split

pytestmark = pytest.mark.usefixtures("old")


@pytest.fixture
def old(monkeypatch):
    """What a test has written counts as written long ago."""
    monkeypatch.setattr(kept, "FRESH_SECONDS", -3600)


def files() -> list[Path]:
    return list(index_folder().glob("*.rows"))


def read_rows(monkeypatch, *given, **options):
    """What is read through the index, and whether rows were read for it."""
    real, times = sources._read, []
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_read", lambda *given: times.append(1) or real(*given))
        return read_dataset(*given, keep=True, warn=pytest.fail, **options), bool(times)


def everything(dataset) -> tuple:
    """All of a data set, also what its equality leaves out."""
    sides = [list(map(repr, side)) for side in (dataset.examples, dataset.val, dataset.test)]
    return (sides, *map(repr, dataset.bad)), repr(dataset), dataset.taken_for, dataset.parts, dataset.fingerprint()


def mixed(folder):
    """Parts, missing images, a row of text alone, boxes, weights, several images, columns that nothing uses."""
    rows = [
        {"image": "a.png", "caption": "one", "split": "val", "mood": "good"},
        {"image": "sub/b.png", "caption": "two", "split": "test"},
        {"image": "late.png", "caption": "is not there yet"},
        {"image": "nowhere/late.png", "caption": "nor its folder"},
        {"image": "c", "caption": "without its ending"},
        {"query": "Where? <ref-object>", "response": "<bbox>", "images": ["c.png"],
         "objects": {"ref": ["x"], "bbox": [[1, 1, 5, 5]]}},
        {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes.", "weight": 0.5}]},
        {"images": ["c.png", "a.png"], "question": "Both <image>and<image>?", "answer": "no", "system": "Be kind."},
        {"image": "a.png", "caption": ""},
    ]  # fmt: skip
    (folder / "sub").mkdir()
    shutil.move(folder / "b.png", folder / "sub/b.png")
    (folder / "x.jsonl").write_text(lines(rows) + "{broken", "utf-8")
    return folder / "x.jsonl", "captions"


def parts_in_folders(folder):
    for part, name in (("train", "a"), ("val", "b"), ("test", "c")):
        (folder / part).mkdir()
        shutil.move(folder / f"{name}.png", folder / part)
        (folder / part / f"{name}.txt").write_text(f"a {name}")
    return folder, "sidecar"


def shards(folder):
    texts = [(name, text, ".txt") for name, text in formats.CAPTIONS]
    (folder / "shards").mkdir()
    write_tar(folder / "shards/train-0.tar", samples(folder, texts[:2]))
    write_tar(folder / "shards/train-1.tar", samples(folder, texts[2:]))
    return folder / "shards", "webdataset"


def tags(folder):
    for name in ("a", "b"):
        (folder / f"{name}.caption").write_text(f"a {name}")
    (folder / "a.txt").write_text("red, small")
    return folder, "sidecar"


OWN = [mixed, parts_in_folders, shards, tags, formats.vqav2]
NOT_KEPT = (layouts.save_to_disk, layouts.save_to_disk_in_parts, layouts.saved_class_labels)
ALL = [each for each in (*formats.CAPTION_LAYOUTS, *layouts.LAYOUTS, *OWN) if each not in NOT_KEPT]


def laid_out(layout, pictures):
    path, _ = layout(pictures("a.png", "b.png", "c.png", into="data"))
    return path, {"prompt": PROMPT + " {tags}" if layout is tags else PROMPT}


@pytest.mark.parametrize("layout", ALL, ids=lambda layout: layout.__name__)
def test_a_later_run_reads_no_row_and_gets_the_same(layout, pictures, monkeypatch):
    path, options = laid_out(layout, pictures)
    plain = read_dataset(path, **options)
    assert not index_folder().exists()
    first, read_first = read_rows(monkeypatch, path, **options)
    later, read_later = read_rows(monkeypatch, path, **options)
    assert (read_first, read_later) == (True, False)
    assert plain == first == later
    assert everything(plain) == everything(first) == everything(later)
    for example in later.examples:
        for image in example.images:
            assert image.read_bytes()
    other = {"prompt": "What is it?", "system": "Be kind."}
    assert read_rows(monkeypatch, path, **other)[1]
    assert everything(read_rows(monkeypatch, path, **other)[0]) == everything(read_dataset(path, **other))


def test_of_several_sources_all_is_kept(pictures, monkeypatch):
    one, other = pictures("a.png", "b.png", "c.png", into="one"), pictures("a.png", into="other")
    mixed(one)
    (other / "a.txt").write_text("another a")
    given = [f"{one}/x.jsonl:2", f"{other}:3"]
    plain = read_dataset(given, prompt=PROMPT)
    assert {example.weight for example in plain.examples} == {2, 3}
    read_rows(monkeypatch, given, prompt=PROMPT)
    later, read = read_rows(monkeypatch, given, prompt=PROMPT)
    assert not read
    assert everything(later) == everything(plain)


def outcome(*given, **options) -> object:
    try:
        return everything(read_dataset(*given, **options))
    except DataError as error:
        return str(error)


def changes(folder: Path, drawn: random.Random):
    """What people and programs do to data: name, and what does it."""
    inside = sorted(path for path in folder.rglob("*"))
    for path in (path for path in inside if path.is_file()):
        content, status = path.read_bytes(), path.stat()
        longer = content + (b"\n" if path.suffix != ".png" else b"x")
        middle = drawn.choice([i for i, byte in enumerate(content) if byte] or [0])  # a tar is mostly zeros
        edited = content[:middle] + b"7" + content[middle + 1 :]

        def edit_unseen(path=path, edited=edited, status=status):
            path.write_bytes(edited)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

        yield f"{path.name} longer", lambda path=path, longer=longer: path.write_bytes(longer)
        yield f"{path.name} of the same size and time", edit_unseen
        yield f"{path.name} deleted", path.unlink
    for place in (folder, *(path for path in inside if path.is_dir())):
        for name in ("late.png", "a.txt", "zz.jsonl", "train.tar"):
            source = next(path for path in inside if path.suffix in (".png", ".tar", ".parquet"))
            yield f"{place.name}/{name} added", lambda to=place / name, source=source: shutil.copy(source, to)

    def appears() -> None:
        (folder / "images").mkdir(exist_ok=True)
        shutil.copy(source, folder / "images/late.png")

    yield "a folder of images", appears
    yield "a folder of the missing", lambda: shutil.copytree(folder, folder / "nowhere")


LONG = [parts_in_folders, formats.vqav2, formats.coco, formats.captions_csv, formats.captions_parquet]
LONG += [formats.imagefolder_parquet, layouts.class_folders, layouts.twin_folders, layouts.kohya_metadata]
LONG += [layouts.flickr_tokens, layouts.names_without_ending]
CHANGED = [mixed, shards, tags, *(pytest.param(each, marks=pytest.mark.long) for each in LONG)]


@pytest.mark.parametrize("layout", CHANGED, ids=lambda layout: getattr(layout, "__name__", ""))
def test_after_any_change_it_is_as_if_nothing_had_been_kept(layout, pictures, monkeypatch):
    """In one with a file more, changed or gone, an index that is used gives what reading gives."""
    path, options = laid_out(layout, pictures)
    folder = path if path.is_dir() else path.parent
    before = outcome(path, **options)
    seen = []
    for name, _ in list(changes(folder, random.Random(0))):
        shutil.copytree(folder, folder.parent / "copy")
        time.sleep(0.02)  # or it would be the same moment for the disk's clock
        assert outcome(path, keep=True, **options) == before, name
        dict(changes(folder, random.Random(0)))[name]()
        plain = outcome(path, **options)
        seen.append(plain != before)
        assert outcome(path, keep=True, **options) == plain, name
        shutil.rmtree(folder)
        shutil.move(folder.parent / "copy", folder)
    assert any(seen)
    assert not all(seen)


def test_a_caption_of_the_same_size_and_time_is_read_again(pictures, monkeypatch):
    """The time of a file can be set back; that of its status cannot, where a system has one."""
    path, options = laid_out(formats.captions_jsonl, pictures)
    read_rows(monkeypatch, path, **options)
    time.sleep(0.02)
    rows, status = path / "train.jsonl", (path / "train.jsonl").stat()
    rows.write_text(rows.read_text("utf-8").replace("a red fox", "a bad fox"), "utf-8")
    os.utime(rows, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (rows.stat().st_size, rows.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    changed, read = read_rows(monkeypatch, path, **options)
    assert read
    assert "a bad fox" in repr(changed.examples[0])


def test_what_changed_a_moment_ago_is_not_kept(pictures, monkeypatch):
    path, options = laid_out(formats.captions_jsonl, pictures)
    monkeypatch.undo()
    monkeypatch.setenv("VLM_LORA_CACHE", str(path.parent / "cache"))
    assert [read_rows(monkeypatch, path, **options)[1] for _ in range(2)] == [True, True]
    assert not files()


@pytest.mark.parametrize("layout", NOT_KEPT, ids=lambda layout: layout.__name__)
def test_what_has_no_files_of_its_own_is_read_as_ever(layout, pictures, monkeypatch):
    path, options = laid_out(layout, pictures)
    assert [read_rows(monkeypatch, path, **options)[1] for _ in range(2)] == [True, True]
    assert not files()


def test_images_from_the_web_and_the_hub_are_not_kept(pictures, monkeypatch):
    path, options = laid_out(formats.captions_jsonl, pictures)
    read_dataset(path, keep=True, allow_urls=True, **options)
    plain = read_dataset(path, **options)
    monkeypatch.setattr(sources, "_read", lambda *given: plain)
    read_dataset("hf:owner/name", keep=True, **options)
    assert not index_folder().exists()


@pytest.mark.parametrize("damage", ["cut", "emptied", "another", "magic", *range(6)])
def test_a_damaged_one_is_made_anew(damage, pictures, monkeypatch):
    path, options = laid_out(mixed, pictures)
    plain = everything(read_rows(monkeypatch, path, **options)[0])
    (file,) = files()
    content = bytearray(file.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "emptied":
        content.clear()
    elif damage == "another":
        content = bytearray(random.Random(0).randbytes(len(content)))
    elif damage == "magic":
        content[14] ^= 1
    else:
        content[random.Random(damage).randrange(16, len(content))] ^= 1
    file.write_bytes(content)
    again, read = read_rows(monkeypatch, path, **options)
    assert read
    assert everything(again) == plain
    assert not read_rows(monkeypatch, path, **options)[1]


def test_a_text_of_the_index_is_a_text_and_no_class_is_made_of_it(pictures, monkeypatch):
    """Whoever may write into the cache may write texts, but have nothing else made."""
    assert kept._made("FilePart") == "FilePart"
    with pytest.raises(KeyError):
        kept._made(["class", "HubCell"])


def test_of_two_that_read_at_once_one_does(pictures, monkeypatch):
    path, options = laid_out(mixed, pictures)
    real, times, started = sources._read, [], threading.Barrier(4)

    def slow(*given):
        times.append(1)
        time.sleep(0.1)
        return real(*given)

    monkeypatch.setattr(sources, "_read", slow)
    found = []

    def read():
        started.wait()
        found.append(everything(read_dataset(path, keep=True, **options)))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 1
    assert [each == found[0] for each in found] == [True] * 4


def test_killed_while_it_writes_nothing_is_lost(pictures, monkeypatch):
    path, options = laid_out(mixed, pictures)
    plain = everything(read_dataset(path, **options))
    script = f"""
import os, signal, vlm_lora.data.index as index
from vlm_lora.data.readers import kept, read_dataset
kept.FRESH_SECONDS = -3600
index.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
read_dataset({str(path)!r}, keep=True, prompt={PROMPT!r})
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not files()
    (left,) = index_folder().glob("*.tmp")
    again, read = read_rows(monkeypatch, path, **options)
    assert read
    assert everything(again) == plain
    os.utime(left, (0, 0))
    read_rows(monkeypatch, path, prompt="Other.")
    assert not left.exists(), "what was left half written is never deleted"


def test_with_a_full_disk_it_is_told_and_goes_on(pictures, monkeypatch):
    path, options = laid_out(mixed, pictures)

    real, told = index.os.fdopen, []

    def full(*given):
        real(*given).close()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(index.os, "fdopen", full)
        dataset = read_dataset(path, keep=True, warn=told.append, **options)
    assert everything(dataset) == everything(read_dataset(path, **options))
    assert told == ["what was read is not kept for later runs: [Errno 28] No space left on device"]
    assert not [each for each in index_folder().iterdir() if each.suffix != ".lock"]


def test_the_commands_read_through_it(pictures, monkeypatch, capsys):
    path, _ = laid_out(parts_in_folders, pictures)
    config = TrainConfig(data=str(path), cache=False)
    plain, found = read_and_split(config), []
    assert not index_folder().exists(), "--no-cache keeps it"
    command = ["check", str(path), "--json"]
    assert main(command) == 0
    facts = capsys.readouterr().out
    kept_once = files()
    assert len(kept_once) == 1
    monkeypatch.setattr(sources, "_read", lambda *_: pytest.fail("rows were read"))
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(facts)
    later = read_and_split(config.replace(cache=True))
    for side in ("train", "held_out"):
        assert list(map(repr, getattr(plain, side))) == list(map(repr, getattr(later, side)))
    assert (plain.bad_rows, plain.taken_for, plain.fingerprint) == (later.bad_rows, later.taken_for, later.fingerprint)
    assert plain.val_fingerprint == later.val_fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_speaker", lambda options: (None, config.prompt, None, None))
        patch.setattr("vlm_lora.inference.evaluate.evaluate", lambda speaker, examples, **_: found.extend(examples))
        with pytest.raises(AttributeError):  # there are no scores to tell
            main(["eval", str(path), "--model", "tiny"])
    assert [example.id for example in found] == ["test/c.png", "val/b.png"]
    assert files() == kept_once


def test_nothing_is_noted_outside_of_a_reading():
    origin.depend_on("/nowhere")
    with origin.noting() as noted:
        origin.depend_on("/nowhere")
        origin.depend_on("/nowhere")
        origin.depend_on("a\0b")
    assert noted.paths == b"/nowhere\0"
    assert noted.states.tolist() == list(origin.MISSING)


def test_a_zip_is_read_no_more_than_its_rows(pictures, monkeypatch, tmp_path):
    folder, _ = laid_out(formats.captions_jsonl, pictures)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for each in folder.iterdir():
            file.write(each, each.name)
    first, _ = read_rows(monkeypatch, tmp_path / "x.zip", prompt=PROMPT)
    later, read = read_rows(monkeypatch, tmp_path / "x.zip", prompt=PROMPT)
    assert not read
    assert everything(first) == everything(later)
    shutil.rmtree(later.examples[0].images[0].path.parent)
    assert read_rows(monkeypatch, tmp_path / "x.zip", prompt=PROMPT)[1]
