"""Every fine-tuning method on the same data, base and steps: size, time, memory, and score on held-out
images.

    python -m bench.methods

Each method trains the embedded model on data/easy_vqa once for each of its learning rates, every run in a
process of its own; the learning rate with the lowest loss on a held-out tenth of the training images is kept,
and that run is scored on the test images. So no method wins by a learning rate that suits it better. "full"
trains all weights of the language layers and the projector and is the line to compare with; it is no method
of the command line. Seconds are those of the steps alone, on cached image features. Memory is the process's
peak (of the device, on a GPU), libraries included. The record goes to bench/results/methods.json; the last
line of output is the same JSON.
"""

import argparse
import copy
import importlib.util
import json
import platform
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlm_lora import Captioner, TrainConfig, __version__, evaluate, read_dataset, train
from vlm_lora.cli.console import say
from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.model.adapters.base import Adapter, new_contract
from vlm_lora.model.backbone import Backbone
from vlm_lora.training import run

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "model": "tiny",
    "epochs": 1000.0,
    "batch_size": 128,
    "val_split": 0.1,
    "seed": 0,
    "save_every": 10**6,
}
METHODS = {
    "full": ({}, (3e-4, 1e-3, 3e-3)),
    "lora": ({}, (1e-3, 3e-3, 1e-2)),
    "lora, rslora": ({"variant": "rslora"}, (1e-3, 3e-3, 1e-2)),
    "lora, dora": ({"variant": "dora"}, (1e-3, 3e-3, 1e-2)),
    "lora, pissa": ({"variant": "pissa"}, (3e-4, 1e-3, 3e-3)),
    "qlora": ({"method": "qlora"}, (1e-3, 3e-3, 1e-2)),
    "adapter": ({"method": "adapter"}, (1e-3, 3e-3, 1e-2)),
    "prefix": ({"method": "prefix"}, (3e-2, 1e-1, 3e-1)),
    "prompt": ({"method": "prompt"}, (3e-2, 1e-1, 3e-1)),
}
"""Settings beside the common ones, and the learning rates tried."""


def attach_full(backbone: Backbone, config: TrainConfig) -> Adapter:
    """All weights of the language layers and the projector, as if they were an adapter."""
    parts = {"layers": backbone.language_model.layers, "merger": backbone.model.model.visual.merger}
    base = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    for part in parts.values():
        part.requires_grad_(True)

    def load(states: dict) -> None:
        for name, part in parts.items():
            part.load_state_dict(states[name])

    @contextmanager
    def disable():
        tuned = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        load(base)
        try:
            yield
        finally:
            load(tuned)

    def write(folder: Path) -> None:
        tensors = {n: p.detach().cpu() for n, p in backbone.model.named_parameters() if p.requires_grad}
        save_file(tensors, folder / "adapter_model.safetensors")

    return Adapter(backbone, new_contract(backbone, "full", config.prompt), disable, write)


def one(name: str, lr: float, data: Path, steps: int, output: Path) -> dict:
    """Train and score one method at one learning rate."""
    settings, _ = METHODS[name]
    if name == "full":
        run.attach_adapter = attach_full
    config = TrainConfig(
        data=str(data / "train.jsonl"), output=str(output), lr=lr, max_steps=steps, **SETTINGS | settings
    )
    result = train(config)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    captioner = Captioner(result.adapter.backbone, result.adapter, result.features, DEFAULT_PROMPT)
    scores = evaluate(captioner, read_dataset(data / "test.jsonl", prompt=DEFAULT_PROMPT).examples).scores
    return {
        "lr": lr,
        # One half of PiSSA's tensors stays as it starts.
        "trainable": sum(p.numel() for _, p in result.adapter.named_parameters()) // (2 if "pissa" in name else 1),
        "adapter_bytes": sum(file.stat().st_size for file in (output / "adapter").iterdir()),
        "seconds": max(line["seconds"] for line in lines if "lr" in line),
        "peak_bytes": peak,
        "held_out_loss": [line["held_out_loss"] for line in lines if "held_out_loss" in line][-1],
        "exact_match": scores["tuned"]["exact_match"],
        "interval": scores["intervals"]["tuned"]["exact_match"],
        "base": scores["base"]["exact_match"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data/easy_vqa", help="folder of train and test.jsonl")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "methods", help="folder of the run folders")
    parser.add_argument("--lr", type=float, help="this learning rate alone, in this process")
    args = parser.parse_args()
    if args.lr is not None:
        print(json.dumps(one(args.methods[0], args.lr, args.data, args.steps, args.output)))
        return

    rows: dict[str, dict] = {}
    for name in args.methods:
        if name == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
            say("qlora is left out: bitsandbytes is not installed.")
            continue
        tried = []
        for lr in METHODS[name][1]:
            folder = args.output / f"{name.replace(', ', '-')}-{lr:g}-{time.strftime('%Y%m%d-%H%M%S')}"
            command = [sys.executable, "-m", "bench.methods", "--methods", name, "--lr", str(lr)]
            command += ["--steps", str(args.steps), "--data", str(args.data), "--output", str(folder)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            tried.append(json.loads(done.stdout.splitlines()[-1]))
            say(f"{name}, lr {lr:g}: held-out loss {tried[-1]['held_out_loss']:.4f}")
        rows[name] = min(tried, key=lambda row: row["held_out_loss"])

    record = {
        "command": "python -m bench.methods" + "".join(f" {a}" for a in sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "vlm-lora": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "settings": SETTINGS | {"steps": args.steps},
        "methods": rows,
    }
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    (results / "methods.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    print(json.dumps(record))


def table(rows: dict[str, dict]) -> str:
    """As Markdown, for the README."""
    lines = ["| method | trained | adapter | steps | peak memory | lr | exact match (95 % interval) |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, row in rows.items():
        low, high = row["interval"]
        lines.append(
            f"| {name} | {row['trainable']:,} | {row['adapter_bytes'] / 1e3:,.0f} kB | {row['seconds']:.0f} "
            f"s | {row['peak_bytes'] / 1e6:,.0f} MB | {row['lr']:g} "
            f"| {100 * row['exact_match']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) |"
        )
    base = next(iter(rows.values()))["base"]
    return "\n".join([*lines, f"| base | 0 | | | | | {100 * base:.1f} % |"])


if __name__ == "__main__":
    main()
