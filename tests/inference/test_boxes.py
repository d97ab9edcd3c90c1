"""Answers that are boxes: asked, read and scored in each family's coordinates, compared, drawn, and never given away.

Run: pytest tests/inference/test_boxes.py
"""

import base64
import io
import json
import re
from dataclasses import replace

import httpx
import pytest
import torch
from PIL import Image

from tests.conftest import VISION, picture
from tests.test_report import Page
from vlm_lora import Box, Dialogue, Evaluation, Example, ImageRef, TrainConfig, Turn, evaluate, read_dataset, train
from vlm_lora.check.dataset import check_dataset
from vlm_lora.check.sheet import write_sheet
from vlm_lora.cli import main
from vlm_lora.errors import ConfigError
from vlm_lora.inference.caption import Decoding
from vlm_lora.inference.captioner import Captioner
from vlm_lora.inference.commonest import Commonest
from vlm_lora.inference.endpoint import Endpoint
from vlm_lora.inference.evaluate import against
from vlm_lora.inference.metrics.boxes import boxes_in, found, moved, overlap
from vlm_lora.inference.report import write_report
from vlm_lora.inference.review import review
from vlm_lora.inference.scores import Scores
from vlm_lora.inference.served import Trained
from vlm_lora.inference.verdict import summary
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.encode import Encoder
from vlm_lora.model.packing import IGNORE_INDEX

SQUARE = "[0, 0, 10, 10]"


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ('```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "a [cat]"}]\n```', [(1, 2, 30, 40)]),
        (
            "a dog(221,423),(569,886) and a cat(1,2),(3,4)(5,6),(7,8)",
            [(221, 423, 569, 886), (1, 2, 3, 4), (5, 6, 7, 8)],
        ),
        ("It is at [ 1.5,2 , -3,4].", [(1.5, 2, -3, 4)]),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6', [(1, 2, 3, 4)]),
        ("(1,2) and (3,4)", []),
        ('{"point_2d": [1, 2]}', []),
        ("[1, 2, 3]", []),
        ("[1, 2, 3, 4, 5]", []),
        ("nowhere", []),
    ],
)
def test_boxes_are_read_in_the_words_of_every_family(text, boxes):
    assert boxes_in(text) == boxes


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (0, 5, 10, 15), 1 / 3),
        ((0, 0, 10, 10), (2, 2, 4, 7), 0.1),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0),
        ((0, 0, 10, 10), (20, 20, 30, 30), 0),
        ((0, 0, 10, 10), (10, 10, 0, 0), 0),
        ((5, 5, 5, 9), (5, 5, 5, 9), 0),
    ],
)
def test_overlap_is_intersection_over_union_in_any_coordinates(one, other, share):
    assert overlap(one, other) == overlap(other, one) == pytest.approx(share)
    stretched = [(x1 * 7, y1 * 3, x2 * 7, y2 * 3) for x1, y1, x2, y2 in (one, other)]
    assert overlap(*stretched) == pytest.approx(share)


@pytest.mark.parametrize(
    ("answer", "reference", "scores"),
    [
        (SQUARE, SQUARE, (1, 1, 1)),
        ("[0, 0, 10, 5]", SQUARE, (1, 0.5, 1)),
        ("[0, 0, 10, 4.9]", SQUARE, (0, 0.49, 1)),
        ("in the corner", SQUARE, (0, 0, 0)),
        ("(1,2)", SQUARE, (0, 0, 0)),
        ("", SQUARE, (0, 0, 0)),
        (f"{SQUARE} [20, 20, 30, 30]", SQUARE, (0.5, 0.5, 1)),  # one too many
        (SQUARE, f"{SQUARE} [20, 20, 30, 30]", (0.5, 0.5, 1)),  # one missed
        (f"{SQUARE} {SQUARE}", f"{SQUARE} [20, 20, 30, 30]", (0.5, 0.5, 1)),  # said twice, right once
        ("[20, 20, 30, 30] [0, 0, 10, 10]", f"{SQUARE} [20, 20, 30, 30]", (1, 1, 1)),  # in another order
        ("[0, 0, 10, 8] [0, 0, 10, 10]", "[0, 0, 10, 9] [0, 0, 10, 10]", (1, (1 + 8 / 9) / 2, 1)),  # the best first
        ("[5, 5, 5, 9]", "[5, 5, 5, 9]", (1, 1, 1)),  # so small that rounding leaves nothing
    ],
)
def test_an_answer_against_a_reference(answer, reference, scores):
    assert found(answer, [reference]) == pytest.approx(scores)
    assert found(answer, ["[900, 900, 990, 990]", reference]) == pytest.approx(scores)


