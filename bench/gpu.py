"""Real sizes on the machine's accelerator: answers per second, utilisation, peak memory, each technique on and off.

    python -m bench.gpu --size 2b 7b            Qwen2-VL shapes, random weights, bfloat16 and NF4
    python -m bench.gpu --size qwen3.5-9b       with the `gpu` extra, without which it measures what nobody should do
    python -m bench.gpu --size small            a minute on a CPU, to try the command

Speed and memory do not depend on what the weights are, so they are random: nothing is downloaded. A step is forward,
backward and AdamW of LoRA on synthetic pictures of one size with several captions each. Every variant does the same
step of the same answers, turn and turn about, and must have the loss and the gradients of the plain one, within the
tolerances below (where plain itself runs out of memory, those of the first that does not):

  all            shared prefix, cached tower output, logits where there are labels
  own prefix     every answer a row of its own
  live tower     the tower computes in every step
  full logits    logits for every token
  plain          none of the three
  all, again     as all, by turns with the next one alone, after the others
  all, compiled  and the language layers by torch.compile, as with --compile yes; the first step, not timed, compiles

The share of the matrix product is the arithmetic that the model's matrices need for the tokens of that variant (2
operations a weight forward, 2 backward; the base's weights get no gradient), over what one large matrix product attains
on this device; the share of the peak is over what the device's maker publishes, where that is known here. Memory is
held against what `vlm-lora plan` would say of the step. The record goes to bench/results/gpu-SIZE.json, also where
something is wrong, which it then says under "faults", and the exit code is 1: another loss or gradient, or memory more
than 15 % beside the prediction. What runs out of memory is recorded as that, and the rest goes on.

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
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from vlm_lora import Captioner, Dialogue, Example, Turn, __version__
from vlm_lora.config import DEFAULT_PROMPT, TrainConfig
from vlm_lora.console import say
from vlm_lora.inference.captioner import Decoding
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import Backbone, load_backbone
from vlm_lora.model.device import best_device
from vlm_lora.model.encode import Encoder, Sizes
from vlm_lora.model.features import FeatureCache
from vlm_lora.model.folder import tiny_path
from vlm_lora.model.packing import IGNORE_INDEX, Encoded, pack_apart
from vlm_lora.training.batches import MicroBatch, micro_batches, split_long
from vlm_lora.training.cost import TRAINED, CostModel, micro_shape
from vlm_lora.training.devices import DEVICES
from vlm_lora.training.lessons import Lesson
from vlm_lora.training.step import loss_sum

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
COMPILED, AGAIN = "all, compiled", "all, again"
TOLERANCES = {  # of the loss, and of the gradients' difference over their norm
    "float32": (1e-5, 1e-4),
    "bfloat16": (1e-3, 5e-2),
    "nf4": (1e-3, 5e-2),
}
PREDICTED_WITHIN = 0.15
RANK = 16
KERNELS = {"flash-linear-attention": "fla", "triton": "triton"}  # and what they are imported by
PEAKS = {  # dense operations per second in bfloat16, as NVIDIA's data sheets have them; by a part of the device's name
    "H100 80GB HBM3": DEVICES["h100"].tensor,
    "H100 PCIe": 756e12,
    "H200": DEVICES["h200"].tensor,
    "A100": DEVICES["a100"].tensor,
    "L40S": DEVICES["l40s"].tensor,
}


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
        self.compiled = False
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
        if not self.compiled:
            self.backbone.compile_layers()
            self.compiled = True
        self.backbone.use_compiled(True)
        try:
            yield
        finally:
            self.backbone.use_compiled(False)

    def predicted_bytes(self, base: str, model: str) -> int:
        """Of the step with every technique, as `vlm-lora plan` counts them."""
        config = TrainConfig(data="", model=model, method="qlora" if base == "nf4" else "lora", rank=RANK)
        cost = CostModel(config, self.backbone.dtype, self.backbone.device.type)
        lessons, (rows, groups) = self.lessons(shared=True), self.groups(shared=True)
        shapes = [
            micro_shape([lessons[i] for i in group], tuple(len(self.features[rows[i][0]]) for i in group))
            for group in groups
        ]
        return cost.weight_bytes() + TRAINED * cost.trained_numbers() + max(map(cost.activation_bytes, shapes))

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


def peak_rate(name: str) -> float | None:
    """Published, in operations per second, of a device of this name; None if it is not known here."""
    return next((rate for part, rate in PEAKS.items() if part in name), None)


def short_of_memory(error: torch.OutOfMemoryError) -> str:
    """What to record of it; frees what the failed work held."""
    error.__traceback__ = None  # its frames hold tensors
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return "out of memory"


def measure(backbone: Backbone, base: str, model: str, args: argparse.Namespace) -> Iterator[dict]:
    """What the steps of every variant take and give, and captioning; again with the compiled layers, which take minutes
    to make. Raises `torch.OutOfMemoryError` beside the steps."""
    device = backbone.device
    work = Work(backbone, args.images, args.captions, args.side, args.words, args.max_tokens)
    adapter = attach_adapter(backbone, TrainConfig(data="none", rank=RANK))
    predicted = work.predicted_bytes(base, model)
    product = attainable(device, backbone.dtype)
    published = peak_rate(device_name(device)) if backbone.dtype == torch.bfloat16 else None
    steps = Steps(work, [p for _, p in adapter.named_parameters()])
    steps.measure(VARIANTS, args.rounds)
    result = {
        "training": steps.rows,
        "matrix_product_per_second": product,
        "published_peak_per_second": published,
        "predicted_bytes": predicted,
    }
    result["captioning"] = measure_captioning(
        Captioner(backbone, adapter, FeatureCache(backbone, None), DEFAULT_PROMPT), work, args
    )
    yield result | steps.summary(product, published, predicted)
    if args.compiled and not backbone.family.recurrent:
        steps.measure({AGAIN: VARIANTS["all"], COMPILED: VARIANTS["all"]}, args.rounds)
        yield result | steps.summary(product, published, predicted)


def measure_captioning(captioner: Captioner, work: Work, args: argparse.Namespace) -> dict:
    captioner.backbone.model.eval()
    decoding = Decoding(max_new_tokens=args.new_tokens)
    try:
        list(captioner.caption(work.pictures[:2], decoding=decoding))
        taken = seconds(work.backbone.device, lambda: list(captioner.caption(work.pictures, decoding=decoding)))
    except torch.OutOfMemoryError as error:
        return {"failed": short_of_memory(error)}
    return {"images_per_second": len(work.pictures) / taken, "new_tokens": args.new_tokens}


class Steps:
    """The steps of variants by turns: seconds of each, loss, difference of the gradients, and on a GPU the peak."""

    def __init__(self, work: Work, tensors: list[torch.nn.Parameter]):
        self.work, self.tensors = work, tensors
        torch.manual_seed(1)
        with torch.no_grad():
            for tensor in tensors:  # LoRA starts at zero, where half of its gradients are: nothing would be compared
                tensor.add_(0.02 * torch.randn_like(tensor))
        self.optimizer = torch.optim.AdamW(tensors, lr=0.0, weight_decay=0.0, fused=True)
        self.rows: dict[str, dict] = {}
        self.reference: torch.Tensor | None = None

    def measure(self, variants: dict[str, tuple], rounds: int) -> None:
        """Rounds of these, after one that warms up."""
        self.work.backbone.model.train()
        self.rows |= {name: {"seconds": []} for name in variants}
        for number in range(rounds + 1):
            for name, how in variants.items():
                if "failed" not in self.rows[name]:
                    self._step(name, how, number)

    def _step(self, name: str, how: tuple, number: int) -> None:
        work, row = self.work, self.rows[name]
        device = work.backbone.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def step() -> None:
            with work.compiled_layers() if name == COMPILED else nullcontext():
                row["loss"] = work.loss(*how)
            self.optimizer.step()

        try:
            took = seconds(device, step)
        except torch.OutOfMemoryError as error:
            self.optimizer.zero_grad(set_to_none=True)
            self.rows[name] = {"failed": short_of_memory(error)}
            return
        if device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
            row["reserved_bytes"] = torch.cuda.max_memory_reserved()
        if number:
            row["seconds"].append(took)
        else:
            row["first_seconds"] = took
            gradient = torch.cat([t.grad.flatten() for t in self.tensors if t.grad is not None]).cpu()
            self.reference = gradient if self.reference is None else self.reference
            row["gradient_difference"] = float((gradient - self.reference).norm() / self.reference.norm())
        self.optimizer.zero_grad(set_to_none=True)

    def summary(self, product: float, published: float | None, predicted: int) -> dict:
        """What the rows come to, beside what a large product attains on the device, and what its maker publishes."""
        reference = next((name for name, row in self.rows.items() if "failed" not in row), None)
        for name, row in self.rows.items():
            if "failed" in row:
                continue
            median = statistics.median(row["seconds"])
            rate = self.work.operations(*VARIANTS[name.split(",")[0]]) / median
            row["answers_per_second"] = self.work.num_answers / median
            row["share_of_matrix_product"] = rate / product
            if published:
                row["share_of_published_peak"] = rate / published
            plain = self.rows[reference]["seconds"]
            row["time_over_plain"] = statistics.median(a / b for a, b in zip(row["seconds"], plain, strict=True))
        measured = self.rows["all"].get("peak_bytes")
        more = {"predicted_over_measured": predicted / measured} if measured else {}
        return {"compared_with": reference, **more}


def faults(results: dict[str, dict]) -> list[str]:
    """What is not as it must be, a line each."""
    found = []
    for base, result in results.items():
        loss_within, gradients_within = TOLERANCES[base]
        rows = result.get("training", {})
        for name, row in rows.items():
            if "failed" in row:
                continue
            plain = rows[result["compared_with"]]["loss"]
            if not abs(row["loss"] - plain) <= loss_within * abs(plain):
                found.append(f"{base}, {name}: loss {row['loss']:.7g}, expected {plain:.7g} within {loss_within:g}")
            if not row["gradient_difference"] <= gradients_within:
                difference = row["gradient_difference"]
                found.append(f"{base}, {name}: gradients differ by {difference:.2g}, expected {gradients_within:g}")
        ratio = result.get("predicted_over_measured", 1.0)
        if abs(ratio - 1) > PREDICTED_WITHIN:
            found.append(f"{base}: {ratio:.2f} of the measured memory was predicted; {PREDICTED_WITHIN:g} off at most")
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def table(results: dict[str, dict]) -> str:
    columns = f"{'answers/s':>10}{'time':>7}{'of product':>12}{'of peak':>9}{'peak GB':>9}{'gradients':>11}"
    lines = [f"{'base, variant':<24}{columns}"]
    for base, result in results.items():
        if "failed" in result:
            lines.append(f"{base:<24}{result['failed']:>20}")
            continue
        for name, row in result["training"].items():
            if "failed" in row:
                lines.append(f"{base + ', ' + name:<24}{row['failed']:>20}")
                continue
            peak = f"{row['share_of_published_peak']:.1%}" if "share_of_published_peak" in row else "-"
            memory = f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "-"
            lines.append(
                f"{base + ', ' + name:<24}{row['answers_per_second']:>10.1f}{row['time_over_plain']:>7.2f}"
                f"{row['share_of_matrix_product']:>12.1%}{peak:>9}{memory:>9}{row['gradient_difference']:>11.1e}"
            )
        lines.append(f"{base + ', predicted':<24}{'':>38}{result['predicted_bytes'] / 1e9:>9.2f}")
        captioning = result["captioning"]
        speed = captioning.get("failed") or f"{captioning['images_per_second']:.1f} images/s"
        lines.append(f"{base + ', captioning':<24}{speed:>20}")
    return "\n".join(lines)


def measure_size(size: str, device: torch.device, args: argparse.Namespace) -> Iterator[dict[str, dict]]:
    """Of each base: what `measure` gives, or that it does not fit; as often as there is more."""
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        say(f"{size}: writing random weights.")
        try:
            write_model(size, Path(folder), device, torch.float32 if args.base == ["float32"] else torch.bfloat16)
        except torch.OutOfMemoryError as error:
            yield {base: {"failed": short_of_memory(error)} for base in args.base}
            return
        for base in args.base:
            say(f"{size}, {base}:")
            dtype = "bfloat16" if base == "nf4" else base
            try:
                backbone = load_backbone(folder, dtype=dtype, device=device, quantise=base == "nf4")
                for result in measure(backbone, base, folder, args):
                    results[base] = result
                    yield results
            except torch.OutOfMemoryError as error:
                results[base] = {"failed": short_of_memory(error)}
            backbone = None
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    yield results


def versions() -> dict[str, str | None]:
    kernels = {package: version(package) for package in KERNELS if importlib.util.find_spec(KERNELS[package])}
    return {
        "vlm-lora": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    } | kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["2b", "7b"], choices=list(SIZES))
    parser.add_argument("--base", nargs="+", default=["bfloat16", "nf4"], choices=["float32", "bfloat16", "nf4"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--side", type=int, default=448, help="pixels of a picture's side; 448 are 256 tokens")
    parser.add_argument("--words", type=int, default=12, help="of a caption")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--new-tokens", type=int, default=64, help="of a generated caption")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                        help="also with torch.compile; by default on a GPU")  # fmt: skip
    args = parser.parse_args()
    device = best_device()
    name, wrong = device_name(device), []
    for size in args.size:
        results: dict[str, dict] = {}
        for results in measure_size(size, device, args):
            record = {
                "command": "python -m bench.gpu" + "".join(f" {a}" for a in sys.argv[1:]),
                "date": time.strftime("%Y-%m-%d"),
                "device": name,
                "versions": versions(),
                "size": size,
                "settings": vars(args),
                "results": results,
                "faults": faults(results),
            }
            if "small" not in size:  # written as it grows: what comes last may not fit the time
                out = ROOT / "bench/results" / f"gpu-{size}.json"
                out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        wrong += [f"{size}, {fault}" for fault in faults(results)]
        print(f"{size} on {name}\n\n{table(results)}\n")
        print(json.dumps(record))
    for fault in wrong:
        say(f"Wrong: {fault}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
