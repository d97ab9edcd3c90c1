"""What a run survives, each as exactly as if nothing had happened: little memory, bad numbers, full disks, signals."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import picture
from tests.told import Told
from tests.training.test_train import adapter_of, assert_same, config
from vlm_lora import console
from vlm_lora.cli import main
from vlm_lora.errors import CheckpointError, ConfigError, Stopped, TrainingError
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.encode import Encoder
from vlm_lora.progress import TrainReport
from vlm_lora.training import folder, loop, prepare, run, step, tracker
from vlm_lora.training.batches import Loader
from vlm_lora.training.events import Events
from vlm_lora.training.run import train_adapter as train
from vlm_lora.training.techniques import Techniques


def log_of(folder) -> list[dict]:
    """Without the last line of a run in one go, of its cost."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    read = [json.loads(line, parse_constant=refuse) for line in lines]
    return [line for line in read if "predicted" not in line]


def interrupt():
    raise KeyboardInterrupt


def differ(one: dict, other: dict) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def straight(checkpoints, tmp_path_factory):
    """The run that nothing happened to; dropout on, saves behind steps 3, 6 and 8, the largest step in the middle."""
    base = tmp_path_factory.mktemp("straight")
    (base / "photos").mkdir()
    for i in range(12):
        picture(i, (64 + 16 * (i % 3), 64)).save(base / f"photos/{i:02}.png")
        more = ", and more is said of it than of all the others" if i == 7 else ""
        (base / f"photos/{i:02}.txt").write_text(f"A picture of number {i}{more}.\n", encoding="utf-8")
    return train(config(checkpoints, base / "photos", base / "run")).folder


# -- one at a time ---------------------------------------------------------------------------------------------------


def test_a_run_folder_in_use_is_refused_and_a_killed_users_is_not(checkpoints, photo_folder, tmp_path):
    settings = config(checkpoints, photo_folder, tmp_path / "run", max_steps=2, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(settings, events=Told(2, interrupt))
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True)\n"
    hold += "time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "run/.lock"], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(CheckpointError, match=r"run: another process is training into it\.") as refused:
            train(settings, resume=True)
        assert "\n" not in str(refused.value)
        other.kill()
    train(settings, resume=True)


def test_a_job_that_is_restarted_says_resume_the_first_time_too(checkpoints, photo_folder, tmp_path):
    """Killed before mkdir, after it, or after the lock: as the scripts in docs/distributed.md say it."""
    settings = config(checkpoints, photo_folder, tmp_path / "run", max_steps=1)

    class Heard(Events):
        def __init__(self):
            self.warnings = []

        def warning(self, text):
            self.warnings.append(text)

    first, later = Heard(), Heard()
    result = train(settings, resume=True, events=first)
    assert first.warnings == [f"--resume: there is no run in {tmp_path / 'run'} yet; it starts from the beginning."]
    for files in ((), (".lock",)):
        other = tmp_path / f"killed-{len(files)}"
        other.mkdir()
        for name in files:
            (other / name).touch()
        again = train(settings.replace(output=str(other)), resume=True, events=later)
        assert_same(adapter_of(again.folder), adapter_of(result.folder))
    assert later.warnings == []