def test_boxes_are_moved_between_coordinates():
    assert moved("a (10,20),(30,40) b [0, 0, 100, 50] c", (0, 0, 100, 50), (5, 0, 1000, 100)) == (
        "a (105.0, 40.0, 305.0, 80.0) b (5.0, 0.0, 1005.0, 100.0) c".replace("(", "[").replace(")", "]")
    )


class Seer:
    """A model of a family that says what it is told to: ``say(encoder, box)`` of base and of tuned."""

    quantised = False

    def __init__(self, backbone, truth, say, tuned=True):
        self.encoder, self.backbone, self.truth, self.say, self.tuned = Encoder(backbone), backbone, truth, say, tuned
        self.asked = []

    def respond(self, asked, *, tuned, decoding=None):
        self.room = decoding and decoding.max_new_tokens
        self.asked += [request for _, requests in asked for request in requests]
        return [
            [self.say[tuned](self.encoder, self.truth[images[0].name]) for _ in requests] for images, requests in asked
        ]

    def read(self, dialogue):
        return self.encoder.read(dialogue)

    def frame(self, width, height):
        return self.backbone.frame(width, height)


def said(encoder, box, shift=0.0):
    """As the family says it, without its tokens; perhaps to the right by a share of the picture."""
    points = tuple(value + shift * box.size[0] * (i % 2 == 0) for i, value in enumerate(box.points))
    return encoder.read(Dialogue((Turn("", "<bbox>"),), boxes=(replace(box, points=points),))).turns[0].assistant


def examples_of(folder, count=24, size=(180, 90)):
    truth, examples = {}, []
    for i in range(count):
        path = folder / f"{i}.png"
        Image.new("RGB", size, "white").save(path)
        left = size[0] * (i % 4) / 6  # so far apart that one guess for all is right in a quarter of them
        box = truth[path.name] = Box((left, 0.1 * size[1], left + 0.4 * size[0], 0.7 * size[1]), 0, size)
        talk = Dialogue((Turn("Find the <ref-object>.", "<bbox>"),), refs=("cat",), boxes=(box,))
        examples.append(Example(str(i), (ImageRef(path, path.name),), (talk,), f"data:{i}"))
    return truth, examples


@pytest.fixture(scope="module")
def backbones(checkpoints):
    return {family: load_backbone(str(folder)) for family, folder in checkpoints.items()}


@pytest.mark.parametrize("family", VISION)
def test_a_model_that_finds_everything_has_helped_and_one_that_says_pixels_of_the_file_has_not(
    backbones, tmp_path, family
):
    truth, examples = examples_of(tmp_path)
    off = lambda encoder, box: said(encoder, box, 0.3)  # noqa: E731
    right = Seer(backbones[family], truth, {False: off, True: said})
    evaluation = evaluate(right, examples)
    (scores,) = [evaluation.scores.tasks["boxes"]]
    assert [scores.scores["tuned"][key] for key in ("box_hit", "box_iou", "box_read")] == [1, 1, 1]
    assert scores.scores["base"]["box_hit"] == 0
    assert 0 < scores.scores["base"]["box_iou"] < 0.5
    assert summary(evaluation.scores)[0].startswith(
        "Tuning helped: on 24 held-out images, boxes right (IoU 0.5) rose from 0.0"
    )
    wrong = lambda encoder, box: json.dumps(list(map(int, box.points)))  # noqa: E731
    lost = evaluate(Seer(backbones[family], truth, {False: said, True: wrong}), examples).scores
    assert lost.tasks["boxes"].scores["tuned"]["box_hit"] == 0
    assert summary(lost)[0].startswith("Tuning did harm")
    mute = lambda encoder, box: "I see a cat."  # noqa: E731
    none = evaluate(Seer(backbones[family], truth, {False: said, True: mute}), examples).scores
    assert none.tasks["boxes"].scores["tuned"]["box_read"] == none.tasks["boxes"].scores["tuned"]["box_iou"] == 0


