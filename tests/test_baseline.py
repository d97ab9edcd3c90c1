"""What vlm-lora computes stays what it computes: losses, captions, scores and findings as recorded in baseline.json.

    python -m tests.test_baseline --write      record them anew, where a change of them is intended

Only the command line and a run's metrics.jsonl are used, so that this file needs no change however the package is built
inside. All of it is on one thread in float32. On the kind of processor and with the library versions of the record
("machine" in it), every number has to be equal to the last bit. Elsewhere other instructions round otherwise: there,
numbers may differ by a relative 1e-4, counts and texts not at all, and captions drawn by chance are not compared.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.conftest import ROOT, VISION, picture, write_checkpoint

RECORD = Path(__file__).with_name("baseline.json")
LIBRARIES = ("torch", "torchvision", "transformers", "peft", "bitsandbytes", "numpy", "pillow")

COMPARED = ("step", "loss", "held_out_loss", "lr", "grad_norm", "answers", "tokens")
"""Of the lines of metrics.jsonl. Volatile are seconds, answers_per_second, measured; predicted is a guess."""
DROPPED = ("languages", "tasks")
"""Of the outputs of the commands: guessing languages is to be dropped, and the scores by task came later (those over
everything, in the record, are what they were). Paths are made relative instead."""

TINY, RANDOM = ["--model", "tiny", "--lr", "1e-3"], ["--rank", "4", "--lr", "1e-2"]
RUNS = {
    "lora": TINY,
    "lora rslora": [*TINY, "--variant", "rslora"],
    "lora dora": [*TINY, "--variant", "dora"],
    "lora pissa": [*TINY, "--variant", "pissa"],
    "lora dropout checkpointing": [*TINY, "--dropout", "0.1", "--gradient-checkpointing", "--projector-rank", "4"],
    "lora vision": [*TINY, "--targets", "language,projector,vision"],
    "qlora": [*TINY, "--method", "qlora"],
    "adapter": [*TINY, "--method", "adapter"],
    "prefix": [*TINY[:-1], "0.03", "--method", "prefix"],
    "prompt": [*TINY[:-1], "0.03", "--method", "prompt"],
} | {f"lora {family}": ["--model", family, *RANDOM] for family in VISION}


def write_data(folder: Path) -> None:
    """Captions, questions, a held-out set, and a folder with faults in it: parts of the data of this repository."""
    scenes, shapes = ROOT / "data/emoji_scenes", ROOT / "data/easy_vqa"
    coco = json.loads((scenes / "captions.json").read_text(encoding="utf-8"))
    for name, ids in {"scenes": range(1, 15), "also": range(21, 25)}.items():
        (folder / name / "images").mkdir(parents=True)
        images = [image for image in coco["images"] if image["id"] in ids]
        for image in images:
            shutil.copy(scenes / "images" / image["file_name"], folder / name / "images")
        captions = [row for row in coco["annotations"] if row["image_id"] in ids]
        (folder / name / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    for name, part, count in (("shapes", "train", 5), ("val", "test", 4)):
        (folder / name / "images" / part).mkdir(parents=True)
        rows = [json.loads(line) for line in (shapes / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        wanted = list(dict.fromkeys(row["image"] for row in rows))[:count]
        for image in wanted:
            shutil.copy(shapes / image, folder / name / image)
        chosen = [json.dumps(row) + "\n" for row in rows if row["image"] in wanted]
        (folder / name / "rows.jsonl").write_text("".join(chosen))
    (folder / "faults").mkdir()
    for i, text in enumerate(["A cat.", "A cat.", "\x1b[2J twice ", "雪 ❄", "", "word " * 900, "x\ny", "A dog."]):
        picture(i % 6, (64 + 16 * (i % 3), 48)).save(folder / f"faults/{i}.png")
        (folder / f"faults/{i}.txt").write_text(text, encoding="utf-8")
    (folder / "faults/6.png").write_bytes(b"no picture")
    (folder / "faults/alone.txt").write_text("no image")
    (folder / "more").symlink_to(scenes / "more")


def commands() -> dict[str, list[str]]:
    """By name, what is run in the folder of the data. The later ones use the adapter of the first."""
    common = ["--batch-size", "8", "--epochs", "4", "--max-steps", "20", "--save-every", "10", "--val-split", "0.15"]
    training = {
        f"train {name}": ["train", "scenes", "shapes:2", *common, *flags, "--output", f"runs/{name}", "--no-eval"]
        for name, flags in RUNS.items()
        if name != "qlora" or importlib.util.find_spec("bitsandbytes")
    }
    short = ["--max-new-tokens", "16"]
    captioning = ["caption", "more", "--adapter", "base", "--adapter", "runs/lora", "--format", "jsonl", *short]
    tokens = ["--model", "tiny", "--max-tokens", "500"]
    return training | {
        "caption base and lora": captioning,
        "caption 3 beams": [*captioning, "--num-beams", "3"],
        "caption sampled": [*captioning, "--temperature", "0.7", "--top-p", "0.9", "--seed", "1"],
        "caption by prefix": ["caption", "more", "--adapter", "runs/prefix", *short],
        "check": ["check", "scenes", "shapes:2", "--json", "--val", "val"],
        "check with tokens": ["check", "scenes", "shapes:2", "--json", *tokens, "--max-pixels", "9216"],
        "check faults": ["check", "faults", "--json", *tokens],
        "eval questions": ["eval", "val", "--adapter", "runs/lora", "--json", "--blank", "--also", "also", *short],
        "eval captions": ["eval", "also", "--adapter", "runs/lora", "--json", "--level", "char"],
        "eval base": ["eval", "also", "--model", "tiny", "--json"],
    }


def run(names: Collection[str]) -> dict:
    """What each command of these names printed, or its run logged, and its exit code; and on which machine."""
    import torch

    from vlm_lora.cli import main

    torch.set_num_threads(1)
    results = {"machine": machine()}
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        os.environ["VLM_LORA_CACHE"] = str(Path(temporary, "cache"))
        write_data(Path(temporary))
        for family in VISION:
            write_checkpoint(Path(temporary, family), family)
        for name, command in commands().items():
            if name not in names:
                continue
            printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
            with contextlib.redirect_stdout(printed):
                code = main(command)
            printed.seek(0)
            if command[0] == "train":
                result: dict | list = logged(Path("runs", name.removeprefix("train "), "metrics.jsonl"))
            else:
                result = [parsed(line) for line in printed.read().replace(f"{temporary}/", "").splitlines()]
            results[name] = {"exit": code, "result": exact(result)}
    return results


def logged(log: Path) -> dict[str, list]:
    """A list by name of what is compared."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "loss" in line or "held_out_loss" in line]
    return {name: [line[name] for line in lines if name in line] for name in COMPARED}


