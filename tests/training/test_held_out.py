"""The held-out loss at checkpoints is of a sample: what it costs, of which images it is, and where that is said."""

import json
import shutil
from dataclasses import dataclass, field, replace

import pytest

from tests.conftest import picture
from tests.told import Told
from tests.training.test_survival import log_of
from tests.training.test_train import adapter_of, assert_same, config
from vlm_lora.cli import main
from vlm_lora.errors import ConfigError, Stopped
from vlm_lora.inference.losses import read_losses
from vlm_lora.inference.report import _loss_plot
from vlm_lora.model.encode import Sizes
from vlm_lora.model.store import Store
from vlm_lora.progress import TrainReport
from vlm_lora.training import checkpoint, loop, step
from vlm_lora.training.held_out import FORWARD, LEAST, SHARE, HeldOut
from vlm_lora.training.lessons import Lessons
from vlm_lora.training.run import train_adapter as train

MANY = {"val_split": 2 / 3, "max_steps": 20, "epochs": 9, "save_every": 10, "batch_size": 10, "lr": 1e-3}
"""40 images to learn from, 80 held out; a checkpoint for each 100 images learnt, and again."""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Pictures of three sizes with captions of several lengths."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(120):
        picture(i, (32 + 16 * (i % 3), 32)).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"Number {i}{', and more of it' * (i % 4)}.", encoding="utf-8")
    return folder


@dataclass
class Work:
    """Tokens that went through the model to be learnt from, padding included, and of each held-out loss its examples
    and tokens."""

    learnt: int = 0
    examples: list[list[str]] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)


@pytest.fixture
def work(monkeypatch) -> Work:
    work, pass_of, mean_loss = Work(), step.loss_sum, loop.mean_loss

    def counting_pass(backbone, batch, *how):
        if backbone.model.training:
            work.learnt += batch.input_ids.numel()
        else:
            work.scored[-1] += batch.input_ids.numel()
        return pass_of(backbone, batch, *how)

    def counting_loss(loader, examples, *rest):
        work.examples.append([each.example.id for each in examples])
        work.scored.append(0)
        return mean_loss(loader, examples, *rest)

    monkeypatch.setattr(step, "loss_sum", counting_pass)
    monkeypatch.setattr(loop, "mean_loss", counting_loss)
    monkeypatch.setattr(loop.TrainingLoop, "_try_largest_step", lambda self, first: None)
    return work


def test_checkpoints_take_two_percent_of_the_steps_and_all_are_scored_once(
    checkpoints, many, tmp_path, monkeypatch, work
):
    monkeypatch.setattr("vlm_lora.training.held_out.LEAST", 1)
    told = Told()
    result = train(config(checkpoints, many, tmp_path / "run", **MANY | {"max_steps": 30}), events=told)
    *samples, whole = work.examples
    *at_checkpoints, at_end = work.scored
    assert whole == [example.id for example in result.held_out]
    assert len(whole) == 80
    assert len(samples) == 3
    assert all(sample == samples[0] for sample in samples)
    assert samples[0] == [name for name in whole if name in samples[0]]  # in the order of the data
    # Steps of ten images are padded a little otherwise than the sample is.
    assert 0.5 * SHARE < FORWARD * sum(at_checkpoints) / work.learnt < 1.1 * SHARE
    assert at_end > 20 * max(at_checkpoints)

    (started,) = told.of("sample")
    assert (started["images"], started["of"]) == (len(samples[0]), 80)
    assert started["share"] == pytest.approx(FORWARD * at_checkpoints[0] / (work.learnt / 3), rel=0.1)
    assert started["steps"] == pytest.approx(FORWARD * at_end / (work.learnt / 30), rel=0.2)
    assert [event["images"] for event in told.of("held_out")] == [len(samples[0])] * 3 + [80]
    predicted = told.of("cost")[0]["predicted"]
    share = predicted.sample_operations / predicted.operations
    assert share == pytest.approx(FORWARD * sum(at_checkpoints) / work.learnt, rel=0.2)
    assert share < SHARE
    at_end_operations = predicted.all_held_out_operations / predicted.sample_operations
    assert at_end_operations == pytest.approx(at_end / sum(at_checkpoints), rel=0.1)
    assert told.of("scoring")[-1] == {"done": 80, "total": 80}


