"""Multiple choice: every spelling of the options and of the answer is the same question."""

import json

import pytest
from PIL import Image

from vlm_lora.data.readers import DataSettings, read_dataset

OPTIONS = ["cat", "red fox", "owl"]
ASKED = "Which?\nA. cat\nB. red fox\nC. owl\nAnswer with the option's letter from the given choices directly."


@pytest.fixture
def read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def read(row: dict, name="x.jsonl", **settings):
        if name.endswith("csv"):
            lines = [",".join(row), ",".join(str(value) for value in row.values())]
            (tmp_path / name).write_text("\n".join(lines) + "\n")
        else:
            (tmp_path / name).write_text(json.dumps(row) + "\n")
        return read_dataset(tmp_path / name, DataSettings(prompt="Say it.", **settings))

    return read


def row(**fields) -> dict:
    return {"image": "a.png", "question": "Which?"} | fields


LETTERED = dict(zip("ABC", OPTIONS, strict=True))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("x.jsonl", row(choices=OPTIONS, answer="B")),
        ("x.jsonl", row(choices=OPTIONS, answer="b")),
        ("x.jsonl", row(choices=OPTIONS, answer="(B)")),
        ("x.jsonl", row(choices=OPTIONS, answer="B. red fox")),
        ("x.jsonl", row(choices=OPTIONS, answer="red fox")),
        ("x.jsonl", row(choices=OPTIONS, answer=1)),
        ("x.jsonl", row(choices=OPTIONS, answer=["B"])),
        ("x.jsonl", row(options=OPTIONS, answer="1")),
        ("x.jsonl", row(candidates=[f"({letter}) {text}" for letter, text in LETTERED.items()], answer="B")),
        ("x.jsonl", row(options=LETTERED, answer="B")),
        ("x.jsonl", row(options=json.dumps(OPTIONS), answer="B")),
        ("x.jsonl", row(**LETTERED, answer="B")),
        ("x.jsonl", row(**LETTERED, D="", answer="red fox")),
        ("x.jsonl", row(choices=OPTIONS, answer="B") | {"question": ASKED}),
        ("x.csv", row(**LETTERED, answer="B")),
        ("x.csv", row(**LETTERED, answer=1)),
    ],
)
def test_every_spelling_is_the_same_question(read, name, given):
    dataset = read(given, name)
    assert (dataset.bad, dataset.unused) == ((), {})
    (dialogue,) = dataset.examples[0].dialogues
    assert [(turn.user, turn.assistant) for turn in dialogue.turns] == [(ASKED, "B")]
    assert dialogue.choices == tuple(OPTIONS)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (row(choices=OPTIONS, answer="D"), "'D' is none of them: expected the letter, the text or the index"),
        (row(choices=OPTIONS, answer=3), "'3' is none of them"),
        (row(choices=OPTIONS, answer=None), "'' is none of them"),
        (row(choices=OPTIONS, answer=True), "is none of them"),
        (row(choices=OPTIONS, answer="A, B"), "is none of them"),
        (row(choices=OPTIONS, answer="B. owl"), "is none of them"),
        (row(choices=["1", "2", "3"], answer=1), "'1' may be more than one of them"),
        (row(choices=["B", "A"], answer="A"), "'A' may be more than one of them"),
        (row(choices=["one"], answer="A"), "expected a list of 2 to 26 options"),
        (row(choices="cat, fox", answer="A"), "its choices is 'cat, fox'; expected a list"),
        (row(choices=["cat", "cat"], answer="A"), "there twice"),
        (row(choices=["cat", None], answer="A"), "an option that is empty"),
        ({"image": "a.png", "caption": "It.", "choices": OPTIONS}, "'choices' that is not used here"),
    ],
)
def test_what_is_no_choice_is_a_bad_row_with_the_reason(read, given, why):
    (bad,) = read(given).bad
    assert why in bad.reason


def test_a_number_that_is_written_as_a_text_is_that_text(read):
    (dialogue,) = read(row(choices=["1", "2", "3"], answer="2")).examples[0].dialogues
    assert dialogue.turns[0].assistant == "B"


def test_other_names_and_columns_that_are_no_options(read):
    renamed = read(row(given=OPTIONS, right=1), columns={"choices": "given", "answer": "right"})
    assert renamed.examples[0].dialogues[0].choices == tuple(OPTIONS)
    alone = read(row(A="a", answer="red"))
    assert (alone.examples[0].dialogues[0].choices, alone.unused) == ((), {"A": 1})
    assert read(row(choices=[], answer="red")).examples[0].dialogues[0].turns[0].user == "Which?"
