"""Every field of a row has its effect, or is named as unused, or makes the row bad; a row for each way to lose one.

Run: pytest tests/data/test_fields.py
"""

import json
from dataclasses import replace

import pytest

from tests.data.test_shards import write_tar
from vlm_lora.check.clean import write_clean
from vlm_lora.cli import main
from vlm_lora.config import TrainConfig
from vlm_lora.data.example import Dialogue, Turn
from vlm_lora.data.readers import read_dataset
from vlm_lora.errors import DataError
from vlm_lora.training.prepare import no_usable_example, read_and_split

PROMPT = "Describe this image."
CAPTION = {"image": "a.png", "caption": "a fox"}
ASKED = {"image": "a.png", "question": "What?", "answer": "a fox"}


def chat(*said, **more):
    """Messages of user and assistant in turn, texts or dictionaries."""
    roles = ("user", "assistant") * len(said)
    messages = [
        {"role": role} | (each if isinstance(each, dict) else {"content": each})
        for role, each in zip(roles, said, strict=False)
    ]
    return {"images": ["a.png"], "messages": messages} | more


def dialogues(dataset):
    return [replace(d, source="", line=None) for example in dataset.examples for d in example.dialogues]


TRAPS = {
    "a video": (CAPTION | {"videos": ["a.mp4"]}, "'videos' that is not used here: moving pictures"),
    "sound": (chat("a", "b", audios=["a.wav"]), "'audios' that is not used"),
    "a video alone": ({"video": "a.mp4", "question": "What?", "answer": "x"}, "'video' that is not used"),
    "a crop": (CAPTION | {"crop": [0, 0, 9, 9]}, "'crop' that is not used here: a part of the picture is meant"),
    "a box of no shape known": (CAPTION | {"bbox": [0, 0, 9, 9]}, "'bbox' that is not used"),
    "tools": (chat("a", "b", tools=[{"name": "x"}]), "'tools' that is not used here: calls of tools"),
    "a call of a tool": (chat("a", {"content": "b", "tool_calls": [1]}), "'tool_calls' in a message that is not used"),
    "a thought": (chat("a", {"content": "b", "reasoning_content": "hm"}), "'reasoning_content' in a message"),
    "what the question is about": (ASKED | {"context": "The fox ran."}, "'context' that is not used here: it bel"),
    "a preference": (ASKED | {"rejected": "a dog"}, "'rejected' that is not used here: it says what to prefer"),
    "a second image": (CAPTION | {"picture": {"caption": "x"}}, "questions and answers are inside of it"),
    "questions inside": (
        CAPTION | {"qa": [{"question": "Q", "answer": "A"}]},
        "'qa' that is not used .* are inside of it",
    ),
    "an image of another name": ({"bild": "a.png", "question": "Q", "answer": "A"}, "'bild' .*: it names an image"),
    "a size of its own": (
        chat([{"type": "image", "image": "a.png", "max_pixels": 9}, {"type": "text", "text": "a"}], "b", images=[]),
        "'max_pixels' in a part of a message that is not used",
    ),
    "a split of another name": (CAPTION | {"subset": "test"}, "'subset' .*: it says 'test', and the row would be"),
    "a split nobody knows": (CAPTION | {"split": "fold 3"}, "its split is 'fold 3'; expected train, val or test"),
    "a weight that is none": (CAPTION | {"weight": "12 kg"}, "its weight is '12 kg'; expected a number from 0 to"),
    "a weight below zero": (CAPTION | {"weight": -1}, "its weight is -1; expected a number"),
    "a weight of nothing": (CAPTION | {"weight": 0}, "has no answer that is learnt"),
    "no loss at all": (chat("a", {"content": "b", "loss": False}), "has no answer that is learnt"),
    "loss of what a user says": (chat({"content": "a", "loss": True}, "b"), "asks for the user's own words"),
    "a loss in words": (chat("a", {"content": "b", "loss": "a bit"}), "its loss is 'a bit'; expected a number"),
    "a part of an answer": (chat("a", {"content": "b", "train_detail": [1]}), "'train_detail' in a message"),
    "two system prompts": (
        {"images": ["a.png"], "system": "one", "messages": [{"role": "system", "content": "two"}]}
        | {"messages": [{"role": "system", "content": "two"}, *chat("a", "b")["messages"]]},
        "a system prompt both inside its messages and beside them",
    ),
    "a system prompt that is none": (CAPTION | {"system": 7}, "the system prompt is no text but int"),
    "a mark of a video": (chat("<video>What?", "b"), "has '<video>' in a text, and nothing that goes with it"),
    "a mark of sound": (CAPTION | {"caption": "it says <audio>"}, "has '<audio>' in a text"),
    "Qwen-VL's image": (chat("<img>a.png</img>What?", "b"), "has '<img>a.png</img>' in a text"),
    "Phi's image": (chat("<|image_1|>What?", "b"), r"has '<\|image_1\|>' in a text"),
    "a placeholder": (ASKED | {"question": "<|vision_start|><|image_pad|><|vision_end|>Q"}, "has .*vision_start"),
    "a box without boxes": (chat("Find it.", "<ref-object>: <bbox>"), "has '<ref-object>' in a text"),
    "Qwen2-VL's box": (chat("Find.", "<|box_start|>(1,2),(3,4)<|box_end|>"), r"has '<\|box_start\|>' in a text"),
    "an image in an answer": (chat("Draw.", "<image>"), "has '<image>' in a text"),
    "pandas' nothing": (CAPTION | {"caption": "nan"}, "the text to learn is 'nan', as programs write"),
    "a list of no columns": (CAPTION | {"mask": ["x.png"]}, "'mask' that is not used"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_field_that_means_something_is_no_row_less(trap, read):
    import re

    row, reason = TRAPS[trap]
    dataset = read(row, CAPTION)
    (bad,) = dataset.bad
    assert re.search(reason, bad.reason), bad.reason
    assert (bad.source, bad.line, "\n" in bad.reason) == ("x.jsonl", 1, False)
    assert len(dialogues(dataset)) == 1


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_null_and_empty_is_no_field(empty, read):
    names = ("videos", "tools", "bbox", "weight", "split", "system", "license")
    dataset = read(CAPTION | dict.fromkeys(names, empty) if empty in (None, "") else CAPTION | {"videos": empty})
    assert (dataset.bad, dataset.unused) == ((), {})
    assert dialogues(dataset) == [Dialogue((Turn(PROMPT, "a fox"),))]


def test_a_column_to_ignore_is_as_if_it_were_not_there(read):
    rows = [CAPTION | {"videos": [1], "weight": "12 kg"}, chat("a", {"content": "b", "train_detail": [1]})]
    dataset = read(*rows, ignore_columns="videos, weight,train_detail")
    assert (dataset.bad, dataset.unused, len(dialogues(dataset))) == ((), {}, 2)
    assert len(read(*rows, ignore_columns=["videos"]).bad) == 2


@pytest.mark.parametrize(("number", "end"), [(12, "'c12' in 1)"), (13, "'c12' in 1 and 1 more)")])
def test_of_many_unused_columns_twelve_are_named(number, end, read):
    dataset = read(ASKED | {f"c{i:02}": 1 for i in range(1, number + 1)})
    assert dataset.taken_for.endswith(end)


def test_other_columns_are_named_once_with_counts(read, capsys, pictures):
    rows = [ASKED | {"id": 1, "license": "CC"}, ASKED | {"id": 2}, chat({"content": "a", "name": "Ann"}, "b")]
    dataset = read(*rows)
    assert dataset.unused == {"id": 2, "license": 1, "name": 1}
    assert dataset.taken_for.endswith(
        "unused columns, and rows that have them: 'id' in 2, 'license' in 1, 'name' in 1)"
    )
    assert main(["check", str(pictures() / "x.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "unused columns, and how many rows have them: 'id' in 2, 'license' in 1, 'name' in 1\n" in out
    assert main(["check", str(pictures() / "x.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unused"] == dataset.unused


def test_fields_of_coco_vqa_and_tar_are_accounted_for_too(pictures):
    folder = pictures("a.png")
    images = [{"id": 1, "file_name": "a.png", "width": 8, "height": 6, "license": 3, "mood": "grim"}]
    said = [{"id": 1, "image_id": 1, "caption": "x", "rater": 5}, {"id": 2, "image_id": 1, "caption": "y", "bbox": [1]}]
    (folder / "c.json").write_text(json.dumps({"images": images, "annotations": said}))
    dataset = read_dataset(folder / "c.json", prompt=PROMPT)
    assert (dataset.unused, len(dialogues(dataset))) == ({"mood": 1, "rater": 1}, 1)
    assert [bad.reason[:60] for bad in dataset.bad] == ["annotation 2 (id 2): has a field 'bbox' that is not used her"]
    (folder / "q_questions.json").write_text(
        json.dumps({"questions": [{"question_id": 1, "image": "a.png", "question": "Q", "difficulty": 3}]})
    )
    (folder / "q_annotations.json").write_text(
        json.dumps({"annotations": [{"question_id": 1, "answers": ["x"], "context": "it is dark"}]})
    )
    dataset = read_dataset(folder / "q_questions.json", prompt=PROMPT)
    assert [("'context'" in bad.reason) for bad in dataset.bad] == [True]
    image = (folder / "a.png").read_bytes()
    members = [("0.png", image), ("0.txt", "x"), ("0.cls", "3"), ("0.mask.png", image)]
    shard = write_tar(folder / "x.tar", [*members, ("1.png", image), ("1.txt", "x"), ("1.mp4", "y")])
    dataset = read_dataset(shard, prompt=PROMPT)
    assert dataset.unused == {"cls": 1, "mask.png": 1}
    assert ["'mp4' that is not used" in bad.reason for bad in dataset.bad] == [True]


def test_an_image_that_is_not_the_one_that_is_read_makes_a_row_bad(pictures):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = pictures("a.png", "b.png")
    cell = {name: {"bytes": (folder / f"{name}.png").read_bytes(), "path": None} for name in "ab"}
    pq.write_table(pa.Table.from_pylist([{"image": cell["a"], "depth": cell["b"], "text": "x"}]), folder / "x.parquet")
    (bad,) = read_dataset(folder / "x.parquet", prompt=PROMPT).bad
    assert "'depth' that is not used here: it holds an image" in bad.reason
    assert read_dataset(folder / "x.parquet", prompt=PROMPT, ignore_columns="depth").bad == ()


# -- what a field does --------------------------------------------------------------------------------------------


def test_a_prompt_beside_a_caption_is_its_question(read):
    dataset = read(
        CAPTION | {"prompt": "Say it."}, CAPTION | {"prompt": None}, CAPTION | {"instruction": "<image>Tell."}
    )
    asked = [dialogue.turns[0].user for dialogue in dialogues(dataset)]
    assert (asked, dataset.unused) == (["Say it.", PROMPT, "Tell."], {})
    assert dataset.note == "captions: image from 'image', caption from 'caption', question from 'prompt'"


def test_columns_of_question_and_answer_take_each_row_once(read):
    rows = [{"image": "a.png", "prompt": "Say it.", "caption": "a fox"}, CAPTION | {"prompt": "Tell."}]
    for columns in ("question=prompt,answer=caption", "question=prompt", {"question": "prompt", "caption": "caption"}):
        found = [(d.turns[0].user, d.turns[0].assistant) for d in dialogues(read(*rows, columns=columns))]
        assert found == [("Say it.", "a fox"), ("Tell.", "a fox")], columns


def test_rows_marked_test_or_val_are_not_trained_on(pictures, read):
    marks = ["train", "Validation", "TEST", None, "dev"]
    rows = [
        {"image": f"{name}.png", "caption": f"{mark}", "split": mark} for name, mark in zip("abcab", marks, strict=True)
    ]
    dataset = read(*rows[:4])
    sides = [[d.turns[0].assistant for e in side for d in e.dialogues] for side in (dataset.examples, dataset.val)]
    assert sides == [["train", "None"], ["Validation"]]
    assert [e.dialogues[0].turns[0].assistant for e in dataset.test] == ["TEST"]
    assert "1 examples are marked val and never trained on; 1 examples are marked test" in dataset.taken_for
    file = str(pictures() / "x.jsonl")
    data = read_and_split(TrainConfig(data=file))
    assert [len(data.train), [e.id for e in data.held_out], data.bad_rows] == [1, ["b.png"], ()]
    assert [e.id for e in dataset.part("test", "val").examples] == ["c.png", "b.png"]
    # An image on both sides is a bad row of the training data, as with --val
    data = read_and_split(TrainConfig(data=file))
    read(*rows, {"image": "c.png", "caption": "leaks"})
    data = read_and_split(TrainConfig(data=file))
    assert [("held-out data too" in bad.reason, bad.line) for bad in data.bad_rows] == [(True, 6)]
    read(rows[2])
    assert str(no_usable_example(TrainConfig(data="x"), [])) == "x: no usable example in it."
    with pytest.raises(DataError, match="1 examples are marked val or test"):
        read_and_split(TrainConfig(data=file))


def test_check_counts_marked_rows_as_held_out_and_a_clean_copy_keeps_them(read, pictures, tmp_path, capsys):
    rows = [
        CAPTION,
        {"image": "b.png", "caption": "b", "split": "val"},
        {"image": "c.png", "caption": "c", "split": "test"},
    ]
    read(*rows)
    assert main(["check", str(pictures() / "x.jsonl"), "--json", "--write-clean", str(tmp_path / "clean")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["answers"], facts["held_out"]["answers"]) == (1, 2)
    copy = read_dataset(tmp_path / "clean", prompt=PROMPT)
    assert [len(side) for side in (copy.examples, copy.val, copy.test)] == [1, 1, 1]


SYSTEM = "Be terse."
SAYS_SYSTEM = {
    "captions": CAPTION | {"system": SYSTEM},
    "qa": ASKED | {"system_prompt": SYSTEM},
    "messages, beside": chat("a", "b", system=SYSTEM),
    "messages, first": {
        "images": ["a.png"],
        "messages": [{"role": "developer", "content": [{"type": "text", "text": SYSTEM}]}, *chat("a", "b")["messages"]],
    },
    "LLaVA": {
        "image": "a.png",
        "system": SYSTEM,
        "conversations": [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}],
    },
    "Alpaca": {"image": "a.png", "instruction": "a", "input": "b", "output": "c", "system": SYSTEM},
    "ms-swift": {"images": ["a.png"], "query": "a", "response": "b", "system": SYSTEM, "history": [["x", "y"]]},
}


@pytest.mark.parametrize("shape", SAYS_SYSTEM)
def test_a_system_prompt_is_one_in_every_format(shape, read):
    (dialogue,) = dialogues(read(SAYS_SYSTEM[shape], system="Another."))
    assert dialogue.system == SYSTEM
    assert SYSTEM not in dialogue.turns[0].user
    (dialogue,) = dialogues(read(CAPTION, system=SYSTEM))
    assert dialogue.system == SYSTEM


@pytest.mark.parametrize("spelled", ["loss", "train", "training", "weight", "loss_scale"])
def test_a_message_of_no_loss_is_not_learnt(spelled, read):
    row = chat(
        {"content": "a", spelled: 0}, {"content": "wrong", spelled: False}, "c", {"content": "right", spelled: 1}
    )
    row["messages"][0].pop(spelled)
    (dialogue,) = dialogues(read(row))
    assert [turn.weight for turn in dialogue.turns] == [0.0, 1.0]
    (dialogue,) = dialogues(read(row | {"weight": "0.5"}))
    assert [turn.weight for turn in dialogue.turns] == [0.0, 0.5]


def test_the_last_answer_alone_is_learnt_where_it_is_asked_for(read):
    row = chat("a", "b", "c", "d")
    assert [turn.weight for turn in dialogues(read(row, train_on="last"))[0].turns] == [0.0, 1.0]
    assert [turn.weight for turn in dialogues(read(row))[0].turns] == [1.0, 1.0]


def test_prompt_and_completion_of_trl_learn_the_completion(read):
    prompt = chat("a", "b", "c")["messages"]
    row = {"images": ["a.png"], "prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}
    (dialogue,) = dialogues(read(row))
    assert dialogue.turns == (Turn("a", "b", weight=0.0), Turn("c", "d"))
    (dialogue,) = dialogues(read({"image": "a.png", "prompt": "a", "completion": "b"}))
    assert dialogue.turns == (Turn("a", "b"),)
    (dialogue,) = dialogues(read({"images": ["a.png"], "messages": json.dumps(chat("a", "b")["messages"])}))
    assert dialogue.turns == (Turn("a", "b"),)


# -- images anywhere, and none ------------------------------------------------------------------------------------

PLACES = {
    "between words": (chat("Compare <image> with <image>.", "b", images=["a.png", "b.png"]), [(8, 14)]),
    "between a question's words": (
        {"images": ["a.png", "b.png"], "question": "<image>Compare with <image>.", "answer": "b"},
        [(0, 13)],
    ),
    "before a question": ({"image": "a.png", "question": "<image>\nWhat?", "answer": "b"}, [()]),
    "in parts": (
        chat([{"type": "text", "text": "What is "}, {"type": "image", "image": "a.png"}, "?"], "b", images=[]),
        [(8,)],
    ),
    "after the question": (chat("What?<image>", "b"), [(5,)]),
    "in later turns": (chat("<image>What?", "b", "And\n<image>", "c", images=["a.png", "b.png"]), [(0,), (3,)]),
    "in a later turn alone": (chat("Hi", "b", "<image>\nWhat?", "c"), [(), (0,)]),
    "with no word to it": (chat("Hi", "b", "<image>", "c"), [(), (0,)]),
    "in front": (chat("<image>\n<image>\nWhat?", "b", images=["a.png", "b.png"]), [()]),
    "in front, without marks": (chat("What?", "b", images=["a.png", "b.png"]), [()]),
    "LLaVA, after": (
        {"image": "a.png", "conversations": [{"from": "human", "value": "Q\n<image>"}, {"from": "gpt", "value": "A"}]},
        [()],
    ),
}


@pytest.mark.parametrize("where", PLACES)
def test_images_stand_where_the_data_has_them(where, read, tmp_path):
    row, places = PLACES[where]
    dataset = read(row)
    assert dataset.bad == ()
    (dialogue,) = dialogues(dataset)
    assert [turn.images for turn in dialogue.turns] == places
    assert not any("<image>" in turn.user for turn in dialogue.turns)
    write_clean(tmp_path / "clean", dataset.examples, PROMPT)
    assert dialogues(read_dataset(tmp_path / "clean", prompt=PROMPT)) == [dialogue]


TEXTS = [
    {"messages": chat("a", "b")["messages"]},
    chat("a", "b", images=[]),
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"query": "a", "response": "b"},
    {"instruction": "a", "input": "", "output": "b"},
]


def test_rows_of_text_alone_are_learnt_beside_images_and_never_held_out(read, pictures, capsys):
    rows = [*TEXTS, *({"image": f"{name}.png", "caption": name} for name in "abc")]
    dataset = read(*rows)
    assert dataset.bad == ()
    alone = [example for example in dataset.examples if not example.images]
    assert [len(example.dialogues) for example in alone] == [1] * 5
    file = str(pictures() / "x.jsonl")
    data = read_and_split(TrainConfig(data=file, val_split=0.7))
    assert [sum(not e.images for e in side) for side in (data.train, data.held_out)] == [5, 0]
    assert len(data.held_out) == 2
    assert main(["check", file]) == 0
    assert "answers without an image: 5, learnt and never held out\n" in capsys.readouterr().out
    read(*TEXTS)
    with pytest.raises(DataError, match=r"no row names an image. Say --columns image=NAME"):
        read_and_split(TrainConfig(data=file))
