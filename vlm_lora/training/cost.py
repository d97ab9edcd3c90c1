"""What a run will cost, before any weight is read: operations, memory, disk, and time at a rate measured here.

Operations are counted as everywhere in the field, a multiply-add as two, from the shapes of the very micro-batches
that the run will compute, padding included. The base is frozen, so a linear costs its forward pass and, in the
backward pass, the gradient of its input but none of its weights. What stands beside the large matrix products
(norms, rotary positions, the optimizer) is not counted in operations; a measured rate has it in it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from vlm_lora.config import TrainConfig
from vlm_lora.data.example import ImageRef
from vlm_lora.model.device import resolve_dtype
from vlm_lora.model.features import found_again
from vlm_lora.model.packing import IGNORE_INDEX, Encoded, padded_tokens
from vlm_lora.model.shapes import Shapes
from vlm_lora.training.batches import EncodedExample, group_rows, share_out
from vlm_lora.training.schedule import Schedule
from vlm_lora.training.step import LOGITS_AT_ONCE

STEPS_LOOKED_AT = 2000
"""Of a longer run, so many steps spread over its length stand for all."""

FOUR_BITS = 4.127 / 8
"""Bytes of a number in NF4 with double quantisation (arXiv:2305.14314, section 3)."""

TRAINED = 4 * 4
"""Bytes of a trained number, in float32: itself, its gradient and AdamW's two moments."""


