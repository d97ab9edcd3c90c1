"""Images that are looked at when their turn comes, and what becomes of a damaged one that is found so late.

Run: pytest tests/training/test_as_they_come.py
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import picture
from tests.model.test_exactness import FAMILIES, FP64, assert_equal, load, off_by
from tests.told import Listener
from tests.training.test_train import adapter_of, assert_same, config
from vlm_lora.cli import main
from vlm_lora.config import TrainConfig
from vlm_lora.data.readers import BadRow, read_dataset
from vlm_lora.errors import DataError, Stopped
from vlm_lora.model import features as features_module
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache
from vlm_lora.training import prepare, step
from vlm_lora.training.batches import Loader
from vlm_lora.training.checkpoint import Progress
from vlm_lora.training.cost import CostModel
from vlm_lora.training.folder import RunFolder
from vlm_lora.training.lessons import Lesson
from vlm_lora.training.run import train_adapter as train

ALONE = SimpleNamespace(count=1, index=0, sharded=False, highest=int, gather=lambda part: [part], add_up=list)
LATE = {"validate_first": "no"}


def damage(path) -> None:
    """Cut off, so that the header still tells its size."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def damaged(photo_folder):
    """Pictures of which two cannot be decoded."""
    for name in ("03.png", "07.png"):
        damage(photo_folder / name)
    return photo_folder


def held_out(folder: Path, number: int, damaged: str) -> Path:
    """Pictures of their own, of which one is damaged."""
    folder.mkdir()
    for i in range(number):
        picture(50 + i).save(folder / f"v{i}.png")
        (folder / f"v{i}.txt").write_text(f"Held out, number {i}.\n")
    damage(folder / damaged)
    return folder


def quarantined(run) -> list[str]:
    return [json.loads(line)["source"] for line in (run / "quarantined.jsonl").read_text().splitlines()]


def lines(run) -> list[dict]:
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    drop = ("seconds", "answers_per_second")
    return [{k: v for k, v in line.items() if k not in drop} for line in read if "predicted" not in line]


# ---- nothing is looked at before the steps ------------------------------------------------------------------------


def test_no_image_is_decoded_before_the_steps_and_each_goes_through_the_tower_once(
    checkpoints, photo_folder, tmp_path, monkeypatch
):
    decoded, before, parked, real = [], [], [], features_module.load_image
    monkeypatch.setattr(Backbone, "park_tower", lambda self, device="cpu": parked.append((device, len(set(decoded)))))
    monkeypatch.setattr(features_module, "load_image", lambda data, name: decoded.append(name) or real(data, name=name))
    listener = Listener(lambda kind, **_: before.extend(decoded) if kind == "start" else None)
    result = train(config(checkpoints, photo_folder, tmp_path / "one", **LATE), events=listener)
    assert before == []
    assert {seen for device, seen in parked if device == "cpu"} == {
        12
    }  # with the last image the tower's memory is the training's
    assert len(set(decoded)) == result.features.computed == 12
    decoded.clear()
    again = train(config(checkpoints, photo_folder, tmp_path / "two", **LATE))
    assert (decoded, again.features.computed) == ([], 0)


def test_the_run_is_the_same_as_with_all_images_seen_before(checkpoints, photo_folder, tmp_path, monkeypatch):
    late = train(config(checkpoints, photo_folder, tmp_path / "late", **LATE))
    monkeypatch.setenv("VLM_LORA_CACHE", str(tmp_path / "another"))
    first = train(config(checkpoints, photo_folder, tmp_path / "first", validate_first="yes"))
    assert_same(adapter_of(late.folder), adapter_of(first.folder))
    assert lines(late.folder) == lines(first.folder)
    assert late.bad == first.bad == ()


@pytest.mark.parametrize(("most", "late"), [(12, False), (11, True)])
def test_many_images_are_taken_as_they_come(checkpoints, photo_folder, tmp_path, monkeypatch, most, late):
    monkeypatch.setattr(prepare, "LOOKED_AT_FIRST", most)
    told = []
    train(config(checkpoints, photo_folder, tmp_path / "run"), events=Listener(lambda kind, **_: told.append(kind)))
    assert ("cache" in told) is not late


def test_images_that_are_seen_once_are_not_kept_but_held_out_ones_are(checkpoints, photo_folder, tmp_path):
    result = train(config(checkpoints, photo_folder, tmp_path / "run", epochs=1, **LATE))
    kept = [image for side in (result.train_examples, result.held_out) for (image,) in side.images]
    there = [result.features.complete([image]) for image in kept]
    assert there == [False] * 10 + [True] * 2


# ---- a damaged one --------------------------------------------------------------------------------------------------


def lessons_of(backbone, features, examples) -> list[Lesson]:
    encoder = Encoder(backbone)
    return [Lesson.of(each, encoder.sizes(each.dialogues, features.grids(each))) for each in examples]


