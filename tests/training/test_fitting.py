"""How many tokens a GPU takes at once, decided from its memory and rate, without one.

Run: pytest tests/training/test_fitting.py
"""

import json
from pathlib import Path

import psutil
import pytest
import torch

from tests.training.test_train import _stop_behind, adapter_of, assert_same, config
from vlm_lora.cli import main
from vlm_lora.config import TrainConfig
from vlm_lora.console import StopSignals, size
from vlm_lora.data.example import Example
from vlm_lora.inference.losses import read_memory
from vlm_lora.model.encode import Sizes
from vlm_lora.progress import TrainReport
from vlm_lora.training import fitting, loop, run
from vlm_lora.training.cost import TRAINED, CostModel
from vlm_lora.training.devices import DEVICES, RESERVED, Device, device_named
from vlm_lora.training.fitting import FILLED, fitting_tokens
from vlm_lora.training.lessons import Lessons
from vlm_lora.training.run import train_adapter as train
from vlm_lora.training.schedule import Schedule

FAST, SLOW = Device(1e18, 1e18, 1e15, 1e15), Device(1e9, 1e9, 1e15, 1e15)
"""Of endless memory, the one with a rate that the host cannot follow, the other with one that has it wait."""


def texts(lengths) -> Lessons:
    """Examples of one answer without images, of so many tokens each."""
    example = Example(id="x", images=(), dialogues=(), source="x.jsonl")
    sizes = [Sizes(length - 10, 0, [(10, 5, 0)]) for length in lengths]
    return Lessons.of([example] * len(sizes), enumerate(sizes), {})


@pytest.fixture(scope="module")
def cost(checkpoints) -> CostModel:
    return CostModel(TrainConfig(data="x", model=str(checkpoints["qwen2_vl"])), torch.bfloat16, "cuda")


def chosen(cost: CostModel, lengths, device: Device, batch_size: int, gpus: int = 1) -> int:
    schedule = Schedule([1] * len(lengths), batch_size=batch_size, epochs=1, seed=0)
    return fitting_tokens(cost, schedule, texts(lengths), {}.__getitem__, device, gpus)


def test_a_fast_gpu_takes_a_step_at_once_and_no_more_than_that(cost):
    assert chosen(cost, [1000] * 32, FAST, batch_size=4) == 4096
    assert chosen(cost, [1000] * 32, FAST, batch_size=16) == 16_384
    assert chosen(cost, [1000] * 32, FAST, batch_size=16, gpus=2) == 8192
    assert chosen(cost, [1000] * 100, FAST, batch_size=100) == 65_536


def test_what_does_not_fit_is_not_taken(cost):
    """Memory that is just enough for 8,192 tokens; a byte less is not."""
    rows = cost.trace(fitting.micro_shapes(texts([1000] * 8), {}, 8192)[0][0])
    needed = (cost.weight_bytes() + TRAINED * cost.trained_numbers() + int(rows.peak)) * RESERVED / FILLED
    assert chosen(cost, [1000] * 32, Device(1e18, 0, 0, needed + 1), batch_size=16) == 8192
    assert chosen(cost, [1000] * 32, Device(1e18, 0, 0, needed - 1), batch_size=16) == 4096
    assert chosen(cost, [1000] * 32, Device(1e18, 0, 0, 1), batch_size=16) == 4096


def test_a_slow_gpu_does_not_pad_for_fewer_kernels(cost):
    """Long and short rows in one step: together all are as wide as the longest."""
    lengths = [*[400] * 4, *[100] * 60]
    assert chosen(cost, lengths, SLOW, batch_size=64) == 4096
    assert chosen(cost, lengths, FAST, batch_size=64) == 32_768


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GB999", "a100"),
    ],
)
def test_a_gpu_is_found_by_the_name_the_driver_gives_it(name, device):
    assert (device_named(name, 7).tensor, device_named(name, 7).memory) == (DEVICES[device].tensor, 7)


