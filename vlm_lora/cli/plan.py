"""Say what a training run will cost: operations, memory, disk, time. It takes the same flags as `train`.

  vlm-lora plan ./photos
  vlm-lora plan ./photos --gpus 4 --tflops 200 --device-memory 24      for another machine than this

No weights are read. The time is at the rate that one random layer reaches here, or at --tflops.
"""

import argparse
import json
from dataclasses import asdict

from vlm_lora.cli.console import Progress, duration, size
from vlm_lora.cli.flags import add_config, config_of
from vlm_lora.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs that share each step (default: this machine)")
    parser.add_argument("--fsdp", action="store_true", help="the base's layers in pieces over the devices (FSDP2)")
    parser.add_argument(
        "--tflops", type=float, metavar="X", help="10^12 operations a second of a device (default: measured here)"
    )
    parser.add_argument("--device-memory", type=float, metavar="GB", help="memory of a device (default: of this one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    for name in ("gpus", "tflops", "device_memory"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {getattr(options, name)}: expected a number above 0")
    if options.fsdp and options.gpus in (None, 1):
        raise ConfigError("--fsdp shares the base out over several GPUs; say how many with --gpus.")
    config = config_of(options)

    from vlm_lora.training.estimate import estimate_run

    progress = Progress()
    plan = estimate_run(
        config,
        gpus=options.gpus,
        sharded=options.fsdp,
        tflops=options.tflops,
        device_memory=options.device_memory and options.device_memory * 1e9,
        progress=lambda done, total: progress.count("Examples in tokens:", done, total),
    )
    facts = asdict(plan)
    if options.json:
        print(json.dumps(facts | {"memory": plan.cost.memory}))
        return 0
    cost, gb = plan.cost, 1e9
    print(f"{cost.steps:,} steps over {plan.images:,} images, {cost.answers:,} answers in all", end="")
    print(f"; {plan.unusable:,} rows cannot be used (vlm-lora check says why)" if plan.unusable else "")
    steps, tower = cost.operations / 1e12, cost.tower_operations / 1e12
    print(f"operations: {steps:,.3g} TFLOP in the steps, {tower:,.3g} in the vision tower")
    whose = "given" if options.tflops else "measured with one layer here"
    waits = f"; the busiest has {cost.imbalance:.2f} times the mean to do, and the others wait"
    shared = f", shared by {options.gpus}{waits}" if options.gpus and options.gpus > 1 else ""
    tower = duration(plan.tower_seconds)
    print(f"time:       {duration(plan.step_seconds + plan.tower_seconds)}, {tower} of it in the tower")
    print(f"            at {plan.rate / 1e12:,.3g} TFLOP/s, {whose} ({plan.device}, {plan.dtype}){shared}")
    print(
        f"memory:     {cost.memory / gb:,.2f} GB of {plan.device_memory / gb:,.1f} GB, besides what torch itself takes:"
    )
    print(f"            weights {cost.weights / gb:,.2f}, adapter and optimizer {cost.trained / gb:,.2f}, ", end="")
    print(
        f"activations {cost.activations / gb:,.2f} (at most {cost.largest.rows} rows of {cost.largest.width:,} tokens)"
    )
    in_memory = f"main memory still holds {cost.found:.0%} when they come again"
    if not config.cache or "vision" in config.lora_targets:
        again = "" if "vision" in config.lora_targets or plan.seen_once else f"; {in_memory}"
        print(f"disk:       no features are kept ({'LoRA is in the tower' if config.cache else '--no-cache'}){again}")
    else:
        others = "each other image is seen once" if plan.seen_once else f"{plan.images:,} to learn from"
        print(f"disk:       {size(cost.features)} of features, computed once and kept: ", end="")
        print(f"{plan.held_out:,} held-out images; {others}")
        if plan.room < cost.features:
            room = f"room for {size(plan.room)} of it"
            print(f"            {room} (--cache-gb {config.cache_gb:g}, free disk); of the rest, {in_memory}")
        if plan.cached:
            print(f"            {plan.cached:,} images are in the cache: those of this run spare it the tower ", end="")
            print("(which they are, only the base's weights tell)")
    for line in plan.advice:
        print(line)
    return 0
