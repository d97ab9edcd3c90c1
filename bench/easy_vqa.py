"""Exact match on the whole official easy-VQA test split: base, tuned, tuned with images blanked, and guessing.

    pip install easy-vqa==1.0 && python -m bench.easy_vqa

Trains the embedded model on the official training split on this machine and scores all 9,673 questions about the 1,000
test images. "Guessing" answers each test question with the answer it has most often in training, without an image.
The record goes to bench/results/easy_vqa.json; the last line of output is the same JSON.
"""

import argparse
import collections
import importlib.util
import json
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.origin import origin
from vlm_lora import Captioner, Dialogue, Example, Scores, TrainConfig, Turn, evaluate, read_dataset
from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.console import Progress, StopSignals, say
from vlm_lora.progress import TrainReport
from vlm_lora.training.run import train_adapter

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"model": "tiny", "epochs": 2.0, "batch_size": 128, "lr": 3e-3, "rank": 16, "val_split": 0.02, "seed": 0}
ONE_WORD = " Answer with one word."  # what the base was pretrained to obey; its default is a sentence


def guesses(train_examples, test_examples) -> dict[str, float]:
    """Exact match of the commonest training answer of each question, by kind and in all."""
    seen = collections.defaultdict(collections.Counter)
    for example in train_examples:
        for dialogue in example.dialogues:
            seen[dialogue.turns[0].user][dialogue.turns[0].assistant] += 1
    right, asked = collections.Counter(), collections.Counter()
    for example in test_examples:
        for dialogue in example.dialogues:
            (turn,) = dialogue.turns
            good = bool(seen[turn.user]) and seen[turn.user].most_common(1)[0][0] == turn.assistant
            for kind in ("all", dialogue.kind):
                asked[kind] += 1
                right[kind] += good
    return {kind: right[kind] / asked[kind] for kind in asked}


def by_kind(scores: Scores, who: str) -> dict[str, float]:
    return {"all": scores.models[who].exact_match} | {kind: getattr(row, who) for kind, row in scores.by_kind.items()}


def asking_for_one_word(example: Example) -> Example:
    def reword(dialogue: Dialogue) -> Dialogue:
        return replace(dialogue, turns=tuple(Turn(turn.user + ONE_WORD, turn.assistant) for turn in dialogue.turns))

    return replace(example, dialogues=tuple(reword(dialogue) for dialogue in example.dialogues))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "easy-vqa-data", help="where the full set is put")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "easy-vqa", help="run folder")
    parser.add_argument("--epochs", type=float, default=SETTINGS["epochs"])
    parser.add_argument("--seed", type=int, default=SETTINGS["seed"])
    args = parser.parse_args()
    if not (args.data / "test.jsonl").exists():
        if importlib.util.find_spec("easy_vqa") is None:
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "easy-vqa==1.0"], check=True)
        subprocess.run([sys.executable, ROOT / "data/easy_vqa/build.py", "--full", args.data], check=True)

    settings = SETTINGS | {"epochs": args.epochs, "seed": args.seed}
    config = TrainConfig(data=str(args.data / "train.jsonl"), output=str(args.output), **settings)
    started = time.perf_counter()
    result = train_adapter(config, events=TrainReport(StopSignals()))
    training = time.perf_counter() - started
    say(f"Trained in {training:.0f} s.")

    test = read_dataset(args.data / "test.jsonl", prompt=DEFAULT_PROMPT).examples
    captioner = Captioner(result.adapter.backbone, result.adapter, result.features, DEFAULT_PROMPT)
    progress = Progress()

    def count(done: int, total: int) -> None:
        progress.count("Answers:", done, total)

    started = time.perf_counter()
    evaluation = evaluate(captioner, test, blanked=True, progress=count)
    evaluating = time.perf_counter() - started
    with captioner.adapter.switched_off():
        bare = Captioner(captioner.backbone, None, captioner.features, DEFAULT_PROMPT)
        one_word = evaluate(bare, [asking_for_one_word(example) for example in test], progress=count)
    evaluation.write(args.output)

    everything = read_dataset(args.data / "train.jsonl", prompt=DEFAULT_PROMPT).examples
    lines = {
        "guessing from the question alone": guesses(everything, test),
        "base": by_kind(evaluation.scores, "base"),
        "base, asked for one word": by_kind(one_word.scores, "base"),
        "tuned, image blanked": by_kind(evaluation.scores, "blanked"),
        "tuned": by_kind(evaluation.scores, "tuned"),
    }
    record = {
        **origin("easy_vqa", f"{platform.machine()}, {torch.get_num_threads()} threads, {captioner.backbone.device}"),
        "settings": settings,
        "training_seconds": round(training, 1),
        "evaluation_seconds": round(evaluating, 1),
        "interval_of_tuned": list(evaluation.scores.intervals["tuned"]["exact_match"]),
        "exact_match": lines,
    }
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    (results / "easy_vqa.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    kinds = list(lines["base"])
    print(f"{'exact match, %':<36}" + "".join(f"{kind:>10}" for kind in kinds))
    for name, values in lines.items():
        print(f"{name:<36}" + "".join(f"{100 * values[kind]:>10.1f}" for kind in kinds))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
