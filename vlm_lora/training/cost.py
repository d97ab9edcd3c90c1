"""What a run will cost, before any weight is read: operations, memory, disk.

Operations are counted as everywhere in the field, a multiply-add as two, from the shapes of the very micro-batches that
the run will compute, padding included. What stands beside the matrix products (norms, rotary positions, the optimizer)
has no operations; a measured rate has it in it, and a priced trace too.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from vlm_lora.config import SHAPING, TrainConfig
from vlm_lora.data.example import ImageRef
from vlm_lora.model.families import PARTS
from vlm_lora.model.features import found_again
from vlm_lora.model.recurrent import CHUNK
from vlm_lora.training.batches import count_labels, micro_batches, padded, share_out
from vlm_lora.training.held_out import HeldOut
from vlm_lora.training.lessons import Lesson, Lessons
from vlm_lora.training.schedule import Schedule
from vlm_lora.training.step import LOGITS_AT_ONCE, SCORED_AT_ONCE
from vlm_lora.training.trace import MicroShape, Traced, TracedModel

STEPS_LOOKED_AT = 2000
"""Of a longer run, this many steps spread over its length stand for all."""

TRAINED = 4 * 4
"""Bytes of a trained number, in float32: itself, its gradient and AdamW's two moments."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the steps of a run took: seconds, on how many devices; and memory at its highest, in bytes: what was used
    and what torch reserved of a GPU, or on a CPU that of the whole process."""

    seconds: float
    devices: int
    memory_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None

    def to_json(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a run costs. Sizes in bytes, on each device; operations of all devices together.

    ``activations`` are held at the peak beside weights and what trains; ``passing`` of them is not kept for the
    backward pass, but stands beside what is: logits, or what the gradients of a layer need.
    ``imbalance`` is how much more the steps' busiest devices compute than the mean of all: the others wait for them.
    ``found`` is the share of images whose features main memory still holds when they come again.
    ``sample_operations`` are those of the held-out losses at all checkpoints, ``all_held_out_operations`` of the one
    loss of all held-out images at the end, 0 where the last checkpoint's is of all.
    ``first`` are the operations of each of the first three steps, with the tower's where it runs in them.
    """

    steps: int
    answers: int
    operations: float
    imbalance: float
    tower_operations: float
    weights: int
    trained: int
    activations: int
    passing: int
    features: int
    found: float
    largest: MicroShape
    first: tuple[float, ...]
    sample_operations: float = 0.0
    all_held_out_operations: float = 0.0

    @property
    def held_out_operations(self) -> float:
        return self.sample_operations + self.all_held_out_operations

    @property
    def memory(self) -> int:
        """At its highest, without what torch itself takes."""
        return self.weights + self.trained + self.activations

    @property
    def memory_by_part(self) -> dict[str, int]:
        """What `memory` is the sum of, in plain words."""
        return {
            "base weights": self.weights,
            "adapter, its gradients, optimizer": self.trained,
            "kept for the backward pass": self.activations - self.passing,
            "beside it at the peak (logits, or a layer)": self.passing,
        }

    def seconds_left(self, second_and_third: float) -> float:
        """From the end of the third step on, at the rate at which the second and third took so many seconds.

        A rate of the run's own: it has this machine, this model and all that is not counted in it, and costs no time to
        measure. The first step is not in it, as much is set up in there.
        """
        left = self.operations + self.tower_operations + self.held_out_operations - sum(self.first)
        return second_and_third * left / sum(self.first[1:])


class CostModel:
    """The cost of passes of one base model with one adapter, from a few traces."""

    def __init__(self, config: TrainConfig, dtype: torch.dtype, device: str):
        self.traced = TracedModel(config, dtype, device)
        self._traces: dict[MicroShape, Traced] = {}

    def trace(self, shape: MicroShape) -> Traced:
        """Of a micro-batch of this very shape, after the tower."""
        if shape not in self._traces:
            self._traces[shape] = self.traced.step(shape)
        return self._traces[shape]

    def step_operations(self, shape: MicroShape) -> float:
        """Of a forward and backward pass after the tower."""
        return float(self._rates @ _sizes(shape))

    def forward_operations(self, shape: MicroShape) -> float:
        """Of a pass that only scores, after the tower."""
        return float(self._forward_rates @ _sizes(shape))

    @cached_property
    def _rates(self) -> np.ndarray:
        return _rates([self.trace(shape).operations for shape in SAMPLES])

    @cached_property
    def _forward_rates(self) -> np.ndarray:
        return _rates([self.traced.step(shape, learns=False).operations for shape in SAMPLES])

    def tower_operations(self, patches: int) -> float:
        """Of one image's forward pass, and of the backward pass where LoRA sits in the tower."""
        return float(self._tower_rates @ (patches, patches**2))

    @cached_property
    def _tower_rates(self) -> np.ndarray:
        sizes = np.array([(patches, patches**2) for patches in TOWER_SAMPLES], dtype=float)
        operations = np.array([self.traced.tower([patches]).operations for patches in TOWER_SAMPLES])
        return np.linalg.solve(sizes, operations)

    def weight_bytes(self, pieces: int = 1) -> int:
        """On each device, if FSDP2 keeps the language layers in this many pieces: two layers are put together at a
        time, the one that computes and the next."""
        layers = self.traced.frozen_bytes[PARTS[2]]
        together = 2 / self.traced.num_layers if pieces > 1 else 0
        return int(sum(self.traced.frozen_bytes.values()) - layers + layers * (1 / pieces + together))

    def trained_numbers(self) -> int:
        return self.traced.trained

    def useful_operations(self, shape: MicroShape) -> float:
        """Of the base's language linears alone: forward, and the gradients of their inputs."""
        return 4.0 * self.traced.language_weights * shape.rows * shape.width

    def activation_bytes(self, shape: MicroShape) -> int:
        """What is held at the peak beside the weights and what trains, the tower's where it runs in the step."""
        return int(self.trace(shape).peak + self.tower_kept(shape.patches))

    def tower_kept(self, patches: Sequence[int]) -> float:
        """What the tower keeps of these images for the backward pass, in bytes, where an adapter sits in it."""
        return self.traced.tower(patches).kept if patches and self.traced.tower_adapted else 0.0


