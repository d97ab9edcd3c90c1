"""Runs that are killed at random moments, and at every file operation of a save, then gone on with.

    python -m bench.kill_campaign

One process loads the libraries and a small random model; every run is a fork of it, so that a run takes a second
where a new process would take ten. A run trains eight steps with dropout and saves behind each, the worst case. It is
killed by SIGKILL at a random moment (of its processor time, so that a busy machine changes nothing), gone on with,
killed again, one to five times, then finished. The second part stops a run before each call into the operating system
that one save makes (seen by Python's profiler: nothing in the package knows of it), also with half of a file written.
Counted are: runs that could not be gone on with; saves that had ended and were lost; and runs whose adapter, optimizer
state or logged losses differ in any bit from those of the run that was never killed. The same random kills then meet
transformers' own Trainer on the same base model, with LoRA, saving as often.

The record goes to bench/results/kill_campaign.json; the last line of output is the same JSON. It exits with 1 if a
count of ours is not zero.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from tests.conftest import picture, write_checkpoint
from vlm_lora import TrainConfig, __version__
from vlm_lora.console import say
from vlm_lora.model.backbone import load_backbone
from vlm_lora.training import loop, run
from vlm_lora.training.events import Events

ROOT = Path(__file__).resolve().parents[1]
STEPS = 8
STOPPED_SAVE = 5
"""The save that is stopped at each of its calls: the first checkpoints have to make room by then."""

Body = Callable[[Path, Callable[[str], None]], None]
"""One run in the given folder, from its newest checkpoint if it has one; tells ``start N`` and ``saved N``."""


class Child:
    """A fork that runs ``body`` and tells lines through a pipe."""

    def __init__(self, body: Body, folder: Path):
        reader, writer = os.pipe()
        self.reader, self.pid = reader, os.fork()
        if self.pid:
            os.close(writer)
            return
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            body(folder, lambda line: os.write(writer, (line + "\n").encode()))
            code = 0
        except BaseException as error:
            os.write(writer, f"error {type(error).__name__}: {' '.join(str(error).split())[:300]}\n".encode())
        finally:
            os._exit(code)

    def end(self) -> tuple[int, list[str]]:
        """Its exit code (negative: a signal) and what it told."""
        with os.fdopen(self.reader, "rb") as pipe:
            lines = pipe.read().decode().splitlines()
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), lines

    def processor_seconds(self) -> float:
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def killed_after(self, processor_seconds: float) -> tuple[int, list[str]]:
        while self.processor_seconds() < processor_seconds:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break  # it has ended by itself
            time.sleep(0.001)
        os.kill(self.pid, signal.SIGKILL)  # no harm if it has ended: it is not waited for yet
        return self.end()


def steps_told(lines: list[str], what: str) -> list[int]:
    return [int(line.split()[1]) for line in lines if line.startswith(what + " ")]


# -- our runs ------------------------------------------------------------------------------------------------------


def our_body(base: Path, photos: Path, stop_at: tuple[int, bool] | None = None) -> Body:
    backbone = load_backbone(str(base))  # before the fork: each run finds it as it was loaded

    def body(folder: Path, tell: Callable[[str], None]) -> None:
        real = loop.save_checkpoint

        def save(checkpoints, progress, *rest):
            if stop_at is not None and progress.step == STOPPED_SAVE:
                with stopped_at(*stop_at, tell):
                    real(checkpoints, progress, *rest)
            else:
                real(checkpoints, progress, *rest)
            tell(f"saved {progress.step}")

        loop.save_checkpoint, run.load_backbone = save, lambda *args, **options: backbone
        config = TrainConfig(
            data=str(photos), model=str(base), output=str(folder), rank=4, batch_size=4, epochs=100.0, max_steps=STEPS,
            lr=1e-2, dropout=0.1, val_split=0.2, save_every=1, load_best_at_end=False,
        )  # fmt: skip

        class Telling(Events):
            def start(self, *, step, **values):
                tell(f"start {step}")

        run.train_adapter(config, resume=folder.exists(), events=Telling())

    return body


@contextmanager
def stopped_at(
    place: int, torn: bool, tell: Callable[[str], None] = lambda line: None, skip: Collection[str] = ()
) -> Iterator[None]:
    """Inside, kill this process before its call number ``place`` into the operating system, and tell which it was.

    ``torn``: behind its file of tensors number ``place``, once that has lost its second half. Calls in ``skip`` do not
    count.
    """
    count = 0

    def seen(frame, event: str, function) -> None:
        nonlocal count
        if event != ("c_return" if torn else "c_call"):
            return
        module = function.__module__ or type(getattr(function, "__self__", None)).__module__
        tensors = function.__name__ == "serialize_file"
        if not tensors and (torn or module not in ("posix", "_io", "io") or function.__name__ in skip):
            return
        count += 1
        if count == place:
            sys.setprofile(None)
            tell(f"stopped {function.__name__}")
            if torn:
                halve_newest(frame)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(seen)
    try:
        yield
    finally:
        sys.setprofile(None)


def halve_newest(frame) -> None:
    """Cut the file that the frames' ``filename`` names: what a kill in the middle of writing it leaves."""
    while "filename" not in frame.f_locals:
        frame = frame.f_back
    path = Path(frame.f_locals["filename"])
    os.truncate(path, path.stat().st_size // 2)


def our_result(folder: Path) -> dict:
    """All that must be the same to the bit."""
    (last,) = (path for path in (folder / "checkpoints").iterdir() if path.name == f"step-{STEPS:06d}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "predicted" not in line]  # what a run in one go cost, which no other tells
    kept = ("step", "loss", "lr", "grad_norm", "held_out_loss")
    return {
        "adapter": (folder / "adapter/adapter_model.safetensors").read_bytes(),
        "optimizer": (last / "optimizer.safetensors").read_bytes(),
        "log": [{name: line[name] for name in kept if name in line} for line in lines],
    }


# -- transformers' Trainer ------------------------------------------------------------------------------------------


def trainer_body(base: Path) -> Body:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    transformers.utils.logging.disable_progress_bar()
    model = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(10, 500, (12, 40), generator=draw)]

    def body(folder: Path, tell: Callable[[str], None]) -> None:
        class Teller(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                tell(f"start {state.global_step}")

            def on_save(self, args, state, control, **kwargs):
                tell(f"saved {state.global_step}")

        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")
        trainer = Trainer(
            model=get_peft_model(model, config),
            args=TrainingArguments(
                output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2,
                use_cpu=True, save_steps=1, save_total_limit=2, logging_steps=1, report_to=[], disable_tqdm=True,
            ),
            train_dataset=rows,
            callbacks=[Teller()],
        )  # fmt: skip
        begun = folder.is_dir() and any(path.name.startswith("checkpoint-") for path in folder.iterdir())
        trainer.train(resume_from_checkpoint=(get_last_checkpoint(str(folder)) or True) if begun else None)
        trainer.save_model(str(folder / "final"))

    return body


def trainer_result(folder: Path) -> dict:
    return {name: tensor.tolist() for name, tensor in load_file(folder / "final/adapter_model.safetensors").items()}


# -- the campaign ---------------------------------------------------------------------------------------------------


def finish(body: Body, folder: Path, saved: int, result: Callable, wanted: dict, tally: dict) -> None:
    """Go on to the end, and count what is wrong. ``saved``: the last step whose save had ended before the kill."""
    code, lines = Child(body, folder).end()
    started = steps_told(lines, "start")
    if code != 0 or not started:
        tally["could_not_be_resumed"] += 1
        note_error(tally, code, lines, folder)
    elif started[0] < saved:
        tally["saves_lost"] += 1
    if code == 0 and result(folder) != wanted:
        tally["results_that_differ"] += 1


def note_error(tally: dict, code: int, lines: list[str], folder: Path) -> None:
    text = next((line for line in lines if line.startswith("error")), f"exit code {code}")
    tally["errors"].append(text.replace(str(folder), "RUN"))


def new_tally() -> dict:
    return {"runs": 0, "kills": 0, "could_not_be_resumed": 0, "saves_lost": 0, "results_that_differ": 0, "errors": []}


def random_kills(body: Body, work: Path, kills: int, result: Callable, seed: int) -> dict:
    tally, draw = new_tally(), random.Random(seed)
    code, lines = Child(body, work / "straight").end()
    assert code == 0, lines
    wanted = result(work / "straight")
    again = Child(body, work / "again")
    os.waitid(os.P_PID, again.pid, os.WEXITED | os.WNOWAIT)
    life = again.processor_seconds()
    assert again.end()[0] == 0
    assert result(work / "again") == wanted, "the unkilled run does not repeat itself; nothing can be told"
    while tally["kills"] < kills:
        folder, saved = work / f"run-{tally['runs']}", 0
        tally["runs"] += 1
        for _ in range(draw.randint(1, 5)):
            code, lines = Child(body, folder).killed_after(draw.uniform(0, life))
            if code != -signal.SIGKILL:
                break  # it had ended by itself
            tally["kills"] += 1
            saved = max([saved, *steps_told(lines, "saved")])
        if code not in (0, -signal.SIGKILL):
            tally["could_not_be_resumed"] += 1
            note_error(tally, code, lines, folder)
        else:
            finish(body, folder, saved, result, wanted, tally)
        shutil.rmtree(folder, ignore_errors=True)
        if tally["runs"] % 10 == 0:
            say(f"{tally['kills']} kills in {tally['runs']} runs: {tally['could_not_be_resumed']} not resumed")
    tally["processor_seconds_unkilled"] = round(life, 2)
    return tally


def forced_stops(base: Path, photos: Path, work: Path, every: int) -> dict:
    wanted = our_result(work / "straight")
    body = our_body(base, photos)
    Child(our_body(base, photos, (1, False)), work / "before").end()  # as it is when the save begins
    tally, calls = new_tally(), set()
    for torn, place in [(True, 1), (True, 2)] + [(False, n) for n in range(1, 1000, every)]:
        folder = work / "stopped"
        shutil.copytree(work / "before", folder)
        code, lines = Child(our_body(base, photos, (place, torn)), folder).end()
        if code == 0:  # it has made all its calls
            break
        assert code == -signal.SIGKILL, lines
        tally["runs"] += 1
        tally["kills"] += 1
        calls |= {line.split()[1] for line in lines if line.startswith("stopped")}
        finish(body, folder, STOPPED_SAVE - 1, our_result, wanted, tally)
        shutil.rmtree(folder)
    tally["calls"] = sorted(calls)
    say(f"{tally['runs']} forced stops: {tally['could_not_be_resumed']} not resumed")
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--trainer-kills", type=int, default=40)
    parser.add_argument("--every", type=int, default=1, help="stop a save at every so many-th of its calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/kill_campaign.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forks must not wait for threads that only their parent had
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["VLM_LORA_CACHE"] = str(work / "cache")
        base, photos = write_checkpoint(work / "base", "qwen2_vl"), work / "photos"
        photos.mkdir()
        for i in range(12):
            picture(i, (64 + 16 * (i % 3), 64)).save(photos / f"{i:02}.png")
            (photos / f"{i:02}.txt").write_text(f"A picture of number {i}.\n")
        for place in ("ours", "trainer"):
            (work / place).mkdir()
        record = {
            "what": {"steps": STEPS, "save_every": 1, "seed": options.seed},
            "versions": {"vlm-lora": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        }

        def note(part: str, tally: dict) -> dict:
            record[part] = tally
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            return tally

        body = our_body(base, photos)
        ours = note("killed", random_kills(body, work / "ours", options.kills, our_result, options.seed))
        stops = note("stopped_at_each_call_of_a_save", forced_stops(base, photos, work / "ours", options.every))
        if options.trainer_kills:
            body, kills = trainer_body(base), options.trainer_kills
            trainer = random_kills(body, work / "trainer", kills, trainer_result, options.seed)
            note("transformers_trainer_killed", trainer)
    print(json.dumps(record))
    bad = ("could_not_be_resumed", "saves_lost", "results_that_differ")
    return int(any(part[name] for part in (ours, stops) for name in bad))


if __name__ == "__main__":
    sys.exit(main())
