"""The split: by image content, deterministic, stable. Run: pytest tests/data/test_split.py"""

import random

import pytest

import vlm_lora.training.run as run
from vlm_lora.config import TrainConfig
from vlm_lora.data.example import Dialogue, Example, ImageRef, Turn
from vlm_lora.data.images import content_hash
from vlm_lora.data.readers import read_dataset
from vlm_lora.data.split import split_examples, without_held_out
from vlm_lora.errors import ConfigError, DataError


@pytest.fixture
def example(tmp_path):
    """`example("a", "b")`: an Example about files whose content is their name up to a hyphen."""

    def make(*names):
        refs = []
        for name in names:
            path = tmp_path / name
            path.write_text(name.split("-")[0])
            refs.append(ImageRef(path, name))
        return Example("+".join(names), tuple(refs), (Dialogue((Turn("q", "a"),)),), "x:1")

    return make


def ids(examples):
    return [example.id for example in examples]


@pytest.mark.parametrize(("number", "fraction", "wanted"), [(10, 0.2, 2), (2, 0.01, 1), (2, 0.99, 1), (100, 0.05, 5)])
def test_the_fraction_and_at_least_one_on_each_side(number, fraction, wanted, example):
    examples = [example(str(i)) for i in range(number)]
    train, val = split_examples(examples, fraction, seed=0)
    assert len(val) == wanted
    assert len(train) == number - wanted
    assert sorted(ids(train + val)) == sorted(ids(examples))
    assert ids(train) == [i for i in ids(examples) if i not in ids(val)]  # in the order of the data


def test_where_every_group_is_too_large_the_smallest_is_held_out(example):
    """Groups of three, two and three that share an image; a tenth of eight is one example."""
    groups = [*["a"] * 3, *["b"] * 2, *["c"] * 3]
    examples = [example(name, f"{i}") for i, name in enumerate(groups)]
    for seed in range(6):
        assert ids(split_examples(examples, 0.1, seed)[1]) == ["b+3", "b+4"]


def test_order_does_not_matter_and_the_seed_does(example):
    examples = [example(str(i)) for i in range(40)]
    _, val = split_examples(examples, 0.25, seed=0)
    shuffled = random.Random(0).sample(examples, 40)
    assert set(ids(split_examples(shuffled, 0.25, seed=0)[1])) == set(ids(val))
    assert set(ids(split_examples(examples, 0.25, seed=1)[1])) != set(ids(val))


def test_further_images_only_shift_the_border(example):
    examples = [example(str(i)) for i in range(100)]
    val = set(ids(split_examples(examples, 0.2, seed=0)[1]))
    more = set(ids(split_examples([*examples, *(example(f"n{i}") for i in range(5))], 0.2, seed=0)[1]))
    assert len(val - more) <= 5


@pytest.mark.parametrize("seed", range(8))
def test_copies_and_shared_images_stay_on_one_side(seed, example):
    """One picture under three names, and a chain of examples that share an image with the next."""
    copies = [example("7"), example("7-copy"), example("7-again", "8")]
    chain = [example("8-copy", "9"), example("9-copy")]
    others = [example(str(i)) for i in range(20, 40)]
    for examples in ([*copies, *others, *chain], [*chain, *others, *copies[::-1]]):
        train, val = split_examples(examples, 0.3, seed=seed)
        contents = [{content_hash(ref.read_bytes()) for e in side for ref in e.images} for side in (train, val)]
        assert not contents[0] & contents[1]
        assert len(val) == pytest.approx(25 * 0.3, abs=5)


def test_a_hash_that_is_known_needs_no_reading(tmp_path, example):
    ref = ImageRef(tmp_path / "gone", "gone", sha256="0" * 64)
    known = Example("gone", (ref,), (), "x:1")
    assert sum(map(len, split_examples([known, example("a")], 0.5, seed=0))) == 2


def test_what_cannot_be_split_is_refused(tmp_path, example):
    with pytest.raises(
        DataError, match=r"needs 2 different images, found 1 in 2 examples; add images, or pass .* --val"
    ):
        split_examples([example("a"), example("a-copy")], 0.5, seed=0)
    with pytest.raises(DataError, match="found 0 in 0 examples"):
        split_examples([], 0.5, seed=0)
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=r"--val-split .*: expected a fraction between 0 and 1"):
            split_examples([example("a"), example("b")], fraction, seed=0)
    gone = Example("x", (ImageRef(tmp_path / "gone", "gone.png"),), (), "x:1")
    with pytest.raises(DataError, match=r"'gone.png' cannot be opened"):
        split_examples([example("a"), gone], 0.5, seed=0)


def test_images_that_are_held_out_too_are_no_training_rows(pictures, monkeypatch):
    folder, val = pictures("a.png", "b.png", "c.png", into="train"), pictures("d.png", into="val")
    (val / "copy.png").write_bytes((folder / "b.png").read_bytes())
    (val / "e.png").write_bytes(b"of no size that is in training")
    for path in [*folder.glob("*.png"), *val.glob("*.png")]:
        path.with_suffix(".txt").write_text("x")
    train, held = read_dataset(folder, prompt="-"), read_dataset(val, prompt="-")
    apart = without_held_out(train, held, "val")
    assert [example.id for example in apart.examples] == ["a.png", "c.png"]
    reason = "its image is in the held-out data too ('copy.png' of val); take it out of one of them"
    assert [(bad.source, bad.line, bad.reason) for bad in apart.bad] == [("b.png", 1, reason)]
    monkeypatch.chdir(folder.parent)
    with pytest.raises(DataError, match=r"1 rows cannot be used.* b\.png:1: its image is in the held-out data too"):
        run.train_adapter(TrainConfig(data="train", val="val", model="tiny"))
    (folder / "x.jsonl").write_text('{"images": ["a.png", "b.png"], "caption": "x"}\n')
    both = read_dataset(folder / "x.jsonl", prompt="-")
    assert [(bad.source, bad.line) for bad in without_held_out(both, held, "val").bad] == [("x.jsonl", 1)]
    (folder / "x.jsonl").unlink()
    (val / "copy.png").unlink()
    assert without_held_out(train, read_dataset(val, prompt="-"), "val") == train