def cost_model(config: TrainConfig, dtype: torch.dtype, device: str) -> CostModel:
    """The `CostModel` of a run; one is kept for the next run, or the next try of a plan, whose passes are the same."""
    decide = ("model", *SHAPING, "dropout", "gradient_checkpointing")
    return _cost_model(tuple((name, getattr(config, name)) for name in decide), dtype, device)


@lru_cache(maxsize=16)
def _cost_model(knobs: tuple[tuple[str, Any], ...], dtype: torch.dtype, device: str) -> CostModel:
    return CostModel(TrainConfig(data="", **dict(knobs)), dtype, device)


def _sizes(shape: MicroShape) -> tuple[float, ...]:
    """What the operations of a pass are proportional to: tokens, pairs of tokens that see each other, tokens that carry
    loss (in chunks they are computed again), patches, and pieces of linear attention of prefixes and branches."""
    rows, width, prefix = shape.rows, shape.width, shape.prefix
    pairs = rows * (prefix * prefix + (width - prefix) * width)
    at_once = shape.labels <= LOGITS_AT_ONCE
    labels = (shape.labels, 0) if at_once else (0, shape.labels)
    tail = rows * (width - prefix) / max(1, shape.branches)
    pieces = rows * math.ceil(prefix / CHUNK) + shape.branches * math.ceil(tail / CHUNK)
    return (rows * width, pairs, *labels, sum(shape.patches), pieces)


SAMPLES = (
    MicroShape(2, 384, 256, 2, 64, (512, 512)),
    MicroShape(2, 384, 256, 2, 128, (512, 512)),
    MicroShape(1, 1024, 256, 1, 64, (1024,)),
    MicroShape(1, 2048, 256, 1, LOGITS_AT_ONCE + 256, (1024,)),
    MicroShape(4, 384, 256, 4, 64, (512, 512, 256, 256)),
    MicroShape(2, 384, 256, 8, 64, (512, 512)),
)
"""Micro-batches that are traced. No one's `_sizes` are a sum of the others'."""

TOWER_SAMPLES = (256, 4096)


def _rates(operations: Sequence[float]) -> np.ndarray:
    """Operations for each of `_sizes`, from those of `SAMPLES`. All are sums of these, so as many traces tell them."""
    return np.linalg.solve(np.array([_sizes(shape) for shape in SAMPLES]), np.array(operations))