@pytest.mark.parametrize("max_tokens", [4096, 90])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_without_its_damaged_image_is_the_step_of_the_others(checkpoints, damaged, family, max_tokens):
    """Loss and every gradient, in float64; and they would not be, were its labels counted among the others'."""
    examples = read_dataset(damaged).examples[:6]
    backbone, adapter = load(checkpoints, family)
    backbone.model.train()

    def learnt(chosen, **how) -> tuple[float, dict[str, torch.Tensor], Loader]:
        features = FeatureCache(backbone, None)
        loader = Loader(backbone, features, ALONE, **how)
        backbone.model.zero_grad()
        progress = Progress(micro_batch_tokens=max_tokens)
        loss = step.accumulate_gradients(loader, lessons_of(backbone, features, chosen), None, 0, progress, pytest.fail)
        return loss.item(), {name: p.grad.clone() for name, p in adapter.named_parameters()}, loader

    loss, grads, loader = learnt(examples, as_they_come=True)
    expected_loss, expected, _ = learnt([each for each in examples if each.id != "03.png"])
    assert [row.source for row in loader.damaged] == ["03.png"]
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # the sum is float32
    assert_equal(grads, expected, FP64[family])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "note_damaged", lambda *_: 0)
        _, wrong, _ = learnt(examples, as_they_come=True)
    assert off_by(wrong, expected) > 1e-2
    with pytest.raises(DataError, match=r"03\.png"):
        learnt(examples)


def test_a_row_that_fills_up_a_pass_loses_no_label_twice(checkpoints, damaged):
    """Two processes with the base in pieces: the one that has a row less repeats the shortest, which is damaged."""
    examples = [each for each in read_dataset(damaged).examples if each.id in ("03.png", "06.png", "09.png")]
    backbone, _ = load(checkpoints, "qwen2_vl")
    shares = []
    for index in range(2):
        features, processes = FeatureCache(backbone, None), SimpleNamespace(count=2, index=index, sharded=True)
        loader = Loader(backbone, features, processes, as_they_come=True)
        shares.append(loader.fetch(lessons_of(backbone, features, examples), max_tokens=1))
    assert [len(share) for share in shares] == [2, 2]
    assert [batch.num_labels for batch in shares[1]][1] == 0
    found = [(row.source, batch.labels_lost) for share in shares for batch in share for row in batch.damaged]
    assert len(found) == 1
    assert found[0][0] == "03.png"


def test_it_is_left_out_and_listed_once(checkpoints, damaged, tmp_path):
    told = []
    settings = config(checkpoints, damaged, tmp_path / "run", on_bad_row="quarantine", val_split=0.0, **LATE)
    result = train(settings, events=Listener(lambda kind, **v: told.append(v["text"]) if kind == "warning" else None))
    assert sorted(quarantined(result.folder)) == ["03.png", "07.png"]
    assert sorted(row.source for row in result.bad) == ["03.png", "07.png"]
    assert len(result.train_examples) == 10
    assert {each.id for each in result.train_examples}.isdisjoint({"03.png", "07.png"})
    assert len(told) == 2
    assert re.search(r"0[37]\.png:1: '0[37]\.png' .*\. Left out: 1 rows so far, see quarantined\.jsonl", told[0])


@pytest.mark.parametrize("end", [1, 2, 3, 5])
def test_a_run_that_is_stopped_and_resumed_is_the_run_in_one_go(checkpoints, damaged, tmp_path, end):
    settings = {"on_bad_row": "quarantine", "val_split": 0.0, "save_every": 2, **LATE}
    whole = train(config(checkpoints, damaged, tmp_path / "whole", **settings))
    cut, steps = config(checkpoints, damaged, tmp_path / "cut", **settings), iter(range(1, 100))
    with pytest.raises(Stopped):
        train(cut, stop=lambda: 15 if next(steps) == end else None)
    resumed = train(cut, resume=True)
    assert_same(adapter_of(resumed.folder), adapter_of(whole.folder))
    assert lines(resumed.folder) == lines(whole.folder)
    assert sorted(quarantined(resumed.folder)) == ["03.png", "07.png"]
    assert resumed.bad == whole.bad


def test_it_ends_the_run_saved_and_that_is_resumed_without_it(checkpoints, damaged, tmp_path):
    """The run then is the one that left such rows out from the beginning."""
    settings = {"val_split": 0.0, "save_every": 100, **LATE}
    whole = train(config(checkpoints, damaged, tmp_path / "whole", on_bad_row="quarantine", **settings))
    with pytest.raises(
        DataError, match=r"0[37]\.png:1: .*found after (\d) steps, which are saved.*--allow-change"
    ) as told:
        train(config(checkpoints, damaged, tmp_path / "run", **settings))
    steps = int(re.search(r"after (\d) steps", str(told.value))[1])
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("*")] == [f"step-{steps:06}"] * (steps > 0)
    resumed = train(
        config(checkpoints, damaged, tmp_path / "run", on_bad_row="quarantine", **settings),
        resume=True,
        allow_change=["on_bad_row"],
    )
    assert_same(adapter_of(resumed.folder), adapter_of(whole.folder))
    assert lines(resumed.folder) == lines(whole.folder)