def test_the_answer_is_not_given_away_and_questions_keep_their_boxes(backbones, tmp_path):
    truth, (example, *_) = examples_of(tmp_path, 1)
    box, other = truth["0.png"], Box((9.0, 18.0), 0, (180, 90))
    turns = (Turn("At <bbox>, the <ref-object>?", "<bbox>"), Turn("And <bbox>?", "<bbox> is <ref-object>"))
    talk = Dialogue(turns, refs=("cat", "dog"), boxes=(box, box, other, box))
    speaker = Seer(backbones["qwen3_vl"], truth, {False: said}, tuned=False)
    evaluation = evaluate(speaker, [replace(example, dialogues=(talk,))])
    (asked,) = set(speaker.asked)
    assert (asked.refs, asked.boxes) == (("cat",), (box, box, other))
    assert [turn.assistant for turn in asked.turns] == ["<bbox>", ""]
    (row,) = evaluation.answered
    assert row.question == "And [50, 200]?"
    assert row.references == ("[0, 100, 400, 700] is dog",)
    encoded = speaker.encoder.encode_requests([asked], torch.tensor([[1, 8, 16]]))[0]
    text = speaker.encoder.tokenizer.decode([*encoded.prefix_ids, *encoded.branches[0].input_ids])
    assert "At [0, 100, 400, 700], the cat?" in text
    assert "dog" not in text


def test_dialogues_that_ask_the_same_are_one_question(backbones, tmp_path):
    truth, (example, *_) = examples_of(tmp_path, 1)
    first = example.dialogues[0]
    second = replace(first, boxes=(replace(first.boxes[0], points=(0.0, 0.0, 9.0, 9.0)),))
    speaker = Seer(backbones["qwen2_5_vl"], truth, {False: said}, tuned=False)
    (row,) = evaluate(speaker, [replace(example, dialogues=(second, first))]).answered
    assert len(row.references) == 2
    assert row.base == row.references[1]


def test_what_is_no_box_is_scored_as_before(backbones, tmp_path):
    """Points, a box in the question alone, numbers in brackets; and Qwen's JSON as it stands is boxes."""
    truth, (example, *_) = examples_of(tmp_path, 1)
    point = Box((1.0, 2.0), 0, (180, 90))
    talks = (
        Dialogue((Turn("Where?", "<bbox>"),), boxes=(point,)),
        Dialogue((Turn("What is at <bbox>?", "a cat"),), boxes=truth["0.png"] and (truth["0.png"],)),
        Dialogue((Turn("Roots?", "[1, 2, 3, 4]"),)),
        Dialogue((Turn("Find.", '[{"bbox_2d": [1, 2, 3, 4], "label": "x"}]'),)),
    )
    speaker = Seer(backbones["qwen3_vl"], truth, {False: said}, tuned=False)
    evaluation = evaluate(speaker, [replace(example, dialogues=talks)])
    assert [row.task for row in evaluation.answered] == ["json", "answers", "json", "boxes"]
    assert [len(row.frames) for row in evaluation.answered] == [0, 0, 0, 1]


def test_two_points_of_qwen2_vl_are_no_box_though_they_look_like_one(backbones, tmp_path):
    truth, (example, *_) = examples_of(tmp_path, 1)
    points = (Box((1.0, 2.0), 0, (180, 90)), Box((90.0, 45.0), 0, (180, 90)))
    talk = Dialogue((Turn("Where?", "<bbox>,<bbox>"),), boxes=points)
    speaker = Seer(backbones["qwen2_vl"], truth, {False: said}, tuned=False)
    (row,) = evaluate(speaker, [replace(example, dialogues=(talk,))]).answered
    assert (row.references, row.task) == (("(6,22),(500,500)",), "answers")


