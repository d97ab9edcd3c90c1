"""Boxes in the words of each family: the numbers of its own published code, and the tokens of its own template.

Run: pytest tests/model/test_boxes.py
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import VISION, picture
from tests.model.test_exactness import messages_of
from vlm_lora.data.example import Box, Dialogue, Turn
from vlm_lora.errors import ModelError
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.boxes import Convention, Frame, in_pixels, rendered
from vlm_lora.model.encode import Encoder
from vlm_lora.model.packing import IGNORE_INDEX

SIZE = (200, 100)  # the checkpoints' processors see it as 128x64
WHOLE, CAT, DOG = ((0.0, 0.0, 200.0, 100.0), (10.0, 20.0, 101.0, 90.0), (150.0, 0.0, 200.0, 100.0))
SPOT = (50.0, 99.0)


def of(user: str, assistant: str, *points: tuple[float, ...], refs: tuple[str, ...] = (), **more) -> Dialogue:
    return Dialogue((Turn(user, assistant),), refs=refs, boxes=tuple(Box(each, 0, SIZE) for each in points), **more)


FOUND = of("Find the <ref-object>.", "<bbox><bbox>", CAT, DOG, refs=("pets",))
NAMED = of("Find all.", "<ref-object><bbox>, <ref-object><bbox><bbox>", CAT, DOG, WHOLE, refs=('a "cat"', "Hund ü"))
TOLD = of("What is at <bbox>?", "<ref-object><bbox> beside <ref-object><bbox>", SPOT, CAT, DOG, refs=("A cat", "a dog"))
POINT = of("Where?", " <ref-object>: <bbox>\n", SPOT, refs=("the spot",))
ACTION = of("Open it", "click(start_box='<bbox>')", SPOT)
JSON = of("Find.", 'So: [{"bbox_2d": <bbox>, "label": "<ref-object>"}]', CAT, refs=('ü "cat"',))

REF, BOX = "<|object_ref_start|>{}<|object_ref_end|>", "<|box_start|>{}<|box_end|>"
RENDERED = {  # question and answer: Qwen2-VL; Qwen2.5-VL; Qwen3-VL and Qwen3.5
    "found": (
        FOUND,
        (
            f"Find the {REF.format('pets')}.",
            BOX.format("(50,200),(505,900)") + BOX.format("(750,0),(1000,1000)"),
        ),
        ("Find the pets.", '[{"bbox_2d": [6, 13, 65, 58]}, {"bbox_2d": [96, 0, 127, 63]}]'),
        ("Find the pets.", '[{"bbox_2d": [50, 200, 505, 900]}, {"bbox_2d": [750, 0, 1000, 1000]}]'),
    ),
    "named": (
        NAMED,
        (
            "Find all.",
            REF.format('a "cat"') + BOX.format("(50,200),(505,900)") + ", " + REF.format("Hund ü")
            + BOX.format("(750,0),(1000,1000)") + BOX.format("(0,0),(1000,1000)"),
        ),
        (
            "Find all.",
            r'[{"bbox_2d": [6, 13, 65, 58], "label": "a \"cat\""}, {"bbox_2d": [96, 0, 127, 63], "label": "Hund ü"}, '
            '{"bbox_2d": [0, 0, 127, 63], "label": "Hund ü"}]',
        ),
        (
            "Find all.",
            r'[{"bbox_2d": [50, 200, 505, 900], "label": "a \"cat\""}, '
            '{"bbox_2d": [750, 0, 1000, 1000], "label": "Hund ü"}, {"bbox_2d": [0, 0, 1000, 1000], "label": "Hund ü"}]',
        ),
    ),
    "told": (
        TOLD,
        (
            f"What is at {BOX.format('(250,990)')}?",
            f"{REF.format('A cat')}{BOX.format('(50,200),(505,900)')} beside "
            f"{REF.format('a dog')}{BOX.format('(750,0),(1000,1000)')}",
        ),
        ("What is at [32, 63]?", "A cat[6, 13, 65, 58] beside a dog[96, 0, 127, 63]"),
        ("What is at [250, 990]?", "A cat[50, 200, 505, 900] beside a dog[750, 0, 1000, 1000]"),
    ),
    "a point": (
        POINT,
        ("Where?", f" {REF.format('the spot')}: {BOX.format('(250,990)')}\n"),
        ("Where?", '[{"point_2d": [32, 63], "label": "the spot"}]'),
        ("Where?", '[{"point_2d": [250, 990], "label": "the spot"}]'),
    ),
    "an action": (
        ACTION,
        ("Open it", f"click(start_box='{BOX.format('(250,990)')}')"),
        ("Open it", "click(start_box='[32, 63]')"),
        ("Open it", "click(start_box='[250, 990]')"),
    ),
    "JSON": (
        JSON,
        ("Find.", r'So: [{"bbox_2d": [50, 200, 505, 900], "label": "ü \"cat\""}]'),
        ("Find.", r'So: [{"bbox_2d": [6, 13, 65, 58], "label": "ü \"cat\""}]'),
        ("Find.", r'So: [{"bbox_2d": [50, 200, 505, 900], "label": "ü \"cat\""}]'),
    ),
}  # fmt: skip
PLACE = {"qwen2_vl": 1, "qwen2_5_vl": 2, "qwen3_vl": 3, "qwen3_5": 3}
assert PLACE.keys() == VISION.keys()


@pytest.fixture(scope="module")
def backbones(checkpoints):
    return {family: load_backbone(str(folder)) for family, folder in checkpoints.items()}


@pytest.mark.parametrize("family", PLACE)
@pytest.mark.parametrize("case", RENDERED)
def test_golden_text_of_each_family(backbones, family, case):
    assert backbones[family].fitted(Image.new("RGB", SIZE)).size == SIZE
    assert backbones[family].grid(*SIZE) == (1, 8, 16)  # patches of 8: 128x64
    dialogue, wanted = RENDERED[case][0], RENDERED[case][PLACE[family]]
    made = Encoder(backbones[family]).rendered(dialogue)
    assert [(turn.user, turn.assistant) for turn in made.turns] == [wanted]
    assert not made.has_marks


@pytest.mark.parametrize("family", PLACE)
@pytest.mark.parametrize("case", RENDERED)
def test_tokens_are_those_of_the_template_with_the_rendered_messages(backbones, family, case):
    """Special tokens as such, in question and answer, and all of the answer learnt; beside an example without boxes."""
    backbone, dialogue = backbones[family], replace(RENDERED[case][0], system="Be exact.")
    encoder = Encoder(backbone)
    render = partial(backbone.processor.apply_chat_template, **backbone.family.template_options)
    turn = encoder.rendered(dialogue).turns[0]
    plain = Dialogue((replace(turn, assistant=turn.assistant.strip()),), system="Be exact.")
    theirs = backbone.processor(text=[render(messages_of(plain, 1))], images=[picture(1, SIZE)])
    theirs, grid = list(theirs["input_ids"][0]), torch.as_tensor(theirs["image_grid_thw"])
    for others in ([], [Dialogue((Turn("Else?", "<bbox>"),))]):
        encoded = encoder.encode([*others, dialogue], grid)
        branch = encoded.branches[-1]
        ours = [*encoded.prefix_ids.tolist(), *branch.input_ids.tolist()]
        assert ours == theirs[: len(ours)]
        assert len(theirs) - len(ours) == 1
        learnt = branch.labels[branch.labels != IGNORE_INDEX].tolist()
        assert learnt == ours[-len(learnt) :]
        assert backbone.tokenizer.decode(learnt) == turn.assistant.strip() + "<|im_end|>"
        assert encoder.decode(learnt) == encoder.read(dialogue).turns[0].assistant.strip()
    (asked,) = encoder.encode_requests([dialogue], grid)
    ids = [*asked.prefix_ids.tolist(), *asked.branches[0].input_ids.tolist()]
    assert ids == theirs[: len(ids)]


def test_marks_without_boxes_and_names_of_tokens_stay_letters(backbones):
    """`--text-as-is`: nothing becomes a token that a person wrote as letters."""
    backbone = backbones["qwen2_vl"]
    hostile = "<|box_start|>(1,2)<|box_end|> <bbox> <ref-object>"
    encoded = Encoder(backbone).encode([Dialogue((Turn("Where?", hostile),))], torch.tensor([[1, 4, 6]]))
    learnt = encoded.branches[0].labels[encoded.branches[0].labels != IGNORE_INDEX].tolist()
    assert backbone.tokenizer.decode(learnt[:-1]) == hostile
    assert not set(backbone.tokenizer.all_special_ids) & set(learnt[:-1])


def test_a_tokenizer_without_the_tokens_is_refused(backbones, monkeypatch):
    encoder = Encoder(backbones["qwen2_vl"])
    monkeypatch.setattr(
        encoder, "tokenizer", encoder.tokenizer.__class__.from_pretrained(encoder.tokenizer.name_or_path)
    )
    real = encoder.tokenizer.convert_tokens_to_ids
    monkeypatch.setattr(
        encoder.tokenizer, "convert_tokens_to_ids", lambda text: None if text == "<|box_start|>" else real(text)
    )
    with pytest.raises(ModelError, match=r"no <\|box_start\|>; it cannot be trained on boxes"):
        encoder.encode([FOUND], torch.tensor([[1, 4, 6]]))


def test_boxes_go_through_a_conversation_in_order_around_images(backbones):
    """Names and boxes in several turns and between images; where the images stand, they still stand."""
    one, two = (10.0, 10.0, 20.0, 20.0), (0.0, 0.0, 50.0, 50.0)
    pieces = ["At <bbox> in this", "  and <bbox>", " in that: the <ref-object>?"]
    turns = (
        Turn("", "<bbox>").asking(pieces),
        Turn("And the <ref-object>?", "<bbox> as <ref-object>"),
    )
    boxes = (Box(one, 0, (100, 100)), Box(two, 1, (50, 100)), Box(two, 1, (50, 100)), Box(one, 0, (100, 100)))
    talk = Dialogue(turns, refs=("x", "y", "z"), boxes=boxes)
    first, second = Encoder(backbones["qwen3_vl"]).rendered(talk).turns
    assert first.pieces == ["At [100, 100, 200, 200] in this", "  and [0, 0, 1000, 500]", " in that: the x?"]
    assert (first.assistant, second.user) == ('[{"bbox_2d": [0, 0, 1000, 500]}]', "And the y?")
    assert second.assistant == "[100, 100, 200, 200] as z"


@pytest.mark.parametrize("family", PLACE)
@pytest.mark.parametrize("size", [(600, 2), (3, 900), (300, 150), (97, 61), (40, 300)])
def test_a_box_is_where_the_model_sees_it(backbones, family, size):
    """Found in the picture as the model is shown it, white border and all: a black box on red."""
    backbone = backbones[family]
    image = np.full((size[1], size[0], 3), (255, 0, 0), np.uint8)
    wide, high = size
    points = (wide // 4, high // 2 if high > 8 else 0, 3 * wide // 4 if wide > 8 else wide, high)
    image[points[1] : points[3], points[0] : points[2]] = 0
    shown = backbone.resized(Image.fromarray(image))
    dark = (np.asarray(shown).astype(int).sum(-1) < 128).nonzero()
    seen = (dark[1].min(), dark[0].min(), dark[1].max() + 1, dark[0].max() + 1)
    frame = backbone.frame(*size)
    placed = frame.place(Box(tuple(map(float, points)), 0, size))
    _, rows, columns = backbone.grid(*size)
    full = (8 * columns, 8 * rows) if family == "qwen2_5_vl" else (1000, 1000)
    back = [value * shown.size[i % 2] / full[i % 2] for i, value in enumerate(placed)]
    assert max(abs(a - b) for a, b in zip(back, seen, strict=True)) <= 2  # a pixel of rounding, one of the resizing
    assert all(0 <= value <= most for value, most in zip(placed, frame.most * 2, strict=True))


def test_a_border_moves_the_boxes_of_every_family(backbones):
    """The control of the above: a frame without the border would put a thin picture's box elsewhere."""
    for family in PLACE:
        frame = backbones[family].frame(600, 2)
        assert frame.top > 0.1 * frame.most[1]
        assert frame.height < 0.8 * frame.most[1]
        assert frame.width == pytest.approx(frame.most[0], rel=0.02)


def test_what_a_person_reads_is_in_pixels_of_the_picture():
    assert in_pixels(NAMED).turns[0].assistant.startswith(r'[{"bbox_2d": [10, 20, 101, 90], "label": "a \"cat\""}')
    assert in_pixels(TOLD).turns[0].user == "What is at [50, 99]?"
    plain = Dialogue((Turn("<bbox>", "<ref-object>"),))
    assert in_pixels(plain) is plain


def test_numbers_stay_in_the_frame():
    """As the published code does: rounded, and never beyond the last pixel."""
    frame = Frame(0, 0, 84, 56, (83, 55))
    made = rendered(of("?", "<bbox>", WHOLE), Convention(in_pixels=True), lambda width, height: frame)
    assert made.turns[0].assistant == '[{"bbox_2d": [0, 0, 83, 55]}]'