def test_a_file_that_has_changed_since_it_was_read_is_no_other_images_features(checkpoints, photo_folder, tmp_path):
    def change(kind, **_):
        if kind == "start":
            picture(99).save(photo_folder / "05.png")

    settings = config(checkpoints, photo_folder, tmp_path / "run", on_bad_row="quarantine", val_split=0.0, **LATE)
    result = train(settings, events=Listener(change))
    assert quarantined(result.folder) == ["05.png"]
    assert "has changed since it was first read" in result.bad[0].reason


def test_held_out_images_that_are_damaged_are_not_scored(checkpoints, photo_folder, tmp_path):
    """The loss is that of the others; captions to watch and the comparison at the end leave them out."""
    val = held_out(tmp_path / "val", 4, "v2.png")
    settings = {"val": str(val), "on_bad_row": "quarantine", "max_steps": 4, "watch": 4}
    late = train(config(checkpoints, photo_folder, tmp_path / "late", **settings, **LATE))
    first = train(config(checkpoints, photo_folder, tmp_path / "first", **settings, validate_first="yes"))
    assert [each.id for each in late.held_out] == [each.id for each in first.held_out] == ["v0.png", "v1.png", "v3.png"]
    found, expected = (
        [line["held_out_loss"] for line in lines(run.folder) if "held_out_loss" in line] for run in (late, first)
    )
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(found) == 2
    assert quarantined(late.folder) == ["v2.png"]


def test_where_every_image_is_damaged_there_is_no_adapter(checkpoints, photo_folder, tmp_path):
    for path in photo_folder.glob("*.png"):
        damage(path)
    settings = config(checkpoints, photo_folder, tmp_path / "run", on_bad_row="quarantine", **LATE)
    with pytest.raises(DataError, match=r"no usable example in it\. .*is damaged or cut off"):
        train(settings)
    assert not (tmp_path / "run/adapter").exists()
    assert len(quarantined(tmp_path / "run")) == 12
    assert not any("held_out_loss" in line for line in lines(tmp_path / "run"))  # it is of nothing


def test_a_damaged_held_out_picture_is_not_watched(checkpoints, photo_folder, tmp_path, capsys):
    """All held-out pictures are wanted; the damaged one is left out, and the comparison at the end is of the others."""
    val = held_out(tmp_path / "val", 3, "v1.png")
    flags = f"--rank 4 --max-steps 2 --watch 3 --validate-first no --on-bad-row quarantine --output {tmp_path / 'run'}"
    data = [str(photo_folder), "--val", str(val), "--model", str(checkpoints["qwen2_vl"])]
    assert main(["train", *data, *flags.split()]) == 0
    watched = [line["watched"] for line in lines(tmp_path / "run") if "watched" in line]
    assert [sorted(said["image"] for said in each) for each in watched] == [["v0.png", "v2.png"]] * 2
    assert "held out: 2 images" in capsys.readouterr().out
    assert quarantined(tmp_path / "run") == ["v1.png"]


def test_the_tower_in_the_steps_is_foretold(checkpoints, photo_folder, tmp_path, monkeypatch):
    """Each image once where its features are kept after that; none where they are there already."""
    monkeypatch.setattr(features_module, "IN_MEMORY_BYTES", 1)  # what is not on disk would be seen in each epoch

    def predicted(run) -> dict:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["predicted"]

    settings = config(checkpoints, photo_folder, tmp_path / "one", **LATE)
    result = train(settings)
    first, again = predicted(result.folder), predicted(train(settings.replace(output=str(tmp_path / "two"))).folder)
    cost = CostModel(settings, torch.float32, "cpu")
    once = [cost.tower_operations(result.features.patches(image)) for (image,) in result.train_examples.images]
    assert first["tower_operations"] == pytest.approx(sum(once))
    assert again["tower_operations"] == 0
    in_first_steps = sum(first["first"]) - sum(again["first"])
    assert min(once) < in_first_steps <= sum(once)


def test_a_list_of_bad_rows_that_were_mended_is_emptied(tmp_path):
    folder = RunFolder(tmp_path, {}, SimpleNamespace(is_main=True))
    settings = TrainConfig(data="photos")
    folder.begin(settings, 0, [BadRow("a.jsonl", 1, "is bad")])
    assert quarantined(tmp_path) == ["a.jsonl"]
    folder.begin(settings, 3, [])
    assert quarantined(tmp_path) == []
    folder.close_log()