def test_long_answers_with_boxes_are_not_cut_off(backbones, tmp_path):
    """Ten boxes in JSON are 300 tokens, and the usual limit is 64."""
    truth, examples = examples_of(tmp_path, 2)
    long = replace(examples[0].dialogues[0], boxes=examples[0].dialogues[0].boxes * 10)
    long = replace(long, turns=(replace(long.turns[0], assistant="<bbox>" * 10),))
    many = [replace(examples[0], dialogues=(long,)), examples[1]]
    for family in VISION:
        speaker = Seer(backbones[family], truth, {False: said, True: said})
        answer = speaker.encoder.rendered(long).turns[0].assistant
        evaluation = evaluate(speaker, many)
        tokens = speaker.encoder.encode([long], torch.tensor([[1, 8, 16]])).branches[0].labels
        assert speaker.room > int((tokens != IGNORE_INDEX).sum()), answer
        against(evaluation, speaker, many)
        assert speaker.room > int((tokens != IGNORE_INDEX).sum())
        evaluate(speaker, many, decoding=Decoding(max_new_tokens=7))
        assert speaker.room == 7
    plain = replace(examples[0], dialogues=(Dialogue((Turn("What?", "a cat"),)),))
    evaluate(speaker, [plain])
    assert speaker.room is None


def test_an_evaluation_is_read_again_as_it_was_written(backbones, tmp_path):
    truth, examples = examples_of(tmp_path)
    evaluation = evaluate(Seer(backbones["qwen2_5_vl"], truth, {False: said, True: said}), examples)
    evaluation.write(tmp_path / "out")
    again = Evaluation.read(tmp_path / "out", examples)
    assert again.answered == evaluation.answered
    assert again.answered[0].frames == ((0, 0, 128, 64),)
    assert Scores.from_json(json.loads(json.dumps(evaluation.scores.to_json()))) == evaluation.scores


def test_two_adapters_that_see_other_sizes_are_compared_in_the_same_places(checkpoints, tmp_path):
    """Pixels of Qwen2.5-VL are those of the resized image: the other adapter's are other ones, and as right."""
    truth, examples = examples_of(tmp_path)
    large = load_backbone(str(checkpoints["qwen2_5_vl"]))
    small = load_backbone(str(checkpoints["qwen2_5_vl"]), max_pixels=32 * 64)
    assert large.frame(180, 90) != small.frame(180, 90)
    evaluation = evaluate(Seer(large, truth, {False: said, True: said}), examples)
    beside = against(evaluation, Seer(small, truth, {True: said}), examples)
    assert beside.tasks["boxes"].scores["base"]["box_hit"] == 1
    assert beside.tasks["boxes"].scores["base"]["box_iou"] > 0.93  # but for its rounding
    two = [replace(example, images=example.images * 2) for example in examples]
    evaluation = evaluate(Seer(large, truth, {False: said, True: said}), two)
    assert against(evaluation, Seer(large, truth, {True: said}), two).tasks["boxes"].scores["base"]["box_hit"] == 1
    with pytest.raises(ConfigError, match="speak of boxes in other coordinates"):
        against(evaluation, Seer(small, truth, {True: said}), two)


def test_the_commonest_answer_is_in_the_models_words(backbones, tmp_path):
    _, examples = examples_of(tmp_path, 2)
    encoder = Encoder(backbones["qwen3_vl"])
    often = Commonest.of([examples[1]] * 3 + [examples[0]], "Describe.", "training", encoder.read)
    assert often.of_task == {"boxes": encoder.read(examples[1].dialogues[0]).turns[0].assistant}
    assert "bbox_2d" in often.of_task["boxes"]


def colours(uri: str) -> set:
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
    return {colour for _, colour in image.getcolors(1 << 16)}


GREEN, ORANGE, BLUE, WHITE = (0, 128, 0), (255, 165, 0), (0, 0, 255), (255, 255, 255)


