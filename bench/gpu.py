"""Real sizes on the machine's accelerator, as one prepared run: is it right, what does it cost, how fast is it.

    python -m bench.gpu --size 2b 7b --base bfloat16 --rounds 3    Qwen2-VL shapes; within eight minutes of an H100
    python -m bench.gpu --size qwen3.5-9b       with the `gpu` extra, without which it measures what nobody should do
    python -m bench.gpu --size small            a minute on a CPU, to try the command

Speed and memory do not depend on what the weights are, so they are random: nothing is downloaded. Pictures are of one
size and synthetic. What tells most comes first. The record, bench/results/gpu-SIZE.json, is written anew as each part
ends, so a run that is cut off leaves the parts before:

1. Versions, and what one large matrix product attains on this device.
2. Equality: each way to compute a step must have the loss and the gradients of the plain one, within the tolerances
   below (where plain itself runs out of memory, those of the first that does not). Then the same step again: is it
   equal in every bit?
     plain          every answer a row of its own, the tower in the step, logits for every token
     users' loop    the same by transformers and PEFT under autocast, with Liger where it runs (bench/users_loop.py)
     own prefix     every answer a row of its own
     live tower     the tower computes in every step
     full logits    logits for every token
     all            shared prefix, cached tower output, logits where there are labels: how vlm-lora trains
3. At the first size: the step's trace, as `vlm-lora plan` prices it for this card, beside the profiler's account, by
   class of kernel.
4. Answers a second at 1, 5 and 10 answers an image, here and in the users' loop, by turns: forward and backward over
   one full micro-batch of each. The optimizer's step follows, untimed. At one answer also "seen once": nothing cached,
   nothing shared. Then the language layers by torch.compile, as with --compile yes: equality first, which compiles,
   then the rates by turns once more.
5. 2 and 4 at the next sizes.
6. Captioning at each size.
7. 2, 4 (without the users' loop) and 6 on a base in NF4, where --base asks for it.

The share of the matrix product is the arithmetic that the model's matrices need for the tokens of that way (2
operations a weight forward, 2 backward; the base's weights get no gradient), over what the large product attains; the
share of the peak is over the published rate of the card (training/devices.py). Memory is held against what `plan` says
of the step. What runs out of memory is recorded as that, and the rest goes on; also what fails in another way, which
the record then says under "faults", as another loss or gradient, or memory more than 15 % beside the prediction. With
faults the exit code is 1.

The whole test suite on a GPU, one command (models are loaded to the device that is there; tests of several processes
stay on the CPU, as there is a process for each GPU at most):

    python -m pytest -rs
"""

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image

from bench.kernels import profiled, traced_kinds
from bench.users_loop import UsersLoop
from vlm_lora import Captioner, Dialogue, Example, Turn, __version__
from vlm_lora.config import DEFAULT_PROMPT, TrainConfig
from vlm_lora.console import say
from vlm_lora.inference.captioner import Decoding
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import Backbone, load_backbone
from vlm_lora.model.device import best_device, is_out_of_memory
from vlm_lora.model.encode import Encoder, Sizes
from vlm_lora.model.features import FeatureCache
from vlm_lora.model.folder import tiny_path
from vlm_lora.model.packing import IGNORE_INDEX, Encoded, pack_apart
from vlm_lora.training.batches import MicroBatch, micro_batches, split_long
from vlm_lora.training.cost import TRAINED, CostModel, micro_shape
from vlm_lora.training.devices import Device, device_named
from vlm_lora.training.fitting import device_here
from vlm_lora.training.lessons import Lesson
from vlm_lora.training.step import loss_sum
from vlm_lora.training.trace import MicroShape, weighted_sum

