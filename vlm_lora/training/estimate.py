"""`vlm-lora plan`: what a run will cost on this machine or another, and what would make it fit."""

import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm_lora.config import TrainConfig, cache_folder, flag_of
from vlm_lora.data.example import ImageRef
from vlm_lora.data.index import Looks
from vlm_lora.errors import ConfigError, DataError
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.device import best_device, resolve_dtype
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import store_in
from vlm_lora.model.preprocess import Preprocessor, load_preprocessor
from vlm_lora.model.shapes import load_sample
from vlm_lora.training.compiled import would_compile
from vlm_lora.training.cost import CostModel, Prediction, cost_model, predict
from vlm_lora.training.devices import ATTAINED, Device, Price, price
from vlm_lora.training.fitting import FILLED, device_here, fitting_tokens
from vlm_lora.training.held_out import HeldOut
from vlm_lora.training.lessons import Lessons
from vlm_lora.training.prepare import Prepared, count_tokens, read_and_split, sees_each_image_once
from vlm_lora.training.processes import require_shardable
from vlm_lora.training.schedule import Schedule
from vlm_lora.training.step import loss_sum
from vlm_lora.training.trace import ATTENTION_OPERATIONS, MicroShape, micro_batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What `vlm-lora plan` tells. Sizes in bytes, rates in operations a second of one device.

    ``cost.features`` are those that the run wants to keep, of the ``held_out`` images too; there is ``room`` for so
    much, and so for the share ``kept`` of the images to learn from. All as for a cache that has none of them yet: which
    of the ``cached`` images are this run's, only the base's weights tell. ``sample`` of the held-out examples, which
    are ``scored``, are scored at each of the ``checkpoints``.
    """

    cost: Prediction
    images: int
    held_out: int
    scored: int
    sample: int
    checkpoints: int
    unusable: int
    seen_once: bool
    kept: float
    room: int
    cached: int
    device: str
    dtype: str
    device_memory: float
    rate: float
    step_seconds: float
    tower_seconds: float
    held_out_seconds: float
    price: Price | None
    """What one of the largest micro-batches takes, where the time is priced and not measured."""
    kernels: int
    """Of such a micro-batch."""
    peak_share: float | None
    """Of the device's published rate: the share that the base's own products get."""
    compiles: bool
    """Whether the run would compile its layers. What is priced is the step of plain ones."""
    advice: tuple[str, ...]


@dataclass(frozen=True)
class _Headers:
    """What images' headers and bytes tell, without a model: patches and hashes by image."""

    base: Preprocessor
    looks: Looks

    def of(self, lessons: Lessons) -> dict[ImageRef, int]:
        """Patches of each image of these."""
        images = dict.fromkeys(lessons.images)
        return {ref: math.prod(self.base.grid(*self.looks.size(ref))) for ref in images}

    def once(self, patches: dict[ImageRef, int]) -> dict[str, int]:
        """By content, as they are kept: copies once."""
        return {self.looks.sha256(ref): number for ref, number in patches.items()}