def test_a_sample_changes_nothing_in_the_training(checkpoints, many, tmp_path, work):
    sampled = train(config(checkpoints, many, tmp_path / "sampled", **MANY))
    assert len(work.examples[0]) == LEAST < 80
    every = train(config(checkpoints, many, tmp_path / "every", **MANY, val_images=80))
    assert_same(adapter_of(sampled.folder), adapter_of(every.folder))
    of_all = [line for line in log_of(sampled.folder) if "held_out_loss_of_all" in line]
    (line,) = of_all
    last = [line for line in log_of(every.folder) if "held_out_loss" in line][-1]
    assert line["held_out_loss_of_all"] == last["held_out_loss"]
    assert (line["step"], line["held_out_images"], line["held_out_of"]) == (20, 80, 80)
    assert not [line for line in log_of(every.folder) if "held_out_loss_of_all" in line]


def lines_of(run) -> list[dict]:
    kept = ("step", "loss", "lr", "grad_norm", "held_out_loss", "held_out_loss_of_all", "held_out_images")
    return [{key: line[key] for key in kept if key in line} for line in log_of(run)]


@pytest.mark.parametrize("when", ["at a step", "in the loss of all", "killed in the loss of all"])
def test_a_run_that_is_resumed_keeps_its_sample(checkpoints, many, tmp_path, monkeypatch, work, when):
    """To the bit; and it does so with another --save-every, by which the sample would have another size."""
    changes = MANY | {"load_best_at_end": True}
    straight = train(config(checkpoints, many, tmp_path / "straight", **changes)).folder
    samples = list(work.examples)
    settings = config(checkpoints, many, tmp_path / "run", **changes)
    told, scored = Told(), loop.mean_loss

    def interrupted(loader, examples, *rest):
        if "killed" in when and len(examples) == 80:
            raise KeyboardInterrupt
        return scored(loader, examples, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "mean_loss", interrupted)
        with pytest.raises((Stopped, KeyboardInterrupt)):
            train(
                settings,
                events=told,
                stop=lambda: (
                    15 if (len(told.of("step")) == 13 if when == "at a step" else told.of("scoring")) else None
                ),
            )
    if when == "in the loss of all":
        assert told.of("scoring") == [{"done": 64, "total": 80}]
    work.examples.clear()
    resumed = train(settings.replace(save_every=10_000 if when == "at a step" else 10), resume=True).folder
    assert_same(adapter_of(resumed), adapter_of(straight))
    assert work.examples == [samples[0], samples[-1]]
    if when != "at a step":
        assert lines_of(resumed) == lines_of(straight)


def test_another_number_of_images_finds_the_best_anew(checkpoints, many, tmp_path, monkeypatch):
    settings = config(checkpoints, many, tmp_path / "run", **MANY, val_images=20, patience=9)
    told, losses = Told(), iter([0.1, 0.2])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "mean_loss", lambda *args: next(losses))
        with pytest.raises(Stopped):
            train(settings, events=told, stop=lambda: 15 if len(told.of("step")) == 13 else None)
    told, seen = Told(), []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "mean_loss", lambda loader, examples, *rest: seen.append(len(examples)) or 5.0)
        train(settings.replace(val_images=30), resume=True, events=told)
    assert seen == [30, 80]
    assert "losses are of 20 images" in told.warnings[0]
    (best,) = told.of("best")
    assert (best["loss"], best["images"], best["of"]) == (5.0, 30, 80)


