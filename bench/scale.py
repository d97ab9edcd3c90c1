"""What a run costs before its first step as the data grows: CPU seconds, and private memory just before it.

    python -m bench.scale OTHER [--images 1000 10000] [--record bench/results/scale.json]

OTHER is a worktree of another commit, measured beside this one. Writes JPEG pictures of 64 x 64 with five captions each
into a temporary folder, and begins a run of the tiny model on them in a process of its own, twice: the first finds
nothing known of the data, the later one finds what the first left. Each image is seen once in it, so that no tower runs
before the steps. What 100 images cost (imports, the model) is taken off. CPU seconds are all threads' together and bear
a busy machine; the clock is not read. The last line of output is JSON.
"""

import argparse
import gc
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BASE = 100
"""Images of the run that is taken off."""
CAPTIONS = 5
WORDS = "a the red blue green small large cat dog bird car house tree sits stands runs on under beside near two"


def write_data(folder: Path, images: int) -> None:
    (folder / "images").mkdir(parents=True)
    drawn, noise = random.Random(0), np.random.default_rng(0)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as rows:
        for number in range(images):
            name = f"images/{number:07}.jpg"
            Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64)).save(folder / name)
            for _ in range(CAPTIONS):
                caption = " ".join(drawn.choices(WORDS.split(), k=drawn.randint(6, 14)))
                rows.write(json.dumps({"image": name, "caption": caption}) + "\n")


def private_bytes() -> int:
    """What no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def to_first_step(data: str, output: str) -> None:
    """Begin a run, and print what it took until its first step."""
    from vlm_lora.config import TrainConfig
    from vlm_lora.training.events import Events
    from vlm_lora.training.run import train_adapter

    class FirstStep(Exception):
        pass

    class Watch(Events):
        def start(self, **_) -> None:
            raise FirstStep

    config = TrainConfig(data=data, model="tiny", output=output, epochs=1.0, max_steps=1000)
    try:
        train_adapter(config, events=Watch())
    except FirstStep:
        gc.collect()
        told = {"cpu_seconds": time.process_time(), "private_mb": private_bytes() / 1e6}
        print(json.dumps(told | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}))


def measure(worktree: Path, data: Path, work: Path) -> dict[str, dict[str, float]]:
    """Of the first run and of a later one."""
    env = os.environ | {"VLM_LORA_CACHE": str(work / "cache"), "PYTHONPATH": str(worktree), "OMP_NUM_THREADS": "1"}
    found = {}
    for run in ("first", "later"):
        # -P: or the kernels.py beside this file would be taken for the package that transformers looks for
        command = [sys.executable, "-P", str(Path(__file__)), "--child", str(data), str(work / run)]
        ended = subprocess.run(command, cwd=worktree, env=env, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{worktree}: {ended.stderr[-2000:]}")
        found[run] = json.loads(ended.stdout.splitlines()[-1])
    return found


def above(found: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    return {key: round(value - base[key], 1) for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("other", type=Path, help="worktree of the commit to compare with")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the record there too")
    args = parser.parse_args()
    trees = {"this": ROOT, "other": args.other.resolve()}
    git = ["git", "rev-parse", "--short", "HEAD"]
    commits = {
        name: subprocess.run(git, cwd=tree, capture_output=True, text=True).stdout.strip()
        for name, tree in trees.items()
    }
    found: dict[str, dict[int, dict]] = {name: {} for name in trees}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for images in (BASE, *args.images):
            write_data(folder / str(images), images)
            for which, tree in trees.items():
                found[which][images] = measure(tree, folder / str(images), folder / f"{which}-{images}")
    record = {
        "command": f"python -m bench.scale OTHER --images {' '.join(map(str, args.images))}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "commits": commits,
        "captions_per_image": CAPTIONS,
        "above_100_images": {
            which: {
                images: {run: above(by_images[images][run], by_images[BASE][run]) for run in ("first", "later")}
                for images in args.images
            }
            for which, by_images in found.items()
        },
    }
    if args.record:
        args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        to_first_step(*sys.argv[2:])
    else:
        main()
