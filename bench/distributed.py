"""Training throughput of two processes against one, as a ratio: a thread each, the same run, turn and turn about.

    python -m bench.distributed

The embedded model on the emoji scenes, three rounds of one and two processes under torchrun. A step's time is the
median of its run, without the first steps and what comes before them. The record goes to
bench/results/distributed.json; it says how busy the machine was, as two processes on two cores have no third one for
anything else.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.origin import origin
from vlm_lora.console import say

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data/emoji_scenes"
FLAGS = "--model tiny --lr 3e-3 --batch-size 64 --val-split 0 --save-every 1000000 --no-eval --seed 0"
WARM_UP = 5  # steps


def one(count: int, steps: int, folder: Path) -> dict:
    """Median seconds of a step, answers per second, mean imbalance and last loss of a run on ``count`` processes."""
    run = folder / f"{count}-{time.monotonic_ns()}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = ["-m", "vlm_lora", "train", str(DATA), *FLAGS.split()]
    command += ["--epochs", "1000", "--max-steps", str(steps), "--output", str(run)]
    settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "VLM_LORA_CACHE": str(folder / "cache")}
    subprocess.run([*launch, *command], env=os.environ | settings, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "loss" in line]  # the last one is of the run's cost
    times = [line["seconds"] for line in lines]
    seconds = statistics.median(b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False))
    balance = statistics.mean(line.get("imbalance", 1.0) for line in lines)
    return {
        "step_seconds": seconds,
        "answers_per_second": 64 / seconds,
        "imbalance": balance,
        "loss": lines[-1]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="above 31, so that images come again and are cached")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the record")
    args = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            busy = os.getloadavg()[0]
            rounds.append({str(count): one(count, args.steps, Path(folder)) for count in (1, 2)})
            rounds[-1]["load_before"] = round(busy, 2)
            ratio = rounds[-1]["1"]["step_seconds"] / rounds[-1]["2"]["step_seconds"]
            say(f"Round {number + 1}: two processes are {ratio:.2f} times as fast as one.")
    ratios = [r["1"]["step_seconds"] / r["2"]["step_seconds"] for r in rounds]
    record = {
        **origin("distributed", f"{platform.machine()}, {os.cpu_count()} cores, gloo, one thread a process"),
        "settings": FLAGS,
        "beside": args.beside,
        "speed_of_two_over_one": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "rounds": rounds,
    }
    (ROOT / "bench/results/distributed.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
