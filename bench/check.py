"""What `vlm-lora check` costs beside decoding each image once with Pillow alone, measured in one run.

    python -m bench.check [--images 400] [--size 1024 768] [--repeat 5] [--record bench/results/check.json]

Writes JPEG photos of noise (no two alike) with a caption each into a temporary folder, then times by turns,
so that a busy machine slows both: Pillow, which decodes each image to RGB, and check, all of it (captions, hashes,
duplicates, lookalikes, texts), both with as many threads. The ratio of the medians counts, of the time on the clock
and of that of the CPU. The last line of output is JSON.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from vlm_lora import __version__
from vlm_lora.check.dataset import check_dataset
from vlm_lora.check.images import num_workers
from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.data.readers import read_dataset


def write_photos(folder: Path, images: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for number in range(images):
        coarse = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        photo.save(folder / f"{number:06}.jpg", quality=90)
        (folder / f"{number:06}.txt").write_text(f"A photo, the one of number {number}.\n")


def decode(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("RGB")


def decode_all(folder: Path) -> None:
    with ThreadPoolExecutor(num_workers()) as pool:
        list(pool.map(decode, folder.glob("*.jpg")))


def check_all(folder: Path) -> None:
    facts = check_dataset(read_dataset(folder, prompt=DEFAULT_PROMPT), val_split=0.1).facts()
    assert not facts["bad"]


def seconds(work, folder: Path) -> tuple[float, float]:
    """On the clock, and of the CPU."""
    start, start_cpu = time.perf_counter(), time.process_time()
    work(folder)
    return time.perf_counter() - start, time.process_time() - start_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 768), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the record there too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, args.images, tuple(args.size))
        decode_all(folder)  # both find the files in memory
        times = {"pillow": [], "check": []}
        for _ in range(args.repeat):
            times["pillow"].append(seconds(decode_all, folder))
            times["check"].append(seconds(check_all, folder))
    median = {name: statistics.median(clock for clock, _ in found) for name, found in times.items()}
    median_cpu = {name: statistics.median(cpu for _, cpu in found) for name, found in times.items()}
    record = {
        "command": f"python -m bench.check --images {args.images} --size {args.size[0]} {args.size[1]}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {num_workers()} threads",
        "versions": {
            "vlm-lora": __version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
        },
        "rows_per_second": {name: round(args.images / found, 1) for name, found in median.items()},
        "spread_of_seconds": {name: [round(min(t)[0], 3), round(max(t)[0], 3)] for name, t in times.items()},
        "cost_over_pillow": round(median["check"] / median["pillow"], 3),
        "cpu_over_pillow": round(median_cpu["check"] / median_cpu["pillow"], 3),
    }
    for who, rate in record["rows_per_second"].items():
        print(f"{who:<8}{rate:>10,.1f} rows/s")
    if args.record:
        args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
