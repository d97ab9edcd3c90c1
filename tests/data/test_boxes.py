"""Boxes of rows: ms-swift's `objects`, Qwen's JSON; in pixels of the image, or a bad row; and back in a clean copy.

Run: pytest tests/data/test_boxes.py
"""

import json
import re
from dataclasses import replace

import pytest
from PIL import Image

from tests.data.test_fields import PROMPT, chat, dialogues
from vlm_lora.check.clean import write_clean
from vlm_lora.cli import main
from vlm_lora.data.example import Box, Dialogue, Turn
from vlm_lora.data.readers import read_dataset
from vlm_lora.errors import ConfigError

SIZE = (8, 6)  # of the fixture's pictures
BOX = (1.0, 2.0, 5.0, 6.0)


def found(*boxes, said="<ref-object><bbox>", refs=("a fox",), **objects):
    """A row as ms-swift has it."""
    return chat("Find it.", said, objects={"ref": list(refs), "bbox": [list(box) for box in boxes], **objects})


def made(*points, refs=("a fox",), said="<ref-object><bbox>", image=0):
    boxes = tuple(Box(tuple(map(float, each)), image, SIZE) for each in points)
    return Dialogue((Turn("Find it.", said),), refs=refs, boxes=boxes)


TWO = {"images": ["a.png", "b.png"]}
READ = {
    "pixels": (found(BOX), made(BOX)),
    "said to be pixels": (found(BOX, bbox_type="real"), made(BOX)),
    "shares": (found((0.125, 0.5, 0.625, 1), bbox_type="norm1"), made((1, 3, 5, 6))),
    "thousandths": (found((125, 500, 625, 1000), bbox_type="norm1000"), made((1, 3, 5, 6))),
    "a point": (found((8, 0)), made((8, 0))),
    "the whole image": (found((0, 0, 8, 6)), made((0, 0, 8, 6))),
    "the size of the file": (found(BOX, width=[8], height=[6]), made(BOX)),
    "a size in one number": (found(BOX, width=8, height=6), made(BOX)),
    "another size": (found((10, 20, 50, 60), width=[80], height=[60]), made(BOX)),
    "another size, rounded": (found((2, 4, 10, 12), width=[17], height=[12]), None),
    "a text of JSON": (
        chat("Find it.", "<bbox>", objects=json.dumps({"bbox": [BOX]})),
        made(BOX, refs=(), said="<bbox>"),
    ),
    "null and empty": (
        chat("Find it.", "<bbox>", objects={"ref": None, "bbox": [BOX], "bbox_type": None, "image_id": []}),
        made(BOX, refs=(), said="<bbox>"),
    ),
    "names alone": (chat("Find it.", "<ref-object>", objects={"ref": [" a fox "]}), made(said="<ref-object>")),
    "the second image": (found(BOX, image_id=[1]) | TWO, made(BOX, image=1)),
    "one image for all": (found(BOX, image_id=1) | TWO, made(BOX, image=1)),
    "the first where left out": (found(BOX) | TWO, made(BOX)),
    "a box in a question": (
        {"image": "a.png", "question": "What is at <bbox>?", "answer": "a fox", "objects": {"bbox": [BOX]}},
        Dialogue((Turn("What is at <bbox>?", "a fox"),), boxes=(Box(BOX, 0, SIZE),)),
    ),
    "a choice about a box": (
        {"image": "a.png", "question": "At <bbox>?", "choices": ["a", "b"], "answer": "b", "objects": {"bbox": [BOX]}},
        None,
    ),
    "ms-swift's query": (
        {"images": ["a.png"], "query": "<image>Find it.", "response": "<bbox>", "objects": {"bbox": [BOX]}},
        made(BOX, refs=(), said="<bbox>"),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_objects_are_boxes_in_pixels(case, read):
    row, wanted = READ[case]
    dataset = read(row)
    assert (dataset.bad, dataset.unused) == ((), {})
    (dialogue,) = dialogues(dataset)
    if wanted:
        assert dialogue == wanted
    elif dialogue.choices:
        assert (dialogue.boxes, dialogue.turns[0].user[:11]) == ((Box(BOX, 0, SIZE),), "At <bbox>?\n")
    else:  # 17x12 is 8x6 but for a rounding
        assert dialogue.boxes[0].points == pytest.approx((2 * 8 / 17, 2, 10 * 8 / 17, 6))
    assert not any(box.clipped for box in dialogue.boxes)


TRAPS = {
    "too few marks": (found(BOX, BOX), "has 1 <bbox> mark(s) but 2 bbox in its objects; make them equal"),
    "too many marks": (found(said="<ref-object><bbox>"), "has 1 <bbox> mark(s) but 0 bbox in its objects"),
    "no mark": (found(BOX, said="There."), "has 0 <ref-object> mark(s) but 1 ref in its objects"),
    "a name too many": (found(BOX, refs=("a", "b")), "has 1 <ref-object> mark(s) but 2 ref in its objects"),
    "no name": (found(BOX, refs=("",)), "expected a list of names"),
    "width and height": (found((5, 4, 2, 2)), "which has 8x6 pixels, is empty; expected x1, y1, x2, y2 with x1 < x2"),
    "an upright line": (found((1, 2, 1, 5)), "is empty"),
    "a flat line": (found((1, 2, 5, 2)), "is empty"),
    "outside": (
        found((1, 2, 10, 5)),
        "the box [1, 2, 10, 5] (real) of 'a.png', which has 8x6 pixels, reaches",
    ),
    "below": (found((1, 2, 4, 8)), "reaches out of it; correct it"),
    "above": (found((1, -1.5, 4, 5)), "reaches out of it; correct it"),
    "a point outside": (found((1, 9)), "reaches out of it; correct it"),
    "thousandths taken for pixels": (found((125, 500, 625, 1000)), "say by bbox_type what its numbers are"),
    "pixels taken for shares": (found(BOX, bbox_type="norm1"), "(norm1) of 'a.png'"),
    "three numbers": (found((1, 2, 3)), "has the box [1, 2, 3]; expected x1, y1, x2, y2, or x, y of a point"),
    "a polygon": (found((1, 2, 3, 4, 5, 6, 7, 8)), "has the box [1, 2, 3, 4, 5, 6, 7, 8]; expected"),
    "words": (found(("1", "2", "5", "6")), "has the box ['1', '2', '5', '6']; expected"),
    "truth": (found((True, 2, 5, 6)), "has the box [True, 2, 5, 6]; expected"),
    "no number": (found((float("nan"), 2, 5, 6)), "has the box [nan, 2, 5, 6]; expected"),
    "a huge number": (found((10**400, 2, 5, 6)), "expected x1, y1, x2, y2"),
    "no list": (chat("?", "<bbox>", objects={"bbox": "1 2 5 6"}), "a bbox that is '1 2 5 6'; expected a list"),
    "one box, no list of them": (chat("?", "<bbox>", objects={"bbox": [1, 2, 5, 6]}), "has the box 1; expected"),
    "a type nobody knows": (
        found(BOX, bbox_type="thousand"),
        "bbox_type 'thousand'; expected one of real, norm1, norm",
    ),
    "a type that is no text": (found(BOX, bbox_type=["real"]), "have the bbox_type ['real']; expected one of real"),
    "a name that is no text": (found(BOX, refs=("a\0fox",)), "the ref of its objects holds a NUL byte"),
    "a name that nobody sees": (found(BOX, refs=("\u200b",)), "the ref of its objects is nothing but invisible"),
    "half a letter": (found(BOX, refs=("\ud800",)), "the ref of its objects is not valid UTF-8"),
    "a box of two lines": (chat("?", "<bbox>", objects={"bbox": ["1\n2"]}), r"has the box '1\n2'; expected"),
    "a size of two lines": (found(BOX, width="8\n", height=[6]), r"have the width '8\n' and the height [6]"),
    "no such image": (found(BOX, image_id=[1]), "the image_id [1], for 1 box(es) in 1 image(s)"),
    "an image before the first": (found(BOX, image_id=[-1]), "from 0"),
    "an image too many": (found(BOX, image_id=[0, 0]), "the image_id [0, 0], for 1 box(es)"),
    "an image in words": (found(BOX, image_id=["0"]), "the image_id ['0']"),
    "no image at all": (found(BOX) | {"images": []}, "in 0 image(s)"),
    "width alone": (found(BOX, width=[8]), "the width [8] and the height None; expected those of each of its 1 image"),
    "a size of nothing": (found(BOX, width=[0], height=[6]), "the width [0]"),
    "a photo that is turned": (
        found((1, 2, 5, 6), width=[6], height=[8]),
        "its boxes are of an image of 6x8, and 'a.png' has 8x6 pixels, another shape",
    ),
    "another shape by more than a pixel": (found((1, 2, 50, 60), width=[800], height=[490]), "of 800x490, and 'a.png'"),
    "one size that is no number": (found(BOX, width=[8, "x"], height=[6, 6]) | TWO, "the width [8, 'x']"),
    "no question": (
        {"image": "a.png", "question": "", "answer": "<bbox>", "objects": {"bbox": [BOX]}},
        "has an empty question",
    ),
    "COCO's objects": (
        chat("?", "x", objects={"bbox": [BOX], "categories": [3]}),
        "has objects of a shape that is not known ('bbox', 'categories'); expected those of ms-swift",
    ),
    "a list of objects": (chat("?", "x", objects=[{"bbox": BOX}]), "(list); expected those of ms-swift"),
    "damaged JSON": (chat("?", "x", objects="{"), "(str); expected those of ms-swift"),
    "several texts": (
        {"image": "a.png", "captions": ["<bbox>", "x"], "objects": {"bbox": [BOX]}},
        "has objects, and several texts that they may belong to",
    ),
    "several answers": (
        {"image": "a.png", "question": "?", "answers": ["<bbox>", "x"], "objects": {"bbox": [BOX]}},
        "has objects and several answers to one question",
    ),
    "a box to choose": (
        {"image": "a.png", "question": "?", "choices": ["<bbox>", "no"], "answer": "A", "objects": {"bbox": [BOX]}},
        "has a box or a name of its objects among its options",
    ),
    "an image that cannot be read": (found(BOX) | {"images": ["x.jsonl"]}, "is not an image that can be read"),
    "a mark in a name": (found(BOX, refs=("<bbox>",)), "has '<bbox>' in a text"),
    "a mark in a system message": (found(BOX) | {"system": "<bbox>"}, "has '<bbox>' in a text"),
    "another mark beside": (found(BOX, said="<ref-object><bbox><video>"), "has '<video>' in a text"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_is_wrong_with_objects_is_a_bad_row(trap, read):
    row, reason = TRAPS[trap]
    dataset = read(row, found(BOX))
    (bad,) = dataset.bad
    assert reason in bad.reason
    assert (bad.place, "\n" in bad.reason) == ("x.jsonl:1", False)
    assert dialogues(dataset) == [made(BOX)]


def test_objects_of_nothing_are_no_objects(read):
    """As Arrow has them, where other rows of the table have some."""
    nothing = {"ref": [], "bbox": [], "bbox_type": None}
    dataset = read({"image": "a.png", "captions": ["x", "y"], "objects": nothing}, chat("a", "b", objects=nothing))
    assert (dataset.bad, dataset.boxes) == ((), {})
    assert [d.turns[0].assistant for d in dialogues(dataset)] == ["x", "y", "b"]


def test_names_of_tokens_beside_boxes_are_refused_as_they_are_too(read):
    """They could not be told from those that a rendered box has."""
    rows = [found(BOX, said="<ref-object><bbox> <|box_start|>"), found(BOX, refs=("<|object_ref_end|>",))]
    dataset = read(*rows, text_as_is=True)
    first, second = dataset.bad
    assert first.reason.startswith("has '<|box_start|>' in a text beside objects; write it as <ref-object> or <bbox>")
    assert second.reason.startswith("has '<|object_ref_end|>' in a text beside objects")
    (plain,) = dialogues(read(chat("?", "<|box_start|><bbox>"), text_as_is=True))
    assert (plain.turns[0].assistant, plain.has_marks) == ("<|box_start|><bbox>", False)


def test_what_reaches_out_by_a_rounding_is_cut_off_and_counted(read, pictures, capsys):
    dataset = read(found((-0.6, 2, 9, 6.4)), found(BOX), found((-0.4, 7), said="<bbox>", refs=()))
    assert dataset.bad == ()
    assert [d.boxes[0].points for d in dialogues(dataset)] == [(0, 2, 8, 6), BOX, (0, 6)]
    assert [d.boxes[0].clipped for d in dialogues(dataset)] == [True, False, True]
    assert dataset.boxes == {"read": 3, "clipped": 2}
    assert "3 boxes and points, 2 of them cut off at the edge of their image" in dataset.taken_for
    assert main(["check", str(pictures() / "x.jsonl")]) == 0
    assert "3 boxes and points, 2 of them cut off at the edge of their image\n" in capsys.readouterr().out
    assert main(["check", str(pictures() / "x.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["boxes"] == {"read": 3, "clipped": 2}


def test_a_box_may_reach_out_of_a_large_image_by_a_hundredth(tmp_path):
    Image.new("RGB", (2000, 10)).save(tmp_path / "a.png")
    rows = [found((-19.5, 0, 2019.5, 10.9)), found((-21, 0, 2000, 10)), found((0, 0, 2000, 11.5))]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = read_dataset(tmp_path / "x.jsonl")
    assert [bad.line for bad in dataset.bad] == [2, 3]
    assert dialogues(dataset)[0].boxes[0].points == (0, 0, 2000, 10)


def test_each_image_has_a_size_of_its_own(read):
    row = found((10, 10, 20, 30), image_id=[1], width=[8, 80], height=[6, 60]) | TWO
    assert dialogues(read(row))[0].boxes[0].points == (1, 1, 2, 3)
    within_a_pixel = found((100, 100, 200, 250), width=[800], height=[500])  # 8x5 would be that shape
    assert dialogues(read(within_a_pixel))[0].boxes[0].points == pytest.approx((1, 1.2, 2, 3))


def test_a_photo_that_is_turned_has_its_boxes_as_one_sees_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    row = found((0, 0, 30, 40)) | {"images": ["a.jpg"]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    (dialogue,) = dialogues(read_dataset(tmp_path / "x.jsonl"))
    assert dialogue.boxes == (Box((0, 0, 30, 40), 0, (30, 40)),)


ANSWER = '```json\n[{"bbox_2d": [1, 2, 5, 6], "label": "a fox"},\n{"label": "b", "point_2d":[8,0]}]\n```'
LIFTED = '```json\n[{"bbox_2d": <bbox>, "label": "a fox"},\n{"label": "b", "point_2d":<bbox>}]\n```'


def test_numbers_in_json_are_learnt_as_they_stand_and_counted(read):
    dataset = read(chat("Find it.", ANSWER), chat("What?", "a fox"))
    assert dialogues(dataset)[0] == Dialogue((Turn("Find it.", ANSWER),))
    assert dataset.boxes == {"as_is": 1}
    assert (
        "1 texts with bbox_2d or point_2d, whose numbers are learnt as they stand unless --json-boxes"
        in dataset.taken_for
    )


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("real", ANSWER),
        ("norm1", ANSWER.replace("[1, 2, 5, 6]", "[0.125, 0.3333333333333333, 0.625, 1]").replace("[8,0]", "[1,0]")),
        ("norm1000", ANSWER.replace("[1, 2, 5, 6]", "[125, 333.3333333333333, 625, 1e3]").replace("[8,0]", "[1000,0]")),
    ],
)
def test_numbers_in_json_are_boxes_where_it_is_said_what_they_are(kind, answer, read):
    dataset = read(chat("Find it.", answer), json_boxes=kind)
    assert dataset.bad == ()
    (dialogue,) = dialogues(dataset)
    assert dialogue.turns == (Turn("Find it.", LIFTED),)
    assert [box.points for box in dialogue.boxes] == [pytest.approx(BOX), (8, 0)]
    assert dataset.boxes == {"read": 2}


def test_json_is_lifted_from_texts_of_every_format_and_around_images(pictures):
    folder = pictures("a.png")
    (folder / "a.txt").write_text('{"bbox_2d": [1, 2, 5, 6]}')
    (dialogue,) = dialogues(read_dataset(folder, json_boxes="real"))
    assert (dialogue.turns[0].assistant, dialogue.boxes) == ('{"bbox_2d": <bbox>}', (Box(BOX, 0, SIZE),))
    row = chat('{"point_2d": [1, 1]} in this: <image> or {"point_2d": [2, 2]}?', '{"bbox_2d": [1, 2, 5, 6]}')
    (folder / "x.jsonl").write_text(json.dumps(row))
    (dialogue,) = dialogues(read_dataset(folder / "x.jsonl", json_boxes="real"))
    assert dialogue.turns[0].pieces == ['{"point_2d": <bbox>} in this: ', ' or {"point_2d": <bbox>}?']
    assert [box.points for box in dialogue.boxes] == [(1, 1), (2, 2), BOX]


JSON_TRAPS = {
    "outside": (chat("?", '{"bbox_2d": [1, 2, 50, 60]}'), "the box [1, 2, 50, 60] (real) of 'a.png'"),
    "no numbers": (chat("?", '{"bbox_2d": null}'), "has a bbox_2d or point_2d that is no list of numbers in"),
    "a list in a list": (chat("?", '{"bbox_2d": [[1, 2, 5, 6]]}'), "that is no list of numbers in"),
    "no JSON": (chat("?", '{"bbox_2d": [1 2 5 6]}'), "that is no list of numbers in"),
    "two images": (chat("?", '{"bbox_2d": [1, 2, 5, 6]}') | TWO, "it is not one image, one answer and no mark"),
    "no image": (chat("?", '{"bbox_2d": [1, 2, 5, 6]}') | {"images": []}, "it is not one image"),
    "objects too": (
        chat('{"bbox_2d": [1, 2, 5, 6]}', "<bbox>", objects={"bbox": [BOX]}),
        "it is not one image, one answer and no mark beside them; write the boxes as objects",
    ),
    "several answers": (
        {"image": "a.png", "question": "?", "answers": ['{"bbox_2d": [1, 2, 5, 6]}', "x"]},
        "it is not one image, one answer",
    ),
    "a mark of nothing": (chat("<bbox>", '{"bbox_2d": [1, 2, 5, 6]}'), "no mark beside them"),
}


@pytest.mark.parametrize("trap", JSON_TRAPS)
def test_what_is_wrong_with_json_that_is_to_be_converted_is_a_bad_row(trap, read):
    row, reason = JSON_TRAPS[trap]
    (bad,) = read(row, chat("a", "b"), json_boxes="real").bad
    assert reason in bad.reason
    assert bad.place == "x.jsonl:1"


def test_a_kind_of_numbers_that_nobody_knows_is_refused(read):
    with pytest.raises(ConfigError, match="--json-boxes pixels: unknown; expected one of as-is, real, norm1, norm1000"):
        read(chat("a", "b"), json_boxes="pixels")


def test_json_with_marks_is_not_looked_at_twice(read):
    row = chat("Find it.", '{"bbox_2d": <bbox>}', objects={"bbox": [BOX]})
    assert dialogues(read(row, json_boxes="norm1000")) == dialogues(read(row))


def test_a_clean_copy_has_the_boxes_again(read, tmp_path):
    rows = [
        found((0.125, 0.5, 0.625, 1), bbox_type="norm1", refs=("a \u0065\u0301lk  ",)),
        found(BOX, image_id=[1]) | TWO,
        chat("Find <ref-object>  in this <image> at <bbox>", " <bbox> ", "Sure?", "yes")
        | {"objects": {"ref": ["x"], "bbox": [BOX, (-0.2, 1)]}},
        {"image": "c.png", "caption": "<ref-object> at <bbox>", "objects": {"ref": ["x"], "bbox": [BOX]}},
        {"image": "c.png", "caption": "<bbox>: <ref-object>", "objects": {"ref": ["x"], "bbox": [BOX]}},
        chat("Find it.", ANSWER),
    ]
    dataset = read(*rows, json_boxes="real")
    assert dataset.bad == ()
    write_clean(tmp_path / "clean", dataset.examples, PROMPT)
    again = read_dataset(tmp_path / "clean", prompt=PROMPT)
    assert again.bad == ()
    by_name = {example.id: example for example in again.examples}
    for example in dataset.examples:
        wanted = [(d.refs, d.boxes, len(d.turns), d.turns[0].images) for d in example.dialogues]
        wanted[0] = wanted[0] if wanted[0][0][:1] != ("a \u0065\u0301lk",) else (("a \u00e9lk",), *wanted[0][1:])
        assert [(d.refs, d.boxes, len(d.turns)) for d in by_name[example.id].dialogues] == [each[:3] for each in wanted]
    assert again.boxes["read"] == 8


def test_the_fingerprint_knows_boxes_names_and_sizes(read):
    rows = [
        found(BOX),
        found((1, 2, 5, 5)),
        found(BOX, refs=("a dog",)),
        found(BOX, image_id=[1]) | TWO,
        found(BOX) | TWO,
    ]
    prints = [read(row).fingerprint() for row in rows]
    assert len(set(prints)) == len(rows)
    assert read(rows[0]).fingerprint() == prints[0]


def test_a_column_to_ignore_is_as_if_there_were_no_boxes(read):
    row = chat("Find it.", "There.", objects={"ref": ["x"], "bbox": [BOX]})
    assert dialogues(read(row, ignore_columns="objects")) == [Dialogue((Turn("Find it.", "There."),))]
    assert re.search("objects", read(row).bad[0].reason)
    assert replace(made(BOX), refs=()).has_marks
