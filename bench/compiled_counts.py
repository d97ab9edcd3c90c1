"""What a step costs a GPU with compiled layers, counted without one: by the trace, and by the compiler's own account.

    python -m bench.compiled_counts --size 2b 7b

`vlm-lora plan` traces the plain step, kernel by kernel (training/trace.py). With `--compile` the language layers are
compiled: their matrix products and attention stay what they are, and all between them becomes a few fused kernels. How
many, and how many bytes each reads and writes, the compiler says itself (torch._inductor's metrics). So one layer is
compiled here, on the CPU and for few tokens, at two sizes; bytes are a line through both. The CPU's kernels are not the
GPU's, but what is fused into one is decided by the same scheduler.

Everything is priced as `plan` prices it: the published figures of the device, 81 % of them attained in one large
kernel, 2 microseconds a kernel at least (training/devices.py). The share of the peak is of the useful operations: four
for each weight of the base's language layers and token. Two plain loops are counted beside it, a row for each answer:
the one that users run (bench/plain_counts.py), and one as fast as can be, which nobody has: the same compiled layers
and LoRA, and of the tower, which runs for each answer, the matrix products and attention alone.
"""

import argparse
import copy
import json
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from bench.gpu import RANK, ROOT, write_model
from bench.origin import origin
from bench.plain_counts import ASSUMPTIONS, PlainLoop
from vlm_lora.config import TrainConfig
from vlm_lora.model.adapters.lora import compute_in_base_format
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.shapes import load_sample
from vlm_lora.training.devices import DEVICES, Device, kernel_seconds, price
from vlm_lora.training.step import loss_sum
from vlm_lora.training.trace import Kernel, MicroShape, Traced, TracedModel, micro_batch

ATTENTION = "_scaled_dot_product"
STAYS = ("mm", "addmm", "bmm", ATTENTION)
"""What a compiler leaves as it is, by what the names begin with."""
PROMPT, ANSWER, LABELS, PATCHES = 21, 23, 14, 1024
"""Tokens of the question's part of a prefix, of a branch and of those with loss in it; patches of 448 x 448 pixels."""
TOKENS = 3900
"""Of a micro-batch, about."""
ANSWERS, IMAGE_TOKENS = (1, 5, 10), (256, 1280, 4096)
"""An image."""


class Fused(NamedTuple):
    """A fused kernel's bytes: those that it always reads and writes, and those for each token."""

    fixed: float
    each: float


