"""Several sources at once, with weights: read, told, split by image content, and learnt from so often.

Run: pytest tests/data/test_sources.py
"""

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.told import Told
from vlm_lora.config import TrainConfig, config_from, read_yaml, write_yaml
from vlm_lora.data.images import content_hash
from vlm_lora.data.readers import read_dataset
from vlm_lora.data.split import split_examples
from vlm_lora.errors import ConfigError, DataError

PROMPT = "Describe."


@pytest.fixture
def two(pictures, monkeypatch):
    """`a` with sidecars and a bad row, `b` a JSONL file; the picture `same.png` is in both, under the same name."""
    folder = pictures("a/same.png", "a/one.png", "a/no.png", "b/same.png", "b/two.png", "b/three.png")
    for name in ("same", "one"):
        (folder / f"a/{name}.txt").write_text(f"{name} in a")
    rows = [f'{{"image": "{name}.png", "captions": ["{name} in b", "again"]}}' for name in ("same", "two", "three")]
    (folder / "b/rows.jsonl").write_text("\n".join([*rows, '{"image": "gone.png", "caption": "x"}', ""]))
    monkeypatch.chdir(folder)
    return folder


def test_two_sources_are_one_data_set(two):
    dataset = read_dataset(["a", "b/rows.jsonl:3"], prompt=PROMPT)
    assert [(e.id, e.place, e.weight, len(e.dialogues)) for e in dataset.examples] == [
        ("a/one.png", "a/one.png:1", 1, 1),
        ("a/same.png", "a/same.png:1", 1, 1),
        ("b/same.png", "b/rows.jsonl:1", 3, 2),
        ("b/two.png", "b/rows.jsonl:2", 3, 2),
        ("b/three.png", "b/rows.jsonl:3", 3, 2),
    ]
    assert [(row.source, row.line) for row in dataset.bad] == [("a/no.png", None), ("b/rows.jsonl", 4)]
    assert dataset.format == "sidecar + captions"
    assert dataset.parts == (
        "a: 2 examples, 2 answers; sidecar",
        "b/rows.jsonl: 3 examples, 6 answers, each 3 times an epoch; "
        "captions (captions: image from 'image', caption from 'captions')",
    )
    assert dataset.fingerprint() != read_dataset(["a", "b/rows.jsonl:2"], prompt=PROMPT).fingerprint()


def test_what_is_marked_or_unused_in_any_source_is_so_in_all(pictures, monkeypatch):
    folder = pictures(*(f"{source}/{name}.png" for source in "ab" for name in "xyz"))
    for source in "ab":
        marks = {"x": ', "mood": 1', "y": ', "split": "val", "mood": 2', "z": f', "split": "test", "{source}": 1'}
        rows = [f'{{"image": "{name}.png", "caption": "{source} {name}"{mark}}}\n' for name, mark in marks.items()]
        (folder / source / "rows.jsonl").write_text("".join(rows))
    monkeypatch.chdir(folder)
    dataset = read_dataset(["a/rows.jsonl", "b/rows.jsonl"], prompt=PROMPT)
    assert dataset.unused == {"mood": 4, "a": 1, "b": 1}
    sides = [[d.turns[0].assistant for e in side for d in e.dialogues] for side in (dataset.val, dataset.test)]
    assert sides == [["a y", "b y"], ["a z", "b z"]]


