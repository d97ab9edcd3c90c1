"""Say what a training run will cost: operations, memory, disk, time. It takes the same flags as `train`.

  vlm-lora plan ./photos
  vlm-lora plan ./photos --device h100 --gpus 4      for another machine than this

No weights are loaded. The time is measured with one layer of random weights on this machine, or computed for the device
that --device names, from its data sheet.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from vlm_lora.cli.flags import add_config, config_of
from vlm_lora.config import EVERYDAY as EVERYDAY_KNOBS
from vlm_lora.config import TrainConfig
from vlm_lora.console import Progress, duration, size
from vlm_lora.errors import ConfigError
from vlm_lora.inference.losses import sample_of
from vlm_lora.training.devices import DEVICES, RESERVED, Device

if TYPE_CHECKING:
    from vlm_lora.training.estimate import Estimate

EVERYDAY = (*EVERYDAY_KNOBS, "config", "gpus", "device", "json")
"""What ``--help`` shows; ``--help-all`` shows every flag."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs that share each step (default: this machine)")
    parser.add_argument("--fsdp", action="store_true", help="the base's layers in pieces over the devices (FSDP2)")
    parser.add_argument("--device", choices=DEVICES, help="price the run for this device, by its data sheet")
    parser.add_argument(
        "--tflops", type=float, metavar="X", help="10^12 operations a second of a device (default: measured here)"
    )
    parser.add_argument(
        "--bandwidth", type=float, metavar="X", help="10^9 bytes a second of its memory; with --tflops, prices the run"
    )
    parser.add_argument("--device-memory", type=float, metavar="GB", help="memory of a device (default: of this one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    for name in ("gpus", "tflops", "bandwidth", "device_memory"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {getattr(options, name)}: expected a number above 0")
    if options.fsdp and options.gpus in (None, 1):
        raise ConfigError("--fsdp shares the base out over several GPUs; say how many with --gpus.")
    if options.device and (options.tflops or options.bandwidth):
        raise ConfigError("--device stands for its own --tflops and --bandwidth; give it or them.")
    if options.bandwidth and not (options.tflops and options.device_memory):
        raise ConfigError("--bandwidth describes a device, together with --tflops and --device-memory.")
    config = config_of(options)

    from vlm_lora.training.estimate import estimate_run

    progress = Progress()
    plan = estimate_run(
        config,
        gpus=options.gpus,
        sharded=options.fsdp,
        accelerator=_accelerator(options),
        tflops=options.tflops,
        device_memory=options.device_memory and options.device_memory * 1e9,
        progress=lambda done, total: progress.count("Tokens counted, examples:", done, total),
    )
    if options.json:
        print(json.dumps(asdict(plan) | {"memory": plan.cost.memory}))
        return 0
    print(f"{plan.cost.steps:,} steps over {plan.images:,} images, {plan.cost.answers:,} answers in all", end="")
    print(f"; {plan.unusable:,} rows cannot be used (vlm-lora check says why)" if plan.unusable else "")
    for line in (*_time(plan, options), *_memory(plan), *_disk(plan, config), *plan.advice):
        print(line)
    return 0


def _accelerator(options: argparse.Namespace) -> Device | None:
    if options.device:
        return DEVICES[options.device]
    if options.bandwidth:
        tflops = options.tflops * 1e12
        # An H200's float32 rate is a fifteenth of its tensor rate; few products are left in float32.
        return Device(tflops, tflops / 15, options.bandwidth * 1e9, options.device_memory * 1e9)
    return None


def _time(plan: "Estimate", options: argparse.Namespace) -> Iterator[str]:
    cost = plan.cost
    steps, tower, held_out = (n / 1e12 for n in (cost.operations, cost.tower_operations, cost.held_out_operations))
    parts = f"{steps:,.3g} TFLOP in the steps, {tower:,.3g} in the vision tower"
    yield f"operations: {parts}, {held_out:,.3g} in the held-out losses"
    if plan.sample < plan.scored:
        at_end = cost.all_held_out_operations / 1e12
        yield (
            f"            ({plan.checkpoints:,} of a {sample_of(plan.sample, plan.scored)}, and, with {at_end:,.3g}, "
            "one of all at the end)"
        )
    parts = (
        f"{duration(plan.tower_seconds)} of it in the tower, {duration(plan.held_out_seconds)} in the held-out losses"
    )
    yield f"time:       {duration(plan.step_seconds + plan.tower_seconds + plan.held_out_seconds)}, {parts}"
    waits = f"; the busiest has {cost.imbalance:.2f} times the mean to do, and the others wait"
    shared = f", shared by {options.gpus}{waits}" if options.gpus and options.gpus > 1 else ""
    whose = "priced" if plan.price else "given" if options.tflops else "measured with one layer here"
    yield f"            at {plan.rate / 1e12:,.3g} TFLOP/s, {whose} ({plan.device}, {plan.dtype}){shared}"
    if price := plan.price:
        yield (
            f"            A micro-batch of {cost.largest.rows} x {cost.largest.width:,} tokens takes "
            f"{1e3 * price.seconds:,.0f} ms, and waits for {price.bound}: {1e3 * price.products:,.0f} ms of matrix "
            f"products, {1e3 * price.traffic:,.0f} ms of memory traffic, while the host starts {plan.kernels:,} "
            f"kernels in {1e3 * price.launches:,.0f} ms or more."
        )
        yield f"            The base's own products get {plan.peak_share:.0%} of the device's published rate."
        if plan.compiles:
            yield "            Plain layers are priced. This run would compile them (--compile), and be faster."


def _memory(plan: "Estimate") -> Iterator[str]:
    cost, gb = plan.cost, 1e9
    device = f"{plan.device_memory / gb:,.1f} GB"
    yield f"memory:     {cost.memory / gb:,.2f} GB of {device}, besides what torch itself takes:"
    for name, size_ in cost.memory_by_part.items():
        yield f"            {name:<44}{size_ / gb:>9,.2f} GB"
    shape = cost.largest
    yield f"            in a micro-batch of {shape.rows} rows of {shape.width:,} tokens, the largest"
    if plan.device == "cuda":
        yield f"            (torch reserves some {RESERVED - 1:.0%} more of a GPU than it uses)"


def _disk(plan: "Estimate", config: TrainConfig) -> Iterator[str]:
    cost = plan.cost
    in_memory = f"main memory still holds {cost.found:.0%} when they come again"
    if not config.cache or "vision" in config.lora_targets:
        again = "" if "vision" in config.lora_targets or plan.seen_once else f"; {in_memory}"
        why = "LoRA is in the tower" if config.cache else "--no-cache"
        yield f"disk:       no features are kept ({why}){again}"
        return
    others = "each other image is seen once" if plan.seen_once else f"{plan.images:,} to learn from"
    yield (
        f"disk:       {size(cost.features)} of features, computed once and kept: {plan.held_out:,} held-out images; "
        f"{others}"
    )
    if plan.room < cost.features:
        room = f"room for {size(plan.room)} of it"
        yield f"            {room} (--cache-gb {config.cache_gb:g}, free disk); of the rest, {in_memory}"
    if plan.cached:
        yield (
            f"            {plan.cached:,} images are in the cache already; if they are of this run, it needs no vision "
            "tower for them"
        )