class Sizes:
    """A base model of these published sizes: traces of its plain step, and the fused kernels of one of its layers."""

    def __init__(self, size: str, folder: Path, device: Device):
        self.device, self.folder = device, folder
        write_model(size, folder, torch.device("meta"), torch.bfloat16)
        self.config = json.loads((folder / "config.json").read_text())
        self.layers = self.config["text_config"]["num_hidden_layers"]
        self.whole, self.one, self.two = (self.traced(n) for n in (self.layers, 1, 2))
        self.projector_only = self.traced(self.layers, targets="projector")
        self.fused = fused_kernels(self.cut(1))
        self.plain_loop = PlainLoop(str(folder), self.layers, RANK)

    def cut(self, layers: int) -> Path:
        """A folder of the same model with so many language layers."""
        folder = self.folder / f"{layers}"
        folder.mkdir(exist_ok=True)
        for file in self.folder.iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        text = self.config["text_config"] | {"num_hidden_layers": layers}
        text["layer_types"] = ["full_attention"] * layers
        (folder / "config.json").write_text(json.dumps(self.config | {"text_config": text}))
        return folder

    def traced(self, layers: int, **settings: Any) -> TracedModel:
        config = TrainConfig(data="", model=str(self.cut(layers)), rank=RANK, **settings)
        return TracedModel(config, torch.bfloat16, "cuda")

    def compiled(self, shape: MicroShape) -> Traced:
        """The step with compiled layers: the plain one, with the fused kernels for what stood between the products."""
        kernels, tokens = Counter(self.one.step(shape).kernels), shape.rows * shape.width
        layer = Counter(self.two.step(shape).kernels)
        layer.subtract(kernels)
        stays = {kernel: count for kernel, count in layer.items() if kernel.name.startswith(STAYS)}
        made = Counter(Kernel("fused", torch.bfloat16, 0, round(f.fixed + f.each * tokens)) for f in self.fused)
        for kernel, count in layer.items():
            kernels[kernel] -= count  # the one that is there
        for kernel, count in (Counter(stays) + made).items():
            kernels[kernel] += self.layers * count
        return Traced(kernels, 0, 0)

    def report(self, shape: MicroShape, step: Traced) -> dict:
        priced = price(step, self.device)
        useful = 4.0 * self.whole.language_weights * shape.rows * shape.width
        return {
            "milliseconds": 1e3 * priced.device,
            "of_products": 1e3 * priced.products,
            "of_memory_traffic": 1e3 * priced.traffic,
            "kernels": step.num_kernels,
            "useful_share_of_peak": useful / priced.device / self.device.tensor,
        }

    def tower_seconds(self, images: int = 1, products_alone: bool = False) -> float:
        """Of an image, where so many go through it together."""
        tower = self.one.tower([PATCHES] * images)
        if not products_alone:
            return price(tower, self.device).device / images
        kernels = tower.kernels.items()
        return sum(c * max(kernel_seconds(k, self.device)) for k, c in kernels if k.name.startswith(STAYS)) / images

    def low_rank(self, shape: MicroShape) -> dict:
        """What LoRA costs in the language layers of the plain step: that step less the one without."""
        kernels = Counter(self.whole.step(shape).kernels)
        kernels.subtract(self.projector_only.step(shape).kernels)
        seconds = sum(count * max(kernel_seconds(kernel, self.device)) for kernel, count in kernels.items())
        return {"milliseconds": 1e3 * seconds, "kernels": sum(kernels.values())}

    def an_answer(self, answers: int) -> dict[str, float]:
        """Seconds that an answer takes here, from a full cache, and in plain loops; and how many times theirs are."""
        shared, own = shape_of(answers, shared=True), shape_of(answers, shared=False)
        took = {
            "here": price(self.compiled(shared), self.device).device / shared.branches,
            "here_without_compiling": price(self.whole.step(shared), self.device).device / shared.branches,
            "plain": price(self.plain_loop.step(own), self.device).device / own.branches + self.tower_seconds(own.rows),
            "plain_as_fast_as_can_be": price(self.compiled(own), self.device).device / own.branches
            + self.tower_seconds(products_alone=True),
        }
        return {f"ms_{name}": 1e3 * seconds for name, seconds in took.items()} | {
            "plain_takes_times": took["plain"] / took["here"],
            "plain_takes_times_without_compiling": took["plain"] / took["here_without_compiling"],
            "plain_as_fast_as_can_be_takes_times": took["plain_as_fast_as_can_be"] / took["here"],
        }

    def seen_once(self) -> dict[str, float]:
        """An answer an image, seen once: nothing cached and nothing shared, and the tower in the step, for an image at
        a time."""
        own = shape_of(1, shared=False)
        here = price(self.compiled(own), self.device).device / own.branches + self.tower_seconds()
        plain = price(self.plain_loop.step(own), self.device).device / own.branches + self.tower_seconds(own.rows)
        return {"ms_here": 1e3 * here, "ms_plain": 1e3 * plain, "plain_takes_times": plain / here}

    def attention(self, patches: int) -> dict:
        """What attention takes of the step where images are so large; and of that, what the branches' masked part
        takes, with its mask."""
        shape = shape_of(5, shared=True, patches=patches)
        step = self.compiled(shape)
        took = sum(
            c * max(kernel_seconds(k, self.device)) for k, c in step.kernels.items() if k.name.startswith(ATTENTION)
        )
        masked, causal = (shape.width - shape.prefix) * shape.width, shape.prefix**2
        return {
            "share_of_step": took / price(step, self.device).device,
            "masked_share_of_attention": masked / (masked + causal),
            "mask_bytes": shape.rows * masked,
            "bytes_of_a_mask_of_all_tokens": shape.rows * shape.width**2,
        }