def test_one_source_is_read_as_ever_and_names_win_over_weights(two):
    assert (
        read_dataset(["a"], prompt=PROMPT) == read_dataset("a", prompt=PROMPT) == read_dataset(Path("a"), prompt=PROMPT)
    )
    (two / "a").rename(two / "a:7")
    dataset = read_dataset(["a:7", "b"], prompt=PROMPT)
    assert {e.weight for e in dataset.examples} == {1}
    assert dataset.examples[0].id == "a:7/one.png"
    for weight in (1, 4, 1000):
        assert {e.weight for e in read_dataset(f"b:{weight}", prompt=PROMPT).examples} == {weight}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["a", "b:0"], "'b:0': the weight is how often each answer is seen in an epoch, a whole number from 1 to 1000"),
        (["a", "b:0.5"], "a whole number from 1 to 1000; found 0.5"),
        (["a", "b:-1"], "found -1"),
        (["a", "b:1001"], "found 1001"),
        (["a", "b", "a:2"], "'a' is given twice; to learn from it twice an epoch, say a:2"),
        (["a", "./a"], "'./a' is given twice"),
        (["b", "a/", "a/../a"], "'a/../a' is given twice"),
    ],
)
def test_weights_that_would_lose_or_repeat_in_silence_are_refused(sources, message, two):
    with pytest.raises(ConfigError, match=message):
        read_dataset(sources, prompt=PROMPT)


def test_a_pipe_is_no_source(two):
    os.mkfifo("pipe")
    with pytest.raises(DataError, match=r"^pipe: is not a regular file; expected a folder or one of .*csv"):
        read_dataset("pipe", prompt=PROMPT)


@pytest.mark.parametrize("seed", range(6))
def test_the_split_keeps_a_picture_of_two_sources_on_one_side(seed, two):
    train, held = split_examples(read_dataset(["a", "b:2"], prompt=PROMPT).examples, 0.4, seed)
    sides = [{content_hash(ref.read_bytes()) for e in side for ref in e.images} for side in (train, held)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_a_run_sees_each_answer_as_often_as_its_weight_says(two, tmp_path, monkeypatch):
    """The real run, up to the steps: what it would learn from in an epoch, and the plan over it."""
    import vlm_lora.training.run as run
    from vlm_lora.training.schedule import Schedule

    given = {}

    def run_steps(loop, allow_change, captions):
        given["lessons"] = loop.examples
        return 0

    monkeypatch.setattr(run.TrainingLoop, "run", run_steps)
    config = TrainConfig(
        data=("a", "b:3"), model="tiny", output=str(tmp_path / "run"), on_bad_row="quarantine", val_split=0
    )
    run.train_adapter(config, events=(reported := Told()))
    lessons = given["lessons"]
    assert Counter(lesson.example.id for lesson in lessons) == {
        "a/one.png": 1, "a/same.png": 1, "b/same.png": 3, "b/two.png": 3, "b/three.png": 3
    }  # fmt: skip
    numbers = [len(lesson.example.dialogues) for lesson in lessons]
    schedule = Schedule(numbers, batch_size=4, epochs=2, seed=5)
    seen = Counter(
        (lessons[i].example.id, dialogue)
        for step in range(schedule.num_steps)
        for i, dialogues in schedule.step(step)
        for dialogue in dialogues
    )
    assert seen == {(e.example.id, d): 2 * e.example.weight for e in lessons for d in range(len(e.example.dialogues))}
    assert [Schedule(numbers, batch_size=4, epochs=2, seed=5).step(s) for s in (3, 0)] == [
        schedule.step(3),
        schedule.step(0),
    ]
    (told,) = [values["format"] for values in reported.of("data")]
    assert "b: 3 examples, 6 answers, each 3 times an epoch" in told
    assert [tuple(values.values()) for values in reported.of("tokens")] == [(5, 5)]
    assert [tuple(values.values()) for values in reported.of("cache")] == [(n, 5) for n in range(1, 6)]
    write_yaml(config, tmp_path / "config.yaml")
    assert read_yaml(tmp_path / "config.yaml")["data"] == ["a", "b:3"]


def test_sources_in_yaml(tmp_path):
    assert config_from({"data": ["a", "b:2"]}, "x").sources == ("a", "b:2")
    assert config_from({"data": ["a"]}, "x").data == "a"
    for wrong in ([], [1], 3):
        with pytest.raises(ConfigError, match="data"):
            config_from({"data": wrong}, "x")
    config = TrainConfig(data=("a", "b:2"))
    write_yaml(config, tmp_path / "config.yaml")
    assert config_from(read_yaml(tmp_path / "config.yaml"), "x") == config
