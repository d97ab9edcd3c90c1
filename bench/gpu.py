"""Real sizes on the machine's accelerator: answers per second, utilisation, peak memory, each technique on and off.

    python -m bench.gpu --size 2b 7b            Qwen2-VL shapes, random weights, bfloat16 and NF4
    python -m bench.gpu --size small            a minute on a CPU, to try the command

Speed and memory do not depend on what the weights are, so they are random: nothing is downloaded. A step is forward,
backward and AdamW of LoRA on synthetic pictures of one size with several captions each. Every variant does the same
step of the same answers, turn and turn about, and is checked to have the same loss:

  all            shared prefix, cached tower output, logits where there are labels
  own prefix     every answer a row of its own
  live tower     the tower computes in every step
  full logits    logits for every token
  plain          none of the three

Utilisation is the arithmetic that the model's matrices need for the tokens of that variant (2 operations a weight
forward, 2 backward; the base's weights get no gradient), over what one large matrix product attains on this device.
The record goes to bench/results/gpu-SIZE.json.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from vlm_lora import Captioner, Dialogue, Turn, __version__
from vlm_lora.cli.console import say
from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.inference.captioner import Decoding
from vlm_lora.model.adapters.lora import attach_lora
from vlm_lora.model.backbone import Backbone, best_device, load_backbone, tiny_path
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache
from vlm_lora.model.packing import IGNORE_INDEX, Encoded, pack
from vlm_lora.training.batches import micro_batches
from vlm_lora.training.loop import MicroBatch, loss_sum

ROOT = Path(__file__).resolve().parents[1]
TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
SIZES = {  # the published shapes
    "small": {
        "text": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True},
        "vision": {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        "mrope": [2, 2, 2],
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
}  # fmt: skip
VARIANTS = {  # (shared prefix, cached tower output, logits where there are labels)
    "all": (True, True, True),
    "own prefix": (False, True, True),
    "live tower": (True, False, True),
    "full logits": (True, True, False),
    "plain": (False, False, False),
}


def write_model(size: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """A checkpoint of random weights, made on the device."""
    shape = SIZES[size]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_path())
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2VLConfig(
        text_config=shape["text"] | {
            "bos_token_id": None, "eos_token_id": ids("<|im_end|>"), "pad_token_id": ids("<|endoftext|>"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": shape["mrope"]},
        },
        vision_config=shape["vision"] | {"hidden_size": shape["text"]["hidden_size"]},
        tie_word_embeddings=shape["text"]["tie_word_embeddings"],
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        model = transformers.Qwen2VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    limits = {"shortest_edge": 56 * 56, "longest_edge": 14 * 14 * 4 * 1280}
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=14, size=limits),
        video_processor=transformers.Qwen2VLVideoProcessor(patch_size=14, size=limits),
        tokenizer=tokenizer, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    model.save_pretrained(folder)
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
        self.features = [self._see(i) for i in range(images)]
        encoder = Encoder(backbone)
        self.items: list[Encoded] = []
        for (_, grid), texts in zip(self.patches, said, strict=True):
            dialogues = tuple(Dialogue((Turn(DEFAULT_PROMPT, text),)) for text in texts)
            self.items.append(encoder.encode(dialogues, grid))
        self.num_answers = images * captions
        self.num_labels = sum(int((b.labels != IGNORE_INDEX).sum()) for item in self.items for b in item.branches)

    def rows(self, shared: bool) -> list[tuple[int, Encoded]]:
        if shared:
            return list(enumerate(self.items))
        return [(i, replace(item, branches=(b,))) for i, item in enumerate(self.items) for b in item.branches]

    def loss(self, shared: bool, cached: bool, sparse: bool) -> float:
        """Mean loss of the step; leaves its gradients."""
        total = 0.0
        rows = self.rows(shared)
        device = self.backbone.device
        for group in micro_batches([item for _, item in rows], self.max_tokens):
            packed = pack([[rows[i][1]] for i in group], self.backbone.pad_token_id)
            seen = [self.features[rows[i][0]] if cached else self._see(rows[i][0]) for i in group]
            tensors = (packed.input_ids, packed.labels, packed.position_ids, packed.attention_mask)
            batch = MicroBatch(*[t.to(device) for t in tensors], torch.cat(seen), 0)
            value = (loss_sum if sparse else full_logits)(self.backbone, batch) / self.num_labels
            value.backward()
            total += value.item()
        return total

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


def full_logits(backbone: Backbone, batch: MicroBatch) -> torch.Tensor:
    hidden = backbone.forward(batch.input_ids, batch.attention_mask, batch.position_ids, batch.features)
    logits = backbone.logits(hidden)[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORE_INDEX)


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


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the whole process so far


def measure(backbone: Backbone, args: argparse.Namespace) -> dict:
    device = backbone.device
    work = Work(backbone, args.images, args.captions, args.side, args.words, args.max_tokens)
    adapter = attach_lora(backbone, rank=16, alpha=32, dropout=0.0, seed=0, prompt=DEFAULT_PROMPT)
    tensors = [p for _, p in adapter.named_parameters()]
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in tensors:  # LoRA starts at zero, where half of its gradients are: nothing would be compared
            tensor.add_(0.02 * torch.randn_like(tensor))
    optimizer = torch.optim.AdamW(tensors, lr=0.0, weight_decay=0.0, fused=True)
    backbone.model.train()
    peak_rate = attainable(device, backbone.dtype)

    rows: dict[str, dict] = {name: {"seconds": []} for name in VARIANTS}
    reference = None
    for number in range(args.rounds + 1):  # the first is the warm-up
        for name, how in VARIANTS.items():
            row = rows[name]
            if "failed" in row:
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            losses = []

            def step(how=how, losses=losses, optimizer=optimizer) -> None:
                losses.append(work.loss(*how))
                optimizer.step()

            try:
                took = seconds(device, step)
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                continue
            gradient = torch.cat([t.grad.flatten() for t in tensors])
            optimizer.zero_grad(set_to_none=True)
            reference = gradient if reference is None else reference
            row |= {
                "loss": losses[0],
                "gradient_difference": float((gradient - reference).norm() / reference.norm()),
                "peak_bytes": peak_bytes(device),
            }
            if number:
                row["seconds"].append(took)
    for name, row in rows.items():
        if "failed" in row:
            continue
        median = statistics.median(row["seconds"])
        row["answers_per_second"] = work.num_answers / median
        row["utilisation"] = work.operations(*VARIANTS[name]) / median / peak_rate
        row["time_over_all"] = statistics.median(
            a / b for a, b in zip(row["seconds"], rows["all"].get("seconds") or row["seconds"], strict=True)
        )
    del reference, optimizer, step

    backbone.model.eval()
    captioner = Captioner(backbone, adapter, FeatureCache(backbone, None), DEFAULT_PROMPT)
    decoding = Decoding(max_new_tokens=args.new_tokens)
    list(captioner.caption(work.pictures[:2], decoding=decoding))
    taken = seconds(device, lambda: list(captioner.caption(work.pictures, batch_size=16, decoding=decoding)))
    return {
        "training": rows,
        "matrix_product_per_second": peak_rate,
        "captioning": {"images_per_second": len(work.pictures) / taken, "new_tokens": args.new_tokens},
    }


def table(results: dict[str, dict]) -> str:
    lines = [f"{'base, variant':<24}{'answers/s':>10}{'time':>7}{'use':>7}{'peak GB':>9}{'gradients':>11}"]
    for base, result in results.items():
        for name, row in result["training"].items():
            if "failed" in row:
                lines.append(f"{base + ', ' + name:<24}{row['failed']:>20}")
                continue
            lines.append(
                f"{base + ', ' + name:<24}{row['answers_per_second']:>10.1f}{row['time_over_all']:>7.2f}"
                f"{100 * row['utilisation']:>6.1f}%{row['peak_bytes'] / 1e9:>9.2f}{row['gradient_difference']:>11.1e}"
            )
        lines.append(f"{base + ', captioning':<24}{result['captioning']['images_per_second']:>10.1f} images/s")
    return "\n".join(lines)


def main() -> None:
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
    args = parser.parse_args()
    device = best_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    for size in args.size:
        results = {}
        with tempfile.TemporaryDirectory() as folder:
            say(f"{size}: writing random weights.")
            write_model(size, Path(folder), device, torch.float32 if args.base == ["float32"] else torch.bfloat16)
            for base in args.base:
                say(f"{size}, {base}:")
                dtype = "bfloat16" if base == "nf4" else base
                backbone = load_backbone(folder, dtype=dtype, device=device, quantise=base == "nf4")
                results[base] = measure(backbone, args)
                del backbone
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        record = {
            "command": "python -m bench.gpu" + "".join(f" {a}" for a in sys.argv[1:]),
            "date": time.strftime("%Y-%m-%d"),
            "device": name,
            "versions": {"vlm-lora": __version__, "torch": torch.__version__, "cuda": torch.version.cuda,
                         "transformers": transformers.__version__, "python": platform.python_version()},
            "size": size,
            "settings": vars(args),
            "results": results,
        }  # fmt: skip
        if size != "small":
            out = ROOT / "bench/results" / f"gpu-{size}.json"
            out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"Qwen2-VL {size} on {name}\n\n{table(results)}\n")
        print(json.dumps(record))


if __name__ == "__main__":
    main()