def test_a_run_of_an_earlier_release_scores_all_as_before_and_says_so(checkpoints, many, tmp_path, work):
    """Its manifest is of format 1 and knows of no sample."""
    settings = config(checkpoints, many, tmp_path / "run", **MANY)
    with pytest.raises(Stopped):
        train(settings, events=(told := Told()), stop=lambda: 15 if len(told.of("step")) == 13 else None)
    for path in (tmp_path / "run/checkpoints").iterdir():
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["progress"].pop("val_images") == LEAST
        assert manifest.pop("format") == checkpoint.FORMAT
        del manifest["sha256"]
        manifest["format"] = 1
        manifest["sha256"] = checkpoint._digest(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
    work.examples.clear()
    told = Told()
    resumed = train(settings, resume=True, events=told)
    assert [len(examples) for examples in work.examples] == [80]
    (warning,) = told.warnings
    assert "are of all 80 images at each checkpoint, and stay so. --val-images 16 takes a sample" in warning
    assert not [line for line in log_of(resumed.folder) if "held_out_loss_of_all" in line]


def of_tokens(lengths, names=None):
    """Lessons of so many tokens."""
    from vlm_lora.data.example import Dialogue, Example, ImageRef, Turn

    made = []
    for i in range(len(lengths)):
        name = names[i] if names else f"{i}.png"
        example = Example(name, (ImageRef(path=name, name=name),), (Dialogue((Turn("a", "b"),)),), name)
        made.append(example)
    return Lessons.of(made, ((i, Sizes(length - 2, 1, [(2, 0, 0)])) for i, length in enumerate(lengths)), {})


def hash_of(image) -> str:
    return f"{hash(image.name) & 0xFFFF:x}"


def held_out_of(held_out, steps=10_000, train=None, **changes) -> HeldOut:
    settings = config({"qwen2_vl": "x"}, "x", "y", **{"save_every": 200, "batch_size": 16} | changes)
    return HeldOut.of(settings, train or of_tokens([100] * 64), held_out, steps, hash_of)


def test_the_sample_is_of_seed_and_bytes_alone_and_nested():
    held_out = of_tokens([60 + i % 80 for i in range(500)])
    plain = held_out_of(held_out)
    assert plain.tokens_of_steps == 100 * 16 * 200
    assert LEAST < plain.size < 500
    assert FORWARD * sum(e.num_tokens for e in plain.sample(plain.size)) <= SHARE * plain.tokens_of_steps
    assert FORWARD * sum(e.num_tokens for e in plain.sample(plain.size + 1)) > SHARE * plain.tokens_of_steps
    assert plain.share(plain.size) <= SHARE < plain.share(plain.size + 1)

    def names(of: HeldOut, size: int) -> set[str]:
        return {each.example.id for each in of.sample(size)}

    assert names(plain, 50) < names(plain, 60)
    backwards = held_out_of(held_out[::-1])
    assert names(backwards, 50) == names(plain, 50)
    assert names(held_out_of(held_out, seed=1), 50) != names(plain, 50)
    fewer = held_out_of(held_out[::2])
    assert names(plain, 100) & {e.example.id for e in held_out[::2]} <= names(fewer, 100)
    longer = held_out_of(held_out, save_every=400)
    assert longer.size > 1.8 * plain.size
    assert held_out_of(held_out, save_every=1).size == LEAST
    assert held_out_of(held_out[:20]).size == 20
    assert held_out_of(held_out, val_images=3).size == 3
    assert held_out_of(held_out, val_images=10**6).size == 500
    assert held_out_of(held_out, steps=200).size == 500, "the only checkpoint is at the end"
    assert held_out_of(held_out[:0]).size == 0


def test_one_without_images_is_ranked_by_its_texts():
    held_out = of_tokens([50] * 40)
    bare = [
        replace(each.example, images=(), dialogues=each.example.dialogues * (i + 1)) for i, each in enumerate(held_out)
    ]
    other = Lessons.of(bare, ((i, Sizes(48, 1, [(2, 0, 0)])) for i in range(40)), {})
    assert held_out_of(other).order.tolist() != list(range(40))
    assert [held_out_of(other[::-1]).order[i] for i in range(40)] == [39 - i for i in held_out_of(other).order]


def test_which_loss_it_is_stands_everywhere(checkpoints, many, tmp_path, capsys):
    flags = ["--model", str(checkpoints["qwen2_vl"]), "--rank", "4", "--val-split", "0.667", "--batch-size", "5"]
    run = ["train", str(many), *flags, "--save-every", "5", "--max-steps", "12", "--output", str(tmp_path / "run")]
    assert main([*run, "--no-eval", "--load-best-at-end"]) == 0
    said = capsys.readouterr().err
    assert "Held-out loss at each checkpoint: sample of 16 of 80 images, always the same, " in said
    assert "of all once at the end, the work of 8 steps. --val-images N changes it." in said
    assert said.count(", sample of 16 of 80 images") == 3
    assert said.count(", all 80 images") == 1
    assert "The held-out loss (sample of 16 of 80 images) was lowest" in said
    losses = read_losses(tmp_path / "run")
    assert (losses.sample, len(losses.held_out)) == ((16, 80), 3)
    assert losses.of_all is not None
    plot, told = _loss_plot(losses)
    assert f"(sample of 16 of 80 images), and {losses.of_all:.3g} on all of them by the final adapter" in told
    assert "held-out sample" in plot
    config_written = (tmp_path / "run/config.yaml").read_text()
    assert "val_images: null" in config_written

    plan = ["plan", str(many), *flags, "--save-every", "5", "--max-steps", "12", "--tflops", "1"]
    assert main(plan) == 0
    told = capsys.readouterr().out
    assert "(3 of a sample of 16 of 80 images, and, with " in told
    assert main([*plan, "--val-images", "80"]) == 0
    assert "sample" not in capsys.readouterr().out
    assert main([*plan, "--val-images", "5", "--val-split", "0"]) == 2
    assert "--val-images is 5; expected none with --val-split 0" in capsys.readouterr().err
    assert main([*plan, "--val-images", "0"]) == 2


def test_where_all_are_scored_nothing_is_said_of_a_sample(checkpoints, photo_folder, tmp_path, capsys):
    told = Told()
    result = train(config(checkpoints, photo_folder, tmp_path / "run"), events=told)
    assert not told.of("sample") + told.of("scoring")
    assert [(e["images"], e["of"]) for e in told.of("held_out")] == [(2, 2)] * 3
    report = TrainReport(None)
    report.held_out(step=3, loss=1.0, images=2, of=2)
    assert capsys.readouterr().err == "step 3  held-out loss 1.0000\n"
    losses = read_losses(result.folder)
    assert (losses.sample, losses.of_all) == (None, None)
    assert "sample" not in _loss_plot(losses)[1]


def test_with_little_room_held_out_images_are_kept_first_and_the_folder_is_looked_at_once(
    checkpoints, photo_folder, tmp_path, monkeypatch
):
    """The later run reads its pictures in another order, and finds what the first one kept."""
    looked, real = [], Store._entries
    monkeypatch.setattr(Store, "_entries", lambda self: looked.append(self) or real(self))

    def run(name, data):
        told = Told()
        settings = config(checkpoints, data, tmp_path / name, cache_gb=60_000 / 1e9, epochs=2)
        result = train(settings, events=told)
        features = result.features
        assert len(looked) == 1
        looked.clear()
        (survey,) = told.of("survey")
        assert survey["survey"].images == 12
        kept = {path.stem for path in features.store.folder.rglob("*.safetensors")}
        held_out = {features._identify(image)[0] for example in result.held_out for image in example.images}
        assert len(held_out) == 2
        assert held_out < kept
        return features, kept

    features, kept = run("first", photo_folder)
    assert 2 < len(kept) < 12
    assert features.computed == 12  # main memory has the others
    turned = tmp_path / "turned"
    turned.mkdir()
    for i, path in enumerate(sorted(photo_folder.glob("*.png"), reverse=True)):
        shutil.copy(path, turned / f"{i:02}.png")
        shutil.copy(path.with_suffix(".txt"), turned / f"{i:02}.txt")
    again, still = run("again", turned)
    assert still == kept
    assert again.computed == 12 - len(kept)


def test_a_sample_for_early_stopping_needs_held_out_images():
    with pytest.raises(ConfigError, match="--val-images is 5; expected none with --val-split 0"):
        config({"qwen2_vl": "x"}, "x", "y", val_split=0.0, val_images=5)
