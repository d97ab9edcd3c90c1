"""What `vlm-lora check` costs beside decoding each image once with Pillow alone, measured in one run.

    python -m bench.check [--images 400] [--size 1024 768] [--repeat 5]

Writes JPEG photos of noise (no two alike) with a caption each into a temporary folder, then times by turns,
so that a busy machine slows both: Pillow, one image after the other in one thread; and check, all of it
(captions, hashes, duplicates, lookalikes, texts), with its threads. The ratio of the medians counts. The last
line of output is JSON.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from vlm_lora import __version__
from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.data.check import check_dataset
from vlm_lora.data.readers import read_dataset


def write_photos(folder: Path, images: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for number in range(images):
        coarse = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        photo.save(folder / f"{number:06}.jpg", quality=90)
        (folder / f"{number:06}.txt").write_text(f"A photo, the one of number {number}.\n")


def decode_all(folder: Path) -> None:
    for path in folder.glob("*.jpg"):
        with Image.open(path) as image:
            image.convert("RGB")


def check_all(folder: Path) -> None:
    facts = check_dataset(read_dataset(folder, prompt=DEFAULT_PROMPT), val_split=0.1).facts()
    assert not facts["bad"]


def seconds(work, folder: Path) -> float:
    start = time.perf_counter()
    work(folder)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 768), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, args.images, tuple(args.size))
        decode_all(folder)  # both find the files in memory
        times = {"pillow": [], "check": []}
        for _ in range(args.repeat):
            times["pillow"].append(seconds(decode_all, folder))
            times["check"].append(seconds(check_all, folder))
    median = {name: statistics.median(found) for name, found in times.items()}
    record = {
        "command": f"python -m bench.check --images {args.images} --size {args.size[0]} {args.size[1]}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {
            "vlm-lora": __version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
        "rows_per_second": {name: round(args.images / found, 1) for name, found in median.items()},
        "spread_of_seconds": {name: [round(min(t), 3), round(max(t), 3)] for name, t in times.items()},
        "cost_over_pillow": round(median["check"] / median["pillow"], 3),
    }
    for who, rate in record["rows_per_second"].items():
        print(f"{who:<8}{rate:>10,.1f} rows/s")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