def parsed(line: str):
    with contextlib.suppress(ValueError):
        return json.loads(line, object_hook=lambda found: {k: v for k, v in found.items() if k not in DROPPED})
    return line


def exact(value):
    """Floats as text, to the last bit."""
    if isinstance(value, dict):
        return {name: exact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    return value.hex() if isinstance(value, float) else value


def machine() -> dict[str, str]:
    """What decides how numbers are rounded."""
    import torch

    info, processor = Path("/proc/cpuinfo"), platform.processor()
    if info.exists():
        pattern = r"^(?:vendor_id|cpu family|model|model name)\s*: (.*)$"
        processor = ", ".join(re.findall(pattern, info.read_text().partition("\n\n")[0], re.MULTILINE))
    own = {"processor": processor or platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}
    return own | {name: version(name) for name in LIBRARIES if importlib.util.find_spec(name.replace("pillow", "PIL"))}


def differences(new, old, tolerance: float, where: str = "") -> list[str]:
    """Each place where they differ, in words."""
    if isinstance(new, dict) and isinstance(old, dict) and new.keys() == old.keys():
        return [line for name in new for line in differences(new[name], old[name], tolerance, f"{where} {name}")]
    if isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        pairs = enumerate(zip(new, old, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, tolerance, f"{where} [{i}]")]
    if new == old:
        return []
    if number := re.compile(r"-?0x[01]\.[0-9a-f]+p[+-]\d+").fullmatch:
        values = [float.fromhex(v) if isinstance(v, str) and number(v) else v for v in (new, old)]
        if tolerance and isinstance(values[0], float) and isinstance(values[1], float):
            return [] if math.isclose(*values, rel_tol=tolerance) else [f"{where}: {values[0]}, was {values[1]}"]
        new, old = values
    return [f"{where}: {new}, was {old}"]


def recorded() -> dict:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


@lru_cache
def computed(names: tuple[str, ...]) -> dict:
    """In a process of its own, with one thread from its start, that no other test has changed anything in."""
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_baseline", *names]
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


QUICK = {name for name in commands() if not name.startswith("train")} | {"train lora", "train prefix"}
"""What `make test` looks at: the commands, with the adapters that they use. `make test-long` adds the other runs."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] * (n not in QUICK)) for n in recorded() if n != "machine"],
)
def test_it_is_what_it_was(name):
    names = tuple(sorted(QUICK if name in QUICK else commands().keys() - QUICK))
    if name == "train qlora" and not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    found = computed(names)
    alike = found["machine"] == recorded()["machine"]
    if name == "caption sampled" and not alike:
        pytest.skip("recorded on another processor or other versions, where other numbers are drawn")
    assert differences(found[name], recorded()[name], tolerance=0 if alike else 1e-4) == []


def test_nothing_is_left_out():
    assert {"machine", *commands()} - {"train qlora"} == recorded().keys() - {"train qlora"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help=f"write {RECORD.name} instead of printing it")
    parser.add_argument("names", nargs="*", help="of the commands; default: all")
    options = parser.parse_args()
    results = (recorded() if options.names and options.write else {}) | run(options.names or commands())
    lines = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in results.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if options.write:
        RECORD.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
