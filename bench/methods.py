"""Every fine-tuning method on the same data, base and steps: size, time, memory, and score on held-out images.

    python -m bench.methods --search      # learning rates; nothing is timed, so it may share the machine
    python -m bench.methods               # the table; about half an hour on one core

Each method is trained on data/easy_vqa with the embedded model. The search tries its learning rates for fewer steps and
keeps the one with the lowest loss on a tenth of the training images, held out; so no method wins by a learning rate
that suits it better. The main run then trains each once with that rate and scores it on all test images, which neither
has seen. "full" trains all weights of the language layers and the projector: a line to compare with, no method of the
command line. Nothing is repeated: the interval is of the test images, not of other seeds.

Seconds are the processor's, all threads together, in the steps alone, on cached image features. Memory is counted and
not read from the process, where libraries hide it: "weights" are base and adapter as they are kept, "a step" is the
most that is alive at one time within a step, weights, gradients, AdamW's state and activations together. One record,
bench/results/methods.json, for both commands; rows of other steps or settings are not put beside each other.
"""

import argparse
import copy
import json
import platform
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.easy_vqa import asking_for_one_word
from bench.origin import origin
from vlm_lora import Captioner, TrainConfig, evaluate, read_dataset
from vlm_lora.config import DEFAULT_PROMPT, DEVICE_TOKENS
from vlm_lora.console import Progress, say
from vlm_lora.model.adapters.base import Adapter, new_contract
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.encode import Encoder
from vlm_lora.training import run
from vlm_lora.training.batches import Loader
from vlm_lora.training.events import Events
from vlm_lora.training.lessons import Lesson
from vlm_lora.training.run import train_adapter
from vlm_lora.training.step import loss_sum
from vlm_lora.training.techniques import Techniques

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench" / "results" / "methods.json"
SETTINGS = {
    "model": "tiny",
    "epochs": 1000.0,
    "batch_size": 32,
    "val_split": 0.1,
    "seed": 0,
    "save_every": 10**6,
}
METHODS = {
    "full": ({}, (3e-4, 1e-3, 3e-3), 100),
    "lora": ({}, (1e-3, 3e-3, 1e-2), 100),
    "lora, rslora": ({"variant": "rslora"}, (3e-4, 1e-3, 3e-3), 100),
    "lora, dora": ({"variant": "dora"}, (1e-3, 3e-3, 1e-2), 100),
    "lora, pissa": ({"variant": "pissa"}, (3e-4, 1e-3, 3e-3), 100),
    "qlora": ({"method": "qlora"}, (1e-3, 3e-3, 1e-2), 100),
    "adapter": ({"method": "adapter"}, (1e-2, 3e-2, 1e-1), 200),
    "prefix": ({"method": "prefix"}, (3e-2, 1e-1, 3e-1, 1.0), 200),
    "prompt": ({"method": "prompt"}, (3e-2, 1e-1, 3e-1, 1.0), 200),
}
"""Settings beside the common ones, the learning rates tried, and the steps of the search: more for those that, at any
rate, have learnt little after a hundred."""


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

    def read(folder: Path) -> None:
        backbone.model.load_state_dict(load_file(folder / "adapter_model.safetensors"), strict=False)

    return Adapter(backbone, new_contract(backbone, "full", config.prompt), disable, write, read)


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors met inside, ``but`` these, while they are alive; ``peak`` is the most at one time."""

    def __init__(self, but: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in but}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def kept(model: torch.nn.Module) -> list[torch.Tensor]:
    """All tensors of a model, with what says how its four-bit weights are read."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            tensors += [value for value in state.as_dict(packed=True).values() if isinstance(value, torch.Tensor)]
    return tensors


