"""Training over a base in float16: gradients too small for it are not lost, and none too large is applied.

Run: pytest tests/training/test_float16.py
"""

import json

import pytest
import torch

from tests.conftest import picture
from tests.told import Told
from tests.training.test_survival import interrupt
from tests.training.test_train import adapter_of, assert_same, config
from vlm_lora.errors import TrainingError
from vlm_lora.training import checkpoint, loop
from vlm_lora.training.run import train_adapter as train

STEPS = 6
add_up_and_clip = loop.add_up_and_clip


def steps_of(folder) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def settings(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float16")
    (folder / "photos").mkdir()
    for i in range(12):
        picture(i, (64, 48)).save(folder / f"photos/{i:02}.png")
        (folder / f"photos/{i:02}.txt").write_text(f"picture number {i}")
    return config(checkpoints, folder / "photos", folder / "run", dtype="float16", max_steps=STEPS, save_every=2)


@pytest.fixture(scope="module")
def straight(settings):
    return train(settings).folder


def test_it_learns_what_float32_does(settings, straight, tmp_path):
    plain = train(settings.replace(dtype="float32", output=str(tmp_path / "plain"))).folder
    for line, expected in zip(steps_of(straight), steps_of(plain), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)
        assert (line["loss_scale"], line["overflows"]) == (checkpoint.FIRST_SCALE, 0)
        assert "loss_scale" not in expected


def test_the_scale_of_the_loss_changes_no_bit_of_a_gradient(settings, tmp_path, monkeypatch):
    """In float32, where nothing is too small or too large; and twice the scale by mistake is seen."""

    def run(scale: float | None, name: str) -> dict:
        monkeypatch.setattr(loop.TrainingLoop, "_resume", lambda self, allow: setattr(self.progress, *given) or 0)
        given = ("loss_scale", scale)
        return adapter_of(train(settings.replace(dtype="float32", output=str(tmp_path / name))).folder)

    plain = run(None, "plain")
    assert_same(run(2.0**10, "scaled"), plain)
    monkeypatch.setattr(loop, "add_up_and_clip", lambda *given: add_up_and_clip(*given[:-1], given[-1] / 2))
    with pytest.raises(AssertionError):
        assert_same(run(2.0**10, "wrong"), plain)


def test_gradients_too_large_are_computed_again_and_no_answer_is_left_out(settings, straight, tmp_path, monkeypatch):
    """From far too large a scale the run comes to one that fits, in its first step, and goes on as if it had begun so;
    also where it is killed and resumed."""
    monkeypatch.setattr(loop, "FIRST_SCALE", 2.0**40)
    run = settings.replace(output=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        train(run, events=Told(4, interrupt))
    resumed = train(run, resume=True).folder
    lines = steps_of(resumed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["overflows"] > 10
    assert lines[0]["loss_scale"] == 2.0 ** (40 - lines[0]["overflows"])
    assert lines[-1]["overflows"] >= lines[0]["overflows"]
    whole = train(settings.replace(output=str(tmp_path / "whole"))).folder
    assert_same(adapter_of(resumed), adapter_of(whole))
    for line, expected in zip(lines, steps_of(straight), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=2e-3)


def test_what_no_scale_helps_is_not_finite(settings, tmp_path, monkeypatch):
    def infinite(*given):
        result = add_up_and_clip(*given)
        return type(result)(result.loss, torch.inf)

    monkeypatch.setattr(loop, "add_up_and_clip", infinite)
    with pytest.raises(TrainingError, match=r"gradient norm inf: not finite.*--dtype float32"):
        train(settings.replace(output=str(tmp_path / "run")))


def test_the_scale_starts_and_grows_as_torchs_does():
    scaler = torch.amp.GradScaler("cpu")
    assert scaler.get_growth_interval() == checkpoint.DOUBLED_AFTER
    assert scaler.get_scale() == checkpoint.FIRST_SCALE


def test_the_scale_is_doubled_after_many_steps(monkeypatch):
    monkeypatch.setattr(checkpoint, "DOUBLED_AFTER", 3)
    progress = checkpoint.Progress(100, loss_scale=4.0)
    progress.note_scaled_step()
    progress.halve_scale()
    scales = []
    for _ in range(7):
        progress.note_scaled_step()
        scales.append(progress.loss_scale)
    assert scales == [2.0, 2.0, 4.0, 4.0, 4.0, 8.0, 8.0]
    assert progress.overflows == 1
    unscaled = checkpoint.Progress(100)
    unscaled.note_scaled_step()
    assert unscaled.loss_scale is None