def shape_of(answers: int, shared: bool, patches: int = PATCHES) -> MicroShape:
    """A micro-batch of images with so many answers each."""
    prefix, branches = PROMPT + patches // 4, answers if shared else 1
    width = prefix + branches * ANSWER
    rows = max(1, round(TOKENS / width))
    return MicroShape(rows, width, prefix, rows * branches, LABELS * rows * branches, (patches,) * rows)


def fused_kernels(folder: Path) -> list[Fused]:
    """Of one layer's forward and backward pass, as the compiler accounts for them."""
    sizes, counts = [], []
    for width in (32, 64):
        counts.append(2 * width)
        sizes.append(_accounted(folder, MicroShape(2, width, 20, 2, 8, ())))
    (few, many), (small, large) = counts, sizes
    assert len(small) == len(large), "the same layer was compiled into other kernels for other tokens"
    lines = [((b - a) / (many - few), a, few) for a, b in zip(small, large, strict=True)]
    return [Fused(at - each * tokens, each) for each, at, tokens in lines]


def _accounted(folder: Path, shape: MicroShape) -> list[int]:
    """Bytes of each fused kernel. The weights are random: a compiler does not look at them. It plans its kernels, and
    then no code is made of them and nothing is computed, as either would take minutes."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    counted_elsewhere = ExternKernelSchedulerNode, NopKernelSchedulerNode  # products and attention; memory, made ready
    sizes: list[int] = []

    def planned(graph: Any) -> None:
        graph.init_wrapper_code()
        graph._update_scheduler()
        sizes.extend(4 * n for node, n in graph.count_bytes()[1] if not isinstance(node, counted_elsewhere))
        raise StopIteration

    def inner(graph: torch.fx.GraphModule, inputs: Any, **how: Any) -> Any:
        plain, before = copy.deepcopy(graph), len(sizes)
        try:
            compile_fx_inner(graph, inputs, **how)
        except Exception:
            if len(sizes) == before:
                raise
        return partial(_nothing_computed, plain)

    torch._dynamo.reset()
    backbone = load_sample(str(folder), dtype="bfloat16", device=torch.device("cpu"))
    attach_adapter(backbone, TrainConfig(data="", rank=RANK))
    compute_in_base_format(backbone, True)
    backbone.compile_layers(lambda graph, inputs: compile_fx(graph, inputs, inner_compile=inner))
    backbone.model.train()
    batch = micro_batch(backbone, shape)
    with (
        mock.patch.object(GraphLowering, "codegen", planned),
        torch._inductor.config.patch(force_disable_caches=True),  # what is found there is not accounted for
    ):
        loss_sum(backbone, batch).backward()
    assert sizes, "the compiler has accounted for nothing"
    return sizes


def _nothing_computed(graph: torch.fx.GraphModule, *inputs: Any) -> Any:
    """Zeros of the shapes that the graph gives."""
    with FakeTensorMode() as mode:
        out = graph(*(mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in inputs))
    return tree_map_only(torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).zero_(), out)


def counted(size: str, device: Device) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        sizes = Sizes(size, Path(folder), device)
        shape = shape_of(5, shared=True)
        return {
            "shape": shape._asdict() | {"patches": len(shape.patches)},
            "plain": sizes.report(shape, sizes.whole.step(shape)),
            "compiled": sizes.report(shape, sizes.compiled(shape)),
            "fused_kernels_a_layer": len(sizes.fused),
            "fused_bytes_a_layer_and_token": sum(fused.each for fused in sizes.fused),
            "lora_of_the_language_layers_plain": sizes.low_rank(shape),
            "attention_by_image_tokens": {str(tokens): sizes.attention(4 * tokens) for tokens in IMAGE_TOKENS},
            "an_answer_by_answers_an_image": {str(answers): sizes.an_answer(answers) for answers in ANSWERS},
            "an_answer_seen_once": sizes.seen_once(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["2b", "7b"], choices=("2b", "7b"))
    parser.add_argument("--device", default="h200", choices=list(DEVICES))
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/compiled-counts.json")
    options = parser.parse_args()
    results = {size: counted(size, DEVICES[options.device]) for size in options.size}
    facts = origin("compiled_counts", f"counted for one {options.device.upper()}")
    facts |= {"results": results, "assumptions_of_the_plain_loop": ASSUMPTIONS}
    options.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
