"""Whether captions get better as a person corrects them and trains again, as docs/captioning.md describes it.

    python -m bench.loop

The embedded model learns the captions of 60 pictures of `data/emoji_scenes`. It captions 80 further pictures into
sidecar files. A script corrects them as a person would: it leaves alone what is one of a picture's five captions, and
writes one of these in the place of anything else. The training goes on from the first adapter (`--from`) with all that
is right so far; once more with the next 80. After each round the adapter captions 100 held-out pictures. Beside each
round a control: the same pictures, the last 80 with the captions as they were, uncorrected. At last the last adapter
once more, on a base in four bits. The record goes to bench/results/loop.json.
"""

import argparse
import json
import os
import platform
import random
import shutil
import tempfile
from pathlib import Path

import torch

from bench.origin import origin
from vlm_lora import Captioner, read_dataset
from vlm_lora.cli import main as command
from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.data.example import Example
from vlm_lora.inference.evaluate import against, evaluate
from vlm_lora.inference.metrics.answers import exact_match

ROOT = Path(__file__).resolve().parents[1]
SCENES = ROOT / "data/emoji_scenes"
RECORD = ROOT / "bench/results/loop.json"
FIRST, ROUND, ROUNDS, HELD_OUT = 60, 80, 2, 100
HOW = ("--model", "tiny", "--val-split", "0", "--epochs", "20", "--batch-size", "8", "--lr", "3e-3")


def run(*arguments: str | Path) -> None:
    """A command of vlm-lora, as a user gives it."""
    if code := command([str(argument) for argument in arguments]):
        raise SystemExit(f"{arguments[0]} ended with {code}")


def pictures(examples: list[Example], folder: Path) -> Path:
    folder.mkdir()
    for example in examples:
        shutil.copy(example.images[0].path or "", folder)
    return folder


def sidecar(example: Example, folder: Path) -> Path:
    return folder / Path(example.images[0].name).with_suffix(".txt").name


def captions(example: Example) -> list[str]:
    return [dialogue.turns[-1].assistant for dialogue in example.dialogues]


def correct(examples: list[Example], folder: Path, drawn: random.Random) -> int:
    """Put right the sidecar files that are not; how many were."""
    right = 0
    for example in examples:
        file, true = sidecar(example, folder), captions(example)
        if exact_match(file.read_text(), true):
            right += 1
        else:
            file.write_text(drawn.choice(true))
    return right


def look(adapter: Path, held_out: list[Example], before: Path | None = None, *, load_in_4bit: bool = False) -> dict:
    """What an adapter is worth on held-out pictures, and against the one before it."""
    evaluation = evaluate(Captioner.load(adapter=adapter, load_in_4bit=load_in_4bit), held_out)
    tuned, base = evaluation.scores.tuned, evaluation.scores.base
    assert tuned
    assert base
    right = sum(exact_match(row.tuned or "", row.references) for row in evaluation.answered) / len(held_out)
    told = {"right": round(right, 4), "cider_d": round(tuned.cider_d, 4), "cider_d_of_base": round(base.cider_d, 4)}
    if before:
        gains = against(evaluation, Captioner.load(adapter=before), held_out).gain
        assert gains
        gain = gains["cider_d"]
        told["gain_over_the_adapter_before"] = [round(value, 4) for value in (gain.gain, gain.low, gain.high)]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    drawn = random.Random(options.seed)
    examples = list(read_dataset(SCENES, prompt=DEFAULT_PROMPT).examples)
    drawn.shuffle(examples)
    held_out, rest = examples[:HELD_OUT], examples[HELD_OUT:]
    rounds = []
    with tempfile.TemporaryDirectory() as place:
        os.environ["VLM_LORA_CACHE"] = f"{place}/cache"
        folder = pictures(rest[:FIRST], Path(place) / "first")
        for example in rest[:FIRST]:
            sidecar(example, folder).write_text(drawn.choice(captions(example)))
        latest, so_far = Path(place) / "run-0", [folder]
        run("train", folder, "--output", latest, *HOW, "--seed", str(options.seed))
        rounds.append({"trained_on": FIRST} | look(latest, held_out))
        for number in range(1, ROUNDS + 1):
            start = FIRST + (number - 1) * ROUND
            part = rest[start : start + ROUND]
            folder = pictures(part, Path(place) / f"round-{number}")
            run("caption", folder, "--adapter", latest, "--format", "sidecar")
            as_they_were = shutil.copytree(folder, Path(place) / f"uncorrected-{number}")
            right = correct(part, folder, drawn)
            runs = {}
            for name, data in (("corrected", folder), ("uncorrected", as_they_were)):
                runs[name] = Path(place) / f"run-{number}-{name}"
                run("train", *so_far, data, "--from", latest, "--output", runs[name], *HOW[2:])
            told = {name: look(adapter, held_out, latest) for name, adapter in runs.items()}
            rounds.append({"captions_that_were_right": right, "of": len(part)} | told)
            latest = runs["corrected"]
            so_far.append(folder)
            print(json.dumps(rounds[-1]), flush=True)
        four_bits = look(latest, held_out, load_in_4bit=True)
    record = {"settings": " ".join(HOW), "held_out_pictures": HELD_OUT, "seed": options.seed, "rounds": rounds}
    record["the_last_adapter_on_a_base_in_four_bits"] = four_bits
    record |= origin("loop", f"{platform.machine()}, {torch.get_num_threads()} threads")
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