def test_boxes_are_drawn_in_the_report_where_they_are(backbones, tmp_path):
    truth, examples = examples_of(tmp_path, size=(120, 60))  # small ones are PNG, with colours as they are
    off = lambda encoder, box: said(encoder, box, 0.2)  # noqa: E731
    wild = lambda encoder, box: "[900, 10, 20, 30] [-5, -5, 99999, 7] and [0,0,0,0]"  # noqa: E731
    speaker = Seer(backbones["qwen2_5_vl"], truth, {False: off, True: said})
    page = Page(write_report(tmp_path, evaluate(speaker, examples), title="x"))
    pictures = [each["src"] for each in page.named("img")]
    assert colours(pictures[0]) == {WHITE, ORANGE, BLUE}  # tuned's lies on the data's
    image = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2]))).convert("RGB")
    blue = [(x, y) for x in range(120) for y in range(60) if image.getpixel((x, y)) == BLUE]
    number = int(re.search(r"\d+", page.named("img")[0]["alt"])[0])
    corners = [f([place[i] for place in blue]) for f in (min, max) for i in (0, 1)]
    wanted = examples[number].dialogues[0].boxes[0].points
    assert max(abs(a - b) for a, b in zip(corners, wanted, strict=True)) <= 2
    assert "Boxes in the pictures: green the data's, orange base's, blue tuned's." in page.text
    speaker = Seer(backbones["qwen2_5_vl"], truth, {False: wild, True: off})
    page = Page(write_report(tmp_path, evaluate(speaker, examples), title="x"))
    assert colours(page.named("img")[0]["src"]) >= {WHITE, GREEN, BLUE}
    alone = evaluate(Seer(backbones["qwen2_5_vl"], truth, {False: off}, tuned=False), examples)
    page = Page(write_report(tmp_path, alone, title="x"))
    assert "Boxes in the pictures: green the data's, orange base's." in page.text
    large, pictured = examples_of(tmp_path, 1, size=(800, 400))
    right = evaluate(Seer(backbones["qwen2_5_vl"], large, {False: off, True: said}), pictured)
    image = Page(write_report(tmp_path, right, title="x")).named("img")[0]["src"]
    assert sum(g > r + 60 and g > b + 60 for r, g, b in colours(image)) > 3  # a rim of the data's around tuned's


def test_boxes_are_drawn_on_the_contact_sheet(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Find the <ref-object>", "answer": "<bbox> or <bbox>"}
    row["objects"] = {"ref": ["<b>cat"], "bbox": [[20, 30, 120, 80], [200, 50]]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    check = check_dataset(read_dataset(tmp_path / "x.jsonl"), thumbnails=9)
    write_sheet(tmp_path / "x.html", check, check.facts(), title="x")
    page = Page(tmp_path / "x.html")
    box, point = page.named("i")
    assert box["style"] == "left: 10.00%; top: 30.00%; width: 50.00%; height: 50.00%"
    assert (point["class"], point["style"]) == ("point", "left: 100.00%; top: 50.00%")
    assert "Find the <b>cat [20, 30, 120, 80] or [200, 50]" in page.text
    assert check.facts()["repeated"] == []


def rows(folder, count=12):
    lines = []
    for i in range(count):
        picture(i, (96, 64 + i)).save(folder / f"{i}.png")
        objects = {"ref": ["blob"], "bbox": [[5 + i, 5, 60 + i, 40], [9, 9, 30, 30]]}
        talk = [{"role": "user", "content": "Find the <ref-object> and the one at <bbox>."}]
        talk.append({"role": "assistant", "content": "<bbox>"})
        lines.append(json.dumps({"images": [f"{i}.png"], "messages": talk, "objects": objects}))
    (folder / "x.jsonl").write_text("\n".join(lines))
    return folder / "x.jsonl"


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.long] * (f not in ("qwen2_vl", "qwen2_5_vl"))) for f in VISION]
)
def test_a_run_learns_boxes_and_says_what_came_of_it(checkpoints, tmp_path, family, capsys):
    """The whole way: training, comparison, report, `eval` again, `check` with tokens, `--review`."""
    data, run = rows(tmp_path), tmp_path / "run"
    result = train(
        TrainConfig(
            data=str(data), model=str(checkpoints[family]), output=str(run), max_steps=2, batch_size=2, val_split=0.3,
            rank=2, cache=False,
        )
    )  # fmt: skip
    (task,) = result.evaluation.scores.tasks
    assert task == "boxes"
    form = r"\d+,\d+\),\(\d+,\d+" if family == "qwen2_vl" else r'^\[\{"bbox_2d": \[\d+, \d+, \d+, \d+\]\}\]$'
    for row in result.evaluation.answered:
        assert re.search(form, row.references[0])
        assert re.search(form, row.commonest)
        assert "<bbox>" not in row.question + row.references[0]
        assert "blob" in row.question
    assert "Boxes in the pictures" in (run / "report.html").read_text()
    assert main(["eval", str(data), "--adapter", str(run), "--json", "--max-new-tokens", "4"]) == 0
    assert list(json.loads(capsys.readouterr().out)["tasks"]) == ["boxes"]
    assert main(["check", str(data), "--model", str(checkpoints[family]), "--json"]) == 0
    sample = "".join(part["text"] for part in json.loads(capsys.readouterr().out)["tokens"]["sample"] if part["learnt"])
    assert ("<|box_start|>(" in sample) == (family == "qwen2_vl")
    reviewed = review(Captioner.load(adapter=run), read_dataset(data).examples[:1])
    assert re.search(form, reviewed[0].answer)