def test_resume_alone_means_the_newest_unfinished_run_of_the_data(checkpoints, photo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config(checkpoints, photo_folder, "x", max_steps=2, save_every=1).replace(output=None)
    with pytest.raises(CheckpointError, match=r"--resume: runs/ holds no unfinished run of .*photos\. Give its folder"):
        train(settings, resume=True)
    others = ["photos-20990101-000000/adapter", "photos-more-20990101-000000", "photos-20200101-000000", "photos-mine"]
    for other in others:
        (tmp_path / "runs" / other).mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        train(settings, events=Told(2, interrupt))
    (begun,) = (tmp_path / "runs").glob("photos-*/checkpoints")
    told = Told()
    assert train(settings, resume=True, events=told).folder == begun.parent.relative_to(tmp_path)
    assert told.of("folder") == [{"folder": begun.parent.relative_to(tmp_path)}]
    assert told.of("start")[0]["step"] == 1


# -- memory ----------------------------------------------------------------------------------------------------------


GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. (not really)")
CPU_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")


def out_of_memory(monkeypatch, fails, error=GPU_FULL):
    """``fails(tokens)`` says whether a micro-batch of so many tokens, padding included, finds no room."""
    real, sizes = step.loss_sum, []

    def loss_sum(backbone, batch, *how):
        sizes.append(batch.input_ids.numel())
        loss = real(backbone, batch, *how)
        if backbone.model.training and fails(sizes[-1]):
            raise error
        return loss

    monkeypatch.setattr(step, "loss_sum", loss_sum)
    return sizes


@pytest.mark.parametrize("error", [GPU_FULL, CPU_FULL], ids=["GPU", "CPU"])
def test_out_of_memory_is_found_before_the_first_step_and_settled(checkpoints, straight, tmp_path, monkeypatch, error):
    """P10: equal to the bit to a run that was started with the micro-batch that is arrived at."""
    photos = straight.parent / "photos"
    told = Told()
    with monkeypatch.context() as patch:
        out_of_memory(patch, lambda tokens: tokens > 300, error)  # as the fourth step has, and none before it
        halved = train(config(checkpoints, photos, tmp_path / "halved"), events=told).folder
    assert told.events.index(("warning", told.of("warning")[0])) < [k for k, _ in told.events].index("step")
    manifest = json.loads((halved / "checkpoints/step-000008/manifest.json").read_text())
    arrived = manifest["progress"]["micro_batch_tokens"]
    assert f"micro-batches are of {arrived:,} tokens at most" in told.warnings[-1]
    small = train(config(checkpoints, photos, tmp_path / "small", micro_batch_tokens=arrived)).folder
    assert_same(adapter_of(halved), adapter_of(small))
    assert differ(adapter_of(halved), adapter_of(straight))  # other rows stand together: other dropout, other rounding
    for name in ("step", "lr", "answers", "tokens"):
        assert [line.get(name) for line in log_of(halved)] == [line.get(name) for line in log_of(straight)]


def test_out_of_memory_with_linear_attention_is_settled_too(checkpoints, straight, tmp_path, monkeypatch):
    settings = config(checkpoints, straight.parent / "photos", tmp_path / "halved", model=str(checkpoints["qwen3_5"]))
    with monkeypatch.context() as patch:
        out_of_memory(patch, lambda tokens: tokens > 200)
        halved = train(settings).folder
    arrived = json.loads((halved / "checkpoints/step-000008/manifest.json").read_text())["progress"][
        "micro_batch_tokens"
    ]
    assert arrived < 4096
    small = train(settings.replace(output=str(tmp_path / "small"), micro_batch_tokens=arrived)).folder
    assert_same(adapter_of(halved), adapter_of(small))


def test_out_of_memory_in_the_middle_tries_the_same_step_again(checkpoints, straight, tmp_path, monkeypatch):
    """P10: from there on equal to the bit to a run that is stopped before that step and goes on with less."""
    photos = straight.parent / "photos"
    told = Told(7, interrupt)
    with monkeypatch.context() as patch:
        out_of_memory(patch, lambda tokens: len(told.of("step")) == 4 and tokens > 200)
        settings = config(checkpoints, photos, tmp_path / "once", save_every=1)
        with pytest.raises(KeyboardInterrupt):
            train(settings, events=told)
    assert len(told.warnings) == 1
    once = train(settings, resume=True).folder  # out of memory no more: what was learnt about it is kept
    arrived = json.loads((once / "checkpoints/step-000008/manifest.json").read_text())["progress"]["micro_batch_tokens"]
    assert arrived < 4096

    by_hand = config(checkpoints, photos, tmp_path / "by-hand", save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(by_hand, events=Told(5, interrupt))  # behind the checkpoint of step 4
    less = by_hand.replace(micro_batch_tokens=arrived)
    assert_same(adapter_of(train(less, resume=True, allow_change=["micro_batch_tokens"]).folder), adapter_of(once))
    assert differ(adapter_of(once), adapter_of(straight))


def test_out_of_memory_with_nothing_to_halve_names_the_knobs(checkpoints, photo_folder, tmp_path, monkeypatch):
    told = Told()
    sizes = out_of_memory(monkeypatch, lambda tokens: True)
    with pytest.raises(TrainingError, match=r"Out of memory.*--max-pixels.*--micro-batch-tokens"):
        train(config(checkpoints, photo_folder, tmp_path / "run"), events=told)
    assert not told.of("step")
    assert len(sizes) < 8
    with monkeypatch.context() as patch:
        patch.setattr(run, "count_tokens", lambda *args: (_ for _ in ()).throw(CPU_FULL))
        with pytest.raises(TrainingError, match=r"Out of memory.*--max-pixels"):
            train(config(checkpoints, photo_folder, tmp_path / "tower"))


def test_a_bug_is_not_taken_for_a_lack_of_memory(checkpoints, photo_folder, tmp_path, monkeypatch):
    out_of_memory(monkeypatch, lambda tokens: True, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(config(checkpoints, photo_folder, tmp_path / "run"))


def test_trying_the_largest_step_first_changes_nothing(checkpoints, straight, tmp_path, monkeypatch):
    real, largest = loop.TrainingLoop._largest_step, []
    monkeypatch.setattr(loop.TrainingLoop, "_largest_step", lambda *args: largest.append(real(*args)) or 0)
    untried = train(config(checkpoints, straight.parent / "photos", tmp_path / "run")).folder
    assert largest[0] > 0, "there was nothing to try first"
    assert_same(adapter_of(untried), adapter_of(straight))


def test_the_largest_of_the_steps_that_are_left_is_found_also_late_in_a_long_run(monkeypatch):
    monkeypatch.setattr(loop, "largest_micro_batch", lambda tokens, *_: tokens)
    late = SimpleNamespace(
        schedule=SimpleNamespace(num_steps=10_000),
        progress=SimpleNamespace(micro_batch_tokens=1024),
        processes=SimpleNamespace(count=1),
        _examples=lambda step: 900 if step == 9_500 else 100,
    )
    assert loop.TrainingLoop._largest_step(late, 9_000) == 9_500
    looked_at = []
    late._examples = lambda step: looked_at.append(step) or 100
    assert loop.TrainingLoop._largest_step(late, 0) == 0
    assert 2000 <= len(set(looked_at)) <= 2001


# -- numbers ---------------------------------------------------------------------------------------------------------


def poison(monkeypatch, bad: str, source: str = "05.png:1"):
    """Steps that hold this example get a loss, or else a gradient, that is not finite."""
    real = loop.accumulate_gradients

    def accumulate(loader, examples, *rest):
        loss = real(loader, examples, *rest)
        if source in [each.example.place for each in examples]:
            if bad == "loss":
                return loss * float("nan")
            next(p for p in loader.backbone.model.parameters() if p.grad is not None).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(loop, "accumulate_gradients", accumulate)


@pytest.mark.parametrize(("bad", "told"), [("loss", "loss nan"), ("gradient", "gradient norm (inf|nan)")])
def test_numbers_that_are_not_finite_are_never_applied(checkpoints, straight, tmp_path, monkeypatch, bad, told):
    poison(monkeypatch, bad)
    photos = straight.parent / "photos"
    settings = config(checkpoints, photos, tmp_path / "run", save_every=1)
    with pytest.raises(TrainingError, match=rf"{told}.*not finite, and not applied.*05\.png.*--on-nonfinite skip"):
        train(settings)
    assert not (tmp_path / "run/adapter").exists()
    named = log_of(tmp_path / "run")[-1]["examples"]
    assert len(named) == 4
    assert any("05.png" in source for source in named)

    skip = settings.replace(on_nonfinite="skip")
    told = Told()
    result = train(skip, resume=True, events=told)
    skipped = [line["step"] for line in log_of(result.folder) if line.get("skipped")]
    assert len(skipped) == len(told.warnings) == 3  # once an epoch
    assert all("05.png" in text for text in told.warnings)
    assert all(torch.isfinite(tensor).all() for tensor in adapter_of(result.folder).values())

    again = skip.replace(output=str(tmp_path / "again"))  # stopped right behind a step that was left out
    with pytest.raises(KeyboardInterrupt):
        train(again, events=Told(skipped[1] + 1, interrupt))
    assert_same(adapter_of(train(again, resume=True).folder), adapter_of(result.folder))
    assert differ(adapter_of(result.folder), adapter_of(straight))
    with pytest.raises(TrainingError, match="More than --max-skipped 2 steps"):
        train(skip.replace(output=str(tmp_path / "many"), max_skipped=2))


def test_of_a_large_step_eight_are_named_and_all_are_in_the_log():
    lessons = [namedtuple("L", "example")(namedtuple("E", "place")(f"{i}.png:1")) for i in range(20)]
    text = loop._named(lessons)
    assert text.endswith("7.png:1 and 12 more, all named in metrics.jsonl")
    assert len(loop._sources(lessons)) == 20
    assert loop._named(lessons[:8]).endswith(", 7.png:1")


def test_a_loss_spike_is_flagged_and_changes_nothing(checkpoints, straight, tmp_path, monkeypatch):
    photos = straight.parent / "photos"
    calm = train(config(checkpoints, photos, tmp_path / "calm", epochs=6), events=(quiet := Told())).folder
    assert quiet.warnings == []
    real, calls = loop.accumulate_gradients, []

    def accumulate(*args):
        calls.append(args)
        return real(*args) * (50 if len(calls) == 14 else 1)  # the first is the trial of the largest step

    monkeypatch.setattr(loop, "accumulate_gradients", accumulate)
    monkeypatch.setattr(loop.TrainingLoop, "_largest_step", lambda self, first: first + 1)
    told = Told()
    spiked = train(config(checkpoints, photos, tmp_path / "spiked", epochs=6), events=told).folder
    (text,) = told.warnings
    assert text.startswith("Step 13: loss")
    assert "highest of the last 12 steps" in text
    assert ".png:1" in text
    assert_same(adapter_of(spiked), adapter_of(calm))


@pytest.mark.parametrize("how", ["frozen", "detached"])
def test_a_dead_adapter_tensor_is_named(checkpoints, photo_folder, tmp_path, how):
    def attach(*args):
        adapter = attach_adapter(*args)
        name, parameter = next((n, p) for n, p in adapter.named_parameters() if "layers.1" in n and "lora_A" in n)
        if how == "frozen":
            parameter.requires_grad_(False)
        else:
            parameter.register_hook(torch.zeros_like)
        dead.append(name)
        return adapter

    dead = []
    told = Told()
    settings = config(checkpoints, photo_folder, tmp_path / "run", max_steps=3)
    train(settings, events=told, techniques=Techniques(attach=attach))
    assert told.warnings
    assert all(dead[0] in text and text.startswith("1 of ") for text in told.warnings)


# -- the best adapter, and evaluation --------------------------------------------------------------------------------


def tensors_of(checkpoint) -> dict:
    return load_file(checkpoint / "adapter.safetensors")


def scripted(monkeypatch, losses):
    """Held-out losses as given, one an evaluation."""
    rest = iter(losses)
    monkeypatch.setattr(loop, "mean_loss", lambda *args: next(rest))


def test_early_stopping_ends_with_the_best_adapter(checkpoints, straight, tmp_path, monkeypatch):
    photos = straight.parent / "photos"
    settings = config(checkpoints, photos, tmp_path / "run", save_every=1, keep_checkpoints=1, patience=2)
    scripted(monkeypatch, [3.0, 1.0, float("nan")])
    with pytest.raises(KeyboardInterrupt):
        train(settings, events=Told(4, interrupt))  # what was best, and for how long, is in the checkpoint
    scripted(monkeypatch, [float("nan"), 2.0])  # of the step that was saved, found anew; and of the next
    told = Told()
    result = train(settings, resume=True, events=told)
    assert result.steps == 4
    inside = {name: parameter.detach() for name, parameter in result.adapter.named_parameters()}
    assert_same(inside, tensors_of(tmp_path / "run/checkpoints/step-000002"))
    assert told.of("best") == [{"step": 2, "loss": 1.0, "images": 2, "of": 2, "last": 4, "num_steps": 8}]
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-000002", "step-000004"]
    scripted(monkeypatch, [2.0])
    again = train(settings, resume=True)
    assert again.steps == 4, "a run that has stopped early is not resumed"


def test_the_best_adapter_without_stopping_early(checkpoints, straight, tmp_path, monkeypatch):
    settings = config(checkpoints, straight.parent / "photos", tmp_path / "run", load_best_at_end=True)
    scripted(monkeypatch, [3.0, 1.0, 2.0])
    result = train(settings)
    assert result.steps == 8
    inside = {name: parameter.detach() for name, parameter in result.adapter.named_parameters()}
    assert_same(inside, tensors_of(tmp_path / "run/checkpoints/step-000006"))
    assert differ(adapter_of(result.folder), adapter_of(straight))
    (tmp_path / "run/checkpoints/step-000006/adapter.safetensors").write_bytes(b"")
    scripted(monkeypatch, [2.0, 2.0])
    with pytest.raises(CheckpointError, match=r"best checkpoint is damaged or gone.*without --patience"):
        train(settings, resume=True)
    assert_same(adapter_of(train(settings.replace(load_best_at_end=False), resume=True).folder), adapter_of(straight))


def test_evaluation_disturbs_nothing(checkpoints, straight, tmp_path):
    photos, val = straight.parent / "photos", tmp_path / "val"
    val.mkdir()
    for i in range(30, 34):
        picture(i).save(val / f"{i}.png")
        (val / f"{i}.txt").write_text(f"A picture of number {i}.")
    without = config(checkpoints, photos, tmp_path / "without", val_split=0.0, save_every=100)
    every = config(checkpoints, photos, tmp_path / "every", val=str(val), save_every=1)
    one, other = train(without), train(every)
    assert not [line for line in log_of(one.folder) if "held_out_loss" in line]
    losses = [line["held_out_loss"] for line in log_of(other.folder) if "held_out_loss" in line]
    assert len(losses) == other.steps == 9
    assert_same(adapter_of(one.folder), adapter_of(other.folder))
    backbone = other.adapter.backbone
    assert not backbone.model.training
    data = prepare.SplitData([], list(other.held_out), (), "", "", None)
    encoder = Encoder(backbone)
    held_out = prepare.count_tokens(every, data, encoder, lambda *_: None).held_out
    again = step.mean_loss(Loader(backbone, other.features, other.processes), held_out, 1024)
    assert losses[-1] == pytest.approx(again, rel=1e-6), "it was computed with dropout"


def test_early_stopping_needs_held_out_data():
    with pytest.raises(ConfigError, match="--patience is 2; expected none with --val-split 0"):
        config({"qwen2_vl": "x"}, "x", "y", val_split=0.0, patience=2)


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["in the step", "in the evaluation", "killed in the evaluation"])
def test_a_step_that_is_due_is_saved_before_it_is_evaluated(checkpoints, straight, tmp_path, monkeypatch, when):
    """A scheduler's minute must not pass with an evaluation; what that gives is found anew when the run goes on."""
    settings = config(checkpoints, straight.parent / "photos", tmp_path / "run", load_best_at_end=True)
    told, real, saved = Told(), loop.mean_loss, tmp_path / "run/checkpoints/step-000003"

    def mean_loss(*args):
        evaluated.append(saved.is_dir())
        if when == "killed in the evaluation":
            raise KeyboardInterrupt
        return real(*args)

    evaluated: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "mean_loss", mean_loss)
        with pytest.raises((Stopped, KeyboardInterrupt)) as stopped:
            train(
                settings,
                events=told,
                stop=lambda: (
                    signal.SIGTERM if (len(told.of("step")) == 3 if when == "in the step" else evaluated) else None
                ),
            )
    assert evaluated == ([] if when == "in the step" else [True])
    assert saved.is_dir()
    if when != "killed in the evaluation":
        assert stopped.value.exit_code == 143
    with (tmp_path / "run/metrics.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')  # a line that was cut off
    result = train(settings, resume=True)
    assert_same(adapter_of(result.folder), adapter_of(straight))
    kept = ("step", "loss", "lr", "grad_norm", "held_out_loss")
    short = [[{k: line[k] for k in kept if k in line} for line in log_of(f)] for f in (result.folder, straight)]
    assert short[0] == short[1]


def test_every_signal_that_ends_runs_saves_and_what_was_ignored_stays_so():
    """Without a run: SIGUSR1 is SLURM's, SIGHUP a closed terminal's, which sends it twice."""
    before = {number: signal.getsignal(number) for number in console.STOPPING}
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signals = console.StopSignals()
            signals.catch()
            signal.raise_signal(number)
            assert signals() == number
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR1)
            signals.release()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals = console.StopSignals()
        signals.catch()
        signal.raise_signal(signal.SIGHUP)
        assert signals() is None
        signals.release()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert Stopped("x", signal.SIGUSR1).exit_code == 138


@pytest.mark.parametrize("terminal", [False, True])
def test_a_closed_stderr_ends_the_printing_and_nothing_else(monkeypatch, terminal):
    """As behind ``2>&1 | head``."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        report = TrainReport(console.StopSignals())
        report.progress.terminal = terminal
        for step in range(1, 4):
            report.held_out(step=step, loss=1.0, images=1, of=1)
            report.warning(text="still here")
        assert os.readlink(f"/proc/self/fd/{writer}") == os.devnull


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(number):
    code = "from vlm_lora.console import StopSignals; import time; s = StopSignals(); s.catch(); print(flush=True)\n"
    code += "while not s(): time.sleep(0.01)\nprint(s(), flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert int(process.stdout.readline()) == number
        process.send_signal(number)
        assert process.wait(timeout=10) == -number  # a shell shows 128 + number
        assert b"Once more ends it at once" in process.stderr.read()


# -- disks -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(checkpoints, straight, tmp_path):
    """P8: RLIMIT_FSIZE makes each write beyond it fail, as a full disk does."""
    settings = config(checkpoints, straight.parent / "photos", tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=r"step-000006: could not be written \(.*\)\. The checkpoints before"):
            train(settings, events=Told(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000003"]
    assert_same(adapter_of(train(settings, resume=True).folder), adapter_of(straight))


@pytest.mark.parametrize("file", ["report.html", "README.md"])
def test_a_disk_that_fills_behind_the_last_step_is_one_line_and_the_adapter_is_there(
    checkpoints, photo_folder, tmp_path, monkeypatch, capsys, file
):
    real = run.Path.write_text

    def write_text(path, *args, **options):
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **options)

    monkeypatch.setattr(run.Path, "write_text", write_text)
    command = ["train", str(photo_folder), "--model", str(checkpoints["qwen2_vl"]), "--output", str(tmp_path / "run")]
    assert main([*command, "--max-steps", "1", "--rank", "4", "--val-split", "0.1"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"vlm-lora: {tmp_path}/run: could not be written (No space left on device). The adapter is")
    assert adapter_of(tmp_path / "run")


def test_a_log_that_cannot_be_written_is_said_too(checkpoints, photo_folder, tmp_path):
    settings = config(checkpoints, photo_folder, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: could not be written \(File too large\)"):
            train(settings, events=Told(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_folder_that_vanishes_is_not_made_anew(checkpoints, photo_folder, tmp_path):
    told = Told(2, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"step-000003: could not be written \(No such file"):
        train(config(checkpoints, photo_folder, tmp_path / "run"), events=told)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("why", ["a file in its path", "read-only", "too little room"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_learnt(
    checkpoints, photo_folder, tmp_path, monkeypatch, why
):
    told, output = Told(), tmp_path / "run"
    if why == "a file in its path":
        (tmp_path / "file").touch()
        output, message = tmp_path / "file/run", r"cannot be written \(Not a directory\)"
    elif why == "read-only":  # not by chmod: root may write all the same
        message = r"cannot be written \(Read-only file system\)"
        monkeypatch.setattr(run.Path, "touch", lambda self: (_ for _ in ()).throw(OSError(30, os.strerror(30))))
    else:
        message = r"0 MiB are free on this disk, the run's checkpoints need \d+ MiB"
        monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(CheckpointError, match=message):
        train(config(checkpoints, photo_folder, output), events=told)
    assert not told.of("start")


# -- changes, trackers, the network ----------------------------------------------------------------------------------


def test_a_change_is_gone_on_with_if_told_so(checkpoints, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000008")
    settings = config(checkpoints, straight.parent / "photos", tmp_path / "run", lr=1e-3, seed=1)
    with pytest.raises(CheckpointError, match=r"\(seed: 0, now 1\).*--allow-change seed"):
        train(settings, resume=True, allow_change=["lr"])
    with pytest.raises(ConfigError, match=r"--allow-change learning_rate: expected one of .*data.*lr"):
        train(settings, resume=True, allow_change=["learning_rate"])
    for allowed in (["lr"], ["lr", "rank"]):
        with pytest.raises(CheckpointError, match=r"other tensors .*rank: 4, now 2.*no --allow-change makes fit"):
            train(settings.replace(seed=0, rank=2), resume=True, allow_change=allowed)
    assert "\nlr: 0.01\n" in (tmp_path / "run/config.yaml").read_text(), "what was refused stands in config.yaml"
    changed = train(settings, resume=True, allow_change=["lr", "seed"]).folder
    assert differ(adapter_of(changed), adapter_of(straight))
    train(settings, resume=True)  # from here on it is the run's own


def test_allow_change_needs_resume(capsys):
    assert main(["train", "x", "--allow-change", "lr"]) == 2
    assert "--allow-change goes with --resume" in capsys.readouterr().err


def test_tensorboard_gets_what_the_log_gets(checkpoints, straight, tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = config(checkpoints, straight.parent / "photos", tmp_path / "run", report_to="tensorboard")
    folder = train(settings).folder
    assert_same(adapter_of(folder), adapter_of(straight))
    events = reading.EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in ("loss", "lr", "held_out_loss"):
        wanted = [(line["step"], pytest.approx(line[name])) for line in log_of(folder) if name in line]
        assert [(event.step, event.value) for event in events.Scalars(name)] == wanted


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_under_tensorboard_is_one_line(checkpoints, photo_folder, tmp_path):
    pytest.importorskip("tensorboard")
    settings = config(checkpoints, photo_folder, tmp_path / "run", report_to="tensorboard", epochs=9, save_every=99)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # its file grows faster than metrics.jsonl
        with pytest.raises(CheckpointError, match=r"run/tensorboard: could not be written \(.*File too large"):
            train(settings, events=Told(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_500, hard))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tensorboard_takes_a_run_on_two_sources(tmp_path):
    pytest.importorskip("tensorboard")
    accelerator = tracker.Accelerator(log_with="tensorboard", project_dir=str(tmp_path))
    settings = config({"qwen2_vl": "x"}, "x", tmp_path, report_to="tensorboard").replace(data=("a", "b:2"))
    with tracker.tracked(settings, accelerator, tmp_path, resume=False):
        pass
    (written,) = (tmp_path / "tensorboard").rglob("hparams.yml")
    assert "data: a, b:2\n" in written.read_text()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_missing_or_does_not_start_is_one_line_before_anything_is_loaded(
    checkpoints, photo_folder, tmp_path, monkeypatch, name
):
    settings = config(checkpoints, photo_folder, tmp_path / "run", report_to=name)
    monkeypatch.setattr(run, "load_backbone", lambda *args, **options: pytest.fail("the model is loaded"))
    monkeypatch.setattr(tracker, "get_available_trackers", list)
    with pytest.raises(ConfigError, match=f"^--report-to {name}: is not installed: pip install {name}.$"):
        train(settings)
    assert not (tmp_path / "run").exists()

    def fail(*args):
        raise RuntimeError("No API key.\n  Log in.")

    monkeypatch.setattr(tracker, "get_available_trackers", lambda: [name])
    monkeypatch.setattr(tracker.Accelerator, "init_trackers", fail)
    message = rf"^--report-to {name}: could not be started \(No API key\. Log in\.\)\. Mend .* leave .* out\.$"
    with pytest.raises(ConfigError, match=message):
        train(settings)


class FakeTracker:
    """Of `Accelerator` what a tracker needs; it prints, as trackio does."""

    def __init__(self):
        self.trackers, self.calls = [self], []

    def init_trackers(self, project, settings, own):
        print("started")
        self.calls.append((project, own))

    def get_tracker(self, name, unwrap):
        return self

    def finish(self, **how):
        print("ended")
        self.calls.append(how)


def test_a_run_that_is_gone_on_with_goes_on_in_its_tracker(tmp_path, capsys):
    """What wandb 0.31 and trackio 0.43 make of these settings was looked at by hand; neither is installed for tests."""
    settings = config({"qwen2_vl": "x"}, "x", tmp_path)
    fake = FakeTracker()
    for resume in (False, True):
        with tracker.tracked(settings.replace(report_to="trackio"), fake, tmp_path, resume):
            pass
    assert [own["trackio"]["resume"] for _, own in fake.calls[::2]] == ["never", "allow"]
    assert capsys.readouterr().out == ""

    fake = FakeTracker()
    with pytest.raises(Stopped), tracker.tracked(settings.replace(report_to="wandb"), fake, tmp_path, False):
        raise Stopped("x", 15)
    assert fake.calls[0] == ("vlm-lora", {"wandb": {"name": tmp_path.name, "dir": str(tmp_path), "resume": "auto"}})
    with tracker.tracked(settings.replace(report_to="wandb"), fake, tmp_path, True):
        pass
    assert fake.calls[1::2] == [{"exit_code": 1}, {"exit_code": 0}]  # with 0 it forgets which run to go on with


def test_training_and_captioning_open_no_connection(checkpoints, photo_folder, tmp_path, monkeypatch, capsys):
    """P12, with the hub online as it is for a user; a hub's name as control."""
    tried, watching = [], [True]

    def watch(event, args):
        if watching and event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
            tried.append(event)
            raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    sys.addaudithook(watch)  # which nothing takes away again
    try:
        command = [
            "train",
            str(photo_folder),
            "--model",
            str(checkpoints["qwen2_vl"]),
            "--output",
            str(tmp_path / "run"),
        ]
        assert main([*command, "--max-steps", "1", "--rank", "4"]) == 0
        assert main(["caption", str(photo_folder / "00.png"), "--adapter", str(tmp_path / "run")]) == 0
        assert not tried
        assert main(["caption", str(photo_folder / "00.png"), "--model", "nobody/nothing-of-this-name"]) == 1
        assert tried
    finally:
        watching.clear()
