"""How many tokens a GPU takes in one forward and backward pass: as many as fit its memory, and pay."""

import math
from collections.abc import Callable, Sequence

import torch

from vlm_lora.config import DEVICE_TOKENS
from vlm_lora.data.example import ImageRef
from vlm_lora.training.cost import TRAINED, CostModel, micro_shapes
from vlm_lora.training.devices import ATTAINED, RESERVED, Device, device_named
from vlm_lora.training.lessons import Lesson
from vlm_lora.training.schedule import Schedule
from vlm_lora.training.trace import MicroShape

CANDIDATES = tuple(DEVICE_TOKENS << n for n in range(5))

FILLED = 0.9
"""The share of a device's memory that may be planned for; allocators waste some."""

STEPS_SAMPLED = 64
"""Of a longer run, this many steps spread over its length stand for all."""

STARTED = 40e-6
"""Seconds that a host takes to start a kernel from Python, as measured beside an H200 (bench/results/gpu-profile.json).
It hides what the GPU computes where micro-batches are small."""


def device_here(device: torch.device) -> Device:
    """What this machine's GPU can do."""
    return device_named(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory)


def fitting_tokens(
    cost: CostModel,
    schedule: Schedule,
    examples: Sequence[Lesson],
    patches: Callable[[ImageRef], int],
    device: Device,
    gpus: int = 1,
    sharded: bool = False,
) -> int:
    """Tokens of a micro-batch with which the steps take the least time, of those that fit the memory; a pure function.

    Fewer micro-batches start fewer kernels. Larger ones hold rows of less like length, and pad more.

    Args:
        patches: of an image, before the 2x2 merge.
        device: its memory and rate count.
        gpus: that share each step.
        sharded: whether FSDP2 keeps the language layers in pieces over them.
    """
    beside = cost.weight_bytes(gpus if sharded else 1) + TRAINED * cost.trained_numbers()
    sampled = range(0, schedule.num_steps, math.ceil(schedule.num_steps / STEPS_SAMPLED))
    steps = [[examples[i].with_branches(dialogues) for i, dialogues in schedule.step(step)] for step in sampled]
    seen = {image: patches(image) for step in steps for lesson in step for image in lesson.images}
    chosen, least = CANDIDATES[0], math.inf
    for tokens in CANDIDATES:
        shares = [micro_shapes(step, seen, tokens, gpus) for step in steps]
        undivided = all(len(share) <= 1 for step in shares for share in step)  # larger ones are then the same
        if undivided and tokens == CANDIDATES[0]:
            break
        largest = max((shape for step in shares for share in step for shape in share), key=_size)
        needed = beside + cost.activation_bytes(largest)
        if needed * RESERVED > FILLED * device.memory:
            break  # the smallest is taken whatever it needs: where memory runs out, it is halved
        started = STARTED * cost.trace(largest).num_kernels
        seconds = sum(max(sum(_seconds(cost, s, device, started) for s in share) for share in step) for step in shares)
        if seconds < least:
            chosen, least = tokens, seconds
        if undivided:
            break
    return chosen


def _size(shape: MicroShape) -> tuple[int, int]:
    return shape.rows * shape.width, shape.labels


def _seconds(cost: CostModel, shape: MicroShape, device: Device, started: float) -> float:
    """Of a pass: the device computes while the host starts what comes next."""
    return max(cost.step_operations(shape) / device.tensor / ATTAINED, started)