def estimate_run(
    config: TrainConfig,
    *,
    gpus: int | None = None,
    sharded: bool = False,
    accelerator: Device | None = None,
    tflops: float | None = None,
    device_memory: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Estimate:
    """Predict a run from its data's texts and image headers and the base's config.

    Args:
        gpus: that share each step; by default this machine's device, which may be a CPU.
        sharded: whether FSDP2 is to keep the base's layers in pieces over them.
        accelerator: the device, one of `DEVICES` or another, whose figures price the traced passes.
        tflops: 10^12 operations a second of a device; by default measured here.
        device_memory: of a device, in bytes; by default this one's.
        progress: called with the number of examples whose tokens are counted, and of all.

    Raises:
        VlmLoraError: data or model cannot be used, or there is no GPU here to be measured.
    """
    if sharded:
        require_shardable(config.method)
    device = best_device()
    if (target := "cuda" if gpus or accelerator else device.type) != device.type:
        config = _elsewhere(config, gpus, accelerator, bool(tflops and device_memory))
    gpus, config = gpus or 1, config.on(target)
    model = cost_model(config, dtype := resolve_dtype(config.dtype, device), target)
    prepared, headers = _prepare(config, progress)
    patches, held = headers.of(prepared.train), headers.of(prepared.held_out)
    schedule = Schedule.of(config, (examples := prepared.weighted).num_branches)
    memory = device_memory or (accelerator.memory if accelerator else device_memory_of(device))
    if not config.micro_batch_tokens:
        figures = replace(accelerator or _described(tflops, device), memory=memory)
        tokens = fitting_tokens(model, schedule, examples, patches.__getitem__, figures, gpus, sharded)
        config = config.replace(micro_batch_tokens=tokens)
    held_out = HeldOut.of(config, examples, prepared.held_out, schedule.num_steps, headers.looks.sha256)

    seen_once = sees_each_image_once(config, [each.example for each in prepared.train])
    learnt, held_once = {} if seen_once else headers.once(patches), headers.once(held)
    features, room, kept = _features(config, learnt, held_once, model.traced.feature_bytes)

    def cost_of(config: TrainConfig, model: CostModel | None = None, sharded: bool = sharded) -> Prediction:
        model = model or cost_model(config, resolve_dtype(config.dtype, device), target)
        how: dict[str, Any] = {"gpus": gpus, "sharded": sharded, "kept": kept}
        return predict(config, model, examples, patches, **how, held_out=held_out, held_patches=held)

    cost = cost_of(config, model)
    tower = cost.tower_operations + kept * sum(map(model.tower_operations, learnt.values()))
    tower += sum(map(model.tower_operations, held_once.values()))
    cost = replace(cost, features=features, tower_operations=tower)
    half = "float16" if dtype == torch.float16 or (accelerator and not accelerator.bfloat16) else "bfloat16"
    rates, priced, share = _rates(config, model, cost.largest, accelerator, tflops, device)
    return Estimate(
        cost=cost,
        images=len(patches),
        held_out=len(held_once),
        scored=len(held_out.examples),
        sample=held_out.size,
        checkpoints=held_out.checkpoints,
        unusable=len(prepared.bad_rows),
        seen_once=seen_once,
        kept=kept,
        room=room,
        cached=store_in(cache_folder(), config.cache_gb).use().entries,
        device=target,
        dtype=str(dtype).removeprefix("torch."),
        device_memory=memory,
        rate=rates[0],
        step_seconds=cost.operations * cost.imbalance / rates[0] / gpus,
        tower_seconds=cost.tower_operations / rates[1] / gpus,
        held_out_seconds=cost.held_out_operations / rates[0] / gpus,
        price=priced,
        kernels=round(model.trace(cost.largest).num_kernels),
        peak_share=share,
        compiles=would_compile(config, headers.base.family, target, sharded, schedule.num_steps),
        advice=tuple(_advice(config, model, cost, memory, cost_of, half, can_shard=gpus > 1 and not sharded)),
    )


def _features(
    config: TrainConfig, learnt: Mapping[str, int], held: Mapping[str, int], of_patch: int
) -> tuple[int, int, float]:
    """Bytes that the run wants to keep, the room there is for them, and the share of what it learns from that is kept;
    from the patches of each image, by its content."""
    store = store_in(cache_folder(), config.cache_gb)
    if not config.cache or "vision" in config.lora_targets:
        return 0, store.room_for(0), 0.0
    learnt_bytes, held_bytes = sum(learnt.values()) * of_patch, sum(held.values()) * of_patch
    room = store.room_for(learnt_bytes + held_bytes)
    kept = min(1.0, max(0, room - held_bytes) / learnt_bytes) if learnt else 0.0  # held-out ones come first
    return learnt_bytes + held_bytes, room, kept


def _described(tflops: float | None, device: torch.device) -> Device:
    """A GPU that attains so many 10^12 operations a second, or else the one that is here."""
    return Device(tflops * 1e12 / ATTAINED, 0, 0, 0) if tflops else device_here(device)


def _rates(
    config: TrainConfig,
    model: CostModel,
    largest: MicroShape,
    accelerator: Device | None,
    tflops: float | None,
    device: torch.device,
) -> tuple[tuple[float, float], Price | None, float | None]:
    """Operations a second of the steps and of the tower; where they are priced, the price of a pass, and the share of
    the accelerator's rate that the base's own products get."""
    if not accelerator:
        rates = (tflops * 1e12, tflops * 1e12) if tflops else measure_rates(config, largest, device)
        return rates, None, None
    priced, through_tower = _price(model, largest, accelerator)
    share = model.useful_operations(largest) / priced.seconds / accelerator.tensor
    return (model.trace(largest).operations / priced.seconds, through_tower), priced, share


def _price(model: CostModel, largest: MicroShape, accelerator: Device) -> tuple[Price, float]:
    """What the largest micro-batch takes there, and the tower's operations a second."""
    seen = max(largest.patches, default=256)
    through_tower = price(model.traced.tower([seen]), accelerator).seconds
    return price(model.trace(largest), accelerator), model.tower_operations(seen) / through_tower


def _elsewhere(config: TrainConfig, gpus: int | None, accelerator: Device | None, described: bool) -> TrainConfig:
    """The run on a GPU that is not here, in the format that it would take there."""
    if not accelerator and not described:
        raise ConfigError(
            f"--gpus {gpus}: there is no GPU here to be measured. Name one, as --device h100, or say what it has: "
            "--tflops (attained, which is well below its data sheet's) and --device-memory (GB)."
        )
    dtype = "bfloat16" if not accelerator or accelerator.bfloat16 else "float16"
    return config.replace(dtype=dtype) if config.dtype == "auto" else config


def _prepare(config: TrainConfig, progress: Callable[[int, int], None]) -> tuple[Prepared, _Headers]:
    """The examples, their tokens counted; no weight is read. Bad rows are counted: `check` says why."""
    base = load_preprocessor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    encoder = Encoder(base, num_prompt_tokens=config.num_virtual_tokens if config.method == "prompt" else 0)
    data = read_and_split(config)
    prepared = count_tokens(config, data, encoder, progress)
    if not prepared.train:
        raise DataError(f"{', '.join(config.sources)}: no usable example in it; vlm-lora check says why.")
    return prepared, _Headers(base, data.looks)


def _advice(  # arguments: what was asked for, what it costs, and what may be tried instead
    config: TrainConfig, model: CostModel, cost: Prediction, memory: float, cost_of, half: str, can_shard: bool
) -> Iterator[str]:
    """Whether it fits, and if it does not, which knobs would make it fit; ``half``: the device's 16-bit format."""
    if cost.memory < FILLED * memory:
        yield "It fits."
        return
    yield f"It does not fit: {cost.memory / 1e9:,.1f} GB against {memory / 1e9:,.1f} GB. What would:"
    tokens, has_4bit = config.tokens_at_once, importlib.util.find_spec("bitsandbytes") is not None
    smaller = [{"micro_batch_tokens": tokens // part} for part in (2, 4, 8, 16) if tokens >= part]
    tried = [
        *smaller,
        {"gradient_checkpointing": True},
        {"dtype": half},
        *({"dtype": half} | change for change in smaller),
        *({"method": "qlora", "variant": None} | change for change in smaller if config.method == "lora" and has_4bit),
    ]
    offered = 0
    if can_shard and config.method != "qlora":
        needed = cost_of(config, model, sharded=True).memory
        if needed < FILLED * memory:
            offered += 1
            yield f"  --fsdp (the base's layers in pieces over the GPUs; docs/distributed.md): {needed / 1e9:,.1f} GB"
    for change in tried:
        if offered == 3:
            break
        needed = cost_of(config.replace(**change), model if change in smaller else None).memory
        if needed < FILLED * memory:
            offered += 1
            flags = [flag_of(k) if v is True else f"{flag_of(k)} {v}" for k, v in change.items() if v is not None]
            yield f"  {' '.join(flags)}: {needed / 1e9:,.1f} GB"
    if not offered:
        yield "  nothing that is known here; take a smaller base model, or lower --max-pixels and --max-tokens"


def measure_rates(config: TrainConfig, typical: MicroShape, device: torch.device) -> tuple[float, float]:
    """Operations a second of the steps and of the tower on this device: one layer of each, random, timed.

    At most 1,024 tokens or patches at a time, so that it takes seconds also where the whole would take hours.
    """
    backbone = load_sample(config.model, dtype=config.dtype, device=device)
    patches = max(4, min(1024, int(statistics.median(typical.patches or (1024,)))) // 4 * 4)
    side = 2 * max(1, round(math.sqrt(patches / 4)))
    grid = torch.tensor([[1, side, side]])
    inputs = torch.randn(side * side, backbone.patch_numbers)
    tower = _rate(lambda: backbone.tower(inputs, grid), device)

    with torch.random.fork_rng(devices=[]):
        attach_adapter(backbone, config.replace(method="lora" if config.method == "qlora" else config.method))
    width = min(typical.width, 1024)
    rows = max(1, min(typical.rows, 1024 // width))
    batch = micro_batch(backbone, MicroShape(rows, max(2, width), 0, rows, 1, ()))
    return _rate(lambda: loss_sum(backbone, batch).backward(), device), tower


def _rate(work: Callable[[], object], device: torch.device) -> float:
    """Operations a second; the fastest of a few, after one that warms up and is counted."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_OPERATIONS) as counter:
        work()
    return counter.get_total_flops() / _seconds(work, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few, after one that warms up."""
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < 6 and sum(taken) < 4):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def device_memory_of(device: torch.device) -> int:
    """Bytes of the device, or of the machine where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
