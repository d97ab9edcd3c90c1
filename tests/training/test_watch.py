"""A run that is watched says what it would say, learns what it would learn, and tells what the watching costs."""

from functools import partialmethod

import pytest
import torch

from tests.conftest import picture
from tests.told import Told
from tests.training.test_held_out import held_out_of, of_tokens
from tests.training.test_survival import log_of
from tests.training.test_train import adapter_of, assert_same, config
from vlm_lora import Captioner, Decoding
from vlm_lora.config import TrainConfig
from vlm_lora.errors import ConfigError, Stopped
from vlm_lora.inference.filmstrip import COLUMNS, Film, read_filmstrip, steps_shown
from vlm_lora.model.backbone import Backbone
from vlm_lora.progress import TrainReport
from vlm_lora.run import train
from vlm_lora.training.held_out import FORWARD, WATCHED, WATCHED_SHARE, WATCHED_TOKENS
from vlm_lora.training.loop import TrainingLoop


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    for i in range(12):
        picture(i, (32 + 16 * (i % 3), 32)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"Number {i}.", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def settings(checkpoints, photos, tmp_path_factory) -> TrainConfig:
    """Five steps with dropout, a checkpoint after each second one and the last; three images are held out."""
    changes = {"val_split": 0.25, "save_every": 2, "epochs": 2, "watch": 2}
    return config(checkpoints, photos, tmp_path_factory.mktemp("runs") / "straight", **changes)


@pytest.fixture(scope="module")
def straight(settings):
    return train(settings, eval_images=0).folder


def films_of(run) -> list[dict]:
    return [line for line in log_of(run) if "watched" in line]


def test_what_is_said_is_what_a_captioner_says(straight, settings):
    films = read_filmstrip(straight)
    assert [list(film.captions) for film in films] == [[0, 2, 4, 5]] * 2
    tuned = Captioner.load(settings.model, straight / "adapter")
    for film in films:
        image = f"{settings.data}/{film.image}"
        assert film.reference == f"Number {int(film.image[:2])}."
        for step, asked in ((0, False), (5, True)):
            decoding = Decoding(max_new_tokens=WATCHED_TOKENS)
            assert film.captions[step] == tuned.answer(image, film.question, tuned=asked, decoding=decoding)
    assert any(len(set(film.captions.values())) > 1 for film in films)  # or it would show nothing


def test_a_run_that_is_watched_learns_the_same(straight, settings, tmp_path):
    plain = train(settings.replace(watch=0, output=str(tmp_path / "plain")), eval_images=0).folder
    assert_same(adapter_of(straight), adapter_of(plain))
    assert films_of(plain) == []
    losses = [[line["loss"] for line in log_of(run) if "loss" in line] for run in (straight, plain)]
    assert losses[0] == losses[1]


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "dora", "gradient_checkpointing": True},
        {"method": "prefix", "num_virtual_tokens": 3, "rank": 16, "dropout": 0.0},
        {"method": "prompt", "num_virtual_tokens": 3, "rank": 16, "dropout": 0.0},
        {"targets": "language,projector,vision", "lr": 1e-3},
    ],
    ids=["dora", "prefix", "prompt", "tower"],
)
def test_so_does_every_kind_of_adapter(settings, tmp_path, changes):
    short = settings.replace(max_steps=2, save_every=1, epochs=1, **changes)
    runs = [
        train(short.replace(watch=watch, output=str(tmp_path / f"{watch}")), eval_images=0).folder for watch in (2, 0)
    ]
    assert_same(adapter_of(runs[0]), adapter_of(runs[1]))
    assert [line["step"] for line in films_of(runs[0])] == [0, 1, 2]


@pytest.mark.long
def test_compiled_layers_come_back_as_they_were(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "compile_layers", partialmethod(Backbone.compile_layers, "aot_eager"))
    torch._dynamo.reset()
    short = settings.replace(max_steps=2, save_every=1, epochs=1, dropout=0.0, compile="yes")
    told = Told()
    runs = [
        train(short.replace(watch=watch, output=str(tmp_path / f"{watch}")), eval_images=0, events=told).folder
        for watch in (2, 0)
    ]
    assert told.warnings == []
    assert len(told.of("compiling")) == 2
    assert_same(adapter_of(runs[0]), adapter_of(runs[1]))


