"""What a run will cost, before any weight is read: operations, memory, disk, and time at a rate measured here.

Operations are counted as everywhere in the field, a multiply-add as two, from the shapes of the very micro-batches
that the run will compute, padding included. The base is frozen, so a linear costs its forward pass and, in the
backward pass, the gradient of its input but none of its weights. What stands beside the large matrix products
(norms, rotary positions, the optimizer) is not counted in operations; a measured rate has it in it.
"""

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from vlm_lora.config import TrainConfig, parse_columns
from vlm_lora.data.example import Example, ImageRef
from vlm_lora.data.images import content_hash, image_size
from vlm_lora.data.readers import Dataset, read_dataset
from vlm_lora.data.split import split_examples, without_held_out
from vlm_lora.errors import ConfigError, DataError
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.device import best_device, resolve_dtype
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import cache_folder, cache_use, found_again, room_for
from vlm_lora.model.packing import IGNORE_INDEX, Encoded, padded_tokens
from vlm_lora.model.preprocess import load_preprocessor
from vlm_lora.model.shapes import Shapes, load_sample, load_shapes
from vlm_lora.model.tokens import encode_fitting
from vlm_lora.training.batches import Plan, micro_batches
from vlm_lora.training.loop import LOGITS_AT_ONCE, Lesson, share_out
from vlm_lora.training.processes import require_shardable

STEPS_LOOKED_AT = 2000
"""Of a longer run, so many steps spread over its length stand for all."""

FOUR_BITS = 4.127 / 8
"""Bytes of a number in NF4 with double quantisation (arXiv:2305.14314, section 3)."""

FILLED = 0.9
"""The share of a device's memory that may be planned for; allocators waste some."""

TRAINED = 4 * 4
"""Bytes of a trained number, in float32: itself, its gradient and AdamW's two moments."""


def read_data(config: TrainConfig, sources: Sequence[str]) -> Dataset:
    return read_dataset(sources, **config.reading | {"columns": parse_columns(config.columns)})


def sees_each_image_once(config: TrainConfig, examples: Sequence[Example]) -> bool:
    """Whether the run ends before any image comes again, so that keeping features would be in vain."""
    answers = sum(len(example.dialogues) for example in examples)
    once = config.epochs <= 1 or (config.max_steps is not None and config.max_steps * config.batch_size <= answers)
    return once and all(example.weight == 1 for example in examples)


@dataclass(frozen=True, slots=True)
class MicroShape:
    """``rows`` of ``width`` tokens, the first ``prefix`` of each before all branches; how many of all carry loss;
    patches of each image in them."""

    rows: int
    width: int
    prefix: int
    labels: int
    patches: tuple[int, ...]


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


