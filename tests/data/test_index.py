"""What an index keeps of data changes nothing but what a later run has to do; damaged, or of other data, it is nothing.

Run: pytest tests/data/test_index.py
"""

import json
import os
import shutil
import threading
from dataclasses import fields

import numpy as np
import pytest

import vlm_lora.data.index as index
from tests.conftest import picture
from tests.training.test_train import config
from vlm_lora.config import TrainConfig
from vlm_lora.data.example import ImageRef
from vlm_lora.data.index import Looks, index_folder
from vlm_lora.data.readers import read_dataset
from vlm_lora.errors import DataError
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache
from vlm_lora.model.preprocess import load_preprocessor
from vlm_lora.training.prepare import Prepared, SplitData, count_tokens, read_and_split


@pytest.fixture
def data(tmp_path):
    """Twenty pictures, one of them damaged, with one to three captions each, one of them too long; and a copy."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(20):
        picture(i, (32 + 16 * (i % 3), 32)).save(folder / f"{i}.png")
        rows += [{"image": f"{i}.png", "caption": f"Number {i}, said {'again ' * n}"} for n in range(1 + i % 3)]
    (folder / "3.png").write_bytes(b"no picture")
    shutil.copy(folder / "4.png", folder / "5.png")
    rows.append({"image": "6.png", "caption": "word " * 900})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def prepare(checkpoints, data, tmp_path):
    """Read, split and count as a run does; what came of it, and how many images were read and examples counted."""
    base = load_preprocessor(str(checkpoints["qwen2_vl"]))

    def prepare(**changes) -> tuple[SplitData, Prepared, int, int]:
        settings: TrainConfig = config(checkpoints, data, tmp_path / "run", max_tokens=500, **changes)
        encoder, counted, warned = Encoder(base), [], []
        real = encoder.sizes
        encoder.sizes = lambda dialogues, grids: counted.append(1) or real(dialogues, grids)
        split = read_and_split(settings, warn=warned.append)
        prepared = count_tokens(settings, split, encoder, lambda *_: None)
        prepare.warned = warned
        return split, prepared, split.looks.num_read, len(counted)

    return prepare


def assert_same(one, other) -> None:
    for ours, theirs in zip(one[:2], other[:2], strict=True):
        for field in (f.name for f in fields(ours) if f.name != "looks"):
            a, b = getattr(ours, field), getattr(theirs, field)
            assert (list(a) == list(b)) if field in ("train", "held_out") else a == b, field
    images = [image for example in one[0].train for image in example.images if image.name != "3.png"]
    for find in (lambda looks: looks.sha256, lambda looks: looks.size):
        assert list(map(find(one[0].looks), images)) == list(map(find(other[0].looks), images))


def test_a_later_run_reads_and_counts_nothing_and_gets_the_same(prepare, monkeypatch):
    plain, first = prepare(cache=False), prepare()
    assert plain[2:] == (20, 20)
    assert first[2:] == (20, 20)  # 19 whole examples, and what is left of the one with a text that is too long
    assert_same(first, plain)
    read = ImageRef.read_bytes
    monkeypatch.setattr(ImageRef, "read_bytes", lambda ref: read(ref) if ref.name == "3.png" else pytest.fail(ref.name))
    later = prepare()
    assert later[2:] == (1, 1)  # what was bad is looked at again: it may be mended
    assert_same(later, plain)
    assert [row.line for row in later[1].bad_rows] == [row.line for row in plain[1].bad_rows]
    other = prepare(seed=1, batch_size=2)
    assert other[2:] == (1, 1)
    assert other[0].held_out != later[0].held_out
    assert prepare(prompt="What is it?")[2:] == (1, 20)  # other texts


def test_what_has_changed_is_found_out_anew(prepare, data):
    before = prepare()
    status = (data / "7.png").stat()
    (data / "3.png").write_bytes((data / "2.png").read_bytes())
    longer = bytearray((data / "7.png").read_bytes())
    longer[-1] ^= 1
    (data / "7.png").write_bytes(longer)
    os.utime(data / "7.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    text = (data / "train.jsonl").read_text().replace("Number 9,", "Number nine,")
    (data / "train.jsonl").write_text(text)
    after = prepare()
    # 3 is mended and counted first; of 6, what is left of it; 9 has other texts
    assert after[2:] == (2, 3)
    assert_same(after, prepare(cache=False))
    seven = next(e.images[0] for e in before[0].train + before[0].held_out if e.images[0].name == "7.png")
    assert before[0].looks.sha256(seven) != after[0].looks.sha256(seven)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other"])
def test_a_damaged_index_is_made_anew(prepare, damage):
    plain = prepare()
    for path in index_folder().glob("*.npz"):
        content = bytearray(path.read_bytes())
        if damage == "cut":
            del content[len(content) // 2 :]
        elif damage == "flipped":
            content[len(content) // 2] ^= 255
        elif damage == "emptied":
            content.clear()
        else:
            np.savez(path, nothing=np.zeros(3))
            content = bytearray(path.read_bytes())
        path.write_bytes(content)
    again = prepare()
    assert again[2] > 15
    assert again[3] > 15
    assert_same(again, plain)
    assert prepare()[2:] == (1, 1)


def test_of_two_that_make_an_index_at_once_one_does(data):
    images = [image for e in read_dataset(data, prompt="-").examples for image in e.images]
    good = [image for image in images if image.name != "3.png"]
    looks = [Looks("name") for _ in range(4)]
    started = threading.Barrier(4)
    threads = [threading.Thread(target=lambda one=one: (started.wait(), one.look_at_all(good))) for one in looks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one.num_read for one in looks) == 19
    assert len({tuple(map(one.sha256, good)) for one in looks}) == 1
    assert sum(one.num_read for one in looks) == 19


def test_killed_while_it_writes_and_with_a_full_disk_nothing_is_lost(prepare, data, monkeypatch):
    plain = prepare()
    kept = {path.name: path.read_bytes() for path in index_folder().glob("*.npz")}
    (data / "8.png").write_bytes((data / "9.png").read_bytes())

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    assert {path.name: path.read_bytes() for path in index_folder().glob("*.npz")} == kept
    assert not list(index_folder().glob("*.tmp"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(index.np, "savez", full)
        changed = prepare()
    assert ["No space left" in text for text in prepare.warned] == [True, True]
    assert_same(changed, prepare(cache=False))
    assert changed[0].looks.sha256 is not plain[0].looks.sha256
    assert prepare()[2:] == (2, 2)


def test_a_picture_is_decoded_once_ever_and_not_where_it_has_changed_since(checkpoints, data, monkeypatch):
    refs = [image for e in read_dataset(data, prompt="-").examples for image in e.images if image.name != "3.png"]
    backbone, decoded = load_backbone(str(checkpoints["qwen2_vl"])), []
    import vlm_lora.model.features as module

    real = module.load_image
    monkeypatch.setattr(module, "load_image", lambda data, name: decoded.append(name) or real(data, name=name))

    def run() -> FeatureCache:
        looks = Looks("name")
        looks.look_at_all(refs)
        return FeatureCache(backbone, None, looks=looks)

    features = run()
    for ref in refs[:10]:
        features.prepare(ref)
    features.keep_looks()
    assert len(decoded) == 10
    late = run()  # it loads what is known, and another process adds to it
    for ref in refs[10:15]:
        late.prepare(ref)
    late.keep_looks()
    features.keep_looks()  # the older one takes nothing away
    last = run()
    for ref in refs[:15]:
        last.prepare(ref)
    assert len(decoded) == 15
    (data / refs[16].name).write_bytes((data / refs[0].name).read_bytes())
    with pytest.raises(DataError, match="has changed since it was first read"):
        last.prepare(refs[16])
    with pytest.raises(DataError, match="has changed since it was first read"):
        last.fetch(refs[16:17])