def test_plan_takes_what_fits_the_device(checkpoints, photo_folder, capsys):
    command = ["plan", str(photo_folder), "--model", str(checkpoints["qwen2_vl"]), "--batch-size", "400"]
    command += ["--epochs", "40", "--json"]

    def largest(*flags: str) -> int:
        assert main([*command, *flags]) == 0
        rows, width, *_ = json.loads(capsys.readouterr().out)["cost"]["largest"]
        return rows * width

    assert largest("--device", "h200") > 8192
    assert largest("--tflops", "100", "--gpus", "1", "--device-memory", "0.001") <= 4096


@pytest.fixture
def on_a_gpu(monkeypatch) -> dict[str, Device]:
    """Runs here decide as on a GPU, whose figures are those in the dict; sizes are those of a small model's steps."""
    here = {"device": FAST}
    monkeypatch.setattr(TrainConfig, "on", lambda self, device: self)
    monkeypatch.setattr(loop, "device_here", lambda device: here["device"])
    monkeypatch.setattr(fitting, "CANDIDATES", (64, 128, 256))
    return here


def test_a_run_keeps_what_was_decided_also_where_it_resumes_elsewhere(checkpoints, photo_folder, tmp_path, on_a_gpu):
    """Bit for bit, so with micro-batches of the same size; negative control: the other GPU decides otherwise."""

    def tokens(settings: TrainConfig) -> int:
        newest = max((Path(str(settings.output)) / "checkpoints").glob("step-*"))
        return json.loads((newest / "manifest.json").read_text())["progress"]["micro_batch_tokens"]

    straight, stopped, other, given = (
        config(checkpoints, photo_folder, tmp_path / name, max_steps=6)
        for name in ("straight", "run", "other", "given")
    )
    train(straight)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, events=_stop_behind(3))
    with pytest.raises(KeyboardInterrupt):
        train(given.replace(micro_batch_tokens=128), events=_stop_behind(3))
    on_a_gpu["device"] = Device(1e18, 0, 0, 1)
    train(stopped, resume=True)
    train(given, resume=True)
    train(other)
    assert [tokens(each) for each in (straight, stopped, given, other)] == [256, 256, 128, 64]
    assert_same(adapter_of(tmp_path / "straight"), adapter_of(tmp_path / "run"))


def test_the_peaks_of_a_gpus_memory_are_logged_and_shown_beside_what_was_planned(
    checkpoints, photo_folder, tmp_path, monkeypatch, capsys
):
    """With a stand-in of the allocator's counters."""
    peaks = iter([(10, 20), (10, 20), (30, 20), (30, 40)])
    monkeypatch.setattr(loop, "peak_memory", lambda device: next(peaks, (30, 40)))
    monkeypatch.setattr(run, "peak_memory", lambda device: (30_000_000, 40_000_000))
    settings = config(checkpoints, photo_folder, tmp_path / "run", max_steps=5)
    train(settings, events=TrainReport(StopSignals()))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    told = [(line["step"], line["memory_used"], line["memory_reserved"]) for line in lines if "memory_used" in line]
    assert told == [(1, 10, 20), (3, 30, 20), (4, 30, 40)]
    planned, measured = lines[-1]["predicted"], lines[-1]["measured"]
    assert (measured["memory_bytes"], measured["reserved_bytes"]) == (30_000_000, 40_000_000)
    assert "process_bytes" not in measured
    err = capsys.readouterr().err
    assert "Memory at its highest: 30.0 MB used, 40.0 MB reserved by torch; " in err
    assert f"base weights {size(planned['weights'])}, " in err


def test_on_a_cpu_the_peak_is_the_processs(checkpoints, photo_folder, tmp_path, capsys):
    train(config(checkpoints, photo_folder, tmp_path / "run", max_steps=1), events=TrainReport(StopSignals()))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert "memory_used" not in lines[0]
    peak = lines[-1]["measured"]["process_bytes"]
    planned, measured = read_memory(tmp_path / "run")
    assert planned == lines[-1]["predicted"]["memory_by_part"]
    assert sum(planned.values()) == lines[-1]["predicted"]["memory"]
    assert list(measured.values()) == [peak]
    assert 0.9 * psutil.Process().memory_info().rss < peak < psutil.virtual_memory().total
    assert f"Memory at its highest: {size(peak)}, of the whole process" in capsys.readouterr().err