def predict(
    config: TrainConfig,
    shapes: Shapes,
    lessons: Sequence[tuple[Example, Encoded]],
    patches: Mapping[ImageRef, int],
    *,
    device: torch.device,
    gpus: int = 1,
    sharded: bool = False,
    kept: float = 1.0,
) -> Prediction:
    """The cost of all steps over these lessons; filling the cache comes before them.

    Args:
        patches: of every image, before the 2x2 merge.
        gpus: devices that share each step.
        sharded: whether FSDP2 keeps the language layers in pieces over them.
        kept: the share of the images whose features are kept on disk; the others go through the tower whenever they
            are not in main memory.
    """
    cost = CostModel(shapes, config, resolve_dtype(config.dtype, device))
    plan = Plan(
        [len(encoded.branches) for _, encoded in lessons],
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        max_steps=config.max_steps,
    )
    looked_at = range(0, plan.num_steps, math.ceil(plan.num_steps / STEPS_LOOKED_AT))
    steps = [micro_shapes(config, plan, lessons, patches, step, gpus) for step in looked_at]
    seen = [shape for shares in steps for share in shares for shape in share]
    operations = sum(map(cost.step_operations, seen))
    busiest = sum(_waited_for(cost, shares, sharded) for shares in steps)
    scale = plan.num_steps / len(looked_at)
    each = scale * sum(cost.tower_operations(n) for shape in seen for n in shape.patches)
    once = sum(map(cost.tower_operations, patches.values()))
    num_bytes = sum(patches.values()) * shapes.feature_width * cost.bytes
    again = 0.0 if cost.tower_lora else found_again(num_bytes)
    largest = max(seen, key=cost.activation_bytes)
    first, met = [], set()
    for step in range(min(3, plan.num_steps)):
        own = itertools.chain(*micro_shapes(config, plan, lessons, patches, step, gpus))
        images = [image for example, _ in plan.step(step) for image in lessons[example][0].images]
        live = sum(cost.tower_operations(patches[i]) * (1 - again if i in met else 1) for i in images)
        first.append(sum(map(cost.step_operations, own)) + (1 - kept) * live)
        met.update(images)

    return Prediction(
        steps=plan.num_steps,
        answers=min(plan.total_answers, plan.num_steps * plan.batch_size),
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
    config, plan: Plan, lessons, patches: Mapping[ImageRef, int], step: int, gpus: int = 1
) -> list[list[MicroShape]]:
    """The micro-batches of a step on each device, as `loop.fetch_own` makes them, without those that fill up."""
    chosen = []
    for example, dialogues in plan.step(step):
        encoded = lessons[example][1]
        branches = tuple(encoded.branches[i] for i in dialogues)
        chosen.append(Lesson(lessons[example][0], replace(encoded, branches=branches)))
    shapes = []
    for rows in share_out(chosen, config.micro_batch_tokens, gpus):
        groups = micro_batches([row.encoded for row in rows], config.micro_batch_tokens)
        seen = [tuple(patches[image] for i in group for image in rows[i].example.images) for group in groups]
        parts = [[rows[i].encoded for i in group] for group in groups]
        shapes.append([micro_shape(*each) for each in zip(parts, seen, strict=True)])
    return shapes


