"""Training over a base in bfloat16 with LoRA's products in that format, as a GPU computes them, beside float32.

    python -m bench.base_format --variants plain dora      # some 20 minutes a variant; nothing is timed

The embedded model is trained on data/easy_vqa from three seeds, each three times: the base in float32; the base in
bfloat16 and LoRA in float32, as PEFT has it and as a CPU computes it; and both in bfloat16. What differs is rounding
alone, so held-out loss and the share of test questions that are answered right should differ no more than between
seeds. The record goes to bench/results/base_format.json; the last line is JSON.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from bench.methods import ROOT, SETTINGS, score
from bench.origin import origin
from vlm_lora import TrainConfig, read_dataset
from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.console import say
from vlm_lora.model.adapters.base import Adapter
from vlm_lora.model.adapters.lora import compute_in_base_format
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import Backbone
from vlm_lora.training.events import Events
from vlm_lora.training.run import train_adapter
from vlm_lora.training.techniques import ALL

RECORD = ROOT / "bench/results/base_format.json"
SEEDS, WAYS = (0, 1, 2), ("float32", "bfloat16, LoRA in float32", "bfloat16, LoRA in bfloat16")
RATES = {"plain": 3e-3, "dora": 3e-3}
"""Learning rates: those that bench/methods.py found for them."""


def attach_in_base_format(backbone: Backbone, config: TrainConfig) -> Adapter:
    adapter = attach_adapter(backbone, config)
    compute_in_base_format(backbone, True)
    return adapter


def train(way: str, variant: str, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """Held-out loss, and the share of the test questions that are answered right."""
    base, _, products = way.partition(", LoRA in ")
    losses = []

    class Watched(Events):
        def held_out(self, *, loss, **_):
            losses.append(loss)

    config = TrainConfig(
        data=str(ROOT / "data/easy_vqa/train.jsonl"),
        output=str(folder / f"{variant}-{base}-{products or base}-{seed}"),
        variant=variant,
        dtype=base,
        lr=RATES[variant],
        max_steps=steps,
        **SETTINGS | {"seed": seed},
    )
    techniques = replace(ALL, attach=attach_in_base_format) if products == base else ALL
    result = train_adapter(config, events=Watched(), techniques=techniques)
    test = read_dataset(ROOT / "data/easy_vqa/test.jsonl", prompt=DEFAULT_PROMPT).examples
    return {"held_out_loss": losses[-1], "exact_match": score(result, test)[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/base_format", help="folder of the run folders")
    args = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for variant in args.variants:
        rows: dict[str, list] = {way: [] for way in WAYS}
        for seed in SEEDS:
            for way, found in rows.items():
                found.append(train(way, variant, seed, args.steps, args.output))
                say(f"{variant}, seed {seed}, {way}: {json.dumps(found[-1])}")
        record[variant] = {
            "steps": args.steps,
            "settings": SETTINGS | {"seed": SEEDS},
            "lr": RATES[variant],
            "seeds": rows,
        }
        record[variant] |= origin("base_format", f"{torch.get_num_threads()} threads")
        RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for way, found in rows.items():
            mean = {name: statistics.mean(row[name] for row in found) for name in found[0]}
            print(f"{variant}, {way}: loss {mean['held_out_loss']:.4f}, exact match {100 * mean['exact_match']:.1f} %")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