ROOT = Path(__file__).resolve().parents[1]
TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
SIZES = {  # the published shapes
    "small": {
        "text": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True},
        "vision": {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        "mrope": [4, 6, 6],
    },
    "2b": {
        "text": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                 "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
        "vision": TOWER,
        "mrope": [16, 24, 24],
    },
    "7b": {
        "text": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                 "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
        "vision": TOWER,
        "mrope": [16, 24, 24],
    },
    "qwen3.5-small": {
        "text": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 8192, "tie_word_embeddings": True,
                 "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
                 "linear_value_head_dim": 32},
        "vision": {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 16},
        "mrope": [2, 1, 1],
    },
    "qwen3.5-9b": {
        "text": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 16,
                 "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320, "tie_word_embeddings": False,
                 "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
                 "linear_value_head_dim": 128},
        "vision": {"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "patch_size": 16},
        "mrope": [11, 11, 10],
    },
}  # fmt: skip
VARIANTS = {  # (shared prefix, cached tower output, logits where there are labels)
    "plain": (False, False, False),
    "own prefix": (False, True, True),
    "live tower": (True, False, True),
    "full logits": (True, True, False),
    "all": (True, True, True),
}
LOOP, COMPILED, ONCE = "users' loop", "all, compiled", "seen once"
TOLERANCES = {  # of the loss, and of the gradients' difference over their norm
    "float32": (1e-5, 1e-4),
    "bfloat16": (1e-3, 5e-2),
    "nf4": (1e-3, 5e-2),
}
PREDICTED_WITHIN = 0.15
RANK = 16
COMPARED = 8
"""Images of the step whose loss and gradients are compared."""
OUT_OF_MEMORY = "out of memory"
KERNELS = {"flash-linear-attention": "fla", "liger-kernel": "liger_kernel", "triton": "triton"}
"""Packages, and what they are imported by."""


