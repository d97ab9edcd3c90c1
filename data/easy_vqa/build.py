"""Write easy-VQA, or the committed part of it, as JSONL and images.

    pip install easy-vqa==1.0           # MIT; carries all 5,000 pictures, nothing is downloaded when it runs
    python data/easy_vqa/build.py       # the committed part: the first 400 training and 100 test images
    python data/easy_vqa/build.py --full OUT

A row: {"image": "images/train/0.png", "question": ..., "answer": ..., "kind": "color" | "shape" | "yes/no"}. The split is
the package's own.
"""

import argparse
import json
import shutil
from pathlib import Path

from easy_vqa import get_test_image_paths, get_test_questions, get_train_image_paths, get_train_questions

COMMITTED = {"train": 400, "test": 100}  # images


def kind_of(question: str) -> str:
    if not question.startswith("what"):
        return "yes/no"
    return "color" if "color" in question else "shape"


def write(out: Path, full: bool) -> None:
    splits = {
        "train": (get_train_questions(), get_train_image_paths()),
        "test": (get_test_questions(), get_test_image_paths()),
    }
    for split, ((questions, answers, image_ids), paths) in splits.items():
        folder = out / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        kept = {i for i in paths if full or i < COMMITTED[split]}
        for i in sorted(kept):
            shutil.copyfile(paths[i], folder / f"{i}.png")
        rows = [
            {"image": f"images/{split}/{i}.png", "question": question[0].upper() + question[1:], "answer": answer,
             "kind": kind_of(question)}
            for question, answer, i in zip(questions, answers, image_ids, strict=True)
            if i in kept
        ]  # fmt: skip
        with open(out / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{split}: {len(kept):,} images, {len(rows):,} questions")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", type=Path, metavar="OUT", help="write the whole set there instead")
    args = parser.parse_args()
    write(args.full or Path(__file__).parent, full=args.full is not None)
