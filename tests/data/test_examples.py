"""Examples that are packed are those that were given, and no object of theirs stays.

Run: pytest tests/data/test_examples.py
"""

import gc
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import picture
from tests.training.test_train import config
from vlm_lora.data.example import Box, Dialogue, Example, FilePart, ImageRef, Turn
from vlm_lora.data.examples import MOST_SHARED, Examples, Packer, with_ids
from vlm_lora.data.readers import read_dataset
from vlm_lora.data.readers.parquet import ParquetCell
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache
from vlm_lora.training.prepare import count_tokens, read_and_split

TAR, TABLE = Path("/data/x.tar"), Path("/data/x.parquet")
IMAGES = [
    ImageRef(Path("/data/images/a.png"), "images/a.png", 12),
    ImageRef(Path("/elsewhere/b.png"), "link.png", 0),
    ImageRef(Path("relative.png"), "a.png"),
    ImageRef(TAR, "a/1.png", 9, "ab" * 32, FilePart(TAR, "a/1.png", 512, 9)),
    ImageRef(TABLE, "x.parquet:3", 9, "cd" * 32, ParquetCell(TABLE, 0, 3, "image", 1)),
    ImageRef(TABLE, "x.parquet:4", 9, "ef" * 32, ParquetCell(TABLE, 1, 4, "image")),
    ImageRef(Path("/data/\udcff/é日\n.png"), "\udcff/é日\n.png", 1),
]
ASKED = Turn("What is it?", "A cat.")
DIALOGUES = [
    Dialogue((ASKED,), source="rows.jsonl", line=3),
    Dialogue((Turn("N", "Ä\u2028\U0001f600", (0, 1), 0.25), Turn("", "0", (), 0.0)), "kind", ("a", "b"), ("c", "d")),
    Dialogue((ASKED,), caption=False, prompt="{x}", split="val", system="Be kind.", source="x.json:row 3"),
    Dialogue((ASKED,), caption=True, refs=("cat",), source="0", line=1,
             boxes=(Box((0.1, 2.0, 1e300, 3.5), 0, (640, 480), True), Box((1 / 3, 0.0), 1, (1, 2)))),
]  # fmt: skip
ODD = [
    Example("images/a.png", (IMAGES[0],), tuple(DIALOGUES), "rows.jsonl", line=3),
    Example("a.png+link.png", (IMAGES[2], IMAGES[1]), (DIALOGUES[1],), "other.jsonl", 7, line=None),
    Example("x.jsonl:4", (), (DIALOGUES[0],), "rows.jsonl", line=4),
    *(Example(image.name, (image,), (DIALOGUES[i % 4],), "rows.jsonl") for i, image in enumerate(IMAGES)),
    Example("none", (IMAGES[0],), (), "rows.jsonl"),
]


def test_what_is_packed_is_what_was_given():
    packed = Examples.of(ODD)
    assert list(packed) == ODD
    # what is no part of their equality too
    assert list(map(repr, packed)) == list(map(repr, ODD))
    assert Examples.of(packed) is packed
    assert packed == tuple(ODD) == Examples.of(ODD)
    assert packed != ODD[:-1]
    assert packed != [*ODD[:-1], ODD[0]]
    assert [packed[-1], packed[np.int64(2)], *packed[3:0:-2]] == [ODD[-1], ODD[2], ODD[3], ODD[1]]
    for wrong in (len(ODD), -len(ODD) - 1):
        with pytest.raises(IndexError):
            packed[wrong]
    assert packed[:2] + packed[4:5] == (ODD[0], ODD[1], ODD[4])
    assert list(packed.images) == [each.images for each in ODD]
    assert packed.weights == [each.weight for each in ODD]
    assert packed.num_answers.tolist() == [len(each.dialogues) for each in ODD]
    assert not Examples.of(())


def test_dialogues_come_in_any_order_and_some_have_fewer():
    packer = Packer()
    places = [packer.begin(example) for example in ODD]
    for turn in range(4):
        for place, example in zip(places, ODD, strict=True):
            for dialogue in example.dialogues[turn : turn + 1]:
                packer.say(place, dialogue)
    packed = packer.done()
    assert packed == ODD
    fewer = replace(ODD[0], dialogues=ODD[0].dialogues[1:2])
    part = packed.take([3, 0, 1], {0: fewer})[:2]
    assert part == [ODD[3], fewer]
    assert packed.take([1, 0], {1: fewer})[::-1] == [ODD[0], fewer]
    assert part.num_answers.tolist() == [1, 1]
    assert packed.take([0], {0: fewer}).take([0]).num_answers.tolist() == [1]
    assert packed == ODD


def test_texts_that_come_again_are_kept_once():
    asked = [
        replace(ODD[2], id=str(i), dialogues=(Dialogue((Turn(f"No. {i}?", "x"),)),)) for i in range(2 * MOST_SHARED)
    ]
    long = "What is this? " * 99
    many = [replace(ODD[2], id=str(i), dialogues=(Dialogue((Turn(long, str(i)),)),)) for i in range(1000)]
    packed = Examples.of(many + asked)
    assert packed == many + asked
    assert len(packed.columns.said) < 1000 * 100 + 2 * MOST_SHARED * 100
    assert len(packed.columns.shared) == MOST_SHARED


def test_no_id_comes_twice():
    named = [replace(ODD[0], id=id) for id in ("a", "a#2", "a", "b", "a")]
    assert [each.id for each in with_ids(named)] == ["a", "a#2", "a#3", "b", "a#4"]


def rows_alive() -> Counter:
    gc.collect()
    kinds = (Example, Dialogue, Turn, ImageRef)
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kinds)


def test_no_row_is_kept_as_an_object(checkpoints, tmp_path):
    """Neither by what reads, splits and counts nor by what knows the images; those that are bad are few."""
    rows = []
    for i in range(60):
        picture(i, (32, 32)).save(tmp_path / f"{i}.png")
        rows += [{"image": f"{i}.png", "caption": f"Number {i}, said {'again ' * n}"} for n in range(3)]
    rows.append({"image": "7.png", "caption": "word " * 900})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config(checkpoints, tmp_path / "train.jsonl", tmp_path / "run", max_tokens=500)
    features = FeatureCache(load_backbone(settings.model), None)
    before = rows_alive()
    data = read_and_split(settings)
    features._looks = data.looks
    prepared = count_tokens(settings, data, Encoder(features.backbone), lambda *_: None)
    features.survey(prepared.images)
    assert len({features.patches(image) for image in prepared.images}) == 1
    assert len(prepared.weighted) + len(prepared.held_out) == 60
    # 7.png with what is left of its captions
    assert rows_alive() - before == {"Example": 1, "Dialogue": 3, "Turn": 3, "ImageRef": 1}
    examples = read_dataset(tmp_path, prompt=settings.prompt).examples
    kept = list(examples)
    assert (rows_alive() - before)["Example"] == 61, "objects are not counted"
    assert examples == kept