def write_model(size: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """A checkpoint of random weights, made on the device; on the meta device of its shapes alone."""
    shape, newer = SIZES[size], size.startswith("qwen3.5")
    text, patch = shape["text"], shape["vision"]["patch_size"]
    model, processing = ("Qwen3_5", "Qwen3VL") if newer else ("Qwen2VL", "Qwen2VL")
    names = (
        f"{model}Config",
        f"{model}ForConditionalGeneration",
        f"{processing}Processor",
        f"{processing}VideoProcessor",
    )
    config_class, model_class, processor_class, video_class = (getattr(transformers, name) for name in names)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_path())
    ids = tokenizer.convert_tokens_to_ids
    config = config_class(
        text_config=text | {
            "bos_token_id": None, "eos_token_id": ids("<|im_end|>"), "pad_token_id": ids("<|endoftext|>"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": shape["mrope"]}
            | ({"partial_rotary_factor": 0.25} if newer else {}),
        },
        vision_config=shape["vision"] | {"out_hidden_size" if newer else "hidden_size": text["hidden_size"]},
        tie_word_embeddings=text["tie_word_embeddings"],
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = model_class(config)
    finally:
        torch.set_default_dtype(torch.float32)
    limits = {"shortest_edge": 16 * patch**2, "longest_edge": 4 * 1280 * patch**2}
    processor = processor_class(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=patch, size=limits),
        video_processor=video_class(patch_size=patch, size=limits),
        tokenizer=tokenizer, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    (config if device.type == "meta" else model).save_pretrained(folder)
    processor.save_pretrained(folder)


class Work:
    """One step's pictures and captions, and the ways to compute it."""

    def __init__(self, backbone: Backbone, images: int, captions: int, side: int, words: int, max_tokens: int):
        self.backbone, self.max_tokens = backbone, max_tokens
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
        self.pictures = [Image.fromarray(n).resize((side, side), Image.Resampling.BICUBIC) for n in noise]
        vocabulary = ["a", "red", "blue", "green", "cat", "dog", "sits", "near", "the", "old", "small", "tree"]
        said = [[" ".join(rng.choice(vocabulary, words)) for _ in range(captions)] for _ in range(images)]
        self.patches = [backbone.preprocess([picture]) for picture in self.pictures]
        self.features = [self._see(i).cpu() for i in range(images)]  # where training keeps them too
        encoder = Encoder(backbone)
        self.items: list[Encoded] = []
        self.sizes: list[Sizes] = []
        for (_, grid), texts in zip(self.patches, said, strict=True):
            dialogues = tuple(Dialogue((Turn(DEFAULT_PROMPT, text),)) for text in texts)
            self.items.append(encoder.encode(dialogues, grid))
            self.sizes.append(encoder.sizes(dialogues, grid))
        self.num_answers = images * captions
        self.num_labels = sum(int((b.labels != IGNORE_INDEX).sum()) for item in self.items for b in item.branches)

    def rows(self, shared: bool) -> list[tuple[int, Encoded]]:
        if shared:
            return list(enumerate(self.items))
        return [(i, replace(item, branches=(b,))) for i, item in enumerate(self.items) for b in item.branches]

    def groups(self, shared: bool) -> tuple[list[tuple[int, Encoded]], list[list[int]]]:
        """The step's rows (image, tokens), and the indices of those in each micro-batch."""
        lessons = self.lessons(shared)
        groups = micro_batches(lessons, self.max_tokens)
        return self.rows(shared), [[lessons.index(row) for row in group] for group in groups]

    def lessons(self, shared: bool) -> list[Lesson]:
        """The same rows, of which only the lengths are known."""
        whole = [Lesson.of(Example(str(i), (), (), ""), sizes) for i, sizes in enumerate(self.sizes)]
        return whole if shared else [row for lesson in whole for row in split_long(lesson, 0)]

    @contextmanager
    def compiled_layers(self) -> Iterator[None]:
        """Inside, the language layers compute by torch.compile, as `--compile` has them."""
        if not hasattr(self.backbone.language_model.layers[0], "uses_compiled"):
            self.backbone.compile_layers()
        self.backbone.use_compiled(True)
        try:
            yield
        finally:
            self.backbone.use_compiled(False)

    def shapes(self) -> list[MicroShape]:
        """Of the micro-batches with every technique, as `vlm-lora plan` has them."""
        lessons, (rows, groups) = self.lessons(shared=True), self.groups(shared=True)
        return [
            micro_shape([lessons[i] for i in group], tuple(len(self.features[rows[i][0]]) for i in group))
            for group in groups
        ]

    def compiled_loss(self, *how: bool) -> float:
        with self.compiled_layers():
            return self.loss(*how)

    def loss(self, shared: bool, cached: bool, sparse: bool) -> float:
        """Mean loss of the step; leaves its gradients."""
        rows, groups = self.groups(shared)
        device = self.backbone.device
        total = torch.zeros((), device=device)
        for group in groups:
            packed = pack_apart([rows[i][1] for i in group], self.backbone.pad_token_id)
            seen = [self.features[rows[i][0]] if cached else self._see(rows[i][0]) for i in group]
            placed = [t.to(device) for t in (packed.position_ids, packed.attention_mask)]
            features = torch.cat([each.to(device) for each in seen])
            batch = MicroBatch(packed.input_ids, packed.labels, *placed, features, 0, packed.forks)
            value = loss_sum(self.backbone, batch, label_logits=sparse) / self.num_labels
            value.backward()
            total += value.detach()
        return total.item()

    def _see(self, image: int) -> torch.Tensor:
        return self.backbone.tower(*self.patches[image])

    def operations(self, shared: bool, cached: bool, sparse: bool) -> float:
        """Of the matrices, forward and backward; attention's own, a few percent at this length, is left out."""
        model = self.backbone.model
        rows = self.rows(shared)
        tokens = sum(item.num_tokens for _, item in rows)
        logits = self.num_labels if sparse else tokens

        def weights(module: torch.nn.Module) -> int:
            linears = (m for m in module.modules() if hasattr(m, "in_features") and not hasattr(m, "base_layer"))
            return sum(m.in_features * m.out_features for m in linears)

        layers, head = weights(model.model.language_model.layers), weights(model.lm_head)
        tower = weights(model.model.visual.blocks) * sum(len(self.features[i]) for i, _ in rows)
        return 4.0 * (layers * tokens + head * logits) + (0.0 if cached else 2.0 * tower)


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def attainable(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    seconds(device, lambda: a @ b)
    return 2 * n**3 / statistics.median(seconds(device, lambda: a @ b) for _ in range(10))


def attempt(work: Callable[[], Any]) -> Any:
    """What it gives, or a record of why not; then what it held is freed."""
    try:
        return work()
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        failed = OUT_OF_MEMORY if is_out_of_memory(error) else said
        error.__traceback__ = None  # its frames hold tensors
    say(f"Failed: {failed}")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"failed": failed}


class Way(NamedTuple):
    """A way to compute a step of so many answers: it gives the mean loss, and leaves gradients in ``tensors``."""

    step: Callable[[], float]
    tensors: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    answers: int
    operations: float | None = None


class Bench:
    """A base model with an adapter on it, perhaps beside the users' loop: the parts that are measured of it."""

    def __init__(self, folder: str, base: str, device: torch.device, args: argparse.Namespace, with_loop: bool):
        self.base, self.device, self.args = base, device, args
        dtype = "bfloat16" if base == "nf4" else base
        self.backbone = load_backbone(folder, dtype=dtype, device=device, quantise=base == "nf4")
        config = TrainConfig(data="none", rank=RANK)
        self.loop = self._users_loop(config) if with_loop and not self.backbone.family.recurrent else None
        self.adapter = attach_adapter(self.backbone, config)
        tensors = dict(self.adapter.named_parameters())
        torch.manual_seed(1)
        with torch.no_grad():
            for tensor in tensors.values():  # LoRA starts at zero, where half of its gradients are: nothing is compared
                tensor.add_(0.02 * torch.randn_like(tensor))
        self.tensors, self.optimizer = list(tensors.values()), _optimizer(list(tensors.values()))
        if isinstance(self.loop, UsersLoop):
            self.loop.take(tensors)
            self.loop_optimizer = _optimizer(self.loop.tensors)
        config = TrainConfig(data="none", model=folder, method="qlora" if base == "nf4" else "lora", rank=RANK)
        self.cost = CostModel(config, self.backbone.dtype, device.type)
        self.compared, self.reference = self.work(args.captions, COMPARED), {}
        self.backbone.model.train()

    def _users_loop(self, config: TrainConfig) -> UsersLoop | dict:
        """With Liger where it runs with these versions; or why there is none."""

        def tried() -> UsersLoop:
            loop = UsersLoop(self.backbone, config)
            loop.loss(self.work(1, 1))
            return loop

        found = attempt(tried)
        if isinstance(found, dict):
            return attempt(lambda: UsersLoop(self.backbone, config, liger=f"failed: {found['failed']}"))
        return found

    def work(self, captions: int, images: int | None = None) -> Work:
        """Of at most so many images, or of as many as fill a micro-batch."""
        args = self.args
        make = partial(Work, self.backbone, captions=captions, side=args.side, words=args.words)
        if images is None:
            one = make(images=1, max_tokens=args.max_tokens)
            images = max(1, int(0.95 * args.max_tokens) // one.items[0].num_tokens)
        return make(images=min(images, args.images), max_tokens=args.max_tokens)

    def here(self, work: Work, how: tuple, compiled: bool = False) -> Way:
        step = partial(work.compiled_loss if compiled else work.loss, *how)
        return Way(step, self.tensors, self.optimizer, work.num_answers, work.operations(*how))

    def with_loop(self, work: Work, most: int | None = None) -> dict[str, Any]:
        """The users' loop over the step, or over its first micro-batches, where there is that loop."""
        if not isinstance(self.loop, UsersLoop):
            return {} if self.loop is None else {LOOP: self.loop}
        answers = sum(map(len, work.groups(shared=False)[1][:most]))
        return {LOOP: Way(partial(self.loop.loss, work, most), self.loop.tensors, self.loop_optimizer, answers)}

    def equality(self) -> dict:
        """Loss and gradients of each way against the first that fits; and the same step again."""
        ways = {name: self.here(self.compared, how) for name, how in VARIANTS.items()}
        ways = {"plain": ways["plain"]} | self.with_loop(self.compared) | ways
        rows = {name: attempt(partial(self._held_against_first, name, way)) for name, way in ways.items()}
        return {
            "ways": rows,
            "compared_with": self.reference.get("name"),
            "liger": getattr(self.loop, "liger", None),
            "the_same_step_again": attempt(lambda: self._twice(ways["all"])),
        }

    def _twice(self, way: Way) -> dict:
        (loss, gradient, _), (again, other, _) = self._computed(way), self._computed(way)
        return {
            "loss_equal": loss == again,
            "gradients_equal": torch.equal(gradient, other),
            "difference": float((gradient - other).norm() / gradient.norm()),
        }

    def equality_of_compiled(self) -> dict:
        way = self.here(self.compared, VARIANTS["all"], compiled=True)
        row = self._held_against_first(COMPILED, way)
        return {"ways": {COMPILED: row}, "compared_with": self.reference["name"]}

    def _held_against_first(self, name: str, way: Any) -> dict:
        if isinstance(way, dict):
            return way  # why it is not there
        loss, gradient, took = self._computed(way)
        first = self.reference = self.reference or {"name": name, "loss": loss, "gradient": gradient}
        return {
            "loss": loss,
            "loss_difference": abs(loss - first["loss"]) / abs(first["loss"]),
            "gradient_difference": float((gradient - first["gradient"]).norm() / first["gradient"].norm()),
            "first_seconds": took,
        }

    def _clear(self) -> None:
        for tensor in (*self.tensors, *(self.loop.tensors if isinstance(self.loop, UsersLoop) else ())):
            tensor.grad = None

    def _computed(self, way: Way) -> tuple[float, torch.Tensor, float]:
        """Loss, gradients on the CPU, seconds."""
        self._clear()
        losses: list[float] = []
        took = seconds(self.device, lambda: losses.append(way.step()))
        gradient = torch.cat([t.grad.flatten() for t in way.tensors if t.grad is not None]).cpu()
        self._clear()
        return losses[0], gradient, took

    def trace(self, card: Device) -> dict:
        """The trace of a step, priced for the card, beside the profiler's account of it, by class of kernel."""
        work = self.work(self.args.captions)
        step = partial(work.loss, *VARIANTS["all"])
        took = min(seconds(self.device, step) for _ in range(3))
        found = profiled(self.device, step)
        self._clear()
        shapes = work.shapes()
        said = traced_kinds(weighted_sum((1, self.cost.trace(shape)) for shape in shapes), card)
        traced = sum(kind["ms"] for kind in said.values())
        return {
            "shapes": [shape._asdict() | {"patches": len(shape.patches)} for shape in shapes],
            "ms": 1e3 * took,
            "ms_traced": traced,
            "ms_profiled": found["busy_ms"],
            "traced_over_profiled": traced / found["busy_ms"],
            "kinds": {
                kind: {"traced": said.get(kind), "profiled": found["kinds"].get(kind)}
                for kind in dict.fromkeys([*found["kinds"], *said])
            },
            "longest_profiled": found["top"],
        }

    def answers(self, captions: int, product: float, published: float | None, compiled: bool) -> dict:
        """Answers a second of each way, by turns."""
        work = self.work(captions)
        every = VARIANTS["all"]
        ways = self.with_loop(work, 1) | {"all": self.here(work, every)}
        if captions == 1 and not compiled:
            ways[ONCE] = self.here(work, (*VARIANTS["plain"][:2], True))
        if compiled:
            ways[COMPILED] = self.here(work, every, compiled=True)
        rows = self._by_turns(ways)
        for name, row in rows.items():
            if "failed" in row:
                continue
            took, way = statistics.median(row["seconds"]), ways[name]
            row |= {"answers": way.answers, "answers_per_second": way.answers / took}
            if way.operations:
                row["share_of_matrix_product"] = way.operations / took / product
                if published:
                    row["share_of_published_peak"] = way.operations / took / published
            if "seconds" in rows.get(LOOP, {}):
                theirs = [taken / ways[LOOP].answers for taken in rows[LOOP]["seconds"]]
                ours = [taken / way.answers for taken in row["seconds"]]
                row["users_loop_takes_times"] = statistics.median(map(float.__truediv__, theirs, ours))
        predicted = self.cost.weight_bytes() + TRAINED * self.cost.trained_numbers()
        predicted += max(map(self.cost.activation_bytes, work.shapes()))
        if "peak_bytes" in rows["all"]:
            rows["all"]["predicted_over_measured"] = predicted / rows["all"]["peak_bytes"]
        return {"images": len(work.items), "predicted_bytes": predicted, "ways": rows}

    def _by_turns(self, ways: dict[str, Any]) -> dict[str, dict]:
        """Seconds of each in every round, after one that warms up; on a GPU the peak of memory."""
        rows = {name: way if isinstance(way, dict) else {"seconds": []} for name, way in ways.items()}
        for number in range(self.args.rounds + 1):
            for name, way in ways.items():
                if "failed" in rows[name]:
                    continue
                found = attempt(partial(self._timed, way))
                if "failed" in found:
                    rows[name] = found
                elif number:
                    rows[name] |= found | {"seconds": [*rows[name]["seconds"], found["seconds"]]}
        self._clear()
        return rows

    def _timed(self, way: Way) -> dict:
        self._clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found: dict = {"seconds": seconds(self.device, way.step)}
        way.optimizer.step()
        if self.device.type == "cuda":
            found |= {"peak_bytes": torch.cuda.max_memory_allocated()}
            found |= {"reserved_bytes": torch.cuda.max_memory_reserved()}
        return found

    def captioning(self) -> dict:
        self.backbone.model.eval()
        pictures = self.work(1, self.args.images).pictures
        captioner = Captioner(
            self.backbone, self.adapter, FeatureCache(self.backbone, None, write=False, several=True), DEFAULT_PROMPT
        )
        decoding = Decoding(max_new_tokens=self.args.new_tokens)
        list(captioner.caption(pictures[:2], decoding=decoding))
        taken = seconds(self.device, lambda: list(captioner.caption(pictures, decoding=decoding)))
        return {"images_per_second": len(pictures) / taken, "new_tokens": self.args.new_tokens}


def _optimizer(tensors: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tensors, lr=0.0, weight_decay=0.0, fused=True)


def faults(facts: dict, *where: str) -> Iterator[str]:
    """What is not as it must be, a line each, in facts by base, part and so on."""
    said = ", ".join(where)
    if facts.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY:
        yield f"{said}: {facts['failed']}"
    if "gradient_difference" in facts:
        for name, most in zip(("loss_difference", "gradient_difference"), TOLERANCES[where[0]], strict=True):
            if not facts[name] <= most:
                yield f"{said}: {name.replace('_', ' ')} {facts[name]:.2g}, expected {most:g} at most"
    ratio = facts.get("predicted_over_measured", 1.0)
    if abs(ratio - 1) > PREDICTED_WITHIN:
        yield f"{said}: {ratio:.2f} of the measured memory was predicted; {PREDICTED_WITHIN:g} off at most"
    for name, each in facts.items():
        if isinstance(each, dict):
            yield from faults(each, *where, name)


class Record:
    """Of a size: what is known of it, in a file that is written anew as each part ends."""

    def __init__(self, size: str, about: dict, file: Path | None):
        self.facts = about | {"size": size, "results": {}, "faults": []}
        self.file = file

    def part(self, base: str, name: str, work: Callable[[], dict]) -> None:
        started = time.perf_counter()
        found = attempt(work)
        found["took_seconds"] = round(time.perf_counter() - started, 1)
        self.facts["results"].setdefault(base, {})[name] = found
        self.facts["faults"] = list(faults(self.facts["results"]))
        self.write()
        say(f"{self.facts['size']}, {base}, {name}: {found['took_seconds']} s")

    def write(self) -> None:
        if self.file:
            self.file.write_text(json.dumps(self.facts, indent=2) + "\n", encoding="utf-8")


def measure(record: Record, bench: Bench, traced_for: Device | None, product: float, published: float | None) -> None:
    """Equality, the trace, the answers a second of a base that is there, in this order, each written as it ends."""
    args, base = bench.args, bench.base
    record.part(base, "equality", bench.equality)
    if traced_for:
        record.part(base, "trace", lambda: bench.trace(traced_for))

    def answers(compiled: bool) -> None:
        for count in args.answers:
            work = partial(bench.answers, count, product, published, compiled)
            record.part(base, f"answers an image{', compiled layers' if compiled else ''}: {count}", work)

    answers(compiled=False)
    if args.compiled and not bench.backbone.family.recurrent:
        record.part(base, "equality of compiled layers", bench.equality_of_compiled)
        answers(compiled=True)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def table(results: dict[str, dict]) -> str:
    lines = [f"{'':<44}{'answers/s':>10}{'loop takes':>12}{'of product':>12}{'of peak':>9}{'peak GB':>9}"]
    for base, parts in results.items():
        for part, found in parts.items():
            for way, row in found.get("ways", {}).items():
                if "answers_per_second" not in row:
                    continue
                times, share, peak, memory = (
                    format(row[name] * scale, form) if name in row else "-"
                    for name, scale, form in (
                        ("users_loop_takes_times", 1, ".2f"), ("share_of_matrix_product", 1, ".1%"),
                        ("share_of_published_peak", 1, ".1%"), ("peak_bytes", 1e-9, ".2f"),
                    )
                )  # fmt: skip
                name = f"{base}, {part}, {way}"
                lines.append(f"{name:<44}{row['answers_per_second']:>10.1f}{times:>12}{share:>12}{peak:>9}{memory:>9}")
    return "\n".join(lines)


def versions() -> dict[str, str | None]:
    kernels = {package: version(package) for package in KERNELS if importlib.util.find_spec(KERNELS[package])}
    return {
        "vlm-lora": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "peft": version("peft"),
        "python": platform.python_version(),
    } | kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["2b", "7b"], choices=list(SIZES))
    parser.add_argument("--base", nargs="+", default=["bfloat16", "nf4"], choices=["float32", "bfloat16", "nf4"])
    parser.add_argument("--images", type=int, default=32, help="of a step, at most")
    parser.add_argument("--captions", type=int, default=5, help="of an image where ways are compared and traced")
    parser.add_argument("--answers", type=int, nargs="+", default=[1, 5, 10], help="of an image in the timed steps")
    parser.add_argument("--side", type=int, default=448, help="pixels of a picture's side; 448 are 256 tokens")
    parser.add_argument("--words", type=int, default=12, help="of a caption")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--new-tokens", type=int, default=64, help="of a generated caption")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                        help="also with torch.compile; by default on a GPU")  # fmt: skip
    parser.add_argument("--output", type=Path, help="the record's folder; default: bench/results, and none if small")
    args = parser.parse_args()
    device = best_device()
    card = device_here(device) if device.type == "cuda" else device_named("", 0)
    bases = sorted(args.base, key="nf4".__eq__)  # last, as what it tells least is the speed
    dtypes = {base: "bfloat16" if base == "nf4" else base for base in bases}
    products = {name: attainable(device, getattr(torch, name)) for name in dict.fromkeys(dtypes.values())}
    about = {
        "command": "python -m bench.gpu" + "".join(f" {a}" for a in sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "versions": versions(),
        "matrix_product_per_second": products,
        "priced_as": asdict(card),
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
    }
    records = {}
    for size in args.size:
        folder = args.output or (None if "small" in size else ROOT / "bench/results")
        records[size] = Record(size, about, folder and folder / f"gpu-{size}.json")
    records[args.size[0]].write()
    with tempfile.TemporaryDirectory() as top:
        for base in bases:
            product = products[dtypes[base]]
            published = card.tensor if device.type == "cuda" and dtypes[base] == "bfloat16" else None
            for part in ("training", "captioning"):
                for size, record in records.items():
                    folder = Path(top) / size
                    found = attempt(partial(_opened, size, folder, base, device, args, part == "training"))
                    if isinstance(found, dict):
                        record.part(base, part, partial(dict, found))
                    elif part == "captioning":
                        record.part(base, part, found.captioning)
                    else:
                        first = base != "nf4" and size == args.size[0]
                        measure(record, found, card if first else None, product, published)
                    found = None
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
    return report(records)


def _opened(size: str, folder: Path, base: str, device: torch.device, args: argparse.Namespace, train: bool) -> Bench:
    """Of weights that are written once."""
    if not folder.exists():
        say(f"{size}: writing random weights.")
        dtype = torch.float32 if args.base == ["float32"] else torch.bfloat16
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            write_model(size, Path(unfinished) / size, device, dtype)
            (Path(unfinished) / size).rename(folder)
    return Bench(str(folder), base, device, args, train and base != "nf4")


def report(records: dict[str, Record]) -> int:
    """Print all; the exit code."""
    wrong = []
    for size, record in records.items():
        wrong += [f"{size}, {fault}" for fault in record.facts["faults"]]
        print(f"{size} on {record.facts['device']}\n\n{table(record.facts['results'])}\n")
        print(json.dumps(record.facts))
    for fault in wrong:
        say(f"Wrong: {fault}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