@pytest.mark.parametrize("when", ["between", "at a checkpoint", "killed while captioning"])
def test_a_filmstrip_that_is_resumed_has_each_step_once(straight, settings, tmp_path, monkeypatch, when):
    settings, told, watch = settings.replace(output=str(tmp_path / "run")), Told(), TrainingLoop._watch

    def interrupted(self):
        if "killed" in when and self.progress.step == 4:
            self.folder.log({"step": 4, "watched": []})  # and its line was written
            raise KeyboardInterrupt
        watch(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_watch", interrupted)
        last = {"between": 3, "at a checkpoint": 4}.get(when, 9)
        with pytest.raises((Stopped, KeyboardInterrupt)):
            train(settings, events=told, stop=lambda: 15 if len(told.of("step")) == last else None, eval_images=0)
    resumed = train(settings, resume=True, eval_images=0).folder
    assert_same(adapter_of(resumed), adapter_of(straight))
    assert films_of(resumed) == films_of(straight)


def test_out_of_memory_ends_the_watching_and_not_the_run(straight, settings, tmp_path, monkeypatch):
    def full(self, *asked, **how):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Captioner, "generate", full)
    told = Told()
    run = train(settings.replace(output=str(tmp_path / "run")), events=told, eval_images=0).folder
    assert [text for text in told.warnings if "no more are captioned" in text] == told.warnings
    assert len(told.warnings) == 1
    assert_same(adapter_of(run), adapter_of(straight))


def test_the_share_is_counted_and_decides_how_many_are_watched():
    held_out = of_tokens([52] * 30)
    plain = held_out_of(held_out, steps=1000, batch_size=1)  # of 100 tokens each, with 5 checkpoints
    few = plain.watched(None)
    assert len(few) == WATCHED
    assert plain.share_of_watching(few) == FORWARD * 4 * (52 + WATCHED_TOKENS) * 6 / (1000 * 100) <= WATCHED_SHARE
    assert [each.example.id for each in few] == [held_out[i].example.id for i in plain.order[:4]]
    short = held_out_of(held_out, steps=120, batch_size=1, save_every=60)  # three times: two take 2.5 %, three 3.75 %
    assert len(short.watched(None)) == 2
    assert len(short.watched(7)) == 7
    assert held_out_of(held_out, steps=30, batch_size=1).watched(None) == [] != short.watched(1)
    assert short.watched(0) == []


def test_the_console_shows_one_picture_as_it_changes(capsys, monkeypatch):
    report = TrainReport(lambda: None)
    report.progress.pause = 0
    report.watching(images=2, share=0.0123)
    for step, text in ((0, "a\x1b[2J dog"), (2, "a\x1b[2J dog"), (4, "")):
        report.watched(step=step, captions=[{"image": "x.png", "caption": text}, {"image": "y.png", "caption": "?"}])
    report.watching(images=0, share=0.5)
    said = capsys.readouterr().err.splitlines()
    assert "2 held-out pictures are captioned" in said[0]
    assert "1.2% of the operations" in said[0]
    assert said[1:3] == ["step 0  x.png: a\\x1b[2J dog", "step 4  x.png: nothing"]
    assert "off, as the captions of one picture would take 50%" in said[3]


def test_what_is_shown_of_a_long_run():
    film = Film("1", "1.png", "?", "!", {step: str(step // 300) for step in range(0, 20_001, 100)})
    shown = steps_shown([film])
    assert len(shown) == COLUMNS
    assert (shown[0], shown[-1]) == (0, 20_000)
    still = Film("1", "1.png", "?", "!", dict.fromkeys((0, 100, 200), "same"))
    assert steps_shown([still]) == [0, 200]
    assert steps_shown([]) == []


def test_nothing_held_out_is_nothing_to_watch():
    assert TrainConfig(data="x", val_split=0).watch is None
    with pytest.raises(ConfigError, match="--watch is 2; expected 0 with --val-split 0"):
        TrainConfig(data="x", val_split=0, watch=2)