def bytes_of(tensors) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def memory(result: run.TrainedAdapter, config: TrainConfig) -> dict:
    """Bytes of the weights, of the language layers' alone, and of a step at its peak, on the same answers always."""
    adapter, backbone = result.adapter, result.adapter.backbone
    encoder = Encoder(backbone)
    lessons = []
    for example in result.train_examples[: config.batch_size // 8]:
        grids = torch.stack([entry.grid_thw for entry in result.features.get(example.images)])
        some = replace(example, dialogues=example.dialogues[:8])
        lessons.append(Lesson.of(some, encoder.sizes(some.dialogues, grids)))
    weights = kept(backbone.model)
    optimizer = torch.optim.AdamW([p for _, p in adapter.named_parameters()], lr=0.0, fused=True)
    max_tokens = config.on(backbone.device.type).micro_batch_tokens or DEVICE_TOKENS
    loader = Loader(backbone, result.features, result.processes)
    backbone.model.train()
    with Alive(but=weights) as alive:
        for _ in range(2):  # AdamW's state is there from the end of the first step on
            for fetched in loader.fetch(lessons, max_tokens):
                loss_sum(backbone, loader.place(fetched)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    backbone.model.eval()
    return {
        "weight_bytes": bytes_of(weights),
        "language_bytes": bytes_of(kept(backbone.language_model.layers)),
        "step_bytes": bytes_of(weights) + alive.peak,
    }


def train_one(
    name: str, lr: float, data: Path, steps: int, output: Path
) -> tuple[run.TrainedAdapter, TrainConfig, float, float]:
    """One method trained at one learning rate, its held-out loss, and the processor's seconds in its steps."""
    config = TrainConfig(
        data=str(data / "train.jsonl"), output=str(output), lr=lr, max_steps=steps, **SETTINGS | METHODS[name][0]
    )
    losses, clock = [], []
    progress = Progress()

    class Timed(Events):
        def held_out(self, *, loss, **_):
            losses.append(loss)

        def start(self, **values):
            clock.append(time.process_time())

        def step(self, *, step, **values):
            clock.append(time.process_time())
            progress.count(f"{name}, lr {lr:g}: step", step, steps)

    techniques = Techniques(attach=attach_full) if name == "full" else Techniques()
    result = train_adapter(config, events=Timed(), techniques=techniques)
    return result, config, losses[-1], clock[-1] - clock[0]


def score(result: run.TrainedAdapter, examples) -> tuple[float, list[float]]:
    """Exact match of the model as it now stands, and its interval."""
    # Told of no adapter, the captioner answers once, with what is attached and switched on.
    captioner = Captioner(result.adapter.backbone, None, result.features, DEFAULT_PROMPT)
    scores = evaluate(captioner, examples).scores
    return scores.base.exact_match, list(scores.intervals["base"]["exact_match"])


def measure(name: str, lr: float, data: Path, steps: int, output: Path) -> dict:
    result, config, loss, seconds = train_one(name, lr, data, steps, output)
    test = read_dataset(data / "test.jsonl", prompt=DEFAULT_PROMPT).examples
    exact_match, interval = score(result, test)
    row = {
        "lr": lr,
        "trained": sum(part.trained for part in result.adapter.parts()),
        "adapter_bytes": sum(file.stat().st_size for file in (result.folder / "adapter").iterdir()),
        "seconds": seconds,
        "held_out_loss": loss,
        "exact_match": exact_match,
        "interval": interval,
    } | memory(result, config)
    if name == "full":
        with result.adapter.switched_off():
            row["base"] = score(result, test)
            row["base_one_word"] = score(result, [asking_for_one_word(example) for example in test])
    return row


def read_record(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"search": {}, "methods": {}}


def budget(row: dict) -> tuple[int, dict]:
    """What rows of one table must have in common."""
    return row["steps"], row["settings"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data/easy_vqa", help="folder of train and test.jsonl")
    parser.add_argument("--search", action="store_true", help="look for the learning rates, and write them down")
    parser.add_argument("--steps", type=int, help="default: 450, in the search 100 or 200, as the method needs")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "methods", help="folder of the run folders")
    parser.add_argument("--record", type=Path, default=RECORD, help="file to write; a trial wants one of its own")
    args = parser.parse_args()
    searched, rows = read_record(RECORD)["search"], read_record(args.record)["methods"]
    if lacking := [name for name in args.methods if not args.search and name not in searched]:
        parser.error(f"no learning rate is known for {', '.join(lacking)}; run --search first")
    steps = args.steps or 450
    others = [name for name, row in rows.items() if name not in args.methods and budget(row) != (steps, SETTINGS)]
    if others and not args.search:
        parser.error(
            f"{args.record} holds {others[0]} with {rows[others[0]]['steps']} steps; rows of other steps or settings, "
            f"{steps} steps now, make no table with it. Give the same --steps, all --methods, or another --record"
        )

    started = time.strftime("%Y%m%d-%H%M%S")
    for name in args.methods:
        folder = args.output / f"{name.replace(', ', '-')}-{started}"
        if args.search:
            losses, steps = {}, args.steps or METHODS[name][2]
            for lr in METHODS[name][1]:
                losses[f"{lr:g}"] = train_one(name, lr, args.data, steps, folder / f"{lr:g}")[2]
                say(f"{name}, lr {lr:g}: held-out loss {losses[f'{lr:g}']:.4f}")
            record = read_record(args.record)
            record["search"][name] = {"steps": steps, "held_out_loss": losses}
        else:
            losses = searched[name]["held_out_loss"]
            row = measure(name, float(min(losses, key=losses.get)), args.data, steps, folder)
            say(f"{name}: exact match {100 * row['exact_match']:.1f} %, {row['seconds']:.0f} s")
            record = read_record(args.record)
            record["methods"][name] = {
                "steps": steps,
                "settings": SETTINGS,
                **row,
                **origin("methods", f"{platform.machine()}, {torch.get_num_threads()} threads"),
            }
        # After each method: a stop loses nothing, and a search of other methods may run beside.
        args.record.parent.mkdir(exist_ok=True)
        args.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not args.search:
        rows = {name: record["methods"][name] for name in METHODS if name in record["methods"]}
        print(table(rows))
        print("\n" + "\n".join(advice(rows)) + "\n")
    print(json.dumps(record))


def _percent(value: float, interval: list[float]) -> str:
    low, high = interval
    return f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(rows: dict[str, dict]) -> str:
    """As Markdown, for docs/methods.md. All rows are of the same steps and settings."""
    steps, settings = budget(next(iter(rows.values())))
    assert all(budget(row) == (steps, settings) for row in rows.values())
    what = f"easy-VQA, {steps} steps of {settings['batch_size']} answers"
    lines = [
        f"| {what} | trained | adapter | training | weights | a step | exact match, % (95 % interval) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    full = rows.get("full", {})
    for name, key in (("base, as it answers", "base"), ("base, asked for one word", "base_one_word")):
        if key in full:
            lines.append(f"| {name} | | | | | | {_percent(*full[key])} |")
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['trained']:,} | {row['adapter_bytes'] / 1e3:,.0f} kB | {row['seconds']:.0f} s "
            f"| {row['weight_bytes'] / 1e6:.1f} MB | {row['step_bytes'] / 1e6:.0f} MB "
            f"| {_percent(row['exact_match'], row['interval'])} |"
        )
    return "\n".join(lines)


def advice(rows: dict[str, dict]) -> list[str]:
    """Which to pick when, as far as the figures of the table say it."""
    methods = {name: row for name, row in rows.items() if name != "full"}
    base = rows.get("full", {}).get("base_one_word", (0.0, (0.0, 0.0)))[1][1]
    better = {name: row for name, row in methods.items() if row["interval"][0] > base}
    lines = [f"Not clearly above the base: {', '.join(methods.keys() - better.keys()) or 'none'}."]
    if not better:
        return lines
    best = max(better, key=lambda name: better[name]["exact_match"])
    level = {name: row for name, row in better.items() if row["interval"][1] >= better[best]["interval"][0]}
    lines.append(f"Highest score: {best}; intervals overlap with: {', '.join(level.keys() - {best}) or 'none'}.")
    for what, key in (
        ("smallest adapter", "adapter_bytes"),
        ("shortest training", "seconds"),
        ("smallest weights in memory", "weight_bytes"),
        ("smallest peak of a step", "step_bytes"),
    ):
        among_level, among_better = (min(some, key=lambda n: some[n][key]) for some in (level, better))
        lines.append(f"Of these the {what}: {among_level}; of all that beat the base: {among_better}.")
    return lines


if __name__ == "__main__":
    main()