def predict(  # arguments: what is trained, on what, and three facts of the machines and the cache
    config: TrainConfig,
    cost: CostModel,
    examples: Lessons,
    patches: Mapping[ImageRef, int],
    *,
    gpus: int = 1,
    sharded: bool = False,
    kept: float = 1.0,
    there: float | None = None,
    held_out: HeldOut | None = None,
    held_patches: Mapping[ImageRef, int] | None = None,
) -> Prediction:
    """The cost of all steps over these examples, and of the tower in them.

    Args:
        patches: of every image to learn from, before the 2x2 merge.
        gpus: devices that share each step.
        sharded: whether FSDP2 keeps the language layers in pieces over them.
        kept: the share of the images whose features are kept on disk; the others go through the tower whenever they
            are not in main memory.
        there: the share whose features are there already; those of ``kept`` that are not go through the tower once.
            None: all of ``kept``.
        held_out: what is scored at each checkpoint, and at the end, with ``held_patches`` of their images.
    """
    schedule, there = Schedule.of(config, examples.num_branches), kept if there is None else there

    def shapes_of(step: int) -> list[list[MicroShape]]:
        chosen = [examples[i].with_branches(dialogues) for i, dialogues in schedule.step(step)]
        return micro_shapes(chosen, patches, config.tokens_at_once, gpus)

    looked_at = range(0, schedule.num_steps, math.ceil(schedule.num_steps / STEPS_LOOKED_AT))
    steps = [shapes_of(step) for step in looked_at]
    seen = [shape for shares in steps for share in shares for shape in share]
    operations = sum(map(cost.step_operations, seen))
    busiest = sum(_waited_for(cost, shares, sharded) for shares in steps)
    scale = schedule.num_steps / len(looked_at)
    each = scale * sum(cost.tower_operations(n) for shape in seen for n in shape.patches)
    once = sum(map(cost.tower_operations, patches.values()))
    num_bytes = sum(patches.values()) * cost.traced.feature_bytes
    again = 0.0 if cost.traced.tower_adapted else found_again(num_bytes)
    largest = max(seen, key=lambda shape: (shape.rows * shape.width, shape.labels))
    first, met = [], set()
    for step in range(min(3, schedule.num_steps)):
        own = itertools.chain(*shapes_of(step))
        images = [image for i, _ in schedule.step(step) for image in examples[i].example.images]
        chances = [(1 - kept) * (1 - again) if image in met else 1 - there for image in images]
        live = sum(chance * cost.tower_operations(patches[i]) for i, chance in zip(images, chances, strict=True))
        first.append(sum(map(cost.step_operations, own)) + live)
        met.update(images)

    sampled = whole = 0.0
    if held_out and held_patches is not None:
        sampled, whole = _held_out_operations(config, cost, held_out, held_patches, gpus)
    return Prediction(
        steps=schedule.num_steps,
        answers=min(schedule.total_answers, schedule.num_steps * schedule.batch_size),
        operations=scale * operations,
        imbalance=busiest * gpus / operations,
        tower_operations=(kept - there) * once + (1 - kept) * once * _passes(each / once if once else 0.0, again, gpus),
        weights=cost.weight_bytes(gpus if sharded else 1),
        trained=TRAINED * cost.trained_numbers(),
        activations=cost.activation_bytes(largest),
        passing=int(cost.trace(largest).peak - cost.trace(largest).kept),
        features=num_bytes,
        found=again,
        largest=largest,
        first=tuple(first),
        sample_operations=sampled,
        all_held_out_operations=whole,
    )


def _held_out_operations(
    config: TrainConfig,
    cost: CostModel,
    held_out: HeldOut,
    patches: Mapping[ImageRef, int],
    gpus: int,
) -> tuple[float, float]:
    """Of the losses at all checkpoints, and of the one of all held-out images at the end, if there is one."""

    def scoring(examples: Lessons) -> float:
        at_once, total = SCORED_AT_ONCE * gpus, 0.0
        for start in range(0, len(examples), at_once):
            shares = micro_shapes(examples[start : start + at_once], patches, config.tokens_at_once, gpus)
            total += sum(cost.forward_operations(shape) for share in shares for shape in share)
        return total

    everything = len(held_out.examples)
    at_end = scoring(held_out.examples) if held_out.size < everything else 0.0
    return held_out.checkpoints * scoring(held_out.sample(held_out.size)), at_end


def _passes(turns: float, found: float, gpus: int) -> float:
    """How often an image that is not kept on disk goes through the tower, if it has so many turns, each on any of the
    devices, whose processes keep in main memory what they have computed themselves."""
    first = min(turns, gpus * (1 - (1 - 1 / gpus) ** turns))
    return first + (turns - first) * (1 - found)


def _waited_for(cost: CostModel, shares: Sequence[Sequence[MicroShape]], sharded: bool) -> float:
    """Operations of a step until its last device is done; where the base is sharded, all make each pass together."""
    passes = [[cost.step_operations(shape) for shape in share] for share in shares]
    if sharded:
        return sum(map(max, itertools.zip_longest(*passes, fillvalue=0.0)))
    return max(map(sum, passes))


def micro_shapes(
    lessons: Sequence[Lesson], patches: Mapping[ImageRef, int], max_tokens: int, gpus: int = 1
) -> list[list[MicroShape]]:
    """The micro-batches of a step on each device, as `Loader.fetch` makes them, without those that fill up."""
    return [
        [
            micro_shape(group, tuple(patches[image] for row in group for image in row.images))
            for group in micro_batches(rows, max_tokens)
        ]
        for rows in share_out(lessons, max_tokens, gpus)
    ]


def micro_shape(rows: Sequence[Lesson], patches: tuple[int, ...]) -> MicroShape:
    """Of the micro-batch of these rows, with ``patches`` of each image in them."""
    prefix, branches = max(row.prefix for row in rows), sum(len(row.branches) for row in rows)
    return MicroShape(len(rows), padded(rows) // len(rows), prefix, branches, count_labels(rows), patches)
