"""WebDataset shards: the same content as through every other format, and tars that mean harm or are damaged.

Run: pytest tests/data/test_shards.py
"""

import io
import json
import pickle
import re
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.test_formats import CAPTIONS, NAMES, PROMPT, QUESTIONS, by_image, plain
from vlm_lora.check.dataset import check_dataset
from vlm_lora.data.example import Dialogue, Turn
from vlm_lora.data.images import content_hash
from vlm_lora.data.readers import read_dataset
from vlm_lora.errors import DataError


def write_tar(path, members, **options):
    """Members: name -> bytes, text, or a TarInfo type for one that is no file."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes) and len(content) == 1:
                info.type, info.linkname = content, "/etc/passwd"
                tar.addfile(info)
                continue
            data = content.encode() if isinstance(content, str) else content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(folder, texts):
    for number, (name, text, ending) in enumerate(texts):
        yield f"{number:04}.png", (folder / name).read_bytes()
        yield f"{number:04}{ending}", text


def test_captions_as_txt_in_two_shards(pictures, tmp_path):
    folder = pictures(*NAMES, into="pictures")
    (tmp_path / "shards").mkdir()
    texts = [(name, text, ".txt") for name, text in CAPTIONS]
    write_tar(tmp_path / "shards/train-00000.tar", samples(folder, texts[:2]))
    write_tar(tmp_path / "shards/train-00001.tar", samples(folder, texts[2:]))
    dataset = read_dataset(tmp_path / "shards", prompt=PROMPT)
    assert (dataset.format, dataset.bad) == ("webdataset", ())
    expected = by_image([(name, Dialogue((Turn(PROMPT, text),))) for name, text in CAPTIONS])
    assert plain(dataset, folder) == expected
    assert dataset.examples[0].place == "train-00000.tar:1"
    for example in reversed(dataset.examples):
        assert content_hash(example.images[0].read_bytes()) == example.images[0].sha256
    assert read_dataset(tmp_path / "shards", prompt=PROMPT, format="webdataset") == dataset
    assert len(check_dataset(dataset).examples) == 3


def test_questions_as_json(pictures, tmp_path):
    folder = pictures(*NAMES, into="pictures")
    texts = [
        (
            name,
            json.dumps({"question": q, "answers": a, "question_type": k, "images": ["elsewhere.png"]}),
            ".json",
        )
        for name, q, a, k in QUESTIONS
    ]
    dataset = read_dataset(write_tar(tmp_path / "x.tar", samples(folder, texts)), prompt=PROMPT)
    rows = [(n, Dialogue((Turn(q, a[0]),), k, tuple(a))) for n, q, a, k in QUESTIONS]
    assert plain(dataset, folder) == by_image(rows)


def test_what_img2dataset_writes(pictures, tmp_path):
    """A .txt and a .json with the same caption and much beside it."""
    folder = pictures("a.png", into="pictures")
    fields = {
        "caption": "a fox",
        "url": "http://example.org/a.png",
        "key": "000000000",
        "status": "success",
        "width": 8,
    }
    members = [
        ("000000000.json", json.dumps(fields)),
        ("000000000.png", (folder / "a.png").read_bytes()),
        ("000000000.txt", "a fox"),
    ]
    (example,) = read_dataset(write_tar(tmp_path / "00000.tar", members), prompt=PROMPT).examples
    assert example.dialogues == (Dialogue((Turn(PROMPT, "a fox"),)),)


class Bomb:
    def __reduce__(self):
        return open, ("bomb-went-off", "w")


def test_nothing_is_run_extracted_or_followed(pictures, tmp_path, monkeypatch):
    """F26, F27: pickles by name, pipe names, names that climb, links, devices."""
    image = (pictures("a.png", into="pictures") / "a.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    members = [
        ("0.png", image), ("0.txt", "good"), ("0.pyd", bomb), ("0.pkl", bomb), ("0.cls", "1"),
        ("../../climbs.png", image), ("../../climbs.txt", "climbs"),
        ("/absolute.png", image), ("/absolute.txt", "absolute"),
        ("pipe:touch bomb-went-off.png", image), ("pipe:touch bomb-went-off.txt", "pipe"),
        ("soft.png", tarfile.SYMTYPE), ("soft.txt", "soft"),
        ("hard.png", tarfile.LNKTYPE), ("hard.txt", "hard"),
        ("device.png", tarfile.CHRTYPE), ("device.txt", "device"),
        ("text.png", image), ("text.txt", tarfile.SYMTYPE),
    ]  # fmt: skip
    before = sorted(path.name for path in tmp_path.iterdir())
    write_tar(tmp_path / "x.tar", members)
    dataset = read_dataset(tmp_path / "x.tar", prompt=PROMPT)
    said = [d.turns[0].assistant for example in dataset.examples for d in example.dialogues]
    assert said == ["good", "climbs", "absolute", "pipe"]
    assert [row.line for row in dataset.bad] == [5, 6, 7, 8]
    assert all("expected the file itself" in row.reason for row in dataset.bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*before, "x.tar"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("0.png", "IMAGE")], "has 'image'; expected messages"),
        ([("0.txt", "x")], r"has no image among its members '0.txt'"),
        ([("0.png", "IMAGE"), ("0.txt", b"\xff\xfe")], r"'0.txt' is not UTF-8 \(byte 0xff"),
        ([("0.png", "IMAGE"), ("0.json", "{")], "'0.json' is not valid JSON"),
        ([("0.png", "IMAGE"), ("0.json", "[1]")], "'0.json' is not an object with named fields but list"),
        ([("0.png", "IMAGE"), ("0.txt", " ")], "has an empty caption"),
        ([("0.png", "IMAGE"), ("0.txt", "a"), ("0.json", '{"caption": "b"}')], "says different captions"),
        ([("0.png", "IMAGE"), ("0.json", '{"caption": "b", "image": "../x"}')], None),
    ],
)
def test_bad_samples_leave_the_others(members, reason, pictures, tmp_path):
    image = (pictures("a.png", into="pictures") / "a.png").read_bytes()
    members = [(name, image if content == "IMAGE" else content) for name, content in members]
    write_tar(tmp_path / "x.tar", [*members, ("1.png", image + b" "), ("1.txt", "good")])
    dataset = read_dataset(tmp_path / "x.tar", prompt=PROMPT)
    assert len(dataset.examples) == (1 if reason else 2)
    if reason:
        (row,) = dataset.bad
        assert (row.source, row.line) == ("x.tar", 1)
        assert re.search(reason, row.reason), row.reason


def test_a_shard_that_was_cut_off_or_is_compressed(pictures, tmp_path):
    folder = pictures(*NAMES, into="pictures")
    whole = write_tar(tmp_path / "x.tar", samples(folder, [(n, "x", ".txt") for n in NAMES])).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 2 * 2048 + 200])  # in the first header of the third sample
    dataset = read_dataset(tmp_path / "x.tar", prompt=PROMPT)
    assert [example.place for example in dataset.examples] == ["x.tar:1", "x.tar:2"]
    ((source, line, reason),) = [(row.source, row.line, row.reason) for row in dataset.bad]
    assert (source, line) == ("x.tar", 3)
    assert "nothing from here on is read" in reason
    (tmp_path / "x.tar").write_bytes(whole[: 2 * 2048 + 520])  # in its picture
    assert read_dataset(tmp_path / "x.tar", prompt=PROMPT).bad[0].line == 3
    (tmp_path / "x.tar").write_bytes(whole[: 2 * 2048])  # between two samples
    assert "a missing end at byte 4,096" in read_dataset(tmp_path / "x.tar", prompt=PROMPT).bad[0].reason
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(DataError, match="is not readable as an uncompressed tar"):
        read_dataset(tmp_path / "x.tar", prompt=PROMPT)
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.tar: "):
        read_dataset(tmp_path / "x.tar", prompt=PROMPT)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 6000), bytes_=st.binary(min_size=1, max_size=40))
def test_damage_anywhere_raises_nothing_but_ours(at, bytes_, pictures, tmp_path):
    folder = pictures(*NAMES, into="pictures")
    path = write_tar(tmp_path / "x.tar", samples(folder, [(n, "x", ".txt") for n in NAMES]))
    data = path.read_bytes()
    path.write_bytes(data[:at] + bytes_ + data[at + len(bytes_) :])
    try:
        dataset = read_dataset(path, prompt=PROMPT)
        check_dataset(dataset)
    except DataError:
        pass


@pytest.mark.parametrize(
    ("members", "names"),
    [
        (["1.jpg", "1.mask.png", "1.depth.png", "1.txt"], ["1.jpg"]),
        (["1.left.png", "1.right.png", "1.txt"], ["1.left.png", "1.right.png"]),
    ],
)
def test_what_is_the_image_of_a_sample(members, names, pictures, tmp_path):
    image = (pictures("a.png") / "a.png").read_bytes()
    shard = write_tar(tmp_path / "x.tar", [(name, "x" if name.endswith("txt") else image) for name in members])
    (example,) = read_dataset(shard, prompt=PROMPT).examples
    assert [ref.name for ref in example.images] == names