def test_a_server_is_asked_in_the_coordinates_of_the_model(checkpoints, tmp_path, monkeypatch):
    """With the tokens as it reads them: it counts as many as we do. Without --adapter nothing tells of the family."""
    data, run = rows(tmp_path), tmp_path / "run"
    config = TrainConfig(
        data=str(data), model=str(checkpoints["qwen2_vl"]), output=str(run), max_steps=1, batch_size=2, cache=False,
        val_split=0.0,
    )  # fmt: skip
    train(config)
    trained = Trained.load(run)
    sent = []

    def send(self, method, path, body, attempts=1):
        if body is None:
            return httpx.Response(200, json={"data": [{"id": "x"}]})
        parts = [
            {"role": m["role"], "content": [p if p["type"] == "text" else {"type": "image"} for p in m["content"]]}
            for m in body["messages"]
        ]
        urls = [p["image_url"]["url"] for m in body["messages"] for p in m["content"] if p["type"] == "image_url"]
        pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB") for url in urls]
        processor = trained.preprocessor.processor
        text = processor.apply_chat_template(parts, add_generation_prompt=True)
        sent.append(text)
        tokens = len(processor(text=[text], images=pictures)["input_ids"][0])
        reply = {"choices": [{"message": {"content": "(1,2),(3,4)"}}], "usage": {"prompt_tokens": tokens}}
        return httpx.Response(200, json=reply)

    monkeypatch.setattr(Endpoint, "_send", send)
    examples = read_dataset(data).examples[:2]
    evaluation = evaluate(Endpoint("http://127.0.0.1:1/v1", model="x", trained=trained), examples)
    wanted = "<|object_ref_start|>blob<|object_ref_end|> and the one at <|box_start|>(52,78),(625,625)<|box_end|>."
    assert any(wanted in text for text in sent)  # requests go out side by side
    assert evaluation.answered[0].base == "(1,2),(3,4)"
    assert evaluation.answered[0].references == ("(94,141),(312,469)",)
    bare = Endpoint("http://127.0.0.1:1/v1", model="x")
    with pytest.raises(ConfigError, match="say what it was trained with by --adapter RUN"):
        evaluate(bare, examples)
    as_is = Dialogue((Turn("Find.", '[{"bbox_2d": [1, 2, 3, 4]}]'),))
    assert list(evaluate(bare, [replace(examples[0], dialogues=(as_is,))]).scores.tasks) == ["boxes"]
    (refused,) = bare.respond([(examples[0].images, list(examples[0].dialogues))], decoding=Decoding())
    assert "say what it was trained with" in str(refused)