def micro_shape(rows: Sequence[Encoded], patches: tuple[int, ...]) -> MicroShape:
    """Of the micro-batch of these rows, with ``patches`` of each image in them."""
    labels = sum(int((b.labels[1:] != IGNORE_INDEX).sum()) for row in rows for b in row.branches)
    prefix = max(len(row.prefix_ids) for row in rows)
    return MicroShape(len(rows), padded_tokens(rows) // len(rows), prefix, labels, patches)


def measure_rates(
    config: TrainConfig, shapes: Shapes, typical: MicroShape, device: torch.device
) -> tuple[float, float]:
    """Operations a second of the steps and of the tower on this device: one layer of each, random, timed.

    At most 1,024 tokens or patches at a time, so that it takes seconds also where the whole would take hours.
    """
    backbone = load_sample(config.model, dtype=config.dtype, device=device)
    one = replace(
        shapes,
        layers=1,
        language_linears=shapes.language_linears[: len(shapes.language_linears) // shapes.layers],
        tower_windows=shapes.tower_windows[:1],
        tower_linears=shapes.tower_linears[: (len(shapes.tower_linears) - 1) // len(shapes.tower_windows)]
        + shapes.tower_linears[-1:],  # the last is that of the patches
    )
    config = config.replace(method="lora" if config.method == "qlora" else config.method)
    cost = CostModel(one, config, backbone.dtype)
    patches = max(4, min(1024, int(statistics.median(typical.patches or (1024,)))) // 4 * 4)
    side = 2 * max(1, round(math.sqrt(patches / 4)))
    grid = torch.tensor([[1, side, side]])
    inputs = torch.randn(side * side, shapes.tower_linears[-1][0])
    tower = cost.tower_operations(side * side) / _seconds(lambda: backbone.tower(inputs, grid), device)

    with torch.random.fork_rng(devices=[]):
        attach_adapter(backbone, config)
    width = min(typical.width, 1024)
    rows = max(1, min(typical.rows, 1024 // width))
    ids = torch.ones(rows, width, dtype=torch.long, device=device)
    positions = torch.arange(width, device=device).expand(3, rows, -1)
    mask = torch.ones(rows, 1, width, width, dtype=torch.bool, device=device).tril()
    shape = MicroShape(rows, width, 0, 0, ())
    seconds = _seconds(lambda: backbone.forward(ids, mask, positions, None).float().sum().backward(), device)
    return cost.step_operations(shape) / seconds, tower


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few, behind one that warms up."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What `vlm-lora plan` tells. Sizes in bytes, rates in operations a second of one device.

    ``cost.features`` are those that the run wants to keep, of the ``held_out`` images too; there is ``room`` for so
    much, and so for the share ``kept`` of the images to learn from. All as for a cache that has none of them yet: which
    of the ``cached`` images are this run's, only the base's weights tell.
    """

    cost: Prediction
    images: int
    held_out: int
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
    advice: tuple[str, ...]


def make_plan(
    config: TrainConfig,
    *,
    gpus: int | None = None,
    sharded: bool = False,
    tflops: float | None = None,
    device_memory: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunPlan:
    """Predict a run from its data's texts and image headers and the base's config.

    Args:
        gpus: that share each step; by default this machine's device, which may be a CPU.
        sharded: whether FSDP2 is to keep the base's layers in pieces over them.
        tflops: 10^12 operations a second of a device; by default measured here.
        device_memory: of a device, in bytes; by default this one's.
        progress: called with the number of examples that are in tokens, and of all.

    Raises:
        VlmLoraError: data or model cannot be used, or there is no GPU here to be measured.
    """
    if sharded:
        require_shardable(config.method)
    device = best_device()
    target = "cuda" if gpus else device.type
    if target != device.type:
        if not (tflops and device_memory):
            raise ConfigError(
                f"--gpus {gpus}: there is no GPU here to be measured. Say what one has: --tflops (attained, which is "
                "well below its data sheet's) and --device-memory (GB)."
            )
        config = config.replace(dtype="bfloat16") if config.dtype == "auto" else config
    gpus = gpus or 1
    config = config.on(target)
    dtype = resolve_dtype(config.dtype, device)
    shapes = load_shapes(config.model)
    base = load_preprocessor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    base.num_prompt_tokens = config.num_virtual_tokens if config.method == "prompt" else 0
    dataset, held_out = read_data(config, config.sources), []
    if config.val:
        held_dataset = read_data(config, (config.val,))
        dataset, held_out = without_held_out(dataset, held_dataset, config.val), list(held_dataset.examples)
    examples = list(dataset.examples)
    if config.val_split and not config.val:
        examples, held_out = split_examples(examples, config.val_split, config.seed)
    encoder, grids, contents = Encoder(base), {}, {}

    def look_at(example: Example) -> tuple[tuple[Example, Encoded] | None, list[int]]:
        for ref in example.images:
            data = ref.read_bytes()
            grids[ref], contents[ref] = base.grid(*image_size(data, ref.name)), content_hash(data)
        grid = torch.tensor([grids[ref] for ref in example.images], dtype=torch.long).reshape(-1, 3)
        return encode_fitting(encoder, example, grid, config.max_tokens)

    lessons, held_lessons = [], []
    unusable = len(dataset.bad) + sum(len(example.dialogues) for example in examples)
    for done, example in enumerate(examples, start=1):
        with suppress(DataError):  # counted; `check` says what is wrong with it
            fitting, too_long = look_at(example)
            lessons += [fitting] * example.weight if fitting else []
            unusable -= len(example.dialogues) - len(too_long)
        progress(done, len(examples))
    for example in held_out:
        with suppress(DataError):
            fitting, _ = look_at(example)
            held_lessons += [fitting] if fitting else []
    if not lessons:
        raise DataError(f"{', '.join(config.sources)}: no usable example in it; vlm-lora check says why.")
    patches = {ref: math.prod(grids[ref]) for example, _ in lessons for ref in example.images}
    learnt_patches = {contents[ref]: n for ref, n in patches.items()}  # as they are kept: copies once
    held_patches = {contents[ref]: math.prod(grids[ref]) for example, _ in held_lessons for ref in example.images}

    can_be_kept = config.cache and "vision" not in config.lora_targets
    seen_once = sees_each_image_once(config, [example for example, _ in lessons])
    learnt = learnt_patches if can_be_kept and not seen_once else {}
    held = held_patches if can_be_kept else {}
    learnt_bytes, held_bytes = (sum(n.values()) * shapes.feature_width * dtype.itemsize for n in (learnt, held))
    room = room_for(cache_folder(), round(config.cache_gb * 1e9), learnt_bytes + held_bytes)
    kept = min(1.0, room / learnt_bytes) if learnt else 0.0  # these come first

    def cost_of(config: TrainConfig, sharded: bool = sharded) -> Prediction:
        return predict(config, shapes, lessons, patches, device=device, gpus=gpus, sharded=sharded, kept=kept)

    cost = cost_of(config)
    through_tower = CostModel(shapes, config, dtype).tower_operations
    filling = kept * sum(map(through_tower, learnt.values())) + sum(map(through_tower, held_patches.values()))
    cost = replace(cost, features=learnt_bytes + held_bytes, tower_operations=cost.tower_operations + filling)
    rates = (tflops * 1e12,) * 2 if tflops else measure_rates(config, shapes, cost.largest, device)
    memory = device_memory or device_memory_of(device)
    return RunPlan(
        cost=cost,
        images=len(patches),
        held_out=len(held_patches),
        unusable=unusable,
        seen_once=seen_once,
        kept=kept,
        room=room,
        cached=cache_use(cache_folder()).entries,
        device=target,
        dtype=str(dtype).removeprefix("torch."),
        device_memory=memory,
        rate=rates[0],
        step_seconds=cost.operations * cost.imbalance / rates[0] / gpus,
        tower_seconds=cost.tower_operations / rates[1] / gpus,
        advice=tuple(_advice(config, cost, memory, cost_of, can_shard=gpus > 1 and not sharded)),
    )


def _advice(config: TrainConfig, cost: Prediction, memory: float, cost_of, can_shard: bool) -> Iterator[str]:
    """Whether it fits, and if it does not, which knobs would make it fit."""
    if cost.memory < FILLED * memory:
        yield "It fits."
        return
    yield f"It does not fit: {cost.memory / 1e9:,.1f} GB against {memory / 1e9:,.1f} GB. What would:"
    tokens = config.micro_batch_tokens
    smaller = [{"micro_batch_tokens": tokens // part} for part in (2, 4, 8, 16) if tokens >= part]
    tried = [
        *smaller,
        {"gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        *({"dtype": "bfloat16"} | change for change in smaller),
        *({"method": "qlora", "variant": None} | change for change in smaller if config.method == "lora"),
    ]
    told = 0
    if can_shard and config.method != "qlora":
        needed = cost_of(config, sharded=True).memory
        if needed < FILLED * memory:
            told += 1
            yield f"  --fsdp (the base's layers in pieces over the GPUs; docs/distributed.md): {needed / 1e9:,.1f} GB"
    for change in tried:
        needed = cost_of(config.replace(**change)).memory
        if needed < FILLED * memory and told < 3:
            told += 1
            flags = [
                f"--{k.replace('_', '-')}{'' if v is True else f' {v}'}" for k, v in change.items() if v is not None
            ]
            yield f"  {' '.join(flags)}: {needed / 1e9:,.1f} GB"
    if not told:
        yield "  nothing that is known here; take a smaller base model, or lower --max-pixels and --max-tokens"
