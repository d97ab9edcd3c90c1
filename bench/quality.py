"""Time to equal quality on held-out images, beside a careful plain loop; and what sharing an image in a step costs.

    python -m bench.quality

Trains the embedded model on data/easy_vqa twice from the same start, with as many answers a step: once as vlm-lora
does, all questions of an image side by side in one step ("shared"), and once with the answers of all images shuffled
("shuffled"), as other trainers do, where a step sees about as many images as answers. A step that shares is cheaper
but its gradient is noisier; what counts is when a run first answers --goal of the held-out questions right, and keeps
to it. Images are held out, questions about them too.

The plain loop of bench/peers ("plain") learns the shuffled order too, and the same from it: its losses must be those
of "shuffled" step by step, or the bench stops. So only its first --plain-steps steps are run, and timed; its curve is
that of "shuffled" at its own seconds a step, which is the mean of those. It is not trained to the end.

Seconds are all that come once the model is loaded (tokens, filling an empty cache, steps), but for the looks at the
held-out questions; CPU seconds tell more where other programs run. The record goes to bench/results/quality.json; the
last line is JSON.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench.origin import origin
from bench.speed import cpu_name, parity, peer_job, run_once
from bench.work import ending_with_its_turn
from vlm_lora import Captioner, TrainConfig, read_dataset
from vlm_lora.config import DEFAULT_PROMPT, cache_folder
from vlm_lora.console import say
from vlm_lora.inference.captioner import Decoding
from vlm_lora.inference.metrics.answers import exact_match
from vlm_lora.model.features import FeatureCache
from vlm_lora.model.folder import tiny_path
from vlm_lora.training.events import Events
from vlm_lora.training.run import train_adapter
from vlm_lora.training.schedule import Schedule
from vlm_lora.training.techniques import Techniques

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"model": "tiny", "batch_size": 128, "lr": 3e-3, "val_split": 0.0, "save_every": 10**6}
HELD_OUT = 50  # images, with some nine questions each
ORDERS = ("shared", "shuffled")


class Shuffled(Schedule):
    """The answers of all images in a random order, each by itself in the step of its place."""

    def _line(self, epoch: int) -> np.ndarray:
        if epoch not in self._lines:
            answers = super()._line(epoch)[:, :2].tolist()
            random.Random(f"{self.seed}/{epoch}/shuffled").shuffle(answers)
            self._lines[epoch] = np.array([(*answer, place) for place, answer in enumerate(answers)])
        return self._lines[epoch]


def config_of(seed: int, steps: int, output: Path) -> TrainConfig:
    data = str(ROOT / "data/easy_vqa/train.jsonl")
    return TrainConfig(data=data, output=str(output), seed=seed, epochs=1000.0, max_steps=steps, **SETTINGS)


def one(order: str, seed: int, steps: int, every: int, output: Path) -> dict:
    """Train once; accuracy on the test images behind every ``every`` steps, and the loss of each step."""
    test = read_dataset(ROOT / "data/easy_vqa/test.jsonl", prompt=DEFAULT_PROMPT).examples[:HELD_OUT]
    captioner: list[Captioner] = []

    def accuracy() -> float:
        right = []
        for start in range(0, len(test), 25):
            part = test[start : start + 25]
            asked = [(captioner[0].features.get(example.images), list(example.dialogues)) for example in part]
            said = captioner[0].generate(asked, decoding=Decoding(max_new_tokens=8))
            for example, answers in zip(part, said, strict=True):
                wanted = [dialogue.turns[-1].assistant for dialogue in example.dialogues]
                right += [exact_match(answer, [truth]) for answer, truth in zip(answers, wanted, strict=True)]
        return sum(right) / len(right)

    curve: list[dict] = []
    losses: list[float] = []
    spent = {"seconds": 0.0, "cpu": 0.0}
    since = [0.0, 0.0]

    def begin() -> None:
        since[:] = time.perf_counter(), time.process_time()

    def spend() -> None:
        spent["seconds"] += time.perf_counter() - since[0]
        spent["cpu"] += time.process_time() - since[1]

    class Watched(Events):
        def parts(self, adapter, model):
            features = FeatureCache(adapter.backbone, cache_folder())
            captioner.append(Captioner(adapter.backbone, adapter, features, DEFAULT_PROMPT))
            begin()

        def start(self, **values):
            spend()
            begin()

        def step(self, *, step, num_steps, loss, **values):
            spend()
            losses.append(loss)
            if step % every == 0 or step == num_steps:
                point = {"step": step, **{name: round(value, 2) for name, value in spent.items()}}
                curve.append(point | {"accuracy": round(accuracy(), 4), "loss": round(loss, 4)})
                say(f"{order}, seed {seed}: {json.dumps(curve[-1])}")
            begin()

    shutil.rmtree(output, ignore_errors=True)
    techniques = Techniques(schedule=Shuffled.of) if order == "shuffled" else Techniques()
    train_adapter(config_of(seed, steps, output), events=Watched(), techniques=techniques)
    return {"order": order, "seed": seed, "curve": curve, "losses": losses}


def plain(shuffled: dict, steps: int, timed: int, output: Path) -> dict:
    """The plain loop beside a run of the shuffled order: that run's curve at the seconds a step of its first steps.

    Raises:
        SystemExit: a loss differs from that run's.
    """
    config = config_of(shuffled["seed"], steps, output)
    examples = read_dataset(config.data, prompt=config.prompt).examples
    answers = [len(example.dialogues) for example in examples]
    schedule = Shuffled.of(config, answers)
    shutil.rmtree(output, ignore_errors=True)
    model = shutil.copytree(tiny_path(), output / "model")
    template = model / "chat_template.jinja"
    template.write_text(ending_with_its_turn(template.read_text(encoding="utf-8")), encoding="utf-8")
    settings = {name: getattr(config, name) for name in ("batch_size", "rank", "lr", "seed")}
    job = peer_job(output / "rows.jsonl", examples, schedule, min(timed, steps), settings)
    job |= {"model": str(model), "dtype": "float32", "folder": str(output / "run"), "cache": str(output / "cache")}
    done = run_once("plain", job, output)
    count = len(done["losses"])
    apart = parity({"plain": done, "shuffled": shuffled}, 1e-4)
    a_step = {"seconds": done["steps"][-1] / count, "cpu": done["cpu"] / count}
    curve = [p | {name: round(p["step"] * value, 2) for name, value in a_step.items()} for p in shuffled["curve"]]
    return {"order": "plain", "seed": config.seed, "timed_steps": count, "losses_apart": apart, "curve": curve}


def reached(curve: list[dict], goal: float) -> dict | None:
    """The first point from which on no later one is below ``goal``; None if the last one is."""
    found = None
    for point in curve:
        found = None if point["accuracy"] < goal else found or point
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--goal", type=float, default=0.95, help="share of held-out questions answered right")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=20, help="steps between two looks at the held-out questions")
    parser.add_argument("--plain-steps", type=int, default=10, help="steps of the plain loop that are timed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quality", help="folder of the run folders")
    parser.add_argument("--record", type=Path, default=ROOT / "bench/results/quality.json")
    parser.add_argument("--order", choices=ORDERS, help="this order alone, with the first seed, in this process")
    args = parser.parse_args()
    if args.order:
        print(json.dumps(one(args.order, args.seeds[0], args.steps, args.every, args.output)))
        return
    runs = []
    for seed in args.seeds:
        for order in ORDERS:
            output = args.output / order
            alone = os.environ | {"VLM_LORA_CACHE": str(output / "cache"), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "bench.quality", "--order", order, "--seeds", str(seed)]
            command += ["--steps", str(args.steps), "--every", str(args.every), "--output", output]
            done = subprocess.run(command, cwd=ROOT, env=alone, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        runs.append(plain(runs[-1], args.steps, args.plain_steps, args.output / "plain"))
    for run_ in runs:
        run_.pop("losses", None)
    record = {
        **origin("quality", f"{cpu_name()}, 1 thread"),
        "settings": SETTINGS | {"steps": args.steps, "held_out_images": HELD_OUT, "goal": args.goal},
        "reached": {f"{run['order']}, seed {run['seed']}": reached(run["curve"], args.goal) for run in runs},
        "runs": runs,
    }
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))
    print(json.dumps({"goal": args.goal, "reached": record["reached"]}))


def table(record: dict) -> str:
    """As Markdown."""
    goal = f"{100 * record['settings']['goal']:g} %"
    lines = [
        f"| order | {goal} reached at step | seconds | CPU seconds | accuracy at the end |",
        "|---|---:|---:|---:|---:|",
    ]
    for run_ in record["runs"]:
        name, last = f"{run_['order']}, seed {run_['seed']}", run_["curve"][-1]
        at = record["reached"][name]
        cells = f"{at['step']} | {at['seconds']:.0f} | {at['cpu']:.0f}" if at else f"not in {last['step']} | |"
        told = f" (steps x the mean of {run_['timed_steps']})" if run_["order"] == "plain" else ""
        lines.append(f"| {name}{told} | {cells} | {100 * last['accuracy']:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
