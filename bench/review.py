"""Whether `eval --review` finds wrong captions in the data that a model was trained on.

    python -m bench.review

A twentieth of the captions of `data/emoji_scenes` change places with captions of other pictures. The embedded model is
trained on all of it with default settings (and what wrong captions there are in it it learns, too), and then looks at
its own training data again: how many of those that were swapped are among the worst tenth? For each of three seeds, by
the score that `review` sorts by and by its two parts. The record goes to bench/results/review.json.
"""

import argparse
import json
import platform
import random
import tempfile
from pathlib import Path

import torch

from bench.origin import origin
from vlm_lora import Captioner, TrainConfig, read_dataset
from vlm_lora.inference.review import review
from vlm_lora.training.run import train_adapter

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench" / "results" / "review.json"
SWAPPED, LOOKED_AT = 0.05, 0.1


def corrupt(source: dict, seed: int) -> tuple[dict, set[tuple[int, str]]]:
    """The data with captions in each other's places, and those that are wrong now: (image, caption)."""
    drawn, captions = random.Random(seed), [dict(each) for each in source["annotations"]]
    own = {(each["image_id"], each["caption"]) for each in captions}
    places = drawn.sample(range(len(captions)), round(SWAPPED * len(captions)))
    wrong = set()
    texts = [captions[place]["caption"] for place in places]
    for place, text in zip(places, [*texts[1:], texts[0]], strict=True):
        captions[place]["caption"] = text
        pair = (captions[place]["image_id"], text)
        wrong |= {pair} - own  # another picture may have the same caption
    return source | {"annotations": captions}, wrong


def found(rows: list[tuple[float, bool]]) -> float:
    """The share of the wrong ones among the lowest tenth."""
    worst = sorted(rows)[: round(LOOKED_AT * len(rows))]
    return sum(is_wrong for _, is_wrong in worst) / sum(is_wrong for _, is_wrong in rows)


def one(seed: int, settings: dict) -> dict:
    source = json.loads((ROOT / "data/emoji_scenes/captions.json").read_text())
    document, wrong = corrupt(source, seed)
    number = {image["file_name"]: image["id"] for image in document["images"]}
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "captions.json", Path(folder) / "run"
        data.write_text(json.dumps(document))
        images = str(ROOT / "data/emoji_scenes/images")
        config = TrainConfig(
            data=str(data), images=images, model="tiny", output=str(run), seed=seed, val_split=0.0, **settings
        )
        train_adapter(config)
        dataset = read_dataset(data, images=images)
        rows = review(Captioner.load(adapter=run), dataset.examples)
    is_wrong = [(number[row.image], row.answer) in wrong for row in rows]
    shares = {
        name: round(found(list(zip(values, is_wrong, strict=True))), 4)
        for name, values in {
            "score": [row.score for row in rows],
            "log_probability": [row.likely for row in rows],
            "chance": [random.Random(i).random() for i in range(len(rows))],
        }.items()
    }
    return {"seed": seed, "captions": len(rows), "wrong": sum(is_wrong), "found_in_worst_tenth": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, help="another learning rate than the default, written to no record")
    options = parser.parse_args()
    settings = {} if options.lr is None else {"lr": options.lr}
    results = []
    for seed in range(options.seeds):
        results.append(one(seed, settings))
        print(json.dumps(results[-1]), flush=True)
    record = {"settings": "default", "swapped": SWAPPED, "looked_at": LOOKED_AT, "results": results}
    record |= origin("review", f"{platform.machine()}, {torch.get_num_threads()} threads")
    if not settings:
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