@dataclass(frozen=True, slots=True)
class MicroShape:
    """``rows`` of ``width`` tokens, the first ``prefix`` of each before all branches; how many of all carry loss;
    patches of each image in them."""

    rows: int
    width: int
    prefix: int
    labels: int
    patches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the steps of a run took: seconds, on how many devices, and on a GPU the peak of memory in bytes."""

    seconds: float
    devices: int
    memory_bytes: int | None = None

    def to_json(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a run costs. Sizes in bytes, on each device; operations of all devices together.

    ``imbalance`` is how much more the steps' busiest devices compute than the mean of all: the others wait for them.
    ``found`` is the share of images whose features main memory still holds when they come again.
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
    features: int
    found: float
    largest: MicroShape
    first: tuple[float, ...]

    @property
    def memory(self) -> int:
        """At its highest, without what torch itself takes."""
        return self.weights + self.trained + self.activations

    def seconds_left(self, second_and_third: float) -> float:
        """From the end of the third step on, at the rate at which the second and third took so many seconds.

        A rate of the run's own: it has this machine, this model and all that is not counted in it, and costs no time to
        measure. The first step is not in it, as much is set up in there.
        """
        left = self.operations + self.tower_operations - sum(self.first)
        return second_and_third * left / sum(self.first[1:])


class CostModel:
    """Formulae for one base model, method and number format."""

    def __init__(self, shapes: Shapes, config: TrainConfig, dtype: torch.dtype):
        self.shapes = shapes
        self.config = config
        self.bytes = dtype.itemsize
        targets = config.lora_targets if config.method in ("lora", "qlora") else ()
        halves = 2 if config.variant == "pissa" else 1
        self.rank, self.merger_rank = halves * config.rank, halves * config.lora_of_projector[0]
        self.language_lora = shapes.language_linears if "language" in targets else ()
        self.merger_lora = shapes.merger_linears if "projector" in targets else ()
        self.tower_lora = shapes.tower_linears[:-1] if "vision" in targets else ()  # the last embeds the patches

    def step_operations(self, shape: MicroShape) -> float:
        """Of a forward and backward pass behind the tower."""
        s, tokens = self.shapes, shape.rows * shape.width
        merged = sum(shape.patches) / 4
        linears = _multiply_adds(s.language_linears) * tokens
        again = self.config.gradient_checkpointing  # the layers' forward pass
        # Forward 2 products; backward 5, as the scores are computed again (arXiv:2205.14135, section 3.1).
        before = self.config.num_virtual_tokens if self.config.method == "prefix" else 0
        pairs = shape.prefix * (shape.prefix + before) + (shape.width - shape.prefix) * (shape.width + before)
        attention = (3.5 + again) * 2 * s.layers * s.heads * s.head_dim * shape.rows * pairs
        head = (3 if shape.labels > LOGITS_AT_ONCE else 2) * s.hidden * s.vocabulary * shape.labels
        sizes = [i * o for i, o in s.merger_linears]
        wanted = sizes if self.tower_lora else sizes[1::2]  # the gradient of cached features is nobody's
        merger = merged * (sum(sizes) + sum(wanted))
        total = 2 * ((2 + again) * linears + attention + head + merger)
        total += (6 + 2 * again) * self.rank * tokens * sum(map(sum, self.language_lora))
        total += 6 * self.merger_rank * merged * sum(map(sum, self.merger_lora))
        if self.config.method == "adapter":
            total += (6 + 2 * again) * tokens * 2 * s.layers * 2 * s.hidden * self.config.bottleneck
        return total

    def tower_operations(self, patches: int) -> float:
        """Of one image's forward pass, and of the backward pass where LoRA sits in the tower."""
        s = self.shapes
        linears = _multiply_adds(s.tower_linears) * patches
        attention = sum(2 * s.tower_width * patches * min(patches, window or patches) for window in s.tower_windows)
        if not self.tower_lora:
            return 2 * (linears + attention)
        backward = _multiply_adds(self.tower_lora) * patches
        lora = 6 * self.rank * patches * sum(map(sum, self.tower_lora))
        return 2 * (linears + backward + 3.5 * attention) + lora

    def weight_bytes(self, pieces: int = 1) -> int:
        """On each device, if FSDP2 keeps the language layers in so many pieces: two are put together at a time, the one
        that computes and the next."""
        layers = _multiply_adds(self.shapes.language_linears)
        each = FOUR_BITS if self.config.method == "qlora" else self.bytes
        together = 2 / self.shapes.layers if pieces > 1 else 0
        return int((self.shapes.parameters - layers) * self.bytes + layers * each * (1 / pieces + together))

    def trained_numbers(self) -> int:
        s, config = self.shapes, self.config
        match config.method:
            case "adapter":
                return 2 * s.layers * (2 * s.hidden * config.bottleneck + config.bottleneck + s.hidden)
            case "prefix":
                return 2 * s.layers * s.kv_heads * s.head_dim * config.num_virtual_tokens
            case "prompt":
                return s.hidden * config.num_virtual_tokens
            case _:
                wide, narrow = (*self.language_lora, *self.tower_lora), self.merger_lora
                magnitudes = sum(o for _, o in (*wide, *narrow)) if config.variant == "dora" else 0
                return self.rank * sum(map(sum, wide)) + self.merger_rank * sum(map(sum, narrow)) + magnitudes

    def activation_bytes(self, shape: MicroShape) -> int:
        """What the forward pass keeps for the backward pass.

        In each layer: the input of both norms and their scale in float32; queries, keys, values (as they are, and
        repeated for all heads), the attention's output and its sums; where queries and keys have norms too, both before
        them, in float32; three or four tensors of the MLP; and each LoRA's input, which three of them share and two of
        them share, unless each has its own, in float32, as with dropout.
        """
        s, wide = self.shapes, self.shapes.heads * self.shapes.head_dim
        once = 2 * s.kv_heads * s.head_dim
        token = 4 * (2 * s.hidden + 2 + s.heads) + self.bytes * (4 * wide + once + 3 * s.intermediate)
        if s.query_norms:
            token += 4 * (wide + once // 2) + 4 * (s.heads + s.kv_heads)
        if self.language_lora:
            own, shared = 5 * s.hidden + wide + s.intermediate, 2 * s.hidden + wide + s.intermediate
            token += self._lora_inputs(own, shared) + 4 * 7 * self.rank + self._dora(self.language_lora) / s.layers
        if self.config.method == "adapter":
            token += 2 * 4 * (s.hidden + 3 * self.config.bottleneck)
        mask = shape.rows * (shape.width - shape.prefix) * shape.width * (1 + self.bytes)
        head = (
            min(shape.labels, LOGITS_AT_ONCE) * s.vocabulary * (self.bytes + 4 + 4 + 4)
        )  # logits, in float32, their gradient, softmax
        # While a layer's gradients are computed, its MLP's stand beside what was kept.
        behind = shape.rows * shape.width * 3 * s.intermediate * self.bytes
        outside = 4 * s.hidden + 2 * self.bytes * s.head_dim  # the last norm; rotary angles
        merger = 0
        if self.merger_lora or self.tower_lora:  # through it goes a gradient
            merger += self.bytes * s.feature_width
        if self.merger_lora:
            merger += self._lora_inputs(2, 2) * s.feature_width + self._dora(self.merger_lora) / 4
        layers = s.layers * token
        if self.config.gradient_checkpointing:  # each layer's input, and all of the one that is computed again
            layers = s.layers * self.bytes * s.hidden + token
        seeing = (self._tower_bytes() + merger) * sum(shape.patches)
        tokens = (layers + outside) * shape.rows * shape.width
        return int(tokens + seeing + mask + self._dora_weights() + max(head, behind))

    def _lora_inputs(self, own: int, shared: int) -> int:
        """The bytes of LoRA's inputs: ``own`` numbers if each LoRA keeps its own, ``shared`` if some keep one."""
        if self.config.dropout > 0:
            return 2 * 4 * own  # with a mask each; the CPU's are float32
        if self.config.variant == "dora" and self.bytes < 4:  # PEFT's: converted in each
            return 4 * own
        return self.bytes * shared

    def _dora(self, linears: Sequence[tuple[int, int]]) -> int:
        """The bytes of what DoRA, as PEFT computes it, keeps of a token: its own output, in float32, and the base's."""
        if self.config.variant != "dora":
            return 0
        return (8 if self.config.dropout > 0 else 4 + self.bytes) * sum(o for _, o in linears)

    def _dora_weights(self) -> int:
        """With dropout, DoRA computes the base's output again from a float32 copy of its weights, which is kept."""
        if self.config.variant != "dora" or self.config.dropout == 0:
            return 0
        language = _multiply_adds(self.language_lora)
        if self.config.gradient_checkpointing:  # a layer's at a time
            language //= self.shapes.layers
        if self.bytes == 4:  # then the weights themselves are what is kept, but those in four bits
            return 4 * language if self.config.method == "qlora" else 0
        merger = self.merger_lora if self.tower_lora else self.merger_lora[1::2]  # cached features get no gradient
        return 4 * (language + _multiply_adds((*merger, *self.tower_lora)))

    def _tower_bytes(self) -> float:
        """What a patch keeps where LoRA sits in the tower.

        In each layer: the input of both norms; queries and keys, all three as they come from one linear, and the
        attention's output; two or, gated, three tensors of the MLP; and each LoRA's input, as in the language layers.
        """
        if not self.tower_lora:
            return 0
        s = self.shapes
        layer = self.tower_lora[: len(self.tower_lora) // len(s.tower_windows)]
        gated, inputs = len(layer) == 5, sum(i for i, _ in layer)
        token = self.bytes * (6 * s.tower_width + (2 + gated) * layer[-1][0])
        token += 2 * s.tower_width * (4 if gated else self.bytes)  # RMSNorm keeps float32
        # Shared is the gate's input, with the linear beside it.
        token += self._lora_inputs(inputs, inputs - gated * s.tower_width) + 4 * len(layer) * self.rank
        token += self._dora(layer)
        return len(s.tower_windows) * token


def _multiply_adds(linears: Sequence[tuple[int, int]]) -> int:
    return sum(i * o for i, o in linears)


def predict(  # arguments: what is trained, on what, and three facts of the machines and the cache
    config: TrainConfig,
    shapes: Shapes,
    examples: Sequence[EncodedExample],
    patches: Mapping[ImageRef, int],
    *,
    device: torch.device,
    gpus: int = 1,
    sharded: bool = False,
    kept: float = 1.0,
) -> Prediction:
    """The cost of all steps over these examples; filling the cache comes before them.

    Args:
        patches: of every image, before the 2x2 merge.
        gpus: devices that share each step.
        sharded: whether FSDP2 keeps the language layers in pieces over them.
        kept: the share of the images whose features are kept on disk; the others go through the tower whenever they
            are not in main memory.
    """
    cost = CostModel(shapes, config, resolve_dtype(config.dtype, device))
    schedule = Schedule.of(config, [len(each.encoded.branches) for each in examples])

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
    num_bytes = sum(patches.values()) * shapes.feature_width * cost.bytes
    again = 0.0 if cost.tower_lora else found_again(num_bytes)
    largest = max(seen, key=cost.activation_bytes)
    first, met = [], set()
    for step in range(min(3, schedule.num_steps)):
        own = itertools.chain(*shapes_of(step))
        images = [image for i, _ in schedule.step(step) for image in examples[i].example.images]
        live = sum(cost.tower_operations(patches[i]) * (1 - again if i in met else 1) for i in images)
        first.append(sum(map(cost.step_operations, own)) + (1 - kept) * live)
        met.update(images)

    return Prediction(
        steps=schedule.num_steps,
        answers=min(schedule.total_answers, schedule.num_steps * schedule.batch_size),
        operations=scale * operations,
        imbalance=busiest * gpus / operations,
        tower_operations=(1 - kept) * once * _passes(each / once if once else 0.0, again, gpus),
        weights=cost.weight_bytes(gpus if sharded else 1),
        trained=TRAINED * cost.trained_numbers(),
        activations=cost.activation_bytes(largest),
        features=num_bytes,
        found=again,
        largest=largest,
        first=tuple(first),
    )


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
    examples: Sequence[EncodedExample], patches: Mapping[ImageRef, int], max_tokens: int, gpus: int = 1
) -> list[list[MicroShape]]:
    """The micro-batches of a step on each device, as `Loader.fetch` makes them, without those that fill up."""
    return [
        [
            micro_shape(
                [row.encoded for row in group],
                tuple(patches[image] for row in group for image in row.example.images),
            )
            for group in group_rows(rows, max_tokens)
        ]
        for rows in share_out(examples, max_tokens, gpus)
    ]


def micro_shape(rows: Sequence[Encoded], patches: tuple[int, ...]) -> MicroShape:
    """Of the micro-batch of these rows, with ``patches`` of each image in them."""
    labels = sum(int((b.labels[1:] != IGNORE_INDEX).sum()) for row in rows for b in row.branches)
    prefix = max(len(row.prefix_ids) for row in rows)
    return MicroShape(len(rows), padded_tokens(rows) // len(rows), prefix, labels, patches)
